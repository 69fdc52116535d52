"""Measuring how far two stored arrays are apart, in float64, a small block at a time.

Nothing is judged here, and nothing is held that grows with the arrays but a few numbers for each
token and head.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qwenref.dumps.reading import Mapped
from qwenref.judge.measurement import Compared, Held, Narrow, Nonfinite, TopDifference
from qwenref.metrics import Sums, finite

BLOCK = 1 << 16
"""Values looked at together: in float64 two such blocks fit a core's cache."""

SINGLE = 1 << 13
"""Values of a dot product that OpenBLAS still computes in one thread: more than 10,000 are shared
among threads, which takes longer, of blocks that are in a cache already.
"""

RELEASE = 1 << 21
"""Values after which the memory of what was read is given back."""

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


def distance(
    pieces: Sequence[Piece],
    mapped: Sequence[Mapped],
    *,
    first_query: int | None,
    probabilities: bool,
    factor: float,
    limit: int,
    masks: bool = False,
) -> tuple[Sums, Compared]:
    """Compare two arrays.

    Args:
        pieces: That together cover them once.
        mapped: What is behind them, to give memory back.
        first_query: If the cells of a row are keys, of which those after its token are masked:
            the position of the first row.
        probabilities: Whether rows are distributions.
        factor: What the second array is multiplied with.
        limit: How many of the largest differences to keep, at least 1.
        masks: Whether values that both arrays have below `MASKED` are those of a mask.
    """
    T = max(piece.row + piece.a.shape[0] for piece in pieces)
    J = max(piece.head + piece.a.shape[1] for piece in pieces)
    width = np.ones((T, J))
    for piece in pieces:
        rows, heads, cells = piece.a.shape
        width[piece.row : piece.row + rows, piece.head : piece.head + heads] = cells
    rows = _Rows(np.zeros((T, J)), np.zeros((2, T, J)), np.zeros((T, J)), width)
    seen, readers, unreleased = _Seen(rows, limit, probabilities, masks), (_Reader(), _Reader()), 0
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in pieces:
            for tokens, heads in _tiles(piece.a):
                keys = slice(None if first_query is None else first_query + tokens.stop)
                where = tokens, heads, keys
                a, b = readers[0](piece.a[where]), readers[1](piece.b[where])
                if first_query is not None:
                    seen.mask(piece, where, first_query, a, b)
                seen.add(piece, where, a, b, factor)
                unreleased += a.size
                if unreleased >= RELEASE:
                    unreleased = 0
                    for each in mapped:
                        each.release()
    return _result(rows, seen, probabilities)


