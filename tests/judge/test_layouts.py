"""The same numbers stored otherwise agree, and the report says how they are stored."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import ROOT, TINY

import qwenref
from qwenref.capture import capture
from qwenref.judge.report import report
from qwenref.judge.result import Result, StageResult
from qwenref.model.random_checkpoint import Shape, config_json
from qwenref.stages import ATTENTION, BY_NAME, Stage

DATA = ROOT / "tests" / "data"
CHAIN = [stage.name for stage in ATTENTION]
MASKED = ("attn_scores", "attn_softmax")
BLOCKED = ("qkv_matmul", "qkv_bias")
HEADLESS = ("attn_norm", "attn_out")
SIZES = {"T": 12, "S": 12, "N": 6, "K": 2, "H": 14, "D": 84, "E": 84, "F": 140}
PROMPT = [*b"What is 2+2?"]

Arrays = dict[str, np.ndarray]

every_stage = pytest.mark.parametrize("stage", ATTENTION, ids=lambda stage: stage.name)


def dump_of(engine: str) -> Arrays:
    """Return the nine stages of a real dump, in the axes of `qwenref.stages`."""
    arrays = {}
    for stage in ATTENTION:
        values = qwenref.read_aprt(DATA / engine / "layer-0" / f"{stage.name}.bin").values
        arrays[stage.name] = values.reshape([SIZES[axis] for axis in stage.axes])
    return arrays


APR, LLAMA = dump_of("apr-f32"), dump_of("llama-f32")


def first(tokens: int) -> Arrays:
    """Return a dump of that many tokens: later ones do not change those before."""
    return {
        name: np.array(of[:, :tokens, :tokens] if name in MASKED else of[:tokens])
        for name, of in APR.items()
    }


class Stored(NamedTuple):
    """One way to store a stage.

    `place` gives, for each value stored, its index in the array in the axes of `qwenref.stages`,
    or -1 for padding.
    """

    name: str
    shape: tuple[int, ...]
    place: np.ndarray

    def of(self, values: np.ndarray) -> np.ndarray:
        garbage = np.sin(np.arange(self.place.size)).astype(np.float32)
        return np.where(self.place < 0, garbage, values.reshape(-1)[self.place])


def ways(stage: Stage) -> Iterator[Stored]:
    """Yield all ways to store a stage but the usual one."""
    shape = [SIZES[axis] for axis in stage.axes]
    place = np.arange(np.prod(shape)).reshape(shape)
    if stage.name in HEADLESS:
        yield Stored("D T", (84, 12), place.T.reshape(-1))
        yield Stored("last token", (1, 84), place[-1:].reshape(-1))
        return
    if stage.name not in MASKED:
        place = place.reshape(12, -1, 14)
    letters = "NTS" if stage.name in MASKED else "TJH"
    for order in permutations(range(3)):
        if order != (0, 1, 2):
            stored = place.transpose(order)
            yield Stored(" ".join(letters[i] for i in order), stored.shape, stored.reshape(-1))
    last = place[:, -1:] if stage.name in MASKED else place[-1:]
    yield Stored("last token", last.shape, last.reshape(-1))
    yield Stored("last token, heads last", last.T.shape, last.T.reshape(-1))
    if stage.name in BLOCKED:
        parts = np.split(place, (6, 8), axis=1)
        joined = np.concatenate([part.reshape(-1) for part in parts])
        yield Stored("q, k, v", joined.shape, joined)
    if stage.name in MASKED:
        for keys in (13, 256):
            for name, of in (("keys padded", place), ("last token, keys padded", last)):
                padded = np.pad(of, [(0, 0), (0, 0), (0, keys - 12)], constant_values=-1)
                yield Stored(f"{name} to {keys}", padded.shape, padded.reshape(-1))


EVERY = [(stage, way) for stage in ATTENTION for way in ways(stage)]
REORDERED = [(stage, way) for stage, way in EVERY if way.place.size == APR[stage.name].size]
every_way = pytest.mark.parametrize(
    ("stage", "way"), EVERY, ids=[f"{stage.name}: {way.name}" for stage, way in EVERY]
)
every_order = pytest.mark.parametrize(
    ("stage", "way"), REORDERED, ids=[f"{stage.name}: {way.name}" for stage, way in REORDERED]
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our dump of layer 0 of the bundled checkpoint, with a manifest."""
    output = tmp_path_factory.mktemp("ours") / "dump"
    capture(TINY, output)
    return output


