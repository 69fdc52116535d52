"""Which values an engine rounds, and to what: the named rounding points of a model.

Arithmetic is float32 (float64 for the truth) throughout, and a rounded value stays in that dtype:
so all precisions that round share their compiled programs, and no compiler can elide a pair of
casts, as XLA does with bfloat16 on CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
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
    "float32": Format(23, 0.0, (2 - 2.0**-23) * 2.0**127),
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
    "post_attn_residual",
    "ffn_normed",  # as normed
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_silu",
    "ffn_swigl",
    "ffn_out",
    "post_ffn_residual",
    "final_normed",  # as normed
    "final_norm",
    "lm_head",
)
"""Where transformers' eager Qwen2 rounds, in the order of computation (modeling_qwen2.py, 5.23)."""

OPERANDS = (
    "qkv_operands",
    "scores_operands",
    "attention_operands",
    "out_operands",
    "ffn_operands",  # of gate and up
    "down_operands",
    "head_operands",
)
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


@jax.jit
def rounded(x: Float[Array, "..."], to: Rounding) -> Float[Array, "..."]:
    """Round to nearest, ties to even, in one step from the dtype of `x`, and keep that dtype.

    Written in lax, and a program of its own, since it is used so often: with jax.numpy it takes
    three times as long to trace.

    Args:
        x: Float32 or float64; NaN and infinities stay.
        to: The format, for that dtype; traced, so that every format shares one compiled program.
    """
    dropped, quantum, smallest, largest = (lax.broadcast(field, x.shape) for field in to)
    one = lax.full_like(dropped, 1)
    step = lax.shift_left(one, dropped)  # one unit of the narrow format, in bits of the wide one
    half = lax.shift_right_logical(step, one)
    some = lax.min(half, one)  # 0 if nothing is dropped
    bits = lax.bitcast_convert_type(x, dropped.dtype)
    # a tie goes up, to the even neighbour, from an odd one only
    odd = lax.bitwise_and(lax.shift_right_logical(bits, dropped), some)
    up = lax.add(bits, lax.add(lax.sub(half, some), odd))
    kept = lax.bitwise_and(up, lax.bitwise_not(lax.sub(step, one)))
    normal = lax.bitcast_convert_type(kept, x.dtype)
    steps = lax.round(lax.div(x, quantum), lax.RoundingMethod.TO_NEAREST_EVEN)
    result = lax.select(lax.lt(lax.abs(x), smallest), lax.mul(steps, quantum), normal)
    infinities = lax.full_like(x, -np.inf), lax.full_like(x, np.inf)
    infinite = lax.select(lax.lt(x, lax.full_like(x, 0)), *infinities)
    result = lax.select(lax.gt(lax.abs(result), largest), infinite, result)
    return lax.select(lax.ne(x, x), x, result)  # NaN stays


def one_rounding(narrow: Format) -> float:
    """Return the relative error of one rounding to a format, rms, of values of all magnitudes.

    It is uniform within half a unit in the last place, 2**-mantissa / m of a value whose mantissa m
    is distributed as 1/m in [1, 2): the mean of 1/m**2 is 3 / (8 ln 2).
    """
    return 2.0**-narrow.mantissa / 12**0.5 * (3 / 8 / np.log(2)) ** 0.5


def nearest(values: np.ndarray, narrow: Format) -> np.ndarray:
    """Round float64 values to a format as `rounded` does, but in NumPy, which compiles nothing."""
    stored, word = WORDS["float64"]
    if narrow.mantissa == stored:
        return values.copy()
    dropped, one = word(stored - narrow.mantissa), word(1)
    step = one << dropped
    bits = values.view(word)
    up = bits >> dropped
    up &= one
    up += bits
    up += (step >> one) - one  # a tie goes up, to the even neighbour, from an odd one only
    up &= ~(step - one)
    rounded = up.view(values.dtype)
    sizes = np.abs(values)
    if narrow.smallest:
        small = sizes < narrow.smallest
        quantum = narrow.smallest * 2.0**-narrow.mantissa
        rounded[small] = np.rint(values[small] / quantum) * quantum
    large = ~(sizes <= narrow.largest)  # NaN too
    if large.any():
        whole, found = values[large], rounded[large]
        found = np.where(np.abs(found) > narrow.largest, np.copysign(np.inf, whole), found)
        rounded[large] = np.where(np.isnan(whole), whole, found)
    return rounded
