"""qwenref from Python: what importing costs, and what run returns."""

import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TINY

import qwenref
from qwenref.dumps.layout import LAYOUTS
from qwenref.model.precision import PRECISIONS
from qwenref.stages import ATTENTION

TOKENS = [1, 2, 3, 5]
SIZES = {"T": 4, "S": 4, "D": 84, "N": 6, "K": 2, "H": 14, "E": 84, "F": 140}


def test_importing_qwenref_imports_no_numerics() -> None:
    code = "import qwenref, sys; print(*{'jax', 'numpy', 'flax', 'typer'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there_whichever_modules_are_loaded() -> None:
    assert all(callable(getattr(qwenref, name)) for name in qwenref.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qwenref.no_such_name


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_returns_the_nine_stages_with_the_stated_axes_and_dtype(
    dtype: str, layout: str
) -> None:
    stages = qwenref.run(TINY, TOKENS, dtype=dtype, layout=layout)
    assert stages._fields == tuple(stage.name for stage in ATTENTION)
    for stage, array in zip(ATTENTION, stages, strict=True):
        assert array.shape == tuple(SIZES[axis] for axis in LAYOUTS[layout].axes(stage))
        assert array.dtype == np.dtype(PRECISIONS[dtype].arithmetic)
        assert np.isfinite(array).all()


@pytest.mark.parametrize("array", [tuple, np.array, jnp.array, lambda ids: np.array(ids, np.uint8)])
def test_tokens_may_be_any_sequence_of_whole_numbers(array: Callable) -> None:
    expected = qwenref.run(TINY, TOKENS)
    assert np.array_equal(qwenref.run(TINY, array(TOKENS)).attn_out, expected.attn_out)


def test_the_layouts_hold_the_same_numbers() -> None:
    apr, hf = (qwenref.run(TINY, TOKENS, layout=layout) for layout in ("apr", "hf"))
    assert np.array_equal(apr.q_post_rope, hf.q_post_rope.swapaxes(0, 1))
    assert np.array_equal(apr.k_post_rope, hf.k_post_rope.swapaxes(0, 1))
    assert np.array_equal(apr.attn_scores, np.tril(hf.attn_scores))
    assert hf.attn_scores[:, 0, -1].all()


def test_run_leaves_jax_as_the_user_configured_it() -> None:
    before = dict(jax.config.values)
    qwenref.run(TINY, TOKENS, dtype="float64", device="cpu")
    assert jax.config.values == before
    assert jnp.arange(3.0).dtype == np.float32


def test_run_works_without_compiling_and_with_a_watch_for_nan() -> None:
    # in a process of its own, without the type checks of the tests, which take no NumPy arrays
    code = f"""
import jax, qwenref
for dtype in {list(PRECISIONS)}:
    compiled = qwenref.run({str(TINY)!r}, {TOKENS}, dtype=dtype).attn_out
    with jax.disable_jit(), jax.debug_nans(True):
        eager = qwenref.run({str(TINY)!r}, {TOKENS}, dtype=dtype).attn_out
    print(abs(eager - compiled).max())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert max(map(float, done.stdout.split())) <= 1e-6
    assert len(done.stdout.split()) == len(PRECISIONS)


def test_run_works_however_the_caller_has_configured_jax() -> None:
    expected = qwenref.run(TINY, TOKENS)
    with (
        jax.numpy_rank_promotion("raise"),
        jax.transfer_guard("disallow"),
        jax.default_matmul_precision("bfloat16"),
        jax.enable_x64(True),
        jax.debug_nans(True),
    ):
        strange = qwenref.run(TINY, TOKENS)
    assert all(map(np.array_equal, strange, expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": []}, "no tokens"),
        ({"tokens": [320]}, "token id 320 is out of range: this checkpoint has ids 0 to 319"),
        ({"dtype": "half"}, "unknown dtype 'half'; dtypes are float32, float64, bfloat16, float16"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"layout": "nchw"}, "unknown layout 'nchw'"),
    ],
)
def test_run_refuses_what_it_cannot_use(options: dict, message: str) -> None:
    with pytest.raises(qwenref.QwenrefError, match=message):
        qwenref.run(**{"model_dir": TINY, "tokens": TOKENS} | options)


def test_run_refuses_text_for_tokens() -> None:
    # in a process of its own, without the type checks of the tests
    code = f"import qwenref; qwenref.run({str(TINY)!r}, 'What is')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "QwenrefError: tokens must be a sequence of token ids" in done.stderr
