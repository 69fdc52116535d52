"""What the modules of a model share: its precision, and the products and norms made in it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from qwenref.model.config import Config
from qwenref.model.precision import POINTS, Precision, Rounding, rounded

EXACT = jax.lax.Precision.HIGHEST
"""Without it a GPU may multiply float32 matrices as TF32, with 10-bit mantissas."""


WIDENED = 24 << 20
"""Bytes of a matrix that are widened at a time. The allocator keeps what is smaller than 32 MiB and
takes what is larger from the system each time: all of 7B takes 34 s with 64 MiB, 30 to 32 with 24.
"""


class Arithmetic(nnx.Module):
    """A module whose arrays all have the dtype of the precision's arithmetic.

    Weights keep their stored dtype (bf16, f16 or f32) and are widened, exactly, and rounded if the
    precision says so, where they are used: of a large matrix some rows at a time.
    """

    def __init__(self, config: Config, precision: Precision):
        """Put what to round on JAX's default device.

        Args:
            config: Sizes, eps and theta.
            precision: What to compute in and what to round.
        """
        self.config = config
        self.dtype = precision.arithmetic
        roundings = jax.device_put(precision.roundings()) if precision.formats else None
        self.roundings = nnx.data(roundings)

    @property
    def matrices(self) -> dict[str, tuple[nnx.Param, ...]]:
        """What stages multiply with, by their names: matrices [O, I], side by side."""
        return {}

    def at(self, point: str, x: Array) -> Array:
        """Round at a point that no stage method contains.

        Those are "stored", for the stream that enters the layer, and "qkv_matmul", for what a dump
        shows of that stage.
        """
        return x if self.roundings is None else self._compiled_rounding(x, point)

    @partial(jax.jit, static_argnames="point")
    def _compiled_rounding(self, x: Array, point: str) -> Array:
        return self._rounded(point, x)

    def _normed(
        self, residual: Float[Array, "T D"], weight: nnx.Param, points: tuple[str, str]
    ) -> Float[Array, "T D"]:
        """RMSNorm (arXiv 1910.07467), rounded before and after the weight."""
        mean_square = jnp.mean(jnp.square(residual), axis=-1, keepdims=True)
        normed = residual * jax.lax.rsqrt(mean_square + self.config.rms_norm_eps)
        normed = self._rounded(points[0], normed)
        return self._rounded(points[1], normed * self._widened(weight))

    def _projected(
        self, x: Float[Array, "T I"], weight: nnx.Param | Array, operands: str
    ) -> Float[Array, "T O"]:
        """Multiply with a matrix, some of its rows at a time: widened, it is never there whole."""
        stored = weight[...]
        length, width = stored.shape
        rows = max(1, WIDENED // (width * np.dtype(self.dtype).itemsize))
        parts = []
        for start in range(0, length, rows):
            matrix = self._rounded(operands, self._widened(stored[start : start + rows]))
            parts.append(jnp.einsum("TI,OI->TO", x, matrix, precision=EXACT))
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def _widened(self, weight: nnx.Param | Array) -> Array:
        return self._rounded("stored", weight[...].astype(self.dtype))

    def _rounded(self, point: str, x: Array) -> Array:
        if self.roundings is None:  # plain arithmetic pays nothing for it
            return x
        here = POINTS.index(point)
        return rounded(x, Rounding(*(column[here] for column in self.roundings)))
