"""What holds of any two dumps, however small, and metrics against plain NumPy in float64."""

import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import qwenref
from qwenref.errors import QwenrefError
from qwenref.judge.asked import asked_stages
from qwenref.judge.diff import measure_sources
from qwenref.judge.measure import Options
from qwenref.judge.measurement import Pair
from qwenref.judge.report import report
from qwenref.judge.result import Result, StageResult
from qwenref.model.random_checkpoint import Shape, config_json
from qwenref.stages import ATTENTION, BY_NAME, Stage

CHAIN = [stage.name for stage in ATTENTION]
MASKED = ("attn_scores", "attn_softmax")
BLOCKED = ("qkv_matmul", "qkv_bias")
HEADLESS = ("attn_norm", "attn_out")

Arrays = dict[str, np.ndarray]

every_stage = pytest.mark.parametrize("stage", ATTENTION, ids=lambda stage: stage.name)
few = settings(max_examples=20)
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)


class Sizes(NamedTuple):
    T: int
    G: int
    K: int
    H: int
    D: int

    @property
    def N(self) -> int:
        return self.G * self.K

    def letters(self) -> dict[str, int]:
        return {letter: getattr(self, letter) for letter in "NKHD"}

    def shape(self, stage: Stage) -> tuple[int, ...]:
        E, F = self.N * self.H, (self.N + 2 * self.K) * self.H
        sizes = self._asdict() | {"S": self.T, "N": self.N, "E": E, "F": F}
        return tuple(sizes[axis] for axis in stage.axes)

    def by_head(self, stage: Stage, values: np.ndarray) -> np.ndarray:
        """Return a view [token, head, cell]."""
        values = values.reshape(self.shape(stage))
        if stage.name in MASKED:
            return values.swapaxes(0, 1)
        return values.reshape(self.T, -1, self.D if stage.name in HEADLESS else self.H)


