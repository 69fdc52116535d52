"""How far an array of a stage is from another: as a whole, and by block, head, token and element.

An error is relative to the truth, or, of two dumps of which neither is it, to the smaller one. A
small slice is measured on the scale of its block (q, k, v, else the whole stage): its root mean
square counts as at least that of the block, so that a head that is almost zero does not turn noise
into an error.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec
import numpy as np

from qwenref.stages import Stage

MARGIN = 4.0
"""Honest errors, and differences of two honest engines, are at most so many times their floor.

The 1 - 1e-4 quantile of error / floor is 3.85, measured by scripts/measure_margin.py --engines 16.
"""

Error = Annotated[float, msgspec.Meta(ge=0)] | None
"""Relative L2 of a difference: rms(difference) / rms(truth). None: no finite number."""


class Errors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The errors of all slices of a stage.

    Attributes:
        whole: Of all values.
        blocks: For each of `Stage.blocks`; empty if there are none.
        heads: For each head; of q, k, v side by side N + 2K. Empty if there are none.
        tokens: For each token, the worst of its blocks.
        element: The largest single difference, on the scale of its token and head.
    """

    whole: Error
    blocks: list[Error]
    heads: list[Error]
    tokens: list[Error]
    element: Error


class Sums(NamedTuple):
    """What is left of a comparison, for each token and head: [T, J].

    J is 1 for a stage without heads, and N + 2K for q, k, v side by side. Masked cells count for
    nothing. Of several arrays that are compared with one truth, the errors are [..., T, J].
    """

    error: np.ndarray
    """sums of squared differences, [..., T, J]"""
    scale: np.ndarray
    """sums of squares, [1, T, J] of the truth, or [2, T, J] of both where neither is it: of two
    scales the smaller one counts"""
    largest: np.ndarray
    """largest absolute differences, [..., T, J]"""
    cells: np.ndarray
    """numbers of values"""


def sums_of(
    stage: Stage, truth: np.ndarray, difference: np.ndarray, head_dim: int, first: int = 0
) -> Sums:
    """Sum up the difference of an array from the truth, or of several.

    Args:
        stage: Which stage both are, in the axes of `stage.axes`.
        truth: Float64, finite but for masked cells.
        difference: Float64, of that shape, or with more axes before it.
        head_dim: H.
        first: Position of the first token.
    """
    if stage.masked:
        truth, difference = np.tril(truth, first), np.tril(difference, first)
    truth, difference = (cells_of(stage, values, head_dim) for values in (truth, difference))
    T, J, width = truth.shape
    visible = first + np.arange(1, T + 1) if stage.masked else np.full(T, width)
    with np.errstate(over="ignore"):
        return Sums(
            error=np.einsum("...c,...c->...", difference, difference),
            scale=np.einsum("...c,...c->...", truth, truth)[None],
            largest=np.maximum(difference.max(axis=-1), -difference.min(axis=-1)),
            cells=np.broadcast_to(visible[:, None], (T, J)),
        )


def errors_of(stage: Stage, sums: Sums, sizes: Mapping[str, int]) -> Errors:
    """Return the relative errors of all slices.

    Args:
        stage: Whose sums these are.
        sums: What `sums_of` gave.
        sizes: N and K.
    """
    return _errors(stage, _ratios(stage, sums, sizes))


