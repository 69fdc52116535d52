"""Measuring how far two stored arrays are apart, in float64, a small block at a time.

Nothing is judged here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from threading import Event

import numpy as np

from qwenref.dumps.reading import Mapped
from qwenref.judge.measurement import Compared, Narrow
from qwenref.judge.seen import LEAST_VALUES, Piece, Rows, Seen
from qwenref.metrics import Sums, finite
from qwenref.progress import SILENT, Progress

BLOCK = 1 << 17
"""Values looked at together: half as many take two threads a third longer (docs/benchmarks.md)."""

MANY = 64
"""Blocks from which on a second thread pays: NumPy lets others run while it computes."""

RELEASE = 1 << 19
"""Values after which a thread gives the memory of what was read back."""


def distance(
    pieces: Sequence[Piece],
    mapped: Sequence[Mapped],
    *,
    first_query: int | None,
    probabilities: bool,
    factor: float,
    limit: int,
    masks: bool = False,
    progress: Progress = SILENT,
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
        progress: Told how many bytes were looked at.
    """
    T = max(piece.row + piece.a.shape[0] for piece in pieces)
    J = max(piece.head + piece.a.shape[1] for piece in pieces)
    width = np.ones((T, J))
    for piece in pieces:
        rows, heads, cells = piece.a.shape
        width[piece.row : piece.row + rows, piece.head : piece.head + heads] = cells
    rows = Rows(np.zeros((T, J)), np.zeros((2, T, J)), np.zeros((T, J)), width)
    tiles = [(piece, *tile) for piece in pieces for tile in _tiles(piece.a)]
    stop = Event()

    def look_at(some: Sequence[tuple[Piece, slice, slice]]) -> Seen:
        seen, readers, unreleased = (
            Seen(rows, limit, probabilities, masks),
            (_Reader(), _Reader()),
            0,
        )
        with np.errstate(over="ignore", invalid="ignore"):
            for piece, tokens, heads in some:
                if stop.is_set():
                    break
                keys = slice(None if first_query is None else first_query + tokens.stop)
                where = tokens, heads, keys
                a, b = readers[0](piece.a[where]), readers[1](piece.b[where])
                if first_query is not None:
                    seen.mask(piece, where, first_query, a, b)
                seen.add(piece, where, a, b, factor)
                both = piece.a.itemsize + piece.b.itemsize
                progress.advance(piece.a[tokens, heads].size * both)
                unreleased += a.size
                if unreleased >= RELEASE:
                    unreleased = 0
                    for each in mapped:
                        each.release()
        return seen

    if len(tiles) < MANY:
        return _result(rows, look_at(tiles), probabilities)
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as helper:
        others = helper.submit(look_at, tiles[1::2])
        try:
            seen = look_at(tiles[::2])
            seen.merge(others.result())
        finally:
            stop.set()  # if we were interrupted
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


def _result(rows: Rows, seen: Seen, probabilities: bool) -> tuple[Sums, Compared]:
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


def _cosine(error: float, a: float, b: float) -> float:
    if not a or not b or not math.isfinite(error):
        return math.nan
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.clip((a + b - error) / (2 * np.sqrt(a) * np.sqrt(b)), -1, 1))


def _fitting(formats: Mapping[Narrow, int]) -> Narrow | None:
    return next((name for name, count in formats.items() if count >= LEAST_VALUES), None)
