"""The noise floor: honest engines, here and in the field, stay below it; faults do not.

Honest engines are those of scripts/honest_engines.py, which share no arithmetic with the oracle,
and dumps of apr and llama.cpp.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import measure_long_prompts
import ml_dtypes
import msgspec
import numpy as np
import pytest
from helpers import ROOT, TINY, Cli, attention_of, change_tensors, replay
from measure_margin import CASES, Prompt

import qwenref
from qwenref import noise
from qwenref.capture import capture
from qwenref.dumps.manifest import Manifest, Noise
from qwenref.metrics import MARGIN, Errors, errors_of, for_all_tokens, sums_of, worst_of
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import read_attention, read_embedding
from qwenref.noise import CLASSES, noise_floor, sampled
from qwenref.oracle import computing
from qwenref.stages import ATTENTION, BY_NAME, RESIDUAL

DATA = ROOT / "tests" / "data"
WHAT_IS = list(b"What is 2+2?")
NAMES = [stage.name for stage in ATTENTION]

Arrays = dict[str, np.ndarray]


def floor_of(directory: Path, tokens: list[int]) -> Noise:
    checkpoint = Checkpoint(directory)
    weights, _ = read_attention(checkpoint, 0)
    rows, _ = read_embedding(checkpoint, tokens)
    return noise_floor(checkpoint.config, weights, rows, ATTENTION)


def errors_between(directory: Path, truth: Arrays, theirs: Arrays) -> dict[str, Errors]:
    sizes = Checkpoint(directory).config.sizes
    errors = {}
    for stage in ATTENTION:
        exact = truth[stage.name]
        difference = theirs[stage.name].reshape(exact.shape) - exact
        errors[stage.name] = errors_of(stage, sums_of(stage, exact, difference, sizes["H"]), sizes)
    return errors


def measured(directory: Path, tokens: list[int], theirs: Arrays) -> dict[str, Errors]:
    """Return how far stages are from the truth."""
    truth = qwenref.run(directory, tokens, dtype="float64")._asdict()
    return errors_between(directory, truth, theirs)


def ratios(found: dict[str, Errors], floor: Noise, precision: str) -> dict[str, float]:
    """Return the worst ratio of each stage, all of which have a floor."""
    result = {}
    for name, errors in found.items():
        worst = worst_of(errors, floor.stages[name].accumulated[precision])
        assert worst is not None
        result[name] = worst.ratio
    return result


def dumped(name: str) -> Arrays:
    folder = DATA / name / "layer-0"
    return {stage: qwenref.read_aprt(folder / f"{stage}.bin").values for stage in NAMES}


@pytest.fixture(scope="module")
def tiny() -> Noise:
    return floor_of(TINY, WHAT_IS)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wide") / "model"
    write(directory, Shape(896, 14, 2, 64, 1, 320, seed=61))
    return directory


HONEST = {  # engines of each class, for each of the cases and prompt lengths
    1: 10,
    12: 28,
    65: 4,
}


@pytest.mark.parametrize("T", HONEST)
@pytest.mark.parametrize("name", CASES)
def test_honest_engines_stay_within_the_floor(name: str, T: int, tmp_path: Path) -> None:
    case = CASES[name]
    write(tmp_path / "model", case.shape, dtype=case.stored)
    prompt = Prompt(name, case, tmp_path / "model", T, seed=100 + T)
    rng = np.random.default_rng(T)
    for precision in CLASSES:
        for ratio in prompt.ratios(precision, HONEST[T], rng):
            assert ratio.value <= MARGIN, ratio


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("apr-f32", "float32"),
        ("llama-f32", "float32"),
        ("llama-kv16", "float16-operands"),
        ("llama-bf16", "bfloat16-operands"),
    ],
)
def test_engines_of_the_field_stay_within_the_floor(name: str, precision: str, tiny: Noise) -> None:
    found = ratios(measured(TINY, WHAT_IS, dumped(name)), tiny, precision)
    assert max(found.values()) <= MARGIN, found


def test_apr_stays_within_the_floor_of_a_wide_layer(wide: Path) -> None:
    errors = measured(wide, WHAT_IS, dumped("apr-896"))
    found = ratios(errors, floor_of(wide, WHAT_IS), "float32")
    assert max(found.values()) <= MARGIN, found
    assert errors["attn_norm"].whole == pytest.approx(9.3e-7, rel=0.01)  # one running sum


@pytest.mark.parametrize(
    ("name", "rounding"),
    [
        ("llama-kv16", {"attn_scores", "attn_softmax", "attention", "attn_out"}),
        ("llama-bf16", set(NAMES) - {"attn_norm"}),
    ],
)
def test_rounded_operands_are_outside_the_float32_floor(
    name: str, rounding: set[str], tiny: Noise
) -> None:
    found = ratios(measured(TINY, WHAT_IS, dumped(name)), tiny, "float32")
    assert {stage for stage, ratio in found.items() if ratio > MARGIN} == rounding


def test_another_eps_is_outside_the_float32_floor(tmp_path: Path, tiny: Noise) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    (wrong / "model.safetensors").symlink_to(TINY / "model.safetensors")
    theirs = qwenref.run(wrong, WHAT_IS)._asdict()
    found = ratios(measured(TINY, WHAT_IS, theirs), tiny, "float32")
    assert min(found.values()) > 100 * MARGIN, found


@pytest.mark.parametrize("matrix", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_one_matrix_rounded_to_bfloat16_is_outside_the_float32_floor(
    matrix: str, tmp_path: Path
) -> None:
    shape = Shape(84, 6, 2, 16, 1, 320, seed=9)
    name = f"model.layers.0.self_attn.{matrix}.weight"
    for folder in ("exact", "rounded"):
        write(tmp_path / folder, shape, dtype="float32")
    change_tensors(
        tmp_path / "rounded",
        lambda old: old | {name: old[name].astype(ml_dtypes.bfloat16).astype(np.float32)},
    )
    theirs = qwenref.run(tmp_path / "rounded", WHAT_IS)._asdict()
    exact = tmp_path / "exact"
    found = ratios(measured(exact, WHAT_IS, theirs), floor_of(exact, WHAT_IS), "float32")
    first = "attn_out" if matrix == "o_proj" else "qkv_matmul"
    assert found[first] > 100 * MARGIN, found


def replayed(directory: Path, precision: str, inputs: Arrays) -> Arrays:
    """Return each stage, as dumped, computed from given inputs."""
    with computing(precision, "cpu") as (of, _):
        attention = attention_of(directory, of)
        given = {name: array.astype(of.arithmetic) for name, array in inputs.items()}
        arrays = {stage.name: replay(attention, stage, given) for stage in ATTENTION}
        arrays["qkv_matmul"] = np.asarray(
            attention.at("qkv_matmul", jnp.asarray(arrays["qkv_matmul"]))
        )
        return {name: array.astype(np.float64) for name, array in arrays.items()}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights are stored in that dtype."""
    directory = tmp_path_factory.mktemp(request.param)
    write(directory, Shape(84, 6, 2, 16, 1, 320, seed=11), dtype=request.param)
    return directory


