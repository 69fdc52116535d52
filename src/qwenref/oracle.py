"""From a checkpoint and a prompt to stage arrays, in memory."""

import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import jax
import numpy as np

from qwenref.dumps.layout import layout_named
from qwenref.errors import QwenrefError
from qwenref.model.attention import Attention
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.weights import check_tensors, read_attention, read_embedding
from qwenref.stages import ATTENTION, RESIDUAL, Stage, needed_for

DTYPES = ("float32", "float64")
DEVICES = ("auto", "cpu", "gpu")

SLICE_BYTES = 1 << 22
"""Most bytes of a slice of [N, T, S]. Larger ones are no faster and cost several times their size:
0.5B, T=2048, on CPU has peaks of 372 MB with 4 MiB, 430 with 8, 454 with 16, 1023 with one slice.
"""


class Stages(NamedTuple):
    """The nine stages of one attention layer; axes for the layout "apr" (sizes: qwenref.stages).

    In layout "hf", q_post_rope is [N, T, H], k_post_rope is [K, T, H], and attn_scores is not
    masked.
    """

    attn_norm: np.ndarray
    """[T, D]"""
    qkv_matmul: np.ndarray
    """[T, F]: q, k, v side by side, before the bias"""
    qkv_bias: np.ndarray
    """[T, F]: with the bias"""
    q_post_rope: np.ndarray
    """[T, N, H]"""
    k_post_rope: np.ndarray
    """[T, K, H]"""
    attn_scores: np.ndarray
    """[N, T, T]: query, key; scaled by 1/sqrt(H); +0.0 where the key comes after the query"""
    attn_softmax: np.ndarray
    """[N, T, T]"""
    attention: np.ndarray
    """[T, E]: heads side by side"""
    attn_out: np.ndarray
    """[T, D]: after the output projection, before the residual is added"""


def run(
    model_dir: str | Path,
    tokens: Iterable[SupportsIndex],
    *,
    dtype: str = "float32",
    device: str = "auto",
    layout: str = "apr",
) -> Stages:
    """Compute the nine stages of layer 0 for a prompt.

    Args:
        model_dir: A checkpoint directory, or one .safetensors file with config.json beside it.
        tokens: The prompt's token ids, at least one; a list, or a one-dimensional array.
        dtype: "float32" or "float64": what to compute in, and the dtype of the arrays returned.
        device: "auto", "cpu" or "gpu".
        layout: "apr" or "hf", see `Stages`.

    Raises:
        QwenrefError: The checkpoint, the tokens or an option cannot be used; one line says why.
    """
    arrange = layout_named(layout)
    tokens = _whole_numbers(tokens)
    checkpoint = Checkpoint(Path(model_dir))
    checkpoint.config.refuse_window(0, len(tokens))
    check_tensors(checkpoint, 0, embedding=True)
    with computing(dtype, device):
        weights, _ = read_attention(checkpoint, 0)
        rows, _ = read_embedding(checkpoint, tokens)
        attention = Attention(checkpoint.config, weights)
        sizes = checkpoint.config.sizes | {"T": len(rows), "S": len(rows)}
        shapes = {s.name: [sizes[axis] for axis in arrange.axes(s)] for s in ATTENTION}
        arrays = Stages(**{name: np.empty(shape, dtype) for name, shape in shapes.items()})
        for stage, first, values in chain_pieces(attention, rows.astype(dtype), ATTENTION):
            flat = getattr(arrays, stage.name).reshape(-1)
            for start, run in arrange.runs(stage, values, first, len(rows)):
                flat[start : start + run.size] = run.reshape(-1)
    return arrays


def _whole_numbers(tokens: Iterable[SupportsIndex]) -> list[int]:
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        raise QwenrefError(f"tokens must be a sequence of token ids: {error}") from error


@contextmanager
def computing(dtype: str, device: str) -> Iterator[str]:
    """Set JAX up to compute in `dtype` on `device` within the block; name the device it took.

    Raises:
        QwenrefError: The dtype or the device is unknown, the device is absent, or its memory does
            not suffice.
    """
    if dtype not in DTYPES:
        raise QwenrefError(f"cannot compute in dtype {dtype!r}, only in {' or '.join(DTYPES)}")
    if device not in DEVICES:
        raise QwenrefError(f"unknown device {device!r}; devices are {', '.join(DEVICES)}")
    try:
        chosen = jax.devices(None if device == "auto" else device)[0]
    except RuntimeError as error:
        raise QwenrefError(
            f"no {device} here: JAX finds {jax.default_backend()} only; use --device auto, or "
            "install the extra 'cuda' for a GPU"
        ) from error
    try:
        with jax.default_device(chosen), jax.enable_x64(dtype == "float64"):
            yield chosen.platform if chosen.platform == "cpu" else chosen.device_kind
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise QwenrefError(
                f"out of memory on {chosen.platform}: use fewer tokens, or fewer --stages"
            ) from error
        raise


class Piece(NamedTuple):
    """Some tokens of a stage: those from position `first` on, in the axes of `stage.axes`."""

    stage: Stage
    first: int
    values: np.ndarray


def chain_pieces(
    attention: Attention, residual: np.ndarray, wanted: Collection[Stage]
) -> Iterator[Piece]:
    """Compute the wanted stages in chain order and yield them, piece by piece.

    Only what they need is computed, and an array is dropped as soon as no later stage needs it.
    The stages that hold a value for each pair of tokens come in slices of the queries, so that
    none of them exists whole; the others come in one piece.

    Args:
        attention: The layer.
        residual: The stream that enters it, [T, D], in the dtype to compute in.
        wanted: Stages of `qwenref.stages.ATTENTION`.
    """
    chain = needed_for(wanted)
    sliced = [stage for stage in chain if stage.sliced]
    values: dict[str, Any] = {RESIDUAL: jax.device_put(residual)}
    for done, stage in enumerate(chain, start=1):
        if not stage.sliced:
            values[stage.name] = _value(attention, stage, values)
            if stage in wanted:
                yield Piece(stage, 0, np.asarray(values[stage.name]))
        elif stage is sliced[0]:
            mixed = []
            for piece in _slices(attention, sliced, values):
                if piece.stage.name == "attention":  # the only one that is needed whole
                    mixed.append(piece.values)
                if piece.stage in wanted:
                    yield piece
            values["attention"] = np.concatenate(mixed) if mixed else None
        needed = {name for later in chain[done:] for name in later.computed_from}
        values = {name: array for name, array in values.items() if name in needed}


def _slices(
    attention: Attention, stages: Sequence[Stage], values: Mapping[str, Any]
) -> Iterator[Piece]:
    """Compute the sliced stages, all of them for one slice of the queries after the other."""
    q = np.asarray(values["q_post_rope"])
    T, N, _ = q.shape
    most = max(1, SLICE_BYTES // (N * T * q.itemsize))
    rows = math.ceil(T / math.ceil(T / most))
    for first in range(0, T, rows):
        start = min(first, T - rows)  # the last slice has the shape of the others: one compile
        local = {**values, "q_post_rope": q[start : start + rows]}
        for stage in stages:
            local[stage.name] = _value(attention, stage, local, start)
            array = np.asarray(local[stage.name])
            yield Piece(stage, first, array[_rows_from(first - start, stage)])


def _value(attention: Attention, stage: Stage, values: Mapping[str, Any], *first: int) -> jax.Array:
    return getattr(attention, stage.name)(*(values[name] for name in stage.computed_from), *first)


def _rows_from(row: int, stage: Stage) -> tuple[slice, ...]:
    return *(slice(None) for _ in range(stage.axes.index("T"))), slice(row, None)