def stage_of(result: Result, name: str) -> StageResult:
    (found,) = (stage for stage in result.stages if stage.stage == name)
    return found


@cache
def usual_layouts() -> dict[str, str | None]:
    return {of.stage: of.layout.a for of in qwenref.diff(APR, LLAMA, model=TINY).stages}


def assert_same_numbers(result: Result, name: str, place: int | None = None) -> StageResult:
    """Check that dumps agree, and that a stage of one of them is said to be stored otherwise."""
    assert (result.verdict, result.exit_status) == ("agree", 0), report(result)
    assert result.reason.startswith("at float32 precision")
    found = stage_of(result, name)
    layouts = found.layout.a, found.layout.b
    assert None not in layouts
    assert layouts[0] != layouts[1]
    assert any("layout, not arithmetic" in note for note in found.notes)
    assert "layout, not arithmetic" in " ".join(report(result).split())
    if place is not None:
        assert layouts[1 - place] == usual_layouts()[name]
    return found


# --- one side stored otherwise


@every_way
def test_arrays_of_unknown_shape_agree_whatever_their_order(stage: Stage, way: Stored) -> None:
    other = LLAMA | {stage.name: way.of(LLAMA[stage.name])}
    options: Any = {"model": TINY, "stages": [stage.name]}
    assert_same_numbers(qwenref.diff(APR, other, **options), stage.name, 1)
    assert_same_numbers(qwenref.diff(other, APR, **options), stage.name, 0)


@every_way
def test_arrays_of_known_shape_agree_whatever_their_order(stage: Stage, way: Stored) -> None:
    other = LLAMA | {stage.name: way.of(LLAMA[stage.name]).reshape(1, *way.shape)}
    result = qwenref.diff(APR, other, model=TINY, stages=[stage.name])
    assert_same_numbers(result, stage.name, 1)


@every_way
def test_files_without_a_header_agree_with_a_dump_that_has_a_manifest(
    stage: Stage, way: Stored, ours: Path, tmp_path: Path
) -> None:
    for name, values in APR.items():
        stored = way.of(values) if name == stage.name else values
        stored.astype("<f4").tofile(tmp_path / f"layer_0_{name}.f32")
    place = len(way.name) % 2
    paths = (tmp_path, ours) if place == 0 else (ours, tmp_path)
    assert_same_numbers(qwenref.diff(*paths, stages=[stage.name]), stage.name, place)


@every_way
def test_single_files_agree_whatever_their_order(
    stage: Stage, way: Stored, ours: Path, tmp_path: Path
) -> None:
    (tmp_path / "layer-0").mkdir()
    file = tmp_path / "layer-0" / f"{stage.name}.raw"
    way.of(APR[stage.name]).astype("<f4").tofile(file)
    ours_ = ours / "layer-0" / f"{stage.name}.bin"
    result = qwenref.diff(ours_, file)
    assert result.verdict == "agree", report(result)
    assert qwenref.diff(file, ours_).verdict == "agree"


@pytest.mark.parametrize(
    ("name", "order", "expected"),
    [
        ("attn_norm", (1, 0), "D T"),
        ("q_post_rope", (1, 0, 2), "N T H"),
        ("k_post_rope", (1, 0, 2), "K T H"),
        ("q_post_rope", (0, 2, 1), "T H N"),
        ("attn_scores", (0, 2, 1), "N S T"),
    ],
)
def test_a_layout_is_named_by_its_axes(name: str, order: tuple[int, ...], expected: str) -> None:
    other = LLAMA | {name: LLAMA[name].transpose(order).reshape(-1)}
    layout = stage_of(qwenref.diff(APR, other, model=TINY), name).layout
    assert (layout.a, layout.b) == (" ".join(BY_NAME[name].axes), expected)


