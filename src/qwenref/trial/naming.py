"""Which mistake makes a stage what it is: each is executed, on the engine's own dumps."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qwenref.chain import Span
from qwenref.mistakes.catalogue import MISTAKES
from qwenref.mistakes.mistake import CannotBe
from qwenref.trial.dialects import EXACT, NARROW, Dialect, operand_dialects
from qwenref.trial.evidence import are_ties
from qwenref.trial.executed import Found, variants
from qwenref.trial.normal import Honest, floor_of
from qwenref.trial.precision import all_fit, ways_to_round
from qwenref.trial.replay import Replay, Skip
from qwenref.trial.residual import compared, row_of, weighed
from qwenref.trial.tensors import Tensors

BEST = 12
"""How many mistakes are tried in other precisions than float64: those that leave the least."""

BEST_OF_OPERANDS = 3
"""Likewise where there are many ways to round."""

HOPELESS = 100.0
"""Floors that some tokens may be off before all are looked at: 25 times MARGIN, since those tokens
may be the smallest ones.
"""

BETTER = 0.5
"""Part of the error before that a mistake leaves at most: an error of MARGIN floors, that it is
wrong, leaves a quarter if it is explained.
"""

NEARER = 0.1
"""Part of the error that is left by a mistake that is worth telling, though it explains not all."""

AS_GOOD = 1.1
"""Times the least error: of a family's values the first with that is meant, which is a rounder one
than those that were fitted.
"""


class Naming(NamedTuple):
    """What explains an error.

    Attributes:
        causes: Mistakes that do, the best first; the others cannot be told from it here.
        nearest: If there are none: the mistake that comes nearest, if it is near.
    """

    causes: list[Found]
    nearest: Found | None


def name_cause(replay: Replay, tensors: Tensors, name: str, skip: Skip) -> Naming:
    """Find the mistakes that make a stage what it is.

    Args:
        replay: With what the engine dumped.
        tensors: Others of the checkpoint.
        name: A stage that is wrong.
        skip: Whose dumps are not read.
    """
    span = _most_telling(replay, name, skip)
    before = _error(replay, name, skip, EXACT, span)
    tried = sorted(_tried(replay, tensors, name, skip, span), key=lambda of: of.error_after)
    # of what rounds, the engine's own roundings decide where ties go: not yet executed
    likely = [of for of in tried if of.error_after <= BETTER * before or of.mistake.rounds]
    for general in (False, True):
        kind = [of for of in likely if of.mistake.general == general]
        for precisions, number in _precisions(replay, name, skip):
            found = [
                one
                for of in kind[:number]
                if (one := _agreeing(replay, name, skip, of, precisions, span)) is not None
            ]
            if found:
                return Naming(_roundest(found), None)
    near = [of for of in likely if of.error_after <= NEARER * before]
    return Naming([], near[0] if near else None)


Precision = tuple[Dialect, Honest | None]
"""How a stage may be computed, and what engines its error is normal of, if not of those."""


def _precisions(replay: Replay, name: str, skip: Skip) -> Iterator[tuple[list[Precision], int]]:
    """Yield precisions, the likelier ones first, and how many mistakes are worth trying in them."""
    yield [(EXACT, None)], BEST
    for narrow in NARROW:
        groups = ways_to_round(replay, name, skip, narrow)
        yield [(dialect, None) for group in groups for dialect in group], BEST
    operands = operand_dialects(name, replay.bridges(name, skip), ())
    yield [(dialect, None) for dialect in operands], BEST_OF_OPERANDS
    read = [of for of in replay.reads(name, skip) if not replay.is_table(of)]
    for narrow in NARROW:
        if read and all(all_fit(replay, of, narrow) for of in read):
            result = narrow if all_fit(replay, name, narrow) else "exact"
            honest = Honest(result, held_in=narrow, operands=narrow)
            yield [(EXACT, honest)], BEST_OF_OPERANDS


def _agreeing(
    replay: Replay,
    name: str,
    skip: Skip,
    of: Found,
    precisions: Sequence[Precision],
    span: Span,
) -> Found | None:
    """Return a mistake in the first precision in which it explains the stage."""
    for precision, honest in precisions:
        dialect = replace(precision, id=of.dialect.id, override=of.dialect.override)
        try:
            normal = floor_of(replay, name, skip, dialect, honest).whole or 0.0
            if _error(replay, name, skip, dialect, span) > HOPELESS * normal:
                continue  # all tokens need not be looked at
            one = weighed(replay, name, skip, dialect, honest=honest)
        except CannotBe:  # of other tokens
            return None
        if one.agrees or (of.mistake.rounds and are_ties(replay, name, skip, dialect, one)):
            return of._replace(dialect=dialect, error_after=one.residual.errors.whole or 0.0)
    return None


def _roundest(found: Sequence[Found]) -> list[Found]:
    """Return one value of each family, and those that are the same, the least error first."""
    by_family: dict[tuple[str, str], list[Found]] = {}
    for of in found:
        by_family.setdefault((of.mistake.id, of.stage), []).append(of)
    chosen = []
    for family in by_family.values():
        least = min(of.error_after for of in family)
        good = [of for of in family if of.error_after <= AS_GOOD * least]
        first = min(good, key=lambda of: of.dialect.id)
        same = [of for of in good if of is not first and of.error_after == first.error_after]
        chosen += [first, *same]
    return sorted(chosen, key=lambda of: of.error_after)


def _most_telling(replay: Replay, name: str, skip: Skip) -> Span:
    """Return the tokens that are most off."""
    dump = replay.held[name]
    held = [span for span in replay.spans_for(dump) if span.stop > dump.first]
    if len(held) == 1:
        return held[0]
    return max(held, key=lambda span: _error(replay, name, skip, EXACT, span))


def _error(replay: Replay, name: str, skip: Skip, dialect: Dialect, span: Span) -> float:
    """Return the L2 of a difference, in that of what was dumped; one that is not finite is 1."""
    off, of = 0.0, 0.0
    for first, truth, dumped in compared(replay, name, replay.held[name], skip, dialect, [span]):
        if row_of(name).masked:
            truth, dumped = np.tril(truth, first), np.tril(dumped, first)
        finite = dumped[np.isfinite(dumped)]
        scale = float(np.sqrt(np.mean(np.square(finite)))) if finite.any() else 1.0
        same = (truth == dumped) | (np.isnan(truth) & np.isnan(dumped))
        difference = np.where(same, 0.0, dumped - truth) / scale
        off += float(np.sum(np.square(np.where(np.isfinite(difference), difference, 1.0))))
        of += dumped.size
    return (off / of) ** 0.5


def _tried(replay: Replay, tensors: Tensors, name: str, skip: Skip, span: Span) -> Iterator[Found]:
    """Execute all mistakes in float64, for some tokens."""
    on_the_way, dumped = replay.bridges(name, skip) | {name}, None
    if replay.held[name].first <= span.start:
        ((_, _, dumped),) = compared(replay, name, replay.held[name], skip, spans=[span])
    for stage in replay.chain:
        if stage in on_the_way:
            own = dumped if stage == name else None
            for of in variants(replay, name, skip, stage, MISTAKES, tensors, span, own):
                try:
                    error = _error(replay, name, skip, of.dialect, span)
                except CannotBe:
                    continue
                yield of._replace(error_after=error)
