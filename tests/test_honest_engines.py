"""The simulated engines compute Qwen2.5 attention, and each of their habits shows where it should.

The truth here is written out once more, in float64 and with complex rotations.
"""

from dataclasses import replace
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
from comparison import rel_l2
from honest_engines import CHOICES, Habits, HonestEngine, Order, draw_habits, product, rounded

from qwenref.model.config import Config
from qwenref.model.weights import AttentionWeights
from qwenref.stages import ATTENTION, RESIDUAL

D, N, K, H, T = 82, 6, 2, 14, 12  # E = 84 is not D; 82 fills no lane, part or block evenly
CONFIG = Config(D, N, K, H, 16, 1e-6, 1e6, 320, 1, False, (None,))
NAMES = [stage.name for stage in ATTENTION]
ORDERS: tuple[Order, ...] = get_args(Order)

SHOWS_AT = {
    "norm_order": "attn_norm",
    "norm_fma": "attn_norm",
    "norm_mean": "attn_norm",
    "norm_root": "attn_norm",
    "norm_weight": "attn_norm",
    "projections_order": "qkv_matmul",
    "fma": "qkv_matmul",
    "bias_starts_sum": "qkv_bias",
    "rope_frequencies": "q_post_rope",
    "rope_functions": "q_post_rope",
    "rope_fma": "q_post_rope",
    "scores_order": "attn_scores",
    "scores_scale": "attn_scores",
    "softmax_order": "attn_softmax",
    "softmax_exponential": "attn_softmax",
    "softmax_reciprocal": "attn_softmax",
    "attention_order": "attention",
    "divided_last": "attention",
}
"""The first stage that each habit may change, the two of 16 bits aside."""

BOUNDS = [
    ("float32", "eager", 2e-6),  # measured: 7e-7
    ("float16", "eager", 2e-3),  # 1.2e-3
    ("float16", "fused", 2e-3),  # 1.0e-3
    ("float16", "flash", 2e-3),  # 9e-4
    ("bfloat16", "eager", 2e-2),  # 9e-3
    ("bfloat16", "fused", 2e-2),  # 7e-3
    ("bfloat16", "flash", 2e-2),  # 6e-3
    ("float16-operands", "eager", 2e-3),  # 7e-4
    ("bfloat16-operands", "eager", 2e-2),  # 6e-3
    ("tf32-operands", "eager", 2e-3),  # 7e-4
]
"""Of the relative L2 of any stage, whatever the other habits; the comments are the worst of all
single habits and a hundred drawn engines on the arrays below, each at attn_out, the last stage.
"""


def drawn_weights(k_bias: float = 3.0) -> AttentionWeights:
    rng = np.random.default_rng(25)

    def draw(*shape: int, scale: float, mean: float = 0.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale + mean).astype(ml_dtypes.bfloat16)

    return AttentionWeights(
        norm=draw(D, scale=0.3, mean=1.0),
        q_proj=draw(N * H, D, scale=D**-0.5),
        k_proj=draw(K * H, D, scale=D**-0.5),
        v_proj=draw(K * H, D, scale=D**-0.5),
        o_proj=draw(D, N * H, scale=D**-0.5),
        q_bias=draw(N * H, scale=1.0),
        k_bias=draw(K * H, scale=k_bias),
        v_bias=draw(K * H, scale=0.1),
    )


WEIGHTS = drawn_weights()
RESIDUALS = np.random.default_rng(26).standard_normal((T, D), np.float32) * np.float32(0.02)
"""Not of 16 bits, as embeddings often are: their squares are exact, and fused sums like others."""


