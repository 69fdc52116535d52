"""Which stage a file holds, by its name: ours, those of apr's tests, or another engine's."""

import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from qwenref.dumps.naming import SHIPPED, Names, Place, names_from
from qwenref.errors import QwenrefError
from qwenref.stages import BY_NAME, HEAD, LAYER


def place(path: str, patterns: dict[str, str] | None = None) -> Place | None:
    return Names(patterns).place(PurePosixPath(path))


def shipped(name: str, path: str) -> Place | None:
    return names_from(name).place(PurePosixPath(path))


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(spec: str | Path) -> str:
    with pytest.raises(QwenrefError) as caught:
        names_from(spec)
    message = str(caught.value)
    assert message.isprintable()
    return message


# --- names that are known anyway ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "layer", "stage"),
    [
        ("layer-0/attn_scores", 0, "attn_scores"),
        ("layer-23/attn_scores", 23, "attn_scores"),
        ("layer-16383/attn_scores", 16383, "attn_scores"),
        ("layer-007/attn_scores", 7, "attn_scores"),
        ("layer_0_attn_scores", 0, "attn_scores"),
        ("layer_11_k_post_rope", 11, "k_post_rope"),
        ("layer-0/made_up-stage.2", 0, "made_up-stage.2"),
        ("layer_0_made_up", 0, "made_up"),
        ("attn_scores", None, "attn_scores"),
        ("final_norm", None, "final_norm"),
        ("lm_head", None, "lm_head"),
        ("a", None, "a"),
    ],
)
def test_names_of_ours_and_of_aprs_tests(path: str, layer: int | None, stage: str) -> None:
    assert place(path) == Place(layer, stage, None)


@pytest.mark.parametrize("path", ["embedding", "layer-0/embedding", "layer_0_embedding"])
def test_the_embedding_counts_as_layer_0(path: str) -> None:
    assert place(path) == Place(0, "embedding")


@pytest.mark.parametrize(
    "path",
    [
        "blk0/norm",
        "layer-0/below/attn_norm",
        "below/layer-0/attn_norm",
        "pos-0003/layer-0/attn_norm",
        "layer-/attn_norm",
        "layer-x/attn_norm",
        "layer--1/attn_norm",
        "layer-1.5/attn_norm",
        "layer-\u0663/attn_norm",
        "layer-16384/attn_norm",
        "layer-99999999999999999999/attn_norm",
        "layer-0/attn norm",
        "layer-0/attn_norm\n",
        "attn_norm\u00e9",
        "../attn_norm",
        "/attn_norm",
    ],
)
def test_other_names_are_of_no_stage(path: str) -> None:
    assert place(path) is None


# --- maps -----------------------------------------------------------------------------------------

MINE = {
    "blk{layer}/norm": "attn_norm",
    "blk{layer}/v": "qkv_bias.v",
    "{layer}.scores": "attn_scores",
    "head": "lm_head",
    "tokens": "embedding",
    "a.b+(c)-{layer}": "made-up",
}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("blk0/norm", Place(0, "attn_norm")),
        ("blk12/norm", Place(12, "attn_norm")),
        ("blk3/v", Place(3, "qkv_bias", "v")),
        ("7.scores", Place(7, "attn_scores")),
        ("head", Place(None, "lm_head")),
        ("tokens", Place(0, "embedding")),
        ("a.b+(c)-1", Place(1, "made-up")),
    ],
)
def test_a_map_translates_files_and_layers(path: str, expected: Place) -> None:
    assert place(path, MINE) == expected


def test_the_names_known_anyway_are_known_beside_a_map() -> None:
    assert place("layer-1/attn_norm", MINE) == Place(1, "attn_norm")
    assert place("layer_1_attn_norm", MINE) == Place(1, "attn_norm")


def test_a_map_goes_before_the_names_known_anyway() -> None:
    swapped = {"layer-{layer}/attn_out": "attention", "layer-{layer}/attention": "attn_out"}
    assert place("layer-2/attn_out", swapped) == Place(2, "attention")
    assert place("layer-2/attention", swapped) == Place(2, "attn_out")


@pytest.mark.parametrize(
    "path",
    [
        "aXb+(c)-1",
        "blk/norm",
        "blk-1/norm",
        "blkx/norm",
        "blk{layer}/norm",
        "x/blk0/norm",
        "blk0/norm/x",
        "blk16384/norm",
    ],
)
def test_a_pattern_is_literal_but_for_the_layer_and_matches_all_of_a_path(path: str) -> None:
    assert place(path, MINE) is None


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_blocks_of_both_stages_that_have_some(part: str) -> None:
    for stage in ("qkv_matmul", "qkv_bias"):
        assert place("x-4", {"x-{layer}": f"{stage}.{part}"}) == Place(4, stage, part)


