"""In which precision an engine computed a stage: honest choices, tried one after the other."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qwenref.judge.dialects import (
    NARROW,
    Dialect,
    fits,
    operand_dialects,
    result_dialects,
)
from qwenref.judge.replay import NOTHING, Replay, Skip
from qwenref.judge.residual import Weighed, residual_of, weighed

FLIPS = 0.01
"""Of the error before, so much may be left by a flash attention that is executed: where a sum is
nearly a tie, float32 and float64 round it to different float16 numbers. On the flash dump of
llama.cpp 1e-4 is left (scripts/measure_flash.py); one flip in a hundred sums leaves 0.1.
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
    for found in (_results, _operands, _fused, _rounded_dumps):
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
        if not all_fit(replay, name, narrow):
            continue
        skips = [frozenset[str]()]
        if name == "qkv_bias" and "qkv_matmul" in replay.reads(name, skip):
            skips.append(frozenset({"qkv_matmul"}))
        tried = []
        for more in skips:
            bridges = replay.bridges(name, skip | more)
            for dialect in result_dialects(name, bridges, narrow):
                of = replace(dialect, skips=more)
                tried += [(of, weighed(replay, name, skip, of))]
        agreeing = [one for one in tried if one[1].agrees]
        if agreeing:
            least = min(map(_left, agreeing))
            return [one for one in agreeing if _left(one) <= least]
    return []


def _left(one: tuple[Dialect, Weighed]) -> float:
    return one[1].residual.errors.whole or 0.0


def _operands(replay: Replay, name: str, skip: Skip) -> _Found:
    """Operands rounded: those with the fewest roundings that leave float32 noise."""
    found: _Found = []
    for dialect in operand_dialects(name, replay.bridges(name, skip)):
        if found and _roundings(dialect) > _roundings(found[0][0]):
            break
        one = weighed(replay, name, skip, dialect)
        if dialect.flash and not one.agrees:
            one = _but_for_flips(replay, name, skip, dialect)
        if one is not None and one.agrees:
            found.append((dialect, one))
    return found


def _but_for_flips(replay: Replay, name: str, skip: Skip, dialect: Dialect) -> Weighed | None:
    """Hold flash attention to what is left if some sums of values were rounded the other way."""
    like = replace(dialect, result="float16")
    one = weighed(replay, name, skip, dialect, like=like)
    exact = residual_of(replay, name, skip).errors.whole
    whole = one.residual.errors.whole
    return one if exact and whole is not None and whole <= FLIPS * exact else None


def _roundings(dialect: Dialect) -> int:
    inputs = sum(narrow != "exact" for narrow in dialect.inputs)
    return inputs + len({narrow for _, narrow in dialect.formats}) + dialect.flash


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
