"""Mistakes in a product with one matrix: attn_out, the MLP's projections, lm_head."""

from collections.abc import Callable, Iterator

import numpy as np

from qwenref.mistakes.mistake import Mistake, Setting, any_of, needs
from qwenref.mistakes.projections import PARTS, TILES, part_named, without_inputs

MATRIX = {
    "attn_out": "o_proj",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_out": "down_proj",
    "lm_head": "lm_head",
}
"""The matrix of each stage, by its name in `qwenref.trial.tensors`."""


def untransposed(s: Setting) -> np.ndarray:
    """The product with the matrix read as [in, out]."""
    return s.product(s.given[0], MATRIX[s.stage], as_it_lies=True)


def of_beside(s: Setting, side: int) -> np.ndarray:
    """The product with the matrix of another layer."""
    return s.product(s.given[0], MATRIX[s.stage], side)


def part_of_inputs(s: Setting, which: tuple[str, int]) -> np.ndarray:
    """The product without some inputs."""
    return s.right(without_inputs(s.given[0], *which))


def shifted(s: Setting, how: tuple[str, int]) -> np.ndarray:
    """The product with rows or columns of the matrix shifted."""
    what, by = how
    if what == "rows":
        return np.roll(s.right(*s.given), by, axis=1)
    return s.right(np.roll(s.given[0], -by, axis=1))


def _tile_left_out(s: Setting, tile: int) -> np.ndarray:
    """Outputs after the last whole tile are never computed."""
    values = s.right(*s.given).copy()
    width = values.shape[1]
    needs(width % tile != 0 and width > tile)
    values[:, width - width % tile :] = 0
    return values


def _tiles(s: Setting, _: np.ndarray | None) -> Iterator[int]:
    yield from TILES


def shift_named(how: tuple[str, int]) -> str:
    """Return ``shifted by +1: rows``."""
    return f"shifted by {how[1]:+d}: {how[0]}"


def of_products(
    prefix: str, stages: tuple[str, ...], shifts: Callable[..., Iterator[tuple[str, int]]]
) -> tuple[Mistake, ...]:
    """Return the mistakes that any product may have.

    Args:
        prefix: Of their ids.
        stages: Where they are made.
        shifts: Likely shifts of the matrix.
    """
    return (
        Mistake(
            f"{prefix}-untransposed",
            stages,
            "the product with the transposed matrix: read as [in, out], not as [out, in]",
            "x @ W, W as it lies in memory",
            "nothing alike",
            untransposed,
        ),
        Mistake(
            f"{prefix}-part-of-inputs",
            stages,
            "the sum leaves out some inputs: {}",
            "x[:n] . W[:, :n]",
            "everywhere",
            part_of_inputs,
            any_of(*PARTS),
            planted=(("half", 0), ("tail", 32)),
            said=part_named,
        ),
        Mistake(
            f"{prefix}-tile",
            stages,
            "outputs after the last whole tile of {} are not computed",
            "0 from row O - O mod n on",
            "zeros at the end of every token",
            _tile_left_out,
            _tiles,
            planted=(16, 128),
        ),
        Mistake(
            f"{prefix}-shifted",
            stages,
            "{} of the weight",
            "W[o - n, i], or W[o, i - n]",
            "nothing alike",
            shifted,
            shifts,
            planted=(("rows", 1), ("columns", -1)),
            said=shift_named,
        ),
    )
