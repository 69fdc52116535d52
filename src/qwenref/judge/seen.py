"""What is seen of two arrays that are compared, block by block, and in which order does not matter.

Nothing is held that grows with the arrays but a few numbers for each token and head.
"""

import math
from typing import NamedTuple

import msgspec
import numpy as np

from qwenref.judge.measurement import Held, Narrow, Nonfinite, TopDifference

SINGLE = 1 << 13
"""Values of a dot product that OpenBLAS still computes in one thread: more than 10,000 are shared
among threads, which takes longer, of blocks that are in a cache already.
"""

NARROW: dict[Narrow, int] = {"bfloat16": 7, "float16": 10}
"""Formats that all values of an array may fit, and their bits of mantissa."""

LIKE_A_MASK = -3e3
"""Scores of Qwen2.5 are above this (with K biases of 100 their rms is 170, says
scripts/measure_generic_floor.py), and a mask that is added may be -1e4.
"""

MASKED = -3e4
"""What a mask that is added leaves is below: half of the least float16, plus a score."""

LEAST_VALUES = 32
"""Values besides 0 and 1 that it takes to believe in a format: fewer fit one by chance.

One float32 value in 65,536 fits bfloat16, but those of made-up inputs are often round.
"""


class Piece(NamedTuple):
    """Two arrays to compare, seen as [T, J, W], and where they are in their stage.

    Attributes:
        a: The first.
        b: The second, of the same shape.
        row: Token of their first row.
        head: Number of their first head.
        start: Index in the whole first array, as stored, of the array that `a` shows.
        base: That array, flat.
    """

    a: np.ndarray
    b: np.ndarray
    row: int
    head: int
    start: int
    base: np.ndarray

    def index_of(self, place: tuple[int, int, int]) -> int:
        """Return the index of a value in the whole first array, as stored."""
        token, head, cell = place
        addresses = [
            array.__array_interface__["data"][0]
            for array in (self.a[token, head, cell:], self.base)
        ]
        return self.start + (addresses[0] - addresses[1]) // self.a.itemsize


Where = tuple[slice, slice, slice]
"""Tokens, heads and cells of a block."""

Here = tuple[slice, slice]
"""Rows and heads of a block in the whole stage."""


class Rows(NamedTuple):
    """As `Sums`; errors are infinite where values are bad."""

    error: np.ndarray
    scale: np.ndarray
    largest: np.ndarray
    cells: np.ndarray