SIZES = st.builds(
    Sizes, st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.sampled_from([2, 4, 6]),
    st.integers(1, 7),
)  # fmt: skip
NOT_TINY = st.builds(
    Sizes, st.integers(3, 7), st.integers(1, 3), st.just(2), st.sampled_from([6, 8]),
    st.integers(9, 14),
)  # fmt: skip
AWKWARD = Sizes(5, 3, 2, 4, 7)
SEEDS = st.integers(0, 2**32 - 1)
NOISE = st.sampled_from([0.0, 1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
FAR_FROM_FLOORS = st.sampled_from([0.0, 1e-8, 2e-4, 0.3, 1.0])
SUBSETS = st.sets(st.sampled_from(CHAIN), min_size=1, max_size=3)
ORDERS = st.sampled_from([*permutations(range(3))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs")


def config_of(sizes: Sizes, folder: Path) -> Path:
    path = folder / f"{'-'.join(map(str, sizes))}.json"
    if not path.exists():
        shape = Shape(sizes.D, sizes.N, sizes.K, 8, 1, 320, head_dim=sizes.H)
        path.write_text(json.dumps(config_json(shape)))
    return path


def drawn(sizes: Sizes, seed: int) -> Arrays:
    """Draw a dump; scores and softmax have zeros where keys come after queries."""
    rng = np.random.default_rng(seed)
    found = {}
    for stage in ATTENTION:
        values = rng.standard_normal(sizes.shape(stage)).astype(np.float32)
        if stage.name == "attn_softmax":
            values = np.tril(np.exp(values))
            values /= values.sum(axis=-1, keepdims=True)
        found[stage.name] = np.tril(values) if stage.name in MASKED else values
    return found


def noisy(arrays: Mapping[str, np.ndarray], noise: float, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {
        name: (values * (1 + noise * rng.standard_normal(values.shape))).astype(np.float32)
        for name, values in arrays.items()
    }


def orders(stage: Stage, sizes: Sizes, values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield a stage in all orders of its axes, flat."""
    if stage.name in HEADLESS:
        yield values.reshape(-1)
        yield values.T.reshape(-1)
        return
    for order in permutations(range(3)):
        yield sizes.by_head(stage, values).transpose(order).reshape(-1)


def stage_of(result: Result, name: str) -> StageResult:
    (found,) = (stage for stage in result.stages if stage.stage == name)
    return found


def near(number: float | None) -> Any:
    return None if number is None else pytest.approx(number, rel=1e-9, abs=1e-15)


def assert_json(result: Result) -> None:
    text = result.to_json()
    json.loads(text, parse_constant=pytest.fail)
    assert msgspec.json.decode(text, type=Result) == result


# --- properties


def assert_same_judgement(one: Result, other: Result) -> None:
    """Check what holds of the same dumps in the other order, however they are stored."""
    assert one.verdict == other.verdict, report(one) + "\n\n" + report(other)
    assert one.exit_status == other.exit_status
    for a, b in zip(one.stages, other.stages, strict=True):
        assert (a.stage, a.status, a.required) == (b.stage, b.status, b.required)
        assert (a.precision, a.floor_origin) == (b.precision, b.floor_origin)
        assert a.rel_l2 == near(b.rel_l2), a.stage


def assert_swapped(one: Result, other: Result) -> None:
    """Check what holds of the same dumps in the other order, stored alike."""
    assert_same_judgement(one, other)
    assert_json(one)
    assert one.first_divergence == other.first_divergence
    for a, b in zip(one.stages, other.stages, strict=True):
        if a.layout.a != a.layout.b:
            continue  # of few values, or many that are not finite, some order may fit by chance
        assert a.block == b.block
        assert (a.cosine_sim, a.total_variation) == (near(b.cosine_sim), near(b.total_variation))
        if a.stage != "attn_scores":  # which may be scaled to those of the first
            assert (a.rms_diff, a.max_abs_diff) == (near(b.rms_diff), near(b.max_abs_diff))
            assert a.top_diffs == [
                msgspec.structs.replace(top, a=top.b, b=top.a) for top in b.top_diffs
            ]
        assert (a.worst is None) == (b.worst is None)
        if a.worst is not None and b.worst is not None:
            assert a.worst.value == near(b.worst.value)
        assert (a.masked.a, a.masked.b) == (b.masked.b, b.masked.a)
        if a.norm_ratio and b.norm_ratio:
            assert a.norm_ratio == pytest.approx(1 / b.norm_ratio)
        if a.nonfinite is not None and b.nonfinite is not None:
            assert (a.nonfinite.a, a.nonfinite.b) == (b.nonfinite.b, b.nonfinite.a)


@few
@given(SIZES, SEEDS, NOISE, SUBSETS, st.sampled_from(["auto", "float32", "float16", "bfloat16"]))
def test_the_order_of_two_dumps_does_not_matter(
    folder: Path, sizes: Sizes, seed: int, noise: float, chosen: set[str], dtype: str
) -> None:
    a = drawn(sizes, seed)
    b = a | noisy({name: a[name] for name in chosen}, noise, seed + 1)
    options: Any = {"model": config_of(sizes, folder), "dtype": dtype, "stages": chosen}
    assert_swapped(qwenref.diff(a, b, **options), qwenref.diff(b, a, **options))


SPECIAL = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, 1e-45])


@few
@given(SIZES, SEEDS, st.sampled_from(CHAIN), st.lists(SPECIAL, min_size=1, max_size=4), st.data())
def test_the_order_does_not_matter_whatever_the_values(
    folder: Path, sizes: Sizes, seed: int, name: str, values: list[float], data: st.DataObject
) -> None:
    a, b = drawn(sizes, seed), drawn(sizes, seed)
    for value in values:
        arrays = data.draw(st.sampled_from([(a,), (b,), (a, b)]))
        index = data.draw(st.integers(0, a[name].size - 1))
        for of in arrays:
            of[name].reshape(-1)[index] = value
    for model in (config_of(sizes, folder), None):
        options: Any = {"model": model, "stages": [name]}
        assert_swapped(qwenref.diff(a, b, **options), qwenref.diff(b, a, **options))


def test_the_order_does_not_matter_of_nan_and_a_mask_alone() -> None:
    nan, mask = ({"attn_scores": np.full(1, value, np.float32)} for value in (math.nan, -math.inf))
    one, other = qwenref.diff(nan, mask), qwenref.diff(mask, nan)
    assert one.verdict == other.verdict == "incomplete"
    assert_swapped(one, other)


def test_one_huge_value_does_not_make_an_order_of_axes() -> None:
    right = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    wrong = right.copy()
    wrong[0, :2], wrong[1, 3] = (3e38, math.nan), math.nan
    options = Options(sizes={"N": 2, "K": 1, "H": 2, "D": 3})
    for pair in ((right, wrong), (wrong, right)):
        dumps = [{"qkv_matmul": of} for of in pair]
        (stage,) = measure_sources(*dumps, names=None, options=options).stages
        errors = stage.pairs[0].errors
        assert errors is not None
        assert errors.blocks == [None, 0, 0]


def reordered(b: Arrays, sizes: Sizes, names: set[str], data: st.DataObject) -> Arrays:
    """Return a dump some of whose stages are stored in another order, without a shape."""
    other = dict(b)
    for name in sorted(names):
        flat = [*orders(BY_NAME[name], sizes, b[name])]
        other[name] = flat[data.draw(st.integers(0, len(flat) - 1))]
    return other


@settings(few, phases=NO_SHRINKING)
@given(NOT_TINY, SEEDS, FAR_FROM_FLOORS, SUBSETS, st.data())
def test_a_legal_order_of_axes_does_not_change_the_verdict(
    folder: Path, sizes: Sizes, seed: int, noise: float, chosen: set[str], data: st.DataObject
) -> None:
    a = drawn(sizes, seed)
    b = noisy(a, noise, seed + 1)
    options: Any = {"model": config_of(sizes, folder), "stages": chosen}
    expected = qwenref.diff(a, b, **options)
    other = reordered(b, sizes, chosen, data)
    found, swapped = qwenref.diff(a, other, **options), qwenref.diff(other, a, **options)
    assert found.verdict == expected.verdict, report(found)
    assert_same_judgement(found, swapped)


@settings(few, phases=NO_SHRINKING)
@given(SIZES, SEEDS, SUBSETS, st.data())
def test_an_order_of_tiny_arrays_is_found_or_said_to_be_unsure(
    folder: Path, sizes: Sizes, seed: int, chosen: set[str], data: st.DataObject
) -> None:
    a = drawn(sizes, seed)
    other = reordered(a, sizes, chosen, data)
    for pair in ((a, other), (other, a)):
        result = qwenref.diff(*pair, model=config_of(sizes, folder), stages=chosen)
        for stage in result.stages:
            unsure = any("chance" in note or "unsure" in note for note in stage.notes)
            assert stage.status == "agree" or unsure, report(result)


@few
@given(SIZES, SEEDS, SUBSETS, st.booleans(), st.booleans())
def test_twice_as_much_never_agrees(
    folder: Path, sizes: Sizes, seed: int, chosen: set[str], known: bool, allow_missing: bool
) -> None:
    a = {name: values for name, values in drawn(sizes, seed).items() if name in chosen}
    b = {name: 2 * values for name, values in a.items()}
    model = config_of(sizes, folder) if known else None
    for pair in ((a, b), (b, a)):
        result = qwenref.diff(*pair, model=model, allow_missing=allow_missing)
        assert result.verdict != "agree", report(result)
        assert result.exit_status != 0


@few
@given(SIZES, st.data(), st.booleans())
def test_a_dump_is_the_same_as_itself(
    folder: Path, sizes: Sizes, data: st.DataObject, known: bool
) -> None:
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    a = {
        stage.name: data.draw(npst.arrays(np.float32, sizes.shape(stage), elements=numbers))
        for stage in ATTENTION
    }
    result = qwenref.diff(a, a, model=config_of(sizes, folder) if known else None)
    assert (result.verdict, result.exit_status) == ("agree", 0), report(result)
    for stage in result.stages:
        assert (stage.rel_l2, stage.rms_diff, stage.max_abs_diff) == (0, 0, 0)
        assert stage.worst is None or stage.worst.value == 0
        assert stage.cosine_sim in (pytest.approx(1), None)
        assert stage.norm_ratio in (1, None)
        assert not any("layout" in note for note in stage.notes)
    assert_json(result)


@few
@given(SIZES, SEEDS, st.sampled_from(CHAIN), st.sampled_from(["a", "b", "both"]), st.data())
def test_nan_never_agrees(
    folder: Path, sizes: Sizes, seed: int, name: str, where: str, data: st.DataObject
) -> None:
    a, b = drawn(sizes, seed), drawn(sizes, seed)
    by_head = [sizes.by_head(BY_NAME[name], of[name]) for of in (a, b)]
    tokens, heads, cells = by_head[0].shape
    token = data.draw(st.integers(0, tokens - 1))
    visible = token if name in MASKED else cells - 1
    place = token, data.draw(st.integers(0, heads - 1)), data.draw(st.integers(0, visible))
    for view, letter in zip(by_head, "ab", strict=True):
        if where in (letter, "both"):
            view[place] = np.nan
    for model, tolerance in ((config_of(sizes, folder), None), (None, 1e6)):
        result = qwenref.diff(a, b, model=model, stages=[name], tolerance=tolerance)
        assert result.verdict == "differ", report(result)
        assert_json(result)


@few
@given(SIZES, SEEDS, st.lists(NOISE, min_size=3, max_size=3), st.sampled_from(CHAIN), ORDERS)
@example(Sizes(4, 2, 2, 4, 5), 350, [0.0, 1e-8, 1e-6], "qkv_bias", (1, 0, 2))  # one worst slice
def test_the_order_of_three_dumps_does_not_matter(
    folder: Path, sizes: Sizes, seed: int, noises: list[float], name: str, order: tuple[int, ...]
) -> None:
    truth = drawn(sizes, seed)
    dumps = [
        truth | noisy({name: truth[name]}, noise, seed + number)
        for number, noise in enumerate(noises)
    ]
    options: Any = {"model": config_of(sizes, folder), "stages": [name]}
    first, result = (qwenref.diff(*of, **options) for of in (dumps, [dumps[i] for i in order]))
    assert (result.verdict, result.first_divergence) == (first.verdict, first.first_divergence)
    odd = None if result.odd_one_out is None else order[result.odd_one_out]
    assert odd == first.odd_one_out
    for a, b in zip(first.stages, result.stages, strict=True):
        assert a.status == b.status
        assert {pair.precision for pair in a.pairs} == {pair.precision for pair in b.pairs}
        assert a.rel_l2 == near(b.rel_l2)


@few
@given(SIZES, SEEDS, NOISE, SUBSETS)
def test_a_tolerance_says_what_is_accepted(
    folder: Path, sizes: Sizes, seed: int, noise: float, chosen: set[str]
) -> None:
    a = drawn(sizes, seed)
    b = noisy(a, noise, seed + 1)
    pairs = measured(a, b, sizes, *chosen)
    errors = [pair.errors for pair in pairs.values() if pair.errors is not None]
    slices = [[e.whole, *e.blocks, *e.heads, *e.tokens] for e in errors]
    worst = max(error for of in slices for error in of if error is not None)
    options: Any = {"model": config_of(sizes, folder), "strict_layout": True, "stages": chosen}
    assert qwenref.diff(a, b, tolerance=worst * 1.001 + 1e-300, **options).verdict == "agree"
    if worst:
        assert qwenref.diff(a, b, tolerance=worst * 0.999, **options).verdict == "differ"


# --- numbers


def measured(a: Any, b: Any, sizes: Sizes, *stages: str) -> dict[str, Pair]:
    chosen = asked_stages(stages) if stages else None
    options = Options(sizes=sizes.letters(), strict_layout=True, stages=chosen)
    measurement = measure_sources(a, b, names=None, options=options)
    return {stage.stage: stage.pairs[0] for stage in measurement.stages}


def root(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


def ratio(off: float, scale: float) -> float | None:
    return 0.0 if off == 0 else None if scale == 0 else off / scale


class Plain:
    """The metrics of a stage, one slice after the other."""

    def __init__(self, stage: Stage, a: np.ndarray, b: np.ndarray, sizes: Sizes):
        self.a, self.b = (sizes.by_head(stage, of.astype(np.float64)) for of in (a, b))
        T, J, W = self.a.shape
        self.visible = np.ones((T, J, W), bool)
        if stage.name in MASKED:
            self.visible &= np.tri(T, dtype=bool)[:, None]
        edges = [0, sizes.N, sizes.N + sizes.K, J] if stage.name in BLOCKED else [0, J]
        blocks = [np.s_[:, low:high] for low, high in pairwise(edges)]
        self.whole = self.error(np.s_[:], np.s_[:])
        of_block = [self.error(block, block) for block in blocks]
        self.blocks = of_block if stage.name in BLOCKED else []
        home = [next(n for n, high in enumerate(edges[1:]) if j < high) for j in range(J)]
        heads = [self.error(np.s_[:, j : j + 1], blocks[home[j]]) for j in range(J)]
        self.heads = [] if stage.name in HEADLESS else heads
        self.tokens = [self.worst((np.s_[t : t + 1, block[1]], block) for block in blocks)
                       for t in range(T)]  # fmt: skip
        self.element = self.worst(
            (np.s_[t : t + 1, j : j + 1], blocks[home[j]], True) for t in range(T) for j in range(J)
        )

    def error(self, of: Any, block: Any, largest: bool = False) -> float | None:
        """Return the error of a slice on its own scale, or its block's if that is larger."""
        cells = self.visible[of]
        off = np.abs(self.a[of] - self.b[of])[cells]
        scale = min(
            max(root(side[of][cells]), root(side[block][self.visible[block]]))
            for side in (self.a, self.b)
        )
        return ratio(float(off.max()) if largest else root(off), scale)

    def worst(self, slices: Iterator[Any]) -> float | None:
        errors = [self.error(*each) for each in slices]
        return None if None in errors else max(error for error in errors if error is not None)


def assert_metrics(found: Pair, stage: Stage, a: np.ndarray, b: np.ndarray, sizes: Sizes) -> None:
    plain = Plain(stage, a, b, sizes)
    errors, compared = found.errors, found.compared
    assert errors is not None
    assert compared is not None
    for name in ("whole", "blocks", "heads", "tokens", "element"):
        assert getattr(errors, name) == pytest.approx(getattr(plain, name), rel=1e-9), name
    x, y = plain.a[plain.visible], plain.b[plain.visible]
    norms = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    assert compared.cells == x.size
    assert compared.max_abs_diff == np.abs(x - y).max()
    assert compared.rms_diff == pytest.approx(root(x - y), rel=1e-12)
    assert errors.whole == pytest.approx(np.linalg.norm(x - y) / min(norms), rel=1e-12)
    assert compared.norm_ratio == pytest.approx(norms[0] / norms[1], rel=1e-12)
    assert compared.cosine_sim == pytest.approx(x @ y / norms[0] / norms[1], abs=1e-12)
    rows = np.where(plain.visible, np.abs(plain.a - plain.b), 0).sum(axis=2) / 2
    expected = pytest.approx(rows.max(), rel=1e-12) if stage.name == "attn_softmax" else None
    assert compared.total_variation == expected
    off = np.abs(a.astype(np.float64) - b.astype(np.float64))
    if stage.name in MASKED:
        off = np.tril(off)
    assert compared.top_diffs[0].index == int(np.argmax(off))


@every_stage
@settings(max_examples=8)
@given(SIZES, SEEDS, NOISE)
def test_metrics_are_those_of_plain_numpy(
    stage: Stage, sizes: Sizes, seed: int, noise: float
) -> None:
    a = drawn(sizes, seed)
    b = noisy(a, noise, seed + 1)
    pairs = measured(a, b, sizes, stage.name)
    assert_metrics(pairs[stage.name], stage, a[stage.name], b[stage.name], sizes)


LARGE = Sizes(T=300, G=3, K=1, H=70, D=701)
"""Scores have 270,000 values, which is several blocks of `qwenref.judge.distance`."""


@cache
def large() -> tuple[Arrays, Arrays]:
    a = drawn(LARGE, 5)
    return a, noisy(a, 1e-3, 6)


@every_stage
def test_metrics_of_large_arrays_are_those_of_plain_numpy(stage: Stage) -> None:
    a, b = ({stage.name: of[stage.name]} for of in large())
    pairs = measured(a, b, LARGE)
    assert_metrics(pairs[stage.name], stage, a[stage.name], b[stage.name], LARGE)


@every_stage
def test_metrics_of_large_arrays_are_the_same_in_any_order(stage: Stage, folder: Path) -> None:
    a, b = large()
    model = config_of(LARGE, folder)
    expected = stage_of(qwenref.diff(a, b, model=model, stages=[stage.name]), stage.name)
    for stored in orders(stage, LARGE, b[stage.name]):
        for pair in ((a, b | {stage.name: stored}), (b | {stage.name: stored}, a)):
            result = qwenref.diff(*pair, model=model, stages=[stage.name])
            found = stage_of(result, stage.name)
            assert found.status == expected.status, report(result)
            assert found.rel_l2 == near(expected.rel_l2)
            assert found.max_abs_diff == expected.max_abs_diff


@settings(max_examples=20)
@given(st.integers(1, 300), SEEDS, NOISE)
def test_metrics_of_a_stage_of_unknown_shape(count: int, seed: int, noise: float) -> None:
    a = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
    b = noisy({"x": a}, noise, seed + 1)["x"]
    found = stage_of(qwenref.diff({"made_up": a}, {"made_up": b}), "made_up")
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = float(np.linalg.norm(x)), float(np.linalg.norm(y))
    assert found.dim_product == count
    assert found.rms_diff == pytest.approx(root(x - y), rel=1e-12)
    assert found.rel_l2 == pytest.approx(float(np.linalg.norm(x - y)) / min(norms), rel=1e-12)
    assert found.norm_ratio == pytest.approx(norms[0] / norms[1], rel=1e-12)
    assert found.max_abs_diff == np.abs(x - y).max()
    assert found.max_abs_diff_index == int(np.argmax(np.abs(x - y)))
    assert found.cosine_sim == pytest.approx(x @ y / norms[0] / norms[1], abs=1e-12)


def test_a_large_stage_of_unknown_shape() -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal(3_000_001).astype(np.float32)
    b = a.copy()
    places = [0, 1_234_567, 3_000_000]
    b[places] += np.array([1, 3, 2], np.float32)
    found = stage_of(qwenref.diff({"made_up": a}, {"made_up": b}, limit=3), "made_up")
    assert [top.index for top in found.top_diffs] == [1_234_567, 3_000_000, 0]
    assert found.max_abs_diff == pytest.approx(3, rel=1e-6)
    off = float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64)))
    assert found.rms_diff == pytest.approx(off / math.sqrt(a.size), rel=1e-12)


def test_zero_on_one_side_has_no_relative_error_and_on_both_none() -> None:
    zeros, ones = np.zeros(50), np.ones(50)
    for pair, norm_ratio in (((zeros, ones), 0), ((ones, zeros), None)):
        a, b = pair
        result = qwenref.diff({"attn_out": a}, {"attn_out": b})
        found = stage_of(result, "attn_out")
        assert (result.verdict, found.rel_l2, found.cosine_sim) == ("differ", None, None)
        assert (found.rms_diff, found.max_abs_diff, found.norm_ratio) == (1, 1, norm_ratio)
    result = qwenref.diff({"attn_out": zeros}, {"attn_out": -zeros})
    found = stage_of(result, "attn_out")
    assert (result.verdict, found.rel_l2, found.rms_diff) == ("agree", 0, 0)


# --- types


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("as_file", [True, False])
def test_numbers_of_any_width_are_compared_in_float64(
    dtype: Any, as_file: bool, tmp_path: Path
) -> None:
    a = drawn(AWKWARD, 3)
    b = {name: values.astype(dtype) for name, values in noisy(a, 1e-2, 4).items()}
    source: Any = b
    if as_file:
        source = tmp_path
        for name, values in b.items():
            np.save(tmp_path / f"layer_0_{name}.npy", values)
    pairs = measured(a, source, AWKWARD)
    for stage in ATTENTION:
        assert_metrics(pairs[stage.name], stage, a[stage.name], b[stage.name], AWKWARD)


@pytest.mark.parametrize(("dtype", "precision"), [("float16", "float16"), ("float64", "float32")])
def test_a_narrow_copy_is_explained_by_its_precision(
    dtype: str, precision: str, tmp_path: Path
) -> None:
    a = drawn(Sizes(9, 3, 2, 8, 40), 3)
    for name, values in a.items():
        np.save(tmp_path / f"layer_0_{name}.npy", values.astype(dtype))
    for pair in ((a, tmp_path), (tmp_path, a)):
        result = qwenref.diff(*pair)
        assert result.reason.startswith(f"at {precision} precision: 9 stages"), report(result)


def test_bfloat16_arrays_are_of_that_class() -> None:
    a = drawn(Sizes(9, 3, 2, 8, 40), 3)
    b = {name: values.astype(ml_dtypes.bfloat16) for name, values in a.items()}
    result = qwenref.diff(a, b)
    assert result.reason.startswith("at bfloat16 precision: 9 stages"), report(result)


@pytest.mark.parametrize("values", [np.ones(4, complex), np.array(["a"]), np.array([])])
def test_what_is_no_array_of_numbers_is_refused(values: np.ndarray) -> None:
    with pytest.raises(QwenrefError, match="attn_out"):
        qwenref.diff({"attn_out": values}, {"attn_out": np.ones(4)})


@few
@given(SIZES, SEEDS, st.sampled_from(CHAIN), SPECIAL)
def test_json_of_a_pair_of_files_has_numbers_or_null(
    tmp_path: Path, folder: Path, sizes: Sizes, seed: int, name: str, value: float
) -> None:
    a, b = drawn(sizes, seed)[name], drawn(sizes, seed)[name]
    b.reshape(-1)[-1] = value
    paths = [tmp_path / letter / f"layer_0_{name}.npy" for letter in "ab"]
    for path, values in zip(paths, (a, b), strict=True):
        path.parent.mkdir(exist_ok=True)
        np.save(path, values)
    for pair in (paths, paths[::-1]):
        result = qwenref.diff(*pair, model=config_of(sizes, folder))
        found = json.loads(result.to_json(), parse_constant=pytest.fail)
        fields = {"schema", "path_a", "path_b", "layer", "dim_product", "max_abs_diff"}
        fields |= {"max_abs_diff_index", "rms_diff", "cosine_sim", "top_diffs", "qwenref"}
        assert found.keys() == fields
        assert found["schema"] == "apr-stage-diff-v1"
        assert (found["path_a"], found["path_b"]) == tuple(map(str, pair))
        assert (found["layer"], found["dim_product"]) == (0, a.size)
        assert found["qwenref"]["verdict"] == result.verdict
        for top in found["top_diffs"]:
            assert top.keys() == {"index", "a", "b", "abs_diff"}
