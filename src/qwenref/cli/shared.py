"""What commands have in common: getting ready for JAX, printing, progress."""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Timer
from time import monotonic
from typing import Any

from qwenref.progress import SILENT, Progress

M_ARENA_MAX = -8
"""From glibc's malloc.h: how many heaps threads may have between them."""

SHOWN_AFTER = 2.0
"""Seconds: what takes less shows no progress."""


@contextmanager
def ready_for_jax(device: str) -> Iterator[None]:
    """Set what has to be set before JAX is imported, which is to be done in the block."""
    import ctypes

    from qwenref.programs import kept_programs

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # others use the GPU too
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # do not even wake the GPU
    with suppress(AttributeError):  # there is mallopt in glibc, where each thread of XLA would
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # otherwise keep freed memory for itself
    with kept_programs():
        yield


def print_whole(text: str, *, json: bool = False) -> None:
    """Print; if nobody reads any more, the exit status still says what was found.

    JSON is UTF-8 whatever the terminal's encoding; in text, what that lacks is escaped.
    """
    if sys.stdout is None:
        return
    encoding = "utf-8" if json else sys.stdout.encoding
    content = (text.rstrip("\n") + "\n").encode(encoding, "backslashreplace")
    try:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit


@contextmanager
def shown_progress(quiet: bool) -> Iterator[Progress]:
    """Show on a terminal how far a run is that takes long; elsewhere show nothing."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield SILENT
        return
    shown = _Shown()
    try:
        yield shown
    finally:
        shown.end()


class _Shown(Progress):
    """One line on the terminal: the step, bytes done, and the time that the others will take."""

    def __init__(self) -> None:
        self._name, self._done, self._total = "starting", 0, 0
        self._began = monotonic()
        self._status: Any = None
        self._timer = Timer(SHOWN_AFTER, self._show)
        self._timer.daemon = True
        self._timer.start()

    def _show(self) -> None:
        from rich.console import Console

        self._status = Console(stderr=True).status(str(self))
        self._status.start()

    def step(self, name: str) -> None:
        self._name = name
        self._update()

    def expect(self, total: int) -> None:
        self._total, self._began = total, monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        self._update()

    def _update(self) -> None:
        if self._status is not None:
            self._status.update(str(self))

    def __str__(self) -> str:
        if not 0 < self._done < self._total:
            return self._name
        from rich.filesize import decimal

        left = (monotonic() - self._began) * (self._total / self._done - 1)
        minutes, seconds = divmod(math.ceil(left), 60)
        amounts = f"{decimal(self._done)} of {decimal(self._total)}"
        return f"{self._name}: {amounts}, {minutes}:{seconds:02} left"

    def end(self) -> None:
        """Remove the line."""
        self._timer.cancel()
        self._timer.join()
        if self._status is not None:
            self._status.stop()
