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
from helpers import TINY, Cli, Tensors, attention_of, change_tensors

import qwenref
from qwenref.chain import Layer
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.feed_forward import FeedForward
from qwenref.model.head import SampledHead
from qwenref.model.precision import PRECISIONS, RESULTS, Precision
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import HeadMatrix, read_attention, read_feed_forward, read_final_norm
from qwenref.oracle import computing
from qwenref.stages import ATTENTION, HEAD, LAYER

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
NAMES = [stage.name for stage in ATTENTION]
ALL_NAMES = [stage.name for stage in (*LAYER, *HEAD)]
LEFT = "left the last layer"
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


def of_transformers(directory: Path, dtype: str, tokens: list[int]) -> Arrays:
    """Return the stages of layer 0 and of the whole model, and what left the last layer."""
    last = Checkpoint(directory).config.num_hidden_layers - 1
    found = stages_of(load(directory, dtype, last), tokens, sorted({0, last}), last_logits=0)
    return found[0] | found[None] | {LEFT: found[last]["post_ffn_residual"]}


def replayed(directory: Path, precision: Precision, theirs: Arrays) -> Arrays:
    """Return each stage as our method computes it from transformers' inputs."""
    checkpoint = Checkpoint(directory)
    config = checkpoint.config
    with computing(precision.arithmetic, "cpu"):
        attention = attention_of(directory, precision)
        mlp, _ = read_feed_forward(checkpoint, 0)
        layer = Layer(attention, FeedForward(config, mlp, precision))
        norm, _ = read_final_norm(checkpoint)
        head = SampledHead(config, norm, head_of(checkpoint), precision)
        inputs = {name: array.astype(precision.arithmetic) for name, array in theirs.items()}
        unrounded = attention.qkv_matmul(inputs["attn_norm"])
        inputs["qkv_matmul"] = np.asarray(unrounded)
        ours = {
            stage.name: np.asarray(layer.method(stage)(*(inputs[n] for n in stage.computed_from)))
            for stage in LAYER
        }
        return ours | {
            "qkv_matmul": np.asarray(attention.at("qkv_matmul", unrounded)),
            "final_norm": np.asarray(head.final_norm(inputs[LEFT])),
            "lm_head": np.asarray(head.sampled_lm_head(inputs["final_norm"])),
        }


def head_of(checkpoint: Checkpoint) -> np.ndarray:
    """Return the matrix of lm_head, whole."""
    ((_, matrix),) = HeadMatrix(checkpoint, 1).slices(checkpoint.config.vocab_size)
    return matrix


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
    checkpoint = Checkpoint(directory)
    weights, mlp = read_attention(checkpoint, 0)[0], read_feed_forward(checkpoint, 0)[0]
    matrices = {
        "qkv_matmul": ("attn_norm", [weights.q_proj, weights.k_proj, weights.v_proj]),
        "attn_out": ("attention", [weights.o_proj]),
        "ffn_gate": ("ffn_norm", [mlp.gate_proj]),
        "ffn_up": ("ffn_norm", [mlp.up_proj]),
        "ffn_out": ("ffn_swigl", [mlp.down_proj]),
        "lm_head": ("final_norm", [head_of(checkpoint)]),
    }
    size = {name: np.abs(array).astype(np.float64) for name, array in theirs.items()}
    q, k = size["q_post_rope"], size["k_post_rope"]
    G, H = q.shape[1] // k.shape[1], q.shape[2]
    scores = np.einsum("TNH,SNH->NTS", q, k.repeat(G, axis=1)) * H**-0.5
    # an exponential is off by up to 4 half units, says EXPONENTIAL; three roundings follow
    found = {"attn_scores": H * 2.0**-24 * scores, "ffn_silu": 7 * 2.0**-24 * size["ffn_silu"]}
    for name, (source, parts) in matrices.items():
        matrix = np.abs(np.concatenate([part.astype(np.float64) for part in parts]))
        found[name] = matrix.shape[1] * 2.0**-24 * (size[source] @ matrix.T)
    return found | {"qkv_bias": found["qkv_matmul"]}


@pytest.fixture(scope="module")
def replays(checkpoints: dict[str, tuple[Path, list[int]]]) -> Callable[[str], dict]:
    @cache
    def of(dtype: str) -> dict[str, list[Replay]]:
        found: dict[str, list[Replay]] = {name: [] for name in ALL_NAMES}
        for directory, tokens in checkpoints.values():
            theirs = of_transformers(directory, dtype, tokens)
            precision = PRECISIONS[dtype]
            ours = replayed(directory, precision, theirs)
            exact = replayed(directory, replace(precision, arithmetic="float64"), theirs)
            slack = slack_of(directory, theirs)
            for name in ALL_NAMES:
                a, b, c = (flushed(arrays[name]) for arrays in (theirs, ours, exact))
                found[name].append(Replay(a, b, c, slack.get(name, 0.0)))
        return found

    return of


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_stage_is_that_of_transformers_bit_for_bit(
    name: str, dtype: str, replays: Callable[[str], dict[str, list[Replay]]]
) -> None:
    apart = [steps(r.ours, r.theirs, DTYPES[dtype]) for r in replays(dtype)[name]]
    together = np.concatenate([part.ravel() for part in apart])
    assert np.mean(together == 0) >= 0.99
    assert np.mean(together > 1) <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL_NAMES)
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
    theirs = of_transformers(directory, dtype, tokens)
    formats = {name: dtype for name in RESULTS if name != point}
    ours = replayed(directory, Precision("float32", formats), theirs)
    assert min(np.mean(ours[name] == theirs[name]) for name in ALL_NAMES) < 0.97


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
    assert "warning: layer-0/attn_scores.bin holds " in done.err
    exact = qwenref.run(model, tokens)
    assert all(np.isfinite(array).all() for array in exact)
