"""The contracts name what exists, and say what the code does."""

import ast
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import yaml
from helpers import ROOT
from write_schemas import CONTRACTS, schemas

from qwenref.dumps import aprt
from qwenref.files import parse_json
from qwenref.judge.floors import BLIND, GENERIC_FILE, PRECISIONS, Generic
from qwenref.judge.result import Status
from qwenref.judge.seen import LEAST_VALUES, MASKED
from qwenref.metrics import MARGIN
from qwenref.noise import CLASSES, DUMPED, MOST_TOKENS, WINDOW
from qwenref.stages import BY_NAME, HEAD, LAYER, RESIDUAL
from qwenref.trial import evidence, explanation
from qwenref.trial.dialects import BLOCKS, FLOATING
from qwenref.trial.recovery import ALIKE, AS_GOOD
from qwenref.trial.weight_noise import (
    DEVIATIONS,
    FOLLOWS,
    FREE,
    HALF,
    MISFIT,
    MOST,
    OFFSET,
    PARALLEL,
    STANDS_OUT,
    TELLING,
    UNEVEN,
)

CONTRACT_FILES = sorted(CONTRACTS.glob("*.yaml"))
GENERIC = parse_json(GENERIC_FILE, GENERIC_FILE.read_bytes(), Generic)
OBLIGATIONS = {"invariant", "equivalence", "bound"}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONTRACTS / name).read_text())


FALSIFIERS = [
    pytest.param(test, id=test["id"])
    for path in CONTRACT_FILES
    for test in load(path.name)["falsification_tests"]
]


def test_there_are_contracts() -> None:
    names = ["aprt-v1.yaml", "diff-v1.yaml", "explain-v1.yaml", "stages-v1.yaml"]
    assert [path.name for path in CONTRACT_FILES] == names


@pytest.mark.parametrize("path", CONTRACT_FILES, ids=lambda path: path.name)
def test_a_contract_has_the_fields_that_pv_accepts(path: Path) -> None:
    contract = load(path.name)
    assert list(contract) == [
        "metadata",
        "equations",
        "proof_obligations",
        "falsification_tests",
    ]
    assert set(contract["metadata"]) == {"version", "description", "kind", "references"}
    for equation in contract["equations"].values():
        assert set(equation) == {"formula", "domain", "codomain"}
    for obligation in contract["proof_obligations"]:
        assert set(obligation) - {"tolerance"} == {"type", "property", "formal"}
        assert obligation["type"] in OBLIGATIONS
    for test in contract["falsification_tests"]:
        assert set(test) == {"id", "rule", "prediction", "test", "if_fails"}


def test_falsifiers_have_ids_of_their_own() -> None:
    ids = [parameter.id for parameter in FALSIFIERS]
    assert len(set(ids)) == len(ids)
    assert {f"FALSIFY-ATTN-SUB-{number:03}" for number in (1, 2, 3, 4, 5)} <= set(ids)


