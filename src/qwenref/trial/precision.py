"""In which precision an engine computed a stage: honest choices, tried one after the other."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qwenref.metrics import MARGIN, sums_of
from qwenref.trial.dialects import (
    EXACT,
    NARROW,
    Dialect,
    Formats,
    fits,
    minus_bias,
    operand_dialects,
    result_dialects,
    with_operands,
    with_weights,
)
from qwenref.trial.normal import Honest, rows_off, share_of_rows_off
from qwenref.trial.replay import NOTHING, Replay, Skip
from qwenref.trial.residual import Weighed, compared, residual_of, row_of, weighed

FLIPS = 0.15
"""Of the error before, so much may be left where an engine rounds what is in no dump: where that is
nearly a tie, float32 noise makes it another number of the format. A value is off by 1e-7, float16
has a tie every 5e-4: one in 2,000 flips, and leaves sqrt(12 / 2000) = 0.08. A dialect that is not
the engine's leaves 0.3 or more.
"""

OPERANDS_OF_DUMPS = ("float16", "bfloat16")
"""Formats of operands, the coarser one last. Of values that were rounded when they were dumped it
cannot be known what they were rounded to before: only how much error that makes.
"""

PARALLEL, ROWS = 0.9, 3.0
"""Correlation of an error with the value, and standard deviations of its sign over the rows (heads
of a token). Rounding is not biased. A factor of which MARGIN floors are left beside one of rounding
makes it 4 / sqrt(17) = 0.97.
"""

RARE = 0.25
"""Of the rows that rounded inputs make wrong, so few are not made wrong by them."""

FEW_VALUES = 0.05
"""Of all values, so many at most are rounded the other way: one in 2,000, but two of 56 by chance.
"""

FEW, MOST = 0.1, 0.5
"""Of the rows (a head of a token), so few may hold flips, where so many were off before: for dumps
that are too small to average.
"""


class Choice(NamedTuple):
    """A dialect that explains a stage, and the relative L2 that is left."""

    dialect: Dialect
    error_after: float


class Account(NamedTuple):
    """A stage held to what is normal, in the precision that explains it best.

    Attributes:
        weighed: In that precision; exact if none explains it.
        added: Against the exact computation.
        choices: Dialects that explain it; none if it is exact, or nothing does.
        hidden: Whether nothing does, but there are stages on the way whose roundings could.
    """

    weighed: Weighed
    added: Weighed
    choices: list[Choice]
    hidden: bool = False

    @property
    def agrees(self) -> bool:
        """Whether it is right in some precision."""
        return self.weighed.agrees


def account_of(replay: Replay, name: str, skip: Skip = NOTHING) -> Account:
    """Find out how a stage was computed."""
    exact = weighed(replay, name, skip)
    if exact.agrees:
        return Account(exact, exact, [])
    for weights in replay.weights_may_be(name, skip):
        for finder in (_results, _operands, _fused, _difference, _rounded_dumps):
            found = finder(replay, name, skip, weights)
            if found:
                least = min(found, key=_left)
                choices = [Choice(one[0], _left(one)) for one in found]
                return Account(least[1], exact, choices)
    return Account(exact, exact, [], _may_be_roundings(replay, name, skip))


def _may_be_roundings(replay: Replay, name: str, skip: Skip) -> bool:
    """Return whether roundings on the way that were not tried could make an error of that size."""
    if not replay.bridges(name, skip):
        return False
    read = [*replay.reads(name, skip), name]
    narrow = next((of for of in NARROW if all(all_fit(replay, each, of) for each in read)), "exact")
    honest = Honest(narrow, held_in=narrow, operands=OPERANDS_OF_DUMPS[-1])
    if weighed(replay, name, skip, honest=honest).agrees:
        return True
    differences = (
        weighed(replay, name, skip, minus_bias(), honest=Honest(of, operands=of))
        for of in NARROW
        if name == "qkv_matmul" and replay.output_fits(of)
    )
    return any(one.agrees for one in differences)


_Found = list[tuple[Dialect, Weighed]]


def _results(replay: Replay, name: str, skip: Skip, weights: Formats) -> _Found:
    """Results rounded, and perhaps what is inside; those that leave the least are returned."""
    for narrow in NARROW:
        for tried in ways_to_round(replay, name, skip, narrow):
            tried = [with_weights(of, weights) for of in tried]
            found = [(of, weighed(replay, name, skip, of)) for of in tried]
            agreeing = [
                one
                for one in found
                if one[1].agrees
                # what is normal of a difference is much; but all of it can be executed
                and (not one[0].minus_bias or _few_values_off(replay, name, skip, one[0]))
            ]
            if agreeing:
                least = min(map(_left, agreeing))
                return [one for one in agreeing if _left(one) <= least]
    return []


def ways_to_round(replay: Replay, name: str, skip: Skip, narrow: str) -> Iterator[list[Dialect]]:
    """Yield dialects in groups, the likelier ones first."""
    rounded = all_fit(replay, name, narrow)
    if rounded:
        skips = [frozenset[str]()]
        if name == "qkv_bias" and "qkv_matmul" in replay.reads(name, skip):
            skips.append(frozenset({"qkv_matmul"}))
        for stored in (True, False):
            yield [
                replace(dialect, skips=more)
                for more in skips
                for dialect in result_dialects(
                    name, replay.bridges(name, skip | more), narrow, stored=stored
                )
            ]
    unseen = rounded and "qkv_bias" not in replay.held
    if name == "qkv_matmul" and (unseen or replay.output_fits(narrow)):
        then = narrow if rounded else "exact"
        bridges = replay.bridges("qkv_bias", skip | {name})
        outputs = result_dialects("qkv_bias", bridges, narrow, stored=True)
        yield [minus_bias(output, then) for output in outputs]


def _left(one: tuple[Dialect, Weighed]) -> float:
    return one[1].residual.errors.whole or 0.0


def _operands(replay: Replay, name: str, skip: Skip, weights: Formats) -> _Found:
    """Operands rounded: those with the fewest roundings that leave float32 noise."""
    found: _Found = []
    bridges = replay.bridges(name, skip)
    for of in operand_dialects(name, bridges, weights):
        dialect = with_weights(of, weights)
        if found and _roundings(dialect) > _roundings(found[0][0]):
            break
        one = weighed(replay, name, skip, dialect)
        if not one.agrees and (dialect.rounds_unseen or bridges):
            one = one._replace(but_for_flips=_are_flips(replay, name, skip, one))
        if one.agrees:
            found.append((dialect, one))
    return found


def _are_flips(replay: Replay, name: str, skip: Skip, left: Weighed) -> bool:
    """Return whether what a dialect leaves is that some values were rounded the other way."""
    before, after = residual_of(replay, name, skip), left.residual
    if None in (before.errors.whole, after.errors.whole) or after.contradictions:
        return False
    if np.max(after.sums.largest) > np.max(before.sums.largest):
        return False
    if (after.errors.whole or 0.0) <= FLIPS * (before.errors.whole or 0.0):
        return True
    was, now = (rows_off(of.sums, left.floors.element or 0.0) for of in (before, after))
    return was >= MOST and now <= FEW


def _few_values_off(replay: Replay, name: str, skip: Skip, dialect: Dialect) -> bool:
    """Return whether nearly all values of a difference are as computed."""
    unrounded = weighed(replay, name, skip, minus_bias())
    sums, normal = unrounded.residual.sums, unrounded.floors.element or 0.0
    scale = np.sqrt(sums.scale.sum() / sums.cells.sum())
    off = [
        np.abs(dumped - truth) > MARGIN * normal * scale
        for _, truth, dumped in compared(replay, name, replay.held[name], skip, dialect)
    ]
    return float(np.mean(np.concatenate(off))) <= FEW_VALUES


def _roundings(dialect: Dialect) -> tuple[int, int]:
    """Return how many roundings there are, and to how many formats."""
    narrow = [of for of in dialect.inputs if of != "exact"] or [of for _, of in dialect.formats]
    return (len(narrow) if dialect.inputs else len({*narrow}) + dialect.flash), len({*narrow})


def _fused(replay: Replay, name: str, skip: Skip, weights: Formats) -> _Found:
    """The bias added in the same kernel: a dumped qkv_matmul was made for the dump alone."""
    if weights or name != "qkv_bias" or "qkv_matmul" not in replay.reads(name, skip):
        return []
    account = account_of(replay, name, skip | {"qkv_matmul"})
    if not account.agrees:
        return []
    dialect = Dialect(
        "fused-bias", "bias added in the same kernel", skips=frozenset({"qkv_matmul"})
    )
    return [(dialect, account.weighed)]


def _difference(replay: Replay, name: str, skip: Skip, weights: Formats) -> _Found:
    """The product taken as output minus bias, which leaves the output's errors."""
    if name != "qkv_matmul":
        return []
    dialect = with_weights(minus_bias(), weights)
    one = weighed(replay, name, skip, dialect)
    return [(dialect, one)] if one.agrees else []


