"""Qwen2.5 attention, one pure method per stage of `qwenref.stages.ATTENTION`.

A method takes the arrays that the stage table says its stage is computed from, and nothing else
changes its result but the weights and the configuration: the same method computes a stage of our
own chain and replays it on another engine's arrays. Each method is compiled by itself, once per
shape, so that a stage has the same bits whichever other stages are asked for.

Formulas: Qwen2.5 technical report (arXiv 2412.15115), RMSNorm (arXiv 1910.07467), rotary embedding
(arXiv 2104.09864) in the half-split form of transformers' Qwen2, grouped-query attention (arXiv
2305.13245). Sizes are those of `qwenref.stages`; a method that takes a slice of the queries has T
of them, and S keys from position 0 on.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from numpy.typing import DTypeLike

from qwenref.model.config import Config
from qwenref.model.weights import AttentionWeights

EXACT = jax.lax.Precision.HIGHEST
"""Without it a GPU may multiply float32 matrices as TF32, with 10-bit mantissas."""

Position = int | Int[Array, ""]


class Attention(nnx.Module):
    """One layer's attention, computing in the dtype of the arrays that its methods are given.

    Weights keep their stored dtype (bf16, f16 or f32) and are widened, exactly, where they are
    used: one matrix at a time exists in the wider dtype.
    """

    def __init__(self, config: Config, weights: AttentionWeights):
        """Put the weights on JAX's default device.

        Args:
            config: Sizes, eps and theta.
            weights: As `qwenref.model.weights.read_attention` returns them.
        """
        self.config = config
        self.norm = nnx.Param(jax.device_put(weights.norm))
        self.q_proj = nnx.Param(jax.device_put(weights.q_proj))
        self.k_proj = nnx.Param(jax.device_put(weights.k_proj))
        self.v_proj = nnx.Param(jax.device_put(weights.v_proj))
        self.o_proj = nnx.Param(jax.device_put(weights.o_proj))
        biases = weights.q_bias, weights.k_bias, weights.v_bias
        self.biases = nnx.data([nnx.Param(jax.device_put(b)) for b in biases if b is not None])

    @jax.jit
    def attn_norm(self, residual: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """RMSNorm: x / sqrt(mean(x**2) + eps) * w."""
        mean_square = jnp.mean(jnp.square(residual), axis=-1, keepdims=True)
        normed = residual * jax.lax.rsqrt(mean_square + self.config.rms_norm_eps)
        return normed * _widened(self.norm, residual.dtype)

    @jax.jit
    def qkv_matmul(self, attn_norm: Float[Array, "T D"]) -> Float[Array, "T F"]:
        """The three projections before their biases: q, k, v side by side."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return jnp.concatenate([_projected(attn_norm, w) for w in projections], axis=-1)

    @jax.jit
    def qkv_bias(self, qkv_matmul: Float[Array, "T F"]) -> Float[Array, "T F"]:
        """The projections with their biases added; unchanged in a checkpoint that has none."""
        if not self.biases:
            return qkv_matmul
        return qkv_matmul + jnp.concatenate([_widened(b, qkv_matmul.dtype) for b in self.biases])

    @jax.jit
    def q_post_rope(
        self, qkv_bias: Float[Array, "T F"], first: Position = 0
    ) -> Float[Array, "T N H"]:
        """The query heads, rotated; `first` is the position of the first token given."""
        N = self.config.num_attention_heads
        return self._rotated(self._heads(qkv_bias)[:, :N], first)

    @jax.jit
    def k_post_rope(
        self, qkv_bias: Float[Array, "T F"], first: Position = 0
    ) -> Float[Array, "T K H"]:
        """The key heads, rotated, before they are shared among query heads."""
        N, K = self.config.num_attention_heads, self.config.num_key_value_heads
        return self._rotated(self._heads(qkv_bias)[:, N : N + K], first)

    @jax.jit
    def attn_scores(
        self,
        q_post_rope: Float[Array, "T N H"],
        k_post_rope: Float[Array, "S K H"],
        first: Position = 0,
    ) -> Float[Array, "N T S"]:
        """Scaled dot products q . k / sqrt(H), unmasked; query head n reads key head n // G.

        They do not depend on `first`, the position of the first query given.
        """
        T, N, H = q_post_rope.shape
        S, K, _ = k_post_rope.shape
        q = q_post_rope.reshape(T, K, N // K, H)
        products = jnp.einsum("TKGH,SKH->KGTS", q, k_post_rope, precision=EXACT)
        return products.reshape(N, T, S) * H**-0.5

    @jax.jit
    def attn_softmax(
        self, attn_scores: Float[Array, "N T S"], first: Position = 0
    ) -> Float[Array, "N T S"]:
        """Softmax over the keys up to each query's position; exactly zero after it.

        `first` is the position of the first query given. Masked scores are never read.
        """
        _, T, S = attn_scores.shape
        visible = jnp.arange(S) <= first + jnp.arange(T)[:, None]
        return jax.nn.softmax(attn_scores, axis=-1, where=visible)

    @jax.jit
    def attention(
        self,
        attn_softmax: Float[Array, "N T S"],
        qkv_bias: Float[Array, "S F"],
        first: Position = 0,
    ) -> Float[Array, "T E"]:
        """Probabilities times values, heads side by side per token; `first` changes nothing.

        Of `qkv_bias` only the last K*H channels, v, are read; the others may be absent.
        """
        N, T, S = attn_softmax.shape
        K = self.config.num_key_value_heads
        v = self._heads(qkv_bias)[:, -K:]
        p = attn_softmax.reshape(K, N // K, T, S)
        mixed = jnp.einsum("KGTS,SKH->TKGH", p, v, precision=EXACT)
        return mixed.reshape(T, -1)

    @jax.jit
    def attn_out(self, attention: Float[Array, "T E"]) -> Float[Array, "T D"]:
        """The output projection; it has no bias. The residual is not added yet."""
        return _projected(attention, self.o_proj)

    def _heads(self, qkv: Float[Array, "T F"]) -> Float[Array, "T J H"]:
        """Return the N query heads, K key heads and K value heads of each token."""
        return qkv.reshape(len(qkv), -1, self.config.head_dim)

    def _rotated(self, x: Float[Array, "T J H"], first: Position) -> Float[Array, "T J H"]:
        """Rotate each pair (i, i + H/2) by position * theta**(-2i/H).

        Frequencies and angles are made in the dtype of `x`, power before reciprocal, as engines
        make them: in float32 an angle is off by about position * 6e-8 rad.
        """
        T, _, H = x.shape
        exponents = jnp.arange(0, H, 2, dtype=x.dtype) / H
        frequencies = 1 / self.config.rope_theta**exponents
        angles = (first + jnp.arange(T)).astype(x.dtype)[:, None, None] * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        left, right = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _widened(weight: nnx.Param, dtype: DTypeLike) -> Array:
    return weight[...].astype(dtype)


def _projected(x: Float[Array, "T I"], weight: nnx.Param) -> Float[Array, "T O"]:
    return jnp.einsum("TI,OI->TO", x, _widened(weight, x.dtype), precision=EXACT)
