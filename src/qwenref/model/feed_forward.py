"""What follows attention in a decoder layer, one pure method per stage, as in `Attention`.

Formulas: Qwen2.5 technical report (arXiv 2412.15115), gated linear units with SiLU (arXiv
2002.05202). The names of the stages are those of `apr trace`.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from qwenref.model.arithmetic import Arithmetic
from qwenref.model.config import Config
from qwenref.model.matrix import Matrix
from qwenref.model.precision import Precision
from qwenref.model.weights import FeedForwardWeights


class FeedForward(Arithmetic):
    """One layer's MLP, its norm, and both sums with the residual stream."""

    def __init__(self, config: Config, weights: FeedForwardWeights, precision: Precision):
        """Put the weights on JAX's default device.

        Args:
            config: Sizes and eps.
            weights: As `qwenref.model.weights.read_feed_forward` returns them.
            precision: What to compute in and what to round.
        """
        super().__init__(config, precision)
        self.norm = nnx.Param(jax.device_put(weights.norm))
        self.gate_proj = Matrix(weights.gate_proj)
        self.up_proj = Matrix(weights.up_proj)
        self.down_proj = Matrix(weights.down_proj)

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        """As in `Arithmetic`."""
        of = {"ffn_gate": self.gate_proj, "ffn_up": self.up_proj, "ffn_out": self.down_proj}
        return {name: (matrix,) for name, matrix in of.items()}

    @jax.jit
    def post_attn_residual(
        self, residual: Float[Array, "T D"], attn_out: Float[Array, "T D"]
    ) -> Float[Array, "T D"]:
        """The stream that enters the layer, plus what attention makes of it."""
        return self._rounded("post_attn_residual", residual + attn_out)

    @jax.jit
    def ffn_norm(self, post_attn_residual: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """RMSNorm with a weight of its own."""
        return self._normed(post_attn_residual, self.norm, ("ffn_normed", "ffn_norm"))

    @jax.jit
    def ffn_gate(self, ffn_norm: Float[Array, "T D"]) -> Float[Array, "T I"]:
        """The projection that goes through the activation; no bias."""
        x = self._rounded("ffn_operands", ffn_norm)
        return self._rounded("ffn_gate", self._projected(x, self.gate_proj, "ffn_operands"))

    @jax.jit
    def ffn_up(self, ffn_norm: Float[Array, "T D"]) -> Float[Array, "T I"]:
        """The projection that does not; no bias."""
        x = self._rounded("ffn_operands", ffn_norm)
        return self._rounded("ffn_up", self._projected(x, self.up_proj, "ffn_operands"))

    @jax.jit
    def ffn_silu(self, ffn_gate: Float[Array, "T I"]) -> Float[Array, "T I"]:
        """The activation: x * sigmoid(x)."""
        return self._rounded("ffn_silu", jax.nn.silu(ffn_gate))

    @jax.jit
    def ffn_swigl(
        self, ffn_silu: Float[Array, "T I"], ffn_up: Float[Array, "T I"]
    ) -> Float[Array, "T I"]:
        """The product of both, element by element."""
        return self._rounded("ffn_swigl", ffn_silu * ffn_up)

    @jax.jit
    def ffn_out(self, ffn_swigl: Float[Array, "T I"]) -> Float[Array, "T D"]:
        """The projection back to the stream's width; no bias. The residual is not added yet."""
        x = self._rounded("down_operands", ffn_swigl)
        return self._rounded("ffn_out", self._projected(x, self.down_proj, "down_operands"))

    @jax.jit
    def post_ffn_residual(
        self, post_attn_residual: Float[Array, "T D"], ffn_out: Float[Array, "T D"]
    ) -> Float[Array, "T D"]:
        """The stream that leaves the layer."""
        return self._rounded("post_ffn_residual", post_attn_residual + ffn_out)
