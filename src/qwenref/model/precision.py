"""Which values an engine rounds, and to what: the named rounding points of attention.

Arithmetic is float32 (float64 for the truth) throughout, and a rounded value stays in that dtype:
so all precisions that round share their compiled programs, and no compiler can elide a pair of
casts, as XLA does with bfloat16 on CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


class Format(NamedTuple):
    """A floating-point format narrower than the arithmetic.

    Attributes:
        mantissa: Stored bits of the mantissa.
        smallest: The smallest normal number; 0 if numbers below it are not worth rounding rightly
            (XLA flushes to zero what is not a normal float32).
        largest: The largest finite number; what rounds to more is infinite.
    """

    mantissa: int
    smallest: float
    largest: float


FORMATS = {
    "exact": Format(52, 0.0, np.inf),
    "float16": Format(10, 2.0**-14, 65504.0),
    "bfloat16": Format(7, 0.0, np.inf),
}
"""IEEE 754 binary16, and the upper half of binary32. An exact value is not rounded at all."""

POINTS = (
    "stored",  # weights and embedding rows
    "normed",  # x / sqrt(mean(x**2) + eps), before the weight
    "attn_norm",
    "qkv_matmul",  # in dumps alone: the bias is added before the one rounding
    "qkv_bias",
    "cos_sin",
    "rotated",  # each of the two products whose sum is the rotated value
    "q_post_rope",
    "k_post_rope",
    "products",  # q . k, before the scale
    "attn_scores",
    "attn_softmax",
    "attention",
    "attn_out",
)
"""Where transformers' eager Qwen2 rounds, in the order of computation (modeling_qwen2.py, 5.23)."""


@dataclass(frozen=True)
class Precision:
    """What is computed in which dtype, and which of its values are rounded.

    Attributes:
        arithmetic: "float32" or "float64": of all products, sums and functions, and of the arrays.
        formats: The name in `FORMATS` for each rounding point; "exact" for those not named.
    """

    arithmetic: str
    formats: Mapping[str, str]

    @property
    def codes(self) -> np.ndarray:
        """The formats as indices into `FORMATS`, int32 [points], for `rounded`."""
        names = list(FORMATS)
        return np.array([names.index(self.formats.get(p, "exact")) for p in POINTS], np.int32)


PRECISIONS = {
    "float32": Precision("float32", {}),
    "float64": Precision("float64", {}),
    "bfloat16": Precision("float32", dict.fromkeys(POINTS, "bfloat16")),
    "float16": Precision("float32", dict.fromkeys(POINTS, "float16")),
}
"""By the names that ``--dtype`` takes."""


def rounded(x: Float[Array, "..."], code: Int[Array, ""]) -> Float[Array, "..."]:
    """Round to nearest, ties to even, in one step from the dtype of `x`, and keep that dtype.

    Args:
        x: Float32 or float64; NaN and infinities stay.
        code: Index into `FORMATS`; traced, so that every format shares one compiled program.
    """
    mantissa, smallest, largest = (
        jnp.asarray(np.array(column, dtype))[code]
        for column, dtype in zip(
            zip(*FORMATS.values(), strict=True), (np.int32, x.dtype, x.dtype), strict=True
        )
    )
    stored, word = (52, jnp.uint64) if x.dtype == jnp.float64 else (23, jnp.uint32)
    dropped = jnp.maximum(stored - mantissa, 0).astype(word)
    one = jnp.ones((), word)
    bits = lax.bitcast_convert_type(x, word)
    odd = (bits >> dropped) & one  # a tie goes up to an even neighbour from an odd one only
    half = jnp.where(dropped == 0, 0, ((one << dropped) >> one) - one + odd)
    normal = lax.bitcast_convert_type((bits + half) & ~((one << dropped) - one), x.dtype)
    quantum = smallest * 2.0 ** -mantissa.astype(x.dtype)
    subnormal = lax.round(x / quantum, lax.RoundingMethod.TO_NEAREST_EVEN) * quantum
    result = jnp.where(jnp.abs(x) < smallest, subnormal, normal)
    result = jnp.where(jnp.abs(result) > largest, jnp.copysign(jnp.inf, x), result)
    return jnp.where(jnp.isfinite(x), result, x)