def truth_of(directory: Path, tokens: list[int]) -> Arrays:
    rows, _ = read_embedding(Checkpoint(directory), tokens)
    truth = qwenref.run(directory, tokens, dtype="float64")._asdict()
    return truth | {RESIDUAL: rows.astype(np.float64)}


@pytest.mark.parametrize("T", [12, 65])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_floor_is_what_rounding_where_transformers_rounds_really_makes(
    dtype: str, T: int, stored: Path
) -> None:
    tokens = np.random.default_rng(T).integers(0, 320, T).tolist()
    floor, truth = floor_of(stored, tokens), truth_of(stored, tokens)
    run = qwenref.run(stored, tokens, dtype=dtype)._asdict()
    chain = errors_between(stored, truth, run)
    alone = errors_between(stored, truth, replayed(stored, dtype, truth))
    for name in NAMES:
        floors = floor.stages[name]
        for found, expected in (
            (chain[name].whole, floors.accumulated[dtype].whole),
            (alone[name].whole, floors.local[dtype].whole),
        ):
            assert found is not None
            assert expected is not None
            assert 0.7 * expected <= found <= 1.4 * expected, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounded_inputs_make_what_the_floor_says(dtype: str, tiny: Noise) -> None:
    narrow = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}[dtype]
    truth = truth_of(TINY, WHAT_IS)
    rounded = {name: array.astype(narrow).astype(np.float64) for name, array in truth.items()}
    found = errors_between(TINY, truth, replayed(TINY, "float64", rounded))
    assert found["attn_norm"].whole == tiny.stages["attn_norm"].inputs[dtype].whole == 0
    for name in NAMES[1:]:
        error, expected = found[name].whole, tiny.stages[name].inputs[dtype].whole
        assert error is not None
        assert expected is not None
        assert 0.7 * expected <= error <= 1.4 * expected, name


