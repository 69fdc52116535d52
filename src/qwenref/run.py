"""From a checkpoint and a prompt to stage arrays, in memory."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from qwenref.dumps.layout import layout_named
from qwenref.errors import QwenrefError
from qwenref.model.attention import Attention
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.weights import read_attention, read_embedding
from qwenref.stages import ATTENTION, RESIDUAL, Stage, needed_for

DTYPES = ("float32", "float64")
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
    tokens: Sequence[int],
    *,
    dtype: str = "float32",
    device: str = "auto",
    layout: str = "apr",
) -> Stages:
    """Compute the nine stages of layer 0 for a prompt.

    Args:
        model_dir: A checkpoint directory, or one .safetensors file with config.json beside it.
        tokens: The prompt's token ids, at least one.
        dtype: "float32" or "float64": what to compute in, and the dtype of the arrays returned.
        device: "auto", "cpu" or "gpu".
        layout: "apr" or "hf", see `Stages`.

    Raises:
        QwenrefError: The checkpoint, the tokens or an option cannot be used; one line says why.
    """
    arrange = layout_named(layout)
    if not len(tokens):
        raise QwenrefError("the prompt is empty: it has no tokens")
    checkpoint = Checkpoint(Path(model_dir))
    checkpoint.config.refuse_window(0, len(tokens))
    with computing(dtype, device):
        weights, _ = read_attention(checkpoint, 0)
        rows, _ = read_embedding(checkpoint, tokens)
        chain = chain_values(Attention(checkpoint.config, weights), rows.astype(dtype), ATTENTION)
        arrays = {stage.name: np.stack([*arrange.parts(stage, v)]) for stage, v in chain}
    return Stages(**arrays)


@contextmanager
def computing(dtype: str, device: str) -> Iterator[str]:
    """Set JAX up to compute in `dtype` on `device` within the block; name the device it took.

    Raises:
        QwenrefError: The dtype or the device is unknown, the device is absent, or its memory does
            not suffice.
    """
    if dtype not in DTYPES:
        raise QwenrefError(f"unknown dtype {dtype!r}; dtypes are {', '.join(DTYPES)}")
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


def chain_values(
    attention: Attention, residual: np.ndarray, wanted: Collection[Stage]
) -> Iterator[tuple[Stage, np.ndarray]]:
    """Yield the wanted stages in chain order, each with its array in the axes of its row.

    Only what they need is computed, and an array is dropped as soon as no later stage needs it.

    Args:
        attention: The layer.
        residual: The stream that enters it, [T, D], in the dtype to compute in.
        wanted: Stages of `qwenref.stages.ATTENTION`.
    """
    chain = needed_for(wanted)
    values: dict[str, jax.Array] = {RESIDUAL: jax.device_put(residual)}
    for done, stage in enumerate(chain, start=1):
        value = getattr(attention, stage.name)(*(values[name] for name in stage.computed_from))
        values[stage.name] = value
        needed = {name for later in chain[done:] for name in later.computed_from}
        values = {name: array for name, array in values.items() if name in needed}
        if stage in wanted:
            yield stage, np.asarray(value)
