"""Layouts: the same numbers in another order, against arrays small enough to write down."""

import numpy as np
import pytest

from qwenref.dumps.layout import LAYOUTS, layout_named
from qwenref.errors import QwenrefError
from qwenref.stages import ALL, BY_NAME

T, N, K, H = 3, 5, 2, 7

AXES = {
    "embedding": "T D",
    "attn_norm": "T D",
    "qkv_matmul": "T F",
    "qkv_bias": "T F",
    "q_post_rope": "T N H",
    "k_post_rope": "T K H",
    "attn_scores": "N T S",
    "attn_softmax": "N T S",
    "attention": "T E",
    "attn_out": "T D",
    "post_attn_residual": "T D",
    "ffn_norm": "T D",
    "ffn_gate": "T I",
    "ffn_up": "T I",
    "ffn_silu": "T I",
    "ffn_swigl": "T I",
    "ffn_out": "T D",
    "post_ffn_residual": "T D",
    "final_norm": "T D",
    "lm_head": "T V",
}
FLAT_STAGES = [name for name, axes in AXES.items() if len(axes.split()) == 2]
SHAPES = {
    "attn_out": (T, 11),
    "q_post_rope": (T, N, H),
    "k_post_rope": (T, K, H),
    "attn_scores": (N, T, T),
    "attn_softmax": (N, T, T),
}
SCORES = ["attn_scores", "attn_softmax"]


def runs(
    layout: str, stage: str, values: np.ndarray, first: int = 0, tokens: int | None = None
) -> list[tuple[int, np.ndarray]]:
    sizes = dict(zip(AXES[stage].split(), values.shape, strict=True))
    sizes |= {} if tokens is None else {"T": tokens}
    return list(LAYOUTS[layout].runs(BY_NAME[stage], values, first, sizes))


def laid_out(layout: str, stage: str, *slices: tuple[int, np.ndarray], tokens: int) -> np.ndarray:
    """Return the flat array that the runs of all slices fill, each cell once."""
    found = [run for first, part in slices for run in runs(layout, stage, part, first, tokens)]
    size = sum(run.size for _, run in found)
    result, times = np.empty(size, slices[0][1].dtype), np.zeros(size, int)
    for start, run in found:
        result[start : start + run.size] = run.ravel()
        times[start : start + run.size] += 1
    assert times.tolist() == [1] * size
    return result


def flat(layout: str, stage: str, values: np.ndarray) -> np.ndarray:
    tokens = values.shape[AXES[stage].split().index("T")]
    return laid_out(layout, stage, (0, values), tokens=tokens)


def test_there_are_these_two_layouts() -> None:
    assert list(LAYOUTS) == ["apr", "hf"]
    assert layout_named("apr") is LAYOUTS["apr"]
    assert layout_named("hf") is LAYOUTS["hf"]


@pytest.mark.parametrize("name", ["", "HF", "llama", "apr ", "apr\n"])
def test_an_unknown_layout_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(QwenrefError) as caught:
        layout_named(name)
    assert str(caught.value) == f"unknown layout {name!r}; layouts are apr, hf"


def test_apr_keeps_the_axes_of_every_stage() -> None:
    assert {s.name: " ".join(LAYOUTS["apr"].axes(s)) for s in ALL} == AXES


def test_hf_puts_heads_first_in_q_and_k_and_nowhere_else() -> None:
    expected = AXES | {"q_post_rope": "N T H", "k_post_rope": "K T H"}
    assert {s.name: " ".join(LAYOUTS["hf"].axes(s)) for s in ALL} == expected


@pytest.mark.parametrize(("stage", "heads"), [("q_post_rope", N), ("k_post_rope", K)])
def test_q_and_k_are_token_major_in_apr_and_head_major_in_hf(stage: str, heads: int) -> None:
    values = np.zeros((T, heads, H), np.float32)
    for t in range(T):
        for n in range(heads):
            for h in range(H):
                values[t, n, h] = 100 * t + 10 * n + h  # its digits say where it is from
    apr = [100 * t + 10 * n + h for t in range(T) for n in range(heads) for h in range(H)]
    hf = [100 * t + 10 * n + h for n in range(heads) for t in range(T) for h in range(H)]
    assert flat("apr", stage, values).tolist() == apr
    assert flat("hf", stage, values).tolist() == hf


def test_q_written_out() -> None:
    values = np.array([[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]], np.float32)
    assert flat("apr", "q_post_rope", values).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert flat("hf", "q_post_rope", values).tolist() == [1, 2, 7, 8, 3, 4, 9, 10, 5, 6, 11, 12]


def test_one_token_in_hf_is_the_same_as_in_apr() -> None:
    values = np.arange(N * H, dtype=np.float32).reshape(1, N, H)
    expected = list(range(N * H))
    assert flat("hf", "q_post_rope", values).tolist() == expected
    assert flat("apr", "q_post_rope", values).tolist() == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", FLAT_STAGES)