class Seen:
    """What has been seen so far, besides the rows."""

    def __init__(self, rows: Rows, limit: int, probabilities: bool, masks: bool):
        self._rows, self._limit = rows, limit
        self._probabilities, self._masks = probabilities, masks
        self.variation = 0.0
        self.top: list[tuple[TopDifference, tuple[int, int, int]]] = []
        self.mask_like = False
        self.left_out, self.left_out_differ = 0, False
        self.nonfinite = Nonfinite()
        self.formats: list[dict[Narrow, int]] = [dict.fromkeys(NARROW, 0) for _ in "ab"]
        self.masked = [_Extremes() for _ in "ab"]

    def merge(self, other: "Seen") -> None:
        """Take in what was seen of other blocks of the same arrays."""
        self.variation = max(self.variation, other.variation)
        self.top = sorted(self.top + other.top, key=_by_size)[: self._limit]
        self.mask_like |= other.mask_like
        self.left_out += other.left_out
        self.left_out_differ |= other.left_out_differ
        self.nonfinite = _together(self.nonfinite, other.nonfinite)
        self.formats = [
            {name: count + its[name] for name, count in mine.items() if name in its}
            for mine, its in zip(self.formats, other.formats, strict=True)
        ]
        for mine, its in zip(self.masked, other.masked, strict=True):
            mine.merge(its)

    def mask(
        self, piece: Piece, where: Where, first_query: int, a: np.ndarray, b: np.ndarray
    ) -> None:
        """Set the cells that no softmax reads to zero, and note what they held."""
        tokens, heads, keys = where
        queries = first_query + np.arange(tokens.start, tokens.stop)
        seen_by_all = first_query + tokens.start + 1
        hidden = np.arange(seen_by_all, keys.stop) > queries[:, None, None]
        hidden = np.broadcast_to(hidden, (*a.shape[:2], hidden.shape[2]))
        for held, tile, view in zip(self.masked, (a, b), (piece.a, piece.b), strict=True):
            triangle = tile[:, :, seen_by_all:]
            held.add(triangle[hidden])
            held.add(view[tokens, heads, keys.stop :])
            triangle[hidden] = 0
        self._rows.cells[_here(piece, where)] = queries[:, None] + 1

    def _leave_out_masked(self, piece: Piece, where: Where, a: np.ndarray, b: np.ndarray) -> None:
        """Set cells that both sides have masked to zero, where no shape says which these are."""
        hidden = np.fmax(a, b) <= MASKED
        self.left_out += int(np.count_nonzero(hidden))
        self.left_out_differ |= not np.array_equal(a[hidden], b[hidden], equal_nan=True)
        for held, tile in zip(self.masked, (a, b), strict=True):
            held.add(tile[hidden])
            tile[hidden] = 0
        self._rows.cells[_here(piece, where)] -= np.count_nonzero(hidden, axis=2)
        self.mask_like |= bool(b.min() < LIKE_A_MASK and a.min() < LIKE_A_MASK)

    def add(self, piece: Piece, where: Where, a: np.ndarray, b: np.ndarray, factor: float) -> None:
        """Take in a block, the second side times a factor; what `a` and `b` hold is lost."""
        rows, here = self._rows, _here(piece, where)
        scale = [_squares(a), _squares(b)]
        if self._masks and not any(np.fmax.reduce(of, axis=None) <= LIKE_A_MASK**2 for of in scale):
            self._leave_out_masked(piece, where, a, b)
            scale = [_squares(a), _squares(b)]
        bad = None
        if not math.isfinite(np.add.reduce(scale[0] + scale[1], axis=None)):
            bad = self._set_aside(piece, where, a, b)
        for formats, tile in zip(self.formats, (a, b), strict=True):
            if formats:
                _rule_out(formats, tile)
        if factor != 1:
            b *= factor
        if bad is not None or factor != 1:
            scale = [_squares(a), _squares(b)]
        rows.scale[0][here], rows.scale[1][here] = scale
        a -= b
        rows.error[here] = _squares(a)
        largest = np.maximum(np.maximum.reduce(a, axis=2), -np.minimum.reduce(a, axis=2))
        rows.largest[here] = largest
        if bad is not None:
            rows.error[here][bad] = rows.largest[here][bad] = math.inf
        if (
            len(self.top) < self._limit
            or np.maximum.reduce(largest, axis=None) > self.top[-1][0].abs_diff
        ):
            self._keep_largest(piece, where, a, factor)
        if self._probabilities:
            np.abs(a, out=a)
            self.variation = max(self.variation, float(a.sum(axis=2).max()) / 2)

    def _set_aside(self, piece: Piece, where: Where, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Take non-finite values out of two blocks; return which rows have bad ones."""
        in_a, in_b = ~np.isfinite(a), ~np.isfinite(b)
        either = in_a | in_b
        bad = either & ~(a == b)
        counts = (int(np.count_nonzero(found)) for found in (in_a, in_b, bad))
        found = Nonfinite(*counts)
        if found.differ:
            token, head, cell = (int(at[0]) for at in np.nonzero(bad))
            place = where[0].start + token, where[1].start + head, cell
            found = msgspec.structs.replace(
                found,
                first=piece.index_of(place),
                token=piece.row + place[0],
                head=piece.head + place[1],
            )
        self.nonfinite = _together(self.nonfinite, found)
        a[either] = b[either] = 0
        self._rows.cells[_here(piece, where)] -= np.count_nonzero(either, axis=2)
        return bad.any(axis=2)

    def _keep_largest(
        self, piece: Piece, where: Where, difference: np.ndarray, factor: float
    ) -> None:
        """Merge the largest differences of a block into those seen so far."""
        size = np.abs(difference).reshape(-1)
        kept = min(self._limit, size.size)
        found = np.flatnonzero(size >= np.partition(size, -kept)[-kept])
        for at in found[np.argsort(-size[found], kind="stable")][:kept]:
            token, head, cell = (int(i) for i in np.unravel_index(at, difference.shape))
            place = where[0].start + token, where[1].start + head, cell
            a, b = float(piece.a[place]), factor * float(piece.b[place])
            if math.isfinite(a) and math.isfinite(b):
                found_at = piece.row + place[0], piece.head + place[1], place[2]
                top = TopDifference(piece.index_of(place), a, b, float(size[at]))
                self.top.append((top, found_at))
        self.top.sort(key=_by_size)
        del self.top[self._limit :]


def _here(piece: Piece, where: Where) -> Here:
    tokens, heads, _ = where
    return (
        slice(piece.row + tokens.start, piece.row + tokens.stop),
        slice(piece.head + heads.start, piece.head + heads.stop),
    )


def _by_size(top: tuple[TopDifference, object]) -> tuple[float, int]:
    return -top[0].abs_diff, top[0].index


def _together(a: Nonfinite, b: Nonfinite) -> Nonfinite:
    """Add up what is known of different blocks."""
    if a.first is None or (b.first is not None and b.first < a.first):
        a, b = b, a
    return msgspec.structs.replace(a, a=a.a + b.a, b=a.b + b.b, differ=a.differ + b.differ)


def _squares(rows: np.ndarray) -> np.ndarray:
    """Return the sum of squares of each row."""
    first = rows[:, :, :SINGLE]
    total = np.vecdot(first, first)
    for start in range(SINGLE, rows.shape[2], SINGLE):
        part = rows[:, :, start : start + SINGLE]
        total += np.vecdot(part, part)
    return total


def _rule_out(formats: dict[Narrow, int], tile: np.ndarray) -> None:
    """Remove the formats that some value does not fit; count what speaks for the others."""
    bits = np.bitwise_or.reduce(tile.view(np.uint64), axis=None)
    for name in list(formats):
        if int(bits) & ((1 << 52 - NARROW[name]) - 1) or not _in_range(name, tile):
            del formats[name]
        elif formats[name] < LEAST_VALUES:
            formats[name] += int(np.count_nonzero((tile != 0) & (np.abs(tile) != 1)))


def _in_range(name: str, tile: np.ndarray) -> bool:
    """Return whether values of few enough bits are neither too large nor too small for float16.

    Bfloat16 has the range of float32, which is what files hold.
    """
    if name != "float16":
        return True
    with np.errstate(over="ignore"):
        return np.array_equal(tile.astype(np.float16), tile)


class _Extremes:
    """The smallest and the largest of all values seen; a NaN stays one."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Take in values."""
        if values.size:
            self._low = float(np.minimum(self._low, values.min()))
            self._high = float(np.maximum(self._high, values.max()))

    def merge(self, other: "_Extremes") -> None:
        """Take in what another has seen."""
        self._low = float(np.minimum(self._low, other._low))
        self._high = float(np.maximum(self._high, other._high))

    def describe(self) -> Held | None:
        """Say what they are, None if there are none."""
        if math.isnan(self._low):
            return "NaN"
        if self._low > self._high:
            return None
        if self._low == self._high == 0:
            return "zero"
        return "minimum" if self._high <= MASKED else "values"
