"""Whole models, explained layer by layer; `qwenref selftest` plants faults in more of them."""

import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import capture_hf
import numpy as np
import pytest
from engines import DATA
from helpers import TINY

from qwenref import QwenrefError, explain, explain_layers, read_aprt, write_aprt
from qwenref.capture import capture
from qwenref.mistakes.mistake import Mistake
from qwenref.model.random_checkpoint import TINY as SHAPE
from qwenref.model.random_checkpoint import Shape, write
from qwenref.oracle import computing
from qwenref.planting import Engine, Plant
from qwenref.stages import ATTENTION, LAYER, LEAVING
from qwenref.trial.explanation import LayersExplanation
from qwenref.trial.layer_words import layers_report

WIDE = Shape(256, 4, 2, 512, 2, 320, seed=26)
"""The model of the quantised dump."""

TOKENS = [*b"What is 2+2?"]
MASKED = ("attn_scores", "attn_softmax")

EVERYTHING = {"force": False, "layout": "apr", "layers": "all", "stages": "all", "prompt": None}


def origins(found: LayersExplanation) -> list[tuple[int | None, str]]:
    return [(of.layer, of.stage) for of in found.origins]


def statuses(found: LayersExplanation, layer: int | None) -> dict[str, str]:
    (part,) = (part for part in found.parts if part.layer == layer)
    return {of.stage: of.status for of in part.stages}


def from_hf(model: Path, output: Path, dtype: str, tokens: str) -> Path:
    capture_hf.capture(
        Namespace(model=model, tokens=tokens, dtype=dtype, output=output, **EVERYTHING)
    )
    return output


# Healthy engines


def test_a_quantised_engine_has_rounded_weights_in_every_layer(tmp_path: Path) -> None:
    write(tmp_path / "model", WIDE)
    found = explain_layers(DATA / "apr-q4k", model=tmp_path / "model")
    assert (found.verdict, found.origins) == ("agree", []), layers_report(found)
    assert found.reason.endswith(", but for rounded weights")
    *layers, head = (part.weight_noise for part in found.parts)
    for noise in layers:
        assert noise is not None
        bits = [getattr(noise, name) for name in ("q", "k", "o", "gate", "up", "down")]
        assert all(3 < of < 7 for of in bits), bits
    assert head is not None
    assert head.lm_head is not None


@pytest.mark.parametrize(
    ("dtype", "tied"), [("float32", True), ("bfloat16", False), ("float16", True)]
)
def test_transformers_in_depth(tmp_path: Path, dtype: str, tied: bool) -> None:
    shape = replace(SHAPE, num_hidden_layers=8, tie_word_embeddings=tied, seed=3)
    write(tmp_path / "model", shape, dtype=dtype)
    dump = from_hf(tmp_path / "model", tmp_path / "hf", dtype, "5,17,17,300,2,9")
    found = explain_layers(dump, model=tmp_path / "model")
    assert (found.verdict, found.exit_status) == ("agree", 0), layers_report(found)
    assert [part.layer for part in found.parts] == [*range(8), None]


def test_a_dump_without_a_model_is_judged_where_no_weights_are_needed(tmp_path: Path) -> None:
    capture(TINY, tmp_path / "ours", layers=None, stages=None)
    found = explain_layers(tmp_path / "ours")
    assert found.verdict == "incomplete"
    assert found.reason.count("could not be judged: give the checkpoint with --model") == 2
    assert statuses(found, 1)["post_attn_residual"] == "agree"
    assert statuses(found, 1)["ffn_gate"] == "unmeasured"


def test_layers_whose_input_was_not_dumped_are_unmeasured_and_the_others_agree(
    tmp_path: Path,
) -> None:
    shutil.copytree(DATA / "apr-f32", tmp_path / "dump")
    for name in ("post_attn_residual", "post_ffn_residual", "ffn_out"):
        (tmp_path / "dump" / "layer-0" / f"{name}.bin").unlink()
    found = explain_layers(tmp_path / "dump", model=TINY)
    assert found.verdict == "incomplete"
    assert statuses(found, 1)["attn_norm"] == "unmeasured"
    assert statuses(found, 1)["qkv_matmul"] == "agree"
    assert set(statuses(found, 2).values()) == {"agree"}