def test_huge_k_biases_make_the_softmax_of_bfloat16_vague(tmp_path: Path) -> None:
    case = CASES["K biases of 100"]
    write(tmp_path, case.shape)
    floor = Prompt("K biases of 100", case, tmp_path, 65, seed=65).floor
    softmax = floor.stages["attn_softmax"].accumulated
    assert softmax["bfloat16"].whole is not None
    assert 0.1 <= softmax["bfloat16"].whole <= 0.3
    assert softmax["float32"].whole is not None
    assert softmax["float32"].whole < 1e-4


def test_angles_at_the_end_of_a_long_prompt_are_vague(tmp_path: Path) -> None:
    """RoPE angles in float32 are off by about 6e-8 rad a position, 2e-3 rad at 32767."""
    T, model = 32768, tmp_path / "model"
    write(model, Shape(64, 2, 1, 16, 1, 320, head_dim=128, seed=7))
    stages = (BY_NAME["q_post_rope"], BY_NAME["k_post_rope"])
    done = capture(model, tmp_path / "float32", tokens=[9, 7] * (T // 2), stages=stages)
    capture(
        model,
        tmp_path / "truth",
        tokens=[9, 7] * (T // 2),
        stages=stages,
        dtype="float64",
        noise=False,
    )
    floor = done.manifest.noise
    assert floor is not None
    assert (floor.tokens[0], floor.tokens[-1]) == (0, T - 1)
    for stage in stages:
        file = f"layer-0/{stage.name}.bin"
        float32, truth = (
            qwenref.read_aprt(tmp_path / name / file).values.reshape(T, -1).astype(np.float64)
            for name in ("float32", "truth")
        )
        errors = np.linalg.norm(float32 - truth, axis=1) / np.linalg.norm(truth, axis=1)
        accumulated = floor.stages[f"layer-0/{stage.name}"].accumulated["float32"]
        floors = np.array(for_all_tokens(accumulated, floor.tokens, T).tokens)
        assert np.max(errors / floors) <= 1  # measured: 0.5
        assert 5e-4 <= floors[-1] <= 3e-3  # measured: 1.1e-3
        assert floors[-1] > 1.5 * floors[0]


@pytest.mark.parametrize("T", [1, 2, 64, 65, 1000])
def test_of_a_long_prompt_windows_from_the_first_to_the_last_token_are_looked_at(T: int) -> None:
    positions = sampled(T)
    assert len(positions) == min(T, noise.MOST_TOKENS)
    assert positions[0] == 0
    assert positions[-1] == T - 1
    assert np.all(np.diff(positions) > 0)


@pytest.mark.parametrize("T", [300, 1000])
def test_a_part_of_a_long_prompt_predicts_the_errors_of_all_of_it(T: int, tmp_path: Path) -> None:
    write(tmp_path, Shape(84, 2, 1, 16, 1, 320, head_dim=14, seed=2))
    for dtype, wholes, worst in measure_long_prompts.ratios(tmp_path, T):
        # measured, 300 to 3000 tokens: 0.63 to 1.06, at most 1.04 in float32
        least = 0.1 if dtype == "float32" else 0.6
        assert all(least <= ratio <= 1.25 for ratio in wholes), (dtype, wholes)
        assert worst <= MARGIN


def test_a_stage_has_the_same_floor_whichever_others_are_asked_for(tiny: Noise) -> None:
    checkpoint = Checkpoint(TINY)
    weights, _ = read_attention(checkpoint, 0)
    rows, _ = read_embedding(checkpoint, WHAT_IS)
    some = noise_floor(checkpoint.config, weights, rows, [BY_NAME["attn_scores"]])
    assert some.stages == {"attn_scores": tiny.stages["attn_scores"]}


def test_a_slice_has_at_least_the_floor_of_the_whole(tiny: Noise) -> None:
    for stage in tiny.stages.values():
        for part in (stage.accumulated, stage.local, stage.inputs):
            for floors in part.values():
                assert floors.whole is not None
                slices = [*floors.blocks, *floors.heads, *floors.tokens, floors.element]
                assert all(floor is not None and floor >= floors.whole for floor in slices)


def test_what_overflows_has_no_floor(tmp_path: Path) -> None:
    write(tmp_path, Shape(84, 6, 2, 16, 1, 320, seed=10))
    name = "model.layers.0.self_attn.{}_proj.weight"
    change_tensors(
        tmp_path,
        lambda old: old | {name.format(x): old[name.format(x)] * 300 for x in ("q", "k")},
    )
    scores = floor_of(tmp_path, WHAT_IS).stages["attn_scores"].accumulated
    nothing = Errors(None, [], [None] * 6, [None] * 12, None)
    assert scores["float16"] == nothing
    assert scores["bfloat16"].whole is not None
    assert scores["bfloat16"].whole < 0.1


def test_a_stream_whose_squares_overflow_has_no_floor_and_no_warning() -> None:
    checkpoint = Checkpoint(TINY)
    weights, _ = read_attention(checkpoint, 1)
    rows = np.full((3, 84), 1e30, np.float32)
    floor = noise_floor(checkpoint.config, weights, rows, [BY_NAME["attn_norm"]])
    assert floor.stages["attn_norm"].accumulated["float32"].whole is None
    assert floor.stages["attn_norm"].inputs["float32"].whole is not None


def test_the_manifest_holds_the_floor_of_what_was_captured(cli: Cli) -> None:
    shown = cli("capture", "--stages", "attn_norm,attn_out,embedding", "--json")
    assert shown.status == 0
    manifest = msgspec.json.decode(shown.out, type=Manifest)
    assert manifest.noise is not None
    assert list(manifest.noise.stages) == ["layer-0/attn_norm", "layer-0/attn_out"]
    for floor in manifest.noise.stages.values():
        assert list(floor.accumulated) == list(floor.local) == list(CLASSES)
        assert list(floor.inputs) == ["float32", "float16", "bfloat16"]


def test_the_normal_error_is_printed_beside_each_stage(cli: Cli, tiny: Noise) -> None:
    lines = cli("capture").out.splitlines()
    assert lines[1].split()[:6] == ["stage", "shape", "rms", "float32", "float16", "bfloat16"]
    for name, line in zip(NAMES, lines[2:-1], strict=True):
        floors = tiny.stages[name].accumulated
        shown = [f"{floors[dtype].whole:.1e}" for dtype in ("float32", "float16", "bfloat16")]
        assert line.split()[-4:-1] == shown
    assert "normal" in lines[-1]


def test_without_noise_nothing_else_changes(cli: Cli) -> None:
    with_noise = json.loads(cli("capture", "-o", "a", "--json").out)
    without = json.loads(cli("capture", "-o", "b", "--json", "--no-noise").out)
    assert with_noise.pop("noise") is not None
    assert without.pop("noise") is None
    assert with_noise == without
    assert "float16" not in cli("capture", "-o", "c", "--no-noise").out


def test_the_embedding_alone_has_no_floor(cli: Cli) -> None:
    assert json.loads(cli("capture", "--stages", "embedding", "--json").out)["noise"] is None
