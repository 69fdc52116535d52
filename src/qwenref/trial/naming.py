"""Which mistake makes a stage what it is: each is executed, on the engine's own dumps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from qwenref.chain import Span
from qwenref.mistakes.catalogue import MISTAKES
from qwenref.mistakes.mistake import CannotBe, Mistake, Setting
from qwenref.model.formats import in_format
from qwenref.trial.dialects import EXACT, NARROW, Dialect, Override, operand_dialects
from qwenref.trial.normal import Honest, floor_of
from qwenref.trial.precision import all_fit, ways_to_round
from qwenref.trial.replay import CHAIN, Replay, Skip
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


class Found(NamedTuple):
    """A mistake that was executed.

    Attributes:
        mistake: Which.
        stage: Where it is made.
        value: Of a family.
        dialect: How the stage is computed, with it.
        error_after: The relative L2 that it leaves.
    """

    mistake: Mistake
    stage: str
    value: Any
    dialect: Dialect
    error_after: float

    @property
    def text(self) -> str:
        """What it is, in words."""
        if self.mistake.values is None:
            return self.mistake.text
        said = self.mistake.said
        return self.mistake.text.format(self.value if said is None else said(self.value))


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
    likely = [of for of in tried if of.error_after <= BETTER * before]
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
        if one.agrees:
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
    held = [span for span in replay.spans if span.stop > replay.held[name].first]
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
    on_the_way = replay.bridges(name, skip) | {name}
    for stage in CHAIN:
        if stage in on_the_way:
            at_hand = _AtHand(tensors)
            for mistake in MISTAKES:
                if stage in mistake.stages:
                    for of in _family(replay, name, skip, stage, mistake, span, at_hand):
                        try:
                            error = _error(replay, name, skip, of.dialect, span)
                        except CannotBe:
                            continue
                        yield of._replace(error_after=error)


def _family(
    replay: Replay,
    name: str,
    skip: Skip,
    stage: str,
    mistake: Mistake,
    span: Span,
    at_hand: "_AtHand",
) -> Iterator[Found]:
    """Yield a mistake with all likely values."""
    values: list[Any] = [None]
    if mistake.values is not None:
        find, values, dumped = mistake.values, [], None
        if stage == name and replay.held[name].first == 0:
            ((_, _, dumped),) = compared(replay, name, replay.held[name], skip, spans=[span])

        def look(setting: Setting) -> np.ndarray:
            with suppress(CannotBe):
                values.extend(find(setting, dumped))
            return setting.right(*setting.given)

        looking = replace(EXACT, override=Override(stage, at_hand.computing(stage, look)))
        replay.compute(name, span, skip, looking)
    for number, value in enumerate(values):
        run = mistake.run if mistake.values is None else partial(_with_value, mistake, value)
        override = Override(stage, at_hand.computing(stage, run))
        dialect = replace(EXACT, id=f"{mistake.id}-{number:04}", override=override)
        yield Found(mistake, stage, value, dialect, np.inf)


def _with_value(mistake: Mistake, value: Any, setting: Setting) -> np.ndarray:
    return mistake.run(setting, value)


def planted_as(
    mistake: Mistake, value: Any, stage: str, dialect: Dialect, tensors: Tensors
) -> Dialect:
    """Return a dialect of an engine that makes a mistake in a stage.

    Args:
        mistake: Which.
        value: Of a family; or what returns it, of a setting.
        stage: Where.
        dialect: How it computes the stage otherwise.
        tensors: What else it may take.
    """

    def run(setting: Setting) -> np.ndarray:
        if mistake.values is None:
            return mistake.run(setting)
        return mistake.run(setting, value(setting) if callable(value) else value)

    return replace(dialect, override=Override(stage, _AtHand(tensors).computing(stage, run)))


class _AtHand:
    """What a stage has at hand; computed once for all mistakes that are made in it."""

    def __init__(self, tensors: Tensors):
        self._tensors = tensors
        self._latest: tuple[object, Setting] | None = None

    def computing(
        self, stage: str, run: Callable[[Setting], np.ndarray]
    ) -> Callable[..., np.ndarray]:
        """Return a function for `Override.compute`."""

        def compute(
            replay: Replay, span: Span, skip: Skip, dialect: Dialect, given: Sequence[np.ndarray]
        ) -> np.ndarray:
            own = replace(dialect, id="", text="", result="exact", override=None)
            key = span, skip, own
            if self._latest is None or self._latest[0] != key:
                self._latest = key, _setting(replay, self._tensors, stage, span, skip, own, given)
            with np.errstate(all="ignore"):
                return run(self._latest[1])

        return compute


def _setting(
    replay: Replay,
    tensors: Tensors,
    stage: str,
    span: Span,
    skip: Skip,
    dialect: Dialect,
    given: Sequence[np.ndarray],
) -> Setting:
    """Return what a stage has at hand for the tokens of a span."""
    formats, inputs = dict(dialect.formats), tuple(given)

    def right(*arrays: np.ndarray) -> np.ndarray:
        same = all(a is b for a, b in zip(arrays, inputs, strict=True))
        return usual() if same else replay.made(stage, arrays, span, dialect)

    @cache
    def usual() -> np.ndarray:
        values = replay.made(stage, inputs, span, dialect)
        values.flags.writeable = False
        return values

    def rows(name: str, at: Span = span) -> np.ndarray:
        if not (replay.holds(name, skip) or replay.can(name, skip)):
            raise CannotBe
        return replay.rows(name, at, skip, dialect.on_the_way)

    @cache
    def everywhere(name: str) -> np.ndarray:
        axis = row_of(name).axes.index("T")
        pieces = [
            rows(name, at).take(range(at.first - at.start, at.stop - at.start), axis)
            for at in replay.spans
        ]
        return np.concatenate(pieces, axis=axis)

    @cache
    def unmasked() -> np.ndarray:
        if not replay.can("attn_scores", skip):
            raise CannotBe
        scores = replay.compute("attn_scores", span, skip, dialect.on_the_way)
        seen = np.arange(scores.shape[-1]) <= np.arange(span.start, span.stop)[:, None]
        return np.where(seen, inputs[0], scores)

    return Setting(
        stage=stage,
        given=inputs,
        positions=np.arange(span.start, span.stop),
        config=replay.config,
        sizes=replay.sizes | {"G": replay.sizes["N"] // replay.sizes["K"]},
        right=right,
        rounded=lambda point, values: in_format(values, formats.get(point, "exact")),
        rows=rows,
        everywhere=everywhere,
        unmasked=unmasked,
        tensor=cache(tensors.vector),
        product=_remembering(tensors.product, inputs),
    )


def _remembering(
    product: Callable[..., np.ndarray], inputs: tuple[np.ndarray, ...]
) -> Callable[..., np.ndarray]:
    """Return a product that is computed once for the inputs of the stage."""
    known = cache(lambda *name, **how: product(inputs[0], *name, **how))

    def multiplied(x: np.ndarray, *name: Any, **how: Any) -> np.ndarray:
        return known(*name, **how) if x is inputs[0] else product(x, *name, **how)

    return multiplied
