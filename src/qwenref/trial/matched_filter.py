"""Mistakes below the noise of rounding, found by what the error has in common with them.

Let r be a dump minus its replay, and d the replay with a mistake minus that without, both in steps
of the format that results are rounded to. In a right engine r is the rounding of results, which
knows nothing of d; in one with the mistake it is d besides. So alpha = <r,d> / <d,d> is about 0, or
about 1, and how sure that is grows with the number of values, however small d is beside r.

What else a right engine may do is taken out of r and d first: other roundings, and all that is one
observation though it moves many values. A factor of a row (the norm's scale, the softmax's
denominator), or of a position and frequency (RoPE's table), is one rounding. A mistake that is such
factors itself is sought in them alone, each row being one unit; every other mistake is sought in
what is left when they are gone. A factor that is the same in all rows may be a constant that was
rounded, or results that were cut off; the norm's, which eps changes little but in all rows, counts
if rows also differ as they should, and if cutting off explains less. No error of float32 can look
like a mistake, whatever its structure: with MARGIN |e| <= |d|, |<e,d>| / <d,d> is at most 1/4.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qwenref.chain import Span
from qwenref.metrics import MARGIN
from qwenref.mistakes.catalogue import MISTAKES
from qwenref.mistakes.mistake import CannotBe
from qwenref.model.formats import spacing
from qwenref.stages import RESIDUAL
from qwenref.trial.dialects import INNER, INPUTS, MATRICES, Dialect, operand_dialects, with_weights
from qwenref.trial.executed import Found, variants
from qwenref.trial.least_squares import LEAST_UNITS, Space, certainty, square
from qwenref.trial.normal import Honest, floor_of
from qwenref.trial.precision import Account
from qwenref.trial.replay import Replay, Skip
from qwenref.trial.residual import row_of
from qwenref.trial.tensors import Tensors

SMALLEST, LARGEST = 0.8, 1.2
"""Times a mistake that r holds: by less or more, r is something else."""

ODDS = 1e-4
"""Of one false conviction in a dump, at most, if roundings are independent: by Bonferroni over all
mistakes and stages, with the bound exp(-z**2 / 2) of a normal variable's tail.
"""

ALIKE = 0.5
"""alpha, at least, of how the norm's factors differ between rows, if all of them are off."""

DIFFERENT = 9.0
"""Variances by which one mistake has to explain an error better than another: 3 deviations."""

PROMISING = 4.0
"""z, all values taken as independent, from which on it is found out which are; below `ODDS`'s."""

PIECES = 2
"""Of a long prompt, at most: spans that are looked at, the first and the last among them."""

MOST_VALUES = 1 << 18
"""Of a span, at most; else its last tokens are looked at."""


class Suspicion(NamedTuple):
    """A mistake that an error has much in common with.

    Attributes:
        found: The mistake.
        alpha: How many times it is in the error.
        z: How many standard deviations of a normal variable that is as unlikely as.
        gain: By how much the squares of the error are less without the mistake, in variances.
    """

    found: Found
    alpha: float
    z: float
    gain: float


class Untold(NamedTuple):
    """A mistake that may be there or not.

    Attributes:
        found: The mistake.
        z: What it would have here, if it were there.
        rows: Of how many distinct inputs.
    """

    found: Found
    z: float
    rows: int

    def tokens(self, z: float) -> int:
        """Return from how many distinct tokens on it is seen, if so much `z` convicts."""
        return max(LEAST_UNITS, math.ceil(self.rows * (z / self.z) ** 2))


class Look(NamedTuple):
    """What is below the noise of one stage.

    Attributes:
        tested: How many mistakes were sought.
        suspicions: Those that may be there.
        untold: Those of which nothing can be said, unless so much z suffices.
    """

    tested: int
    suspicions: list[Suspicion]
    untold: list[Untold]


class Below(NamedTuple):
    """What is said of that.

    Attributes:
        hidden: Mistakes that explain the error best, in the order of the catalogue.
        unseen: Mistakes that would not be seen, and how many distinct tokens would show them.
    """

    hidden: list[Suspicion]
    unseen: list[tuple[Found, int]]


