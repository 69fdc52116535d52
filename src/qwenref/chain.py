"""Computing the stages of one layer piece by piece: of a long prompt, little is held at a time."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import numpy as np

from qwenref.model.attention import Attention
from qwenref.stages import EMBEDDING, RESIDUAL, Stage, needed_for

PIECE_BYTES = 3 << 20
"""Most bytes of a piece of [T, F] or of [N, T, S]. docs/benchmarks.md has what others cost."""

LEAST_TOKENS, LEAST_QUERIES = 512, 8
"""Tokens of a piece, if there are as many, even if these take more bytes: for each piece the
projections are widened, and keys and values put in another order. With 7B's sizes and 8192 tokens
attn_out takes two thirds of the time that pieces of the size above do, says docs/benchmarks.md.
"""

Arrays = dict[str, Any]
"""By the names in `Stage.computed_from`."""


class Piece(NamedTuple):
    """Some tokens of a stage: those from position `first` on, in the axes of `stage.axes`."""

    stage: Stage
    first: int
    values: np.ndarray


class Span(NamedTuple):
    """The tokens from position `start` to `stop`; those before `first` are not new."""

    start: int
    first: int
    stop: int


Computed = tuple[Stage, Span, Any]
"""A stage and its array for the tokens of a span."""


def chain_pieces(
    attention: Attention, residual: np.ndarray, wanted: Collection[Stage]
) -> Iterator[Piece]:
    """Compute the wanted stages, and no others than they need; yield them piece by piece.

    How a prompt is cut into pieces does not depend on which stages are wanted, so that neither do
    the values.

    Args:
        attention: The layer.
        residual: The stream that enters it, [T, D], in a dtype that widens to the layer's.
        wanted: Stages of `qwenref.stages.ALL`; `EMBEDDING` is `residual` itself.
    """
    for stage, span, array in _begun_ahead(_computed(attention, residual, needed_for(wanted))):
        if stage in wanted:
            if stage.name == "qkv_matmul":
                array = attention.at("qkv_matmul", array)
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


def _computed(
    attention: Attention, residual: np.ndarray, chain: Sequence[Stage]
) -> Iterator[Computed]:
    """Compute a chain for one block of tokens after the other.

    Between blocks only the keys and values that queries look at are kept. They are made before all
    else, so that the projections of a long prompt are computed twice.
    """
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
            arrays[stage.name] = _value(attention, stage, arrays, block)
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
                local[stage.name] = _value(attention, stage, local, span)
                yield stage, span._replace(first=max(span.first, block.first)), local[stage.name]
            if after:
                mixed.append(np.asarray(local["attention"])[span.first - span.start :])
        if after:
            arrays["attention"] = np.concatenate(mixed)
        for stage in after:
            arrays[stage.name] = _value(attention, stage, arrays, block)
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


def _value(attention: Attention, stage: Stage, arrays: Arrays, span: Span) -> jax.Array:
    position = (span.start,) if stage.positioned else ()
    return getattr(attention, stage.name)(
        *(arrays[name] for name in stage.computed_from), *position
    )


def spans_of(start: int, stop: int, most: int) -> list[Span]:
    """Cut the tokens into spans of at most `most` (at least one), all of them of the same length.

    One shape means one compilation; so the last span begins before the end of the one before it.
    """
    rows = math.ceil((stop - start) / math.ceil((stop - start) / max(1, most)))
    stops = [min(first + rows, stop) for first in range(start, stop, rows)]
    return [Span(end - rows, start + rows * n, end) for n, end in enumerate(stops)]
