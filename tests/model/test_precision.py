"""Rounding against the casts of NumPy and ml_dtypes, bit for bit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwenref.model.precision import (
    FORMATS,
    POINTS,
    PRECISIONS,
    Precision,
    Rounding,
    nearest,
    one_rounding,
    rounded,
)


def cast_to(dtype: type) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: values.astype(dtype).astype(np.float32)


def to_tf32(values: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(values.astype(np.float64))  # of 0.5 to 1, as float16 holds it
    return np.ldexp(mantissa.astype(np.float16).astype(np.float64), exponent).astype(np.float32)


CASTS = {
    "exact": lambda values: values,
    "float16": cast_to(np.float16),
    "bfloat16": cast_to(ml_dtypes.bfloat16),
    "tf32": to_tf32,
    "float32": lambda values: values,
}
RNG = np.random.default_rng(0)


def halfway(dtype: type) -> np.ndarray:
    """Return what lies exactly between neighbours of a 16-bit format, and those neighbours."""
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        values = values.astype(np.float64)
    values = np.sort(values[np.isfinite(values)])
    return np.concatenate([values, (values[1:] + values[:-1]) / 2])


VALUES = {
    "any bits": RNG.integers(0, 1 << 32, 1 << 20).astype(np.uint32).view(np.float32),
    "around float16": (RNG.standard_normal(1 << 19) * np.exp(RNG.uniform(-20, 12, 1 << 19))).astype(
        np.float32
    ),
    "ties of float16": halfway(np.float16).astype(np.float32),
    "ties of bfloat16": halfway(ml_dtypes.bfloat16).astype(np.float32),
    "edges": np.array(
        [
            *(0, -0.0, 65504, 65519.996, 65520, -65520, 1e30, np.nan, np.inf, -np.inf),
            *(2**-24, 2**-25, 1.5 * 2**-24, 6.1e-5),
        ],
        np.float32,
    ),
}


def to(name: str, arithmetic: str = "float32") -> Rounding:
    """Return how to round to a format."""
    columns = Precision(arithmetic, dict.fromkeys(POINTS, name)).roundings()
    return Rounding(*(column[0] for column in columns))


def same_bits(ours: np.ndarray, cast: np.ndarray) -> bool:
    nan = np.isnan(ours) & np.isnan(cast)
    return bool(np.all(nan | ((ours == cast) & (np.signbit(ours) == np.signbit(cast)))))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_float32_is_rounded_as_a_cast_rounds(name: str, values: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):
        expected = CASTS[name](values)
        if name == "tf32":  # its numbers below the normal float32 ones are of no interest
            values, expected = (np.where(abs(values) < 2**-126, 0, v) for v in (values, expected))
    assert same_bits(np.asarray(jax.jit(rounded)(values, to(name))), expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_numpy_rounds_alike(name: str, values: np.ndarray) -> None:
    with np.errstate(invalid="ignore"):
        normal = np.where(np.abs(values) < 2**-126, 0, values).astype(np.float64)
        expected = CASTS[name](normal.astype(np.float32))
        assert same_bits(nearest(normal, FORMATS[name]), expected.astype(np.float64))


@pytest.mark.parametrize(
    ("name", "cast"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]
)
def test_the_error_of_one_rounding_is_known(name: str, cast: type) -> None:
    values = np.exp(RNG.uniform(np.log(1e-3), np.log(1e3), 1_000_000))
    errors = values.astype(cast).astype(np.float64) / values - 1
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(
        one_rounding(FORMATS[name]), rel=0.01
    )


def test_probabilities_below_the_normal_float16_survive() -> None:
    values = np.exp(RNG.uniform(np.log(2**-26), np.log(6.2e-5), 100_000)).astype(np.float32)
    expected = values.astype(np.float16)
    assert np.count_nonzero(expected) > 90_000
    ours = np.asarray(jax.jit(rounded)(values, to("float16")))
    assert np.array_equal(ours, expected.astype(np.float32))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_float64_is_rounded_once_not_through_float32() -> None:
    near_ties = halfway(np.float16) * (1 + 2**-40)
    values = np.concatenate([near_ties, -near_ties, VALUES["around float16"].astype(np.float64)])
    with np.errstate(invalid="ignore"):
        expected = values.astype(np.float16).astype(np.float64)
        through = values.astype(np.float32).astype(np.float16).astype(np.float64)
    assert np.count_nonzero(expected != through) > 10_000
    with jax.enable_x64(True):
        ours = jax.jit(rounded)(values, to("float16", "float64"))
        assert same_bits(np.asarray(ours), expected)
        exact = jax.jit(rounded)(values, to("exact", "float64"))
        assert same_bits(np.asarray(exact), values)
    assert same_bits(nearest(values, FORMATS["float16"]), expected)


def test_all_formats_share_one_compiled_program() -> None:
    traced = []

    @jax.jit
    def counted(x: jax.Array, to: Rounding) -> jax.Array:
        traced.append(to)
        return rounded(x, to)

    third = jnp.float32(1 / 3)
    results = {float(counted(third, to(name))) for name in FORMATS}
    assert len(results) == 3  # float16 and tf32 are alike there
    assert len(traced) == 1


def test_a_precision_names_points_that_exist() -> None:
    for precision in PRECISIONS.values():
        assert set(precision.formats) <= set(POINTS)
        assert set(precision.formats.values()) <= set(FORMATS)
    dropped = Precision("float32", {"attn_norm": "float16"}).roundings().dropped
    assert dict(zip(POINTS, dropped, strict=True)) == dict.fromkeys(POINTS, 0) | {"attn_norm": 13}