def _rounded_dumps(replay: Replay, name: str, skip: Skip, weights: Formats) -> _Found:
    """Dumps rounded when they were written, after the engine had used their values."""
    read = replay.reads(name, skip)
    for narrow in NARROW:
        if not read or not all(all_fit(replay, each, narrow) for each in read):
            continue
        result = narrow if all_fit(replay, name, narrow) else "exact"
        text = f"dumps rounded to {narrow} when written"
        dialect = Dialect(f"dump-{narrow}", text, result=result, estimated=True)
        way = with_weights(EXACT, weights)
        for operands in ("exact", *OPERANDS_OF_DUMPS):
            honest = Honest(result, held_in=narrow, operands=operands)
            one = weighed(replay, name, skip, way, honest=honest)
            if one.agrees and _is_from_inputs(replay, name, skip, honest):
                return [(with_weights(with_operands(dialect, operands), weights), one)]
    return []


def _is_from_inputs(replay: Replay, name: str, skip: Skip, honest: Honest) -> bool:
    """Return whether an error is like that of inputs that were rounded after they were used.

    It is in about as many rows as such errors, and it is not parallel to the value.
    """
    found, expected = _rows_of_inputs(replay, name, skip, honest)
    return found >= RARE * expected and not _is_a_factor(replay, name, skip)