def _tiles(view: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Yield (tokens, heads) of blocks of a view, in the order in which it is stored."""
    T, J, W = view.shape
    heads_first = J > 1 and view.strides[1] > view.strides[0]
    heads = max(1, min(J, BLOCK // (T * W))) if heads_first else J
    tokens = max(1, min(T, BLOCK // (heads * W)))
    for head in range(0, J, heads):
        for token in range(0, T, tokens):
            yield slice(token, min(token + tokens, T)), slice(head, min(head + heads, J))


class _Reader:
    """Copies blocks, in float64, to the same place: memory that is fresh each time is slow."""

    def __init__(self) -> None:
        self._buffer = np.empty(BLOCK)

    def __call__(self, block: np.ndarray) -> np.ndarray:
        if block.size > self._buffer.size:
            self._buffer = np.empty(block.size)
        copy = self._buffer[: block.size].reshape(block.shape)
        copy[:] = block
        return copy


_Where = tuple[slice, slice, slice]
"""Tokens, heads and cells of a block."""

_Here = tuple[slice, slice]
"""Rows and heads of a block in the whole stage."""


class _Rows(NamedTuple):
    """As `Sums`; errors are infinite where values are bad."""

    error: np.ndarray
    scale: np.ndarray
    largest: np.ndarray
    cells: np.ndarray


class _Seen:
    """What has been seen so far, besides the rows."""

    def __init__(self, rows: _Rows, limit: int, probabilities: bool, masks: bool):
        self._rows, self._limit = rows, limit
        self._probabilities, self._masks = probabilities, masks
        self.variation = 0.0
        self.top: list[tuple[TopDifference, tuple[int, int, int]]] = []
        self.mask_like = False
        self.left_out, self.left_out_differ = 0, False
        self.nonfinite = Nonfinite()
        self.formats = [dict.fromkeys(NARROW, 0) for _ in "ab"]
        self.masked = [_Extremes() for _ in "ab"]

    def mask(
        self, piece: Piece, where: _Where, first_query: int, a: np.ndarray, b: np.ndarray
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

    def _leave_out_masked(self, piece: Piece, where: _Where, a: np.ndarray, b: np.ndarray) -> None:
        """Set cells that both sides have masked to zero, where no shape says which these are."""
        hidden = np.fmax(a, b) <= MASKED
        self.left_out += int(np.count_nonzero(hidden))
        self.left_out_differ |= not np.array_equal(a[hidden], b[hidden], equal_nan=True)
        for held, tile in zip(self.masked, (a, b), strict=True):
            held.add(tile[hidden])
            tile[hidden] = 0
        self._rows.cells[_here(piece, where)] -= np.count_nonzero(hidden, axis=2)
        self.mask_like |= bool(b.min() < LIKE_A_MASK and a.min() < LIKE_A_MASK)

    def add(self, piece: Piece, where: _Where, a: np.ndarray, b: np.ndarray, factor: float) -> None:
        """Take in a block, the second side times a factor; what `a` and `b` hold is lost."""
        rows, here = self._rows, _here(piece, where)
        scale = [_squares(a), _squares(b)]
        if self._masks and min(np.fmax.reduce(of, axis=None) for of in scale) > LIKE_A_MASK**2:
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

    def _set_aside(self, piece: Piece, where: _Where, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Take non-finite values out of two blocks; return which rows have bad ones."""
        in_a, in_b = ~np.isfinite(a), ~np.isfinite(b)
        either = in_a | in_b
        bad = either & ~(a == b)
        known = self.nonfinite
        counts = (int(np.count_nonzero(found)) for found in (in_a, in_b, bad))
        total = (sum(pair) for pair in zip((known.a, known.b, known.differ), counts, strict=True))
        first = known.first, known.token, known.head
        if known.first is None and bad.any():
            token, head, cell = (int(at[0]) for at in np.nonzero(bad))
            place = where[0].start + token, where[1].start + head, cell
            first = piece.index_of(place), piece.row + place[0], piece.head + place[1]
        self.nonfinite = Nonfinite(*total, *first)
        a[either] = b[either] = 0
        self._rows.cells[_here(piece, where)] -= np.count_nonzero(either, axis=2)
        return bad.any(axis=2)

    def _keep_largest(
        self, piece: Piece, where: _Where, difference: np.ndarray, factor: float
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
        self.top.sort(key=lambda top: (-top[0].abs_diff, top[0].index))
        del self.top[self._limit :]


def _here(piece: Piece, where: _Where) -> _Here:
    tokens, heads, _ = where
    return (
        slice(piece.row + tokens.start, piece.row + tokens.stop),
        slice(piece.head + heads.start, piece.head + heads.stop),
    )


def _result(rows: _Rows, seen: _Seen, probabilities: bool) -> tuple[Sums, Compared]:
    """Return the sums of all rows, and what is known of the whole."""
    with np.errstate(over="ignore", invalid="ignore"):
        error, (a, b) = float(rows.error.sum()), rows.scale.sum(axis=(1, 2)).tolist()
        norm_ratio = math.sqrt(a / b) if b and math.isfinite(a + b) else math.nan
    cells = int(rows.cells.sum())
    if cells == 0 and not seen.left_out_differ:
        cells = seen.left_out  # there is nothing else, and that is the same
    comparable = seen.top and not seen.nonfinite.differ
    largest, largest_at = seen.top[0] if comparable else (None, None)
    compared = Compared(
        cells=cells,
        max_abs_diff=finite(largest.abs_diff) if largest else None,
        max_at=largest_at,
        rms_diff=finite(math.sqrt(error / cells)) if cells else None,
        cosine_sim=finite(_cosine(error, a, b)),
        norm_ratio=finite(norm_ratio),
        total_variation=finite(seen.variation) if probabilities else None,
        formats=(_fitting(seen.formats[0]), _fitting(seen.formats[1])),
        nonfinite=seen.nonfinite,
        mask_like=seen.mask_like,
        masked=(seen.masked[0].describe(), seen.masked[1].describe()),
        top_diffs=[top for top, _ in seen.top if math.isfinite(top.abs_diff)],
    )
    return Sums(*rows)._replace(cells=np.maximum(rows.cells, 1)), compared


def _fitting(formats: Mapping[Narrow, int]) -> Narrow | None:
    return next((name for name, count in formats.items() if count >= LEAST_VALUES), None)


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


def _cosine(error: float, a: float, b: float) -> float:
    if not a or not b or not math.isfinite(error):
        return math.nan
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.clip((a + b - error) / (2 * np.sqrt(a) * np.sqrt(b)), -1, 1))


class _Extremes:
    """The smallest and the largest of all values seen; a NaN stays one."""

    def __init__(self) -> None:
        self._low, self._high = math.inf, -math.inf

    def add(self, values: np.ndarray) -> None:
        """Take in values."""
        if values.size:
            self._low = float(np.minimum(self._low, values.min()))
            self._high = float(np.maximum(self._high, values.max()))

    def describe(self) -> Held | None:
        """Say what they are, None if there are none."""
        if math.isnan(self._low):
            return "NaN"
        if self._low > self._high:
            return None
        if self._low == self._high == 0:
            return "zero"
        return "minimum" if self._high <= MASKED else "values"
