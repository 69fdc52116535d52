"""Are mistakes named? Those that somebody else made in transformers, and those that we plant."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hf_faults import FAULTS, Change, Fault, captured
from write_faults import PAGE, faults

from qwenref import explain
from qwenref.bundled import tiny_checkpoint
from qwenref.dumps.layout import LAYOUTS
from qwenref.mistakes.catalogue import MISTAKES
from qwenref.mistakes.seen import SEEN
from qwenref.oracle import computing
from qwenref.selftest import LENGTHS, SHAPES, Cell, Field, outcome_of, outcomes_in, plants
from qwenref.trial.explanation import Explanation

TOKENS = [87, 104, 97, 116, 32, 105, 115, 32, 50, 43, 50, 63]

VISIBLE = [(fault, "float32") for fault in FAULTS]
VISIBLE += [(fault, "bfloat16") for fault in FAULTS[::3] if fault.shows_in_bfloat16]


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
    assert all(of.cause for of in wrong)
    assert any(word.lower() in said(answer) for word in fault.words), said(answer)


PAIRS = (
    ("norm eps 1e-3", "o_proj left out"),
    ("neighbours turned", "no causal mask"),
    ("k and v swapped", "temperature 0.7"),
    ("all biases dropped", "theta 10000"),
)


@pytest.mark.parametrize("names", PAIRS, ids=" and ".join)
def test_two_mistakes_in_transformers(names: tuple[str, str]) -> None:
    first, second = (next(of for of in FAULTS if of.name == name) for name in names)

    def changes(model: Any) -> list[Change]:
        return [*first.changes(model), *second.changes(model)]

    both = first._replace(changes=changes)
    model = tiny_checkpoint()
    answer = explain(captured(both, model, TOKENS, "float32"), model=model, tokens=TOKENS)
    assert {*answer.origins} == first.expected | second.expected
    for fault in (first, second):
        assert any(word.lower() in said(answer) for word in fault.words), said(answer)


def test_the_page_of_mistakes_is_what_the_code_has() -> None:
    assert PAGE.read_text() == faults()


def test_mistakes_have_names_of_their_own_and_all_are_planted() -> None:
    names = [mistake.id for mistake in MISTAKES]
    assert len({*names}) == len(names)
    assert {*SEEN} <= {*names}
    assert {plant.mistake.id for plant in plants()} == {*names}


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_a_sample_of_what_we_plant(number: int) -> None:
    cell = Cell([*SHAPES][number], LENGTHS[number], "float32")
    outcomes = [*outcomes_in(cell, every=18, first=number)]
    wrong = [of for of in outcomes if not (of.localised and of.named == (of.visible or of.hidden))]
    assert not wrong
    assert sum(of.visible for of in outcomes) > len(outcomes) / 2


@pytest.mark.parametrize(
    ("text", "stages", "number", "T"),
    [
        ("", ("attn_norm",), 1, 2),  # any-step
        ("", ("ffn_norm",), 1, 7),
        ("", ("lm_head",), 1, 7),
        ("", ("ffn_swigl",), 1, 2),
        ("the mean, not the sum", ("post_attn_residual", "post_ffn_residual"), 0, 7),
    ],
)
def test_what_an_engine_in_bfloat16_blurs(
    text: str, stages: tuple[str, ...], number: int, T: int, tmp_path: Path
) -> None:
    id_ = "residual-times" if text else "any-step"
    (plant,) = (of for of in plants() if (of.mistake.id, of.text, of.stages) == (id_, text, stages))
    with computing("float64", "cpu"):
        field = Field(tmp_path / "model", Cell([*SHAPES][number], T, "bfloat16"))
        outcome = outcome_of(field, plant, next(iter(LAYOUTS)), tmp_path)
    assert outcome is not None
    assert (outcome.visible, outcome.localised, outcome.named) == (True, True, True), outcome.said


def test_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qwenref", "selftest", "--every", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *rows, last = done.stdout.splitlines()
    (in_depth,) = (row for row in rows if row.startswith("6 layers, two mistakes each"))
    assert in_depth.split()[-6:] == ["12", "12", "12", "0", "0", "0"]
    assert last == "As many mistakes are found and named as is promised."
