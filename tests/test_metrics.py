"""Errors and floors of slices mean what they say: the same by plain loops, cell by cell."""

from collections.abc import Callable, Sequence
from decimal import Decimal
from math import inf, isfinite, nan, sqrt
from typing import NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwenref.metrics import (
    Errors,
    Sums,
    errors_of,
    floors_of,
    for_all_tokens,
    of_draws,
    sums_of,
    worst_of,
)
from qwenref.stages import ATTENTION, BY_NAME, Stage

BLOCKED = ("qkv_matmul", "qkv_bias")
MASKED = ("attn_scores", "attn_softmax")
HEADLESS = ("attn_norm", "attn_out")

every_stage = pytest.mark.parametrize("stage", ATTENTION, ids=lambda stage: stage.name)


class Sizes(NamedTuple):
    T: int
    N: int
    K: int
    H: int
    D: int

    def blocks(self, stage: Stage) -> list[int]:
        """Return the block of each head; a stage without heads is one head."""
        if stage.name in BLOCKED:
            return [0] * self.N + [1] * self.K + [2] * self.K
        return [0] * (1 if stage.name in HEADLESS else self.K if "K" in stage.axes else self.N)


AWKWARD = Sizes(5, 6, 2, 7, 11)
SIZES = st.builds(Sizes, *(st.integers(1, most) for most in (4, 4, 3, 4, 5)))
SEEDS = st.integers(0, 2**32 - 1)


def floors_of_one(stage: Stage, sums: Sums, sizes: dict[str, int]) -> Errors:
    alone = sums._replace(error=sums.error[None], largest=sums.largest[None])
    (floors,) = floors_of(stage, alone, sizes)
    return floors


class Rows(NamedTuple):
    """A true array and the difference from it, [token, head, cell]."""

    stage: Stage
    sizes: Sizes
    truth: np.ndarray
    off: np.ndarray

    def as_dumped(self) -> tuple[np.ndarray, np.ndarray]:
        """Return both in the stage's own axes."""
        truth, off = self.truth, self.off
        if self.stage.name in MASKED:
            return truth.swapaxes(0, 1), off.swapaxes(0, 1)
        if len(self.stage.axes) == 2:
            return truth.reshape(self.sizes.T, -1), off.reshape(self.sizes.T, -1)
        return truth, off

    def sums(self) -> Sums:
        return sums_of(self.stage, *self.as_dumped(), self.sizes.H)

    def errors(self, of: Callable[..., Errors] = errors_of) -> Errors:
        return of(self.stage, self.sums(), self.sizes._asdict())


def drawn(stage: Stage, sizes: Sizes = AWKWARD, seed: int = 0, uneven: bool = False) -> Rows:
    """Draw values; uneven ones have heads and rows that are zero, tiny or huge."""
    rng = np.random.default_rng(seed)
    width = sizes.T if stage.name in MASKED else sizes.D if stage.name in HEADLESS else sizes.H
    shape = (sizes.T, len(sizes.blocks(stage)), width)
    truth, off = rng.standard_normal((2, *shape))
    if uneven:
        truth *= rng.choice([0, 1e-5, 1, 1e3], (*shape[:2], 1))
        truth *= rng.choice([0, 1e-4, 1, 1], (shape[1], 1))
        off *= rng.choice([0, 1e-9, 1e-6, 1], (*shape[:2], 1))
    return Rows(stage, sizes, truth, off)


def slices(errors: Errors) -> dict[tuple[str, int], float | None]:
    parts = [(name, np.ravel(getattr(errors, name))) for name in Errors.__struct_fields__]
    return {(name, i): value for name, part in parts for i, value in enumerate(part)}


def assert_same(found: Errors, expected: Errors, rel: float = 1e-9) -> None:
    near = {at: v and pytest.approx(v, rel=rel, abs=0) for at, v in slices(expected).items()}
    assert slices(found) == near


def rms(values: Sequence[float]) -> float:
    return sqrt(sum(value * value for value in values) / len(values))


def worst(errors: Sequence[float | None]) -> float | None:
    numbers = [error for error in errors if error is not None]
    return max(numbers) if len(numbers) == len(errors) else None