def test_all_stages_at_once_as_hooks_in_transformers_give_them() -> None:
    other = LLAMA | {
        name: LLAMA[name].swapaxes(0, 1)[None] for name in ("q_post_rope", "k_post_rope")
    }
    for pair in ((APR, other), (other, APR)):
        assert qwenref.diff(*pair, model=TINY).verdict == "agree"


@every_order
def test_another_order_differs_if_the_layout_is_strict(stage: Stage, way: Stored) -> None:
    other = LLAMA | {stage.name: way.of(LLAMA[stage.name])}
    for pair in ((APR, other), (other, APR)):
        result = qwenref.diff(*pair, model=TINY, stages=[stage.name], strict_layout=True)
        assert result.verdict == "differ", report(result)
        assert result.first_divergence is not None
        assert result.first_divergence.stage == stage.name


@every_way
def test_another_layout_never_agrees_if_the_layout_is_strict(
    stage: Stage, way: Stored, ours: Path, tmp_path: Path
) -> None:
    way.of(APR[stage.name]).astype("<f4").tofile(tmp_path / f"layer_0_{stage.name}.f32")
    result = qwenref.diff(ours, tmp_path, stages=[stage.name], strict_layout=True)
    assert result.exit_status != 0, report(result)


# --- q, k, v apart


def in_parts(values: np.ndarray, *, heads_first: bool) -> list[np.ndarray]:
    parts = np.split(values.reshape(12, 10, 14), (6, 8), axis=1)
    return [part.swapaxes(0, 1) if heads_first else part for part in parts]


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.json"
    of = {f"{stage}_{part}": f"{stage}.{part}" for stage in BLOCKED for part in "qkv"}
    path.write_text(json.dumps(of))
    return path


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("name", BLOCKED)
def test_q_k_v_may_be_three_arrays(name: str, heads_first: bool, names: Path) -> None:
    parts = in_parts(LLAMA[name], heads_first=heads_first)
    other = {stage: values for stage, values in LLAMA.items() if stage != name}
    other |= {f"{name}_{part}": values for part, values in zip("qkv", parts, strict=True)}
    for place, pair in enumerate([(other, APR), (APR, other)]):
        result = qwenref.diff(*pair, model=TINY, names=names)
        found = assert_same_numbers(result, name, place)
        assert found.dim_product == 1680
        assert [block.name for block in found.blocks] == ["q", "k", "v"]


@pytest.mark.parametrize("part", "qkv")
def test_a_fault_in_one_of_three_arrays_is_found_in_it(part: str, names: Path) -> None:
    parts = dict(zip("qkv", in_parts(APR["qkv_bias"], heads_first=False), strict=True))
    other = {stage: values for stage, values in APR.items() if stage != "qkv_bias"}
    index = parts[part].size - 3
    parts[part] = parts[part].copy()
    parts[part].reshape(-1)[index] += 30
    other |= {f"qkv_bias_{name}": values for name, values in parts.items()}
    result = qwenref.diff(other, APR, model=TINY, names=names)
    assert result.verdict == "differ"
    assert result.first_divergence is not None
    assert (result.first_divergence.stage, result.first_divergence.block) == ("qkv_bias", part)
    before = sum(parts[name].size for name in "qkv"["qkv".index(part) :: -1]) - parts[part].size
    assert stage_of(result, "qkv_bias").max_abs_diff_index == before + index


def test_v_alone_is_not_measured(names: Path) -> None:
    other = {stage: values for stage, values in LLAMA.items() if stage != "qkv_bias"}
    other["qkv_bias_v"] = in_parts(LLAMA["qkv_bias"], heads_first=False)[2]
    result = qwenref.diff(APR, other, model=TINY, names=names)
    found = stage_of(result, "qkv_bias")
    assert (result.verdict, found.status, found.rel_l2) == ("incomplete", "unmeasured", None)
    assert found.reason is not None
    assert "q, k" in found.reason


