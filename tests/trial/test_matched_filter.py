"""Mistakes below the noise of rounding: proven in engines that make them, in no others."""

from pathlib import Path
from typing import Any

import capture_hf
import numpy as np
import pytest
from measure_filter import look_at

from qwenref import explain
from qwenref.bundled import tiny_checkpoint
from qwenref.stages import EMBEDDING, RESIDUAL
from qwenref.trial.explanation import Explanation
from qwenref.trial.least_squares import LEAST_UNITS
from qwenref.trial.matched_filter import LARGEST, SMALLEST, judged

CUT_OFF = (98, 712, 3681, 7547)
"""Dumps whose engines round towards zero. That does to attn_norm what D - 1 for D does in its mean,
if D is 192; and what it does to qkv_matmul shows in qkv_bias again.
"""


def explained(T: int, dtype: str, eps: float = 1e-6, *, quick: bool = False) -> Explanation:
    """Explain what transformers computes with another eps in its norm; its own is 1e-6."""
    tokens = np.random.default_rng(T).choice(256, T, replace=False).tolist()
    model: Any = capture_hf.load(tiny_checkpoint(), dtype)
    model.model.layers[0].input_layernorm.variance_epsilon = eps
    stages = capture_hf.stages_of(model, tokens, [0])[0]
    arrays = {EMBEDDING.name: stages.pop(RESIDUAL), **stages}
    return explain(arrays, model=tiny_checkpoint(), tokens=tokens, quick=quick)


@pytest.mark.parametrize("T", [33, 64])
@pytest.mark.parametrize(("eps", "text"), [(0.0, "eps 0.0"), (1e-7, "eps 1e-07")])
def test_another_eps_in_bfloat16(T: int, eps: float, text: str) -> None:
    answer = explained(T, "bfloat16", eps)
    assert (answer.verdict, answer.origins, answer.exit_status) == ("fault", ["attn_norm"], 1)
    (stage,) = (of for of in answer.stages if of.hidden is not None)
    assert (stage.stage, stage.status) == ("attn_norm", "agree")
    assert stage.hidden is not None
    assert stage.hidden.id == "norm-eps"
    assert stage.hidden.text.startswith(text)
    assert SMALLEST <= stage.hidden.alpha <= LARGEST
    assert "smaller than the noise" in answer.reason


def test_with_few_tokens_it_is_said_that_it_cannot_be_seen() -> None:
    answer = explained(7, "bfloat16", 0.0)
    assert (answer.verdict, answer.origins) == ("agree", [])
    (stage,) = (of for of in answer.stages if of.stage == "attn_norm")
    assert {of.text: of.tokens for of in stage.unseen}["eps 0.0 in the norm"] == LEAST_UNITS
    assert any("Too small to be seen here" in line for line in answer.summary)


def test_it_can_be_left_out() -> None:
    answer = explained(64, "bfloat16", 0.0, quick=True)
    assert answer.verdict == "agree"
    assert not any(of.unseen or of.hidden for of in answer.stages)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_is_not_convicted(dtype: str) -> None:
    assert explained(64, dtype).verdict == "agree"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("number", [*range(40), *CUT_OFF])
def test_healthy_engines_are_not_convicted(number: int, folder: Path) -> None:
    _, looks = look_at(number, folder)
    assert not any(of.hidden for of in judged(looks).values())
