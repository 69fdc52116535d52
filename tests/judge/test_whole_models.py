"""Diffs of whole models: the map of layers, and what two dumps say of the next token."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from capture_hf import load, stages_of
from helpers import Cli
from scipy.special import rel_entr, softmax

import qwenref
from qwenref.capture import capture
from qwenref.judge.logits import logits_of
from qwenref.judge.report import report
from qwenref.model.random_checkpoint import Shape, write
from qwenref.stages import LAYER

TOKENS = [5, 6, 7, 8]
DEEP = Shape(84, 6, 2, 32, 9, 320, seed=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine layers."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    write(folder, DEEP)
    return folder


@pytest.fixture(scope="module")
def ours(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("deep-dump") / "ours"
    capture(model, output, tokens=TOKENS, layers=None, stages=None)
    return output


@pytest.fixture
def copy(ours: Path, tmp_path: Path) -> Path:
    """A dump of the same, without a manifest: another engine's."""
    folder = shutil.copytree(ours, tmp_path / "theirs")
    (folder / "manifest.json").unlink()
    return folder


def scale(dump: Path, file: str, by: float) -> None:
    found = qwenref.read_aprt(dump / file)
    (dump / file).unlink()
    qwenref.write_aprt(dump / file, found.layer, found.values * np.float32(by))


def test_many_layers_are_shown_as_a_map_and_the_first_that_differs(ours: Path, copy: Path) -> None:
    scale(copy, "layer-7/ffn_up.bin", 1.3)
    scale(copy, "layer-8/attn_out.bin", 1.3)
    result = qwenref.diff(ours, copy)
    assert result.reason.startswith("first at layer 7 ffn_up")
    lines = report(result).splitlines()
    signs = {line.split()[0]: line.split()[1] for line in lines[5 : 5 + len(LAYER)]}
    assert set(signs) == {stage.name for stage in LAYER}
    assert signs.pop("ffn_up") == ".......D."
    assert signs.pop("attn_out") == "........D"
    assert set(signs.values()) == {"........."}
    assert "layer 7" in lines
    assert "layer 8" not in lines
    assert "whole model" in lines


def test_what_is_not_in_all_of_many_layers_is_counted(ours: Path, copy: Path) -> None:
    for layer in range(9):
        for name in ("ffn_norm", "ffn_gate", "ffn_up", "ffn_out"):
            (copy / f"layer-{layer}" / f"{name}.bin").unlink()
    text = report(qwenref.diff(ours, copy))
    assert "not in all of them: ffn_norm of 9 layers, ffn_gate of 9 layers, ffn_up of 9" in text


def test_it_is_said_which_floors_are_of_other_prompts(ours: Path, copy: Path) -> None:
    last = report(qwenref.diff(ours, copy)).splitlines()[-1]
    assert last.endswith("stages (generic floor of embedding)")  # no engine adds noise to a lookup
    (copy / "layer-0/embedding.bin").unlink()
    assert "generic" not in report(qwenref.diff(ours, copy)).splitlines()[-1]


def test_growth_of_rounding_with_depth_is_innocent(model: Path, ours: Path, tmp_path: Path) -> None:
    """Live transformers in bfloat16, against floors that were accumulated for nine layers."""
    theirs = stages_of(load(model, "bfloat16", 8), TOKENS, range(9))
    for layer in range(9):
        folder = tmp_path / "hf" / f"layer-{layer}"
        folder.mkdir(parents=True)
        for stage in LAYER:
            values = theirs[layer][stage.name]
            qwenref.write_aprt(folder / f"{stage.name}.bin", layer, np.ascontiguousarray(values))
    for name in ("final_norm", "lm_head"):
        qwenref.write_aprt(tmp_path / "hf" / f"{name}.bin", None, theirs[None][name])
    result = qwenref.diff(ours, tmp_path / "hf")
    assert result.verdict == "agree", result.reason
    last = [stage for stage in result.stages if stage.layer == 8 and stage.required]
    assert len(last) == 17
    assert all(0.2 <= (stage.ratio or 0) <= 2 for stage in last)  # measured: 0.6 to 1.2


# --- the next token -------------------------------------------------------------------------------


def test_divergence_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 50), np.float32) * 3
    found = logits_of(a, b)
    assert found is not None
    p, q = softmax(a.astype(np.float64), axis=1), softmax(b.astype(np.float64), axis=1)
    expected = max(rel_entr(p, q).sum(axis=1).max(), rel_entr(q, p).sum(axis=1).max())
    assert found.divergence == pytest.approx(expected, rel=1e-12)
    best = np.argmax(a, axis=1), np.argmax(b, axis=1)
    assert (found.tokens, found.same) == (3, int(np.sum(best[0] == best[1])))
    assert found.last == (best[0][-1], best[1][-1])
    tops = [[set(np.argsort(row)[-10:]) for row in of] for of in (a, b)]
    assert found.overlap == min(len(x & y) for x, y in zip(*tops, strict=True))


def test_divergence_does_not_overflow_and_is_zero_for_equal_ones() -> None:
    a = np.array([[1e4, -1e4, 0.0]], np.float32)
    same, other = logits_of(a, a), logits_of(a, a[:, ::-1])
    assert same is not None
    assert same.divergence == 0
    assert other is not None
    assert other.divergence == pytest.approx(1e4)
    assert (other.top, other.overlap) == (3, 3)


def test_tokens_with_numbers_that_are_none_are_left_out() -> None:
    a, b = np.zeros((2, 3, 4), np.float32)
    b[0, 1], a[2, 2] = np.nan, np.inf
    found = logits_of(a, b)
    assert found is not None
    assert found.tokens == 1
    assert logits_of(a[:1], b[:1]) is None


def test_the_report_says_which_token_comes_next(cli: Cli, ours: Path, copy: Path) -> None:
    done = cli("diff", ours, copy)
    logits = qwenref.read_aprt(ours / "lm_head.bin").values
    best = int(np.argmax(logits))
    assert f"next token {best} in both; 10 of the 10 likeliest in both; divergence 0.0" in done.out
    scale(copy, "lm_head.bin", -1)
    done = cli("diff", ours, copy)
    assert done.status == 1
    assert f"next token {best} in a, {int(np.argmin(logits))} in b; 0 of the 10" in done.out
    assert "DIFFER: first at lm_head" in done.out
