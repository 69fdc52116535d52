"""Holding signals back, and not losing those that Python drops."""

import signal
import sys
from typing import Any

import pytest

from qwenref.interrupts import Interrupts

pytestmark = pytest.mark.usefixtures("ctrl_c")


class InterruptedWhenDropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_python_drops_is_raised_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: dropped.append(found.exc_type))
    went_on = []

    def work() -> None:
        with Interrupts() as interrupts, interrupts.let_through():
            InterruptedWhenDropped()
            went_on.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert dropped == [KeyboardInterrupt]
    assert went_on


def test_a_handler_that_raises_nothing_ends_nothing() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert seen == []
        with interrupts.let_through():
            assert seen == [signal.SIGINT]
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert len(seen) == 2
    assert len(seen) == 3


def test_a_nested_context_passes_on_to_the_one_around_it() -> None:
    reached = []

    def work() -> None:
        with Interrupts() as outer, outer.let_through(), Interrupts() as inner:
            signal.raise_signal(signal.SIGINT)
            reached.append("inside")
            inner.deliver()
            reached.append("not this")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["inside"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
