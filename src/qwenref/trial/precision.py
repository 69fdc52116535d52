"""In which precision an engine computed a stage: honest choices, tried one after the other."""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qwenref.model.formats import fits
from qwenref.trial.dialects import (
    EXACT,
    FUSED,
    NARROW,
    Dialect,
    Formats,
    minus_bias,
    operand_dialects,
    result_dialects,
    with_operands,
    with_weights,
)
from qwenref.trial.evidence import FLIPS, are_flips, few_values_off, is_from_inputs, is_of_sums
from qwenref.trial.normal import Honest
from qwenref.trial.replay import NOTHING, Replay, Skip
from qwenref.trial.residual import Weighed, residual_of, weighed

OPERANDS_OF_DUMPS = ("float16", "bfloat16")
"""Formats of operands, the coarser one last. Of values that were rounded when they were dumped it
cannot be known what they were rounded to before: only how much error that makes.
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
        if _may_be_a_difference(replay, name, of)
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
                and (not one[0].minus_bias or _is_a_difference(replay, name, skip, one[0]))
            ]
            if agreeing:
                least = min(map(_left, agreeing))
                return [one for one in agreeing if _left(one) <= least]
    return []


def _is_a_difference(replay: Replay, name: str, skip: Skip, dialect: Dialect) -> bool:
    """Return whether nearly all values are as executed, for one that is not rounded."""
    return few_values_off(replay, name, skip, dialect, weighed(replay, name, skip, minus_bias()))


def ways_to_round(replay: Replay, name: str, skip: Skip, narrow: str) -> Iterator[list[Dialect]]:
    """Yield dialects in groups, the likelier ones first."""
    rounded = all_fit(replay, name, narrow)
    if rounded:
        skips = [frozenset[str]()]
        if _may_be_fused(replay, name, skip):
            skips.append(frozenset({FUSED[name].without}))
        for stored in (True, False):
            yield [
                replace(dialect, skips=more)
                for more in skips
                for dialect in result_dialects(
                    name, replay.bridges(name, skip | more), narrow, stored=stored
                )
            ]
    if _may_be_a_difference(replay, name, narrow):
        then = narrow if rounded else "exact"
        bridges = replay.bridges("qkv_bias", skip | {name})
        outputs = result_dialects("qkv_bias", bridges, narrow, stored=True)
        yield [minus_bias(output, then) for output in outputs]


def _may_be_a_difference(replay: Replay, name: str, narrow: str) -> bool:
    """Return whether a product may be an output in a format minus bias, as far as is held.

    Of a difference that was rounded too, the output cannot be told.
    """
    if name != "qkv_matmul":
        return False
    unseen = "qkv_bias" not in replay.held and all_fit(replay, name, narrow)
    return unseen or replay.output_fits(narrow)


def _may_be_fused(replay: Replay, name: str, skip: Skip) -> bool:
    """Return whether a stage reads one that it may have been made without, and can be without."""
    if name not in FUSED or FUSED[name].without not in replay.reads(name, skip):
        return False
    return replay.can(name, skip | {FUSED[name].without})


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
            one = one._replace(explained=are_flips(replay, name, skip, one))
        if not one.agrees and dialect.undivided:
            one = one._replace(explained=is_of_sums(replay, skip, dialect, one))
        if one.agrees:
            found.append((dialect, one))
    return found


def _roundings(dialect: Dialect) -> tuple[int, int]:
    """Return how many roundings there are, and to how many formats."""
    narrow = [of for of in dialect.inputs if of != "exact"] or [of for _, of in dialect.formats]
    return (len(narrow) if dialect.inputs else len({*narrow}) + dialect.flash), len({*narrow})


def _fused(replay: Replay, name: str, skip: Skip, weights: Formats) -> _Found:
    """Made in one go with the stage before it, which was made for the dump alone."""
    if weights or not _may_be_fused(replay, name, skip):
        return []
    without, name_of, text = FUSED[name]
    account = account_of(replay, name, skip | {without})
    one = Dialect(name_of, text, skips=frozenset({without})), account.weighed
    explains = _left(one) <= FLIPS * (residual_of(replay, name, skip).errors.whole or 0.0)
    return [one] if account.agrees and explains else []


def _difference(replay: Replay, name: str, skip: Skip, weights: Formats) -> _Found:
    """The product taken as output minus bias, which leaves the output's errors."""
    if name != "qkv_matmul":
        return []
    dialect = with_weights(minus_bias(), weights)
    one = weighed(replay, name, skip, dialect)
    return [(dialect, one)] if one.agrees else []


def _rounded_dumps(replay: Replay, name: str, skip: Skip, weights: Formats) -> _Found:
    """Dumps rounded when they were written, after the engine had used their values."""
    read = {of for of in replay.reads(name, skip) if not replay.is_table(of)}
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
            if one.agrees and is_from_inputs(replay, name, skip, honest):
                return [(with_weights(with_operands(dialect, operands), weights), one)]
    return []


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