# --- the maps that come with the package ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("llama.cpp", "Qcur-0", Place(0, "q_post_rope")),
        ("llama.cpp", "Kcur-17", Place(17, "k_post_rope")),
        ("llama.cpp", "Vcur-0", Place(0, "qkv_bias", "v")),
        ("llama.cpp", "Qcur-0-MUL_MAT", Place(0, "qkv_matmul", "q")),
        ("llama.cpp", "Qcur-0-ADD", Place(0, "qkv_bias", "q")),
        ("llama.cpp", "Qcur-0-ROPE", Place(0, "q_post_rope")),
        ("llama.cpp", "kq-3", Place(3, "attn_scores")),
        ("llama.cpp", "kq_soft_max-3", Place(3, "attn_softmax")),
        ("llama.cpp", "kqv_out-3", Place(3, "attention")),
        ("llama.cpp", "kqv_out-3-MUL_MAT", Place(3, "attn_out")),
        ("llama.cpp", "embd", Place(0, "embedding")),
        ("llama.cpp", "ffn_inp-2", Place(2, "post_attn_residual")),
        ("llama.cpp", "ffn_swiglu-2", Place(2, "ffn_swigl")),
        ("llama.cpp", "ffn_swiglu-2-GLU", Place(2, "ffn_swigl")),
        ("llama.cpp", "ffn_silu-2-UNARY", Place(2, "ffn_silu")),
        ("llama.cpp", "ffn_gate_par-2", Place(2, "ffn_swigl")),
        ("llama.cpp", "ffn_out-2", Place(2, "ffn_out")),
        ("llama.cpp", "l_out-27-ADD", Place(27, "post_ffn_residual")),
        ("llama.cpp", "result_norm", Place(None, "final_norm")),
        ("llama.cpp", "result_output-MUL_MAT", Place(None, "lm_head")),
        ("llama.cpp", "layer-0/attn_norm", Place(0, "attn_norm")),
        ("hf", "model.embed_tokens", Place(0, "embedding")),
        ("hf", "model.layers.0.input_layernorm", Place(0, "attn_norm")),
        ("hf", "model.layers.27.self_attn.q_proj", Place(27, "qkv_bias", "q")),
        ("hf", "model.layers.27.self_attn.k_proj", Place(27, "qkv_bias", "k")),
        ("hf", "model.layers.0.self_attn.o_proj", Place(0, "attn_out")),
        ("hf", "model.layers.0.self_attn.o_proj.input", Place(0, "attention")),
        ("hf", "model.layers.3.post_attention_layernorm", Place(3, "ffn_norm")),
        ("hf", "model.layers.3.post_attention_layernorm.input", Place(3, "post_attn_residual")),
        ("hf", "model.layers.3.mlp.down_proj.input", Place(3, "ffn_swigl")),
        ("hf", "model.layers.3", Place(3, "post_ffn_residual")),
        ("hf", "model.norm", Place(None, "final_norm")),
        ("hf", "lm_head", Place(None, "lm_head")),
        ("hf", "layer-0/attn_softmax", Place(0, "attn_softmax")),
    ],
)
def test_names_of_llama_cpp_and_of_transformers(name: str, path: str, expected: Place) -> None:
    assert shipped(name, path) == expected


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.json")), ids=lambda file: file.stem)
def test_every_line_of_a_shipped_map_is_of_a_stage_that_exists(file: Path) -> None:
    for pattern, stage in json.loads(file.read_text()).items():
        found = shipped(file.stem, pattern.replace("{layer}", "5"))
        name, _, part = stage.partition(".")
        assert name in BY_NAME
        elsewhere = 0 if name == "embedding" else None
        assert found == Place(5 if "{layer}" in pattern else elsewhere, name, part or None)


RUN = """
attn_norm-2-MUL Qcur-2-MUL_MAT Qcur-2-ADD Qcur-2-ROPE Vcur-2-MUL_MAT Vcur-2-ADD Kcur-2-MUL_MAT
Kcur-2-ADD Kcur-2-ROPE kq-2-MUL_MAT kq_soft_max-2-SOFT_MAX kqv_out-2-CONT attn_out-2-MUL_MAT
ffn_inp-2-ADD ffn_norm-2-MUL ffn_gate-2-MUL_MAT ffn_up-2-MUL_MAT ffn_swiglu-2-GLU ffn_out-2-MUL_MAT
l_out-2-ADD result_norm-MUL result_output-MUL_MAT
"""
"""What the callback of the llama.cpp inside llama-cpp-python 0.3.36 saw from the last of three
layers on, names with operations appended; attn_out-2 was called node_109."""


