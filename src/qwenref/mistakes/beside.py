"""Weights of the layer beside: layers that are counted from 1, skipped, or run in another order."""

from collections.abc import Callable

import numpy as np

from qwenref.mistakes.mistake import Mistake, Setting

SIDES = (1, -1)
"""Layers from this one to the one whose weights are taken."""


def side_named(side: int) -> str:
    """Return ``the next layer``."""
    return "the next layer" if side == 1 else "the layer before"


def of_layer_beside(
    prefix: str, stages: tuple[str, ...], run: Callable[[Setting, int], np.ndarray]
) -> Mistake:
    """Return the mistake of taking another layer's weight.

    Args:
        prefix: Of its id.
        stages: Where it is made.
        run: Computes the stage with the weight of a side.
    """
    return Mistake(
        f"{prefix}-of-other-layer",
        stages,
        "the weight of {}",
        "as it should be, with W of layer + 1 or layer - 1",
        "nothing alike",
        run,
        lambda s, _: SIDES,
        planted=SIDES,
        said=side_named,
    )
