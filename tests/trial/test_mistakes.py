"""Are mistakes named? Those that somebody else made in transformers, and those that we plant."""

from itertools import islice
from pathlib import Path

import pytest
from hf_faults import FAULTS, Fault, captured

from qwenref import explain
from qwenref.bundled import tiny_checkpoint
from qwenref.model.random_checkpoint import write
from qwenref.oracle import computing
from qwenref.selftest import SHAPES, Field, outcome_of, plants
from qwenref.trial.explanation import Explanation

TOKENS = [87, 104, 97, 116, 32, 105, 115, 32, 50, 43, 50, 63]

UNNAMED = {"lm_head for embedding"}
"""There is no such mistake in the catalogue."""

VISIBLE = [
    (fault, dtype)
    for fault in FAULTS
    for dtype in ("float32", "bfloat16")
    if dtype == "float32" or fault.shows_in_bfloat16
]


def said(answer: Explanation) -> str:
    """Return all causes in words, in lower case."""
    causes = [cause for of in answer.stages for cause in (of.cause, *of.equivalent) if cause]
    return "; ".join(cause.text for cause in causes).lower()


@pytest.mark.parametrize(
    ("fault", "dtype"), VISIBLE, ids=[f"{fault.name}, {dtype}" for fault, dtype in VISIBLE]
)
def test_a_mistake_in_transformers(fault: Fault, dtype: str) -> None:
    model = tiny_checkpoint()
    answer = explain(captured(fault, model, TOKENS, dtype), model=model, tokens=TOKENS)
    assert {*answer.origins} == fault.expected
    wrong = [of for of in answer.stages if of.stage in answer.origins]
    if fault.name in UNNAMED:
        assert not any(of.cause for of in wrong)
        return
    assert all(of.cause for of in wrong)
    assert any(word.lower() in said(answer) for word in fault.words), said(answer)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sample_of_what_we_plant(shape: str, tmp_path: Path) -> None:
    number = [*SHAPES].index(shape)
    write(tmp_path / "model", SHAPES[shape], dtype="float32")
    with computing("float64", "cpu"):
        field = Field(tmp_path / "model", 7, "float32")
        for at, plant in enumerate(islice(plants(), number, None, 9)):
            folder = tmp_path / str(at)
            folder.mkdir()
            outcome = outcome_of(field, plant, ("apr", "hf")[at % 2], folder)
            if outcome is not None and outcome.visible:
                assert (outcome.localised, outcome.named) == (True, True), outcome
