"""Which step values were rounded to, from what is left of it."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from qwenref.bundled import tiny_checkpoint
from qwenref.mistakes.coarse import multiples, steps
from qwenref.mistakes.mistake import CannotBe, Setting
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.formats import in_format


def not_at_hand(*_: object, **__: object) -> np.ndarray:
    raise CannotBe


def setting(right: np.ndarray) -> Setting:
    """Return what a stage has at hand that should be `right`."""
    own: dict[str, Any] = {
        "stage": "attn_out",
        "given": (right,),
        "positions": np.arange(len(right)),
        "config": Checkpoint(tiny_checkpoint()).config,
        "sizes": {},
        "right": lambda x: x,
    }
    others: dict[str, Any] = dict.fromkeys((of.name for of in fields(Setting)), not_at_hand)
    return Setting(**(others | own))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("narrow", "near"), [("exact", 1e-9), ("bfloat16", 5e-4), ("float16", 1e-4)]
)
def test_the_step_is_found_beneath_a_last_rounding(seed: int, narrow: str, near: float) -> None:
    random = np.random.default_rng(seed)
    right = random.standard_normal((7, 84))
    step = float(random.uniform(0.03, 0.2))
    dumped = in_format(multiples(setting(right), step), narrow)
    (found,) = steps(setting(right), dumped)
    assert found == pytest.approx(step, rel=near)
    assert np.mean(np.rint(right / found) != np.rint(right / step)) < 0.01


def test_values_that_are_no_multiples_have_no_step() -> None:
    right = np.random.default_rng(0).standard_normal((7, 84))
    for narrow in ("exact", "bfloat16", "float16"):
        assert [*steps(setting(right), in_format(right, narrow))] == []
    assert [*steps(setting(right), np.zeros_like(right))] == []
    assert [*steps(setting(right), None)] == []
