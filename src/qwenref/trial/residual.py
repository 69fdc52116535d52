"""How far a dumped stage is from what it was computed from: the error that it added itself."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from qwenref.chain import Span
from qwenref.judge.floors import BLIND, seeing
from qwenref.metrics import (
    MARGIN,
    Errors,
    Sums,
    Worst,
    errors_of,
    finite,
    sums_of,
    worst_of,
)
from qwenref.stages import BY_NAME, EMBEDDING, RESIDUAL, Stage
from qwenref.trial.dialects import EXACT, Dialect
from qwenref.trial.held import Held
from qwenref.trial.normal import Honest, floor_of
from qwenref.trial.replay import NOTHING, Replay, Skip

SPREADING = ("attn_softmax", "attention")
"""Stages in which a NaN behind the mask may reach every query, or none: it depends on how an engine
masks, for NaN + -inf and 0 * NaN are NaN.
"""


class Residual(NamedTuple):
    """The difference of a dumped stage and one that was computed.

    Attributes:
        stage: Which.
        first: Position of the first token compared.
        errors: Of all slices.
        sums: Behind them.
        contradictions: How many values are NaN or infinite on one side alone, or differ in that.
        cosine: Of the two, where both are finite; None if one of them is zero everywhere.
    """

    stage: Stage
    first: int
    errors: Errors
    sums: Sums
    contradictions: int
    cosine: float | None


class Weighed(NamedTuple):
    """A residual held to what is normal.

    Attributes:
        residual: What was found.
        floors: What is normal.
        worst: The slice that is the most floors off; None if no slice can be judged.
        explained: Whether what is left is known to come of unseen values, though it is much: some
            were rounded the other way, or made a factor.
    """

    residual: Residual
    floors: Errors
    worst: Worst | None
    explained: bool = False

    @property
    def agrees(self) -> bool:
        """Whether the residual is normal."""
        if self.residual.contradictions or self.residual.errors.whole is None:
            return False  # nothing is as far off as something from zero
        return self.explained or self.worst is None or self.worst.ratio <= MARGIN

    @property
    def blind(self) -> bool:
        """Whether so much error is normal that nothing can be said."""
        whole = self.floors.whole
        hides = whole is None or whole * MARGIN >= BLIND
        return self.agrees and hides and self.residual.errors.whole != 0


def row_of(name: str) -> Stage:
    """Return the stage table's row; the stream that enters a layer is laid out as an embedding."""
    return EMBEDDING if name == RESIDUAL else BY_NAME[name]


def compared(
    replay: Replay,
    name: str,
    held: Held,
    skip: Skip = NOTHING,
    dialect: Dialect = EXACT,
    spans: Sequence[Span] = (),
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first position, computed, dumped), piece by piece; of all spans, or of some."""
    stage = row_of(name)
    axis = stage.axes.index("T")
    for span in spans or replay.spans_for(held):
        first = max(span.first, held.first)
        if first < span.stop:
            new = *([slice(None)] * axis), slice(first - span.start, None)
            truth = replay.compute(name, span, skip, dialect)[new]
            yield first, truth, held.rows(first, span.stop)


def residual_of(
    replay: Replay, name: str, skip: Skip = NOTHING, dialect: Dialect = EXACT
) -> Residual:
    """Compare what is held of a stage with what it is computed from."""
    stage, held = row_of(name), replay.held[name]
    parts, contradictions, dumped_squares = [], 0, 0.0
    spreads = name in SPREADING and any(
        replay.held[before].any_nonfinite() for before in replay.reads(name, skip)
    )
    with np.errstate(invalid="ignore", over="ignore"):
        for first, truth, dumped in compared(replay, name, held, skip, dialect):
            bad = ~(np.isfinite(truth) & np.isfinite(dumped))
            clash = bad & ~((truth == dumped) | (np.isnan(truth) & ~np.isfinite(dumped)))
            if spreads:
                clash &= ~np.isfinite(truth)
            if stage.masked:
                clash = np.tril(clash, first)
            contradictions += int(np.count_nonzero(clash))
            difference = np.where(bad, 0.0, dumped - truth)
            seen = np.tril(dumped, first) if stage.masked else dumped
            dumped_squares += float(np.sum(np.square(np.where(bad, 0.0, seen))))
            truth = np.where(bad, 0.0, truth)
            parts.append(sums_of(stage, truth, difference, replay.sizes["H"], first))
    sums = Sums(*(np.concatenate(of, axis=-2) for of in zip(*parts, strict=True)))
    errors = errors_of(stage, sums, replay.sizes)
    cosine = _cosine(float(sums.error.sum()), float(sums.scale.sum()), dumped_squares)
    return Residual(stage, held.first, errors, sums, contradictions, cosine)


def _cosine(error: float, truth: float, dumped: float) -> float | None:
    """Return the cosine from sums of squares, of the difference and of both."""
    norms = 2 * math.sqrt(truth) * math.sqrt(dumped)
    return finite((truth + dumped - error) / norms) if norms else None


def weighed(
    replay: Replay,
    name: str,
    skip: Skip = NOTHING,
    dialect: Dialect = EXACT,
    *,
    honest: Honest | None = None,
) -> Weighed:
    """Hold a stage to what is normal.

    Args:
        replay: What it is computed with.
        name: The stage.
        skip: Whose dumps are not read.
        dialect: How it is computed.
        honest: What engines it is normal of, if not of those that round results as `dialect`.
    """
    residual = residual_of(replay, name, skip, dialect)
    floors = floor_of(replay, name, skip, dialect, honest)
    return Weighed(residual, floors, worst_of(residual.errors, _judged(residual, floors)))


def _judged(residual: Residual, floors: Errors) -> Errors:
    """Return the floors that are held against a residual: those that see, or are exceeded."""
    kept, whole = seeing(floors), residual.errors.whole
    if floors.whole is not None and (whole is None or whole > MARGIN * floors.whole):
        return msgspec.structs.replace(kept, whole=floors.whole)
    return kept
