"""Which tensors one layer's attention needs, and reading them once: values, check, fingerprint."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from qwenref.errors import QwenrefError
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.tokens import check_tokens

EMBEDDING = "model.embed_tokens.weight"
BIASES = ("q_bias", "k_bias", "v_bias")


class AttentionWeights(NamedTuple):
    """The tensors of one layer's attention, in their stored dtypes.

    A projection is stored as [out, in]; the three biases are all present or all None.
    """

    norm: np.ndarray
    q_proj: np.ndarray
    k_proj: np.ndarray
    v_proj: np.ndarray
    o_proj: np.ndarray
    q_bias: np.ndarray | None
    k_bias: np.ndarray | None
    v_bias: np.ndarray | None


class Tensor(NamedTuple):
    """A tensor as transformers' Qwen2 names it, with the shape that the configuration implies."""

    name: str
    shape: tuple[int, ...]


def attention_tensors(config: Config, layer: int) -> dict[str, Tensor]:
    """Return the tensor behind each field of `AttentionWeights`."""
    sizes = config.sizes
    D, E, kv = sizes["D"], sizes["E"], sizes["K"] * sizes["H"]
    prefix = f"model.layers.{layer}"
    return {
        "norm": Tensor(f"{prefix}.input_layernorm.weight", (D,)),
        "q_proj": Tensor(f"{prefix}.self_attn.q_proj.weight", (E, D)),
        "k_proj": Tensor(f"{prefix}.self_attn.k_proj.weight", (kv, D)),
        "v_proj": Tensor(f"{prefix}.self_attn.v_proj.weight", (kv, D)),
        "o_proj": Tensor(f"{prefix}.self_attn.o_proj.weight", (D, E)),
        "q_bias": Tensor(f"{prefix}.self_attn.q_proj.bias", (E,)),
        "k_bias": Tensor(f"{prefix}.self_attn.k_proj.bias", (kv,)),
        "v_bias": Tensor(f"{prefix}.self_attn.v_proj.bias", (kv,)),
    }


def check_tensors(checkpoint: Checkpoint, layer: int, *, embedding: bool) -> None:
    """Compare names, shapes and dtypes with what the configuration says, before anything is read.

    Args:
        checkpoint: Where the tensors are.
        layer: Whose attention tensors to check.
        embedding: Whether to check the embedding table too.

    Raises:
        QwenrefError: Tensors are missing, or have another shape or dtype; all of them are named.
    """
    tensors = list(_present(checkpoint, layer).values())
    if embedding:
        tensors.append(_embedding_table(checkpoint.config))
    _refuse(checkpoint, checkpoint.problems(dict(tensors)))


def read_attention(checkpoint: Checkpoint, layer: int) -> tuple[AttentionWeights, str]:
    """Read one layer's attention weights, and their fingerprint.

    Raises:
        QwenrefError: As `check_tensors`; or tensors hold NaN or infinities: all of them are named,
            with the count.
    """
    check_tensors(checkpoint, layer, embedding=False)
    fingerprint = Fingerprint()
    problems = []
    values: dict[str, Any] = dict.fromkeys(AttentionWeights._fields)
    for field, (name, shape) in _present(checkpoint, layer).items():
        values[field] = array = _aligned_empty(shape, checkpoint.dtype(name))
        fingerprint.start(name, shape)
        bad = 0
        for row, piece in checkpoint.rows(name, 0, shape[0]):
            array[row : row + len(piece)] = piece
            bad += fingerprint.add(piece)
        if bad:
            problems.append(f"{name} holds {bad} NaN or infinite values")
    _refuse(checkpoint, problems)
    return AttentionWeights(**values), str(fingerprint)


def read_embedding(checkpoint: Checkpoint, tokens: Sequence[int]) -> tuple[np.ndarray, str]:
    """Read the prompt's rows of the embedding table, [T, D] in the stored dtype, and their print.

    Raises:
        QwenrefError: The table is missing or of another shape or dtype than expected, there are no
            tokens or one is outside of it, or its rows hold NaN or infinities.
    """
    name, shape = table = _embedding_table(checkpoint.config)
    _refuse(checkpoint, checkpoint.problems(dict([table])))
    check_tokens(tokens, shape[0])
    rows = np.empty((len(tokens), shape[1]), checkpoint.dtype(name))
    fingerprint = Fingerprint()
    fingerprint.start(name, rows.shape)
    bad = 0
    for position, row in enumerate(checkpoint.rows_at(name, tokens)):
        rows[position] = row
        bad += fingerprint.add(row)
    if bad:
        _refuse(checkpoint, [f"{name} holds {bad} NaN or infinite values in the prompt's rows"])
    return rows, str(fingerprint)


class Fingerprint:
    """BLAKE3 over name, shape and values of tensors, the values widened to little-endian float32.

    Widening makes it independent of how the weights are stored: bf16, f16 and f32 copies of the
    same numbers, in one file or in shards, have one fingerprint.
    """

    def __init__(self):
        self._hash = blake3()

    def start(self, name: str, shape: tuple[int, ...]) -> None:
        """Begin a tensor."""
        self._hash.update(f"{name}{list(shape)}\n".encode())

    def add(self, values: np.ndarray) -> int:
        """Add the next values of the tensor; return how many of them are NaN or infinite."""
        widened = values.astype("<f4", order="C")
        self._hash.update(widened.reshape(-1).view(np.uint8).data)
        return widened.size - int(np.count_nonzero(np.isfinite(widened)))

    def __str__(self) -> str:
        return f"blake3:{self._hash.hexdigest()}"


def _present(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    """Return the layer's tensors, without the biases if the checkpoint has none of the three."""
    tensors = attention_tensors(checkpoint.config, layer)
    if any(checkpoint.holds(tensors[bias].name) for bias in BIASES):
        return tensors
    return {field: tensor for field, tensor in tensors.items() if field not in BIASES}


def _embedding_table(config: Config) -> Tensor:
    return Tensor(EMBEDDING, (config.vocab_size, config.hidden_size))


def _refuse(checkpoint: Checkpoint, problems: list[str]) -> None:
    if problems:
        raise QwenrefError(f"{checkpoint.name}: {'; '.join(problems)}")


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialised array whose data starts on a 64-byte boundary.

    JAX on CPU takes such an array as it is, and copies any other.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)
