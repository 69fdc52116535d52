"""What the modules of a model share: its precision, and the products and norms made in it."""

from copy import copy
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qwenref.model.config import Config
from qwenref.model.matrix import Matrix
from qwenref.model.precision import POINTS, Precision, Rounding, rounded


class Arithmetic(nnx.Module):
    """A module whose arrays all have the dtype of the precision's arithmetic.

    Weights keep their stored dtype (bf16, f16 or f32) and are widened, exactly, and rounded if the
    precision says so, where they are used.
    """

    def __init__(self, config: Config, precision: Precision):
        """Put what to round on JAX's default device.

        Args:
            config: Sizes, eps and theta.
            precision: What to compute in and what to round.
        """
        self.config = config
        self._compute_in(precision)

    def _compute_in(self, precision: Precision) -> None:
        self.dtype = precision.arithmetic
        roundings = jax.device_put(precision.roundings()) if precision.formats else None
        self.roundings = nnx.data(roundings)

    def rounding_as(self, precision: Precision) -> "Arithmetic":
        """Return the same module, with the same weights, in another precision."""
        other = copy(self)
        other._compute_in(precision)
        return other

    @property
    def matrices(self) -> dict[str, tuple[Matrix, ...]]:
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
        self, x: Float[Array, "T I"], matrix: Matrix, operands: str
    ) -> Float[Array, "T O"]:
        return matrix.times(x, lambda rows: self._rounded(operands, self._widened(rows)))

    def _widened(self, weight: nnx.Param | Array) -> Array:
        return self._rounded("stored", weight[...].astype(self.dtype))

    def _rounded(self, point: str, x: Array) -> Array:
        if self.roundings is None:  # plain arithmetic pays nothing for it
            return x
        here = POINTS.index(point)
        return rounded(x, Rounding(*(column[here] for column in self.roundings)))