def test_the_names_of_a_run_of_llama_cpp_are_every_stage_that_it_has() -> None:
    places = [shipped("llama.cpp", path) for path in RUN.split()]
    assert None not in places
    found = {place.stage for place in places if place}
    assert found == {stage.name for stage in (*LAYER, *HEAD)} - {"ffn_silu"}
    without = [shipped("llama.cpp", path.rpartition("-")[0]) for path in RUN.split()]
    assert {place.stage for place in without if place} == found - {"qkv_matmul"}


def test_a_map_of_ones_own_is_a_file_of_any_name(empty: Path) -> None:
    for name in ("mine.json", "mine", "x.bin"):
        (empty / name).write_text(json.dumps(MINE))
        for spec in (name, empty / name):
            found = names_from(spec).place(PurePosixPath("blk9/norm"))
            assert found == Place(9, "attn_norm")


def test_a_shipped_map_goes_before_a_file_and_a_path_is_always_a_file(empty: Path) -> None:
    (empty / "hf").write_text('{"x": "attn_out"}')
    assert shipped("hf", "x") == Place(None, "x")
    assert shipped("./hf", "x") == Place(None, "attn_out")
    (empty / "hf").unlink()
    (empty / "hf").mkdir()  # a dump may well be called so
    assert shipped("hf", "model.embed_tokens") == Place(0, "embedding")


def test_no_map_at_all_leaves_the_names_known_anyway() -> None:
    assert names_from(None).place(PurePosixPath("layer-0/x")) == Place(0, "x")
    assert names_from(None).place(PurePosixPath("Qcur-0-ROPE")) == Place(None, "Qcur-0-ROPE")


# --- maps that are none ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"null",
        b"[]",
        b'"attn_norm"',
        b'["attn_norm"]',
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"a": null}',
        b'{"a": ["attn_norm"]}',
        b'{"a": {"b": "attn_norm"}}',
        b'{"a": ""}',
        b'{"a": "attn norm"}',
        b'{"a": "../attn_norm"}',
        b'{"a": "layer-0/attn_norm"}',
        b'{"a": "attn_norm\\n"}',
        b'{"a": "attn_norm\\u001b[31m"}',
        b'{"a": "attn_norm{layer}"}',
        b'{"{layer}/{layer}": "attn_norm"}',
        b'{"a": "attn_norm.q"}',
        b'{"a": "attn_scores.v"}',
        b'{"a": "qkv_bias.x"}',
        b'{"a": "qkv_bias."}',
        b'{"a": "qkv_bias.q.k"}',
        b'{"a": "made_up.q"}',
    ],
)
def test_a_file_that_is_no_map(empty: Path, content: bytes) -> None:
    (empty / "mine.json").write_bytes(content)
    assert "mine.json" in refusal("mine.json")


def test_what_is_wrong_with_a_map_is_said(empty: Path) -> None:
    for content, named in (
        ('{"{layer}-{layer}": "attn_norm"}', "twice"),
        ('{"a": "attn_norm.q"}', "'attn_norm.q'"),
        ('{"a": "made_up.q"}', "made_up"),
    ):
        (empty / "mine.json").write_text(content)
        line = refusal("mine.json")
        assert "mine.json" in line
        assert named in line


@pytest.mark.parametrize(
    "spec", ["absent.json", "HF", "hf.json", "llama", "names/hf", "../names/hf", "./hf", "../hf"]
)
def test_a_map_that_does_not_exist_and_those_that_do(empty: Path, spec: str) -> None:
    line = refusal(spec)
    assert spec.removeprefix("./") in line
    assert "hf" in line
    assert "llama.cpp" in line


@pytest.mark.parametrize("spec", ["", ".", "/", "/dev/null", "/dev/zero", "hf\0", "x" * 300])
def test_a_map_that_cannot_be_a_file(empty: Path, spec: str) -> None:
    refusal(spec)


def test_a_map_that_nobody_writes_to(empty: Path, make_fifo: Callable[[Path], None]) -> None:
    make_fifo(empty / "mine.json")
    assert "mine.json" in refusal("mine.json")


def test_a_map_of_a_size_that_no_engine_needs(empty: Path) -> None:
    (empty / "mine.json").write_text("{" + " " * (1 << 20) + "}")
    assert "mine.json" in refusal("mine.json")
