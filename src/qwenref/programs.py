"""Compiled programs, kept from one process to the next.

JAX's own cache writes an entry in place, and warns of a broken one in every process that meets it.
So it is given a folder of this process alone, with links to entries that are whole; what it adds
there is kept, by renaming, once the process is done with it.
"""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from time import time

from blake3 import blake3
from platformdirs import user_cache_path

from qwenref.errors import QwenrefError
from qwenref.files import read_bounded

SWITCH = "QWENREF_CACHE"
"""Environment variable: "off" keeps nothing."""

MOST = 512
"""Programs that are kept, the oldest go first: to look through so many takes 0.03 seconds."""

MOST_BYTES = 64 << 20
"""Of one program; on a CPU they have 5,000."""

A_DAY = 86_400
"""Seconds after which the folder of a process that was killed is removed."""

OWN = "process-"

TROUBLE = "persistent compilation cache entry"
"""What JAX says when it could not read or write one."""

SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # JAX would keep none of under a second
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",  # their paths would be part of the key
}


@contextmanager
def kept_programs() -> Iterator[None]:
    """Let JAX, to be imported within the block, find what earlier processes compiled.

    Whatever goes wrong with that is nobody's trouble: programs are compiled again. Nothing is done
    if the user has switched it off, or has given JAX a folder himself.
    """
    off = os.environ.get(SWITCH) == "off" or "JAX_COMPILATION_CACHE_DIR" in os.environ
    store = None if off or "jax" in sys.modules else _Store.opened()
    if store is None:
        yield
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in SETTINGS.items()})
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(store.own)
    with warnings.catch_warnings():
        warnings.filterwarnings("always", f".*{TROUBLE}")
        show = warnings.showwarning

        def watch(message: Warning | str, *where: object, **more: object) -> None:
            if TROUBLE in str(message):
                store.broken = True
            else:
                show(message, *where, **more)  # pyright: ignore[reportArgumentType]

        warnings.showwarning = watch
        try:
            yield
        finally:
            store.close()


class _Store:
    """The folder of this process, and that of all.

    Attributes:
        own: Where JAX finds programs, under the names it gives them, and adds others.
        broken: Whether JAX could not read or write an entry.
    """

    def __init__(self, folder: Path):
        self.broken = False
        self._folder = folder
        self.own = Path(mkdtemp(prefix=OWN, dir=folder))
        self._known: set[str] = set()
        for entry in _entries(folder):
            name, _, digest = entry.name.rpartition(".")
            with suppress(OSError):
                if name not in self._known and digest == _digest(entry):
                    (self.own / name).hardlink_to(entry)
                    self._known.add(name)
                else:
                    entry.unlink()

    @classmethod
    def opened(cls) -> "_Store | None":
        """Return the store of this machine and these versions; None if there cannot be one."""
        try:
            folder = user_cache_path("qwenref") / "programs"
            folder /= f"jax-{version('jax')}-jaxlib-{version('jaxlib')}-{_cpu()}"
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None  # others could plant programs there
            return cls(folder)
        except (OSError, RuntimeError):  # RuntimeError: nobody's home
            return None

    def close(self) -> None:
        """Keep what JAX added, or, if an entry was broken, nothing at all."""
        with suppress(OSError):
            for path in self.own.iterdir():
                digest = None if self.broken or path.name in self._known else _digest(path)
                if digest:
                    path.replace(self._folder / f"{path.name}.{digest}")
                else:
                    path.unlink()
            self.own.rmdir()
            self._tidy()

    def _tidy(self) -> None:
        """Remove what is too much, and what killed processes left."""
        if self.broken:
            for entry in _entries(self._folder):
                entry.unlink()
        entries = [*self._folder.parent.glob("*/*-cache.*")]
        for entry in sorted(entries, key=lambda entry: -entry.stat().st_mtime)[MOST:]:
            entry.unlink()
        for left in self._folder.glob(f"{OWN}*"):
            if time() - left.stat().st_mtime > A_DAY:
                for path in left.iterdir():
                    path.unlink()
                left.rmdir()


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() or path.is_symlink()]


def _digest(entry: Path) -> str | None:
    """Return the hash in the name of an entry that is whole, None if it cannot be read."""
    try:
        return blake3(read_bounded(entry, MOST_BYTES)).hexdigest(16)
    except QwenrefError:
        return None


def _cpu() -> str:
    """Return what tells CPUs apart that do not run each other's programs."""
    telling = ("vendor_id", "cpu family", "model", "model name", "flags")
    telling += ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features")
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    lines = [line for line in first.splitlines() if line.split(":")[0].strip() in telling]
    return blake3("\n".join(lines).encode()).hexdigest(8)
