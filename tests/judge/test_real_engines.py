"""Dumps of four engines that compute the same thing agree; two that do not are found.

qwenref, transformers (live, in three dtypes and two layouts), apr and llama.cpp (tests/data, see
tests/test_against_apr.py) on the bundled checkpoint, for the prompt "What is 2+2?".
"""

from collections.abc import Sequence
from itertools import combinations, pairwise, permutations
from pathlib import Path

import pytest
from engines import DATA, FAULTY, Dumps, captured_from_hf
from helpers import TINY

import qwenref
from qwenref.capture import capture
from qwenref.judge.floors import PRECISIONS
from qwenref.judge.report import report
from qwenref.judge.result import Result, StageResult
from qwenref.model.random_checkpoint import Shape, write
from qwenref.stages import ATTENTION, LAYER

CHAIN = [stage.name for stage in ATTENTION]

COARSE_FROM = {
    "ours": {},
    "apr-f32": {},
    "llama-f32": {},
    "llama-f32-native": {},
    "llama-kv16": {"attn_scores": "float16"},
    "llama-bf16": {"qkv_matmul": "bfloat16"},
    "hf-float32-apr": {},
    "hf-float32-hf": {},
    "hf-float16-apr": {"attn_norm": "float16"},
    "hf-float16-hf": {"attn_norm": "float16"},
    "hf-bfloat16-apr": {"attn_norm": "bfloat16"},
    "hf-bfloat16-hf": {"attn_norm": "bfloat16"},
    "llama-flash": {"qkv_matmul": "float16"},
}
"""From which stage on an engine rounds to what; none of them is at fault."""

HEALTHY = [name for name in COARSE_FROM if name != "llama-flash"]
ALL_HEALTHY = [*COARSE_FROM]
ONE_LAYOUT = [
    name
    for name in HEALTHY
    if name not in ("hf-float32-apr", "hf-float16-hf", "hf-bfloat16-apr")  # save a minute
]
FLASH_LACKS = ("attn_scores", "attn_softmax")
WITH_MANIFEST = ("ours", "hf-")


def compared(dumps: Dumps, names: Sequence[str], *, allow_missing: bool = False) -> Result:
    """Compare as a user would: with no option if one of them has a manifest, else with a model."""
    model = None if any(name.startswith(WITH_MANIFEST) for name in names) else TINY
    paths = [dumps[name] for name in names]
    return qwenref.diff(*paths, model=model, allow_missing=allow_missing)


def stage_of(result: Result, name: str, layer: int = 0) -> StageResult:
    (found,) = (stage for stage in result.stages if (stage.layer, stage.stage) == (layer, name))
    return found


def class_of(name: str, stage: str) -> str:
    found = [
        precision
        for start, precision in COARSE_FROM[name].items()
        if CHAIN.index(stage) >= CHAIN.index(start)
    ]
    return found[0] if found else "float32"


def coarsest(names: Sequence[str], stage: str) -> str:
    return max((class_of(name, stage) for name in names), key=PRECISIONS.index)


def expected_reason(names: Sequence[str]) -> str:
    classes = [coarsest(names, stage) for stage in CHAIN]
    text = f"at {classes[-1]} precision"
    changes = [i for i in range(1, len(CHAIN)) if classes[i] != classes[i - 1]]
    if changes:
        last = changes[-1]
        before = [f"{classes[i]} from {CHAIN[i]}" for i in changes[:-1]] + [f"{classes[0]} before"]
        text += f" from {CHAIN[last]} on ({', '.join(before)})"
    return text


def assert_agree(result: Result, names: Sequence[str], lacking: Sequence[str] = ()) -> None:
    assert (result.verdict, result.exit_status) == ("agree", 0), report(result)
    assert result.reason.startswith(expected_reason(names))
    assert report(result).splitlines()[-1].startswith(f"AGREE, {expected_reason(names)}")
    assert (result.first_divergence, result.odd_one_out) == (None, None)
    required = [stage.stage for stage in result.stages if stage.required]
    assert [stage for stage in required if stage != "embedding"] == CHAIN
    origin = "manifest" if "ours" in names else "generic"
    for stage in result.stages:
        if not stage.required or stage.stage in lacking:
            continue
        assert (stage.status, stage.reason) == ("agree", None)
        assert stage.floor_origin == origin
        assert len(stage.pairs) == len(names) * (len(names) - 1) // 2
        for pair in stage.pairs:
            assert pair.status == "agree"
            if stage.stage in CHAIN:
                assert pair.precision == coarsest([names[pair.a], names[pair.b]], stage.stage)
    generic = "generic" in result.reason, "agree (generic)" in report(result)
    assert generic == (origin == "generic",) * 2


