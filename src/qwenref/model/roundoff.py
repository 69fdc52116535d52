"""How far an honest computation of one stage may be off: its errors, drawn at random.

No two engines add in the same order, so this models the worst honest one, a running sum. Each of
its roundings is off by at most half a unit in the last place, uniformly: by u/sqrt(3) times the
value, rms, at most (u = 2**-24 in float32). So a sum is off by

    u/sqrt(3) * sqrt(sum of the squares of all partial sums and all products).

Where the order is not known, its expectation over all orders stands for the sum over the partial
sums: of n products with sum S and sum of squares Q, that is (n + 1) * (Q/6 + S**2/3).

The sums in RMSNorm and softmax are not random: squares of bfloat16 values, added one after the
other in float32, are rounded down more often than up. They are executed in float32 as well,
forwards and backwards, and the largest of the three errors counts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qwenref.model.arithmetic import Arithmetic
from qwenref.model.matrix import Matrix
from qwenref.stages import Stage

UNIT = 2.0**-24
"""Relative error of one float32 rounding, at most; rms it is 1/sqrt(3) of that, at most."""

ONE = UNIT / 3**0.5

EXPONENTIAL = 16
"""Roundings that an exponential counts for: fast ones are off by up to two units in the last place
(1.46 and a rounding, says the source of llama.cpp's ggml_v_expf), four times a rounding's half.
"""

Values = np.ndarray


class StageErrors(NamedTuple):
    """The errors that a stage adds to its inputs'.

    Attributes:
        float32: Drawn, of plain float32: [R, ...].
        inner: What the roundings inside the stage make, if each is off by 1, relatively, rms.
        weights: What rounded weights make, if each is off by 1, relatively, rms.
    """

    float32: Values
    inner: Values | float
    weights: Values | float


class Roundoff:
    """Draws the errors of some stages, from exact inputs and values, float64.

    Attributes:
        unseen_keys: Where tokens were left out of a prompt, how many times more keys each of the
            others sees in it, [T].
    """

    def __init__(self, modules: Sequence[Arithmetic], positions: Values, draws: int):
        """Say whose errors to draw.

        Args:
            modules: Those that have the stages' matrices, in float64.
            positions: Of the tokens, [T].
            draws: How many, R.
        """
        self.config = modules[0].config
        self._matrices = {name: of for module in modules for name, of in module.matrices.items()}
        self.positions = positions
        self.draws = draws
        self.unseen_keys = (positions + 1) / np.arange(1, len(positions) + 1)

    def of(self, stage: Stage, inputs: list[Values], value: Values) -> StageErrors:
        """Return the errors of a stage with exact inputs and that value; the same at every call."""
        return getattr(self, stage.name)(generator(stage.name), *inputs, value)

    def attn_norm(self, rng: np.random.Generator, x: Values, normed: Values) -> StageErrors:
        """As any norm."""
        return self._norm(rng, x, normed)

    def qkv_matmul(self, rng: np.random.Generator, x: Values, products: Values) -> StageErrors:
        """One running sum over the D products of each channel."""
        return self._projection(rng, x, products, "qkv_matmul")

    def qkv_bias(self, rng: np.random.Generator, products: Values, biased: Values) -> StageErrors:
        """One more addition; or the sum over D products began with the bias, as in many kernels."""
        D, bias = self.config.hidden_size, np.abs(biased - products)
        roundings = np.sqrt(np.square(biased) + D * np.square(bias))
        return StageErrors(ONE * roundings * self._normal(rng, biased), inner=0, weights=bias)

    def q_post_rope(self, rng: np.random.Generator, _: Values, rotated: Values) -> StageErrors:
        """Two products and their sum, from rounded cos and sin of an angle that is a bit wrong."""
        return self._rotation(rng, rotated)

    def k_post_rope(self, rng: np.random.Generator, _: Values, rotated: Values) -> StageErrors:
        """As `q_post_rope`, with the same wrong angles."""
        return self._rotation(rng, rotated)

    def attn_scores(
        self, rng: np.random.Generator, q: Values, k: Values, scores: Values
    ) -> StageErrors:
        """A running sum over the H products; the scale rounds them, or the queries before."""
        T, N, H = q.shape
        K = k.shape[1]
        grouped = np.square(q).reshape(T, K, N // K, H)
        squares = np.einsum("TKGH,SKH->KGTS", grouped, np.square(k)).reshape(N, T, -1) / H
        errors = self._running_sum(rng, H, squares, scores, roundings=2)
        return StageErrors(errors, inner=np.abs(scores), weights=0)

    def attn_softmax(
        self, rng: np.random.Generator, scores: Values, softmax: Values
    ) -> StageErrors:
        """Errors of the exponentials and of their sum, and what the normalisation makes of both.

        The exponent is rounded when the maximum is subtracted; in some engines, before that too.
        """
        visible = np.tril(np.ones(scores.shape[1:], bool))
        below = np.where(visible, scores, -np.inf)
        below -= below.max(axis=-1, keepdims=True)
        total = self._sum_errors(rng, np.exp(below.astype(np.float32)))
        total *= self.unseen_keys**0.5 / np.sum(np.exp(below), axis=-1)
        below[:, ~visible] = 0
        roundings = np.sqrt(np.square(scores) + np.square(below) + 3)
        factors = ONE * roundings * self._normal(rng, softmax)
        factors -= np.sum(softmax * factors, axis=-1, keepdims=True)
        return StageErrors(softmax * (factors - total[..., None]), inner=0, weights=0)

    def attention(
        self, rng: np.random.Generator, softmax: Values, qkv: Values, mixed: Values
    ) -> StageErrors:
        """A running sum over the keys that a query sees; a division may come after it."""
        N, T, S = softmax.shape
        K, H = self.config.num_key_value_heads, self.config.head_dim
        v = qkv.reshape(S, -1, H)[:, -K:]
        grouped = np.square(softmax).reshape(K, N // K, T, S)
        squares = np.einsum("KGTS,SKH->TKGH", grouped, np.square(v)).reshape(T, -1)
        keys = self.positions[:, None] + 1
        return StageErrors(
            self._running_sum(rng, keys, squares, mixed, roundings=1), inner=0, weights=0
        )

    def attn_out(self, rng: np.random.Generator, mixed: Values, products: Values) -> StageErrors:
        """One running sum over the E products of each channel."""
        return self._projection(rng, mixed, products, "attn_out")

    def post_attn_residual(
        self, rng: np.random.Generator, _: Values, __: Values, total: Values
    ) -> StageErrors:
        """One addition."""
        return self._relative(rng, total, roundings=1)

    def ffn_norm(self, rng: np.random.Generator, x: Values, normed: Values) -> StageErrors:
        """As any norm."""
        return self._norm(rng, x, normed)

    def ffn_gate(self, rng: np.random.Generator, x: Values, products: Values) -> StageErrors:
        """One running sum over the D products of each channel."""
        return self._projection(rng, x, products, "ffn_gate")

    def ffn_up(self, rng: np.random.Generator, x: Values, products: Values) -> StageErrors:
        """One running sum over the D products of each channel."""
        return self._projection(rng, x, products, "ffn_up")

    def ffn_silu(self, rng: np.random.Generator, x: Values, activated: Values) -> StageErrors:
        """An exponential (its argument is exact), a sum, a division, a product.

        Engines that round results may round the sigmoid too.
        """
        errors = self._relative(rng, activated, roundings=EXPONENTIAL + 3)
        return errors._replace(inner=np.abs(activated))

    def ffn_swigl(
        self, rng: np.random.Generator, _: Values, __: Values, product: Values
    ) -> StageErrors:
        """One product."""
        return self._relative(rng, product, roundings=1)

    def ffn_out(self, rng: np.random.Generator, x: Values, products: Values) -> StageErrors:
        """One running sum over the I products of each channel."""
        return self._projection(rng, x, products, "ffn_out")

    def post_ffn_residual(
        self, rng: np.random.Generator, _: Values, __: Values, total: Values
    ) -> StageErrors:
        """One addition."""
        return self._relative(rng, total, roundings=1)

    def final_norm(self, rng: np.random.Generator, x: Values, normed: Values) -> StageErrors:
        """As any norm."""
        return self._norm(rng, x, normed)

    def lm_head(self, rng: np.random.Generator, x: Values, products: Values) -> StageErrors:
        """One running sum over the D products of each logit."""
        return self._projection(rng, x, products, "lm_head")

    def _norm(self, rng: np.random.Generator, x: Values, normed: Values) -> StageErrors:
        """The sum of squares is common to a token; six roundings come after it or are its own."""
        D, eps = x.shape[-1], self.config.rms_norm_eps
        mean_square = np.mean(np.square(x), axis=-1) + eps
        factor = self._sum_errors(rng, np.square(x.astype(np.float32))) / D / (2 * mean_square)
        errors = normed * (factor[..., None] + ONE * 6**0.5 * self._normal(rng, normed))
        return StageErrors(errors, inner=np.abs(normed), weights=np.abs(normed))

    def _relative(self, rng: np.random.Generator, value: Values, roundings: int) -> StageErrors:
        """So many roundings of the value itself."""
        return StageErrors(ONE * roundings**0.5 * value * self._normal(rng, value), 0, 0)

    def _projection(
        self, rng: np.random.Generator, x: Values, products: Values, stage: str
    ) -> StageErrors:
        narrow = x.astype(np.float32)
        parts = [_squares(narrow, matrix) for matrix in self._matrices[stage]]
        squares = np.concatenate(parts, axis=-1)
        errors = self._running_sum(rng, x.shape[-1], squares, products)
        return StageErrors(errors, inner=0, weights=np.sqrt(squares))

    def _normal(self, rng: np.random.Generator, like: Values) -> Values:
        return rng.standard_normal((self.draws, *like.shape))

    def _signs(self, rng: np.random.Generator, like: Values) -> Values:
        return rng.choice([-1.0, 1.0], (self.draws, *like.shape))

    def _running_sum(
        self,
        rng: np.random.Generator,
        n: int | Values,
        squares: Values,
        total: Values,
        roundings: int = 0,
    ) -> Values:
        """Errors of sums of n products, in unknown order, and of roundings before and after."""
        variance = (n + 1) * (squares / 6 + np.square(total) / 3) + squares
        variance += roundings * np.maximum(squares, np.square(total))
        return ONE * np.sqrt(variance) * self._normal(rng, total)

    def _sum_errors(self, rng: np.random.Generator, terms: Values) -> Values:
        """Errors [R, ...] of running sums over the last axis of float32 terms [..., n]."""
        partial = np.cumsum(terms, axis=-1, dtype=np.float64)
        exact = partial[..., -1]
        walk = np.sum(np.square(partial) + np.square(terms, dtype=np.float64), axis=-1)
        errors = self._signs(rng, exact) * ONE * np.sqrt(walk)
        for order in (terms, terms[..., ::-1]):
            executed = np.cumsum(order, axis=-1, dtype=np.float32)[..., -1] - exact
            errors = np.where(np.abs(executed) > np.abs(errors), executed, errors)
        return errors

    def _rotation(self, rng: np.random.Generator, rotated: Values) -> StageErrors:
        """Errors of two products, a sum, cos and sin, and of the angle."""
        H = rotated.shape[-1]
        angles, turned = self._angles(H)
        turned = np.concatenate([turned, turned], axis=-1)[:, :, None, :]
        left, right = np.split(rotated, 2, axis=-1)
        lengths = np.hypot(left, right)
        lengths = np.concatenate([lengths, lengths], axis=-1)
        across = np.concatenate([-right, left], axis=-1)
        errors = across * turned + ONE * 2**0.5 * lengths * self._normal(rng, rotated)
        sines = np.abs(np.sin(np.concatenate([angles, angles], axis=-1)))[:, None, :]
        # where cos is rounded to 1 (bfloat16: below 2**-4, float16: 2**-5.5), times it is exact
        return StageErrors(errors, inner=lengths * np.where(sines < 2**-5, sines, 1), weights=0)

    def _angles(self, H: int) -> tuple[Values, Values]:
        """Return the angles [T, H/2], and errors of them, [R, T, H/2].

        An angle is a frequency times a position, rounded, and so is the frequency, twice. Those
        errors are the same for all tokens, queries and keys: being so few, each is taken as large
        as it can be. Some engines make the frequencies as exponentials of a product, or (llama.cpp)
        one after the other; these are executed, and the largest error counts.
        """
        positions, theta = self.positions[:, None], self.config.rope_theta
        exponents = np.arange(0, H, 2) / H
        angles = positions * theta**-exponents
        signs = self._signs(np.random.default_rng(0), exponents)
        errors = signs[:, None, :] * UNIT * 3**0.5 * angles * (exponents > 0)
        frequencies = np.exp(-np.log(np.float32(theta)) * exponents.astype(np.float32))
        factors = np.full_like(angles, theta ** (-2 / H), np.float32)
        factors[:, :1] = positions
        for executed in (
            positions.astype(np.float32) * frequencies,
            np.multiply.accumulate(factors, axis=-1),
        ):
            error = executed - angles
            errors = np.where(np.abs(error) > np.abs(errors), error, errors)
        return angles, errors


def generator(*words: str) -> np.random.Generator:
    """Return random numbers, the same for the same words."""
    return np.random.default_rng([*" ".join(words).encode()])


@jax.jit
def _squares(x: Float[Array, "T I"], matrix: Matrix) -> Float[Array, "T O"]:
    """Sums of the squared products of a projection, to float32 precision."""
    return matrix.times(jnp.square(x), lambda rows: jnp.square(rows.astype(x.dtype)))
