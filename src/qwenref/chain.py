"""Computing the stages of one layer piece by piece: of a long prompt, little is held at a time."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import numpy as np

from qwenref.model.attention import Attention
from qwenref.model.feed_forward import FeedForward
from qwenref.model.head import Head
from qwenref.model.matrix import Matrix
from qwenref.stages import ATTENTION, EMBEDDING, HEAD, LAST_LOGITS, RESIDUAL, Stage, needed_for

PIECE_BYTES = 3 << 20
"""Most bytes of a piece of [T, F] or of [N, T, S]. docs/benchmarks.md has what others cost."""

HEAD_BYTES = 64 << 20
"""Most bytes that a slice of lm_head's matrix would have, widened, and that its logits have."""

LEAST_TOKENS, LEAST_QUERIES = 512, 8
"""Tokens of a piece, if there are as many, even if these take more bytes: for each piece the
projections are widened, and keys and values put in another order. With 7B's sizes and 8192 tokens
attn_out takes two thirds of the time that pieces of the size above do, says docs/benchmarks.md.
"""

Arrays = dict[str, Any]
"""By the names in `Stage.computed_from`."""


class Layer(NamedTuple):
    """The modules of a decoder layer; the second only where a stage after attn_out is wanted."""

    attention: Attention
    feed_forward: FeedForward | None = None

    def method(self, stage: Stage) -> Callable[..., jax.Array]:
        """Return what computes a stage."""
        return getattr(self.attention if stage in ATTENTION else self.feed_forward, stage.name)


class Piece(NamedTuple):
    """Some tokens of a stage: those from position `first` on, in the axes of `stage.axes`.

    Of lm_head they are all tokens that are wanted, and of each the logits from `channel` on.
    """

    stage: Stage
    first: int
    values: np.ndarray
    channel: int = 0


class Span(NamedTuple):
    """The tokens from position `start` to `stop`; those before `first` are not new."""

    start: int
    first: int
    stop: int


Computed = tuple[Stage, Span, Any]
"""A stage and its array for the tokens of a span."""


def layer_pieces(layer: Layer, residual: np.ndarray, wanted: Collection[Stage]) -> Iterator[Piece]:
    """Compute the wanted stages of a layer, and no others than they need, piece by piece.

    How a prompt is cut into pieces does not depend on which stages are wanted, so that neither do
    the values.

    Args:
        layer: Its modules.
        residual: The stream that enters it, [T, D], in a dtype that widens to the layer's.
        wanted: Stages of `qwenref.stages.LAYER`; `EMBEDDING` is `residual` itself.
    """
    for stage, span, array in _begun_ahead(_computed(layer, residual, needed_for(wanted))):
        # of a chain where few stages are wanted, JAX would hold several blocks that it began with
        jax.block_until_ready(array)
        if stage in wanted:
            if stage.name == "qkv_matmul":
                array = layer.attention.at("qkv_matmul", array)
            new = *([slice(None)] * stage.axes.index("T")), slice(span.first - span.start, None)
            yield Piece(stage, span.first, np.asarray(array)[new])


def _begun_ahead(computed: Iterator[Computed]) -> Iterator[Computed]:
    """Let JAX begin with an array before the one before it is looked at, and waited for."""
    last = next(computed, None)
    for following in computed:
        if last is not None:
            yield last
        last = following
    if last is not None:
        yield last