@pytest.mark.parametrize("names", [*permutations(HEALTHY, 2)], ids=" ".join)
def test_two_healthy_engines_agree_at_the_coarser_precision(
    names: tuple[str, str], dumps: Dumps
) -> None:
    assert_agree(compared(dumps, names), names)


@pytest.mark.parametrize("names", [*combinations(ONE_LAYOUT, 3)], ids=" ".join)
def test_three_healthy_engines_agree_at_the_coarsest_precision(
    names: tuple[str, str, str], dumps: Dumps
) -> None:
    assert_agree(compared(dumps, names), names)


@pytest.mark.parametrize("other", HEALTHY)
@pytest.mark.parametrize("order", [1, -1])
def test_flash_attention_has_stages_that_cannot_be_judged(
    other: str, order: int, dumps: Dumps
) -> None:
    names = ("llama-flash", other)[::order]
    result = compared(dumps, names)
    assert (result.verdict, result.exit_status) == ("incomplete", 2)
    required = [stage for stage in result.stages if stage.required]
    unmeasured = [stage.stage for stage in required if stage.status == "unmeasured"]
    assert unmeasured == [*FLASH_LACKS]
    assert all(name in result.reason for name in FLASH_LACKS)
    allowed = compared(dumps, names, allow_missing=True)
    assert_agree(allowed, names, lacking=FLASH_LACKS)
    (line,) = (line for line in report(allowed).splitlines() if "as allowed" in line)
    assert all(name in line for name in FLASH_LACKS)


@pytest.mark.parametrize("names", [*combinations(ALL_HEALTHY[-4:], 3)], ids=" ".join)
def test_three_engines_one_of_which_has_flash_attention(
    names: tuple[str, str, str], dumps: Dumps
) -> None:
    flash = "llama-flash" in names
    assert compared(dumps, names).verdict == ("incomplete" if flash else "agree")
    if flash:
        assert_agree(compared(dumps, names, allow_missing=True), names, lacking=FLASH_LACKS)


@pytest.mark.parametrize("faulty", FAULTY)
@pytest.mark.parametrize("healthy", ALL_HEALTHY)
def test_a_real_fault_is_found_where_it_is(healthy: str, faulty: str, dumps: Dumps) -> None:
    names = (healthy, faulty) if ALL_HEALTHY.index(healthy) % 2 else (faulty, healthy)
    result = compared(dumps, names)
    assert (result.verdict, result.exit_status) == ("differ", 1)
    first = result.first_divergence
    assert first is not None
    assert (first.layer, first.stage, first.block) == (0, "q_post_rope", None)
    assert "first at q_post_rope" in report(result).splitlines()[-1]
    statuses = {stage.stage: stage.status for stage in result.stages if stage.required}
    assert [statuses[name] for name in CHAIN[:3]] == ["agree"] * 3
    assert {statuses[name] for name in CHAIN[3:]} - {"unmeasured"} == {"differ"}


@pytest.mark.parametrize("healthy", [*pairwise(HEALTHY)], ids=" ".join)
def test_of_three_the_faulty_one_is_the_odd_one_out(healthy: tuple[str, str], dumps: Dumps) -> None:
    number = HEALTHY.index(healthy[0])
    place, faulty = number % 3, FAULTY[number % 2]
    names = [*healthy]
    names.insert(place, faulty)
    result = compared(dumps, names)
    assert (result.verdict, result.exit_status) == ("differ", 1)
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "q_post_rope"
    assert result.odd_one_out == place
    assert f"{'abc'[place]} is the odd one out" in report(result)
    for stage in result.stages:
        if stage.required:
            differs = CHAIN.index(stage.stage) >= 3
            assert stage.odd_one_out == (place if differs else None)


def test_of_a_healthy_one_and_two_other_faults_no_two_agree(dumps: Dumps) -> None:
    result = compared(dumps, ["ours", *FAULTY])
    assert (result.verdict, result.odd_one_out) == ("differ", None)
    rope = stage_of(result, "q_post_rope")
    assert [pair.status for pair in rope.pairs] == ["differ"] * 3
    assert rope.odd_one_out is None
    assert "no two agree" in report(result).splitlines()[-1]


@pytest.mark.parametrize("last", [("apr-f32",), ("llama-f32-native", "hf-float16-hf"), FAULTY])
@pytest.mark.parametrize("first", ["llama-flash"])
@pytest.mark.parametrize("allow_missing", [False, True])
def test_all_but_the_paths_fits_100_columns(
    first: str, last: tuple[str, ...], allow_missing: bool, dumps: Dumps
) -> None:
    result = compared(dumps, (first, *last), allow_missing=allow_missing)
    lines = report(result).splitlines()[len(result.paths) :]
    assert [line for line in lines if len(line) > 100] == []