def errors_by_loops(rows: Rows) -> Errors:
    blocks = rows.sizes.blocks(rows.stage)
    T, J, B = rows.sizes.T, len(blocks), blocks[-1] + 1

    def picked(values, token=None, head=None, block=None) -> list[float]:
        found = []
        for t, j in np.ndindex(T, J):
            if token in (None, t) and head in (None, j) and block in (None, blocks[j]):
                found += values[t, j, : t + 1 if rows.stage.name in MASKED else None].tolist()
        return found

    def error(token=None, head=None, block=None) -> float | None:
        block = block if head is None else blocks[head]
        off = picked(rows.off, token, head, block)
        size = rms(off) if token is None or head is None else max(map(abs, off))
        true, of_block = picked(rows.truth, token, head, block), picked(rows.truth, block=block)
        scale = max(rms(true), rms(of_block))
        ratio = 0.0 if size == 0 else size / scale if scale else inf
        return ratio if isfinite(ratio) else None

    return Errors(
        whole=error(),
        blocks=[error(block=b) for b in range(B) if rows.stage.name in BLOCKED],
        heads=[error(head=j) for j in range(J) if rows.stage.name not in HEADLESS],
        tokens=[worst([error(token=t, block=b) for b in range(B)]) for t in range(T)],
        element=worst([error(token=t, head=j) for t in range(T) for j in range(J)]),
    )


@every_stage
@settings(max_examples=12)
@example(AWKWARD, 1)
@example(Sizes(1, 1, 1, 1, 1), 1)
@given(SIZES, SEEDS)
def test_errors_and_floors_are_those_computed_by_loops(stage: Stage, sizes: Sizes, seed: int):
    rows = drawn(stage, sizes, seed, uneven=True)
    errors, floors = errors_by_loops(rows), rows.errors(floors_of_one)
    assert_same(rows.errors(), errors)
    blocks = [worst([errors.whole, block]) for block in errors.blocks or [errors.whole]]
    heads = zip(errors.heads, sizes.blocks(stage), strict=bool(errors.heads))
    expected = Errors(
        errors.whole,
        blocks if errors.blocks else [],
        [worst([head, blocks[block]]) for head, block in heads],
        [worst([token, *blocks]) for token in errors.tokens],
        worst([errors.element, *blocks]),
    )
    assert_same(floors, expected, rel=0.00501)
    for floor in slices(floors).values():
        assert len(Decimal(str(floor or 0)).normalize().as_tuple().digits) <= 3


@every_stage
@settings(max_examples=5)
@given(SIZES, SEEDS)
def test_several_arrays_have_the_floors_of_each_and_draws_their_mean_square_and_largest(
    stage: Stage, sizes: Sizes, seed: int
):
    a, b = (drawn(stage, sizes, seed + n, uneven=True) for n in range(2))
    b = b._replace(truth=a.truth)
    truth, off = a.as_dumped()
    both = np.stack([off, b.as_dumped()[1]])
    sums = sums_of(stage, truth, both, sizes.H)
    of_both = floors_of(stage, sums, sizes._asdict())
    assert of_both == [rows.errors(floors_of_one) for rows in (a, b)]

    together, (one, other) = of_draws(sums), (rows.sums() for rows in (a, b))
    np.testing.assert_allclose(together.error, (one.error + other.error) / 2, rtol=1e-12)
    assert np.array_equal(together.largest, np.maximum(one.largest, other.largest))


def test_an_example_by_hand():
    truth = np.array([[[3.0], [1.0], [0.0]], [[4.0], [0.0], [2.0]]])
    off = np.array([[[0.3], [0.1], [0.2]], [[0.0], [0.0], [0.0]]])
    found = Rows(BY_NAME["qkv_bias"], Sizes(2, 1, 1, 1, 1), truth, off).errors()
    v = 0.2 / sqrt(2)
    assert_same(found, Errors(sqrt(0.14 / 30), [0.06, 0.1, 0.1], [0.06, 0.1, 0.1], [v, 0.0], v))


@every_stage
@settings(max_examples=10)
@given(SIZES, SEEDS, st.floats(-30, 30))
def test_the_unit_does_not_matter(stage: Stage, sizes: Sizes, seed: int, power: float):
    rows = drawn(stage, sizes, seed, uneven=True)
    scaled = rows._replace(truth=rows.truth * 10**power, off=rows.off * 10**power)
    assert_same(scaled.errors(), rows.errors())


@pytest.mark.parametrize("stage", [each for each in ATTENTION if each.name not in MASKED])
@settings(max_examples=10)
@given(SEEDS, st.permutations(range(AWKWARD.T)))
def test_tokens_in_another_order_have_the_same_errors(stage: Stage, seed: int, order: list[int]):
    rows = drawn(stage, seed=seed, uneven=True)
    moved = rows._replace(truth=rows.truth[order], off=rows.off[order])
    before = rows.errors()
    tokens = [before.tokens[token] for token in order]
    assert_same(moved.errors(), msgspec.structs.replace(before, tokens=tokens))


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("garbage", [nan, inf, -inf, 1e300, 7.0])
def test_what_masked_cells_hold_never_shows(name: str, garbage: float):
    rows = drawn(BY_NAME[name])
    masked = np.triu(np.ones((AWKWARD.T, AWKWARD.T), bool), 1)[:, None]
    truth, off = (np.where(masked, garbage, values) for values in (rows.truth, rows.off))
    for filled in ({"truth": truth}, {"off": off}, {"truth": truth, "off": off}):
        for of in (errors_of, floors_of_one):
            assert rows._replace(**filled).errors(of) == rows.errors(of)