def test_names_of_transformers_modules(tmp_path: Path) -> None:
    parts = in_parts(LLAMA["qkv_bias"], heads_first=False)
    attention = "model.layers.0.self_attn"
    files = {f"{attention}.{part}_proj": of for part, of in zip("qkv", parts, strict=True)}
    files |= {
        "model.layers.0.input_layernorm": LLAMA["attn_norm"],
        f"{attention}.o_proj.input": LLAMA["attention"],
        f"{attention}.o_proj": LLAMA["attn_out"],
    }
    for name, values in files.items():
        np.save(tmp_path / f"{name}.npy", values.reshape(1, 12, -1))
    result = qwenref.diff(APR, tmp_path, model=TINY, names="hf", allow_missing=True)
    assert result.verdict == "agree", report(result)
    assert "4 stages" in result.reason


def test_names_of_llama_cpp(tmp_path: Path) -> None:
    scale = np.float32(14**0.5)
    files = {
        "attn_norm-0": LLAMA["attn_norm"],
        "Qcur-0-ROPE": LLAMA["q_post_rope"],
        "Kcur-0-ROPE": LLAMA["k_post_rope"],
        "kq-0": np.pad(LLAMA["attn_scores"] * scale, [(0, 0), (0, 0), (0, 244)]),
        "kq_soft_max-0": np.pad(LLAMA["attn_softmax"], [(0, 0), (0, 0), (0, 244)]),
        "kqv_out-0": LLAMA["attention"],
        "attn_out-0": LLAMA["attn_out"],
    }
    for part, values in zip("QKV", in_parts(LLAMA["qkv_bias"], heads_first=False), strict=True):
        files[f"{part}cur-0-ADD"] = values
    for part, values in zip("QKV", in_parts(LLAMA["qkv_matmul"], heads_first=False), strict=True):
        files[f"{part}cur-0-MUL_MAT"] = values
    for name, values in files.items():
        values.astype("<f4").tofile(tmp_path / f"{name}.f32")
    for pair in ((APR, tmp_path), (tmp_path, APR)):
        result = qwenref.diff(*pair, model=TINY, names="llama.cpp")
        assert result.verdict == "agree", report(result)
        assert "9 stages" in result.reason


# --- both sides stored otherwise


def test_a_declared_layout_is_believed(ours: Path, tmp_path: Path) -> None:
    capture(TINY, tmp_path / "hf", layout="hf", noise=False)
    for paths in ((ours, tmp_path / "hf"), (tmp_path / "hf", ours)):
        result = qwenref.diff(*paths)
        assert result.verdict == "agree"
        place = paths.index(tmp_path / "hf")
        layout = stage_of(result, "q_post_rope").layout
        assert (layout.a, layout.b)[place] == "N T H"
        assert (layout.a, layout.b)[1 - place] == "T N H"
        strict = qwenref.diff(*paths, strict_layout=True)
        assert strict.verdict == "differ"
        assert strict.first_divergence is not None
        assert strict.first_divergence.stage == "q_post_rope"
    twin = shutil.copytree(tmp_path / "hf", tmp_path / "twin")
    assert qwenref.diff(tmp_path / "hf", twin, strict_layout=True).verdict == "agree"


@pytest.mark.parametrize("layout", ["apr", "hf"])
def test_what_run_returns_is_in_its_layout(layout: str, ours: Path) -> None:
    stages = qwenref.run(TINY, PROMPT, layout=layout)
    for pair in ((ours, stages), (stages, ours)):
        result = qwenref.diff(*pair)
        assert result.verdict == "agree", report(result)
    apr = qwenref.run(TINY, PROMPT)
    assert qwenref.diff(stages, apr, model=TINY).verdict == "agree"


