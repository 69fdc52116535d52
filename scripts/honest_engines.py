"""Many honest Qwen2.5 attention layers: equal in what they compute, different in how they round.

    engine = HonestEngine(config, weights, draw_habits(rng, "float32"))
    dump = engine.chain(residual)

A correct engine chooses the order of each sum, fused or separate rounding, how it makes angles and
exponentials, and where it rounds. Each choice is a field of `Habits`; a random combination of them
is an engine that nobody may call wrong. How far such engines lie apart is what a judge of dumps
must forgive. NumPy alone computes here, so that nothing is shared with the oracle but the table of
stages and the formats of its inputs. Sizes are those of `qwenref.stages`.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

import ml_dtypes
import numpy as np
from jaxtyping import Bool, Float

from qwenref.model.config import Config
from qwenref.model.weights import AttentionWeights
from qwenref.stages import ATTENTION

Array = np.ndarray
F32 = np.float32
LOG2E = F32(math.log2(math.e))

Order = Literal[
    "sequential",
    "reversed",
    "lanes4",  # SIMD: every fourth term has a running sum, and those are added up
    "lanes8",
    "lanes16",
    "split2",  # contiguous halves, as threads or a GPU's split-K share them
    "split4",
    "blocks32",  # contiguous parts of that many terms
    "blocks64",
    "blocks256",
    "pairwise",
    "blas",
]


@dataclass(frozen=True)
class Habits:
    """What one engine does where a correct engine has the choice; the defaults are the plainest."""

    # what results are rounded to, or with "-operands" both operands of each matrix product
    precision: Literal[
        "float32", "float16", "bfloat16", "float16-operands", "bfloat16-operands", "tf32-operands"
    ] = "float32"
    # where results are: wherever eager frameworks do; after each stage's fused kernel; or as fused,
    # but scores and softmax stay float32, and only their dumps are rounded
    points: Literal["eager", "fused", "flash"] = "eager"
    norm_order: Order = "sequential"
    norm_fma: bool = False  # squares are added unrounded
    norm_mean: Literal["divide", "multiply"] = "divide"  # by D, or by 1/D
    norm_root: Literal["multiply", "divide"] = "multiply"  # by 1/sqrt, or by sqrt
    norm_weight: Literal["last", "first"] = "last"  # (x * r) * w, or x * (r * w)
    projections_order: Order = "sequential"  # of all four
    fma: bool = False  # products are added unrounded, in all matrix products
    bias_starts_sum: bool = False  # shows in a chain alone
    rope_frequencies: Literal["power64", "power32", "float64", "iterated", "exponential"] = (
        "power64"
    )
    rope_functions: Literal["float32", "float64"] = "float32"  # what cos and sin are computed in
    rope_fma: bool = False  # the second of two products is added unrounded
    scores_order: Order = "sequential"
    scores_scale: Literal["after", "before", "divide"] = "after"  # products or queries * H**-0.5
    softmax_order: Order = "sequential"  # unless online
    softmax_exponential: Literal["exp", "exp2", "exp2_scaled", "exp2_scaled_fma", "online"] = "exp"
    softmax_reciprocal: bool = False  # times the reciprocal of the sum
    attention_order: Order = "sequential"
    divided_last: bool = False  # exponentials mix values, then the sum divides: in a chain alone


CHOICES = {name: get_args(kind) or (False, True) for name, kind in get_type_hints(Habits).items()}
"""All values of each habit, the default first."""

RESULTS = {stage.name for stage in ATTENTION} - {"qkv_matmul"} | {"stored"}
ROUNDED = {
    "eager": RESULTS | {"normed", "cos_sin", "rotated", "products"},
    "fused": RESULTS,
    "flash": RESULTS - {"attn_scores", "attn_softmax"},
}
"""The points of docs/numerics.md at which an engine with that habit rounds what it goes on with."""

ROUNDED_IN_DUMPS = {
    "eager": {"qkv_matmul"},
    "fused": set[str](),
    "flash": {"attn_scores", "attn_softmax"},
}
"""The stages of which only the dump is rounded."""

NARROW = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

quiet = np.errstate(over="ignore", invalid="ignore")
"""Float16 overflows in honest engines too; infinities and NaN are results like others."""


def draw_habits(rng: np.random.Generator, precision: str) -> Habits:
    """Return a random combination of habits in that precision."""
    drawn: dict[str, Any] = {
        name: values[rng.integers(len(values))] for name, values in CHOICES.items()
    }
    return Habits(**{**drawn, "precision": precision})


class HonestEngine:
    """One engine's attention layer, float32 arrays in and out.

    The stage methods are those of `qwenref.model.attention.Attention`, and like those return what
    the engine's next stage reads; `dumped` says what a file shows of it.
    """

    def __init__(self, config: Config, weights: AttentionWeights, habits: Habits):
        """Widen the weights and round them where the engine stores them narrower."""
        self.config = config
        self.habits = habits
        w = weights
        self.norm = self._stored(w.norm)
        self.qkv = np.concatenate([self._stored(m) for m in (w.q_proj, w.k_proj, w.v_proj)])
        self.out = self._stored(w.o_proj)
        biases = [self._stored(b) for b in (w.q_bias, w.k_bias, w.v_bias) if b is not None]
        self.bias = np.concatenate(biases) if biases else 0

    def chain(self, residual: Float[Array, "T D"]) -> dict[str, Array]:
        """Return the nine stages as this engine dumps them, each computed from its own previous."""
        habits = self.habits
        norm = self.attn_norm(self._stored(residual))
        products = self.qkv_matmul(norm)
        qkv = self.qkv_bias(products)
        if habits.bias_starts_sum:
            qkv = self._at("qkv_bias", self._projected(norm, self.qkv, self.bias))
        q, k = self.q_post_rope(qkv), self.k_post_rope(qkv)
        scores = self.attn_scores(q, k)
        softmax = self.attn_softmax(scores)
        attention = self.attention(softmax, qkv)
        if habits.divided_last:
            exponentials, total = self._exponentials(scores, 0)
            mixed = self._mixed(self._at("attn_softmax", exponentials), qkv)
            attention = self._at("attention", _side_by_side(self._over(mixed, total)))
        out = self.attn_out(attention)
        arrays = (norm, products, qkv, q, k, scores, softmax, attention, out)
        names = (stage.name for stage in ATTENTION)
        return {name: self.dumped(name, x) for name, x in zip(names, arrays, strict=True)}

    def dumped(self, stage: str, x: Array) -> Array:
        """Return what a dump shows of a stage's result."""
        only_there = stage in ROUNDED_IN_DUMPS[self.habits.points]
        return rounded(x, self.habits.precision) if only_there else x

    def attn_norm(self, residual: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """RMSNorm; the first of its two products is the point "normed", whatever it holds."""
        habits, D = self.habits, self.config.hidden_size
        rows, columns = residual[:, None, :], residual[:, :, None]
        squares = product(rows, columns, habits.norm_order, fma=habits.norm_fma)[:, 0]
        mean = squares / D if habits.norm_mean == "divide" else squares * (1 / D)
        root = np.sqrt(mean + self.config.rms_norm_eps)
        first, last = residual, self.norm
        if habits.norm_weight == "first":
            first, last = last, first
        normed = first / root if habits.norm_root == "divide" else first * (1 / root)
        return self._at("attn_norm", self._at("normed", normed) * last)

    def qkv_matmul(self, attn_norm: Float[Array, "T D"]) -> Float[Array, "T F"]:
        """The three projections without their biases, never rounded."""
        return self._projected(attn_norm, self.qkv)

    def qkv_bias(self, qkv_matmul: Float[Array, "T F"]) -> Float[Array, "T F"]:
        """The biases added to finished sums."""
        return self._at("qkv_bias", qkv_matmul + self.bias)

    def q_post_rope(self, qkv_bias: Float[Array, "T F"], first: int = 0) -> Float[Array, "T N H"]:
        """The query heads, rotated; `first` is the position of the first token given."""
        N = self.config.num_attention_heads
        return self._at("q_post_rope", self._rotated(self._heads(qkv_bias)[:, :N], first))

    def k_post_rope(self, qkv_bias: Float[Array, "T F"], first: int = 0) -> Float[Array, "T K H"]:
        """The key heads, rotated."""
        N, K = self.config.num_attention_heads, self.config.num_key_value_heads
        return self._at("k_post_rope", self._rotated(self._heads(qkv_bias)[:, N : N + K], first))

    def attn_scores(
        self, q_post_rope: Float[Array, "T N H"], k_post_rope: Float[Array, "S K H"]
    ) -> Float[Array, "N T S"]:
        """Scaled dot products, unmasked; scaled queries round where products would."""
        T, N, H = q_post_rope.shape
        S, K, _ = k_post_rope.shape
        scale = self.habits.scores_scale
        q = self._at("products", q_post_rope * H**-0.5) if scale == "before" else q_post_rope
        q = q.transpose(1, 0, 2).reshape(K, -1, H)
        scores = self._times(q, k_post_rope.transpose(1, 2, 0), self.habits.scores_order)
        if scale != "before":
            scores = self._at("products", scores)
            scores = scores / math.sqrt(H) if scale == "divide" else scores * H**-0.5
        return self._at("attn_scores", scores.reshape(N, T, S))

    def attn_softmax(
        self, attn_scores: Float[Array, "N T S"], first: int = 0
    ) -> Float[Array, "N T S"]:
        """Softmax over the keys up to each query's position; exactly zero after it."""
        softmax = self._over(*self._exponentials(attn_scores, first))
        softmax = np.where(_visible(attn_scores, first), softmax, F32(0))  # even beside NaN
        return self._at("attn_softmax", softmax)

    def attention(
        self, attn_softmax: Float[Array, "N T S"], qkv_bias: Float[Array, "S F"]
    ) -> Float[Array, "T E"]:
        """Probabilities times values; of `qkv_bias` only the last K*H channels are read."""
        return self._at("attention", _side_by_side(self._mixed(attn_softmax, qkv_bias)))

    def attn_out(self, attention: Float[Array, "T E"]) -> Float[Array, "T D"]:
        """The output projection."""
        return self._at("attn_out", self._projected(attention, self.out))

    @quiet
    def _exponentials(
        self, scores: Float[Array, "N T S"], first: int
    ) -> tuple[Float[Array, "N T S"], Float[Array, "N T 1"]]:
        """Return exp(s - max), zero after each query's position, and its sum over the keys."""
        habits = self.habits
        s = np.where(_visible(scores, first), scores, F32(-np.inf))
        top = s.max(axis=-1, keepdims=True)
        match habits.softmax_exponential:
            case "exp" | "online":
                exponentials = np.exp(s - top)
            case "exp2":
                exponentials = np.exp2((s - top) * LOG2E)
            case "exp2_scaled":
                exponentials = np.exp2(s * LOG2E - top * LOG2E)
            case "exp2_scaled_fma":
                exponentials = np.exp2((s.astype(np.float64) * LOG2E - top * LOG2E).astype(F32))
        if habits.softmax_exponential == "online":
            return exponentials, _online_sum(s)
        ones = np.ones((1, s.shape[-1], 1), F32)
        return exponentials, product(exponentials, ones, habits.softmax_order, fma=False)

    @quiet
    def _rotated(self, x: Float[Array, "T J H"], first: int) -> Float[Array, "T J H"]:
        """Rotate each pair (i, i + H/2) by its angle.

        A fused sum is one whose second product stays in float64; rounding that product to 16 bits,
        as eager engines do, leaves nothing to fuse.
        """
        angles = self._angles(first + np.arange(len(x)))[:, None].astype(self.habits.rope_functions)
        cos, sin = (self._at("cos_sin", f(angles).astype(F32)) for f in (np.cos, np.sin))
        left, right = np.split(x, 2, axis=-1)
        along = x * np.concatenate([cos, cos], axis=-1)
        wide = np.float64 if self.habits.rope_fma else F32
        across = np.concatenate([-right, left], axis=-1, dtype=wide)
        across = across * np.concatenate([sin, sin], axis=-1)
        return (self._at("rotated", along) + self._at("rotated", across)).astype(F32)

    def _angles(self, positions: Array) -> Float[Array, "T H/2"]:
        """Return position * theta**(-2i/H) in float32, rounded on the way as the engine does."""
        H, theta = self.config.head_dim, self.config.rope_theta
        positions = positions.astype(F32)[:, None]
        exponents = np.arange(0, H, 2) / H
        match self.habits.rope_frequencies:
            case "power64":
                return positions * (1 / (theta**exponents).astype(F32))
            case "power32":
                return positions * (1 / F32(theta) ** exponents.astype(F32))
            case "float64":
                return (positions * theta**-exponents).astype(F32)
            case "exponential":
                return positions * np.exp(-np.log(F32(theta)) * exponents.astype(F32))
            case "iterated":  # llama.cpp: each angle is the one before times a constant
                factors = np.full((len(positions), H // 2), F32(theta ** (-2 / H)))
                factors[:, :1] = positions
                return np.multiply.accumulate(factors, axis=-1)

    def _mixed(
        self, weights: Float[Array, "N T S"], qkv: Float[Array, "S F"]
    ) -> Float[Array, "N T H"]:
        N, T, S = weights.shape
        K, H = self.config.num_key_value_heads, self.config.head_dim
        v = self._heads(qkv)[:, -K:].transpose(1, 0, 2)
        mixed = self._times(weights.reshape(K, -1, S), v, self.habits.attention_order)
        return mixed.reshape(N, T, H)

    def _over(self, x: Array, total: Array) -> Array:
        return x * (1 / total) if self.habits.softmax_reciprocal else x / total

    def _heads(self, qkv: Float[Array, "T F"]) -> Float[Array, "T J H"]:
        return qkv.reshape(len(qkv), -1, self.config.head_dim)

    def _projected(
        self, x: Float[Array, "T I"], weight: Float[Array, "O I"], start: Array | int = 0
    ) -> Float[Array, "T O"]:
        return self._times(x, weight.T, self.habits.projections_order, start)

    def _times(self, x: Array, y: Array, order: Order, start: Array | int = 0) -> Array:
        """Multiply matrices, their elements rounded first where the precision is of operands."""
        of, _, operands = self.habits.precision.partition("-")
        if operands:
            x, y = rounded(x, of), rounded(y, of)
        return product(x, y, order, fma=self.habits.fma, start=start)

    def _stored(self, x: Array) -> Array:
        return self._at("stored", x.astype(F32))

    def _at(self, point: str, x: Array) -> Array:
        """Round at one of the named points, if this engine does."""
        here = point in ROUNDED[self.habits.points]
        return rounded(x, self.habits.precision) if here else x


@quiet
def product(
    x: Float[Array, "*B T I"],
    y: Float[Array, "*B I O"],
    order: Order,
    *,
    fma: bool,
    start: Array | int = 0,
) -> Float[Array, "*B T O"]:
    """Multiply matrices, each sum over I in the given order, in float32.

    Args:
        x: Rows.
        y: Columns.
        order: Of the terms of each sum; zeros fill up the last lane, part or block.
        fma: Whether a product is added unrounded: it is exact in float64, and the sum is rounded
            to float32. Pairwise sums are of products in memory, and BLAS does as it likes.
        start: What the sum starts from, if it runs: the first of several running sums does.
    """
    if order == "blas":
        return x @ y + start
    if order == "pairwise":  # by NumPy, along contiguous terms, a row at a time to bound memory
        columns = np.ascontiguousarray(np.swapaxes(y, -1, -2))
        rows = ((x[..., t, None, :] * columns).sum(axis=-1) for t in range(x.shape[-2]))
        return np.stack(list(rows), axis=-2) + start
    wide = np.float64 if fma else F32
    terms_x = _running(np.moveaxis(x, -1, 0), order).astype(wide, order="C")[..., None]
    terms_y = _running(np.moveaxis(y, -2, 0), order).astype(wide, order="C")[..., None, :]
    sums = np.zeros(np.broadcast_shapes(terms_x.shape, terms_y.shape)[1:], F32)
    sums[0] += start
    for a, b in zip(terms_x, terms_y, strict=True):
        sums = (a * b + sums).astype(F32, copy=False)
    return np.add.accumulate(sums, axis=0)[-1]  # unlike np.sum one after the other


def _running(terms: Float[Array, "I ..."], order: Order) -> Float[Array, "steps sums ..."]:
    """Arrange terms so that as many sums as the order has can run side by side."""
    if order == "reversed":
        terms = terms[::-1]
    kind = order.rstrip("0123456789")
    size = int(order.removeprefix(kind) or 1)
    sums = -(-len(terms) // size) if kind == "blocks" else size
    steps = size if kind == "blocks" else -(-len(terms) // size)
    padding = np.zeros((sums * steps - len(terms), *terms.shape[1:]), F32)
    terms = np.concatenate([terms, padding])
    if kind == "lanes":
        return terms.reshape(steps, sums, *terms.shape[1:])
    return terms.reshape(sums, steps, *terms.shape[1:]).swapaxes(0, 1)


def _visible(scores: Float[Array, "N T S"], first: int) -> Bool[Array, "T S"]:
    _, T, S = scores.shape
    return np.arange(S) <= first + np.arange(T)[:, None]


def _online_sum(scores: Float[Array, "N T S"]) -> Float[Array, "N T 1"]:
    """Return the sum of exp(s - max), key by key, rescaled whenever the maximum so far grows."""
    top = np.full((*scores.shape[:-1], 1), F32(-np.inf))
    total = np.zeros_like(top)
    for s in np.split(scores, scores.shape[-1], axis=-1):
        higher = np.maximum(top, s)
        total = total * np.exp(top - higher) + np.exp(s - higher)
        top = higher
    return total


def _side_by_side(heads: Float[Array, "N T H"]) -> Float[Array, "T E"]:
    return heads.transpose(1, 0, 2).reshape(heads.shape[1], -1)


@quiet
def rounded(x: Array, precision: str) -> Array:
    """Round to nearest, ties to even; a precision that is none of three formats changes nothing."""
    if precision in NARROW:
        return x.astype(NARROW[precision]).astype(F32)
    if precision == "tf32":  # 13 of float32's 23 bits go
        bits = np.ascontiguousarray(x).view(np.uint32)
        return ((bits + (0xFFF + (bits >> 13 & 1))) & ~np.uint32(0x1FFF)).view(F32)
    return x
