"""Lining up two sides of a stage: the orders of axes in which they are the same numbers."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np

from qwenref.dumps.reading import Dump, Key, Mapped, Stored
from qwenref.judge.arrangement import LAST, TRANSPOSED, Arrangement, arrangements, relation_of
from qwenref.judge.floors import BLIND, Floors
from qwenref.metrics import MARGIN
from qwenref.stages import BY_NAME, Stage

SAMPLE = 8
"""Tokens by which orders of axes are told from each other, the first and the last one too."""

LARGE = 1 << 24
"""Bytes of an array that is not read at random places without giving memory back."""


class Side(NamedTuple):
    """One stage as one dump holds it.

    Attributes:
        parts: Where its values are: one array, or one for each block; none if it is absent.
        axes: In which order, if that is known.
        lacks: Which blocks are absent, if others are there.
    """

    parts: list[Stored]
    axes: tuple[str, ...] | None
    lacks: list[str]

    @property
    def size(self) -> int:
        """How many values there are."""
        return sum(part.count for part in self.parts)

    def ways(self, stage: Stage, sizes: Mapping[str, int], T: int) -> list[Arrangement]:
        """Return the orders in which it may be stored, the likeliest first."""
        ways = [*arrangements(stage, sizes, T, [part.count for part in self.parts])]
        if self.axes is not None:
            stated = " ".join(self.axes)
            names = (LAST, "T V") if stated == "V" else (stated,)  # logits of the last token
            return [way for way in ways if way.name in names]
        shape = self.parts[0].shape if len(self.parts) == 1 else None
        long = [size for size in shape or () if size > 1]
        if len(long) > 1:  # its axes are those of an order, or several of them in one
            return [
                way for way in ways if {*accumulate(long, mul)} <= {*accumulate(way.sizes, mul)}
            ]
        return ways


def side_of(dump: Dump, key: Key) -> Side:
    """Return a stage as a dump holds it."""
    parts = dump.stages.get(key, {})
    if None in parts or not parts:
        return Side([*parts.values()], dump.axes.get(key), [])
    blocks = BY_NAME[key[1]].blocks
    present = [parts[block] for block in blocks if block in parts]
    return Side(present, None, [block for block in blocks if block not in parts])


class Way(NamedTuple):
    """How to look at two sides: the order of each, and what to multiply the second one with."""

    a: Arrangement
    b: Arrangement
    factor: float
    unsure: str | None = None


def by_block(
    stage: Stage,
    sizes: Mapping[str, int],
    way: Way,
    arrays: Sequence[Sequence[np.ndarray]],
) -> list[list[np.ndarray]]:
    """Return two sides as [T, J, W], block by block, cut down to the tokens that both have."""
    views = [of.views(array) for of, array in zip((way.a, way.b), arrays, strict=True)]
    if stage.blocks:
        edges = np.cumsum([sizes["N"], sizes["K"]])
        views = [np.split(of[0], edges, axis=1) if len(of) == 1 else of for of in views]
    tokens = min(len(of[0]) for of in views)
    return [[view[-tokens:] for view in of] for of in views]


def choose(
    stage: Stage,
    arrays: Sequence[Sequence[np.ndarray]],
    ways: Sequence[Sequence[Arrangement]],
    factors: Sequence[float],
    floors: Floors,
    mapped: Sequence[Mapped],
) -> Way:
    """Return the order in which two sides are the same numbers, judged by a sample of tokens.

    The plain order is tried first, then others for the second side, for the first, for both. One of
    them is taken if it explains the numbers at a finer precision than the plain one. If none makes
    them the same, the order with the smallest error is returned, and said to be unsure; the plain
    one if no order is nearer than zeros would be.
    """
    plain = Way(ways[0][0], ways[1][0], 1.0)
    groups = (
        [plain],
        [Way(ways[0][0], b, factor) for b in ways[1] for factor in factors],
        [Way(a, ways[1][0], factor) for a in ways[0] for factor in factors],
        _of_both(stage, ways),
    )
    limits = _limits(floors)
    errors: dict[Way, float] = {}
    seen = set()
    best, chosen = len(limits), None
    for group in groups:
        ranks: dict[Way, int] = {}
        for way in group:
            views = [of.views(array) for of, array in zip((way.a, way.b), arrays, strict=True)]
            relation = relation_of(views, masked=stage.masked), way.factor
            if relation not in seen:
                seen.add(relation)
                strict = group is not groups[0]
                errors[way] = _sample_error(stage, views, way.factor, mapped, strict=strict)
                ranks[way] = sum(errors[way] > limit for limit in limits)
        finest = min(ranks.values(), default=best)
        if finest < best:
            best, fitting = finest, [way for way, rank in ranks.items() if rank == finest]
            chosen = fitting[0]
            if len(fitting) > 1:
                names = ", ".join(f"{way.a.name} / {way.b.name}" for way in fitting)
                chosen = plain._replace(unsure=f"several layouts fit, it may be chance: {names}")
        if best == 0 or (group is groups[2] and chosen is not None):
            break
        if group is groups[2] and stage.masked and errors[plain] < math.inf:
            break  # seen in another order, other cells would be masked: those that are wrong
    if chosen is not None:
        return chosen
    least = min(errors, key=lambda way: (errors[way], way != plain))
    if least == plain or errors[least] >= 1:  # zeros would be as near: it explains nothing
        return plain
    return least._replace(unsure="layout unsure: none fits, and this one is the least off")


def _of_both(stage: Stage, ways: Sequence[Sequence[Arrangement]]) -> list[Way]:
    """Return ways in which neither side is in the plain order; of masked stages, the transposed."""
    if stage.masked:
        ways = [[way for way in of if way.name == TRANSPOSED] for of in ways]
    return [Way(a, b, 1.0) for a in ways[0] for b in ways[1]]


def _limits(floors: Floors) -> list[float]:
    """Return, by precision, the relative L2 up to which some tokens are the same numbers."""
    limits = []
    for errors in floors.values():
        normal = [floor for floor in (errors.whole, *errors.tokens) if floor is not None]
        limits.append(min(BLIND, MARGIN * max(normal, default=0.0)))
    return limits


def _sample_error(
    stage: Stage,
    views: Sequence[Sequence[np.ndarray]],
    factor: float,
    mapped: Sequence[Mapped],
    *,
    strict: bool,
) -> float:
    """Return the relative L2 of some tokens of two sides.

    It is infinite if scores are zero where a query sees them, and not where it does not: of two
    arrays that are seen transposed, zeros and a diagonal always agree. In the plain order all of
    them have to be zero for that, in another one is enough (if `strict`).
    """
    tokens = min(len(of[0]) for of in views)
    some = sorted({*np.linspace(0, tokens - 1, SAMPLE).astype(int).tolist()})
    sums, visible, absent, hidden = np.zeros(3), 0, np.zeros(2), np.zeros(2)
    for token in some:
        a, b = (
            np.concatenate([_token(view, len(of[0]) - tokens + token, mapped) for view in of])
            for of in views
        )
        b *= factor
        if stage.masked:
            query = a.shape[1] - tokens + token
            visible += a[:, :query].size
            absent += [np.count_nonzero(side[:, :query] == 0) for side in (a, b)]
            hidden += [np.count_nonzero(side[:, query + 1 :]) for side in (a, b)]
            a, b = a[:, : query + 1], b[:, : query + 1]
        finite = np.isfinite(a) & np.isfinite(b)
        a, b = a[finite], b[finite]
        sums += [np.vecdot(side, side) for side in (a - b, a, b)]
    if visible and np.any((absent >= (1 if strict else visible)) & (hidden > 0)):
        return math.inf
    off, *norms = np.sqrt(sums)
    return float(off / min(norms)) if min(norms) else math.inf if off else 0.0


def _token(view: np.ndarray, token: int, mapped: Sequence[Mapped]) -> np.ndarray:
    """Return what a view holds of a token, [J, W] in float64.

    Of a large array memory is given back head by head: they are far apart, and the system maps
    megabytes at once.
    """
    if view.nbytes < LARGE:
        return view[token].astype(np.float64)
    heads = []
    for head in view[token]:
        heads.append(head.astype(np.float64))
        for each in mapped:
            each.release()
    return np.stack(heads)