def true_stages() -> dict[str, np.ndarray]:
    norm, q_proj, k_proj, v_proj, o_proj, *biases = (np.asarray(w, np.float64) for w in WEIGHTS)
    x = RESIDUALS.astype(np.float64)
    normed = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * norm
    products = normed @ np.concatenate([q_proj, k_proj, v_proj]).T
    qkv = products + np.concatenate(biases)
    heads = qkv.reshape(T, N + 2 * K, H)
    angles = np.outer(np.arange(T), 1e6 ** (-2 * np.arange(H // 2) / H))[:, None]
    turned = (heads[..., : H // 2] + 1j * heads[..., H // 2 :]) * np.exp(1j * angles)
    rotated = np.concatenate([turned.real, turned.imag], axis=-1)
    q, k, v = rotated[:, :N], rotated[:, N : N + K], heads[:, N + K :]
    scores = np.einsum("tnh,snh->nts", q, k.repeat(N // K, axis=1)) / np.sqrt(H)
    exponentials = np.tril(np.exp(scores))
    softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
    attention = np.einsum("nts,snh->tnh", softmax, v.repeat(N // K, axis=1)).reshape(T, -1)
    out = attention @ o_proj.T
    arrays = (normed, products, qkv, q, k, scores, softmax, attention, out)
    return dict(zip(NAMES, arrays, strict=True))


TRUTH = true_stages()


def chain(habits: Habits, weights: AttentionWeights = WEIGHTS) -> dict[str, np.ndarray]:
    return HonestEngine(CONFIG, weights, habits).chain(RESIDUALS)


def changed(habits: Habits, **values: Any) -> Habits:
    return replace(habits, **values)


def worst(dump: dict[str, np.ndarray]) -> float:
    assert list(dump) == NAMES
    assert all(dump[name].shape == TRUTH[name].shape for name in NAMES)
    assert {values.dtype for values in dump.values()} == {np.dtype(np.float32)}
    return max(rel_l2(dump[name], TRUTH[name]) for name in NAMES)


@pytest.mark.parametrize(("precision", "points", "bound"), BOUNDS)
@pytest.mark.parametrize("habit", SHOWS_AT)
def test_every_habit_alone_is_honest(habit: str, precision: str, points: str, bound: float):
    base = changed(Habits(), precision=precision, points=points)
    for value in CHOICES[habit]:
        assert worst(chain(changed(base, **{habit: value}))) <= bound, value


@pytest.mark.parametrize(("precision", "points", "bound"), BOUNDS)
def test_drawn_engines_are_honest(precision: str, points: str, bound: float):
    rng = np.random.default_rng(1)
    drawn = [changed(draw_habits(rng, precision), points=points) for _ in range(20)]
    assert len(set(drawn)) == 20
    for habits in drawn:
        assert habits.precision == precision
        assert worst(chain(habits)) <= bound, habits


def test_drawing_reaches_every_choice_and_repeats():
    rng = np.random.default_rng(1)
    drawn = [draw_habits(rng, "float32") for _ in range(200)]
    for habit in CHOICES.keys() - {"precision"}:
        assert {getattr(habits, habit) for habits in drawn} == {*CHOICES[habit]}
    assert draw_habits(np.random.default_rng(1), "float32") == drawn[0]


@pytest.mark.parametrize("habit", SHOWS_AT)
def test_a_habit_changes_its_stage_and_none_before(habit: str):
    plain = chain(Habits())
    before = NAMES[: NAMES.index(SHOWS_AT[habit])]
    # lengths of 12 to 84 are one part for many an order; all orders are compared below
    values = ["reversed"] if habit.endswith("_order") else CHOICES[habit][1:]
    for value in values:
        other = chain(changed(Habits(), **{habit: value}))
        for name in before:
            np.testing.assert_array_equal(other[name], plain[name])
        assert not np.array_equal(other[SHOWS_AT[habit]], plain[SHOWS_AT[habit]]), value


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_rounding_points_show_where_they_should(precision: str):
    base = changed(Habits(), precision=precision)
    eager, fused, flash = (chain(changed(base, points=p)) for p in CHOICES["points"])
    assert not np.array_equal(eager["attn_norm"], fused["attn_norm"])
    for name in NAMES[:6]:  # its dumps show scores rounded, and softmax of others
        np.testing.assert_array_equal(flash[name], fused[name])
    assert not np.array_equal(flash["attn_softmax"], fused["attn_softmax"])
    for dump in (eager, fused, flash):
        narrow = {n for n in NAMES if np.array_equal(rounded(dump[n], precision), dump[n])}
        assert {*NAMES} - narrow == (set() if dump is eager else {"qkv_matmul"})


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "tf32"])
def test_operand_rounding_starts_at_the_projections(precision: str):
    plain = chain(Habits())
    other = chain(changed(Habits(), precision=f"{precision}-operands"))
    np.testing.assert_array_equal(other["attn_norm"], plain["attn_norm"])
    q, k, v = (
        rounded(w.astype(np.float32), precision)
        for w in (WEIGHTS.q_proj, WEIGHTS.k_proj, WEIGHTS.v_proj)
    )
    weights = WEIGHTS._replace(q_proj=q, k_proj=k, v_proj=v)
    x = rounded(plain["attn_norm"], precision)
    expected = HonestEngine(CONFIG, weights, Habits()).qkv_matmul(x)
    np.testing.assert_array_equal(other["qkv_matmul"], expected)
    assert not np.array_equal(other["qkv_matmul"], plain["qkv_matmul"])


@pytest.mark.parametrize("fma", [False, True])
def test_every_order_has_bits_of_its_own(fma: bool):
    x, y = np.random.default_rng(2).standard_normal((2, 20, 700), np.float32)
    true = x.astype(np.float64) @ y.T.astype(np.float64)
    sums = {order: product(x, y.T, order, fma=fma) for order in ORDERS}
    scale = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(y, axis=1)
    for order, values in sums.items():
        assert np.abs(values - true).max() <= 2e-6 * scale.min(), order
    if fma:
        del sums["blas"]  # it is free to run one fused sum, which is then the sequential one
    assert len({values.tobytes() for values in sums.values()}) == len(sums)


def test_orders_are_what_their_names_say():
    n = 700
    x, y = np.random.default_rng(3).standard_normal((2, n), np.float32)
    terms = list(x * y)
    runs = {
        "sequential": [terms],
        "reversed": [terms[::-1]],
        **{f"lanes{w}": [terms[lane::w] for lane in range(w)] for w in (4, 8, 16)},
        "split2": [terms[:350], terms[350:]],
        "split4": [terms[i : i + 175] for i in range(0, n, 175)],
        **{f"blocks{w}": [terms[i : i + w] for i in range(0, n, w)] for w in (32, 64, 256)},
    }
    assert runs.keys() == set(ORDERS) - {"pairwise", "blas"}
    for order in ORDERS:
        if order in runs:
            one_by_one = sum((sum(run, np.float32(0)) for run in runs[order]), np.float32(0))
            assert product(x[None], y[:, None], order, fma=False) == one_by_one, order


def test_a_fused_sum_rounds_once():
    x = np.array([[1, 1 + 2**-23]], np.float32)
    y = np.array([[-1], [1 - 2**-23]], np.float32)
    assert product(x, y, "sequential", fma=True) == -(2**-46)
    assert product(x, y, "sequential", fma=False) == 0


def test_tf32_rounds_to_ten_bits_ties_to_even():
    step = 2.0**-10
    numbers = np.array([1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -2 + step / 4, 0, -np.inf])
    expected = np.array([1, 1 + 2 * step, 1 + step, -2, 0, -np.inf], np.float32)
    np.testing.assert_array_equal(rounded(numbers.astype(np.float32), "tf32"), expected)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_stage_methods_are_the_steps_of_the_chain(precision: str):
    engine = HonestEngine(CONFIG, WEIGHTS, changed(Habits(), precision=precision, points="fused"))
    arrays = {RESIDUAL: rounded(RESIDUALS, precision), **engine.chain(RESIDUALS)}
    for stage in ATTENTION:
        step = getattr(engine, stage.name)(*(arrays[name] for name in stage.computed_from))
        np.testing.assert_array_equal(step, arrays[stage.name])


def test_later_tokens_alone():
    engine = HonestEngine(CONFIG, WEIGHTS, Habits())
    dump = engine.chain(RESIDUALS)
    q = engine.q_post_rope(dump["qkv_bias"][5:], first=5)
    np.testing.assert_array_equal(q, dump["q_post_rope"][5:])
    k = engine.k_post_rope(dump["qkv_bias"][5:], first=5)
    np.testing.assert_array_equal(k, dump["k_post_rope"][5:])
    softmax = engine.attn_softmax(dump["attn_scores"][:, 5:], first=5)
    np.testing.assert_array_equal(softmax, dump["attn_softmax"][:, 5:])
    v = dump["qkv_bias"][:, -K * H :]
    np.testing.assert_array_equal(engine.attention(dump["attn_softmax"], v), dump["attention"])


def test_without_biases():
    weights = WEIGHTS._replace(q_bias=None, k_bias=None, v_bias=None)
    for starts in (False, True):
        dump = chain(changed(Habits(), bias_starts_sum=starts), weights)
        np.testing.assert_array_equal(dump["qkv_bias"], dump["qkv_matmul"])


@pytest.mark.parametrize("exponential", CHOICES["softmax_exponential"])
def test_overflow_is_silent_and_never_shows_the_future(exponential: str):
    habits = changed(Habits(), precision="float16", softmax_exponential=exponential)
    dump = chain(habits, drawn_weights(k_bias=2e4))
    assert np.isinf(dump["attn_scores"]).any()
    assert not np.triu(dump["attn_softmax"], 1).any()
