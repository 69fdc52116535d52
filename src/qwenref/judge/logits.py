"""What two dumps of lm_head say of the next token: which is preferred, and how sure that is."""

import numpy as np

from qwenref.judge.measurement import Logits

TOP = 10
"""How many of the likeliest tokens are compared."""


def logits_of(a: np.ndarray, b: np.ndarray) -> Logits | None:
    """Compare the logits of the tokens that are finite in both; None if there are none.

    Args:
        a: Of the first dump, [T, V].
        b: Of the second.
    """
    found = []
    for of_a, of_b in zip(a, b, strict=True):
        x, y = of_a.astype(np.float64), of_b.astype(np.float64)
        if np.isfinite(x).all() and np.isfinite(y).all():
            found.append((*_best(x, y), _divergence(x, y)))
    if not found:
        return None
    best_a, best_b, overlaps, divergences = zip(*found, strict=True)
    return Logits(
        tokens=len(found),
        same=sum(x == y for x, y in zip(best_a, best_b, strict=True)),
        last=(best_a[-1], best_b[-1]),
        top=min(TOP, a.shape[1]),
        overlap=min(overlaps),
        divergence=max(divergences),
    )


def _best(x: np.ndarray, y: np.ndarray) -> tuple[int, int, int]:
    """Return which each prefers, and how many of the likeliest both have."""
    top = min(TOP, x.size)
    of_x, of_y = (set(np.argpartition(-each, top - 1)[:top].tolist()) for each in (x, y))
    return int(np.argmax(x)), int(np.argmax(y)), len(of_x & of_y)


def _divergence(x: np.ndarray, y: np.ndarray) -> float:
    """Return the Kullback-Leibler divergence of two softmaxes, in nats: the larger direction."""
    p, q = (each - each.max() for each in (x, y))
    p, q = (each - np.log(np.sum(np.exp(each))) for each in (p, q))
    return max(0.0, float(np.exp(p) @ (p - q)), float(np.exp(q) @ (q - p)))
