"""Which tensors the stages need, and reading them once: values, check, fingerprint."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from blake3 import blake3

from qwenref.ahead import ahead
from qwenref.errors import QwenrefError
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.tokens import check_tokens

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
BIASES = ("q_bias", "k_bias", "v_bias")

BLOCK = 1 << 16
"""Values that are widened at a time: 256 KiB, which stay in the cache until they are hashed."""


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


class FeedForwardWeights(NamedTuple):
    """The tensors of one layer's MLP, in their stored dtypes; a projection is [out, in]."""

    norm: np.ndarray
    gate_proj: np.ndarray
    up_proj: np.ndarray
    down_proj: np.ndarray


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


def feed_forward_tensors(config: Config, layer: int) -> dict[str, Tensor]:
    """Return the tensor behind each field of `FeedForwardWeights`."""
    D, inner = config.sizes["D"], config.sizes["I"]
    prefix = f"model.layers.{layer}"
    return {
        "norm": Tensor(f"{prefix}.post_attention_layernorm.weight", (D,)),
        "gate_proj": Tensor(f"{prefix}.mlp.gate_proj.weight", (inner, D)),
        "up_proj": Tensor(f"{prefix}.mlp.up_proj.weight", (inner, D)),
        "down_proj": Tensor(f"{prefix}.mlp.down_proj.weight", (D, inner)),
    }


def embedding_table(config: Config) -> Tensor:
    """Return the tensor whose rows are the tokens'."""
    return Tensor(EMBEDDING, (config.vocab_size, config.hidden_size))


def final_norm(config: Config) -> Tensor:
    """Return the weight of the norm after the last layer."""
    return Tensor("model.norm.weight", (config.hidden_size,))


def head_matrix(config: Config) -> Tensor:
    """Return the matrix of lm_head: with tied embeddings their table, as in transformers."""
    tied = config.tie_word_embeddings
    return embedding_table(config)._replace(name=EMBEDDING if tied else HEAD)


def check_tensors(checkpoint: Checkpoint, tensors: Iterable[Tensor]) -> None:
    """Compare names, shapes and dtypes with what the configuration says, before anything is read.

    Raises:
        QwenrefError: Tensors are missing, or have another shape or dtype; all of them are named.
    """
    _refuse(checkpoint, checkpoint.problems(dict(tensors)))


def read_attention(
    checkpoint: Checkpoint, layer: int, over: AttentionWeights | None = None
) -> tuple[AttentionWeights, str]:
    """Read one layer's attention weights, and their fingerprint.

    Args:
        checkpoint: Where they are.
        layer: Of which layer.
        over: Those of a layer that is done with: its arrays are written over where they fit.

    Raises:
        QwenrefError: As `check_tensors`; or tensors hold NaN or infinities: all of them are named,
            with the count.
    """
    values, fingerprint = _read(checkpoint, present_attention_tensors(checkpoint, layer), over)
    absent: dict[str, Any] = dict.fromkeys(BIASES)
    return AttentionWeights(**absent | values), fingerprint


def read_feed_forward(
    checkpoint: Checkpoint, layer: int, over: FeedForwardWeights | None = None
) -> tuple[FeedForwardWeights, str]:
    """Read one layer's MLP weights, and their fingerprint, as `read_attention` does."""
    values, fingerprint = _read(checkpoint, feed_forward_tensors(checkpoint.config, layer), over)
    return FeedForwardWeights(**values), fingerprint


def read_final_norm(checkpoint: Checkpoint) -> tuple[np.ndarray, str]:
    """Read the weight of the norm after the last layer, [D]; raises as `read_attention`."""
    values, fingerprint = _read(checkpoint, {"norm": final_norm(checkpoint.config)})
    return values["norm"], fingerprint


def _read(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    over: AttentionWeights | FeedForwardWeights | None = None,
) -> tuple[dict[str, Any], str]:
    check_tensors(checkpoint, tensors.values())
    values = {}
    for field, (name, shape) in tensors.items():
        dtype, old = checkpoint.dtype(name), getattr(over, field, None)
        fits = old is not None and (old.shape, old.dtype) == (shape, dtype)
        values[field] = old if fits else _aligned_empty(shape, dtype)
    fingerprint = Fingerprint()
    bad = dict.fromkeys(tensors, 0)
    for field, row, piece in ahead(_pieces(checkpoint, tensors)):
        if row == 0:
            fingerprint.start(*tensors[field])
        values[field][row : row + len(piece)] = piece
        bad[field] += fingerprint.add(piece)
    _refuse(
        checkpoint,
        [
            f"{tensors[field].name} holds {number} NaN or infinite values"
            for field, number in bad.items()
            if number
        ],
    )
    return values, str(fingerprint)


