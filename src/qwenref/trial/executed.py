"""Mistakes, executed: stages of a replay that are computed otherwise."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from qwenref.chain import Span
from qwenref.mistakes.mistake import CannotBe, Mistake, Setting
from qwenref.model.formats import in_format
from qwenref.trial.dialects import EXACT, Dialect, Override
from qwenref.trial.replay import Replay, Skip
from qwenref.trial.residual import row_of
from qwenref.trial.tensors import Tensors


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


def variants(
    replay: Replay,
    name: str,
    skip: Skip,
    stage: str,
    mistake: Mistake,
    at_hand: "AtHand",
    span: Span,
    dumped: np.ndarray | None,
) -> Iterator[Found]:
    """Yield a mistake with all likely values.

    Args:
        replay: What is computed.
        name: The stage that is looked at.
        skip: Whose dumps are not read.
        stage: Where the mistake is made: in that one, or in one on the way to it.
        mistake: Which.
        at_hand: What the stage has at hand.
        span: Tokens that decide what values are likely.
        dumped: Those of the stage, for values that are fitted; None if none shall be.
    """
    values: list[Any] = [None]
    if mistake.values is not None:
        find, values = mistake.values, []

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

    return replace(dialect, override=Override(stage, AtHand(tensors).computing(stage, run)))


class AtHand:
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
