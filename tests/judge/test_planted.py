"""Differences planted in a dump of ours are found where they are, and only where they are."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, TINY, change_tensors

import qwenref
from qwenref.capture import capture
from qwenref.errors import QwenrefError
from qwenref.judge.floors import BLIND, PRECISIONS
from qwenref.judge.report import report
from qwenref.judge.result import Result, StageResult
from qwenref.metrics import MARGIN
from qwenref.model.random_checkpoint import Shape, write
from qwenref.stages import ATTENTION, BY_NAME, EMBEDDING, Stage

DATA = ROOT / "tests" / "data"
CHAIN = [stage.name for stage in ATTENTION]
MASKED = ("attn_scores", "attn_softmax")
BLOCKED = ("qkv_matmul", "qkv_bias")
SIZES = {"T": 12, "S": 12, "N": 6, "K": 2, "H": 14, "D": 84, "E": 84, "F": 140}
BLOCKS = {"q": slice(0, 6), "k": slice(6, 8), "v": slice(8, 10)}
TOKEN, HEAD, CELL = 7, 1, 3

Plant = Callable[[np.ndarray], object]
"""Changes an array [token, head, cell] in place."""

every_stage = pytest.mark.parametrize("stage", ATTENTION, ids=lambda stage: stage.name)
with_heads = pytest.mark.parametrize(
    "stage", [stage for stage in ATTENTION if "D" not in stage.axes], ids=lambda stage: stage.name
)
strict_and_auto = pytest.mark.parametrize("dtype", ["float32", "auto"])


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our dump of layer 0 of the bundled checkpoint, T = 12."""
    output = tmp_path_factory.mktemp("ours") / "dump"
    capture(TINY, output)
    return output


@pytest.fixture
def copy(ours: Path, tmp_path: Path) -> Path:
    """A copy of it to plant something in."""
    return Path(shutil.copytree(ours, tmp_path / "copy"))


def file_of(dump: Path, name: str, layer: int = 0) -> Path:
    return dump / f"layer-{layer}" / f"{name}.bin"


def stored(dump: Path, name: str) -> np.ndarray:
    """Return a writable copy of a stage in the axes of `qwenref.stages`."""
    shape = [SIZES[axis] for axis in BY_NAME[name].axes]
    return qwenref.read_aprt(file_of(dump, name)).values.reshape(shape).copy()


def store(dump: Path, name: str, values: np.ndarray, layer: int = 0) -> None:
    path = file_of(dump, name, layer)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    qwenref.write_aprt(path, layer, values)


def by_head(stage: Stage, values: np.ndarray) -> np.ndarray:
    """Return a view [token, head, cell]."""
    if stage.name in MASKED:
        return values.swapaxes(0, 1)
    return values.reshape(len(values), -1, 84 if "D" in stage.axes else 14)


def plant(dump: Path, stage: Stage, change: Plant) -> None:
    values = stored(dump, stage.name)
    change(by_head(stage, values))
    store(dump, stage.name, values)


def stage_of(result: Result, name: str, layer: int | None = 0) -> StageResult:
    (found,) = (stage for stage in result.stages if (stage.layer, stage.stage) == (layer, name))
    return found


def last_line(result: Result) -> str:
    return report(result).splitlines()[-1]


def said_to_be_allowed(result: Result) -> list[str]:
    """Return the stages that the report says were not judged, as allowed."""
    text = "".join(line for line in report(result).splitlines() if "as allowed" in line)
    return [name for name in CHAIN if name in text.replace(",", " ").split()]


def assert_found(result: Result, *names: str) -> StageResult:
    """Check that exactly these stages differ, and return the first."""
    assert (result.verdict, result.exit_status) == ("differ", 1), report(result)
    differing = [stage.stage for stage in result.stages if stage.status == "differ"]
    assert differing == [*names]
    assert result.first_divergence is not None
    assert (result.first_divergence.layer, result.first_divergence.stage) == (0, names[0])
    assert last_line(result).startswith(f"DIFFER: first at {names[0]}")
    found = stage_of(result, names[0])
    assert result.first_divergence.block == found.block
    return found


def head_name(stage: Stage, head: int) -> str:
    if stage.name not in BLOCKED:
        return f"head {head}"
    return next(f"{n} head {head - of.start}" for n, of in BLOCKS.items() if head < of.stop)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@every_stage
@strict_and_auto
def test_one_element(stage: Stage, dtype: str, ours: Path, copy: Path) -> None:
    head = 0 if "D" in stage.axes else HEAD

    def change(view: np.ndarray) -> None:
        view[TOKEN, head, CELL] += 10 * rms(view[TOKEN, head, : TOKEN + 1])

    plant(copy, stage, change)
    for paths in ((ours, copy), (copy, ours)):
        found = assert_found(qwenref.diff(*paths, dtype=dtype), stage.name)
        assert found.worst is not None
        assert f"token {TOKEN}" in found.worst.name
        if found.worst.axis == "element":
            assert "D" in stage.axes or head_name(stage, head) in found.worst.name
        assert found.block == ("q" if stage.blocks else None)
        a, b = (stored(path, stage.name).reshape(-1) for path in paths)
        assert found.max_abs_diff_index == int(np.argmax(np.abs(a - b)))


@with_heads
@strict_and_auto
def test_one_head(stage: Stage, dtype: str, ours: Path, copy: Path) -> None:
    plant(copy, stage, lambda view: np.negative(view[:, HEAD], out=view[:, HEAD]))
    found = assert_found(qwenref.diff(ours, copy, dtype=dtype), stage.name)
    assert found.worst is not None
    assert (found.worst.axis, found.worst.index) == ("head", HEAD)
    assert found.worst.name == head_name(stage, HEAD)
    assert found.worst.others == 0
    assert found.block == ("q" if stage.blocks else None)


@every_stage
@strict_and_auto
def test_one_token(stage: Stage, dtype: str, ours: Path, copy: Path) -> None:
    plant(copy, stage, lambda view: np.negative(view[TOKEN], out=view[TOKEN]))
    found = assert_found(qwenref.diff(ours, copy, dtype=dtype), stage.name)
    assert found.worst is not None
    assert (found.worst.axis, found.worst.index) == ("token", TOKEN)
    assert found.worst.name == f"token {TOKEN}"
    assert found.worst.others == 0
    assert found.block is None


