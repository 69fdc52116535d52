"""Values that were rounded to whole multiples of a coarse step, and which step that was."""

from collections.abc import Iterator

import numpy as np

from qwenref.mistakes.mistake import Setting
from qwenref.model.formats import fits, spacing

LEVELS = 1 << 15
"""Of whole numbers in 16 bits. Values of that many levels are float32 ones just as well."""

LOWEST = 8
"""Of rounded values, the levels whose distances show the step: they are off by 1/50 at most."""

NEARLY = 0.1
"""Of a step, by how much values may be off multiples of it, besides their own rounding."""


def multiples(s: Setting, step: float) -> np.ndarray:
    """Return a stage's values rounded to whole multiples of a step."""
    return np.rint(s.right(*s.given) / step) * step


def steps(s: Setting, dumped: np.ndarray | None) -> Iterator[float]:
    """Yield the step of which all values are multiples, but for a last rounding to 16 bits."""
    if dumped is None or not np.isfinite(dumped).all():
        return
    narrow = next((of for of in ("bfloat16", "float16") if fits(dumped, of)), "float32")
    sizes = np.unique(np.abs(dumped))
    rounding = spacing(sizes, narrow) / 2
    step = _by_least_squares(sizes if narrow == "float32" else sizes[:LOWEST], sizes)
    if step is None:
        return
    whole = np.rint(sizes / step)
    if not 1 < whole[-1] < LEVELS:
        return
    if np.all(np.abs(sizes - whole * step) < NEARLY * step + rounding):
        seen = whole > 0
        low = float(np.max((sizes - rounding)[seen] / whole[seen]))
        high = float(np.min((sizes + rounding)[seen] / whole[seen]))
        yield _by_most(s.right(*s.given), dumped, step, min(low, step), max(high, step))


def _by_least_squares(telling: np.ndarray, sizes: np.ndarray) -> float | None:
    """Return the step that levels are nearest to multiples of; None if they are all 0.

    Args:
        telling: Those whose distances show it.
        sizes: All of them, in order.
    """
    gaps = np.diff(telling, prepend=0.0)
    gaps = gaps[gaps > 1e-6 * sizes[-1]]
    if not len(gaps):
        return None
    step, known = float(gaps.min()), LOWEST
    while known < 2 * len(sizes):  # the more levels, the better the step, the higher the next ones
        whole = np.rint(sizes[:known] / step)
        step = float(np.vdot(whole, sizes[:known]) / max(1.0, np.vdot(whole, whole)))
        known *= 2
    return step


def _by_most(right: np.ndarray, dumped: np.ndarray, step: float, low: float, high: float) -> float:
    """Return the step, of those that the levels allow, that takes the most values to their own.

    A value of many steps goes to another level if the step is but a little off. Level k is where
    values go from (k - 1/2) to (k + 1/2) steps; so each of them allows an interval of steps.
    """
    whole = np.rint(np.abs(dumped) / step)
    values = np.where(right * dumped < 0, -np.abs(right), np.abs(right))
    seen = np.isfinite(values) & (whole > 0) & (values > 0)
    values, whole = values[seen], whole[seen]
    begins, ends = values / (whole + 0.5), values / (whole - 0.5)
    points = np.unique(np.clip(np.concatenate([[low, high], begins, ends]), low, high))
    between = (points[:-1] + points[1:]) / 2 if len(points) > 1 else points
    holding = np.searchsorted(np.sort(begins), between) - np.searchsorted(np.sort(ends), between)
    return float(between[np.argmax(holding)])
