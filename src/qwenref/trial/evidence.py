"""What roundings look like that cannot be executed, or not to the last value."""

import numpy as np

from qwenref.chain import Span
from qwenref.metrics import MARGIN, sums_of
from qwenref.trial.dialects import EXACT, Dialect, result_dialects
from qwenref.trial.normal import Honest, rows_off, share_of_rows_off
from qwenref.trial.replay import Replay, Skip
from qwenref.trial.residual import Weighed, compared, residual_of, row_of, weighed

FLIPS = 0.15
"""Of the error before, so much may be left where an engine rounds what is in no dump: where that is
nearly a tie, float32 noise makes it another number of the format. A value is off by 1e-7, float16
has a tie every 5e-4: one in 2,000 flips, and leaves sqrt(12 / 2000) = 0.08. A dialect that is not
the engine's leaves 0.3 or more in 99 of 100 cases (scripts/measure_evidence.py); so
more must not be left by one kernel for two stages either.
"""

PARALLEL, ROWS = 0.9, 3.0
"""Correlation of an error with the value, and standard deviations of its sign over the rows (heads
of a token). Rounding is not biased. A factor of which MARGIN floors are left beside one of rounding
makes it 4 / sqrt(17) = 0.97.
"""

RARE = 0.25
"""Of the rows that rounded inputs make wrong, so few are not made wrong by them: one token of 12 is
0.08; honest dumps have 0.6 or more (scripts/measure_evidence.py).
"""

FEW_VALUES = 0.05
"""Of all values, so many at most are rounded the other way: one in 2,000, but two of 56 by chance.
Where the operand [T, D] of a product is not in the dump, one of its values may be too: that moves
each result by 1/sqrt(D) of its own step, so that as many of a token's go the other way.
"""

FEW, MOST = 0.1, 0.5
"""Of the rows (a head of a token), so few may hold flips, where so many were off before: for dumps
that are too small to average.
"""


def are_flips(replay: Replay, name: str, skip: Skip, left: Weighed) -> bool:
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


def is_of_sums(replay: Replay, skip: Skip, dialect: Dialect, left: Weighed) -> bool:
    """Return whether rounded probabilities leave a factor of each head and token in attention.

    Of the largest score s, exp(s - s) is 1 but for what float32 makes of it: 2**-24 |s| at most, as
    2**(s c - s c) with one rounding of s c, as in FlashAttention's kernels. The sum that divides
    has that, a probability of 1 + 2**-24 |s| that is rounded has not.
    """
    if left.residual.contradictions or not replay.can("attn_scores", skip):
        return False
    largest = np.concatenate([_largest(replay, span, skip) for span in replay.spans])
    held, normal = replay.held["attention"], MARGIN * (left.floors.whole or 0.0)
    for first, truth, dumped in compared(replay, "attention", held, skip, dialect):
        truth, dumped = (x.reshape(len(x), -1, replay.sizes["H"]) for x in (truth, dumped))
        own, along = np.vecdot(truth, truth), np.vecdot(truth, dumped - truth)
        factors = np.divide(along, own, out=np.zeros_like(own), where=own > 0)
        rest = dumped - truth * (1 + factors[:, :, None])
        scale = normal * np.sqrt(np.maximum(own, own.mean()))
        of_sums = np.abs(factors) <= 2**-24 * largest[first : first + len(own)] + normal
        if not np.all(of_sums & (np.linalg.norm(rest, axis=-1) <= scale)):
            return False
    return True


def _largest(replay: Replay, span: Span, skip: Skip) -> np.ndarray:
    """Return the size of the largest score that each query sees, [t, N]."""
    scores = replay.compute("attn_scores", span, skip)
    T, S = scores.shape[1:]
    seen = np.tri(T, S, span.start, dtype=bool)
    largest = np.where(seen, scores, -np.inf).max(axis=-1)
    return np.abs(largest).T[span.first - span.start :]


def few_values_off(
    replay: Replay, name: str, skip: Skip, dialect: Dialect, judged: Weighed
) -> bool:
    """Return whether nearly all values are as computed, with the floors of what was judged."""
    few = max(FEW_VALUES, replay.sizes["D"] ** -0.5 if replay.bridges(name, skip) else 0.0)
    sums, normal = judged.residual.sums, judged.floors.element or 0.0
    scale = np.sqrt(sums.scale.sum() / sums.cells.sum())
    off = [
        (np.abs(dumped - truth) > MARGIN * normal * scale).ravel()
        for _, truth, dumped in compared(replay, name, replay.held[name], skip, dialect)
    ]
    return float(np.mean(np.concatenate(off))) <= few


def are_ties(replay: Replay, name: str, skip: Skip, dialect: Dialect, left: Weighed) -> bool:
    """Return whether rounding to coarse steps leaves but values that were rounded the other way.

    Such a value is off by a step: twice as much as any was before.
    """
    before, after = residual_of(replay, name, skip), left.residual
    if after.contradictions or np.max(after.sums.largest) > 2 * np.max(before.sums.largest):
        return False
    return few_values_off(replay, name, skip, dialect, left)


def is_from_inputs(replay: Replay, name: str, skip: Skip, honest: Honest) -> bool:
    """Return whether an error is like that of inputs that were rounded after they were used.

    It is in about as many rows as such errors, and it is not parallel to the value.
    """
    found, expected = rows_of_inputs(replay, name, skip, honest)
    return found >= RARE * expected and not _is_a_factor(replay, name, skip)


def rows_of_inputs(replay: Replay, name: str, skip: Skip, honest: Honest) -> tuple[float, float]:
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
