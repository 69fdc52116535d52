"""A mistake in an error, by least squares: how many times it is there, and how sure that is."""

import math
from typing import NamedTuple

import numpy as np

LEAST_UNITS = 31
"""Independent observations without which nothing is said: 30 and the one that is estimated."""


class Fit(NamedTuple):
    """A mistake in the error.

    Attributes:
        alpha: How many times.
        size: Its sum of squares.
        variance: Of the error's values without it.
        left: Of it, what no right engine may do, piece by piece.
    """

    alpha: float
    size: float
    variance: float
    left: list[np.ndarray]


class Space:
    """The error, without what else a right engine may do.

    Attributes:
        errors: Piece by piece, [t, U, E].
        freedom: How many values there are, less those that were fitted.
    """

    def __init__(self, known: list[np.ndarray]):
        """Take the error, and what else a right engine may do, piece by piece, [X, t, U, E]."""
        products = np.sum([np.einsum("xtue,ytue->xy", of, of) for of in known], axis=0)
        self._inverse = np.linalg.pinv(products[1:, 1:], rcond=1e-10, hermitian=True)
        self._others = [of[1:] for of in known]
        self.errors = self._without([of[0] for of in known])
        number = sum(int(np.count_nonzero(of.any(axis=0))) for of in known)
        self.freedom = max(number - len(products), 1)
        self._size = sum(map(square, self.errors))

    def fit(self, tried: list[np.ndarray]) -> Fit:
        """Look for a mistake."""
        left = self._without(tried)
        size = sum(map(square, left))
        both = sum(float(np.sum(d * r)) for d, r in zip(left, self.errors, strict=True))
        alpha = both / size if size else 0.0
        return Fit(alpha, size, (self._size - alpha * both) / self.freedom, left)

    def _without(self, values: list[np.ndarray]) -> list[np.ndarray]:
        products = [
            np.einsum("xtue,tue->x", others, of)
            for others, of in zip(self._others, values, strict=True)
        ]
        much = self._inverse @ np.sum(products, axis=0)
        return [
            of - np.tensordot(much, others, 1)
            for others, of in zip(self._others, values, strict=True)
        ]


def certainty(
    units: tuple[np.ndarray, np.ndarray], variance: float, freedom: int, *, few: bool
) -> float | None:
    """Return z, which is not owed to a single unit; None if there are not enough of them.

    Args:
        units: <r,d> and <d,d> of each.
        variance: Of values.
        freedom: How many values there are beyond those that are fitted.
        few: Whether a unit has few values; of those that have many, those count in which the
            mistake is.
    """
    both, size = units
    number = len(size) if few else int(size.sum() ** 2 / square(size))
    if number < LEAST_UNITS:
        return None
    others = np.arange(len(both)) != np.argmax(both)
    freedom = min(number - 1, freedom)
    return min(_z(b, s, variance, freedom) for b, s in ((both, size), (both[others], size[others])))


def _z(both: np.ndarray, size: np.ndarray, variance: float, freedom: int) -> float:
    """Return how sure it is that alpha is not 0, in deviations of a normal variable.

    The error of alpha is that of independent values, or that which is seen between units if that is
    more. Student's t as a normal variable: sqrt(n log(1 + t**2 / n)) (Wallace 1959, less than it).
    """
    total = float(size.sum())
    alpha = float(both.sum()) / total
    deviation = math.sqrt(max(variance * total, square(both - alpha * size)))
    t = alpha * total / deviation
    return math.sqrt(freedom * math.log1p(t * t / freedom)) if t > 0 else 0.0


def square(x: np.ndarray) -> float:
    """Return the sum of squares."""
    return float(np.sum(np.square(x)))
