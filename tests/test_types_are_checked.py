"""The tests themselves check shapes and types at every call: see `conftest`."""

import jax.numpy as jnp
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from qwenref.metrics import heads_in
from qwenref.model.matrix import Matrix


def test_shapes_are_checked_where_they_are_annotated() -> None:
    matrix = Matrix(np.zeros((4, 5), np.float32))
    with pytest.raises(TypeCheckError, match="'x'"):
        matrix.times(jnp.zeros((2, 3, 5)), lambda rows: rows)


def test_types_are_checked_everywhere_else() -> None:
    with pytest.raises(BeartypeCallHintViolation, match="stage"):
        heads_in("attn_norm", {})  # pyright: ignore[reportArgumentType]