def _computed(layer: Layer, residual: np.ndarray, chain: Sequence[Stage]) -> Iterator[Computed]:
    """Compute a chain for one block of tokens after the other.

    Between blocks only the keys and values that queries look at are kept. They are made before all
    else, so that the projections of a long prompt are computed twice.
    """
    attention = layer.attention
    sizes, T, dtype = attention.config.sizes, len(residual), np.dtype(attention.dtype)
    most = PIECE_BYTES // dtype.itemsize
    blocks = spans_of(0, T, max(LEAST_TOKENS, most // sizes["F"]))
    queries = max(LEAST_QUERIES, most // (sizes["N"] * T))
    projections = list(takewhile(lambda stage: not stage.sliced, chain))
    sliced = [stage for stage in chain if stage.sliced]
    after = chain[len(projections) + len(sliced) :]

    @lru_cache(maxsize=1)  # a short prompt is one block
    def projected(block: Span) -> Arrays:
        rows = residual[block.start : block.stop].astype(dtype)
        arrays: Arrays = {RESIDUAL: attention.at("stored", jax.device_put(rows))}
        for stage in projections:
            arrays[stage.name] = _value(layer, stage, arrays, block)
        return arrays

    seen = _keys_and_values(blocks, projected, sizes | {"T": T}, dtype) if sliced else {}
    for block in blocks:
        arrays = dict(projected(block))
        yield EMBEDDING, block, arrays[RESIDUAL]
        for stage in projections:
            yield stage, block, arrays[stage.name]
        mixed = []
        for span in spans_of(block.start, block.stop, queries) if sliced else ():
            rows = slice(span.start - block.start, span.stop - block.start)
            local = {**seen, "q_post_rope": np.asarray(arrays["q_post_rope"])[rows]}
            for stage in sliced:
                local[stage.name] = _value(layer, stage, local, span)
                yield stage, span._replace(first=max(span.first, block.first)), local[stage.name]
            if after:
                mixed.append(np.asarray(local["attention"])[span.first - span.start :])
        if after:
            arrays["attention"] = np.concatenate(mixed)
        for stage in after:
            arrays[stage.name] = _value(layer, stage, arrays, block)
            yield stage, block, arrays[stage.name]


def _keys_and_values(
    blocks: Sequence[Span],
    projected: Callable[[Span], Arrays],
    sizes: Mapping[str, int],
    dtype: np.dtype,
) -> Arrays:
    """Return what queries look at, [T, K, H] and [T, K*H], under the names they are computed from.

    Of qkv_bias `Attention.attention` reads just the last K*H channels, v.
    """
    T, K, H = (sizes[axis] for axis in "TKH")
    keys, values = np.empty((T, K, H), dtype), np.empty((T, K * H), dtype)
    for block in blocks:
        arrays = projected(block)
        new = slice(block.first - block.start, None)
        keys[block.first : block.stop] = np.asarray(arrays["k_post_rope"])[new]
        values[block.first : block.stop] = np.asarray(arrays["qkv_bias"])[new, -K * H :]
    return {"k_post_rope": jax.device_put(keys), "qkv_bias": jax.device_put(values)}


def _value(layer: Layer, stage: Stage, arrays: Arrays, span: Span) -> jax.Array:
    position = (span.start,) if stage.positioned else ()
    return layer.method(stage)(*(arrays[name] for name in stage.computed_from), *position)


def head_pieces(
    head: Head,
    residual: np.ndarray,
    wanted: Collection[Stage],
    matrix: Callable[[int], Iterator[tuple[int, np.ndarray]]],
) -> Iterator[Piece]:
    """Compute the wanted stages of the whole model, lm_head for a slice of the vocabulary each.

    Args:
        head: The final norm.
        residual: The stream that leaves the last layer, [T, D].
        wanted: Of `qwenref.stages.HEAD`, or `LAST_LOGITS`.
        matrix: Gives the rows of lm_head's matrix in order, at most so many at a time, each time
            with the number of the first one.
    """
    final_norm, lm_head = HEAD
    T, dtype = len(residual), np.dtype(head.dtype)
    normed = np.empty(residual.shape if lm_head in wanted else (0, 0), dtype)
    tokens = max(LEAST_TOKENS, PIECE_BYTES // (dtype.itemsize * residual.shape[1]))
    values = np.empty((0, 0), dtype)
    for block in spans_of(0, T, tokens):
        rows = residual[block.start : block.stop].astype(dtype)
        values = np.asarray(head.final_norm(jax.device_put(rows)))
        if normed.size:
            normed[block.start : block.stop] = values
        if final_norm in wanted:
            yield Piece(final_norm, block.first, values[block.first - block.start :])
    if lm_head in wanted or LAST_LOGITS in wanted:
        x = jax.device_put(normed if lm_head in wanted else values[-1:])
        most = HEAD_BYTES // (dtype.itemsize * max(len(x), head.config.hidden_size))
        for first, rows in matrix(max(1, most)):
            logits = np.asarray(head.lm_head(x, Matrix(rows)))
            if lm_head in wanted:
                yield Piece(lm_head, 0, logits, channel=first)
            else:
                yield Piece(LAST_LOGITS, T - 1, logits[0], channel=first)


def spans_of(start: int, stop: int, most: int) -> list[Span]:
    """Cut the tokens into spans of at most `most` (at least one), all of them of the same length.

    One shape means one compilation; so the last span begins before the end of the one before it.
    """
    rows = math.ceil((stop - start) / math.ceil((stop - start) / max(1, most)))
    stops = [min(first + rows, stop) for first in range(start, stop, rows)]
    return [Span(end - rows, start + rows * n, end) for n, end in enumerate(stops)]