def order(values: np.ndarray, *axes: int) -> np.ndarray:
    return values.transpose(axes).reshape(-1)


BOTH: dict[str, tuple[str, Callable[[np.ndarray], Any], Callable[[np.ndarray], Any]]] = {
    "N T H and T H N": ("q_post_rope", lambda a: order(a, 1, 0, 2), lambda b: order(b, 0, 2, 1)),
    "N T H and H N T": ("q_post_rope", lambda a: order(a, 1, 0, 2), lambda b: order(b, 2, 1, 0)),
    "the same, N T H": ("k_post_rope", lambda a: order(a, 1, 0, 2), lambda b: order(b, 1, 0, 2)),
    "transposed and padded": (
        "attn_softmax",
        lambda a: order(a, 0, 2, 1),
        lambda b: np.pad(b, [(0, 0), (0, 0), (0, 20)]).reshape(-1),
    ),
    "padded otherwise": (
        "attn_softmax",
        lambda a: np.pad(a, [(0, 0), (0, 0), (0, 4)]).reshape(-1),
        lambda b: np.pad(b, [(0, 0), (0, 0), (0, 244)]).reshape(-1),
    ),
    "D T twice": ("attn_out", lambda a: order(a, 1, 0), lambda b: order(b, 1, 0)),
}


@pytest.mark.parametrize("case", BOTH)
def test_both_sides_may_be_stored_otherwise(case: str) -> None:
    name, of_a, of_b = BOTH[case]
    a, b = APR | {name: of_a(APR[name])}, LLAMA | {name: of_b(LLAMA[name])}
    for pair in ((a, b), (b, a)):
        result = qwenref.diff(*pair, model=TINY, stages=[name])
        assert result.verdict == "agree", report(result)


def test_three_dumps_in_three_layouts_agree(ours: Path) -> None:
    b = APR | {"q_post_rope": order(APR["q_post_rope"], 1, 0, 2)}
    c = LLAMA | {"q_post_rope": order(LLAMA["q_post_rope"], 0, 2, 1)}
    result = qwenref.diff(ours, b, c)
    assert result.verdict == "agree", report(result)


def last(tokens: int) -> Arrays:
    """Return the last tokens of a dump, as of a pass after others: few queries, many keys."""
    return {
        name: np.array(values[:, -tokens:] if name in MASKED else values[-tokens:])
        for name, values in APR.items()
    }


@pytest.mark.parametrize("key", [0, 5, 9])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("name", MASKED)
def test_of_few_queries_against_many_keys_every_key_counts(
    name: str, tokens: int, key: int
) -> None:
    a, b = last(tokens), last(tokens)
    assert qwenref.diff(a, b, model=TINY).verdict == "agree"
    b[name][3, 0, key] += 2
    result = qwenref.diff(a, b, model=TINY)
    assert result.verdict == "differ", report(result)


# --- where a fault is


@every_order
def test_a_fault_in_another_layout_is_found_in_its_slice(
    stage: Stage, way: Stored, ours: Path
) -> None:
    values = LLAMA[stage.name].copy()
    if stage.name in HEADLESS:
        slice_, expected = values[7], ("token", 7)
    else:
        by_head = values.swapaxes(0, 1) if stage.name in MASKED else values.reshape(12, -1, 14)
        slice_, expected = by_head[:, 1], ("head", 1)
    slice_ *= 1.5
    other = LLAMA | {stage.name: way.of(values)}
    for pair in ((ours, other), (other, ours)):
        result = qwenref.diff(*pair, stages=[stage.name])
        assert result.verdict == "differ"
        assert result.first_divergence is not None
        assert result.first_divergence.stage == stage.name
        found = stage_of(result, stage.name)
        assert found.worst is not None
        assert (found.worst.axis, found.worst.index) == expected
        assert found.worst.value is not None
        assert 0.3 < found.worst.value < 0.501  # of the rms of all heads, at least
        assert any("layout unsure" in note for note in found.notes)


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("cell", [(0, 0), (9, 4), (9, 9), (11, 0)])
def test_no_cell_is_lost_between_scores_and_their_transpose(
    name: str, cell: tuple[int, int]
) -> None:
    transposed = APR[name].swapaxes(1, 2).copy()
    transposed[3, cell[1], cell[0]] += 20
    other = APR | {name: transposed.reshape(-1)}
    for pair in ((APR, other), (other, APR)):
        result = qwenref.diff(*pair, model=TINY)
        assert result.verdict == "differ", report(result)


