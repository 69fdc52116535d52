"""Running the command in real processes, and looking at what they leave behind."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from helpers import whole

from qwenref.dumps.manifest import Manifest, read_manifest
from qwenref.errors import QwenrefError

CAPTURE = ("capture", "--device", "cpu")  # without waking, or warning about, a GPU
QUICK = (*CAPTURE, "--stages", "attn_norm", "--tokens", "1")
PATIENCE = 60
"""Seconds after which a process counts as stuck."""

LAUNCH = r"""
import os, re, resource, runpy, signal, sys

log, pattern, nth, number, limit, shown_after = sys.argv[1:7]
del sys.argv[1:7]
log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
nth, number, seen = int(nth), int(number), 0

def watch(event, args):
    global seen
    if event == "import":
        what = f"import {args[0]}"
    elif event in ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir"):
        if not (str(args[0]).startswith("out") or args[-1] != -1):
            return
        what = f"{event} {args[0]}"
    elif event == "open" and str(args[0]).startswith("out") and set(args[1] or "") & set("wxa"):
        what = f"open {args[0]}"
    else:
        return
    if seen < nth and re.match(pattern, what):
        seen += 1
        os.write(log, f"{what}\n".encode())
        if seen == nth:
            os.kill(os.getpid(), number)

signal.signal(signal.SIGINT, signal.default_int_handler)
if limit != "none":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
sys.addaudithook(watch)
sys.argv[0] = "qwenref"
if shown_after != "as usual":
    from qwenref.cli import shared
    shared.SHOWN_AFTER = float(shown_after)
runpy.run_module("qwenref", run_name="__main__", alter_sys=True)
"""
"""Runs the command, and sends it a signal at the n-th matching change below `out`.

Python announces each such change just before making it, so these are all the moments at which a
process can die that differ on disk, except within one write.
"""

CHANGES = r"os\.|open "


class Outcome(NamedTuple):
    """How a process ended."""

    status: int
    out: str
    err: str


class Start:
    """Starts the command; what still runs in the end is killed."""

    def __init__(self, stack: ExitStack):
        self._stack = stack

    def __call__(
        self,
        cwd: Path,
        *arguments: str,
        at: str = "never",
        nth: int = 1,
        send: int = 0,
        file_size: int | None = None,
        shown_after: float | None = None,
        env: dict[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """Start it in `cwd`.

        Args:
            cwd: Where; `moments` in it will list the changes.
            arguments: Of the command; the dump should go to `out`.
            at: Regular expression of the moment, see `LAUNCH`, at which to send a signal.
            nth: Which of the moments that match.
            send: The signal.
            file_size: The most bytes that a file may get.
            shown_after: Seconds after which a terminal shows progress.
            env: Additional environment variables.
            stdin: As for `subprocess.Popen`.
            stdout: As for `subprocess.Popen`.
            stderr: As for `subprocess.Popen`.
        """
        launch = [str(cwd / "moments"), at, str(nth), str(int(send)), str(file_size or "none")]
        launch.append("as usual" if shown_after is None else str(shown_after))
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *launch, *arguments],
            cwd=cwd,
            env=os.environ | (env or {}),
            encoding="utf-8",
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
        self._stack.enter_context(process)
        self._stack.callback(process.kill)
        return process


@contextmanager
def starting() -> Iterator[Start]:
    with ExitStack() as stack:
        yield Start(stack)


def ended(process: subprocess.Popen[str]) -> Outcome:
    out, err = process.communicate(timeout=PATIENCE)
    return Outcome(process.returncode, out, err)


def snapshot(directory: Path) -> dict[str, bytes | str | None]:
    """Return everything below a directory: bytes of files, targets of links, None for folders."""
    return {
        str(path.relative_to(directory)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in directory.rglob("*")
    }


def finished(directory: Path) -> Manifest | None:
    """Return the manifest of a directory that reads as a finished dump; it must be whole then."""
    try:
        read_manifest(directory)
    except QwenrefError:
        return None
    return whole(directory)


def one_line(err: str, *words: str) -> str:
    assert err.startswith("qwenref: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for word in words:
        assert word in err
    return err


def copy_of(old_dump: Path) -> Callable[[Path], None]:
    def copy(cwd: Path) -> None:
        (cwd / "out" / "layer-0").mkdir(parents=True)
        for file in ("manifest.json", "layer-0/k_post_rope.bin"):
            (cwd / "out" / file).write_bytes((old_dump / "out" / file).read_bytes())

    return copy
