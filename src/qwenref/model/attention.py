"""Qwen2.5 attention, one pure method per stage of `qwenref.stages.ATTENTION`.

A method takes the arrays that the stage table says its stage is computed from, and nothing else
changes its result but weights, configuration and precision: the same method computes a stage of
our own chain and replays it on another engine's arrays. Each method is compiled by itself, once per
shape, so that a stage has the same bits whichever other stages are asked for.

Formulas: Qwen2.5 technical report (arXiv 2412.15115), RMSNorm (arXiv 1910.07467), rotary embedding
(arXiv 2104.09864) in the half-split form of transformers' Qwen2, grouped-query attention (arXiv
2305.13245). Sizes are those of `qwenref.stages`; a method that takes a slice of the queries has T
of them, and S keys from position 0 on.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qwenref.model.arithmetic import Arithmetic
from qwenref.model.config import Config
from qwenref.model.matrix import EXACT, Matrix
from qwenref.model.precision import Precision
from qwenref.model.weights import AttentionWeights

Position = int | Int[Array, ""] | Int[np.ndarray | Array, "T"]
"""Of the first token given; or of each token, less its index, where some are left out."""


class Attention(Arithmetic):
    """One layer's attention."""

    def __init__(self, config: Config, weights: AttentionWeights, precision: Precision):
        """Put the weights on JAX's default device.

        Args:
            config: Sizes, eps and theta.
            weights: As `qwenref.model.weights.read_attention` returns them.
            precision: What to compute in and what to round.
        """
        super().__init__(config, precision)
        self.norm = nnx.Param(jax.device_put(weights.norm))
        self.q_proj = Matrix(weights.q_proj)
        self.k_proj = Matrix(weights.k_proj)
        self.v_proj = Matrix(weights.v_proj)
        self.o_proj = Matrix(weights.o_proj)
        biases = weights.q_bias, weights.k_bias, weights.v_bias
        self.biases = nnx.data([nnx.Param(jax.device_put(b)) for b in biases if b is not None])

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
        """As in `Arithmetic`."""
        projections = self.q_proj, self.k_proj, self.v_proj
        return {"qkv_matmul": projections, "attn_out": (self.o_proj,)}

    @jax.jit
    def attn_norm(self, residual: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """RMSNorm: x / sqrt(mean(x**2) + eps) * w."""
        return self._normed(residual, self.norm, ("normed", "attn_norm"))

    @jax.jit
    def qkv_matmul(self, attn_norm: Float[Array, "T D"]) -> Float[Array, "T F"]:
        """The three projections before their biases: q, k, v side by side, not rounded yet."""
        x = self._rounded("qkv_operands", attn_norm)
        parts = [self._projected(x, w, "qkv_operands") for w in self.matrices["qkv_matmul"]]
        return jnp.concatenate(parts, axis=-1)

    @jax.jit
    def qkv_bias(self, qkv_matmul: Float[Array, "T F"]) -> Float[Array, "T F"]:
        """The projections with their biases added; unchanged in a checkpoint that has none."""
        if self.biases:
            qkv_matmul += jnp.concatenate([self._widened(bias) for bias in self.biases])
        return self._rounded("qkv_bias", qkv_matmul)

    @jax.jit
    def q_post_rope(
        self, qkv_bias: Float[Array, "T F"], first: Position = 0
    ) -> Float[Array, "T N H"]:
        """The query heads, rotated; `first` is the position of the first token given."""
        N = self.config.num_attention_heads
        rotated = self._rotated(self._heads(qkv_bias)[:, :N], first)
        return self._rounded("q_post_rope", rotated)

    @jax.jit
    def k_post_rope(
        self, qkv_bias: Float[Array, "T F"], first: Position = 0
    ) -> Float[Array, "T K H"]:
        """The key heads, rotated, before they are shared among query heads."""
        N, K = self.config.num_attention_heads, self.config.num_key_value_heads
        rotated = self._rotated(self._heads(qkv_bias)[:, N : N + K], first)
        return self._rounded("k_post_rope", rotated)

    @jax.jit
    def attn_scores(
        self, q_post_rope: Float[Array, "T N H"], k_post_rope: Float[Array, "S K H"]
    ) -> Float[Array, "N T S"]:
        """Scaled dot products q . k / sqrt(H), unmasked; query head n reads key head n // G."""
        T, N, H = q_post_rope.shape
        S, K, _ = k_post_rope.shape
        q = self._rounded("scores_operands", q_post_rope).reshape(T, K, N // K, H)
        k = self._rounded("scores_operands", k_post_rope)
        products = jnp.einsum("TKGH,SKH->KGTS", q, k, precision=EXACT)
        products = self._rounded("products", products.reshape(N, T, S))
        return self._rounded("attn_scores", products * H**-0.5)

    @jax.jit
    def attn_softmax(
        self, attn_scores: Float[Array, "N T S"], first: Position = 0
    ) -> Float[Array, "N T S"]:
        """Softmax over the keys up to each query's position; exactly zero after it.

        `first` is the position of the first query given. Masked scores are never read.
        """
        _, T, S = attn_scores.shape
        visible = jnp.arange(S) <= first + jnp.arange(T)[:, None]
        softmax = jax.nn.softmax(attn_scores, axis=-1, where=visible)
        return self._rounded("attn_softmax", softmax)

    @jax.jit
    def attention(
        self, attn_softmax: Float[Array, "N T S"], qkv_bias: Float[Array, "S F"]
    ) -> Float[Array, "T E"]:
        """Probabilities times values, heads side by side per token.

        Of `qkv_bias` only the last K*H channels, v, are read; the others may be absent.
        """
        N, T, S = attn_softmax.shape
        K = self.config.num_key_value_heads
        v = self._rounded("attention_operands", self._heads(qkv_bias)[:, -K:])
        p = self._rounded("attention_operands", attn_softmax).reshape(K, N // K, T, S)
        mixed = jnp.einsum("KGTS,SKH->TKGH", p, v, precision=EXACT)
        return self._rounded("attention", mixed.reshape(T, -1))

    @jax.jit
    def attn_out(self, attention: Float[Array, "T E"]) -> Float[Array, "T D"]:
        """The output projection; it has no bias. The residual is not added yet."""
        x = self._rounded("out_operands", attention)
        return self._rounded("attn_out", self._projected(x, self.o_proj, "out_operands"))

    def _heads(self, qkv: Float[Array, "T F"]) -> Float[Array, "T J H"]:
        """Return the N query heads, K key heads and K value heads of each token."""
        return qkv.reshape(len(qkv), -1, self.config.head_dim)

    def _rotated(self, x: Float[Array, "T J H"], first: Position) -> Float[Array, "T J H"]:
        """Rotate each pair (i, i + H/2) by position * theta**(-2i/H).

        Frequencies and angles are made in the dtype of `x`, power before reciprocal, as engines
        make them: in float32 an angle is off by about position * 6e-8 rad. The power is taken in
        float64 and rounded, since XLA's float32 one is wrong by an ulp for a third of them.
        """
        T, _, H = x.shape
        exponents = np.arange(0, H, 2, dtype=x.dtype) / x.dtype.type(H)
        powers = np.power(self.config.rope_theta, exponents, dtype=np.float64).astype(x.dtype)
        angles = (first + jnp.arange(T)).astype(x.dtype)[:, None, None] * (1 / powers)
        cos, sin = (self._rounded("cos_sin", f(angles)) for f in (jnp.cos, jnp.sin))
        left, right = jnp.split(x, 2, axis=-1)
        across = jnp.concatenate([-right, left], axis=-1) * jnp.concatenate([sin, sin], axis=-1)
        along = x * jnp.concatenate([cos, cos], axis=-1)
        return self._rounded("rotated", along) + self._rounded("rotated", across)