@every_way
def test_an_order_that_is_not_legal_differs(stage: Stage, way: Stored) -> None:
    scrambled = np.random.default_rng(way.place.size).permutation(way.of(LLAMA[stage.name]))
    other = LLAMA | {stage.name: scrambled}
    for pair in ((APR, other), (other, APR)):
        result = qwenref.diff(*pair, model=TINY, stages=[stage.name])
        assert (result.verdict, result.exit_status) == ("differ", 1), report(result)
        assert result.first_divergence is not None
        assert result.first_divergence.stage == stage.name


@every_way
def test_the_index_of_a_difference_is_that_in_the_first_file(stage: Stage, way: Stored) -> None:
    stored = way.of(APR[stage.name])
    visible = np.ones(APR[stage.name].shape, bool)
    if stage.name in MASKED:
        visible &= np.tri(12, dtype=bool)
    candidates = np.flatnonzero((way.place >= 0) & visible.reshape(-1)[way.place])
    index = int(candidates[len(candidates) // 3])
    stored[index] += 0.05 * np.sqrt(np.mean(stored**2))  # so little that the layout is found
    other = APR | {stage.name: stored}
    options: Any = {"model": TINY, "dtype": "float32", "stages": [stage.name]}
    result = qwenref.diff(other, APR, **options)
    assert result.verdict == "differ"
    found = stage_of(result, stage.name)
    assert found.dim_product == stored.size
    assert found.max_abs_diff_index == index
    assert found.top_diffs[0].a == stored[index]
    assert found.top_diffs[0].b == APR[stage.name].reshape(-1)[way.place[index]]
    back = stage_of(qwenref.diff(APR, other, **options), stage.name)
    assert back.max_abs_diff_index == way.place[index]


@pytest.mark.parametrize(("stage", "way"), REORDERED[::5])
def test_another_layout_at_another_precision(stage: Stage, way: Stored) -> None:
    coarse = dump_of("llama-bf16")
    other = coarse | {stage.name: way.of(coarse[stage.name])}
    result = qwenref.diff(APR, other, model=TINY)
    assert result.verdict == "agree", report(result)
    assert "bfloat16 precision from qkv_matmul on (float32 before)" in result.reason
    found = stage_of(result, stage.name)
    assert found.layout.a != found.layout.b


# --- what could be chance


@pytest.mark.parametrize("tokens", [1, 2, 6])
def test_layouts_of_square_shapes_are_told_apart_by_values(tokens: int) -> None:
    a = first(tokens)
    for name in ("q_post_rope", "k_post_rope"):
        b = a | {name: a[name].swapaxes(0, 1).copy()}
        for pair in ((a, b), (b, a)):
            result = qwenref.diff(*pair, model=TINY)
            assert result.verdict == "agree", report(result)
            if tokens > 1:
                layout = stage_of(result, name).layout
                assert layout.a != layout.b
    for name in MASKED:
        b = a | {name: a[name].swapaxes(1, 2).copy()}
        result = qwenref.diff(a, b, model=TINY)
        assert result.verdict == "agree", report(result)


@pytest.mark.parametrize("value", [0, 1, 0.3])
def test_constant_arrays_agree_in_the_usual_layout(value: float) -> None:
    a = {name: np.full(values.shape, value, np.float32) for name, values in APR.items()}
    result = qwenref.diff(a, a, model=TINY)
    assert result.verdict == "agree"
    for stage in result.stages:
        assert (stage.layout.a, stage.rel_l2) == (stage.layout.b, 0)
        assert not any("layout" in note for note in stage.notes)


def test_a_prompt_of_one_token_repeated_agrees() -> None:
    a = qwenref.run(TINY, [7] * 5)._asdict()
    for name in ("attn_norm", "attn_out"):
        b = a | {name: a[name].T.copy()}
        assert qwenref.diff(a, b, model=TINY).verdict == "agree"


def test_a_layout_that_could_be_chance_is_said_to_be() -> None:
    rows = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
    values = np.broadcast_to((rows + rows.T)[:, :, None], (6, 6, 14))  # symmetric in T and N
    other = order(values, 2, 1, 0)
    result = qwenref.diff({"q_post_rope": values.copy()}, {"q_post_rope": other.copy()}, model=TINY)
    found = stage_of(result, "q_post_rope")
    assert any("chance" in note for note in found.notes), report(result)


@pytest.mark.parametrize("name", MASKED)
def test_a_flat_array_says_nothing_of_its_shape(name: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_json(Shape(84, 1, 1, 8, 1, 320, head_dim=14))))
    a = {name: APR[name][:1]}
    b = {name: LLAMA[name][:1].reshape(-1)}
    for pair in ((a, b), (b, a)):
        result = qwenref.diff(*pair, model=config, stages=[name])
        found = stage_of(result, name)
        assert found.status == "agree", report(result)
        assert found.layout.a == found.layout.b


def test_one_token_and_one_head(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_json(Shape(2, 1, 1, 8, 1, 320, head_dim=2))))
    shapes = {"N": 1, "K": 1, "H": 2, "D": 2, "E": 2, "F": 6, "T": 1, "S": 1}
    a = {
        stage.name: np.arange(1, 1 + np.prod([shapes[axis] for axis in stage.axes])) / 7
        for stage in ATTENTION
    }
    assert qwenref.diff(a, a, model=config).verdict == "agree"
    for name in CHAIN:
        b = a | {name: a[name] * 2}
        for pair in ((a, b), (b, a)):
            result = qwenref.diff(*pair, model=config)
            assert result.verdict == "differ", report(result)


