"""What a replay is of: a decoder layer, or what follows the last one. Its stages and weights."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qwenref.chain import HEAD_BYTES
from qwenref.forward import SAMPLED
from qwenref.model.arithmetic import Arithmetic
from qwenref.model.attention import Attention
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.feed_forward import FeedForward
from qwenref.model.head import Head, SampledHead
from qwenref.model.matrix import Matrix
from qwenref.model.precision import PRECISIONS, Precision
from qwenref.model.weights import AttentionWeights, FeedForwardWeights, check_tensors, head_matrix
from qwenref.stages import HEAD, LAYER, RESIDUAL, Stage

OF_ATTENTION = ("attn_norm", "qkv_matmul", "qkv_bias", "attn_out")
OF_FEED_FORWARD = ("ffn_norm", "ffn_gate", "ffn_up", "ffn_out")
"""Stages that take weights, besides those of the whole model."""

FLOAT64 = PRECISIONS["float64"]

CHAIN = (RESIDUAL, *(stage.name for stage in LAYER))
"""What enters a layer, and its stages."""

HEAD_CHAIN = (RESIDUAL, *(stage.name for stage in HEAD))
"""What leaves the last layer, and the stages of the whole model."""


class LayerPart:
    """A decoder layer.

    Attributes:
        config: Sizes, eps and theta.
        layer: Its number.
        chain: Its stages, in order, after what enters it.
        weighted: Those of them that take weights, if the weights are there.
        dtypes: Those of the weights.
        stored: That of its first norm's weight; empty without.
    """

    chain = CHAIN

    def __init__(
        self,
        config: Config,
        layer: int,
        attention: AttentionWeights | None,
        feed_forward: FeedForwardWeights | None = None,
    ):
        """Put the weights on JAX's default device, once for all roundings.

        Args:
            config: Sizes, eps and theta.
            layer: Its number.
            attention: Weights; None if there are none.
            feed_forward: Weights; None if there are none.
        """
        self.config, self.layer = config, layer
        self.weighted = (*OF_ATTENTION * bool(attention), *OF_FEED_FORWARD * bool(feed_forward))
        none = np.zeros(0, np.float32)
        self._modules: list[Arithmetic] = [
            Attention(config, attention or AttentionWeights(*[none] * 8), FLOAT64),
            FeedForward(config, feed_forward or FeedForwardWeights(*[none] * 4), FLOAT64),
        ]
        held = [*(attention or ()), *(feed_forward or ())]
        self.dtypes = {np.dtype(x.dtype).name for x in held if x is not None}
        self.stored = "" if attention is None else np.dtype(attention.norm.dtype).name

    def modules(self, precision: Precision) -> list[Arithmetic]:
        """Return what computes its stages."""
        return [module.rounding_as(precision) for module in self._modules]

    def sampled(self, precision: Precision) -> list[Arithmetic]:
        """Return what computes its stages where not all values are looked at: all are."""
        return self.modules(precision)

    def compute(self, modules: Sequence[Any], stage: Stage, *given: Any) -> np.ndarray:
        """Return what a stage makes of its inputs, and of the position if it takes that."""
        (method,) = (getattr(of, stage.name) for of in modules if hasattr(of, stage.name))
        return np.asarray(method(*given))


class HeadPart:
    """The final norm and lm_head, whose matrix is never held whole; attributes as of a layer."""

    chain, layer = HEAD_CHAIN, None

    def __init__(self, config: Config, norm: np.ndarray | None, checkpoint: Checkpoint | None):
        """Read a sample of the matrix.

        Args:
            config: Sizes and eps.
            norm: The norm's weight, [D]; None without weights.
            checkpoint: Where the matrix is, if lm_head is to be computed.

        Raises:
            QwenrefError: The matrix is missing, or not as the configuration says.
        """
        self.config, self._checkpoint = config, checkpoint
        self.weighted = *["final_norm"] * (norm is not None), *["lm_head"] * bool(checkpoint)
        weight = np.zeros(0, np.float32) if norm is None else norm
        sample = np.zeros((1, config.hidden_size), weight.dtype)
        self.stored = "" if norm is None else np.dtype(norm.dtype).name
        self.dtypes = {self.stored} - {""}
        if checkpoint is not None:
            self._tensor = head_matrix(config)
            check_tensors(checkpoint, [self._tensor])
            chosen = range(0, config.vocab_size, max(1, config.vocab_size // SAMPLED))
            sample = checkpoint.rows_at(self._tensor.name, chosen)
            self.dtypes |= {np.dtype(sample.dtype).name}
        self._head = Head(config, weight, FLOAT64)
        self._sampled = SampledHead(config, weight, sample, FLOAT64)

    def modules(self, precision: Precision) -> list[Arithmetic]:
        """Return what computes its stages."""
        return [self._head.rounding_as(precision)]

    def sampled(self, precision: Precision) -> list[Arithmetic]:
        """Return what computes them for some entries of the vocabulary."""
        return [self._sampled.rounding_as(precision)]

    def compute(self, modules: Sequence[Any], stage: Stage, *given: Any) -> np.ndarray:
        """Return what a stage makes of its input."""
        (head,) = modules
        if stage.name != "lm_head":
            return np.asarray(getattr(head, stage.name)(*given))
        if isinstance(head, SampledHead):
            return np.asarray(head.sampled_lm_head(*given))
        parts = [np.asarray(head.lm_head(*given, rows)) for rows in self._slices(head.dtype)]
        return np.concatenate(parts, axis=-1)

    def _slices(self, dtype: Any) -> Iterator[Matrix]:
        """Yield the matrix, some rows at a time."""
        checkpoint = self._checkpoint
        if checkpoint is None:
            raise ValueError("without a checkpoint lm_head cannot be computed: see `weighted`")
        name, (V, D) = self._tensor
        size = max(1, HEAD_BYTES // (np.dtype(dtype).itemsize * D))
        for start in range(0, V, size):
            rows = np.empty((min(size, V - start), D), checkpoint.dtype(name))
            deque(checkpoint.read(name, rows, start), maxlen=0)
            yield Matrix(rows)


Part = LayerPart | HeadPart