@pytest.mark.parametrize("name", BLOCKED)
@pytest.mark.parametrize("block", BLOCKS)
@strict_and_auto
def test_one_block(name: str, block: str, dtype: str, ours: Path, copy: Path) -> None:
    heads = BLOCKS[block]
    plant(copy, BY_NAME[name], lambda view: np.negative(view[:, heads], out=view[:, heads]))
    result = qwenref.diff(ours, copy, dtype=dtype)
    found = assert_found(result, name)
    assert found.block == block
    assert f"block {block}" in last_line(result)
    assert {part.name: part.rel_l2 for part in found.blocks} == pytest.approx(
        {each: 2.0 * (each == block) for each in BLOCKS}
    )
    assert found.worst is not None
    assert found.worst.axis != "head" or found.worst.index in range(*heads.indices(10))


@every_stage
@pytest.mark.parametrize("factor", [-1, 0])
def test_sign_and_zero(stage: Stage, factor: int, ours: Path, copy: Path) -> None:
    plant(copy, stage, lambda view: np.multiply(view, factor, out=view))
    for paths, dtype in (((ours, copy), "auto"), ((copy, ours), "float32")):
        found = assert_found(qwenref.diff(*paths, dtype=dtype), stage.name)
        assert found.block is None
        assert found.rel_l2 == (pytest.approx(2) if factor else None)
        assert found.norm_ratio == (1 if factor else 0 if paths[0] == copy else None)
        assert found.cosine_sim == (pytest.approx(-1) if factor else None)


SMALL_FAULTS: dict[str, Plant] = {
    "scale 1.01": lambda view: np.multiply(view, 1.01, out=view),
    "scale 1.001": lambda view: np.multiply(view, 1.001, out=view),
    "a head": lambda view: np.multiply(view[:, -1], 1.001, out=view[:, -1]),
    "a token": lambda view: np.multiply(view[TOKEN], 0.999, out=view[TOKEN]),
    "an element": lambda view: np.multiply(view[TOKEN, 0, :CELL], 1.001, out=view[TOKEN, 0, :CELL]),
}


@every_stage
@pytest.mark.parametrize("fault", SMALL_FAULTS)
def test_what_is_within_the_floors_of_16_bits_is_found_in_float32_and_named_under_auto(
    stage: Stage, fault: str, ours: Path, copy: Path
) -> None:
    plant(copy, stage, SMALL_FAULTS[fault])
    strict = qwenref.diff(ours, copy, dtype="float32")
    assert_found(strict, stage.name)
    auto = qwenref.diff(ours, copy, stages=[stage.name])
    ratio = floors_off(ours, copy, stage.name)
    precision = stage_of(auto, stage.name).precision
    assert (auto.verdict == "differ") == (ratio > MARGIN)
    if auto.verdict == "agree":
        assert precision in ("float16", "bfloat16")
        assert f"at {precision} precision" in last_line(auto)
        assert f"{precision} would explain it" in last_line(strict)
        assert "`qwenref explain`" in last_line(strict)


def floors_off(a: Path, b: Path, name: str) -> float:
    """Return how many bfloat16 floors the worst slice of a stage is off."""
    worst = stage_of(qwenref.diff(a, b, dtype="bfloat16", stages=[name]), name).worst
    assert worst is not None
    assert worst.ratio is not None
    return worst.ratio


@every_stage
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_on_one_side(
    stage: Stage, value: float, ours: Path, copy: Path
) -> None:
    plant(copy, stage, lambda view: view.__setitem__((TOKEN, -1, CELL), value))
    for paths, dtype in (((ours, copy), "auto"), ((copy, ours), "float32")):
        result = qwenref.diff(*paths, dtype=dtype)
        found = assert_found(result, stage.name)
        assert found.nonfinite is not None
        counts = found.nonfinite.a, found.nonfinite.b, found.nonfinite.differ
        assert counts == (paths[0] == copy, paths[1] == copy, 1)
        assert f"token {TOKEN}" in last_line(result)
        assert found.rel_l2 is None
        assert found.block == ("v" if stage.blocks else None)
        json.loads(result.to_json(), parse_constant=pytest.fail)


@every_stage
def test_nan_at_the_same_place_of_both_sides_is_no_pass(
    stage: Stage, copy: Path, tmp_path: Path
) -> None:
    plant(copy, stage, lambda view: view.__setitem__((TOKEN, 0, CELL), np.nan))
    twin = shutil.copytree(copy, tmp_path / "twin")
    found = assert_found(qwenref.diff(copy, twin), stage.name)
    assert found.nonfinite is not None
    assert (found.nonfinite.a, found.nonfinite.b) == (1, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_stage_without_a_finite_value_never_agrees(
    value: float, copy: Path, tmp_path: Path
) -> None:
    store(copy, "attention", np.full((12, 84), value))
    twin = shutil.copytree(copy, tmp_path / "twin")
    assert qwenref.diff(copy, twin).verdict != "agree"


def test_infinities_of_different_signs_differ_and_the_same_are_reported(
    copy: Path, tmp_path: Path
) -> None:
    twin = shutil.copytree(copy, tmp_path / "twin")
    for dump, value in ((copy, np.inf), (twin, np.inf)):
        plant(dump, BY_NAME["attn_out"], lambda v, x=value: v.__setitem__((3, 0, 5), x))
    result = qwenref.diff(copy, twin)
    nonfinite = stage_of(result, "attn_out").nonfinite
    assert nonfinite is not None
    assert (nonfinite.a, nonfinite.b, nonfinite.differ) == (1, 1, 0)
    assert "infinit" in report(result)
    plant(twin, BY_NAME["attn_out"], lambda v: v.__setitem__((3, 0, 5), -np.inf))
    assert_found(qwenref.diff(copy, twin), "attn_out")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("attn_norm", "attn_out"),
        ("attn_norm", "q_post_rope"),
        ("qkv_matmul", "qkv_bias"),
        ("attn_scores", "attn_softmax"),
        ("q_post_rope", "attention"),
    ],
)
@strict_and_auto
def test_swapped_files_of_equal_size(
    one: str, other: str, dtype: str, ours: Path, copy: Path
) -> None:
    paths = file_of(copy, one), file_of(copy, other)
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    assert_found(qwenref.diff(ours, copy, dtype=dtype), one, other)