def worst_element_of(stage: Stage, sums: Sums, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return token and head of the element that is the most off: `Errors.element`."""
    *_, elements = _ratios(stage, sums, sizes)
    token, head = np.unravel_index(np.argmax(elements), sums.error.shape)
    return int(token), int(head)


def of_draws(sums: Sums) -> Sums:
    """Return the sums of R honest draws, [..., R, T, J], as one: the mean square, the largest."""
    return sums._replace(error=sums.error.mean(axis=-3), largest=sums.largest.max(axis=-3))


def floors_of(stage: Stage, sums: Sums, sizes: Mapping[str, int]) -> list[Errors]:
    """Return what errors of all slices are normal, given one such error: as `errors_of`, but more.

    The floor of a block is at least that of the whole, that of a head at least its block's, that of
    a token or an element at least all blocks': else one draw of a small slice would exceed another
    by hundreds. Three digits are kept.

    Args:
        stage: Whose sums these are.
        sums: What `sums_of` gave of C arrays, with errors [C, T, J].
        sizes: N and K.
    """
    whole, blocks, heads, tokens, elements = _ratios(stage, sums, sizes)
    blocks = np.maximum(blocks, whole)
    heads = np.maximum(heads, blocks[:, _block_of_heads(stage, heads.shape[-1], sizes)])
    largest = blocks.max(axis=-1, keepdims=True)
    tokens = np.maximum(tokens, largest)
    element = np.maximum(elements.max(axis=-1, keepdims=True), largest)
    floors = zip(whole, blocks, heads, tokens, element, strict=True)
    return [_errors(stage, of_one, _three_digits) for of_one in floors]


class Worst(NamedTuple):
    """The slice whose error is the most times its floor.

    Attributes:
        ratio: How many times; infinite if there should be no error, or it is no finite number.
        slice: ``heads``, ``tokens``, ``blocks``, ``element`` or ``whole``: of equals, the first.
        which: The number of the head, token or block.
    """

    ratio: float
    slice: str
    which: int


def worst_of(found: Errors, floors: Errors) -> Worst | None:
    """Return the worst slice of a stage, None if none of them has a floor.

    Args:
        found: What was measured.
        floors: As many of each as `found` has; a slice without a floor is not judged.
    """
    ratios = [
        Worst(_times(error, floor), name, which)
        for (name, which, error), (_, _, floor) in zip(_slices(found), _slices(floors), strict=True)
        if floor is not None
    ]
    return max(ratios, key=lambda worst: worst.ratio, default=None)


def _slices(errors: Errors) -> Iterator[tuple[str, int, Error]]:
    for name in ("heads", "tokens", "blocks"):
        for which, error in enumerate(getattr(errors, name)):
            yield name, which, error
    yield "element", 0, errors.element
    yield "whole", 0, errors.whole


def _times(error: Error, floor: float) -> float:
    if error is None or (error and not floor):
        return math.inf
    return error / floor if error else 0.0


def for_all_tokens(floors: Errors, positions: Sequence[int], T: int) -> Errors:
    """Return the floors of a stage of T tokens, from floors of the tokens at some positions.

    Any other token has the largest of them, since some tokens are noisier than most.

    Args:
        floors: Those of `tokens` are one for each of `positions`, which keep theirs.
        positions: Each below T.
        T: How many tokens there are.
    """
    known = dict(zip(positions, floors.tokens, strict=True))
    largest = finite(max(math.inf if floor is None else floor for floor in floors.tokens))
    tokens = [known.get(token, largest) for token in range(T)]
    return msgspec.structs.replace(floors, tokens=tokens)


@np.errstate(over="ignore")
def _ratios(stage: Stage, sums: Sums, sizes: Mapping[str, int]) -> tuple[np.ndarray, ...]:
    """Return errors of the whole, blocks, heads, tokens and elements, each [..., how many]."""
    block = _block_of_heads(stage, sums.error.shape[-1], sizes)
    first_heads = np.unique(block, return_index=True)[1]
    per_head = Sums(*(part.sum(axis=-2) for part in sums))
    per_block = Sums(*(np.add.reduceat(part, first_heads, axis=-1) for part in per_head))
    per_token = Sums(*(np.add.reduceat(part, first_heads, axis=-1) for part in sums))
    mean_squares = per_block.scale / per_block.cells

    of_heads = mean_squares[:, block]
    elements = _ratio(sums.largest, _scales(sums, of_heads[:, None]) ** 0.5)
    return (
        _relative(Sums(*(part.sum(axis=-1, keepdims=True) for part in per_head))),
        _relative(per_block),
        _relative(per_head, of_heads),
        _relative(per_token, mean_squares[:, None]).max(axis=-1),
        elements.reshape(*elements.shape[:-2], -1),
    )


def _relative(part: Sums, least: np.ndarray | int = 0) -> np.ndarray:
    return _ratio(part.error / part.cells, _scales(part, least)) ** 0.5


def _scales(part: Sums, least: np.ndarray | int) -> np.ndarray:
    return np.maximum(part.scale / part.cells, least).min(axis=0)


def heads_in(stage: Stage, sizes: Mapping[str, int]) -> int:
    """Return how many heads a stage has, 0 if none."""
    if stage.blocks:
        return sizes["N"] + 2 * sizes["K"]
    return sizes["K" if "K" in stage.axes else "N"] if stage.has_heads else 0


def _block_of_heads(stage: Stage, heads: int, sizes: Mapping[str, int]) -> np.ndarray:
    """Return the number of the block that each of the J heads is in."""
    members = (sizes["N"], sizes["K"], sizes["K"]) if stage.blocks else (heads,)
    return np.repeat(np.arange(len(members)), members)


def cells_of(stage: Stage, values: np.ndarray, head_dim: int) -> np.ndarray:
    """Return the values of each token and head, [..., T, J, values], of [..., `stage.axes`]."""
    if stage.axes[0] == "N":
        return values.swapaxes(-3, -2)
    width = head_dim if stage.has_heads else values.shape[-1]
    tokens = values.shape[: values.ndim - len(stage.axes) + 1]
    return values.reshape(*tokens, -1, width)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide; 0/0 is 0: no difference is none on any scale."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(part == 0, 0.0, part / whole)


def _errors(
    stage: Stage, ratios: Sequence[np.ndarray], number: Callable[[float], float] = float
) -> Errors:
    *lists, elements = ratios
    (whole,), blocks, heads, tokens = ([finite(number(x)) for x in part.tolist()] for part in lists)
    return Errors(
        whole=whole,
        blocks=blocks if stage.blocks else [],
        heads=heads if stage.has_heads else [],
        tokens=tokens,
        element=finite(number(elements.max())),
    )


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def finite(value: float) -> Error:
    """Return a number, None if it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None