@every_stage
@pytest.mark.parametrize(("off", "scale", "error"), [(0, 1, 0.0), (0, 0, 0.0), (1, 0, None)])
def test_zero_is_on_no_scale_an_error(stage: Stage, off: int, scale: int, error: float | None):
    rows = drawn(stage)
    rows.truth[:], rows.off[:] = scale, off
    for of in (errors_of, floors_of_one):
        assert {*slices(rows.errors(of)).values()} == {error}


@every_stage
@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize(("token", "head"), [(0, 0), (2, 1), (4, -1)])
def test_a_bad_cell_shows_only_where_it_is(stage: Stage, bad: float, token: int, head: int):
    rows = drawn(stage)
    head %= rows.truth.shape[1]
    block = rows.sizes.blocks(stage)[head]
    holding = [("whole", 0), ("blocks", block), ("heads", head), ("tokens", token), ("element", 0)]
    expected = {at: None if at in holding else v for at, v in slices(rows.errors()).items()}
    rows.off[token, head, 0] = bad
    assert slices(rows.errors()) == expected


@every_stage
@pytest.mark.parametrize("huge", [1e150, 1e154, 1e300])
def test_a_huge_difference_is_no_finite_number_and_no_warning(stage: Stage, huge: float):
    rows = drawn(stage)
    rows.truth[:], rows.off[:] = 1e-6, huge
    assert rows.errors().whole is None


NUMBERS = st.none() | st.just(0.0) | st.floats(1e-100, 1e100)


def times_its_floor(error: float | None, floor: float) -> float:
    if error == 0:
        return 0.0
    return inf if error is None or floor == 0 else error / floor


@st.composite
def found_and_floors(draw: st.DrawFn) -> list[Errors]:
    lists = [st.lists(NUMBERS, min_size=n, max_size=n) for n in (draw(st.integers(0, 3)), 2, 2)]
    return [draw(st.builds(Errors, NUMBERS, *lists, NUMBERS)) for _ in range(2)]


@given(found_and_floors())
def test_the_worst_slice_is_the_most_times_its_floor(pair: list[Errors]):
    (found, floors), answer = map(slices, pair), worst_of(*pair)
    judged = {at: floor for at, floor in floors.items() if floor is not None}
    ratios = {at: times_its_floor(found[at], floor) for at, floor in judged.items()}
    assert (answer is None) == (not judged)
    if answer is not None:
        assert answer.ratio == max(ratios.values())
        assert ratios[answer.slice, answer.which] == answer.ratio


def test_where_a_value_is_not_finite_its_head_is_named():
    found, floors = (Errors(x, [], [0.0, x], [x], x) for x in (None, 1e-7))
    assert worst_of(found, floors) == (inf, "heads", 1)


def test_a_ratio_above_all_numbers_is_infinite():
    found, floors = (Errors(0.0, [], [], [0.0, value], 0.0) for value in (1e200, 1e-200))
    assert worst_of(found, floors) == (inf, "tokens", 1)


@given(st.data(), st.integers(1, 12))
def test_a_token_left_out_has_the_largest_floor(data: st.DataObject, T: int):
    positions = sorted(data.draw(st.sets(st.integers(0, T - 1), min_size=1)))
    known = {position: data.draw(NUMBERS) for position in positions}
    expected = [known.get(token, worst([*known.values()])) for token in range(T)]
    floors = Errors(1e-7, [2e-7], [3e-7], [*known.values()], 4e-7)
    spread = for_all_tokens(floors, positions, T)
    assert spread == msgspec.structs.replace(floors, tokens=expected)


@every_stage
@settings(max_examples=8)
@given(SIZES, SEEDS)
def test_of_two_scales_the_smaller_one_counts(stage: Stage, sizes: Sizes, seed: int):
    rows = drawn(stage, sizes, seed, uneven=True)
    sums = rows.sums()
    alone = errors_of(stage, sums, sizes._asdict())
    for other in (sums.scale, 4 * sums.scale):
        both = sums._replace(scale=np.concatenate([sums.scale, other]))
        assert errors_of(stage, both, sizes._asdict()) == alone
        swapped = both._replace(scale=both.scale[::-1])
        assert errors_of(stage, swapped, sizes._asdict()) == alone
