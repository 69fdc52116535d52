"""In which precision an engine computed a stage: honest choices, tried one after the other."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qwenref.judge.dialects import (
    NARROW,
    Dialect,
    fits,
    minus_bias,
    operand_dialects,
    result_dialects,
)
from qwenref.judge.replay import NOTHING, Replay, Skip
from qwenref.judge.residual import Weighed, residual_of, weighed
from qwenref.metrics import MARGIN

FLIPS = 0.15
"""Of the error before, so much may be left where an engine rounds what is in no dump: where that is
nearly a tie, float32 noise makes it another number of the format. A value is off by 1e-7, float16
has a tie every 5e-4: one in 2,000 flips, and leaves sqrt(12 / 2000) = 0.08. A dialect that is not
the engine's leaves 0.3 or more.
"""

FEW = 0.1
"""Of the rows (a head of a token), so many may hold flips, where there are too few to average."""


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
    """

    weighed: Weighed
    added: Weighed
    choices: list[Choice]

    @property
    def agrees(self) -> bool:
        """Whether it is right in some precision."""
        return self.weighed.agrees


def account_of(replay: Replay, name: str, skip: Skip = NOTHING) -> Account:
    """Find out how a stage was computed."""
    exact = weighed(replay, name, skip)
    if exact.agrees:
        return Account(exact, exact, [])
    for found in (_results, _operands, _fused, _difference, _rounded_dumps):
        best = found(replay, name, skip)
        if best:
            least = min(best, key=_left)
            choices = [Choice(one[0], _left(one)) for one in best]
            return Account(least[1], exact, choices)
    return Account(exact, exact, [])


_Found = list[tuple[Dialect, Weighed]]


def _results(replay: Replay, name: str, skip: Skip) -> _Found:
    """Results rounded, and perhaps what is inside; those that leave the least are returned."""
    for narrow in NARROW:
        for tried in _ways_to_round(replay, name, skip, narrow):
            found = [(of, weighed(replay, name, skip, of)) for of in tried]
            agreeing = [one for one in found if one[1].agrees]
            if agreeing:
                least = min(map(_left, agreeing))
                return [one for one in agreeing if _left(one) <= least]
    return []


def _ways_to_round(replay: Replay, name: str, skip: Skip, narrow: str) -> Iterator[list[Dialect]]:
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
    if name == "qkv_matmul" and replay.output_fits(narrow):
        yield [minus_bias(narrow, then=narrow if rounded else "exact")]


def _left(one: tuple[Dialect, Weighed]) -> float:
    return one[1].residual.errors.whole or 0.0


def _operands(replay: Replay, name: str, skip: Skip) -> _Found:
    """Operands rounded: those with the fewest roundings that leave float32 noise."""
    found: _Found = []
    for dialect in operand_dialects(name, replay.bridges(name, skip)):
        if found and _roundings(dialect) > _roundings(found[0][0]):
            break
        one = weighed(replay, name, skip, dialect)
        if dialect.rounds_unseen and not one.agrees:
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
    normal = MARGIN * (left.floors.element or 0.0)
    scale = np.sqrt(after.sums.scale.min(axis=0) / after.sums.cells)
    return bool(np.mean(after.sums.largest > normal * np.maximum(scale, scale.mean())) <= FEW)


def _roundings(dialect: Dialect) -> tuple[int, int]:
    """Return how many roundings there are, and to how many formats."""
    narrow = [of for of in dialect.inputs if of != "exact"] or [of for _, of in dialect.formats]
    return (len(narrow) if dialect.inputs else len({*narrow}) + dialect.flash), len({*narrow})


def _fused(replay: Replay, name: str, skip: Skip) -> _Found:
    """The bias added in the same kernel: a dumped qkv_matmul was made for the dump alone."""
    if name != "qkv_bias" or "qkv_matmul" not in replay.reads(name, skip):
        return []
    account = account_of(replay, name, skip | {"qkv_matmul"})
    if not account.agrees:
        return []
    dialect = Dialect(
        "fused-bias", "bias added in the same kernel", skips=frozenset({"qkv_matmul"})
    )
    return [(dialect, account.weighed)]


def _difference(replay: Replay, name: str, skip: Skip) -> _Found:
    """The product taken as output minus bias, which leaves the output's errors."""
    if name != "qkv_matmul":
        return []
    dialect = minus_bias("exact")
    one = weighed(replay, name, skip, dialect)
    return [(dialect, one)] if one.agrees else []


def _rounded_dumps(replay: Replay, name: str, skip: Skip) -> _Found:
    """Dumps rounded when they were written, after the engine had used their values."""
    read = replay.reads(name, skip)
    for narrow in NARROW:
        if not read or not all(all_fit(replay, each, narrow) for each in read):
            continue
        result = narrow if all_fit(replay, name, narrow) else "exact"
        dialect = Dialect(
            f"dump-{narrow}", f"dumps rounded to {narrow} when written", result=result
        )
        one = weighed(replay, name, skip, like=dialect, held_in=narrow)
        if one.agrees:
            return [(dialect, one)]
    return []


def all_fit(replay: Replay, name: str, narrow: str) -> bool:
    """Return whether rounding to a format changes no value that is held of a stage."""
    return all(fits(rows, narrow) for rows in held_rows(replay, name))


def held_rows(replay: Replay, name: str) -> Iterator[np.ndarray]:
    """Yield what is held of a stage, piece by piece."""
    held = replay.held[name]
    for span in replay.spans:
        first = max(span.first, held.first)
        if first < span.stop:
            yield held.rows(first, span.stop)
