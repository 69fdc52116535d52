"""Running a command as a whole process: how long, how much memory, how many bytes read."""

import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

INTERVAL = 0.005
"""Seconds between two looks at a process."""


class Measured(NamedTuple):
    """What one process took.

    Attributes:
        seconds: Wall clock.
        peak: Bytes of memory that it and its children held at most: the sum of their maxima.
        read: Bytes that it asked the system for, by reading; mapped ones do not count.
        loaded: Bytes that came from the disk, mapped or read, for what was not cached.
    """

    seconds: float
    peak: int
    read: int
    loaded: int


def measure(
    command: Sequence[str], *, status: int = 0, env: Mapping[str, str] | None = None
) -> Measured:
    """Run a command, without its output.

    Args:
        command: What to run.
        status: The exit status that it should have.
        env: Environment variables besides those there are.

    Raises:
        subprocess.CalledProcessError: It had another one.
    """
    peaks: dict[str, int] = {}
    start = time.perf_counter()
    environment = os.environ | (env or {})
    with TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=environment)
        taken, seconds = _watched(process, peaks), time.perf_counter() - start
        said.seek(0)
        error = said.read()
    if process.returncode != status:
        raise subprocess.CalledProcessError(process.returncode, command, stderr=error)
    return Measured(seconds, sum(peaks.values()), taken["rchar"], taken["read_bytes"])


def _watched(process: subprocess.Popen[bytes], peaks: dict[str, int]) -> dict[str, int]:
    """Wait for a process, noting the most memory of each of its tree; return what it read."""
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        for member in _tree(str(process.pid)):
            try:
                found = _fields(Path(f"/proc/{member}/status")).get("VmHWM", 0) << 10
            except OSError:  # it is gone
                continue
            peaks[member] = max(found, peaks.get(member, 0))
        time.sleep(INTERVAL)
    taken = _fields(Path(f"/proc/{process.pid}/io"))
    process.wait()
    return taken


def _tree(process: str) -> Iterator[str]:
    yield process
    try:
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            for child in children.read_text().split():
                yield from _tree(child)
    except OSError:
        return


def _fields(path: Path) -> dict[str, int]:
    """Return the numbers of a file of lines ``name: number unit``."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {
        words[0].rstrip(":"): int(words[1]) for words in lines if words[1:2] and words[1].isdigit()
    }


def forget(*files: Path) -> None:
    """Let the system drop files from its cache, so that the next one who reads them must load."""
    for path in files:
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