def _rows_of_inputs(replay: Replay, name: str, skip: Skip, honest: Honest) -> tuple[float, float]:
    """Return in how many rows a stage is off, and in how many rounded inputs make it so.

    The rounding of its result does not count: it is executed.
    """
    ways = result_dialects(name, replay.bridges(name, skip), honest.result, stored=True)
    tried = [EXACT, *(ways if honest.result != "exact" else ())]
    normal = weighed(replay, name, skip).floors.element or 0.0
    found = min(rows_off(residual_of(replay, name, skip, of).sums, normal) for of in tried)
    return found, share_of_rows_off(replay, name, skip, honest, normal)


def _is_a_factor(replay: Replay, name: str, skip: Skip) -> bool:
    """Return whether an error is parallel to the value, which no rounding of inputs is."""
    stage, held = row_of(name), replay.held[name]
    rows, squares = [], np.zeros(2)
    for first, truth, dumped in compared(replay, name, held, skip):
        error = np.where(np.isfinite(dumped), dumped - truth, 0.0)
        own, off, added = (
            sums_of(stage, x, x, replay.sizes["H"], first).error
            for x in (truth, error, truth + error)
        )
        rows.append((added - own - off).ravel() / 2)
        squares += own.sum(), off.sum()
    along = np.concatenate(rows)
    total, chance = abs(along.sum()), np.sqrt(np.square(along).sum())
    return bool(total > max(PARALLEL * np.sqrt(squares.prod()), ROWS * chance))


def all_fit(replay: Replay, name: str, narrow: str) -> bool:
    """Return whether rounding to a format changes no value that is held of a stage."""
    return all(fits(rows, narrow) for rows in held_rows(replay, name))


def held_rows(replay: Replay, name: str) -> Iterator[np.ndarray]:
    """Yield what is held of a stage, as it is stored, piece by piece."""
    held = replay.held[name]
    for span in replay.spans:
        first = max(span.first, held.first)
        if first < span.stop:
            yield held.stored.rows(first, span.stop)