@pytest.mark.parametrize("test", FALSIFIERS)
def test_a_falsifier_names_a_test_that_exists(test: dict[str, str]) -> None:
    match = re.fullmatch(r"pytest (tests/\S+\.py)::(test_\w+)", test["test"])
    assert match
    tree = ast.parse((ROOT / match[1]).read_text())
    assert match[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def shape(text: str) -> tuple[str, ...]:
    """Return the axis letters of ``[T,N,H]``, keys called S where the code calls them T."""
    return tuple(text.strip("[]").split(","))


def test_the_stages_contract_is_the_table_in_code() -> None:
    equations = load("stages-v1.yaml")["equations"]
    stages = (*LAYER, *HEAD)
    assert list(equations)[: len(stages)] == [stage.name for stage in stages]
    for stage in stages:
        assert shape(equations[stage.name]["codomain"]) == stage.axes
        sources = re.findall(r"(\w+) (\[[A-Z,]+\])", equations[stage.name]["domain"])
        assert tuple(name for name, _ in sources) == stage.computed_from
        for name, axes in sources:
            assert shape(axes) == (("T", "D") if name == RESIDUAL else BY_NAME[name].axes)


def test_the_noise_floor_of_the_contract_is_that_in_code() -> None:
    equations = load("stages-v1.yaml")["equations"]
    assert f"<= {MARGIN:g} * floor" in equations["margin"]["formula"]
    assert all(name in equations["floor"]["domain"] for name in CLASSES)
    assert f"rounded to {', '.join(DUMPED[:2])} or {DUMPED[2]}" in equations["floor"]["codomain"]
    sampled = equations["sampled_tokens"]["formula"]
    assert f"up to {MOST_TOKENS}" in sampled
    assert f"{MOST_TOKENS // WINDOW} windows of {WINDOW} neighbours" in sampled


def test_the_rules_of_comparing_are_those_in_code() -> None:
    equations = load("diff-v1.yaml")["equations"]
    assert f"> {MARGIN:g} * floor" in equations["excess"]["formula"]
    assert f"{MARGIN:g} * floor < {BLIND}" in equations["excess"]["domain"]
    assert f"{MARGIN:g} * floor of the whole >= {BLIND}" in equations["status"]["formula"]
    assert ", ".join(PRECISIONS) in equations["precision"]["formula"]
    assert f"fewer than {LEAST_VALUES} other values" in equations["precision"]["domain"]
    assert f"<= {MASKED:.0f}" in equations["masked"]["formula"]
    assert equations["status"]["codomain"].split(", ") == [*get_args(Status)]
    lengths = ", ".join(str(up_to.tokens) for up_to in GENERIC.lengths[:-1])
    assert f"up to {lengths}, {GENERIC.lengths[-1].tokens} tokens" in equations["floor"]["domain"]
    assert f"rms(attn_scores) / {GENERIC.scores_rms:g}" in equations["floor"]["formula"]


def test_the_rules_of_explaining_are_those_in_code() -> None:
    equations = load("explain-v1.yaml")["equations"]
    noise = equations["weight_noise"]["formula"]
    for limit in (MOST, STANDS_OUT, FREE, FOLLOWS, PARALLEL, OFFSET, HALF, TELLING, MISFIT, UNEVEN):
        assert re.search(rf"(<=|<= max\(|>|factor|above) ?{limit:g}\b", noise)
    assert f"{DEVIATIONS:g} / sqrt(n)" in noise
    dialect = equations["dialect"]["formula"]
    for rule in (
        f"at most {evidence.FLIPS:g} is left",
        f"at most {evidence.FEW:g} of the rows",
        f"at least {evidence.RARE:g} of the rows",
        f"above {evidence.PARALLEL:g}, and {evidence.ROWS:g} deviations",
    ):
        assert rule in dialect
    recovered = equations["tokens_recovered"]["formula"]
    assert f"within {AS_GOOD:.0e}".replace("e-0", "e-") in recovered
    assert f"below {ALIKE:g}" in recovered
    assert f"{MARGIN:g} * floor >= {BLIND}" in equations["status"]["formula"]
    assert equations["status"]["codomain"].split(", ") == [*get_args(explanation.Status)]
    for name in (*FLOATING, *BLOCKS):
        assert name in equations["dialect"]["formula"]


def test_the_aprt_contract_is_the_header_in_code() -> None:
    equations = load("aprt-v1.yaml")["equations"]
    assert list(equations) == ["magic", "layer", "count", "values", "size"]
    assert equations["magic"]["formula"] == f'"{aprt.MAGIC.decode()}"'
    assert str(aprt.WHOLE_MODEL) in equations["layer"]["formula"]
    assert aprt.HEADER.format == "<4sII"
    bytes_of = [equations[name]["domain"] for name in ("magic", "layer", "count", "values")]
    assert bytes_of == ["bytes 0..3", "bytes 4..7", "bytes 8..11", f"bytes {aprt.HEADER.size}.."]
    for name in ("layer", "count"):
        assert equations[name]["codomain"] == "u32 little-endian"
    assert (aprt.VALUE.str, equations["values"]["codomain"]) == ("<f4", "float32 little-endian")
    size = f"{aprt.HEADER.size} + {aprt.VALUE.itemsize} * count"
    assert equations["size"]["formula"] == size


@pytest.mark.parametrize("name", schemas())
def test_a_schema_is_what_the_code_checks(name: str) -> None:
    written = (CONTRACTS / name).read_bytes()
    assert msgspec.json.decode(written) == msgspec.json.decode(schemas()[name])


def test_the_readme_has_a_row_for_each_stage() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\[[A-Z, ]+\]) \|", readme, flags=re.MULTILINE)
    axes = [(stage.name, ", ".join(stage.axes).replace("S", "T")) for stage in LAYER]
    assert rows == [(name, f"[{letters}]") for name, letters in axes]
