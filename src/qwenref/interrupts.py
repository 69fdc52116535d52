"""Holding back Ctrl-C and termination where half a step must not be left behind."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupts:
    """Within this context the signals that Python code handles wait, except in `let_through`.

    The first one let through closes it again, so that what cleans up is not disturbed by a second
    one. One that waited is delivered at the end. In another thread than the main one there is
    nothing to hold back: Python delivers no signals there.
    """

    def __enter__(self) -> "Interrupts":
        self._open = False
        self._waiting: list[int] = []
        self._raised: BaseException | None = None
        self._handlers: dict[int, Any] = {}
        if current_thread() is main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                handler = signal.getsignal(number)
                if callable(handler):  # else it ends the process at once, or is ignored
                    self._handlers[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._waiting:
            signal.raise_signal(self._waiting[0])

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Deliver what waited, and, within this block, what comes.

        Python drops an exception that a handler raises while an object is finalized or a garbage
        collection is announced (JAX has itself called then); so it is raised again in the end.
        """
        self._open = True
        try:
            while self._waiting:
                self._receive(self._waiting.pop(0), None)
            yield
            if self._raised is not None:
                raise self._raised
        finally:
            self._open = False

    def deliver(self) -> None:
        """Deliver what waited."""
        with self.let_through():
            pass

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._open:
            self._waiting.append(number)
            return
        self._open = False
        try:
            self._handlers[number](number, frame)
        except BaseException as raised:
            self._raised = raised
            raise
        self._open = True
