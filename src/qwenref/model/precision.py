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
from jaxtyping import Array, Float


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
    "bfloat16": Format(7, 0.0, (2 - 2.0**-7) * 2.0**127),
    "tf32": Format(10, 0.0, (2 - 2.0**-10) * 2.0**127),
}
"""IEEE 754 binary16; binary32 with a shorter mantissa. An exact value is not rounded at all."""

WORDS = {"float32": (23, np.uint32), "float64": (52, np.uint64)}
"""Of each arithmetic: stored bits of the mantissa, and the integer of that width."""

RESULTS = (
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

OPERANDS = ("qkv_operands", "scores_operands", "attention_operands", "out_operands")
"""Both operands of a product: what llama.cpp rounds to the type of its matrices and KV cache, and a
GPU to TF32, while results stay float32.
"""

POINTS = RESULTS + OPERANDS


class Rounding(NamedTuple):
    """What `rounded` needs of a format (scalars) or of several (vectors), for one arithmetic.

    Attributes:
        dropped: How many bits of the mantissa go.
        quantum: The smallest number of the format, where that matters.
        smallest: As in `Format`.
        largest: As in `Format`.
    """

    dropped: Array | np.ndarray
    quantum: Array | np.ndarray
    smallest: Array | np.ndarray
    largest: Array | np.ndarray


@dataclass(frozen=True)
class Precision:
    """What is computed in which dtype, and which of its values are rounded.

    Each point has a format of its own, because engines differ in where they round: llama.cpp has
    bfloat16 matrices beside a float16 cache.

    Attributes:
        arithmetic: "float32" or "float64": of all products, sums and functions, and of the arrays.
        formats: The name in `FORMATS` for each rounding point; "exact" for those not named.
    """

    arithmetic: str
    formats: Mapping[str, str]

    def roundings(self) -> Rounding:
        """Return how to round at each of `POINTS`, arrays [points]."""
        formats = [FORMATS[self.formats.get(point, "exact")] for point in POINTS]
        stored, word = WORDS[self.arithmetic]
        return Rounding(
            np.array([max(stored - f.mantissa, 0) for f in formats], word),
            np.array([f.smallest * 2.0**-f.mantissa or 1.0 for f in formats], self.arithmetic),
            np.array([f.smallest for f in formats], self.arithmetic),
            np.array([f.largest for f in formats], self.arithmetic),
        )


PRECISIONS = {
    "float32": Precision("float32", {}),
    "float64": Precision("float64", {}),
    "bfloat16": Precision("float32", dict.fromkeys(RESULTS, "bfloat16")),
    "float16": Precision("float32", dict.fromkeys(RESULTS, "float16")),
}
"""By the names that ``--dtype`` takes."""


def rounded(x: Float[Array, "..."], to: Rounding) -> Float[Array, "..."]:
    """Round to nearest, ties to even, in one step from the dtype of `x`, and keep that dtype.

    Args:
        x: Float32 or float64; NaN and infinities stay.
        to: The format, for that dtype; traced, so that every format shares one compiled program.
    """
    one = jnp.ones((), to.dropped.dtype)
    bits = lax.bitcast_convert_type(x, one.dtype)
    half = (one << to.dropped) >> one
    some = jnp.minimum(half, one)  # 0 if nothing is dropped
    odd = (bits >> to.dropped) & some  # a tie goes up, to the even neighbour, from an odd one only
    kept = (bits + (half - some + odd)) & ~((one << to.dropped) - one)
    normal = lax.bitcast_convert_type(kept, x.dtype)
    subnormal = lax.round(x / to.quantum, lax.RoundingMethod.TO_NEAREST_EVEN) * to.quantum
    result = jnp.where(jnp.abs(x) < to.smallest, subnormal, normal)
    result = jnp.where(jnp.abs(result) > to.largest, jnp.copysign(jnp.inf, result), result)
    return jnp.where(jnp.isnan(x), x, result)