def test_kv16_held_to_float32_differs_and_the_last_line_says_why(dumps: Dumps) -> None:
    result = qwenref.diff(dumps["ours"], dumps["llama-kv16"], dtype="float32")
    assert (result.verdict, result.exit_status) == ("differ", 1)
    assert result.first_divergence is not None
    assert result.first_divergence.stage == "attn_scores"
    last = report(result).splitlines()[-1]
    assert "float16 would explain" in last
    assert "`qwenref explain`" in last


def test_bf16_held_to_float16_differs_and_the_last_line_says_why(dumps: Dumps) -> None:
    result = qwenref.diff(dumps["ours"], dumps["llama-bf16"], dtype="float16")
    assert result.verdict == "differ"
    assert "bfloat16 would explain" in report(result).splitlines()[-1]


@pytest.mark.parametrize("faulty", FAULTY)
def test_no_precision_is_offered_as_an_explanation_of_a_fault(faulty: str, dumps: Dumps) -> None:
    result = qwenref.diff(dumps["ours"], dumps[faulty], dtype="bfloat16")
    assert result.verdict == "differ"
    assert "explain" not in result.reason


def test_three_layers_of_transformers_and_apr_agree(tmp_path: Path) -> None:
    hf = captured_from_hf(tmp_path / "hf", layers="0..3")
    result = qwenref.diff(hf, DATA / "apr-f32")
    assert result.verdict == "agree", report(result)
    judged = [(stage.layer, stage.stage) for stage in result.stages if stage.required]
    assert judged == [(layer, name) for layer in range(3) for name in CHAIN]
    assert {stage.precision for stage in result.stages if stage.required} == {"float32"}
    listed = {(stage.layer, stage.stage) for stage in result.stages if not stage.required}
    others = [stage.name for stage in LAYER if stage.name not in CHAIN]
    of_layers = {(layer, name) for layer in range(3) for name in others}
    assert listed == of_layers | {(0, "embedding"), (None, "final_norm"), (None, "lm_head")}


def test_a_higher_layer_agrees_with_apr_at_the_floors_of_its_own_manifest(tmp_path: Path) -> None:
    residual = DATA / "apr-f32" / "layer-0" / "post_ffn_residual.bin"
    capture(TINY, tmp_path / "ours", layers=[1], residual=residual)
    result = qwenref.diff(tmp_path / "ours", DATA / "apr-f32")
    assert result.verdict == "agree", report(result)
    judged = [stage for stage in result.stages if stage.required]
    assert [(stage.layer, stage.stage) for stage in judged] == [(1, name) for name in CHAIN]
    assert {stage.floor_origin for stage in judged} == {"manifest"}
    assert {stage.precision for stage in judged} == {"float32"}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of hidden size 896 that apr was run on."""
    directory = tmp_path_factory.mktemp("wide") / "model"
    write(directory, Shape(896, 14, 2, 64, 1, 320, seed=61))
    return directory


@pytest.mark.parametrize("noise", [True, False])
def test_a_hidden_size_of_896_agrees_with_apr(
    noise: bool, wide_model: Path, tmp_path: Path
) -> None:
    capture(wide_model, tmp_path / "ours", noise=noise)
    for paths in permutations((tmp_path / "ours", DATA / "apr-896")):
        result = qwenref.diff(*paths)
        assert result.verdict == "agree", report(result)
        assert result.reason.startswith("at float32 precision: 9 stages")
        judged = [stage for stage in result.stages if stage.required]
        assert {stage.floor_origin for stage in judged} == {"manifest" if noise else "generic"}


def test_single_files_of_two_engines_agree_as_their_directories_do(dumps: Dumps) -> None:
    whole = compared(dumps, ("ours", "apr-f32"))
    for stage in whole.stages:
        if stage.required:
            files = [dumps[name] / "layer-0" / f"{stage.stage}.bin" for name in ("ours", "apr-f32")]
            alone = qwenref.diff(*files)
            assert (alone.verdict, alone.single) == ("agree", True), report(alone)
            assert alone.stages == [stage]


def test_what_a_crashed_engine_left_does_not_even_agree_with_itself() -> None:
    left = DATA / "apr-int8-half"
    result = qwenref.diff(left, left)
    assert (result.verdict, result.exit_status) == ("differ", 1)
    nonfinite = stage_of(result, "attn_norm").nonfinite
    assert nonfinite is not None
    assert nonfinite.a == nonfinite.b > 0
    other = qwenref.diff(left, DATA / "apr-f32")
    assert (other.verdict, other.exit_status) == ("incomparable", 2)