def _pieces(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield some rows of a tensor at a time, with its field and the number of the first row."""
    for field, (name, shape) in tensors.items():
        for row, piece in checkpoint.rows(name, 0, shape[0]):
            yield field, row, piece


def read_embedding(checkpoint: Checkpoint, tokens: Sequence[int]) -> tuple[np.ndarray, str]:
    """Read the prompt's rows of the embedding table, [T, D] in the stored dtype, and their print.

    Raises:
        QwenrefError: The table is missing or of another shape or dtype than expected, there are no
            tokens or one is outside of it, or its rows hold NaN or infinities.
    """
    name, shape = table = embedding_table(checkpoint.config)
    check_tensors(checkpoint, [table])
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


class HeadMatrix:
    """The matrix of lm_head, read once, by slices of its rows, and never held whole.

    Attributes:
        sample: Some of the rows read so far, evenly spaced.
    """

    def __init__(self, checkpoint: Checkpoint, sampled: int):
        """Read nothing yet.

        Args:
            checkpoint: Where it is.
            sampled: About how many rows to keep.

        Raises:
            QwenrefError: As `check_tensors`.
        """
        self._checkpoint = checkpoint
        self._tensor = head_matrix(checkpoint.config)
        check_tensors(checkpoint, [self._tensor])
        self._fingerprint = Fingerprint()
        self._fingerprint.start(*self._tensor)
        self._stride = max(1, self._tensor.shape[0] // sampled)
        self.sample: list[np.ndarray] = []

    def slices(self, most: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield at most so many rows at a time, [O, D], with the number of the first of them.

        Raises:
            QwenrefError: They hold NaN or infinities.
        """
        name, (V, D) = self._tensor
        size = math.ceil(V / math.ceil(V / most))
        for start in range(0, V, size):
            part = _aligned_empty((min(size, V - start), D), self._checkpoint.dtype(name))
            bad = 0
            for row, piece in self._checkpoint.rows(name, start, start + len(part)):
                part[row - start : row - start + len(piece)] = piece
                bad += self._fingerprint.add(piece)
            if bad:
                _refuse(self._checkpoint, [f"{name} holds {bad} NaN or infinite values"])
            self.sample.append(part[-start % self._stride :: self._stride].copy())
            yield start, part

    @property
    def fingerprint(self) -> str:
        """That of the rows read so far."""
        return str(self._fingerprint)


class Fingerprint:
    """BLAKE3 over name, shape and values of tensors, the values widened to little-endian float32.

    Widening makes it independent of how the weights are stored: bf16, f16 and f32 copies of the
    same numbers, in one file or in shards, have one fingerprint.
    """

    def __init__(self):
        self._hash = blake3()
        self._widened = np.empty(BLOCK, "<f4")

    def start(self, name: str, shape: tuple[int, ...]) -> None:
        """Begin a tensor."""
        self._hash.update(f"{name}{list(shape)}\n".encode())

    def add(self, values: np.ndarray) -> int:
        """Add the next values of the tensor; return how many of them are NaN or infinite."""
        flat, finite = values.reshape(-1), 0
        for start in range(0, len(flat), BLOCK):
            part = flat[start : start + BLOCK]
            widened = self._widened[: len(part)]
            np.copyto(widened, part)
            self._hash.update(widened.view(np.uint8).data)
            finite += int(np.count_nonzero(np.isfinite(widened)))
        return len(flat) - finite

    def __str__(self) -> str:
        return f"blake3:{self._hash.hexdigest()}"


def present_attention_tensors(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    """Return the layer's tensors, without the biases if the checkpoint has none of the three."""
    tensors = attention_tensors(checkpoint.config, layer)
    if any(checkpoint.holds(tensors[bias].name) for bias in BIASES):
        return tensors
    return {field: tensor for field, tensor in tensors.items() if field not in BIASES}


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
