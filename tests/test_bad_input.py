"""Bad input through the command line: one line, exit status 2, nothing written.

Every test here goes through `refused`, which checks all of that; a test itself says what the line
must name.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY, Cli
from safetensors.numpy import load_file, save_file

from qwenref.model.random_checkpoint import Shape

SHAPE = Shape(84, 6, 2, intermediate_size=16, num_hidden_layers=2, vocab_size=320)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LAYER_0 = "model.layers.0.self_attn"
EMBEDDING = "model.embed_tokens.weight"
PREFIX = "qwenref: error: "

Refused = Callable[..., str]
Change = Callable[[Path], object]


def listing(folder: Path) -> list[tuple[object, ...]]:
    """Return every entry below a directory, all but folders with size and time of change."""
    entries = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    return [
        (path,) if path.is_dir() else (path, state.st_size, state.st_mtime_ns)
        for path, state in entries
    ]


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Refused:
    """Run a command that must be refused, check how, and return what the line says."""

    def run(*arguments: object) -> str:
        before = listing(tmp_path)
        status, out, err = cli(*arguments)
        assert listing(tmp_path) == before
        assert out == ""
        assert err.startswith(PREFIX)
        assert err.endswith("\n")
        line = err[:-1]
        assert line.isprintable()
        assert "Traceback" not in line
        assert status == 2
        return line.removeprefix(PREFIX)

    return run


@pytest.fixture
def model(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "single", tmp_path / "model")


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "sharded", tmp_path / "sharded")


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v != "ABSENT"}))


def edit_tensors(model: Path, **changes: np.ndarray | None) -> None:
    tensors: dict[str, Any] = load_file(model / SINGLE) | changes
    save_file({name: v for name, v in tensors.items() if v is not None}, model / SINGLE)


def tensor(model: Path, name: str) -> np.ndarray:
    return load_file(model / SINGLE)[name]


def write_aprt(path: Path, layer: int, values: np.ndarray, count: int | None = None) -> Path:
    count = values.size if count is None else count
    path.write_bytes(struct.pack("<4sII", b"APRT", layer, count) + values.astype("<f4").tobytes())
    return path


# --- the command line itself ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["captrue"], "captrue"),
        (["capture", "extra"], "extra"),
        (["capture", "--layer", "0"], "--layer"),
        (["capture", "--no-such-option"], "--no-such-option"),
        (["capture", "--model"], "--model"),
        (["capture", "--tokens"], "--tokens"),
        (["capture", "-o"], "-o"),
        (["capture", "--force=yes"], "--force"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_a_command_that_cannot_be_parsed(
    refused: Refused, arguments: list[str], named: str
) -> None:
    assert named in refused(*arguments)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("attn_score", "attn_scores"), ("softmax", "attn_softmax"), ("q_rope", "q_post_rope")],
)
def test_an_unknown_stage_and_the_nearest(refused: Refused, wrong: str, right: str) -> None:
    line = refused("capture", "--stages", f"attn_norm,{wrong}")
    assert repr(wrong) in line
    assert f"did you mean {right!r}" in line
    assert "attn_out" in line


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [
        ("--dtype", "float8", ("float32", "float64", "bfloat16", "float16")),
        ("--dtype", "", ("float32", "float64")),
        ("--dtype", "Float32", ("float32", "float64")),
        ("--device", "tpu", ("auto", "cpu", "gpu")),
        ("--device", "cuda:0", ("auto", "cpu", "gpu")),
        ("--device", "", ("auto", "cpu", "gpu")),
        ("--layout", "llama", ("apr", "hf")),
        ("--layout", "HF", ("apr", "hf")),
        ("--stages", "", ("attn_norm", "attn_out")),
        ("--stages", "ALL", ("attn_norm", "attn_out")),
    ],
)
def test_an_unknown_value_and_the_choices(
    refused: Refused, option: str, value: str, choices: tuple[str, ...]
) -> None:
    line = refused("capture", option, value)
    assert repr(value) in line
    for choice in choices:
        assert choice in line


@pytest.mark.parametrize(
    ("device", "platforms", "missing"),
    [
        ("gpu", "cpu", "gpu"),
        ("gpu", "", "gpu"),
        ("gpu", "nonsense", "gpu"),
        ("auto", "nonsense", "device"),
        ("auto", "cuda", "device"),
    ],
)
def test_a_device_that_is_absent_is_an_error(
    device: str, platforms: str, missing: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "qwenref", "capture", "--device", device]
    hidden = os.environ | {"JAX_PLATFORMS": platforms, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=tmp_path, env=hidden, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{PREFIX}no {missing} here; JAX finds: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", "a", "0..", "-1", "1.5", "0..0", "3..1", "0;1", "9" * 5000])
def test_layers_that_are_none(refused: Refused, spec: str) -> None:
    line = refused("capture", f"--layers={spec}")
    assert "--layers" in line


@pytest.mark.parametrize("spec", ["3", "0,3", "0..4", "80", "2..5"])
def test_a_layer_that_the_checkpoint_lacks(refused: Refused, spec: str) -> None:
    line = refused("capture", "--layers", spec)
    assert "does not exist" in line
    assert "3 layers" in line


def test_the_embedding_of_a_layer_that_has_none(refused: Refused) -> None:
    line = refused("capture", "--layers", "1", "--stages", "embedding")
    assert "embedding is a stage of layer 0; name other --stages" in line


def test_logits_of_neither_one_token_nor_all(refused: Refused) -> None:
    line = refused("capture", "--stages", "lm_head", "--logits", "first")
    assert "'first': give all, or last" in line


# --- prompts and tokens ---------------------------------------------------------------------------


def test_prompt_and_tokens_together(refused: Refused) -> None:
    line = refused("capture", "--prompt", "a", "--tokens", "1")
    assert "--prompt" in line
    assert "--tokens" in line
    assert "both" in line
    refused("capture", "--prompt", "", "--tokens", "1")


@pytest.mark.parametrize(
    ("tokens", "named"),
    [
        ("1,2.5", "'2.5'"),
        ("1,-2", "'-2'"),
        ("hello", "'hello'"),
        ("[1, true]", "bool"),
        ("[1", "--tokens"),
        ("", "no token ids"),
        ("[]", "no token ids"),
        ("[\udcff]", "--tokens"),
        ("\udcff", "whole number"),
        ("@", "regular file"),
        ("@absent", "absent"),
        ("@/dev/zero", "/dev/zero"),
        ("@" + "x" * 300, "xxx"),
    ],
)
def test_tokens_that_are_none(refused: Refused, tokens: str, named: str) -> None:
    assert named in refused("capture", f"--tokens={tokens}")


@pytest.mark.parametrize("tokens", ["320", "0,1,320", "4294967295", "[-1]", f"[{10**30}]"])
def test_a_token_id_out_of_range(refused: Refused, tokens: str) -> None:
    line = refused("capture", "--tokens", tokens)
    assert "out of range" in line
    assert "0 to 319" in line


def test_a_token_id_out_of_range_given_by_the_tokenizer(refused: Refused, model: Path) -> None:
    edit_config(model, vocab_size=100)
    edit_tensors(model, **{EMBEDDING: tensor(model, EMBEDDING)[:100]})
    assert "token id 104 is out of range" in refused("capture", "--model", model)


def test_an_empty_prompt(refused: Refused) -> None:
    assert "empty" in refused("capture", "--prompt", "")


def test_a_prompt_that_is_no_unicode_text(refused: Refused) -> None:
    assert "prompt" in refused("capture", "--prompt", "a\udcff")


def test_no_tokenizer_and_a_broken_one(refused: Refused, model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refused("capture", "--model", model)
    (model / "tokenizer.json").unlink()
    line = refused("capture", "--model", model, "--prompt", "a")
    assert f"{model / 'tokenizer.json'}" in line
    assert "--tokens" in line


# --- too many tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        ("all", "attn_scores"),
        ("attn_scores", "attn_scores"),
        ("attn_softmax,attn_out", "attn_softmax"),
    ],
)
def test_more_scores_than_a_file_can_count_are_refused_before_any_work(
    refused: Refused, tmp_path: Path, stages: str, named: str
) -> None:
    file = tmp_path / "ids"
    file.write_text("7 " * 26_755)
    tracemalloc.start()
    try:
        line = refused("capture", "--tokens", f"@{file}", "--stages", stages)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50_000_000
    assert line.startswith(named)
    assert "26755 tokens" in line
    assert f"{6 * 26_755**2}" in line
    assert f"{2**32 - 1}" in line


def test_as_many_tokens_are_no_trouble_for_a_stage_that_a_file_can_count(
    cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "ids").write_text("7 " * 26_755)
    done = cli("capture", "--tokens", f"@{tmp_path / 'ids'}", "--stages", "attn_norm", "-o", "d")
    assert (done.status, done.err) == (0, "")
    assert Path("d/layer-0/attn_norm.bin").stat().st_size == 12 + 4 * 26_755 * 84


# --- --input --------------------------------------------------------------------------------------

STREAM = np.linspace(-1, 1, 5 * 84, dtype=np.float32)


def test_an_input_that_cannot_be_read(refused: Refused, tmp_path: Path) -> None:
    for path in ("absent", tmp_path, "/dev/zero", "x" * 300):
        assert f"{path}" in refused("capture", "--input", path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"APRT",
        b"APRT" + bytes(7),
        b"APRT" + bytes(8),
        b"APRT" + struct.pack("<II", 0, 84) + bytes(4 * 83),
        b"APRT" + struct.pack("<II", 0, 84) + bytes(4 * 84 + 1),
        b"APRT" + struct.pack("<II", 0, 0xFFFFFFFF) + bytes(4 * 84),
        b"APR\0" + struct.pack("<II", 0, 84) + bytes(4 * 84),
        b"TRPA" + struct.pack(">II", 0, 84) + bytes(4 * 84),
        b"\x93NUMPY\x01\0" + bytes(400),
    ],
)
def test_an_input_that_is_no_aprt_file(refused: Refused, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.bin").write_bytes(content)
    assert "in.bin" in refused("capture", "--input", tmp_path / "in.bin")


@pytest.mark.parametrize("count", [1, 83, 85, 84 * 5 + 1])
def test_an_input_of_the_wrong_size(refused: Refused, tmp_path: Path, count: int) -> None:
    path = write_aprt(tmp_path / "in.bin", 0, np.ones(count))
    line = refused("capture", "--input", path)
    assert f"{count} values" in line
    assert "hidden_size 84" in line


@pytest.mark.parametrize(("layer", "mark"), [("1", 2), ("2", 0), ("0", 1), ("1", 0xFFFFFFFE)])
def test_an_input_of_another_layer(refused: Refused, tmp_path: Path, layer: str, mark: int) -> None:
    path = write_aprt(tmp_path / "in.bin", mark, STREAM)
    line = refused("capture", "--input", path, "--layers", layer)
    assert f"layer {mark}" in line
    assert f"layer {layer}" in line


@pytest.mark.parametrize(
    ("name", "mark", "layer"),
    [
        ("post_ffn_residual", 1, "1"),  # what leaves layer 1, one layer too far
        ("post_ffn_residual", 0, "0"),
        ("embedding", 0, "1"),
        ("attn_norm", 0, "0"),
        ("attn_out", 0, "1"),
        ("final_norm", 0xFFFFFFFF, "0"),
        ("lm_head", 0, "0"),
        *((name, 0, "1") for name in ("post_attn_residual", "ffn_norm", "ffn_swigl", "ffn_out")),
        ("layer_0_attn_norm", 0, "0"),
        ("layer_1_post_ffn_residual", 1, "1"),
    ],
)
def test_an_input_that_is_another_stage_of_apr(
    refused: Refused, tmp_path: Path, name: str, mark: int, layer: str
) -> None:
    path = write_aprt(tmp_path / f"{name}.bin", mark, STREAM)
    line = refused("capture", "--input", path, "--layers", layer)
    assert f"{name}.bin" in line
    assert f"is not what enters layer {layer}" in line


def test_an_input_for_a_layer_that_the_checkpoint_lacks(refused: Refused, tmp_path: Path) -> None:
    path = write_aprt(tmp_path / "in.bin", 2, STREAM)
    assert "does not exist" in refused("capture", "--input", path, "--layers", "3")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_input_that_holds_nan(refused: Refused, tmp_path: Path, bad: float) -> None:
    values = STREAM.copy()
    values[[3, 200]] = bad
    path = write_aprt(tmp_path / "in.bin", 0, values)
    assert "in.bin holds 2 NaN" in refused("capture", "--input", path)


@pytest.mark.parametrize("stages", ["embedding", "embedding,attn_norm", "embedding,mlp"])
def test_an_input_is_the_embedding(refused: Refused, tmp_path: Path, stages: str) -> None:
    path = write_aprt(tmp_path / "in.bin", 0, STREAM)
    line = refused("capture", "--input", path, "--stages", stages)
    assert "leave embedding out of --stages" in line
    line = refused("capture", "--input", path, "--stages", "embedding", "--layers", "1")
    assert "embedding is a stage of layer 0" in line


def test_an_input_of_another_number_of_tokens(refused: Refused, tmp_path: Path) -> None:
    path = write_aprt(tmp_path / "in.bin", 0, STREAM)
    line = refused("capture", "--input", path, "--tokens", "1,2,3,4")
    assert "5 tokens" in line
    assert "4 were given" in line
    assert "5 tokens" in refused("capture", "--input", path, "--prompt", "four")
    assert "out of range" in refused("capture", "--input", path, "--tokens", "1,2,3,4,320")


def test_an_input_with_more_scores_than_a_file_can_count(refused: Refused, tmp_path: Path) -> None:
    path = write_aprt(tmp_path / "in.bin", 1, np.ones(26_755 * 84))
    line = refused("capture", "--input", path, "--layers", "1")
    assert "26755 tokens" in line


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent", "absent.safetensors", "", "x" * 300, "/dev/null"])
def test_no_such_model(refused: Refused, name: str) -> None:
    line = refused("capture", "--model", name)
    assert "no model" in line or "no weights" in line or "config.json" in line


def test_a_model_without_config_or_weights(refused: Refused, model: Path) -> None:
    (model / "config.json").rename(model / "away")
    assert f"{model / 'config.json'}" in refused("capture", "--model", model)
    assert f"{model / 'config.json'}" in refused("capture", "--model", model / SINGLE)
    (model / "away").rename(model / "config.json")
    (model / SINGLE).unlink()
    assert "no weights" in refused("capture", "--model", model)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_config_that_is_no_json_object(refused: Refused, model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    assert "config.json" in refused("capture", "--model", model)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "Qwen2VL"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"head_dim": 7}, "odd"),
        ({"hidden_size": 85}, "hidden_size 85"),
        ({"hidden_size": -84}, "hidden_size"),
        ({"hidden_size": 1 << 40}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"vocab_size": "ABSENT"}, "vocab_size"),
        ({"rope_theta": "ABSENT"}, "rope_theta"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "disagrees"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6}}, "dynamic"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"is_causal": False}, "is_causal"),
        (
            {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 0},
            "sliding window of 11 tokens",
        ),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}, "sliding window of 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_is_not_plain_qwen2_or_contradicts_itself(
    refused: Refused, model: Path, changes: dict[str, Any], named: str
) -> None:
    edit_config(model, **changes)
    assert named in refused("capture", "--model", model)


def test_a_window_that_hides_nothing_is_no_trouble(cli: Cli, model: Path) -> None:
    edit_config(model, use_sliding_window=True, sliding_window=12, max_window_layers=0)
    done = cli("capture", "--model", model, "--stages", "attn_norm")
    assert (done.status, done.err) == (0, "")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def garble(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, garble, empty, directory, Path.unlink])
def test_weights_that_are_damaged_or_missing(
    refused: Refused, model: Path, sharded: Path, damage: Change
) -> None:
    for number in (1, 4):
        shard = sharded / f"model-{number:05}-of-00004.safetensors"
        shutil.copyfile(shard, sharded / "away")
        damage(shard)
        line = refused("capture", "--model", sharded)
        assert f"{shard}" in line
        if shard.is_dir():
            shard.rmdir()
        (sharded / "away").replace(shard)
    damage(model / SINGLE)
    assert f"{model}" in refused("capture", "--model", model)


@pytest.mark.parametrize(
    "shard",
    [
        "/etc/passwd",
        "/etc/passwd.safetensors",
        "../model/model.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "x\0.safetensors",
        "",
        "model-00001-of-00004.safetensors",
        "absent.safetensors",
        "x" * 300 + ".safetensors",
    ],
    ids=lambda shard: ascii(shard[:20]),
)
def test_an_index_that_lies(refused: Refused, sharded: Path, shard: str) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    line = refused("capture", "--model", sharded)
    assert "index.json" in line or "shard" in line
    assert shard[:20].replace("\\", "\\\\").replace("\0", "\\x00") in line


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"weight_map": {"a": 1}}', b"\xff"])
def test_an_index_that_is_none(refused: Refused, sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    assert f"{sharded / INDEX}" in refused("capture", "--model", sharded)


def test_all_problems_of_the_weights_are_in_one_line(refused: Refused, model: Path) -> None:
    edit_tensors(
        model,
        **{
            f"{LAYER_0}.q_proj.weight": None,
            f"{LAYER_0}.k_proj.bias": None,
            f"{LAYER_0}.v_proj.weight": np.ones((28, 83), np.float32),
            f"{LAYER_0}.o_proj.weight": np.ones((84, 84), np.int8),
            EMBEDDING: np.ones((319, 84), np.float32),
        },
    )
    line = refused("capture", "--model", model)
    assert f"{LAYER_0}.q_proj.weight is missing" in line
    assert f"{LAYER_0}.k_proj.bias is missing" in line
    assert f"{LAYER_0}.v_proj.weight has shape [28, 83], the config says [28, 84]" in line
    assert f"{LAYER_0}.o_proj.weight is stored as I8" in line
    assert f"{EMBEDDING} has shape [319, 84], the config says [320, 84]" in line


@pytest.mark.parametrize("name", [f"{LAYER_0}.v_proj.bias", f"{LAYER_0}.o_proj.weight", EMBEDDING])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_a_weight_that_is_read(refused: Refused, model: Path, name: str, bad: float) -> None:
    values = tensor(model, name).copy()
    values[87 if name == EMBEDDING else 5] = bad
    count = 1 if values.ndim == 1 else 84
    edit_tensors(model, **{name: values})
    assert f"{name} holds {count} NaN or infinite" in refused("capture", "--model", model)


def test_folders_made_for_the_output_are_gone_after_a_refusal(
    refused: Refused, model: Path
) -> None:
    values = tensor(model, f"{LAYER_0}.q_proj.bias").copy()
    values[0] = np.nan
    edit_tensors(model, **{f"{LAYER_0}.q_proj.bias": values})
    assert "NaN" in refused("capture", "--model", model, "-o", "a/b/c")


# --- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_an_output_that_holds_something_else(
    refused: Refused, tmp_path: Path, force: list[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("text")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "not empty" in refused("capture", "-o", tmp_path / "mine", *force)
    for name in ("file", "dangling", "file/below"):
        assert name in refused("capture", "-o", tmp_path / name, *force)
    assert "cannot write" in refused("capture", "-o", "/proc/qwenref", *force)
    assert "cannot write" in refused("capture", "-o", "x" * 300, *force)


def test_an_output_that_holds_a_dump_is_kept_without_force(
    cli: Cli, refused: Refused, tmp_path: Path
) -> None:
    assert cli("capture", "-o", tmp_path / "dump", "--stages", "attn_norm").status == 0
    assert "--force" in refused("capture", "-o", tmp_path / "dump", "--stages", "attn_norm")


def test_the_default_output_is_refused_like_any_other(cli: Cli, refused: Refused) -> None:
    Path("tiny-qwen2.5-qwenref").mkdir()
    Path("tiny-qwen2.5-qwenref/notes").write_text("mine")
    assert "tiny-qwen2.5-qwenref" in refused("capture")
    assert Path("tiny-qwen2.5-qwenref/notes").read_text() == "mine"


# --- names that would steer the terminal ----------------------------------------------------------

EVIL = "x\x1b[31m\r\n\x07\x9b2J\u202e\u2028\ud800"
"""Colours, bells, new lines, a change of direction, and half a character."""
ON_DISK = EVIL.replace("\ud800", "\udcff")
SHOWN = r"\x1b[31m\r\n\x07\x9b2J\u202e\u2028"


@pytest.mark.parametrize(
    "option",
    ["--stages", "--dtype", "--device", "--layout", "--layers", "--tokens", "--model", "--input"],
)
def test_strange_characters_in_an_option_are_shown_escaped(refused: Refused, option: str) -> None:
    assert "\\x1b[31m" in refused("capture", option, ON_DISK)


def test_strange_characters_in_an_unknown_option_are_shown_escaped(refused: Refused) -> None:
    assert "\\x1b[31m" in refused("capture", f"--{ON_DISK}")
    assert "\\x1b[31m" in refused(ON_DISK)


def test_strange_characters_in_a_file_name_are_shown_escaped(
    refused: Refused, model: Path, tmp_path: Path
) -> None:
    ids = tmp_path / f"{ON_DISK}.txt"
    ids.write_text("1,x")
    (tmp_path / ON_DISK).mkdir()
    (tmp_path / ON_DISK / ON_DISK).write_text("")
    assert "'x'" in refused("capture", "--tokens", f"@{ids}")
    assert SHOWN in refused("capture", "--tokens", f"@{tmp_path / ON_DISK}")
    assert SHOWN in refused("capture", "-o", tmp_path / ON_DISK)
    assert SHOWN in refused("capture", "--model", tmp_path / ON_DISK)
    assert SHOWN in refused("capture", "--input", ids)
    edit_tensors(model, **{f"{LAYER_0}.q_proj.weight": None})
    strange = model.rename(tmp_path / f"model {ON_DISK}")
    assert SHOWN in refused("capture", "--model", strange)


def test_strange_characters_in_a_config_are_shown_escaped(refused: Refused, model: Path) -> None:
    text = EVIL[:-1]
    for changes in (
        {"model_type": text},
        {"model_type": "qwen2", "architectures": [text]},
        {"architectures": None, "rope_scaling": {"type": text}},
        {"rope_scaling": {text: 1}},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": text}},
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": text}},
    ):
        edit_config(model, **changes)
        line = refused("capture", "--model", model)
        assert "x1b[31m" in line


def test_strange_characters_in_an_index_are_shown_escaped(refused: Refused, sharded: Path) -> None:
    text = EVIL[:-1]
    shard = "model-00001-of-00004.safetensors"
    original = json.loads((sharded / INDEX).read_text())["weight_map"]
    for name, file in (
        (text, shard),
        (text, text),
        (text, f"{text}.safetensors"),
        ("lm_head.weight", f"{text}.safetensors"),
        ("lm_head.weight", f"../{text}"),
    ):
        (sharded / INDEX).write_text(json.dumps({"weight_map": original | {name: file}}))
        assert "x1b[31m" in refused("capture", "--model", sharded)


def test_strange_characters_in_a_header_are_shown_escaped(refused: Refused, model: Path) -> None:
    header = {f"{LAYER_0}.q_proj.weight": {"dtype": EVIL[:-1], "shape": [], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (model / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text)
    assert f"{model / SINGLE}" in refused("capture", "--model", model)


def test_strange_characters_in_a_tokenizer_are_shown_escaped(refused: Refused, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = EVIL[:-1]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer.json" in refused("capture", "--model", model)
    tokenizer["normalizer"] = {"type": EVIL[:-1]}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer.json" in refused("capture", "--model", model)


def test_nothing_but_the_error_is_said_of_the_bundled_checkpoint(refused: Refused) -> None:
    assert TINY.is_dir()
    for options in (["--json"], ["-q"], ["--json", "-q", "--force"]):
        assert "out of range" in refused("capture", "--tokens", "320", *options)
