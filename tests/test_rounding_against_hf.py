"""bfloat16 and float16 against the real Qwen2ForCausalLM in that dtype, value by value.

Every stage is replayed from transformers' own inputs (qkv_bias from attn_norm, since the rounding
of qkv_matmul exists in dumps alone), so that what remains is the order of float32 sums.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from capture_hf import Arrays, load, stages_of
from comparison import rel_l2
from helpers import TINY, Cli, Tensors, attention_of, change_tensors, replay

import qwenref
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.precision import PRECISIONS, RESULTS, Precision
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import read_attention
from qwenref.oracle import computing
from qwenref.stages import ATTENTION

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
NAMES = [stage.name for stage in ATTENTION]
BASE = Shape(84, 6, 2, 16, 1, 320, seed=1)


def huge_k_biases(tensors: Tensors) -> Tensors:
    tensors["model.layers.0.self_attn.k_proj.bias"][[1, 5, 20]] = 100, -100, 100
    return tensors


def large_biases(tensors: Tensors) -> Tensors:
    scales = {name: 60 if name.endswith(("q_proj.bias", "k_proj.bias")) else 1 for name in tensors}
    return {name: values * np.float32(scales[name]) for name, values in tensors.items()}


@dataclass(frozen=True)
class Case:
    """A random checkpoint, how its weights are stored, and how many tokens it is given.

    Qwen2.5 has K biases of about 100 in a few channels.
    """

    shape: Shape
    stored: str
    tokens: int
    huge_biases: bool = False

    def write(self, directory: Path) -> None:
        write(directory, self.shape, dtype=self.stored)
        if self.huge_biases:
            change_tensors(directory, huge_k_biases)


CASES = {
    "plain": Case(BASE, "bfloat16", 65),
    "float32 weights": Case(replace(BASE, seed=2), "float32", 12),
    "K=N": Case(Shape(60, 5, 5, 16, 1, 320, seed=3), "bfloat16", 7),
    "K=1, N*H>D": Case(Shape(96, 5, 1, 16, 1, 320, head_dim=26, seed=4), "float16", 33),
    "G=5, theta 1e4": Case(Shape(320, 10, 2, 16, 1, 320, rope_theta=1e4, seed=5), "float32", 65),
    "D=896": Case(Shape(896, 14, 2, 16, 1, 320, seed=6), "bfloat16", 65),
    "K biases of 100": Case(replace(BASE, seed=8), "bfloat16", 20, huge_biases=True),
    "T=1": Case(replace(BASE, seed=7), "float32", 1),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[int]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {"bundled": (TINY, [87, 104, 97, 116, 32, 105, 115, 32, 50, 43, 50, 63])}
    for name, case in CASES.items():
        case.write(folder / name)
        rng = np.random.default_rng(case.tokens)
        made[name] = folder / name, rng.integers(0, 320, case.tokens).tolist()
    return made


def replayed(directory: Path, precision: Precision, theirs: Arrays) -> Arrays:
    """Return each stage as our method computes it from transformers' inputs."""
    with computing(precision.arithmetic, "cpu"):
        attention = attention_of(directory, precision)
        inputs = {name: array.astype(precision.arithmetic) for name, array in theirs.items()}
        unrounded = attention.qkv_matmul(inputs["attn_norm"])
        inputs["qkv_matmul"] = np.asarray(unrounded)
        ours = {stage.name: replay(attention, stage, inputs) for stage in ATTENTION}
        return ours | {"qkv_matmul": np.asarray(attention.at("qkv_matmul", unrounded))}


def steps(ours: np.ndarray, theirs: np.ndarray, dtype: type) -> np.ndarray:
    """Return how many neighbouring values of a 16-bit format lie between two arrays of it."""

    def position(values: np.ndarray) -> np.ndarray:
        narrow = values.astype(dtype)
        assert np.array_equal(narrow.astype(values.dtype), values, equal_nan=True)
        bits = narrow.view(np.int16).astype(np.int32)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    both_nan = np.isnan(ours) & np.isnan(theirs)
    return np.where(both_nan, 0, np.abs(position(ours) - position(theirs)))


def flushed(values: np.ndarray) -> np.ndarray:
    """Put zero for what is not a normal float32: XLA on CPU does, torch does not."""
    return np.where(np.abs(values) < 2.0**-126, np.zeros_like(values), values)


class Replay(NamedTuple):
    """One stage of one checkpoint: theirs, ours, and ours with float64 sums, rounded alike.

    `slack` is how far a float32 sum may be off, where a result near zero has finer steps than that.
    """

    theirs: np.ndarray
    ours: np.ndarray
    exact: np.ndarray
    slack: np.ndarray | float = 0.0


