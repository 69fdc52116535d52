"""Matrices as they are stored, of which some rows are widened at a time."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

EXACT = jax.lax.Precision.HIGHEST
"""Without it a GPU may multiply float32 matrices as TF32, with 10-bit mantissas."""

WIDENED = 8 << 20
"""Bytes of a matrix that are widened at a time: docs/benchmarks.md has what others cost."""

Prepare = Callable[[Array], Array]


class Matrix(nnx.Module):
    """A matrix [O, I] on JAX's default device, in its stored dtype.

    What has 16 bits is kept as bits: to take rows of a bfloat16 array, XLA on CPU widens all of it.
    """

    def __init__(self, values: np.ndarray):
        """Put it there; aligned to 64 bytes, it is not copied on CPU."""
        self.dtype = values.dtype
        bits = values.view(np.uint16) if values.itemsize == 2 else values
        self.bits = nnx.Param(jax.device_put(bits))

    def times(self, x: Float[Array, "T I"], prepare: Prepare) -> Float[Array, "T O"]:
        """Multiply x with it, transposed.

        Args:
            x: Some tokens.
            prepare: What to do with its rows before, [.., I]: what makes them of x's dtype.
        """
        length, width = self.bits.shape
        number = math.ceil(length * width * x.itemsize / WIDENED)
        rows = math.ceil(length / number)
        if number == 1:
            return self._product(x, prepare, 0, rows)

        def with_rows(number: Array, y: Array) -> Array:
            start = jnp.minimum(number * rows, length - rows)  # the last ones overlap
            product = self._product(x, prepare, start, rows)
            return jax.lax.dynamic_update_slice_in_dim(y, product, start, axis=1)

        return jax.lax.fori_loop(0, number, with_rows, jnp.empty((len(x), length), x.dtype))

    def _product(self, x: Array, prepare: Prepare, start: int | Array, rows: int) -> Array:
        bits = jax.lax.dynamic_slice_in_dim(self.bits[...], start, rows)
        narrow = jax.lax.bitcast_convert_type(bits, self.dtype)
        return jnp.einsum("TI,OI->TO", x, prepare(narrow), precision=EXACT)