# --- how many tokens there are


@pytest.mark.parametrize(("tokens", "keys"), [(1, 256), (4, 256), (9, 64), (9, 256), (12, 256)])
def test_padded_keys_of_a_single_file_do_not_hide_how_many_tokens_there_are(
    tokens: int, keys: int, tmp_path: Path
) -> None:
    scores = first(tokens)["attn_softmax"]
    np.save(tmp_path / "attn_softmax.npy", scores.reshape(-1))
    padded = np.pad(scores, [(0, 0), (0, 0), (0, keys - tokens)])
    padded.astype("<f4").tofile(tmp_path / "layer_0_attn_softmax.f32")
    paths = tmp_path / "attn_softmax.npy", tmp_path / "layer_0_attn_softmax.f32"
    for pair in (paths, paths[::-1]):
        result = qwenref.diff(*pair, model=TINY)
        assert result.verdict == "agree", report(result)


@pytest.mark.parametrize(("one", "other"), [(12, 7), (12, 6), (12, 11), (12, 3)])
def test_prompts_of_different_length_are_incomparable_even_without_manifests(
    one: int, other: int
) -> None:
    for pair in ((first(one), first(other)), (first(other), first(one))):
        result = qwenref.diff(*pair, model=TINY)
        assert (result.verdict, result.exit_status) == ("incomparable", 2), report(result)


def test_without_shapes_only_whole_and_elements_are_judged() -> None:
    result = qwenref.diff(APR, LLAMA)
    assert result.verdict == "agree"
    for stage in result.stages:
        assert (stage.layout.a, stage.layout.b, stage.blocks) == (None, None, [])
        assert stage.worst is not None
        assert stage.worst.axis in ("whole", "element")
    other = LLAMA | {"q_post_rope": LLAMA["q_post_rope"].swapaxes(0, 1)}
    assert qwenref.diff(APR, other).verdict == "differ"