@strict_and_auto
def test_sub_004_a_perturbed_softmax_diverges_first_at_attn_softmax(
    dtype: str, ours: Path, copy: Path
) -> None:
    values = stored(copy, "attn_softmax")
    values[2, 9, :10] = values[2, 9, 9::-1]  # still sums to 1
    store(copy, "attn_softmax", values)
    found = assert_found(qwenref.diff(ours, copy, dtype=dtype), "attn_softmax")
    before = stored(ours, "attn_softmax").astype(np.float64)
    assert found.total_variation == pytest.approx(np.abs(before - values).sum(axis=-1).max() / 2)
    assert found.worst is not None
    assert "2" in found.worst.name or found.worst.index in (2, 9)


def test_everything_after_a_fault_that_is_inherited_differs_too(ours: Path, copy: Path) -> None:
    for name in CHAIN[4:]:
        store(copy, name, stored(copy, name)[..., ::-1])
    assert_found(qwenref.diff(ours, copy), *CHAIN[4:])


# --- files that are missing, more, or broken


@every_stage
def test_a_missing_file_is_incomplete_and_may_be_allowed(
    stage: Stage, ours: Path, copy: Path
) -> None:
    file_of(copy, stage.name).unlink()
    for paths in ((ours, copy), (copy, ours)):
        result = qwenref.diff(*paths)
        assert (result.verdict, result.exit_status) == ("incomplete", 2)
        assert stage.name in last_line(result)
        found = stage_of(result, stage.name)
        assert (found.status, found.required) == ("unmeasured", True)
        assert (found.rel_l2, found.max_abs_diff, found.cosine_sim) == (None, None, None)
        allowed = qwenref.diff(*paths, allow_missing=True)
        assert (allowed.verdict, allowed.exit_status) == ("agree", 0)
        assert said_to_be_allowed(allowed) == [stage.name]


def test_what_neither_has_is_not_required(copy: Path, tmp_path: Path) -> None:
    file_of(copy, "attn_scores").unlink()
    twin = shutil.copytree(copy, tmp_path / "twin")
    result = qwenref.diff(copy, twin)
    assert result.verdict == "agree"
    assert "8 stages" in result.reason


def test_a_difference_weighs_more_than_a_missing_file(ours: Path, copy: Path) -> None:
    file_of(copy, "attn_norm").unlink()
    store(copy, "attn_out", -stored(copy, "attn_out"))
    assert_found(qwenref.diff(ours, copy), "attn_out")
    assert_found(qwenref.diff(ours, copy, allow_missing=True), "attn_out")


def test_nothing_at_all_in_common_is_not_allowed_to_agree(ours: Path, copy: Path) -> None:
    for name in CHAIN[1:]:
        file_of(copy, name).unlink()
    result = qwenref.diff(ours, copy, allow_missing=True, stages=CHAIN[1:])
    assert result.verdict == "incomplete"


@pytest.mark.parametrize("name", ["ffn_norm", "k_cache"])
def test_an_extra_file_is_listed_and_not_judged(
    name: str, ours: Path, copy: Path, tmp_path: Path
) -> None:
    store(copy, name, np.ones(1008))
    result = qwenref.diff(ours, copy)
    found = stage_of(result, name)
    assert (result.verdict, found.status, found.required) == ("agree", "unmeasured", False)
    assert "9 stages" in result.reason
    assert name in report(result)
    twin = shutil.copytree(ours, tmp_path / "twin")
    store(twin, name, np.arange(1008))
    result = qwenref.diff(twin, copy)
    found = stage_of(result, name)
    if name == "ffn_norm":  # a stage that all dumps have
        assert (result.verdict, found.status, found.required) == ("differ", "differ", True)
        assert result.first_divergence is not None
        assert result.first_divergence.stage == name
        return
    assert (result.verdict, found.status, found.required) == ("agree", "differ", False)
    assert found.rel_l2 is not None
    assert "9 stages" in result.reason


def test_an_extra_layer_is_listed_and_not_judged(ours: Path, copy: Path) -> None:
    store(copy, "attn_norm", np.ones(1008), layer=1)
    for paths in ((ours, copy), (copy, ours)):
        result = qwenref.diff(*paths)
        assert result.verdict == "agree"
        assert stage_of(result, "attn_norm", layer=1).required is False
        assert "1/attn_norm" in report(result)


@pytest.mark.parametrize("stage", ATTENTION[::3], ids=lambda stage: stage.name)
@pytest.mark.parametrize("lost", [1, 4, 400])
def test_a_truncated_file_is_refused(stage: Stage, lost: int, ours: Path, copy: Path) -> None:
    path = file_of(copy, stage.name)
    path.write_bytes(path.read_bytes()[:-lost])
    for paths in ((ours, copy), (copy, ours), (path, file_of(ours, stage.name))):
        with pytest.raises(QwenrefError, match="truncated") as caught:
            qwenref.diff(*paths)
        assert stage.name in str(caught.value)


# --- different things


def assert_incomparable(result: Result, *words: str) -> None:
    assert (result.verdict, result.exit_status) == ("incomparable", 2), report(result)
    assert (result.first_divergence, result.odd_one_out, result.stages) == (None, None, [])
    assert last_line(result).startswith("INCOMPARABLE")
    assert all(word in last_line(result) for word in words)


def test_a_header_of_another_layer(ours: Path, copy: Path) -> None:
    path = file_of(copy, "attn_scores")
    values = stored(copy, "attn_scores")
    path.unlink()
    qwenref.write_aprt(path, 1, values)
    assert_incomparable(qwenref.diff(ours, copy), "attn_scores", "layer 1")
    assert_incomparable(qwenref.diff(copy, ours), "attn_scores", "layer 1")
    assert_incomparable(qwenref.diff(path, file_of(ours, "attn_scores")), "layer 1")


def test_no_layer_in_common(ours: Path, copy: Path) -> None:
    shutil.move(copy / "layer-0", copy / "layer-1")
    for path in (copy / "layer-1").iterdir():
        content = bytearray(path.read_bytes())
        content[4] = 1
        path.write_bytes(content)
    (copy / "manifest.json").unlink()
    assert_incomparable(qwenref.diff(ours, copy), "layer")
    files = file_of(ours, "attn_out"), file_of(copy, "attn_out", layer=1)
    assert_incomparable(qwenref.diff(*files), "layer")


