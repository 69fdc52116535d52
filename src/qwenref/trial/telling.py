"""What would tell mistakes apart that are the same in a dump: they run on other prompts."""

from collections.abc import Iterator

import numpy as np

from qwenref.mistakes.mistake import CannotBe
from qwenref.trial.dialects import EXACT
from qwenref.trial.executed import Found, planted_as
from qwenref.trial.replay import ROWS, Replay
from qwenref.trial.residual import row_of
from qwenref.trial.tensors import Tensors

LONGER = 24
"""Tokens of the longer prompt."""

APART = 1e-4
"""Relative L2 from which on two mistakes differ: 100 times what float32 makes of a stage."""


def told_by(replay: Replay, tensors: Tensors, first: Found, second: Found) -> str | None:
    """Return which prompt would tell two mistakes apart, in words; None if none of those tried.

    Args:
        replay: In which they are the same.
        tensors: Others of the checkpoint.
        first: One.
        second: Another.
    """
    for other, text in _others(replay):
        values = [_executed(other, tensors, found) for found in (first, second)]
        if any(of is None for of in values):
            continue
        one, two = (np.nan_to_num(of, posinf=0.0, neginf=0.0) for of in values if of is not None)
        if one.shape != two.shape or np.linalg.norm(one - two) > APART * np.linalg.norm(one):
            return text
    return None


def _others(replay: Replay) -> Iterator[tuple[Replay, str]]:
    T = min(replay.sizes["T"], ROWS)
    yield replay.entered_by(_rows(replay, T)), "another prompt"
    if T < LONGER:
        yield replay.entered_by(_rows(replay, LONGER)), f"a prompt of {LONGER} tokens"


def _rows(replay: Replay, T: int) -> np.ndarray:
    """Return a stream that no two tokens have in common, of many sizes, [T, D]."""
    rng = np.random.default_rng(T)
    return rng.standard_normal((T, replay.sizes["D"])) * rng.uniform(0.01, 1.0, (T, 1))


def _executed(replay: Replay, tensors: Tensors, found: Found) -> np.ndarray | None:
    """Return the stage where a mistake is made, with it; None if it cannot be made there."""
    of_value = found.mistake, found.value, found.stage, EXACT, tensors
    try:
        values = replay.compute(found.stage, replay.spans[0], dialect=planted_as(*of_value))
        return np.tril(values) if row_of(found.stage).masked else values
    except (CannotBe, IndexError, ValueError):  # its value may be of the other prompt
        return None
