"""Mistakes, executed: stages of a replay that are computed otherwise."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property, partial
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from qwenref.chain import Span
from qwenref.mistakes.mistake import CannotBe, Mistake, Setting
from qwenref.model.formats import in_format
from qwenref.stages import LEAVING
from qwenref.trial.dialects import EXACT, MATRICES, Dialect, Override
from qwenref.trial.replay import Replay, Skip
from qwenref.trial.residual import row_of
from qwenref.trial.tensors import Tensors

TOGETHER = 256
"""Rows that are multiplied with a matrix at once: reading it takes as long as 100 of them."""


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
    mistakes: Iterable[Mistake],
    tensors: Tensors,
    span: Span,
    dumped: np.ndarray | None,
) -> list[Found]:
    """Return mistakes, those of families with all likely values.

    Args:
        replay: What is computed.
        name: The stage that is looked at.
        skip: Whose dumps are not read.
        stage: Where mistakes are made: in that one, or in one on the way to it.
        mistakes: Those that are made there are returned.
        tensors: What they may take.
        span: Tokens that decide what values are likely.
        dumped: Those of the stage, for values that are fitted; None if none shall be.
    """
    at_hand, found = AtHand(tensors), []

    def likely(mistake: Mistake) -> list[Any]:
        if mistake.values is None:
            return [None]
        find, values = mistake.values, []

        def look(setting: Setting) -> np.ndarray:
            with suppress(CannotBe):
                values.extend(find(setting, dumped))
            return setting.right(*setting.given)

        looking = replace(EXACT, override=Override(stage, at_hand.computing(stage, look)))
        replay.compute(name, span, skip, looking)
        return values

    for mistake in mistakes:
        if stage in mistake.stages:
            for number, value in enumerate(likely(mistake)):
                run = (
                    mistake.run if mistake.values is None else partial(_with_value, mistake, value)
                )
                at_hand.expected.append(run)
                override = Override(stage, at_hand.computing(stage, run))
                dialect = replace(EXACT, id=f"{mistake.id}-{number:04}", override=override)
                found.append(Found(mistake, stage, value, dialect, np.inf))
    return found


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
    """What a stage has at hand; computed once for all mistakes that are made in it.

    Attributes:
        expected: What will be computed; products of matrices are then computed together.
    """

    def __init__(self, tensors: Tensors):
        self._tensors = tensors
        self._latest: tuple[object, Setting] | None = None
        self.expected: list[Callable[[Setting], np.ndarray]] = []

    def computing(
        self, stage: str, run: Callable[[Setting], np.ndarray]
    ) -> Callable[..., np.ndarray]:
        """Return a function for `Override.compute`."""

        def compute(
            replay: Replay, span: Span, skip: Skip, dialect: Dialect, given: Sequence[np.ndarray]
        ) -> np.ndarray:
            own = replace(dialect, id="", text="", result="exact", override=None)
            key = span, skip, own
            with np.errstate(all="ignore"):
                if self._latest is None or self._latest[0] != key:
                    right = _Right(partial(replay.made, stage, span=span, dialect=own), given)
                    tensors = self._tensors
                    setting = _setting(replay, tensors, stage, span, skip, own, right)
                    self._latest = key, setting
                setting = self._latest[1]
                if run in self.expected:
                    if stage in MATRICES and not own.formats and isinstance(setting.right, _Right):
                        setting.right.compute_together(setting, self.expected)
                    self.expected = []
                return run(setting)

        return compute


class _Right:
    """What a stage makes of its inputs, or of others."""

    def __init__(self, made: Callable[..., np.ndarray], given: Sequence[np.ndarray]):
        """Compute nothing yet.

        Args:
            made: Computes it.
            given: The inputs.
        """
        self._made, self.given = made, tuple(given)
        self._known: dict[bytes, np.ndarray] = {}

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        """Compute it, unless it is known."""
        if all(a is b for a, b in zip(arrays, self.given, strict=True)):
            return self._usual
        known = self._known.get(_digest(arrays[0])) if self._known else None
        return self._made(arrays) if known is None else known

    @cached_property
    def _usual(self) -> np.ndarray:
        values = self._made(self.given)
        values.flags.writeable = False
        return values

    def compute_together(
        self, setting: Setting, runs: Iterable[Callable[[Setting], np.ndarray]]
    ) -> None:
        """Multiply a matrix once with all inputs of few tokens that will be asked for."""
        wanted: dict[bytes, np.ndarray] = {}
        T, width = self.given[0].shape
        if 2 * T > TOGETHER:
            return

        def note(x: np.ndarray) -> np.ndarray:
            if x is not self.given[0] and x.shape == (T, width):
                wanted[_digest(x)] = x
            return self._usual

        for run in runs:
            with suppress(CannotBe):
                run(replace(setting, right=note))
        number = TOGETHER // T
        keys = [*wanted]
        for first in range(0, len(keys), number):
            some = keys[first : first + number]
            rows = np.zeros((TOGETHER, width))
            rows[: len(some) * T] = np.concatenate([wanted[key] for key in some])
            values = self._made([rows])
            for at, key in enumerate(some):
                self._known[key] = values[at * T : (at + 1) * T]
                self._known[key].flags.writeable = False


def _digest(x: np.ndarray) -> bytes:
    return blake2b(x.tobytes(), digest_size=16).digest()


def _setting(
    replay: Replay,
    tensors: Tensors,
    stage: str,
    span: Span,
    skip: Skip,
    dialect: Dialect,
    right: _Right,
) -> Setting:
    """Return what a stage has at hand for the tokens of a span."""
    formats, inputs = dict(dialect.formats), right.given

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

    def again(stream: np.ndarray) -> np.ndarray:
        other = replay.entered_by(stream)
        if LEAVING.name not in replay.chain or not other.can(LEAVING.name):
            raise CannotBe
        parts = [other.compute(LEAVING.name, at)[at.first - at.start :] for at in other.spans]
        return np.concatenate(parts)

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
        table=lambda name: tensors.table(name, np.arange(span.start, span.stop)),
        again=again,
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
