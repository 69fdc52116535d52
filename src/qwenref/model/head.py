"""What follows the last layer: the norm, and the logits of a slice of the vocabulary."""

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qwenref.model.arithmetic import Arithmetic
from qwenref.model.config import Config
from qwenref.model.matrix import Matrix
from qwenref.model.precision import Precision


class Head(Arithmetic):
    """The final norm and lm_head, whose matrix is never held whole."""

    def __init__(self, config: Config, norm: np.ndarray, precision: Precision):
        """Put the norm's weight on JAX's default device.

        Args:
            config: Sizes and eps.
            norm: Its weight, [D].
            precision: What to compute in and what to round.
        """
        super().__init__(config, precision)
        self.norm = nnx.Param(jax.device_put(norm))

    @jax.jit
    def final_norm(self, residual: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """RMSNorm of the stream that leaves the last layer."""
        return self._normed(residual, self.norm, ("final_normed", "final_norm"))

    @jax.jit
    def lm_head(self, final_norm: Float[Array, "T D"], rows: Matrix) -> Float[Array, "T O"]:
        """The logits of some entries of the vocabulary, whose rows of the matrix are given."""
        x = self._rounded("head_operands", final_norm)
        return self._rounded("lm_head", self._projected(x, rows, "head_operands"))


class SampledHead(Head):
    """The final norm, and the logits of some entries of the vocabulary, whose rows are kept."""

    def __init__(self, config: Config, norm: np.ndarray, rows: np.ndarray, precision: Precision):
        """Put the weights on JAX's default device.

        Args:
            config: Sizes and eps.
            norm: The norm's weight, [D].
            rows: Of lm_head's matrix, [O, D].
            precision: What to compute in and what to round.
        """
        super().__init__(config, norm, precision)
        self.rows = Matrix(rows)

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        """As in `Arithmetic`."""
        return {"lm_head": (self.rows,)}

    @jax.jit
    def sampled_lm_head(self, final_norm: Float[Array, "T D"]) -> Float[Array, "T O"]:
        """The logits of those entries."""
        return self.lm_head(final_norm, self.rows)
