"""What `explain` says of real engines: healthy ones in every precision, and two real faults.

qwenref, transformers (live), apr and llama.cpp (tests/data, see tests/test_against_apr.py).
"""

from pathlib import Path

import numpy as np
import pytest
from engines import FAULTY, Dumps
from helpers import TINY, Tensors, change_tensors

import qwenref
from qwenref.metrics import MARGIN
from qwenref.model.random_checkpoint import Shape, write
from qwenref.stages import ATTENTION, LAYER
from qwenref.trial.explanation import Explanation, StageExplained
from qwenref.trial.words import report

CHAIN = [stage.name for stage in ATTENTION]
PROJECTIONS = ("qkv_matmul", "attn_out")
OF_MLP = ("ffn_gate", "ffn_up", "ffn_out")
PRODUCTS = ("attn_scores", "attention")
FLOAT32 = ("ours", "apr-f32", "llama-f32", "llama-f32-native", "hf-float32-apr", "hf-float32-hf")
ROUNDS_OPERANDS = {
    "llama-kv16": dict.fromkeys(PRODUCTS, "operands-float16"),
    "llama-bf16": dict.fromkeys(PROJECTIONS, "operands-bfloat16")
    | dict.fromkeys(PRODUCTS, "operands-float16"),
    "llama-flash": dict.fromkeys(PROJECTIONS, "operands-float16") | {"attention": "flash-float16"},
    "llama-theta-1e4": dict.fromkeys((*PROJECTIONS, *PRODUCTS), "operands-float16"),
}
TRANSFORMERS = {
    "attn_norm": "result-{}-normed",
    "qkv_matmul": "result-{}",
    "qkv_bias": "result-{}",
    "q_post_rope": "result-{}-cos_sin-rotated",
    "k_post_rope": "result-{}-cos_sin-rotated",
    "attn_scores": "result-{}-products",
    "attn_softmax": "result-{}",
    "attention": "result-{}",
    "attn_out": "result-{}",
}
WIDE = Shape(256, 4, 2, 512, 2, 320, seed=26)
"""The checkpoint of apr-q4k."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    write(folder, WIDE)
    return folder


def explained(dumps: Dumps, name: str) -> Explanation:
    names = "llama.cpp" if name == "llama-f32-native" else None
    return qwenref.explain(dumps[name], model=TINY, names=names)


def stage_of(found: Explanation, name: str) -> StageExplained:
    (stage,) = (stage for stage in found.stages if stage.stage == name)
    return stage


def statuses(found: Explanation) -> dict[str, str]:
    return {stage.stage: stage.status for stage in found.stages}


@pytest.mark.parametrize("name", FLOAT32)
def test_float32_engines_agree_without_any_dialect(dumps: Dumps, name: str) -> None:
    found = explained(dumps, name)
    assert (found.verdict, found.exit_status) == ("agree", 0), report(found)
    assert {*statuses(found).values()} == {"agree"}
    assert {*CHAIN} <= {*statuses(found)}
    for stage in found.stages:
        assert stage.dialects == []
        assert stage.ratio is not None
        assert stage.ratio <= MARGIN / 2
    assert found.weight_noise is None
    last = report(found).splitlines()[-1]
    parts = "RoPE, attention, MLP and residual" if name == "apr-f32" else "RoPE and attention"
    assert last == f"Your engine computes: norm, projections, {parts}: float32."


@pytest.mark.parametrize("name", ROUNDS_OPERANDS)
def test_rounded_operands_are_named_and_reproduced(dumps: Dumps, name: str) -> None:
    """To within three times the float32 floor, of which no tolerance is made."""
    found = explained(dumps, name)
    for stage, dialect in ROUNDS_OPERANDS[name].items():
        of = stage_of(found, stage)
        assert dialect in [each.id for each in of.dialects]
        assert of.added is not None
        assert of.added > 1e-4
        assert of.floor is not None
        for each in of.dialects:
            assert each.error_after <= 3 * of.floor
    plain = [stage for stage in found.stages if stage.stage not in ROUNDS_OPERANDS[name]]
    assert not any(stage.dialects for stage in plain)


@pytest.mark.parametrize("name", ["llama-kv16", "llama-bf16", "llama-flash"])
def test_engines_that_round_operands_agree(dumps: Dumps, name: str) -> None:
    found = explained(dumps, name)
    assert found.verdict == "agree", report(found)
    missing = ("attn_scores", "attn_softmax") if name == "llama-flash" else ()
    for stage, status in statuses(found).items():
        assert status == ("unmeasured" if stage in missing else "agree")
    assert stage_of(found, "attention").bridged == [*missing]
    assert "f16 KV cache?" in report(found) or name == "llama-flash"


@pytest.mark.parametrize("layout", ["apr", "hf"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_roundings_of_transformers_are_reproduced(dumps: Dumps, dtype: str, layout: str) -> None:
    """Bit by bit, but for a value a step aside where a CPU takes float32 sums in another order."""
    found = explained(dumps, f"hf-{dtype}-{layout}")
    assert found.verdict == "agree", report(found)
    for name, dialect in TRANSFORMERS.items():
        stage = stage_of(found, name)
        assert (stage.status, stage.dtype) == ("agree", dtype)
        assert [each.id for each in stage.dialects] == [dialect.format(dtype)]
        assert stage.floor is not None
        assert stage.dialects[0].error_after <= stage.floor / 10
    assert "bias added before the one rounding" in stage_of(found, "qkv_bias").dialects[0].text


@pytest.mark.parametrize("name", FAULTY)
def test_real_faults_are_where_they_are_made(dumps: Dumps, name: str) -> None:
    found = explained(dumps, name)
    assert (found.verdict, found.exit_status) == ("fault", 1)
    assert found.origins == ["q_post_rope", "k_post_rope"]
    assert statuses(found) == (
        dict.fromkeys(["embedding", *CHAIN[:3]], "agree")
        | dict.fromkeys(found.origins, "added")
        | dict.fromkeys(CHAIN[5:], "inherited")
    )
    for origin in found.origins:
        assert "all but token 0" in (stage_of(found, origin).pattern or "")
    assert found.summary[0].startswith("layer 0: q_post_rope and k_post_rope add the error (0.")
    said = "Everything before agrees; attn_scores .. attn_out only inherit it."
    assert said in found.summary[0]


@pytest.mark.parametrize("layer", [1, 2])
def test_above_layer_0_a_replay_begins_at_what_left_the_layer_before(
    dumps: Dumps, layer: int
) -> None:
    found = qwenref.explain(dumps["apr-f32"], model=TINY, layer=layer)
    assert (found.verdict, found.layer, found.tokens) == ("agree", layer, None), report(found)
    assert statuses(found) == dict.fromkeys((stage.name for stage in LAYER), "agree")


def test_the_reference_is_tried_too(dumps: Dumps) -> None:
    """Whoever of the two is wrong, that one is convicted."""
    good, bad = dumps["hf-float32-hf"], dumps["apr-rope-interleaved"]
    found = qwenref.explain(good, model=TINY, reference=bad)
    assert (found.verdict, found.convicted) == ("agree", "reference")
    assert found.reference is not None
    assert found.reference.origins == ["q_post_rope", "k_post_rope"]
    assert "It is the reference that is wrong." in report(found)
    assert qwenref.explain(bad, model=TINY, reference=good).convicted == "dump"
    assert qwenref.explain(bad, model=TINY, reference=bad).convicted == "both"
    assert qwenref.explain(good, model=TINY, reference=good).convicted is None


def test_quantised_weights_are_innocent(dumps: Dumps, wide: Path) -> None:
    """The dump whose cosines fall, recover and fall: weights in Q4_K, arithmetic right."""
    found = qwenref.explain(dumps["apr-q4k"], model=wide)
    assert found.verdict == "agree", report(found)
    assert {*statuses(found).values()} == {"agree"}
    noise = found.weight_noise
    assert noise is not None
    of_layer = (noise.q, noise.k, noise.v, noise.o, noise.gate, noise.up, noise.down)
    for bits in (noise.embedding, *of_layer):
        assert bits is not None
        assert 3.5 < bits < 4.5
    named = "embedding, q, k, v, o, gate, up and down"
    assert f"Its weights seem to be rounded to about 4 bits: {named}." in report(found)
    rounded = {"embedding", *PROJECTIONS, *OF_MLP}
    for stage in found.stages:
        assert stage.added is not None
        assert (stage.added > 0.05) == (stage.stage in rounded)


def test_a_small_bias_that_is_missing_is_not_rounded_weights(wide: Path) -> None:
    """Its error is the same in all tokens, whatever their inputs."""
    tokens = [87, 104, 97, 116, 32, 105, 115, 32, 50, 43, 50, 63]
    arrays = qwenref.run(wide, tokens)._asdict()
    del arrays["qkv_matmul"]
    bias = np.random.default_rng(0).normal(size=arrays["qkv_bias"].shape[1])
    arrays["qkv_bias"] = arrays["qkv_bias"] + np.float32(0.02) * bias.astype(np.float32)
    found = qwenref.explain(arrays, model=wide, tokens=tokens)
    assert (found.verdict, found.origins) == ("fault", ["qkv_bias"]), report(found)


def test_quantised_weights_are_a_fault_where_they_should_be_exact(dumps: Dumps, wide: Path) -> None:
    found = qwenref.explain(dumps["apr-q4k"], model=wide, exact_weights=True)
    assert (found.verdict, found.origins) == ("fault", ["embedding", *PROJECTIONS, *OF_MLP])
    assert found.weight_noise is None


@pytest.mark.parametrize("tensors", ["embed q_proj k_proj v_proj o_proj", "v_proj", "o_proj"])
def test_weights_in_q8_0_are_innocent(tmp_path: Path, wide: Path, tensors: str) -> None:
    """Blocks of 32, as llama.cpp makes them; each tensor may have a width of its own."""

    def quantised(held: Tensors) -> Tensors:
        chosen = tensors.split()
        return {
            name: in_q8_0(of) if of.ndim == 2 and any(part in name for part in chosen) else of
            for name, of in held.items()
        }

    write(tmp_path / "model", WIDE)
    change_tensors(tmp_path / "model", as_float32)
    change_tensors(tmp_path / "model", quantised)
    tokens = [87, 104, 97, 116, 32, 105, 115, 32, 50, 43, 50, 63]
    dump = qwenref.run(tmp_path / "model", tokens)
    found = qwenref.explain(dump, model=wide, tokens=tokens)
    assert found.verdict == "agree", report(found)
    noise = found.weight_noise
    assert noise is not None
    for name in ("q", "k", "v", "o"):
        bits = getattr(noise, name)
        if f"{name}_proj" in tensors:
            assert bits is not None
            assert 7.5 < bits < 8.5
        else:
            assert bits is None
    exact = qwenref.explain(dump, model=wide, tokens=tokens, exact_weights=True)
    assert exact.verdict == "fault"


def as_float32(held: Tensors) -> Tensors:
    return {name: of.astype(np.float32) for name, of in held.items()}


def in_q8_0(weights: np.ndarray) -> np.ndarray:
    """Round blocks of 32 to 127 steps, with a float16 scale."""
    blocks = weights.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    whole = np.rint(blocks / scale)
    return (whole * scale.astype(np.float16).astype(np.float32)).reshape(weights.shape)


def test_the_half_dump_of_an_engine_that_panicked(dumps: Dumps, wide: Path) -> None:
    found = qwenref.explain(dumps["apr-int8-half"], model=wide)
    assert (found.verdict, found.origins) == ("fault", ["embedding"]), report(found)
    assert statuses(found)["attn_norm"] != "agree"
    for name in CHAIN[1:]:
        assert statuses(found)[name] == "unmeasured"
    for name in ("qkv_matmul", "qkv_bias"):
        assert stage_of(found, name).reason == "1536 values, but 12 tokens make 6144"
        assert "1536 values, but 12 tokens make 6144" in report(found)


def test_without_weights_what_needs_none_is_judged(dumps: Dumps) -> None:
    found = qwenref.explain(dumps["hf-float32-hf"])
    assert (found.verdict, found.exit_status, found.model) == ("incomplete", 2, None)
    weighted = ("attn_norm", "qkv_matmul", "qkv_bias", "attn_out")
    for name, status in statuses(found).items():
        assert status == ("unmeasured" if name in weighted else "agree")
    assert {check.status for check in found.checks} == {"holds"}


def test_checks_convict_without_weights(dumps: Dumps) -> None:
    found = qwenref.explain(dumps["apr-rope-interleaved"], model=TINY)
    failing = [check.name for check in found.checks if check.status == "fails"]
    assert failing == [f"{name}_post_rope keeps the length of every pair" for name in "qk"]
    assert "check fails: q_post_rope keeps the length of every pair" in report(found)
