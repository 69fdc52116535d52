"""Which tensors the stages need, and reading them once: values, check, fingerprint."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
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

BLOCK = 1 << 18
"""Values that are hashed and looked at at a time: they stay in the cache in between."""

SIGN, INFINITY = 0x8000, 0x7F80
"""In the upper half of float32, and in bfloat16: the bit of the sign, and those of the exponent."""

READ_AHEAD = 16
"""Pieces that may be read before they are hashed: a disk gives them in bursts. They are parts of
the arrays that they are read into, so that none of them takes memory of its own.
"""


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
    for field, row, piece in ahead(_pieces(checkpoint, tensors, values), READ_AHEAD):
        if row == 0:
            fingerprint.start(*tensors[field])
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
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], values: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """Read tensors; yield some rows at a time, with the field and the number of the first row."""
    for field, into in values.items():
        for row, piece in checkpoint.read(tensors[field].name, into):
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
    rows = checkpoint.rows_at(name, tokens)
    fingerprint = Fingerprint()
    fingerprint.start(name, rows.shape)
    if bad := fingerprint.add(rows):
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

        Each is read over the last but one: an array holds until the one after the next is asked
        for, as `ahead` does with one item at a time.

        Raises:
            QwenrefError: They hold NaN or infinities.
        """
        name, (V, D) = self._tensor
        size = math.ceil(V / math.ceil(V / most))
        buffers = [_aligned_empty((size, D), self._checkpoint.dtype(name)) for _ in range(2)]
        for number, start in enumerate(range(0, V, size)):
            part = buffers[number % 2][: V - start]
            bad = 0
            for _, piece in ahead(self._checkpoint.read(name, part, start), READ_AHEAD):
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
    """BLAKE3 over name, shape and values of tensors, the values as halves of float32.

    Of each tensor there come, as bytes, its name with its shape (``a.weight[2, 3]``) and a line
    feed; the upper 16 bits of all its values, little-endian; and, if the lower ones are not all 0,
    ``lower``, a line feed, and the 32 bytes of these ones' hash.

    That makes it independent of how the weights are stored: bf16, f16 and f32 copies of the same
    numbers, in one file or in shards, have one fingerprint. Of bfloat16, the dtype of the published
    checkpoints, the upper halves are what is stored; nothing has to be widened for it.
    """

    def __init__(self):
        self._hash, self._lower, self._any_lower = blake3(), blake3(), False
        self._widened = np.empty(BLOCK, "<f4")

    def start(self, name: str, shape: tuple[int, ...]) -> None:
        """Begin a tensor."""
        self._hash, self._lower, self._any_lower = self._ended(), blake3(), False
        self._hash.update(f"{name}{list(shape)}\n".encode())

    def add(self, values: np.ndarray) -> int:
        """Add the next values of the tensor; return how many of them are NaN or infinite."""
        flat = values.reshape(-1)
        blocks = (flat[start : start + BLOCK] for start in range(0, len(flat), BLOCK))
        return sum(self._add(block) for block in blocks)

    def _add(self, values: np.ndarray) -> int:
        if values.dtype == ml_dtypes.bfloat16:
            upper = values.view("<u2")
        else:
            widened = self._widened[: len(values)]
            np.copyto(widened, values)
            lower, upper = np.ascontiguousarray(widened.view("<u2").reshape(-1, 2).T)
            self._lower.update(lower.view(np.uint8).data)
            self._any_lower |= bool(lower.any())
        self._hash.update(upper.view(np.uint8).data)
        return _nonfinite(upper)

    def _ended(self) -> blake3:
        """Return the hash with the last tensor."""
        ended = self._hash.copy()
        return ended.update(b"lower\n" + self._lower.digest()) if self._any_lower else ended

    def __str__(self) -> str:
        return f"blake3-halves:{self._ended().hexdigest()}"


def _nonfinite(upper: np.ndarray) -> int:
    """Count NaN and infinities by the upper halves of float32: all bits of the exponent are 1."""
    if upper.view(np.int16).max() < INFINITY and upper.max() < SIGN | INFINITY:
        return 0  # two passes without a temporary array, over what hardly ever holds any
    return int(np.count_nonzero(upper & INFINITY == INFINITY))


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