@pytest.mark.parametrize(
    "tokens", [[87, 104, 97], [87, 104, 97, 116, 32, 105, 115, 32, 50, 43, 51, 63]]
)
def test_another_prompt(tokens: list[int], ours: Path, tmp_path: Path) -> None:
    capture(TINY, tmp_path / "other", tokens=tokens, noise=False)
    assert_incomparable(qwenref.diff(ours, tmp_path / "other"), "token")
    result = qwenref.diff(ours, DATA / "apr-f32", tmp_path / "other")
    assert_incomparable(result, "a", "c", "token")


def test_other_weights_unless_allowed(ours: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    name = "model.layers.0.self_attn.v_proj.weight"
    change_tensors(tmp_path / "model", lambda of: of | {name: -of[name]})
    capture(tmp_path / "model", tmp_path / "other", noise=False)
    assert_incomparable(qwenref.diff(ours, tmp_path / "other"), "weights")
    result = qwenref.diff(ours, tmp_path / "other", allow_different_weights=True)
    found = assert_found(result, "qkv_matmul", "qkv_bias", "attention", "attn_out")
    assert found.block == "v"
    assert "weights are different" in report(result)


def test_other_embeddings_unless_allowed(ours: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    name = "model.embed_tokens.weight"
    change_tensors(tmp_path / "model", lambda of: of | {name: of[name][::-1].copy()})
    capture(tmp_path / "model", tmp_path / "other", noise=False)
    assert_incomparable(qwenref.diff(ours, tmp_path / "other"), "embedding")
    result = qwenref.diff(ours, tmp_path / "other", allow_different_weights=True)
    assert_found(result, *CHAIN)


def test_another_model_cannot_be_allowed(ours: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    capture(tmp_path / "model", tmp_path / "other", noise=False)
    assert_incomparable(qwenref.diff(ours, tmp_path / "other"), "config")


@pytest.mark.parametrize("extra", [1, 84, 140])
def test_counts_that_no_layout_explains(extra: int, ours: Path, copy: Path) -> None:
    (copy / "manifest.json").unlink()
    values = stored(copy, "qkv_bias").reshape(-1)
    store(copy, "qkv_bias", np.concatenate([values, values[:extra]]))
    for paths in ((ours, copy), (copy, ours)):
        result = qwenref.diff(*paths)
        assert (result.verdict, result.exit_status) == ("incomparable", 2)
        assert str(values.size + extra) in last_line(result)
        found = stage_of(result, "qkv_bias")
        assert (found.rel_l2, found.rms_diff, found.cosine_sim) == (None, None, None)


def test_incomparable_dumps_have_no_first_divergence(ours: Path, copy: Path) -> None:
    (copy / "manifest.json").unlink()
    store(copy, "qkv_bias", np.append(stored(copy, "qkv_bias"), 1))
    store(copy, "attn_norm", -stored(copy, "attn_norm"))
    result = qwenref.diff(ours, copy)
    assert (result.verdict, result.first_divergence) == ("incomparable", None)


# --- masked cells and conventions


def above(values: np.ndarray, fill: Callable[[np.ndarray], object]) -> np.ndarray:
    """Return a copy in which the cells that no softmax reads are filled."""
    changed, hidden = values.copy(), ~np.tri(12, dtype=bool)
    changed[:, hidden] = fill(changed[:, hidden])
    return changed


@pytest.mark.parametrize("name", MASKED)
def test_negative_zero_above_the_diagonal_agrees(name: str, ours: Path, copy: Path) -> None:
    store(copy, name, above(stored(copy, name), lambda of: -0.0 * np.ones_like(of)))
    result = qwenref.diff(ours, copy)
    assert result.reason == qwenref.diff(ours, ours).reason
    found = stage_of(result, name)
    assert (found.rel_l2, found.status, found.notes) == (0, "agree", [])


GARBAGE: dict[str, Callable[[np.ndarray], object]] = {
    "values": lambda of: np.random.default_rng(1).standard_normal(of.shape) * 1e6,
    "NaN": lambda of: np.where(np.arange(of.size).reshape(of.shape) % 5, 0.1, np.nan),
}


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("kind", GARBAGE)
@strict_and_auto
def test_garbage_above_the_diagonal_does_not_count_and_is_reported(
    name: str, kind: str, dtype: str, ours: Path, copy: Path
) -> None:
    store(copy, name, above(stored(copy, name), GARBAGE[kind]))
    for paths in ((ours, copy), (copy, ours)):
        result = qwenref.diff(*paths, dtype=dtype)
        assert result.verdict == "agree", report(result)
        assert result.reason.startswith("at float32 precision: 9 stages")
        found = stage_of(result, name)
        assert (found.rel_l2, found.max_abs_diff, found.cosine_sim) == (0, 0, 1)
        held = found.masked.a, found.masked.b
        assert held == (("zero", kind) if paths[0] == ours else (kind, "zero"))
        assert any("masked" in note and kind in note for note in found.notes)
        assert found.nonfinite is None or (found.nonfinite.a, found.nonfinite.b) == (0, 0)


@pytest.mark.parametrize("name", MASKED)
def test_garbage_above_the_diagonal_does_not_count_beside_exact_zeros_below_it(
    name: str, ours: Path, tmp_path: Path
) -> None:
    values = stored(ours, name)
    values[np.abs(values) < 0.05] = 0  # as where a probability is too small for float16
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, of in zip(paths, (values, above(values, GARBAGE["values"])), strict=True):
        shutil.copytree(ours, path)
        (path / "manifest.json").unlink()
        store(path, name, of)
    for pair in (paths, paths[::-1]):
        result = qwenref.diff(*pair, model=TINY)
        assert result.verdict == "agree", report(result)
        assert stage_of(result, name).rel_l2 == 0


LEAST = float(np.finfo(np.float32).min)
CONVENTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "unscaled": lambda scores: scores * np.float32(14**0.5),
    "unmasked": lambda scores: above(
        scores, lambda of: np.sin(np.arange(of.size)).reshape(of.shape)
    ),
    "masked with -inf": lambda scores: above(scores, lambda of: np.full_like(of, -np.inf)),
    "masked with float32's least": lambda scores: above(scores, lambda of: np.full_like(of, LEAST)),
    "masked with float16's least plus a score": lambda scores: above(
        scores, lambda of: np.linspace(-20, 20, of.size, dtype="f4").reshape(of.shape) - 65504
    ),
    "unscaled and masked with -inf": lambda scores: above(
        scores * np.float32(14**0.5), lambda of: np.full_like(of, -np.inf)
    ),
}
conventions = pytest.mark.parametrize("convention", CONVENTIONS)


def in_convention(dump: Path, convention: str) -> None:
    store(dump, "attn_scores", CONVENTIONS[convention](stored(dump, "attn_scores")))


@conventions
def test_a_convention_agrees_with_a_note_if_softmax_does(
    convention: str, ours: Path, copy: Path
) -> None:
    in_convention(copy, convention)
    for paths in ((ours, copy), (copy, ours)):
        result = qwenref.diff(*paths)
        assert result.verdict == "agree", report(result)
        assert result.reason.startswith("at float32 precision")
        found = stage_of(result, "attn_scores")
        assert any("convention" in note for note in found.notes)
        letter = "ab"[paths.index(copy)]
        assert any(f"{letter} holds scores before" in note for note in found.notes) == (
            "unscaled" in convention
        )


@conventions
def test_a_convention_differs_if_the_layout_is_strict(
    convention: str, ours: Path, copy: Path
) -> None:
    in_convention(copy, convention)
    assert_found(qwenref.diff(ours, copy, strict_layout=True), "attn_scores")


@conventions
def test_a_convention_differs_if_there_is_no_softmax_to_ask(
    convention: str, ours: Path, copy: Path
) -> None:
    in_convention(copy, convention)
    file_of(copy, "attn_softmax").unlink()
    for paths in ((ours, copy), (copy, ours)):
        result = qwenref.diff(*paths, allow_missing=True)
        found = assert_found(result, "attn_scores")
        assert found.reason is not None
        assert "cannot be told" in found.reason
        files = [file_of(path, "attn_scores") for path in paths]
        assert qwenref.diff(*files, model=TINY).verdict == "differ"


@conventions
def test_a_convention_differs_if_softmax_does(convention: str, ours: Path, copy: Path) -> None:
    in_convention(copy, convention)
    store(copy, "attn_softmax", above(stored(copy, "attn_softmax")[::-1], np.zeros_like))
    assert_found(qwenref.diff(ours, copy), "attn_scores", "attn_softmax")


def test_the_softmax_that_is_asked_is_that_of_the_same_layer(tmp_path: Path, ours: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        shutil.copytree(ours, path)
        (path / "manifest.json").unlink()
        for name in CHAIN:
            store(path, name, stored(ours, name), layer=1)
    in_convention(paths[1], "unscaled")
    store(paths[1], "attn_softmax", np.zeros((6, 12, 12)), layer=1)
    result = qwenref.diff(*paths, model=TINY)
    differing = [(of.layer, of.stage) for of in result.stages if of.status == "differ"]
    assert differing == [(1, "attn_softmax")]


@pytest.mark.parametrize(("factor", "dtype"), [(14, "auto"), (3, "auto"), (3.7, "float32")])
def test_no_other_factor_is_a_convention(factor: float, dtype: str, ours: Path, copy: Path) -> None:
    store(copy, "attn_scores", stored(copy, "attn_scores") * factor)
    for paths in ((ours, copy), (copy, ours)):
        assert_found(qwenref.diff(*paths, dtype=dtype), "attn_scores")


@pytest.mark.parametrize("factor", [1, -1])
def test_differences_are_those_of_the_values_shown_beside_them(
    factor: int, ours: Path, copy: Path
) -> None:
    store(copy, "attn_scores", stored(copy, "attn_scores") * np.float32(factor * 14**0.5))
    for paths in ((ours, copy), (copy, ours)):
        found = stage_of(qwenref.diff(*paths), "attn_scores")
        for top in found.top_diffs:
            assert top.abs_diff == pytest.approx(abs(top.a - top.b), abs=1e-5)


def test_a_difference_of_unscaled_scores_is_said_to_be_one_of_scaled_scores(
    ours: Path, copy: Path
) -> None:
    scores = stored(copy, "attn_scores")
    scores[1] *= -1
    store(copy, "attn_scores", scores * np.float32(14**0.5))
    result = qwenref.diff(ours, copy)
    found = assert_found(result, "attn_scores")
    assert found.rel_l2 is not None
    assert found.rel_l2 < 2
    assert found.worst is not None
    assert (found.worst.axis, found.worst.index) == ("head", 1)
    assert "1/sqrt(H)" in report(result)


def test_scores_scaled_twice_do_not_make_ours_the_unscaled_ones(ours: Path, copy: Path) -> None:
    store(copy, "attn_scores", stored(copy, "attn_scores") / np.float32(14**0.5))
    (copy / "manifest.json").unlink()
    for paths in ((ours, copy), (copy, ours)):
        assert_found(qwenref.diff(*paths), "attn_scores")


# --- how much is normal


def with_floors(dump: Path, stage: str, **changes: float | list[float]) -> None:
    """Change the bfloat16 floor of a stage in a manifest."""
    path = dump / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["noise"]["stages"][f"layer-0/{stage}"]["accumulated"]["bfloat16"] |= changes
    path.write_text(json.dumps(manifest))


def test_a_floor_that_lets_nearly_everything_pass_is_blind(ours: Path, copy: Path) -> None:
    store(copy, "attention", stored(copy, "attention") * 1.005)
    assert qwenref.diff(copy, ours).reason.startswith("at bfloat16 precision from attention on")
    slices = {"heads": [1.0] * 6, "tokens": [1.0] * 12, "element": 1.0}
    with_floors(copy, "attention", whole=BLIND / MARGIN, **slices)
    for dtype in ("auto", "bfloat16"):
        result = qwenref.diff(copy, ours, dtype=dtype)
        assert (result.verdict, result.exit_status) == ("incomplete", 2), report(result)
        assert stage_of(result, "attention").status == "blind"
        assert "attention" in last_line(result)
    allowed = qwenref.diff(copy, ours, allow_missing=True)
    assert allowed.verdict == "agree"
    assert said_to_be_allowed(allowed) == ["attention"]
    with_floors(copy, "attention", whole=0.999 * BLIND / MARGIN)
    assert qwenref.diff(copy, ours).verdict == "agree"


def test_a_blind_class_does_not_hide_a_finer_one_that_explains(ours: Path, copy: Path) -> None:
    with_floors(copy, "attention", whole=0.5)
    result = qwenref.diff(copy, DATA / "apr-f32")
    assert result.verdict == "agree"
    assert result.reason.startswith("at float32 precision: 9 stages")


def test_a_slice_with_a_blind_floor_is_not_judged(ours: Path, copy: Path) -> None:
    stage = BY_NAME["q_post_rope"]
    plant(copy, stage, lambda view: np.multiply(view[:, 3], 1.015, out=view[:, 3]))
    assert qwenref.diff(copy, ours, dtype="bfloat16").verdict == "differ"
    with_floors(copy, "q_post_rope", heads=[0.004, 0.004, 0.004, 0.1, 0.004, 0.004])
    assert qwenref.diff(copy, ours, dtype="bfloat16").verdict == "agree"


def test_a_class_without_a_floor_is_blind(ours: Path, copy: Path) -> None:
    store(copy, "attention", stored(copy, "attention") * 1.005)
    nothing: Any = {"whole": None, "heads": [None] * 6, "tokens": [None] * 12, "element": None}
    with_floors(copy, "attention", **nothing)
    result = qwenref.diff(copy, ours)
    assert (result.verdict, stage_of(result, "attention").status) == ("incomplete", "blind")


def test_a_convention_is_blind_if_softmax_is(ours: Path, copy: Path) -> None:
    in_convention(copy, "unscaled")
    store(copy, "attn_softmax", stored(copy, "attn_softmax") * 1.02)
    nothing: Any = {"whole": None, "heads": [None] * 6, "tokens": [None] * 12, "element": None}
    with_floors(copy, "attn_softmax", **nothing)
    result = qwenref.diff(copy, ours)
    assert result.verdict == "incomplete"
    assert [stage_of(result, name).status for name in MASKED] == ["blind"] * 2


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Truncate: each value is one of bfloat16."""
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


def test_values_that_all_fit_bfloat16_are_of_that_class(copy: Path, tmp_path: Path) -> None:
    store(copy, "k_post_rope", bfloat16(stored(copy, "k_post_rope")))
    twin = shutil.copytree(copy, tmp_path / "twin")
    result = qwenref.diff(copy, twin)
    assert result.reason.startswith("at bfloat16 precision from k_post_rope on (float32 before)")
    assert {stage_of(result, name).precision for name in CHAIN[4:]} == {"bfloat16"}


def test_values_that_all_fit_float16_are_of_that_class(copy: Path, tmp_path: Path) -> None:
    store(copy, "attn_scores", stored(copy, "attn_scores").astype(np.float16))
    twin = shutil.copytree(copy, tmp_path / "twin")
    result = qwenref.diff(copy, twin)
    assert result.reason.startswith("at float16 precision from attn_scores on (float32 before)")


@pytest.mark.parametrize("value", [0, 1])
def test_exact_values_are_no_evidence_of_a_class(value: int, copy: Path, tmp_path: Path) -> None:
    store(copy, "k_post_rope", np.full((12, 2, 14), value))
    twin = shutil.copytree(copy, tmp_path / "twin")
    assert qwenref.diff(copy, twin).reason.startswith("at float32 precision: 9 stages")


def test_a_few_values_are_no_evidence_of_a_class(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        capture(TINY, path, tokens=[5])
        values = qwenref.read_aprt(file_of(path, "k_post_rope")).values  # 28 of them
        store(path, "k_post_rope", bfloat16(values))
    assert qwenref.diff(*paths).reason.startswith("at float32 precision: 9 stages")


def test_embedding_rows_are_no_evidence_of_a_class(tmp_path: Path) -> None:
    capture(TINY, tmp_path / "a", stages=(EMBEDDING, *ATTENTION))
    result = qwenref.diff(tmp_path / "a", DATA / "apr-f32")
    assert stage_of(result, "embedding").rel_l2 == 0
    assert result.reason.startswith("at float32 precision: 10 stages")


def test_a_floor_is_that_of_the_coarsest_class_before(ours: Path, copy: Path) -> None:
    store(copy, "qkv_matmul", stored(copy, "qkv_matmul") * np.float32(1.0005))
    store(copy, "attn_out", stored(copy, "attn_out") * np.float32(1.006))
    result = qwenref.diff(ours, copy)
    precisions = [stage_of(result, name).precision for name in CHAIN]
    assert precisions == ["float32"] + ["float16"] * 7 + ["bfloat16"]
    text = "at bfloat16 precision from attn_out on (float16 from qkv_matmul, float32 before)"
    assert result.reason.startswith(text)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_three_dumps_cannot_be_held_to_a_precision(dtype: str, ours: Path) -> None:
    with pytest.raises(QwenrefError, match="three"):
        qwenref.diff(ours, ours, ours, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float64", "f32", ""])
def test_an_unknown_precision_is_refused(dtype: str, ours: Path) -> None:
    with pytest.raises(QwenrefError, match="dtype"):
        qwenref.diff(ours, ours, dtype=dtype)


# --- tolerances


def test_a_tolerance_is_held_to_instead_of_floors(ours: Path, copy: Path) -> None:
    store(copy, "q_post_rope", stored(copy, "q_post_rope") * 1.03)
    assert qwenref.diff(ours, copy).verdict == "differ"
    for dtype in ("auto", "float32"):
        accepted = qwenref.diff(ours, copy, tolerance=0.04, dtype=dtype)
        assert accepted.verdict == "agree"
        found = stage_of(accepted, "q_post_rope")
        assert (found.floor, found.floor_origin) == (0.04, "tolerance")
        assert "tolerance" in last_line(accepted)
    assert_found(qwenref.diff(ours, copy, tolerance=0.02), "q_post_rope")
    assert_found(qwenref.diff(ours, copy, tolerance=0.0), "q_post_rope")


def test_a_tolerance_of_one_stage_leaves_the_others_their_floors(ours: Path, copy: Path) -> None:
    for name in ("q_post_rope", "attn_out"):
        store(copy, name, stored(copy, name) * 1.05)
    only: Mapping[str | None, float] = {"q_post_rope": 0.06}
    assert_found(qwenref.diff(ours, copy, tolerance=only), "attn_out")
    both: Mapping[str | None, float] = {"q_post_rope": 0.06, None: 0.04}
    assert_found(qwenref.diff(ours, copy, tolerance=both), "attn_out")
    swapped: Mapping[str | None, float] = {"q_post_rope": 0.04, None: 0.06}
    assert_found(qwenref.diff(ours, copy, tolerance=swapped), "q_post_rope")


def test_a_tolerance_may_be_stricter_than_the_floors(ours: Path) -> None:
    result = qwenref.diff(ours, DATA / "apr-f32", tolerance=1e-9)
    assert_found(result, *CHAIN)
    assert qwenref.diff(ours, ours, tolerance=0.0).verdict == "agree"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_tolerance_accepts_what_is_not_finite(value: float, ours: Path, copy: Path) -> None:
    plant(copy, BY_NAME["attn_out"], lambda view: view.__setitem__((3, 0, 5), value))
    assert_found(qwenref.diff(ours, copy, tolerance=1e9), "attn_out")


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_that_is_no_number_is_refused(tolerance: float, ours: Path) -> None:
    with pytest.raises(QwenrefError, match="tolerance"):
        qwenref.diff(ours, ours, tolerance=tolerance)
    with pytest.raises(QwenrefError, match="tolerance"):
        qwenref.diff(ours, ours, tolerance={"attn_out": tolerance})


# --- big biases


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of a checkpoint with K biases of 100, as Qwen2.5 has them."""
    folder = tmp_path_factory.mktemp("biased")
    write(folder / "model", Shape(84, 6, 2, 16, 1, 320, seed=8))
    k_bias = "model.layers.0.self_attn.k_proj.bias"
    signs = [100.0, -100.0] * 14
    change_tensors(folder / "model", lambda of: of | {k_bias: np.array(signs, of[k_bias].dtype)})
    capture(folder / "model", folder / "dump")
    return folder / "dump"


@strict_and_auto
def test_an_error_in_v_alone_is_found_behind_big_biases(
    dtype: str, biased: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(biased, tmp_path / "copy")
    plant(
        copy, BY_NAME["qkv_bias"], lambda view: view[:, 8:].__setitem__(..., view[::-1, 8:].copy())
    )
    found = assert_found(qwenref.diff(biased, copy, dtype=dtype), "qkv_bias")
    assert found.cosine_sim is not None
    assert found.cosine_sim > 0.9998
    assert found.block == "v"
    assert [part.name for part in found.blocks if part.rel_l2] == ["v"]


@strict_and_auto
def test_an_error_in_the_weights_of_v_is_found_before_the_biases(
    dtype: str, biased: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(biased, tmp_path / "copy")
    for name in BLOCKED:
        plant(copy, BY_NAME[name], lambda view: np.multiply(view[:, 8:], -1, out=view[:, 8:]))
    found = assert_found(qwenref.diff(biased, copy, dtype=dtype), *BLOCKED)
    assert found.block == "v"
    assert stage_of(qwenref.diff(biased, copy, dtype=dtype), "qkv_bias").block == "v"


def perturbed_products(dump: Path, size: float, *, carried_on: bool) -> None:
    off = np.random.default_rng(3).standard_normal((12, 140)).astype(np.float32) * size
    store(dump, "qkv_matmul", stored(dump, "qkv_matmul") + off)
    if carried_on:
        store(dump, "qkv_bias", stored(dump, "qkv_bias") + off)


def test_a_recovery_behind_big_biases_is_said_to_be_only_a_bigger_norm(
    biased: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(biased, tmp_path / "copy")
    perturbed_products(copy, 0.1, carried_on=True)
    result = qwenref.diff(biased, copy)
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "qkv_matmul"
    products, biased_ = (stage_of(result, name) for name in BLOCKED)
    assert products.rel_l2 is not None
    assert biased_.rel_l2 is not None
    assert biased_.rel_l2 < products.rel_l2 / 20
    assert any("qkv_matmul" in note and "larger" in note for note in biased_.notes)
    assert "looks better than qkv_matmul" in " ".join(report(result).split())


def test_a_real_recovery_is_not_called_a_bigger_norm(biased: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(biased, tmp_path / "copy")
    perturbed_products(copy, 0.1, carried_on=False)
    result = qwenref.diff(biased, copy)
    assert_found(result, "qkv_matmul")
    assert stage_of(result, "qkv_bias").notes == []


def test_a_softmax_does_not_look_better_than_its_scores_because_of_its_norm(
    ours: Path, copy: Path, tmp_path: Path
) -> None:
    twin = Path(shutil.copytree(ours, tmp_path / "twin"))
    for dump, factor in ((copy, 1e-3), (twin, -1e-3)):
        store(dump, "attn_scores", stored(dump, "attn_scores") * factor)
    plant(twin, BY_NAME["attn_softmax"], lambda view: np.multiply(view, 0.5, out=view))
    result = qwenref.diff(copy, twin)
    assert_found(result, *MASKED)
    assert not any("looks better" in note for note in stage_of(result, "attn_softmax").notes)


# --- three dumps


def three(ours: Path, tmp_path: Path, changes: Iterable[tuple[str, Plant] | None]) -> list[Path]:
    """Return copies in which something is planted."""
    paths = [tmp_path / letter for letter in "abc"]
    for path, change in zip(paths, changes, strict=True):
        shutil.copytree(ours, path)
        if change is not None:
            plant(path, BY_NAME[change[0]], change[1])
    return paths


def negative(view: np.ndarray) -> None:
    view *= -1


@pytest.mark.parametrize("odd", range(3))
def test_the_odd_one_out_may_be_the_reference(odd: int, ours: Path, tmp_path: Path) -> None:
    changes = [("attention", negative) if place == odd else None for place in range(3)]
    result = qwenref.diff(*three(ours, tmp_path, changes))
    found = assert_found(result, "attention")
    assert (result.odd_one_out, found.odd_one_out) == (odd, odd)
    assert f"{'abc'[odd]} is the odd one out" in last_line(result)
    for pair in found.pairs:
        assert pair.status == ("differ" if odd in (pair.a, pair.b) else "agree")


def test_each_stage_has_an_odd_one_out_of_its_own(ours: Path, tmp_path: Path) -> None:
    changes = [None, ("attn_out", negative), ("q_post_rope", negative)]
    result = qwenref.diff(*three(ours, tmp_path, changes))
    assert_found(result, "q_post_rope", "attn_out")
    odd = {stage.stage: stage.odd_one_out for stage in result.stages}
    assert odd == dict.fromkeys(CHAIN) | {"q_post_rope": 2, "attn_out": 1}
    assert result.odd_one_out == 2


def test_of_three_none_agree(ours: Path, tmp_path: Path) -> None:
    changes = [None, ("attention", negative), ("attention", lambda view: view.fill(1))]
    result = qwenref.diff(*three(ours, tmp_path, changes))
    found = assert_found(result, "attention")
    assert [pair.status for pair in found.pairs] == ["differ"] * 3
    assert (result.odd_one_out, found.odd_one_out) == (None, None)
    assert "no two agree" in last_line(result)


def test_if_only_the_outer_two_of_three_differ_nobody_is_odd_and_not_none_agree(
    ours: Path, tmp_path: Path
) -> None:
    changes: list[tuple[str, Plant] | None] = [
        ("attention", lambda view, by=by: np.multiply(view, by, out=view)) for by in (1, 1.1, 1.2)
    ]
    result = qwenref.diff(*three(ours, tmp_path, changes), tolerance=0.15)
    found = assert_found(result, "attention")
    assert [pair.status for pair in found.pairs] == ["agree", "differ", "agree"]
    assert (result.odd_one_out, found.odd_one_out) == (None, None)
    assert "no two agree" not in last_line(result)


def test_numbers_of_three_are_those_of_the_worst_pair(ours: Path, tmp_path: Path) -> None:
    changes: list[tuple[str, Plant] | None] = [
        ("attention", lambda view, by=by: np.multiply(view, by, out=view)) for by in (1, 1.5, 3)
    ]
    found = stage_of(qwenref.diff(*three(ours, tmp_path, changes)), "attention")
    assert found.rel_l2 == pytest.approx(2)
    assert found.norm_ratio == pytest.approx(1 / 3)
    assert [pair.rel_l2 for pair in found.pairs] == pytest.approx([0.5, 2, 1])


def test_a_stage_that_one_of_three_lacks_is_unmeasured(ours: Path, tmp_path: Path) -> None:
    paths = three(ours, tmp_path, [None] * 3)
    file_of(paths[1], "attention").unlink()
    result = qwenref.diff(*paths)
    assert (result.verdict, stage_of(result, "attention").status) == ("incomplete", "unmeasured")
    assert "b" in [word.strip(":") for word in report(result).split()]
    plant(paths[2], BY_NAME["attention"], negative)
    assert_found(qwenref.diff(*paths), "attention")


# --- what is compared


def test_stages_and_layers_can_be_chosen(ours: Path, copy: Path) -> None:
    store(copy, "attn_norm", -stored(copy, "attn_norm"))
    chosen = qwenref.diff(ours, copy, stages=["attn_out", "qkv_bias"], layers=[0])
    assert [stage.stage for stage in chosen.stages] == ["qkv_bias", "attn_out"]
    assert (chosen.verdict, "2 stages" in chosen.reason) == ("agree", True)
    alone = qwenref.diff(ours, copy, stages=["attention"])  # in a list of names it is the stage
    assert [stage.stage for stage in alone.stages] == ["attention"]
    with pytest.raises(QwenrefError, match="ffn_norm or ffn_gate"):
        qwenref.diff(ours, copy, stages=["mlp"])
    with pytest.raises(QwenrefError, match="no_such"):
        qwenref.diff(ours, copy, stages=["no_such"])
    with pytest.raises(QwenrefError, match="layer 7"):
        qwenref.diff(ours, copy, layers=[7])


def test_limit_is_how_many_of_the_largest_differences_are_kept(ours: Path, copy: Path) -> None:
    store(copy, "attn_norm", -stored(copy, "attn_norm"))
    sizes = np.sort(np.abs(2 * stored(ours, "attn_norm").reshape(-1)))[::-1]
    for limit in (1, 3, 40):
        found = stage_of(qwenref.diff(ours, copy, limit=limit), "attn_norm")
        assert [top.abs_diff for top in found.top_diffs] == pytest.approx(sizes[:limit])
        for top in found.top_diffs:
            assert top.a == stored(ours, "attn_norm").reshape(-1)[top.index] == -top.b


def test_sub_003_files_of_1372_values_take_the_same_way_whatever_their_stage(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal(28 * 7 * 7).astype(np.float32)
    b = a + np.float32(0.01) * rng.standard_normal(a.size).astype(np.float32)
    names = ("attn_scores", "attn_softmax", "made_up")
    for name in names:
        for folder, values in (("a", a), ("b", b)):
            (tmp_path / folder / "layer-0").mkdir(parents=True, exist_ok=True)
            qwenref.write_aprt(file_of(tmp_path / folder, name), 0, values)
    off = a.astype(np.float64) - b.astype(np.float64)
    norms = [float(np.linalg.norm(x.astype(np.float64))) for x in (a, b)]
    whole = qwenref.diff(tmp_path / "a", tmp_path / "b")
    for name in names:
        alone = qwenref.diff(*(file_of(tmp_path / folder, name) for folder in "ab"))
        for found in (stage_of(alone, name), stage_of(whole, name)):
            assert found.dim_product == 1372
            assert found.max_abs_diff == pytest.approx(np.abs(off).max(), rel=1e-12)
            assert found.max_abs_diff_index == int(np.argmax(np.abs(off)))
            assert found.rms_diff == pytest.approx(np.sqrt(np.mean(off**2)), rel=1e-12)
            assert found.rel_l2 == pytest.approx(np.linalg.norm(off) / min(norms), rel=1e-12)
            assert found.norm_ratio == pytest.approx(norms[0] / norms[1], rel=1e-12)
            assert found.cosine_sim == pytest.approx(
                np.dot(a.astype(np.float64), b.astype(np.float64)) / np.prod(norms), rel=1e-12
            )
        printed = json.loads(alone.to_json(), parse_constant=pytest.fail)
        assert printed["schema"] == "apr-stage-diff-v1"
        assert (printed["layer"], printed["dim_product"]) == (0, 1372)


def test_assert_stages_close_raises_the_report(ours: Path, copy: Path) -> None:
    qwenref.assert_stages_close(ours, copy)
    store(copy, "attn_out", -stored(copy, "attn_out"))
    with pytest.raises(AssertionError) as caught:
        qwenref.assert_stages_close(ours, copy)
    assert report(qwenref.diff(ours, copy)) in str(caught.value)
    qwenref.assert_stages_close(ours, copy, tolerance=3.0)
    file_of(copy, "attn_out").unlink()
    with pytest.raises(AssertionError, match="INCOMPLETE"):
        qwenref.assert_stages_close(ours, copy)
    with pytest.raises(QwenrefError):
        qwenref.assert_stages_close(ours, copy / "nowhere")
