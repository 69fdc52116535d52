"""From a checkpoint and a prompt to stage arrays, in memory."""

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import jax
import numpy as np

from qwenref.chain import Layer, layer_pieces
from qwenref.dumps.layout import layout_named
from qwenref.errors import QwenrefError
from qwenref.model.attention import Attention
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.precision import PRECISIONS, Precision
from qwenref.model.weights import (
    check_tensors,
    embedding_table,
    present_attention_tensors,
    read_attention,
    read_embedding,
)
from qwenref.stages import ATTENTION

DEVICES = ("auto", "cpu", "gpu")


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
        dtype: "float32"; "float64", the truth; "bfloat16" or "float16", rounded where transformers
            rounds. The arrays returned are float64 for "float64", else float32.
        device: "auto", "cpu" or "gpu".
        layout: "apr" or "hf", see `Stages`.

    Raises:
        QwenrefError: The checkpoint, the tokens or an option cannot be used; one line says why.
    """
    arrange = layout_named(layout)
    tokens = whole_numbers(tokens)
    checkpoint = Checkpoint(Path(model_dir))
    checkpoint.config.refuse_window(0, len(tokens))
    config = checkpoint.config
    check_tensors(
        checkpoint,
        [*present_attention_tensors(checkpoint, 0).values(), embedding_table(config)],
    )
    with computing(dtype, device) as (precision, _):
        weights, _ = read_attention(checkpoint, 0)
        rows, _ = read_embedding(checkpoint, tokens)
        layer = Layer(Attention(config, weights, precision))
        sizes = config.sizes | {"T": len(rows), "S": len(rows)}
        shapes = {s.name: [sizes[axis] for axis in arrange.axes(s)] for s in ATTENTION}
        arrays = Stages(
            **{name: np.empty(shape, precision.arithmetic) for name, shape in shapes.items()}
        )
        for stage, first, values, _ in layer_pieces(layer, rows, ATTENTION):
            flat = getattr(arrays, stage.name).reshape(-1)
            for start, part in arrange.runs(stage, values, first, sizes):
                flat[start : start + part.size] = part.reshape(-1)
    return arrays


def whole_numbers(tokens: Iterable[SupportsIndex]) -> list[int]:
    """Return token ids as Python's whole numbers.

    Raises:
        QwenrefError: They are none.
    """
    try:
        return [operator.index(token) for token in tokens]
    except TypeError as error:
        raise QwenrefError(f"tokens must be a sequence of token ids: {error}") from error


@contextmanager
def computing(dtype: str, device: str) -> Iterator[tuple[Precision, str]]:
    """Set JAX up to compute within the block; give the precision, and name the device it took.

    Args:
        dtype: Of `PRECISIONS`.
        device: "auto", "cpu" or "gpu".

    Raises:
        QwenrefError: The dtype or the device is unknown, the device is absent, or its memory does
            not suffice.
    """
    if dtype not in PRECISIONS:
        raise QwenrefError(f"unknown dtype {dtype!r}; dtypes are {', '.join(PRECISIONS)}")
    precision = PRECISIONS[dtype]
    if device not in DEVICES:
        raise QwenrefError(f"unknown device {device!r}; devices are {', '.join(DEVICES)}")
    try:
        chosen = jax.devices(None if device == "auto" else device)[0]
    except (RuntimeError, AssertionError) as error:  # AssertionError: JAX_PLATFORMS=tpu without one
        wanted = "device" if device == "auto" else device
        found = str(error) or f"none of the platform {jax.config.values['jax_platforms']}"
        raise QwenrefError(
            f"no {wanted} here; JAX finds: {found}; use --device cpu, or install the extra 'cuda' "
            "for a GPU"
        ) from error
    try:
        with (
            jax.default_device(chosen),
            jax.enable_x64(precision.arithmetic == "float64"),
            jax.numpy_rank_promotion("allow"),  # whatever the caller chose for his own code
            jax.transfer_guard("allow"),
        ):
            yield precision, "cpu" if chosen.platform == "cpu" else chosen.device_kind
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise QwenrefError(
                f"out of memory on {chosen.platform}: use fewer tokens, or fewer --stages"
            ) from error
        raise