def judged(looks: Mapping[str, Look]) -> dict[str, Below]:
    """Say of each stage what is below its noise; the more was sought, the less is believed."""
    tested = sum(look.tested for look in looks.values())
    least = math.sqrt(2 * math.log(max(tested, 1) / ODDS))
    found = {}
    for name, look in looks.items():
        certain = [of for of in look.suspicions if of.z >= least]
        best = max((of.gain for of in certain), default=0.0)
        alike = [of for of in certain if best - of.gain < DIFFERENT]
        counts = ((of.found, of.tokens(least)) for of in look.untold)
        distinct = max((of.rows for of in look.untold), default=0)
        found[name] = Below(alike, [one for one in counts if one[1] > distinct])
    return found


def look_below(replay: Replay, tensors: Tensors, name: str, skip: Skip, of: Account) -> Look | None:
    """Seek all mistakes in the rounding noise of a stage that agrees.

    Args:
        replay: With what the engine dumped.
        tensors: Others of the checkpoint.
        name: The stage.
        skip: Whose dumps are not read.
        of: How it is computed.

    Returns:
        None if there is no such noise: results are not rounded, or inputs are not those that the
        engine used.
    """
    if not of.choices:
        return None
    dialect = of.choices[0].dialect
    unseen = replay.bridges(name, skip | dialect.skips) - {RESIDUAL, *dialect.skips}
    bent = dialect.minus_bias or dialect.flash or dialect.estimated
    if dialect.result == "exact" or bent or unseen or replay.held[name].first:
        return None
    return _Filter(replay, tensors, name, skip, dialect).look(of.weighed.floors.whole or 0.0)


Spaces = tuple[np.ndarray, np.ndarray]
"""Values without their groups' common factors, and those factors: each in units, [.., t, U, E]."""

SHAPE, FACTORS = 0, 1

ERROR, VALUES, SIGNS = 0, 1, 2
"""What is known first: rounding towards zero is in proportion to signs."""


class _Piece(NamedTuple):
    """Some tokens.

    Attributes:
        span: Where they are computed.
        tokens: Those of the span that are looked at.
        plain: As the stage computes them without any rounding, in groups, [t, G, E].
        weight: 1 / step, or 0 for what is not looked at.
        basis: Directions of the groups' factors, orthonormal, [t, G, B, E].
        rows: For each token, the number of its distinct input.
        known: The error, and what else a right engine may do, in steps, [X, t, ..].
    """

    span: Span
    tokens: slice
    plain: np.ndarray
    weight: np.ndarray
    basis: np.ndarray
    rows: np.ndarray
    known: Spaces