def test_stages_of_two_axes_are_the_same_in_both(layout: str, stage: str) -> None:
    values = np.array([[1, 2, 3, 4, 5], [6, 7, -0.0, np.nan, np.inf]], np.float32)
    assert flat(layout, stage, values).tobytes() == values.tobytes()


@pytest.mark.parametrize("stage", SCORES)
def test_apr_masks_scores_and_softmax_above_the_diagonal(stage: str) -> None:
    values = np.arange(1, 1 + 2 * T * T, dtype=np.float32).reshape(2, T, T)
    first, second = [1, 0, 0, 4, 5, 0, 7, 8, 9], [10, 0, 0, 13, 14, 0, 16, 17, 18]
    assert flat("apr", stage, values).tolist() == first + second


@pytest.mark.parametrize("stage", SCORES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("garbage", [np.nan, -np.nan, np.inf, -np.inf, -0.0, -1.0, 3e38, -65504.0])
def test_apr_holds_positive_zero_above_the_diagonal_whatever_was_there(
    stage: str, dtype: str, garbage: float
) -> None:
    found = flat("apr", stage, np.full((N, T, T), garbage, dtype)).reshape(N, T, T)
    above = np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0]], bool)
    assert found.dtype == dtype
    assert found[:, above].tobytes() == bytes(N * 3 * found.itemsize)  # -0.0 has one bit set
    assert found[:, ~above].tobytes() == np.full((N, 6), garbage, dtype).tobytes()


@pytest.mark.parametrize("stage", SCORES)
def test_hf_leaves_every_cell_of_scores_and_softmax_alone(stage: str) -> None:
    values = np.array([[[1, np.nan, -np.inf], [-0.0, 5, -65504], [7, 8, -0.0]]], np.float32)
    assert flat("hf", stage, values).tobytes() == values.tobytes()


@pytest.mark.parametrize("stage", SCORES)
def test_a_single_token_has_nothing_to_mask(stage: str) -> None:
    values = np.array([[[-0.5]], [[np.inf]]], np.float32)
    assert flat("apr", stage, values).tolist() == [-0.5, np.inf]


# Slices of the tokens, or of the queries


def test_a_slice_of_queries_is_masked_by_its_position() -> None:
    values = np.arange(1, 13, dtype=np.float32).reshape(2, 2, 3)  # queries 1 and 2 of 3
    found = runs("apr", "attn_scores", values, first=1, tokens=3)
    assert [(start, run.ravel().tolist()) for start, run in found] == [
        (3, [1, 2, 0, 4, 5, 6]),
        (12, [7, 8, 0, 10, 11, 12]),
    ]


def test_a_slice_of_tokens_of_a_head_major_stage_is_one_run_a_head() -> None:
    values = np.arange(1, 9, dtype=np.float32).reshape(2, 2, 2)  # tokens 1 and 2 of 3, 2 heads
    found = runs("hf", "q_post_rope", values, first=1, tokens=3)
    assert [(start, run.ravel().tolist()) for start, run in found] == [
        (2, [1, 2, 5, 6]),
        (8, [3, 4, 7, 8]),
    ]
    (found,) = runs("apr", "q_post_rope", values, first=1, tokens=3)
    assert (found[0], found[1].ravel().tolist()) == (4, [1, 2, 3, 4, 5, 6, 7, 8])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", SHAPES)
@pytest.mark.parametrize("cuts", [[0], [0, 2], [0, 1, 2], [2, 1, 0]])
def test_slices_fill_the_array_that_the_whole_fills(
    layout: str, stage: str, cuts: list[int]
) -> None:
    axis = AXES[stage].split().index("T")
    values = np.arange(1, 1 + np.prod(SHAPES[stage]), dtype=np.float32).reshape(SHAPES[stage])
    whole = flat(layout, stage, values)
    ends = [min([cut for cut in cuts if cut > start], default=T) for start in cuts]
    slices = [
        (start, np.take(values, range(start, end), axis))
        for start, end in zip(cuts, ends, strict=True)
    ]
    assert laid_out(layout, stage, *slices, tokens=T).tobytes() == whole.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", SHAPES)
def test_the_array_itself_is_never_changed(layout: str, stage: str) -> None:
    shape = SHAPES[stage]
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) - 50
    values.flags.writeable = False  # as JAX gives it
    before = values.tobytes()
    assert flat(layout, stage, values).size == values.size
    assert values.tobytes() == before


def test_scores_are_masked_one_head_at_a_time() -> None:
    scores = np.ones((N, T, T), np.float32)
    heads = LAYOUTS["apr"].runs(BY_NAME["attn_scores"], scores, 0, {"T": T, "S": T})
    assert next(heads)[1].sum() == 6  # a masked copy of all heads would double the peak memory
    assert len(list(heads)) == N - 1