def test_a_stream_that_was_not_dumped_is_computed_from_its_two_parts(tmp_path: Path) -> None:
    shutil.copytree(DATA / "apr-f32", tmp_path / "dump")
    (tmp_path / "dump" / "layer-0" / "post_ffn_residual.bin").unlink()
    found = explain_layers(tmp_path / "dump", model=TINY)
    assert statuses(found, 1)["attn_norm"] == "agree"
    assert found.verdict == "agree"


def test_hidden_states_alone_are_bridged(tmp_path: Path) -> None:
    for path in (DATA / "apr-f32").rglob("*.bin"):
        if path.stem in ("embedding", "post_ffn_residual", "lm_head"):
            target = tmp_path / path.relative_to(DATA / "apr-f32")
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
    found = explain_layers(tmp_path, model=TINY)
    assert (found.verdict, found.origins) == ("agree", []), layers_report(found)
    last = found.parts[1].stages[-1]
    assert (last.stage, last.status, last.computed_from) == (
        *("post_ffn_residual", "agree", ["residual"]),
    )


# Faults


def changed(tmp_path: Path, file: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    folder = tmp_path / "dump"
    shutil.copytree(DATA / "apr-f32", folder)
    layer, values = read_aprt(folder / file)
    (folder / file).unlink()
    write_aprt(folder / file, layer, change(values).astype(np.float32))
    return folder


def test_a_stream_whose_file_alone_is_wrong_is_not_taken_for_a_fault(tmp_path: Path) -> None:
    dump = changed(tmp_path, "layer-1/post_ffn_residual.bin", lambda x: np.roll(x, 84))
    found = explain_layers(dump, model=TINY)
    assert origins(found) == [(1, "post_ffn_residual")]
    assert statuses(found, 1)["post_ffn_residual"] == "dumped_wrong"
    assert set(statuses(found, 2).values()) == {"agree"}
    assert "is wrong, but what was computed from it is right" in found.reason


def test_a_wrong_file_in_the_mlp_is_told_from_a_wrong_stage(tmp_path: Path) -> None:
    dump = changed(tmp_path, "layer-2/ffn_up.bin", lambda x: x[::-1])
    found = explain_layers(dump, model=TINY)
    assert origins(found) == [(2, "ffn_up")]
    assert statuses(found, 2)["ffn_up"] == "dumped_wrong"


def test_lm_head_is_named_where_all_layers_agree(tmp_path: Path) -> None:
    from qwenref.model.checkpoint import Checkpoint
    from qwenref.model.weights import HEAD

    matrix = Checkpoint(TINY).rows_at(HEAD, range(320)).astype(np.float64)
    _, normed = read_aprt(DATA / "apr-f32" / "final_norm.bin")
    transposed = normed.reshape(-1, 84)[-1] @ matrix.reshape(84, 320)
    dump = changed(tmp_path, "lm_head.bin", lambda _: transposed)
    found = explain_layers(dump, model=TINY)
    assert origins(found) == [(None, "lm_head")]
    first, cause, *_ = found.summary
    assert first.startswith("layers 0 to 2 agree; the head: lm_head adds the error (")
    assert "the product with the transposed matrix" in cause


def test_what_follows_a_fault_only_inherits_it() -> None:
    found = explain_layers(DATA / "apr-rope-interleaved", model=TINY)
    assert origins(found) == [(0, "q_post_rope"), (0, "k_post_rope")]
    assert statuses(found, 0)["attn_out"] == "inherited"
    assert found.parts[-1].layer == 0


def test_other_tokens_are_recovered() -> None:
    ran = explain_layers(DATA / "apr-f32", model=TINY).tokens or []
    found = explain_layers(DATA / "apr-f32", model=TINY, tokens=[*ran[:3], 7, *ran[4:]])
    assert origins(found) == [(0, "embedding")]
    assert any(line.startswith(f"Your engine ran {ran}, not [") for line in found.summary)


def engine(folder: Path, *mistakes: tuple[int | None, Mistake]) -> Path:
    """Dump an engine that makes mistakes, in all of their stages."""
    plants = {layer: Plant(of, None, of.stages) for layer, of in mistakes}
    folder.mkdir()
    with computing("float64", "cpu"):
        Engine(TINY, TOKENS, "float32").dump(plants, folder, "apr")
    return folder


def mistake(**stages: Callable[..., np.ndarray]) -> Mistake:
    """Return what makes these stages of what they should be and of what they are computed from."""
    run = lambda s: stages[s.stage](s.right(*s.given), *s.given)  # noqa: E731
    return Mistake("test", tuple(stages), "a test", "", "", run)


def noisy(right: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return right + 0.1 * np.random.default_rng(1).standard_normal(right.shape)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("first", [lambda right, _: 1.05 * right, noisy])
@pytest.mark.parametrize("second", [lambda _, x, y: 2 * x + y, noisy])
def test_two_stages_of_a_layer(
    tmp_path: Path, layer: int, first: Callable[..., np.ndarray], second: Callable[..., np.ndarray]
) -> None:
    """One of them must not acquit the other: the engine went on with both."""
    both = mistake(attn_out=first, post_attn_residual=second)
    dump = engine(tmp_path / "dump", (layer, both))
    found = explain(dump, model=TINY, tokens=TOKENS, layer=layer, quick=True)
    wrong = {of.stage: of.status for of in found.stages if of.stage in found.origins}
    assert wrong == {"attn_out": "added", "post_attn_residual": "added"}, found.summary


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("wrong", [lambda _, x, y: x + 1.3 * y, noisy])
def test_a_wrong_stream_that_was_not_dumped(
    tmp_path: Path, layer: int, wrong: Callable[..., np.ndarray]
) -> None:
    dump = engine(tmp_path / "dump", (layer, mistake(post_ffn_residual=wrong)))
    (dump / f"layer-{layer}" / "post_ffn_residual.bin").unlink()
    found = explain_layers(dump, model=TINY, tokens=TOKENS, quick=True)
    first = (layer + 1, "attn_norm") if layer < 2 else (None, "final_norm")
    assert origins(found)[0] == first, layers_report(found)
    assert f"{first[1]} (somewhere between the layer before and it)" in found.reason
    assert found.parts[layer].verdict == "incomplete"


def test_what_inherits_an_error_of_an_earlier_layer_is_not_said_to_come_after(
    tmp_path: Path,
) -> None:
    late = mistake(attn_out=lambda right, _: 1.05 * right)
    early = mistake(ffn_silu=lambda _, gate: gate)
    found = explain_layers(
        engine(tmp_path / "dump", (0, early), (1, late)), model=TINY, tokens=TOKENS, quick=True
    )
    assert origins(found) == [(0, "ffn_silu"), (1, "attn_out")]
    assert found.parts[1].reason.endswith(
        "Before it, attn_norm .. attention inherit an error of an earlier layer; "
        "post_attn_residual .. post_ffn_residual only inherit it."
    )


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_nothing_but_zeros_or_nan_is_not_said_to_be_another_stage(
    tmp_path: Path, value: float
) -> None:
    nothing = mistake(attn_norm=lambda right, _: np.full_like(right, value))
    dump = engine(tmp_path / "dump", (1, nothing))
    found = explain(dump, model=TINY, tokens=TOKENS, layer=1, quick=True)
    assert found.origins[0] == "attn_norm"
    (wrong,) = (of for of in found.stages if of.stage == "attn_norm")
    assert wrong.cause is not None
    assert wrong.cause.id == ("any-not-finite" if value else "any-zeros")


# What is not there


def without(tmp_path: Path, *files: str) -> Path:
    shutil.copytree(DATA / "apr-f32", tmp_path / "dump")
    for file in files:
        (tmp_path / "dump" / file).unlink()
    return tmp_path / "dump"


def test_a_head_without_lm_head_is_no_pass(tmp_path: Path) -> None:
    dump = without(tmp_path, "lm_head.bin")
    found = explain_layers(dump, model=TINY, quick=True)
    assert (found.verdict, found.exit_status) == ("incomplete", 2)
    assert found.reason == "the head: no stage is wrong, but lm_head was not dumped"


@pytest.mark.parametrize("count", [100, 384])
def test_logits_of_another_vocabulary_are_no_pass(tmp_path: Path, count: int) -> None:
    dump = without(tmp_path, "lm_head.bin")
    write_aprt(dump / "lm_head.bin", None, np.ones(count, np.float32))
    reason = f"lm_head cannot be used: {count} values, but 12 tokens make 3840, and 320 the last of"
    assert reason in explain_layers(dump, model=TINY, quick=True).reason
    (dump / "final_norm.bin").unlink()
    assert reason in explain_layers(dump, model=TINY, quick=True).reason


def test_a_layer_that_ends_with_attention_where_others_go_on_is_no_pass(tmp_path: Path) -> None:
    files = [f"layer-2/{stage.name}.bin" for stage in LAYER if stage not in ATTENTION]
    found = explain_layers(without(tmp_path, *files), model=TINY, layers=[0, 1, 2], quick=True)
    assert found.verdict == "incomplete"
    assert found.reason.endswith("post_attn_residual .. post_ffn_residual were not dumped")


def test_attention_alone_needs_no_more(tmp_path: Path) -> None:
    files = [
        *(f"layer-1/{stage.name}.bin" for stage in LAYER if stage not in ATTENTION),
        *(f"layer-0/{stage.name}.bin" for stage in LAYER if stage != LEAVING),
    ]
    dump = without(tmp_path, *files)
    shutil.rmtree(dump / "layer-2")
    assert explain(dump, model=TINY, layer=1, quick=True).verdict == "agree"


@pytest.mark.parametrize(
    "pattern", ["*/*.bin", "layer-0/post_ffn_residual.bin", "layer-2/post_ffn_residual.bin"]
)
def test_the_last_token_alone_is_no_fault(tmp_path: Path, pattern: str) -> None:
    dump = without(tmp_path)
    for path in [*dump.glob(pattern)]:
        layer, values = read_aprt(path)
        rows = values.reshape((6, 12, 12) if path.stem in MASKED else (12, -1))
        path.unlink()
        write_aprt(path, layer, rows[:, -1:] if path.stem in MASKED else rows[-1:])
    found = explain_layers(dump, model=TINY, quick=True)
    assert (found.verdict, found.origins) == ("incomplete", []), layers_report(found)


def test_parts_that_are_not_there_are_refused(tmp_path: Path) -> None:
    dump = without(tmp_path, "final_norm.bin", "lm_head.bin", "layer-2/post_ffn_residual.bin")
    with pytest.raises(QwenrefError, match="holds no stage of the head"):
        explain(dump, model=TINY, layer=None)
    with pytest.raises(QwenrefError, match="layer -1 does not exist"):
        explain(dump, model=TINY, layer=-1)


def test_no_layers_are_refused() -> None:
    with pytest.raises(QwenrefError, match="no layer was asked for"):
        explain_layers(DATA / "apr-f32", model=TINY, layers=[])


# What cannot be used


def test_a_dump_of_no_layer_is_refused(tmp_path: Path) -> None:
    write_aprt(tmp_path / "other.bin", None, np.zeros(4, np.float32))
    with pytest.raises(QwenrefError, match="holds no stage of any layer"):
        explain_layers(tmp_path, model=TINY)


def test_tokens_of_another_number_are_incomparable(tmp_path: Path) -> None:
    found = explain_layers(DATA / "apr-f32", model=TINY, tokens=[1, 2, 3])
    assert (found.verdict, found.exit_status) == ("incomparable", 2)
    assert "the dump has 12 tokens, and the prompt 3" in found.reason


@pytest.mark.parametrize("names", [("qkv_matmul", "qkv_bias"), ("post_attn_residual", "ffn_norm")])
def test_two_rounded_stages_whose_input_is_unknown(tmp_path: Path, names: tuple[str, str]) -> None:
    dump = from_hf(TINY, tmp_path / "hf", "bfloat16", "5,17,2")
    arrays = {f"layer_1_{name}": read_aprt(dump / "layer-1" / f"{name}.bin")[1] for name in names}
    found = explain_layers(arrays, model=TINY, tokens=[5, 17, 2], layers=[1])
    assert [statuses(found, 1)[name] for name in names] == ["unmeasured", "agree"]
