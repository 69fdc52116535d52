"""Where in a stage an error sits, in words."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from qwenref.judge.arrangement import heads_and_width
from qwenref.metrics import MARGIN, Errors, cells_of
from qwenref.model.formats import spacing
from qwenref.stages import Stage
from qwenref.trial.dialects import EXACT, NARROW, Dialect
from qwenref.trial.normal import Honest, floor_of
from qwenref.trial.precision import all_fit, ways_to_round
from qwenref.trial.replay import Replay, Skip
from qwenref.trial.residual import Weighed, compared

SMALL = 0.01
"""Of the largest difference: a smaller one does not count beside it."""

HALF = 0.5
"""Of the error: if more is left beside what stands out, that does not say where it sits."""

STEP = 1.5
"""Of the distance of neighbours in a format: what is rounded the other way is off by 1."""

SEVERAL = 3
"""Wrong values in a token or head: with fewer, which ones those are may be chance."""


class _Marks(NamedTuple):
    """Where values are off.

    Attributes:
        tokens: In which, [T].
        heads: In which, [J].
        columns: In which, [J, W].
        number: How many.
        rest: Relative L2 of all others.
    """

    tokens: np.ndarray
    heads: np.ndarray
    columns: np.ndarray
    number: int
    rest: float


def pattern_of(replay: Replay, name: str, skip: Skip, found: Weighed) -> str:
    """Say in which tokens, heads and channels a stage is off by more than is normal."""
    stage, sizes, first = found.residual.stage, replay.sizes, replay.held[name].first
    whole = found.residual.errors.whole
    normal, rounded, executed = [found.floors], found.floors, []
    for narrow in NARROW:
        if all_fit(replay, name, narrow):
            rounded = floor_of(replay, name, skip, EXACT, Honest(narrow))
            normal += [rounded, floor_of(replay, name, skip, EXACT, Honest(narrow, held_in=narrow))]
            executed += [
                _marked(replay, name, skip, found, dialect, [found.floors])
                for dialects in ways_to_round(replay, name, skip, narrow)
                for dialect in dialects
            ]
    marks = min(executed, key=lambda of: of.number, default=None)
    if marks is None or 2 * marks.number > found.residual.sums.cells.sum():
        marks = _marked(replay, name, skip, found, EXACT, normal)
    tokens, heads, columns, count, rest = marks
    enough = max(MARGIN * max(of.whole or 0.0 for of in normal), HALF * (whole or 0.0))
    if count == 0 or rest > enough:
        return _worst_slice(stage, found, rounded, replay)
    if count == 1:
        head, cell = (int(at[0]) for at in np.nonzero(columns))
        token = int(np.flatnonzero(tokens)[0]) + first
        where = [f"token {token}", *_head(stage, sizes, [head], len(heads)), _cells(stage, [cell])]
        return f"one element: {', '.join(where)}"
    box = _visible(stage, tokens, columns, first)
    if 2 * count < box and not any(_gathers(count, where) for where in (tokens, heads)):
        return "here and there"
    words = [
        *_tokens(tokens, first),
        *_places(stage, sizes, heads, columns),
    ]
    return ", ".join(words) or "everywhere"


def _marked(
    replay: Replay,
    name: str,
    skip: Skip,
    found: Weighed,
    dialect: Dialect,
    floors: Sequence[Errors],
) -> _Marks:
    """Mark what is off by more than is normal, and by more than one step if results are rounded."""
    stage, held, factor = found.residual.stage, replay.held[name], replay.factor(name)
    T, J, W = _shape(stage, found, replay.sizes)
    tokens, heads, columns = np.zeros(T, bool), np.zeros(J, bool), np.zeros((J, W), bool)
    count, rest, least = 0, 0.0, _least(found, floors)
    for first, truth, dumped in compared(replay, name, held, skip, dialect):
        step = 0.0 * truth
        if dialect.result != "exact":
            step = STEP * spacing(truth / factor, dialect.result) * factor
        off, bad = _off(stage, truth, dumped, step, first, least, replay.sizes)
        start = first - held.first
        tokens[start : start + len(bad)] |= bad.any(axis=(1, 2))
        heads |= bad.any(axis=(0, 2))
        columns |= bad.any(axis=0)
        count += int(np.count_nonzero(bad))
        rest += float(np.sum(np.square(off[~bad])))
    scale = float(found.residual.sums.scale.sum())
    return _Marks(tokens, heads, columns, count, math.sqrt(rest / scale) if scale else 0.0)


def _worst_slice(stage: Stage, found: Weighed, floors: Errors, replay: Replay) -> str:
    """Name a slice that alone is off as a whole, though no value of it stands out."""
    residual = found.residual
    for kind in ("tokens", "heads"):
        pairs = zip(getattr(residual.errors, kind), getattr(floors, kind), strict=True)
        times = [error / floor if error and floor else 0.0 for error, floor in pairs]
        if len(times) > 1 and max(times) > MARGIN and max(times) >= 2 * sorted(times)[-2]:
            which = times.index(max(times))
            if kind == "tokens":
                return f"spread thinly over token {which + residual.first}"
            return (
                f"spread thinly over {', '.join(_head(stage, replay.sizes, [which], len(times)))}"
            )
    return "spread thinly"


def _shape(stage: Stage, found: Weighed, sizes: dict[str, int]) -> tuple[int, int, int]:
    T, J = found.residual.sums.error.shape
    return T, J, heads_and_width(stage, sizes, sizes["T"])[1]


def _least(found: Weighed, floors: Sequence[Errors]) -> tuple[np.ndarray, float, int]:
    """Return what differences count: by token and head, and those that are not small.

    Beside what is not finite, none do.
    """
    sums = found.residual.sums
    if found.residual.contradictions:
        return np.full_like(sums.largest, np.inf), 0.0, found.residual.first
    scale = np.sqrt(sums.scale.min(axis=0) / sums.cells)
    block = np.sqrt(sums.scale.min(axis=0).sum() / sums.cells.sum())
    normal = MARGIN * max(of.element or 0.0 for of in floors)
    largest = float(np.max(sums.largest, initial=0.0))
    return normal * np.maximum(scale, block), SMALL * largest, found.residual.first


def _off(
    stage: Stage,
    truth: np.ndarray,
    dumped: np.ndarray,
    step: np.ndarray,
    first: int,
    least: tuple[np.ndarray, float, int],
    sizes: dict[str, int],
) -> tuple[np.ndarray, np.ndarray]:
    """Return by how much values are off, and which are too much, [t, J, W]."""
    if stage.masked:
        truth, dumped = np.tril(truth, first), np.tril(dumped, first)
    truth, dumped, step = (cells_of(stage, of, sizes["H"]) for of in (truth, dumped, step))
    normal, small, held_from = least
    start = first - held_from
    limit = np.maximum(normal[start : start + len(truth)], small)[:, :, None]
    with np.errstate(invalid="ignore"):
        off = np.abs(dumped - truth)
        clash = np.isfinite(dumped) != np.isfinite(truth)
        return np.where(np.isfinite(off), off, 0.0), (off > np.maximum(limit, step)) | clash


def _tokens(tokens: np.ndarray, first: int) -> Iterator[str]:
    """Say which tokens, unless it is most of them, here and there."""
    T, bad = len(tokens), (np.flatnonzero(tokens) + first).tolist()
    good = (np.flatnonzero(~tokens) + first).tolist()
    if len(bad) == T:
        return
    if good == [first] and T > 2:
        yield f"all but token {first}"
    elif len(bad) > 1 and bad == [*range(bad[0], T + first)]:
        yield f"from position {bad[0]} on"
    elif 2 * len(bad) <= T or _is_range(bad):
        yield f"token{'s' * (len(bad) > 1)} {ranges(bad)}"


def _places(
    stage: Stage, sizes: dict[str, int], heads: np.ndarray, columns: np.ndarray
) -> Iterator[str]:
    """Say which heads and channels, unless it is most of them, here and there."""
    J, W = columns.shape
    bad = np.flatnonzero(heads).tolist()
    cells = np.flatnonzero(columns.any(axis=0)).tolist()
    if len(cells) < W and len(bad) > 1 and not stage.masked:
        flat = np.flatnonzero(columns.reshape(-1)).tolist()
        if len(flat) < len(bad) * len(cells) and _is_range(flat):
            yield f"columns {flat[0]}..{flat[-1]} of {J * W}"
            return
    if stage.blocks or 2 * len(bad) <= J or _is_range(bad):
        yield from _head(stage, sizes, bad, J)
    seen_by_all = stage.masked and cells[0] == 0  # earlier keys are those of all queries
    if len(cells) < W and (2 * len(cells) <= W or (_is_range(cells) and not seen_by_all)):
        yield _cells(stage, cells) + (" of every head" if len(bad) == J > 1 else "")


def _visible(stage: Stage, tokens: np.ndarray, columns: np.ndarray, first: int) -> int:
    """Return how many values there are in some columns of some tokens."""
    width = columns.shape[1]
    seen = np.tri(len(tokens), width, first if stage.masked else width, dtype=int)
    return int(np.sum(seen[tokens] @ columns.T))


def _gathers(count: int, where: np.ndarray) -> bool:
    """Return whether wrong values sit in less than half of the tokens or heads, several in each."""
    bad = np.count_nonzero(where)
    return bool(2 * bad < len(where) and count >= SEVERAL * bad)


def _is_range(numbers: Sequence[int]) -> bool:
    return numbers[-1] - numbers[0] + 1 == len(numbers)


def _head(stage: Stage, sizes: dict[str, int], heads: Sequence[int], J: int) -> Iterator[str]:
    """Say which heads, or which of q, k, v; nothing if it is all."""
    if len(heads) == J:
        return
    if not stage.blocks:
        yield f"head{'s' * (len(heads) > 1)} {ranges(heads)}"
        return
    edges = np.cumsum([0, sizes["N"], sizes["K"], sizes["K"]]).tolist()
    for name, (start, stop) in zip(stage.blocks, pairwise(edges), strict=True):
        inside = [head - start for head in heads if start <= head < stop]
        if len(inside) == stop - start:
            yield f"all of {name}" if len(heads) > len(inside) else f"only {name}"
        elif inside:
            yield f"{name} head{'s' * (len(inside) > 1)} {ranges(inside)}"


def _cells(stage: Stage, cells: Sequence[int]) -> str:
    word = {"S": "key", "V": "token id"}.get(stage.axes[-1], "channel")
    return f"{word}{'s' * (len(cells) > 1)} {ranges(cells)}"


def ranges(numbers: Sequence[int]) -> str:
    """Return whole numbers in words: ``1, 3..5``; of many pieces the first three."""
    pieces: list[list[int]] = []
    for number in numbers:
        if pieces and number == pieces[-1][1] + 1:
            pieces[-1][1] = number
        else:
            pieces.append([number, number])
    texts = []
    for low, high in pieces[:3]:
        texts.append(f"{low}" if low == high else f"{low}..{high}")
    more = f" and {len(pieces) - 3} more" if len(pieces) > 3 else ""
    return ", ".join(texts) + more
