"""What commands have in common: getting ready for JAX, printing, progress."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

M_ARENA_MAX = -8
"""From glibc's malloc.h: how many heaps threads may have between them."""


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
def shown_progress(quiet: bool) -> Iterator[Callable[[str], object]]:
    """Show the current step on a terminal; elsewhere show nothing."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update
