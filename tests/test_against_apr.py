"""Our dumps against files written by two engines that nobody here wrote.

tests/data holds dumps of apr 0.72.3 and llama.cpp (llama-cpp-python 0.3.36, brought into apr's
layout; with float32 matrices and KV cache, with a float16 cache, and with bfloat16 matrices too)
for the prompt "What is 2+2?" on the bundled checkpoint, and of apr on a random checkpoint of hidden
size 896.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from comparison import NOISE, worst
from helpers import ROOT, TINY, attention_of, replay

import qwenref
from qwenref.capture import capture
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.precision import Precision
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import read_embedding
from qwenref.oracle import computing
from qwenref.stages import ATTENTION, EMBEDDING

DATA = ROOT / "tests" / "data"


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our dump of layer 0 of the bundled checkpoint."""
    output = tmp_path_factory.mktemp("ours") / "dump"
    capture(TINY, output, stages=(EMBEDDING, *ATTENTION))
    return output


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of hidden size 896 that apr was run on."""
    directory = tmp_path_factory.mktemp("wide") / "model"
    write(directory, Shape(896, 14, 2, 64, 1, 320, seed=61))
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "d8a10fd45cbd9208ceef9b6c67de8be8e81f32568860744a3f0921eeff5c63eb"
    return directory


def assert_agrees(ours: Path, theirs: Path, layer: int, model: Path) -> None:
    """Compare headers and sizes byte for byte, the pattern of zeros, and values."""
    sizes = Checkpoint(model).config.sizes
    for stage in ATTENTION:
        mine, other = (root / f"layer-{layer}" / f"{stage.name}.bin" for root in (ours, theirs))
        assert mine.read_bytes()[:12] == other.read_bytes()[:12]
        assert mine.stat().st_size == other.stat().st_size
        a, b = qwenref.read_aprt(mine).values, qwenref.read_aprt(other).values
        if stage.masked:
            zeros = (a == 0) & ~np.signbit(a), (b == 0) & ~np.signbit(b)
            assert np.array_equal(*zeros)
        T = qwenref.read_aprt(ours / f"layer-{layer}" / "attn_norm.bin").values.size // sizes["D"]
        shape = [(sizes | {"T": T, "S": T})[axis] for axis in stage.axes]
        error, where = worst(stage, a.reshape(shape), b.reshape(shape), sizes)
        assert error <= NOISE, where


def test_layer_0_agrees_with_apr(dump: Path) -> None:
    assert_agrees(dump, DATA / "apr-f32", 0, TINY)


def test_layer_0_agrees_with_llama_cpp(dump: Path) -> None:
    assert_agrees(dump, DATA / "llama-f32", 0, TINY)


KV_FLOAT16 = {"scores_operands": "float16", "attention_operands": "float16"}
MATRICES_BFLOAT16 = {"qkv_operands": "bfloat16", "out_operands": "bfloat16"}


def replay_errors(name: str, formats: Mapping[str, str]) -> dict[str, float]:
    """Replay each stage of a dump of the bundled checkpoint from its own inputs."""
    checkpoint = Checkpoint(TINY)
    sizes = checkpoint.config.sizes | {"T": 12, "S": 12}
    rows, _ = read_embedding(checkpoint, list(b"What is 2+2?"))
    theirs = {"residual": rows.astype(np.float32)}
    for stage in ATTENTION:
        flat = qwenref.read_aprt(DATA / name / "layer-0" / f"{stage.name}.bin").values
        theirs[stage.name] = flat.reshape([sizes[axis] for axis in stage.axes])
    errors = {}
    with computing("float32", "cpu"):
        attention = attention_of(TINY, Precision("float32", formats))
        for stage in ATTENTION:
            ours = replay(attention, stage, theirs)
            ours = np.tril(ours) if stage.masked else ours
            errors[stage.name], _ = worst(stage, ours, theirs[stage.name], sizes)
    return errors


@pytest.mark.parametrize(
    ("name", "formats", "rounding"),
    [
        ("llama-kv16", KV_FLOAT16, {"attn_scores", "attention"}),
        (
            "llama-bf16",
            KV_FLOAT16 | MATRICES_BFLOAT16,
            {"qkv_matmul", "attn_scores", "attention", "attn_out"},
        ),
    ],
)
def test_rounded_operands_explain_what_llama_cpp_computes(
    name: str, formats: dict[str, str], rounding: set[str]
) -> None:
    plain, rounded = replay_errors(name, {}), replay_errors(name, formats)
    assert {stage for stage, error in plain.items() if error > 1e-4} == rounding
    assert max(rounded.values()) <= 1e-6  # measured: 2e-7


def test_the_embedding_is_exactly_that_of_apr(dump: Path) -> None:
    name = "layer-0/embedding.bin"
    assert (dump / name).read_bytes() == (DATA / "apr-f32" / name).read_bytes()


@pytest.mark.parametrize("layer", [1, 2])
def test_a_higher_layer_is_computed_from_the_residual_stream_that_apr_dumped(
    layer: int, tmp_path: Path
) -> None:
    residual = DATA / "apr-f32" / f"layer-{layer - 1}" / "post_ffn_residual.bin"
    done = capture(TINY, tmp_path / "dump", layers=[layer], residual=residual)
    assert_agrees(tmp_path / "dump", DATA / "apr-f32", layer, TINY)
    assert done.manifest.tokens is None
    assert done.manifest.input is not None


def test_a_hidden_size_of_896_agrees_with_apr(wide_model: Path, tmp_path: Path) -> None:
    capture(wide_model, tmp_path / "dump")
    assert_agrees(tmp_path / "dump", DATA / "apr-896", 0, wide_model)


def test_a_whole_model_stage_of_apr_is_read_as_such() -> None:
    found = qwenref.read_aprt(DATA / "apr-f32" / "final_norm.bin")
    assert found.layer is None
    assert found.values.shape == (12 * 84,)