class _Filter:
    """Seeks mistakes in one stage."""

    def __init__(self, replay: Replay, tensors: Tensors, name: str, skip: Skip, dialect: Dialect):
        self.replay, self.tensors, self.name = replay, tensors, name
        # a mistake must know nothing of the error: later dumps hold it too
        self.skip = skip | {*replay.chain[replay.chain.index(name) :]}
        self.narrow, self.dialect = dialect.result, replace(dialect, result="exact")
        self.plain = replace(self.dialect, formats=(), inputs=())
        self.width = replay.sizes["H"]
        self._numbers: dict[bytes, int] = {}
        spans = replay.spans
        at = np.unique(np.linspace(0, len(spans) - 1, PIECES).astype(int))
        self.pieces = [self._piece(spans[number]) for number in at]
        float32 = floor_of(replay, name, skip, self.dialect, Honest()).whole or 0.0
        self.size = sum(float(np.sum(np.square(of.plain * of.weight))) for of in self.pieces)
        self.least = (MARGIN * float32) ** 2 * self.size
        shape, factors = ([piece.known[of] for piece in self.pieces] for of in (SHAPE, FACTORS))
        self.spaces = [Space(shape), Space(factors)]
        self.differences = self.spaces[FACTORS]
        if name.endswith("norm"):
            constant = [VALUES, SIGNS]
            self.spaces[FACTORS] = Space([np.delete(of, constant, axis=0) for of in factors])
        mixed, signs = (
            sum(float(np.sum(of[a] * of[b])) for of in (*shape, *factors))
            for a, b in ((ERROR, SIGNS), (SIGNS, SIGNS))
        )
        self.towards_zero = mixed**2 / signs if signs else 0.0

    def look(self, normal: float) -> Look:
        """Seek all mistakes that are not seen anyway, where `normal` is as in floors."""
        tested, suspicions, untold = 0, [], []
        for found in self._variants():
            try:
                tried = [self._changed(piece, self._with(found)) for piece in self.pieces]
            except CannotBe:
                continue
            tested += 1
            if sum(map(square, tried)) > (MARGIN * normal) ** 2 * self.size:
                continue
            splits = [
                _split(of, piece.basis, self.width)
                for of, piece in zip(tried, self.pieces, strict=True)
            ]
            which = max(SHAPE, FACTORS, key=lambda at: sum(square(of[at]) for of in splits))
            one = self._judged(found, [of[which] for of in splits], which)
            if isinstance(one, Suspicion) and self._gain(splits) <= self.towards_zero:
                continue
            if isinstance(one, Suspicion):
                suspicions.append(one)
            elif isinstance(one, Untold):
                untold.append(one)
        return Look(tested, suspicions, untold)

    def _gain(self, splits: list[Spaces]) -> float:
        """Return by how much the squares of the error are less without a mistake."""
        return sum(
            float(np.sum((2 * piece.known[which][ERROR] - of[which]) * of[which]))
            for piece, of in zip(self.pieces, splits, strict=True)
            for which in (SHAPE, FACTORS)
        )

    def _judged(
        self, found: Found, tried: list[np.ndarray], which: int
    ) -> Suspicion | Untold | None:
        space = self.spaces[which]
        fit = space.fit(tried)
        distinct = len(self._numbers)
        if fit.size <= self.least or fit.variance <= 0:
            return None  # float32 may do as much
        z = math.sqrt(fit.size / fit.variance)
        if SMALLEST <= fit.alpha <= LARGEST and fit.alpha * z >= PROMISING:
            units = self._units(space.errors, fit.left)
            certain = certainty(units, fit.variance, space.freedom, few=which == FACTORS)
            if which == FACTORS and self.differences.fit(tried).alpha < ALIKE:
                return None
            if certain is not None:
                gain = (2 * fit.alpha - 1) * fit.size / fit.variance
                return Suspicion(found, fit.alpha, certain, gain)
        return Untold(found, z, distinct)

    def _units(
        self, errors: list[np.ndarray], tried: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return <r,d> and <d,d> of each unit; those of equal inputs are one."""
        sums: dict[tuple[int, int], np.ndarray] = {}
        for error, mistake, piece in zip(errors, tried, self.pieces, strict=True):
            pairs = np.stack([np.sum(error * mistake, -1), np.sum(np.square(mistake), -1)], -1)
            for row, units in zip(piece.rows.tolist(), pairs, strict=True):
                for number, pair in enumerate(units):
                    sums[row, number] = sums.get((row, number), 0.0) + pair
        both, size = np.array([*sums.values()]).T
        return both[size > 0], size[size > 0]

    def _variants(self) -> list[Found]:
        mistakes = (of for of in MISTAKES if not (of.general or of.rounds))
        first, name = self.pieces[0].span, self.name
        return variants(self.replay, name, self.skip, name, mistakes, self.tensors, first, None)

    def _piece(self, span: Span) -> _Piece:
        replay, name, skip = self.replay, self.name, self.skip
        right = self._grouped(replay.compute(name, span, skip, self.dialect))
        most = max(MOST_VALUES // right[0].size, 1)
        tokens = slice(max(span.first - span.start, len(right) - most), None)
        right = right[tokens]
        dumped = self._grouped(replay.held[name].rows(span.start, span.stop))[tokens]
        factor = replay.factor(name)
        step = spacing(right / factor, self.narrow) * factor
        seen = np.isfinite(right) & np.isfinite(dumped) & (step > 0)
        if row_of(name).masked:
            queries = np.arange(span.start, span.stop)[tokens]
            seen &= np.arange(right.shape[-1]) <= queries[:, None, None]
        weight = np.divide(1.0, step, out=np.zeros_like(step), where=seen)
        right, dumped = np.where(seen, right, 0.0), np.where(seen, dumped, 0.0)
        basis = _basis(name, right, weight)
        plain = self._grouped(replay.compute(name, span, skip, self.plain))[tokens]
        rows, none = self._rows(span, tokens), np.zeros(0)
        piece = _Piece(span, tokens, np.where(seen, plain, 0.0), weight, basis, rows, (none, none))
        others = (self._changed(piece, of) for of in self._honest())
        known = [(dumped - right) * weight, right * weight, np.sign(right)]
        known += [self._divided_again(piece)] if name == "attention" else []
        known = np.stack([*known, *(of for of in others if of.any())])
        return piece._replace(known=_split(known, basis, self.width))

    def _with(self, found: Found) -> Dialect:
        return replace(self.plain, id=found.dialect.id, override=found.dialect.override)

    def _changed(self, piece: _Piece, dialect: Dialect) -> np.ndarray:
        """Return what a dialect, or a mistake, changes, in steps, [t, G, E]."""
        values = self.replay.compute(self.name, piece.span, self.skip, dialect)
        change = (self._grouped(values)[piece.tokens] - piece.plain) * piece.weight
        return np.where(np.isfinite(change), change, 0.0)

    def _divided_again(self, piece: _Piece) -> np.ndarray:
        """Return what it changes, in steps, that probabilities were rounded for the dump alone.

        Then the engine's own add up to 1, and those that were dumped do not.
        """
        skip = self.skip | self.dialect.skips
        probabilities = self.replay.rows("attn_softmax", piece.span, skip, self.plain)
        total = probabilities.sum(axis=-1).T[piece.tokens, :, None]
        factors = np.divide(1.0, total, out=np.ones_like(total), where=total > 0)
        return piece.plain * piece.weight * (factors - 1)

    def _honest(self) -> Iterator[Dialect]:
        """Yield other ways to round."""
        for point in INNER.get(self.name, {}):
            yield replace(self.plain, formats=((point, self.narrow),))
        for weights in self.replay.weights_may_be(self.name, self.skip):
            yield with_weights(self.plain, weights)
        if self.name in MATRICES:
            yield replace(self.plain, inputs=(self.narrow,))
        if self.name in INPUTS:
            for of in operand_dialects(self.name, (), ()):
                if {*of.inputs} <= {"exact", self.narrow}:
                    yield of

    def _rows(self, span: Span, tokens: slice) -> np.ndarray:
        """Return for each token the number of what the stage is computed from, if distinct."""
        stage = row_of(self.name)
        before = stage.computed_from[0] if self.name != RESIDUAL else RESIDUAL
        inputs = self.replay.rows(before, span, self.skip | self.dialect.skips, self.dialect)
        inputs = np.moveaxis(inputs, row_of(before).axes.index("T"), 0)[tokens]
        keys = (row.tobytes() for row in inputs)
        return np.array([self._numbers.setdefault(key, len(self._numbers)) for key in keys])

    def _grouped(self, x: np.ndarray) -> np.ndarray:
        """Return values that have a factor in common, [t, G, E]."""
        stage = row_of(self.name)
        if stage.masked:
            return x.transpose(1, 0, 2)
        if "post_rope" in self.name:  # the two channels of a pair, of all heads
            T, J, H = x.shape
            return x.reshape(T, J, 2, H // 2).transpose(0, 3, 2, 1).reshape(T, H // 2, 2 * J)
        heads = self.name == "attention"
        return x.reshape(len(x), self.replay.sizes["N"] if heads else 1, -1)


def _basis(name: str, right: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return directions of the factors that the values of a group have in common, orthonormal."""
    first = _normed(right * weight)
    if "post_rope" not in name:
        return first[:, :, None]
    left, other = np.split(right, 2, axis=-1)
    turned = np.concatenate([-other, left], axis=-1) * weight
    turned -= first * np.sum(first * turned, axis=-1, keepdims=True)
    return np.stack([first, _normed(turned)], axis=2)


def _normed(x: np.ndarray) -> np.ndarray:
    norm = np.sqrt(np.sum(np.square(x), axis=-1, keepdims=True))
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)


def _split(x: np.ndarray, basis: np.ndarray, width: int) -> Spaces:
    """Return values [.., t, G, E] in the two spaces."""
    factors = np.einsum("...tge,tgbe->...tgb", x, basis)
    shape = x - np.einsum("...tgb,tgbe->...tge", factors, basis)
    *_, G, E = shape.shape
    if G == 1:  # a unit is as wide as a head
        shape = np.pad(shape, [(0, 0)] * (x.ndim - 1) + [(0, -E % width)])
        shape = shape.reshape(*x.shape[:-2], -1, width)
    return shape, factors.reshape(*x.shape[:-2], 1, -1)
