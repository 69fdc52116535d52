"""Nothing is hidden by masks, padding, or order where shapes are not known."""

from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, TINY

import qwenref
from qwenref.judge.report import report

SOURCE = ROOT / "tests" / "data" / "llama-f32" / "layer-0"
SCORES = qwenref.read_aprt(SOURCE / "attn_scores.bin").values.reshape(6, 12, 12)
SOFTMAX = qwenref.read_aprt(SOURCE / "attn_softmax.bin").values.reshape(6, 12, 12)
FUTURE = np.triu(np.ones((12, 12), bool), 1)
LEAST = float(np.finfo(np.float32).min)


def masked(scores: np.ndarray, value: float) -> np.ndarray:
    return np.where(FUTURE, np.float32(value), scores)


@pytest.mark.parametrize("value", [LEAST, -1e30, -1e9, -65504, -np.inf])
@pytest.mark.parametrize("name", ["attn_scores", "after_no_stage"])
def test_masked_cells_do_not_hide_scores_of_unknown_shape(value: float, name: str) -> None:
    a, b = ({name: masked(by * SCORES, value)} for by in (1, np.float32(1.1)))
    for pair in ((a, b), (b, a)):
        result = qwenref.diff(*pair, stages=[name])
        assert result.verdict == "differ", report(result)
        assert result.stages[0].rel_l2 == pytest.approx(0.1, rel=1e-3)
    assert qwenref.diff(a, a, stages=[name]).verdict == "agree"


def test_what_may_be_a_mask_is_not_judged_without_a_shape() -> None:
    a, b = ({"attn_scores": masked(by * SCORES, -1e4)} for by in (1, np.float32(1.1)))
    result = qwenref.diff(a, b)
    assert (result.verdict, result.stages[0].status) == ("incomplete", "blind")
    assert "--model" in str(result.stages[0].reason)
    assert qwenref.diff(a, b, model=TINY).verdict == "differ"


@pytest.mark.parametrize("flat", [False, True])
def test_scores_of_padded_keys_are_not_those_of_a_longer_prompt(flat: bool) -> None:
    a = np.random.default_rng(0).normal(size=(6, 9, 256)).astype(np.float32)
    a[:, np.arange(256) > np.arange(9)[:, None]] = 0
    for query, key in ((1, 0), (2, 1), (5, 0), (8, 8)):
        b = a.copy()
        b[:, query, key] += 7
        pair = ({"attn_scores": of.reshape(-1) if flat else of} for of in (a, b))
        result = qwenref.diff(*pair, model=TINY)
        assert result.verdict == "differ", report(result)


def test_how_large_scores_are_does_not_depend_on_the_order() -> None:
    big = 3 * SCORES
    a = {"attn_scores": big, "attn_softmax": SOFTMAX}
    b = {"attn_scores": big * np.float32(14**0.5), "attn_softmax": SOFTMAX * np.float32(1.00004)}
    results = [qwenref.diff(*pair, model=TINY, dtype="float32") for pair in ((a, b), (b, a))]
    assert len({result.verdict for result in results}) == 1
    floors = [result.stages[1].floor for result in results]
    assert floors[0] == pytest.approx(floors[1])


def test_numbers_too_small_to_be_squared_do_not_agree() -> None:
    values = np.linspace(1, 2, 100) * 1e-200
    assert qwenref.diff({"attn_out": values}, {"attn_out": 2 * values}).verdict == "differ"


def test_of_the_last_token_alone_it_is_said(tmp_path: Path) -> None:
    a = qwenref.read_aprt(SOURCE / "attn_out.bin").values.reshape(12, 84)
    np.save(tmp_path / "attn_out.npy", a[-1])
    result = qwenref.diff({"attn_out": a}, tmp_path / "attn_out.npy", model=TINY)
    assert result.verdict == "agree"
    assert any("only the last token" in note for note in result.stages[0].notes)
