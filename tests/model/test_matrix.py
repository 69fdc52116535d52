"""Products with a matrix of which some rows are widened at a time, beside NumPy's."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwenref.model import matrix
from qwenref.model.matrix import Matrix

LENGTH, WIDTH = 37, 16


@pytest.fixture(params=[1, 4, 9, 36, 37])
def rows_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(matrix, "WIDENED", request.param * WIDTH * 4)
    return request.param


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.usefixtures("rows_at_a_time")
def test_small_integers_are_multiplied_exactly(dtype: type) -> None:
    rng = np.random.default_rng(1)
    stored = rng.integers(-9, 9, (LENGTH, WIDTH)).astype(dtype)
    x = rng.integers(-9, 9, (5, WIDTH)).astype(np.float32)
    of_matrix = jax.jit(lambda m, x: m.times(x, lambda rows: 2 * rows.astype(x.dtype)))
    found = np.asarray(of_matrix(Matrix(stored), x))
    np.testing.assert_array_equal(found, x @ (2 * stored.astype(np.float32)).T)
    batch = np.stack([x, 3 * x])
    of_batch = jax.jit(jax.vmap(of_matrix, in_axes=(None, 0)))
    np.testing.assert_array_equal(of_batch(Matrix(stored), batch), np.stack([found, 3 * found]))


def test_only_the_rows_of_a_step_are_prepared(rows_at_a_time: int) -> None:
    """What is prepared whole would be held whole."""
    prepared = []

    def prepare(rows: jax.Array) -> jax.Array:
        prepared.append(len(rows))
        return rows.astype(jnp.float32)

    Matrix(np.ones((LENGTH, WIDTH), np.float16)).times(jnp.ones((2, WIDTH)), prepare)
    assert max(prepared) <= rows_at_a_time


def test_the_bits_of_a_narrow_matrix_are_widened_some_rows_at_a_time() -> None:
    """XLA's own count: a slice of 8 MiB, where all of the bfloat16 matrix would take 96."""
    of_matrix = jax.jit(lambda m, x: m.times(x, lambda rows: rows.astype(x.dtype)))
    stored = Matrix(np.ones((6144, 4096), ml_dtypes.bfloat16))
    found = of_matrix.lower(stored, jnp.ones((3, 4096))).compile().memory_analysis()
    assert found
    assert found.temp_size_in_bytes <= 1.2 * matrix.WIDENED