def slack_of(directory: Path, theirs: Arrays) -> Arrays:
    """Return n * 2^-24 * sum |terms|: how far a float32 sum of n products may be off, in any order.

    Source: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1 (gamma_n).
    """
    weights, _ = read_attention(Checkpoint(directory), 0)
    qkv, out = (
        np.abs(np.concatenate([matrix.astype(np.float64) for matrix in matrices]))
        for matrices in ([weights.q_proj, weights.k_proj, weights.v_proj], [weights.o_proj])
    )
    size = {name: np.abs(array).astype(np.float64) for name, array in theirs.items()}
    q, k = size["q_post_rope"], size["k_post_rope"]
    G, H = q.shape[1] // k.shape[1], q.shape[2]
    terms = {
        "qkv_matmul": size["attn_norm"] @ qkv.T,
        "attn_scores": np.einsum("TNH,SNH->NTS", q, k.repeat(G, axis=1)) * H**-0.5,
        "attn_out": size["attention"] @ out.T,
    }
    lengths = {"qkv_matmul": qkv.shape[1], "attn_scores": H, "attn_out": out.shape[1]}
    found = {name: lengths[name] * 2.0**-24 * terms[name] for name in terms}
    return found | {"qkv_bias": found["qkv_matmul"]}


@pytest.fixture(scope="module")
def replays(checkpoints: dict[str, tuple[Path, list[int]]]) -> Callable[[str], dict]:
    @cache
    def of(dtype: str) -> dict[str, list[Replay]]:
        found: dict[str, list[Replay]] = {name: [] for name in NAMES}
        for directory, tokens in checkpoints.values():
            theirs = stages_of(load(directory, dtype), tokens, [0])[0]
            precision = PRECISIONS[dtype]
            ours = replayed(directory, precision, theirs)
            exact = replayed(directory, replace(precision, arithmetic="float64"), theirs)
            slack = slack_of(directory, theirs)
            for name in NAMES:
                a, b, c = (flushed(arrays[name]) for arrays in (theirs, ours, exact))
                found[name].append(Replay(a, b, c, slack.get(name, 0.0)))
        return found

    return of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_stage_is_that_of_transformers_bit_for_bit(
    name: str, dtype: str, replays: Callable[[str], dict[str, list[Replay]]]
) -> None:
    apart = [steps(r.ours, r.theirs, DTYPES[dtype]) for r in replays(dtype)[name]]
    together = np.concatenate([part.ravel() for part in apart])
    assert np.mean(together == 0) >= 0.99
    assert np.mean(together > 1) <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_what_differs_is_a_float32_sum_on_either_side_of_a_tie(
    name: str, dtype: str, replays: Callable[[str], dict[str, list[Replay]]]
) -> None:
    for theirs, ours, exact, slack in replays(dtype)[name]:
        low, high = np.minimum(ours, theirs) - slack, np.maximum(ours, theirs) + slack
        # of neighbours, one is what the sum in float64 rounds to
        assert np.all((ours == theirs) | ((low <= exact) & (exact <= high)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("point", RESULTS)
def test_no_rounding_point_can_be_left_out(
    point: str, dtype: str, checkpoints: dict[str, tuple[Path, list[int]]]
) -> None:
    directory, tokens = checkpoints["float32 weights"]
    theirs = stages_of(load(directory, dtype), tokens, [0])[0]
    formats = {name: dtype for name in RESULTS if name != point}
    ours = replayed(directory, Precision("float32", formats), theirs)
    assert min(np.mean(ours[name] == theirs[name]) for name in NAMES) < 0.97


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_chain_stays_near_that_of_transformers(
    dtype: str, checkpoints: dict[str, tuple[Path, list[int]]]
) -> None:
    """To a fifth of what the format costs; measured: a fourteenth to an eighth, by the CPU."""
    directory, tokens = checkpoints["D=896"]
    theirs = stages_of(load(directory, dtype), tokens, [0])[0]
    ours, exact = (
        qwenref.run(directory, tokens, dtype=each, layout="hf") for each in (dtype, "float64")
    )
    for name in NAMES:
        a, b, truth = getattr(ours, name), theirs[name], getattr(exact, name)
        if name.endswith("rope"):
            a, truth = a.swapaxes(0, 1), truth.swapaxes(0, 1)
        assert rel_l2(a, b) <= rel_l2(truth, b) / 5, name


def test_float16_overflows_where_transformers_does(tmp_path: Path, cli: Cli) -> None:
    model = tmp_path / "model"
    write(model, BASE, dtype="float32")
    change_tensors(model, large_biases)
    tokens = [3, 1, 4, 1, 5]
    theirs = stages_of(load(model, "float16"), tokens, [0])[0]
    ours = qwenref.run(model, tokens, dtype="float16", layout="hf")
    infinite = np.isinf(theirs["attn_scores"])
    assert infinite.any()
    assert np.array_equal(ours.attn_scores[infinite], theirs["attn_scores"][infinite])
    assert np.isfinite(ours.attn_scores[~infinite]).all()
    # no more than that: transformers' mask is a finite number, which fails beside infinities (a
    # query whose scores are all -inf sees the future, one with a future +inf becomes NaN)
    visible = np.tri(len(tokens), dtype=bool)
    future = (np.isposinf(theirs["attn_scores"]) & ~visible).any(axis=-1, keepdims=True)
    nan = np.isnan(theirs["attn_softmax"]) & visible & ~future
    assert nan.any()
    assert np.isnan(ours.attn_softmax[nan]).all()
    done = cli("capture", "--model", model, "--dtype", "float16", "--tokens", "3,1,4,1,5")
    assert done.status == 0
    assert "warning: attn_scores holds " in done.err
    exact = qwenref.run(model, tokens)
    assert all(np.isfinite(array).all() for array in exact)
