"""`qwenref diff` as it is typed: exit status, last line, JSON, options, and what is refused."""

import functools
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ROOT, TINY, Cli, Result
from small_dumps import make

from qwenref.dumps.aprt import WHOLE_MODEL
from qwenref.stages import parse_stages

DATA = ROOT / "tests" / "data"
GOLDEN = sorted(
    folder.name
    for folder in DATA.iterdir()
    if (folder / "layer-0").is_dir() and folder.name != "apr-q4k"  # of a checkpoint of its own
)
MODEL = ("--model", TINY)
PREFIX = "qwenref: error: "
STATUS = {"AGREE": 0, "DIFFER": 1, "INCOMPLETE": 2, "INCOMPARABLE": 2}
VALUES = np.random.default_rng(6).standard_normal(360).astype(np.float32)

Refused = Callable[..., str]


@pytest.fixture
def diff(cli: Cli) -> Cli:
    """Run `qwenref diff ARGS` in a directory that holds the golden dumps under short names."""
    for folder in DATA.iterdir():
        Path(folder.name).symlink_to(folder)
    return functools.partial(cli, "diff")


@pytest.fixture
def refused(diff: Cli) -> Refused:
    """Run a command that must be refused in one line; return what the line says."""

    def run(*arguments: object) -> str:
        status, out, err = diff(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith(PREFIX)
        assert err.endswith("\n")
        assert err[:-1].isprintable()
        return err[:-1].removeprefix(PREFIX)

    return run


def dump(name: str, layer: int = 0, **stages: np.ndarray) -> Path:
    """Write stages of a layer as .npy files."""
    folder = Path(name) / f"layer-{layer}"
    folder.mkdir(parents=True, exist_ok=True)
    for stage, values in stages.items():
        np.save(folder / f"{stage}.npy", values)
    return Path(name)


def aprt(name: str, values: np.ndarray, layer: int = 0) -> Path:
    header = struct.pack("<4sII", b"APRT", layer, values.size)
    Path(name).write_bytes(header + values.astype("<f4").tobytes())
    return Path(name)


def golden(dump: str, stage: str) -> np.ndarray:
    return np.fromfile(DATA / dump / "layer-0" / f"{stage}.bin", "<f4", offset=12)


def copy_with(name: str, change: Callable[[np.ndarray], np.ndarray], *stages: str) -> Path:
    """Copy apr-f32, and change some of its stages."""
    shutil.copytree("apr-f32", name)
    for stage in stages:
        aprt(f"{name}/layer-0/{stage}.bin", change(golden("apr-f32", stage)))
    return Path(name)


def last(done: Result) -> str:
    return done.out.splitlines()[-1]


def parsed(done: Result) -> dict[str, Any]:
    """Return JSON, which must have no NaN and no Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert done.err == ""
    return json.loads(done.out, parse_constant=refuse)


def stages_in(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the stages of layer 0 that were measured."""
    return {s["stage"]: s for s in found["stages"] if s["layer"] == 0 and s["rel_l2"] is not None}


# --- verdict, exit status, last line --------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "arguments"),
    [
        ("AGREE", ["apr-f32", "apr-f32"]),
        ("AGREE", ["apr-f32", "llama-f32"]),
        ("AGREE", ["apr-f32", "llama-f32", *MODEL]),
        ("AGREE", ["apr-f32", "llama-f32-native", *MODEL]),
        ("AGREE", ["apr-f32", "llama-kv16", *MODEL]),
        ("AGREE", ["apr-f32", "llama-bf16", *MODEL]),
        ("AGREE", ["apr-f32", "llama-f32", "llama-bf16", *MODEL]),
        ("AGREE", ["apr-f32", "llama-flash", "--allow-missing"]),
        ("DIFFER", ["apr-f32", "apr-rope-interleaved"]),
        ("DIFFER", ["apr-f32", "llama-theta-1e4", *MODEL]),
        ("DIFFER", ["apr-f32", "llama-theta-1e4", "llama-f32", *MODEL]),
        ("INCOMPLETE", ["apr-f32", "llama-flash", *MODEL]),
        ("INCOMPLETE", ["apr-f32", "llama-f32", "llama-flash", *MODEL]),
        ("INCOMPARABLE", ["apr-f32", "apr-896"]),
        ("INCOMPARABLE", ["apr-f32", "apr-int8-half", *MODEL]),
        ("INCOMPARABLE", ["apr-f32", "llama-f32-native"]),
    ],
)
def test_the_exit_status_is_that_of_the_verdict_in_the_last_line(
    diff: Cli, verdict: str, arguments: list[object]
) -> None:
    done = diff(*arguments)
    assert (done.status, done.err) == (STATUS[verdict], "")
    assert re.match(rf"{verdict}[:,] \w", last(done))
    assert done.out.endswith("\n")
    assert diff(*arguments, "-q") == Result(done.status, last(done) + "\n", "")
    assert diff(*arguments, "--quiet").out == last(done) + "\n"
    found = parsed(diff(*arguments, "--json"))
    assert found["verdict"] == verdict.lower()
    assert found["reason"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("llama-f32", "AGREE, at float32 precision"),
        ("llama-kv16", "AGREE, at float16 precision from attn_scores on (float32 before)"),
        ("llama-bf16", "AGREE, at bfloat16 precision from qkv_matmul on (float32 before)"),
        ("llama-theta-1e4", "DIFFER: first at q_post_rope"),
        ("apr-rope-interleaved", "DIFFER: first at q_post_rope"),
    ],
)
def test_what_the_last_line_says(diff: Cli, other: str, words: str) -> None:
    for pair in (("apr-f32", other), (other, "apr-f32")):
        assert last(diff(*pair, *MODEL)).startswith(words)


@pytest.mark.parametrize("a", GOLDEN[:-1])
def test_text_of_every_golden_pair_is_plain_and_fits_100_columns(diff: Cli, a: str) -> None:
    for b in GOLDEN[GOLDEN.index(a) + 1 :]:
        statuses = set()
        for arguments in ((a, b, *MODEL), (b, a, *MODEL), (a, b, *MODEL, "--dtype", "float32")):
            status, out, err = diff(*arguments)
            lines = out.splitlines()
            assert err == ""
            assert status == STATUS[re.split("[:,]", lines[-1])[0]]
            assert max(map(len, lines)) <= 100
            assert all(line.isprintable() and line == line.rstrip() for line in lines)
            if "--dtype" not in arguments:
                statuses.add(status)
        assert len(statuses) == 1


def test_text_of_golden_triples_fits_100_columns(diff: Cli) -> None:
    for three in itertools.combinations(GOLDEN[::2], 3):
        lines = diff(*three, *MODEL).out.splitlines()
        assert max(map(len, lines)) <= 100
        assert re.split("[:,]", lines[-1])[0] in STATUS


def test_generic_floors_are_said_to_be_generic(diff: Cli) -> None:
    done = diff("apr-f32", "llama-f32")
    assert "generic floor" in done.out
    rows = {line.split()[0]: line for line in done.out.splitlines() if "e-" in line}
    for stage in ("attn_scores", "attn_softmax", "attention", "attn_out"):
        assert "agree (generic)" in rows[stage]
    assert "agree (generic)" not in rows["attn_norm"]
    for stage in stages_in(parsed(diff("apr-f32", "llama-f32", "--json"))).values():
        assert stage["floor_origin"] == "generic"
        assert stage["status"] == "agree"


def test_the_same_command_prints_the_same_twice(diff: Cli) -> None:
    for option in ([], ["--json"]):
        command = ["apr-f32", "llama-theta-1e4", *MODEL, *option]
        assert diff(*command) == diff(*command)


@pytest.mark.parametrize("odd", range(3))
def test_of_three_the_odd_one_out(diff: Cli, odd: int) -> None:
    three = ["apr-f32", "llama-f32"]
    three.insert(odd, "llama-theta-1e4")
    found = parsed(diff(*three, *MODEL, "--json"))
    assert found["odd_one_out"] == odd
    assert stages_in(found)["q_post_rope"]["odd_one_out"] == odd
    assert stages_in(found)["qkv_bias"]["odd_one_out"] is None
    assert f"{'abc'[odd]} is the odd one out" in diff(*three, *MODEL).out


def test_of_three_that_all_differ_none_is_odd(diff: Cli) -> None:
    dump("x", attn_norm=VALUES)
    dump("y", attn_norm=VALUES[::-1])
    dump("z", attn_norm=VALUES * 2)
    found = parsed(diff("x", "y", "z", "--json"))
    assert (found["verdict"], found["odd_one_out"]) == ("differ", None)
    assert [pair["status"] for pair in found["stages"][0]["pairs"]] == ["differ"] * 3


def test_a_large_error_is_a_difference_however_much_is_normal(diff: Cli) -> None:
    values = np.random.default_rng(8).standard_normal(600_000).astype(np.float32)
    values.tofile("x.f32")  # of who knows which layer, of who knows how many tokens
    (values * -100).tofile("y.f32")
    assert last(diff("x.f32", "y.f32")).startswith("DIFFER: first at x")


# --- colour ---------------------------------------------------------------------------------------


def on_a_terminal(*arguments: str, **env: str) -> str:
    """Return what `qwenref diff` writes to a terminal."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "qwenref", "diff", *arguments]
    clean = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        command, cwd=DATA, env=clean | {"TERM": "xterm-256color"} | env, stdout=theirs
    )
    os.close(theirs)
    written = b""
    try:
        while block := os.read(ours, 65536):
            written += block
    except OSError:  # Linux: the process has closed it
        pass
    finally:
        os.close(ours)
        process.wait(60)
    return written.decode()


def test_colour_on_a_terminal_only_and_not_with_no_color(diff: Cli) -> None:
    command = ("apr-f32", "llama-theta-1e4")
    plain = diff(*command).out
    painted = on_a_terminal(*command).replace("\r\n", "\n")
    assert "\x1b[" in painted
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == plain
    assert on_a_terminal(*command, NO_COLOR="1").replace("\r\n", "\n") == plain
    assert "\x1b" not in on_a_terminal(*command, "--json")


# --- JSON -----------------------------------------------------------------------------------------

_TYPES: dict[str, type | tuple[type, ...]] = {
    "null": type(None),
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "string": str,
    "array": list,
    "object": dict,
}


def misfits(value: Any, schema: Any, root: Any, at: str = "$") -> list[str]:
    """Return where a value does not fit the part of JSON Schema that ours are written in.

    Stricter than a validator in one point: a field that no schema mentions does not fit.
    """
    if "$ref" in schema:
        return misfits(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, at)
    if "anyOf" in schema:
        return min((misfits(value, each, root, at) for each in schema["anyOf"]), key=len)
    if "enum" in schema:
        return [] if value in schema["enum"] else [at]
    kind = schema.get("type")
    if kind is None:
        return []
    found: list[str] = []
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        found.append(at)
    elif kind in ("integer", "number"):
        if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            found.append(at)
    elif isinstance(value, list):
        size = len(value)
        if not schema.get("minItems", 0) <= size <= schema.get("maxItems", size):
            found.append(at)
        first = schema.get("prefixItems", [])
        rest = [schema.get("items", {})] * (size - len(first))
        for i, (item, of) in enumerate(zip(value, first + rest, strict=False)):
            found += misfits(item, of, root, f"{at}[{i}]")
    elif isinstance(value, dict):
        fields, more = schema.get("properties", {}), schema.get("additionalProperties")
        found += [f"{at}.{name}" for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            field = fields.get(name, more)
            found += misfits(item, field, root, f"{at}.{name}") if field else [f"{at}.{name}"]
    return found


def assert_fits(value: dict[str, Any], name: str) -> None:
    schema = json.loads((ROOT / "contracts" / f"{name}.schema.json").read_text())
    assert misfits(value, schema, schema) == []


def test_this_reading_of_schemas_sees_what_does_not_fit(diff: Cli) -> None:
    schema = json.loads((ROOT / "contracts" / "diff-v1.schema.json").read_text())
    good = parsed(diff("apr-f32", "llama-f32", "--json"))
    assert misfits(good, schema, schema) == []
    for changes in ({"verdict": "maybe"}, {"paths": [1]}, {"odd_one_out": "a"}, {"more": 1}):
        assert misfits(good | changes, schema, schema) != []
    stage = {**good["stages"][0], "rel_l2": "0"}
    assert misfits(good | {"stages": [stage]}, schema, schema) == ["$.stages[0].rel_l2"]
    assert misfits({k: v for k, v in good.items() if k != "reason"}, schema, schema) != []


DIRECTORY_FIELDS = {
    "schema",
    "verdict",
    "reason",
    "first_divergence",
    "odd_one_out",
    "paths",
    "stages",
}
STAGE_FIELDS = {
    "layer",
    "stage",
    "status",
    "precision",
    "dim_product",
    "max_abs_diff",
    "max_abs_diff_index",
    "rms_diff",
    "cosine_sim",
    "rel_l2",
    "norm_ratio",
    "floor",
    "ratio",
    "floor_origin",
    "layout",
    "masked",
    "nonfinite",
    "blocks",
    "worst",
    "pairs",
    "odd_one_out",
    "top_diffs",
}


@pytest.mark.parametrize("other", GOLDEN)
def test_json_of_golden_dumps_is_what_the_schema_says(diff: Cli, other: str) -> None:
    for paths, options in (
        (("apr-f32", other), ()),
        (("apr-f32", other), MODEL),
        (("llama-bf16", other, "apr-f32"), MODEL),
    ):
        done = diff(*paths, *options, "--json")
        found = parsed(done)
        assert_fits(found, "diff-v1")
        assert found.keys() >= DIRECTORY_FIELDS
        assert found["schema"] == "qwenref-diff-v1"
        assert found["paths"] == [*paths]
        assert done.status == STATUS[found["verdict"].upper()]
        for stage in found["stages"]:
            assert stage.keys() >= STAGE_FIELDS
            assert {"a", "b"} <= stage["layout"].keys()
            assert all({"a", "b", "rel_l2", "floor", "status"} <= p.keys() for p in stage["pairs"])
            assert len(stage["pairs"]) == (1 if len(paths) == 2 else 3)


def test_json_says_what_text_says(diff: Cli) -> None:
    found = parsed(diff("apr-f32", "llama-theta-1e4", *MODEL, "--json"))
    assert found["first_divergence"] == {"layer": 0, "stage": "q_post_rope", "block": None}
    assert found["reason"] in last(diff("apr-f32", "llama-theta-1e4", *MODEL))
    first = stages_in(found)["q_post_rope"]
    a, b = (golden(name, "q_post_rope").astype(float) for name in ("apr-f32", "llama-theta-1e4"))
    at = int(np.abs(a - b).argmax())
    assert first["max_abs_diff_index"] == at
    assert first["max_abs_diff"] == abs(a[at] - b[at])
    assert first["dim_product"] == a.size
    assert first["rms_diff"] == pytest.approx(np.sqrt(np.mean((a - b) ** 2)))
    norms = np.linalg.norm(a), np.linalg.norm(b)
    assert first["rel_l2"] == pytest.approx(np.linalg.norm(a - b) / min(norms))
    assert first["norm_ratio"] == pytest.approx(norms[0] / norms[1])
    assert first["cosine_sim"] == pytest.approx(a @ b / norms[0] / norms[1])
    assert first["ratio"] == pytest.approx(first["rel_l2"] / first["floor"])


def first_value_set(value: float) -> np.ndarray:
    values = VALUES.copy()
    values[7] = value
    return values


@pytest.mark.parametrize(
    ("a", "b", "status"),
    [
        (VALUES, first_value_set(np.nan), 1),
        (VALUES, first_value_set(np.inf), 1),
        (first_value_set(np.inf), first_value_set(-np.inf), 1),
        (first_value_set(np.nan), first_value_set(np.nan), 1),
        (first_value_set(-np.inf), first_value_set(-np.inf), 0),
        (VALUES, VALUES * np.nan, 1),
        (VALUES, VALUES * 0, 1),
        (VALUES * 0, VALUES * 0, 0),
        (VALUES * 0, VALUES * -0.0, 0),
        (VALUES, VALUES * 2, 1),
        (VALUES.astype(float) * 1e300, VALUES.astype(float) * 2e300, 1),
        (VALUES.astype(float) * 1e-300, VALUES.astype(float) * 2e-300, 1),
        (VALUES[:1], VALUES[:1], 0),
    ],
    ids=[
        "NaN in one",
        "inf in one",
        "inf of two signs",
        "NaN in both",
        "inf in both",
        "NaN only",
        "zero in one",
        "zero in both",
        "minus zero",
        "twice as large",
        "twice as large, huge",
        "twice as large, tiny",
        "one value",
    ],
)
def test_numbers_that_are_none_are_null_in_json(
    diff: Cli, a: np.ndarray, b: np.ndarray, status: int
) -> None:
    with np.errstate(all="ignore"):
        dump("x", attn_norm=a)
        dump("y", attn_norm=b)
    for pair in (("x", "y"), ("y", "x")):
        done = diff(*pair, "--json")
        found = parsed(done)
        assert done.status == status
        assert_fits(found, "diff-v1")
        assert max(map(len, diff(*pair).out.splitlines())) <= 100
        (stage,) = found["stages"]
        if stage["rel_l2"] is None:
            assert stage["reason"]
        if status == 1:
            assert stage["max_abs_diff"] != 0


# --- two files: as apr prints them, and more ------------------------------------------------------

APR_FIELDS = [
    "schema",
    "path_a",
    "path_b",
    "layer",
    "dim_product",
    "max_abs_diff",
    "max_abs_diff_index",
    "rms_diff",
    "cosine_sim",
    "top_diffs",
]
NUMBERS = ["max_abs_diff", "rms_diff", "cosine_sim"]


@pytest.fixture
def files(diff: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `qwenref diff ARGS` where apr ran."""
    monkeypatch.chdir(DATA / "apr-diff")
    return diff


def of_apr(name: str) -> dict[str, Any]:
    return json.loads((DATA / "apr-diff" / f"{name}.json").read_text())


def test_of_two_files_json_has_the_fields_of_apr_in_its_order_and_ours(files: Cli) -> None:
    assert list(of_apr("a-b")) == APR_FIELDS
    for other in ("a", "b", "nan", "zero", "short", "layer1"):
        found = parsed(files("a.bin", f"{other}.bin", "--json"))
        assert list(found) == [*APR_FIELDS, "qwenref"]
        assert_fits(found, "stage-diff-v1")
        for top in found["top_diffs"]:
            assert list(top) == ["index", "a", "b", "abs_diff"]


@pytest.mark.parametrize("name", ["b", "zero"])
def test_of_two_files_numbers_are_those_of_apr(files: Cli, name: str) -> None:
    done = files("a.bin", f"{name}.bin", "--json", "--limit", "2")
    found, expected = parsed(done), of_apr(f"a-{name}")
    assert done.status == 1
    if name == "zero":  # apr: 0.0
        assert found["cosine_sim"] is None
        expected["cosine_sim"] = None
    for field in APR_FIELDS:
        if field not in NUMBERS:
            assert found[field] == expected[field]
        elif expected[field] is not None:
            assert found[field] == pytest.approx(expected[field], rel=1e-6)


def test_of_two_files_nan_is_never_skipped(files: Cli) -> None:
    done = files("a.bin", "nan.bin", "--json", "--limit", "2")
    found = parsed(done)
    assert done.status == 1
    assert found["rms_diff"] is None
    assert found["cosine_sim"] is None
    assert found["max_abs_diff"] is None  # apr: 0.0
    assert found["max_abs_diff_index"] in (12, None)  # apr: 0
    assert found["qwenref"]["nonfinite"]["differ"] == 1
    assert "NaN" in found["qwenref"]["reason"]
    assert "NaN" in last(files("a.bin", "nan.bin"))


def test_a_file_and_itself(files: Cli) -> None:
    done = files("a.bin", "a.bin", "--json")
    found = parsed(done)
    assert done.status == 0
    assert (found["max_abs_diff"], found["rms_diff"]) == (0, 0)
    assert found["cosine_sim"] == pytest.approx(1, abs=1e-15)
    assert found["qwenref"]["verdict"] == "agree"


@pytest.mark.parametrize("other", ["layer1", "short"])
def test_files_that_cannot_be_compared_have_no_numbers(files: Cli, other: str) -> None:
    for pair in (("a.bin", f"{other}.bin"), (f"{other}.bin", "a.bin")):
        done = files(*pair, "--json")
        found = parsed(done)
        assert done.status == 2
        assert found["qwenref"]["verdict"] == "incomparable"
        assert all(found[field] is None for field in NUMBERS)
        assert found["top_diffs"] == []
        text = files(*pair)
        assert text.status == 2
        assert last(text).startswith("INCOMPARABLE: ")


def test_a_truncated_file_is_refused(files: Cli) -> None:
    for pair in (("a.bin", "trunc.bin"), ("trunc.bin", "a.bin")):
        for option in ([], ["--json"], ["-q"]):
            status, out, err = files(*pair, *option)
            assert (status, out) == (2, "")
            assert err.startswith(f"{PREFIX}trunc.bin has 3465 bytes")
            assert err.count("\n") == 1


def test_a_file_of_the_whole_model_has_the_layer_that_its_header_has(diff: Cli) -> None:
    done = diff("apr-f32/final_norm.bin", "apr-f32/final_norm.bin", "--json")
    assert done.status == 0
    assert parsed(done)["layer"] == WHOLE_MODEL


def test_files_of_any_two_formats_and_names(diff: Cli) -> None:
    values = golden("apr-f32", "attn_scores")
    Path("elsewhere").mkdir()
    aprt("elsewhere/attn_scores.aprt", values)
    np.save("mine.npy", values)
    values.tofile("mine.raw")
    for other in ("elsewhere/attn_scores.aprt", "mine.npy", "mine.raw"):
        done = diff("apr-f32/layer-0/attn_scores.bin", other, "--json")
        assert done.status == 0
        assert parsed(done)["qwenref"]["stage"] == "attn_scores"


def test_1372_values_of_any_name_go_through_the_same_reader_and_metrics(diff: Cli) -> None:
    values = np.random.default_rng(28).standard_normal(28 * 7 * 7).astype(np.float32)
    numbers = []
    for stage in ("attn_scores", "attn_softmax", "made_up"):
        for folder, factor in (("x", 1.0), ("y", 1.1)):
            (Path(folder) / "layer-0").mkdir(parents=True, exist_ok=True)
            aprt(f"{folder}/layer-0/{stage}.bin", values * np.float32(factor))
        done = diff(f"x/layer-0/{stage}.bin", f"y/layer-0/{stage}.bin", "--json")
        found = parsed(done)
        assert (done.status, found["dim_product"], found["layer"]) == (1, 1372, 0)
        assert found["qwenref"]["stage"] == stage
        numbers.append([found[field] for field in (*NUMBERS, "max_abs_diff_index", "top_diffs")])
    assert numbers[0] == numbers[1] == numbers[2]
    both = parsed(diff("x", "y", "--json"))
    assert [s["stage"] for s in both["stages"]] == ["attn_scores", "attn_softmax", "made_up"]
    assert both["first_divergence"]["stage"] == "attn_scores"


# --- paths ----------------------------------------------------------------------------------------


def test_a_file_against_a_directory(diff: Cli) -> None:
    file = "apr-f32/layer-0/attn_norm.bin"
    for pair in ((file, "llama-f32"), ("llama-f32", file)):
        done = diff(*pair, *MODEL, "--json")
        assert done.status == 0
        found = parsed(done)
        assert found.get("dim_product", 1008) == 1008
        assert "qkv_matmul" not in done.out
    assert diff(file, "llama-theta-1e4").status == 0  # whose fault comes later
    assert diff("apr-f32/layer-0/q_post_rope.bin", "llama-theta-1e4").status == 1
    assert diff("apr-f32/layer-0/attn_scores.bin", "llama-flash").status == 2
    assert diff("apr-f32/layer-1/attn_norm.bin", "llama-f32").status == 2


def test_three_files(diff: Cli) -> None:
    three = [f"{name}/layer-0/q_post_rope.bin" for name in ("apr-f32", "llama-f32", "llama-kv16")]
    assert diff(*three, *MODEL).status == 0
    three[1] = "llama-theta-1e4/layer-0/q_post_rope.bin"
    done = diff(*three, *MODEL, "--json")
    assert done.status == 1
    found = parsed(done)
    assert_fits(found, "diff-v1")
    assert found["odd_one_out"] == 1


def test_files_of_two_stages(diff: Cli) -> None:
    done = diff("apr-f32/layer-0/attn_norm.bin", "apr-f32/layer-0/attn_out.bin")
    assert done.status == 2
    assert last(done).startswith("INCOMPARABLE: ")
    assert "attn_out" in last(done)


def test_a_header_that_contradicts_the_path(diff: Cli) -> None:
    copy_with("wrong", lambda values: values)
    aprt("wrong/layer-0/attn_out.bin", golden("apr-f32", "attn_out"), layer=2)
    done = diff("apr-f32", "wrong")
    assert done.status == 2
    assert last(done).startswith("INCOMPARABLE: ")
    assert "layer 2" in last(done)
    assert diff("apr-f32", "wrong", "--stages", "attn_out").status == 2


def test_no_layer_in_common(diff: Cli) -> None:
    dump("x", 0, attn_norm=VALUES)
    dump("y", 1, attn_norm=VALUES)
    done = diff("x", "y")
    assert done.status == 2
    assert last(done).startswith("INCOMPARABLE: ")


def test_the_head_alone_has_no_layer_in_common_with_layers(diff: Cli) -> None:
    dump("x", 1, attn_norm=VALUES)
    dump("x", 2, attn_norm=VALUES)
    Path("y").mkdir()
    np.save("y/lm_head.npy", VALUES)
    line = "INCOMPARABLE: no layer is in all of them: a has layer 1, 2, b has the head"
    assert last(diff("x", "y")) == line
    Path("z").mkdir()
    np.save("x/final_norm.npy", VALUES)
    assert "a has the head, b has layer 0" in last(diff("y", dump("z", attn_norm=VALUES)))
    assert "a has layer 1, 2 and the head, b has layer 0" in last(diff("x", "z"))


@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_another_number_of_paths_than_two_or_three(refused: Refused, count: int) -> None:
    assert refused(*["apr-f32"] * count)
    assert refused(*["apr-f32/layer-0/attn_norm.bin"] * count)


@pytest.mark.parametrize("path", ["absent", "absent/layer-0/attn_norm.bin", "x" * 300, ""])
def test_a_path_that_does_not_exist(refused: Refused, path: str) -> None:
    for pair in (("apr-f32", path), (path, "apr-f32")):
        line = refused(*pair)
        assert path in line
        assert "print" not in line


def test_directories_without_stages(refused: Refused) -> None:
    Path("empty").mkdir()
    assert "empty" in refused("apr-f32", "empty")
    assert "apr-diff/trunc.bin" in refused("apr-f32", "apr-diff")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--no-such-option"],
        ["--limit"],
        ["--limit", "-1"],
        ["--limit", "x"],
        ["--limit", "1.5"],
        ["--heads", "x"],
        ["--json=yes"],
        ["--force"],
    ],
)
def test_a_command_that_cannot_be_parsed(refused: Refused, arguments: list[str]) -> None:
    assert arguments[0].split("=")[0] in refused("apr-f32", "llama-f32", *arguments)


# --- --limit --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 3, 10, 25])
def test_the_largest_differences(diff: Cli, limit: int) -> None:
    command = ["apr-f32", "llama-theta-1e4", *MODEL, "--limit", limit]
    found = stages_in(parsed(diff(*command, "--json")))["q_post_rope"]
    a, b = (golden(name, "q_post_rope").astype(float) for name in ("apr-f32", "llama-theta-1e4"))
    largest = np.argsort(-np.abs(a - b), kind="stable")[:limit]
    assert [top["index"] for top in found["top_diffs"]] == [*largest]
    for top in found["top_diffs"]:
        at = top["index"]
        assert (top["a"], top["b"], top["abs_diff"]) == (a[at], b[at], abs(a[at] - b[at]))
    assert found["max_abs_diff"] == np.abs(a - b).max()
    rows = re.findall(r"^ +\d+ +\S+ +\S+ +\S+$", diff(*command).out, flags=re.MULTILINE)
    assert len(rows) == limit


def test_ten_differences_unless_asked_for_more_and_never_more_than_there_are(diff: Cli) -> None:
    dump("x", attn_norm=VALUES)
    dump("y", attn_norm=VALUES * 2)
    assert len(parsed(diff("x", "y", "--json"))["stages"][0]["top_diffs"]) == 10
    all_of_them = parsed(diff("x", "y", "--json", "--limit", 10**6))["stages"][0]["top_diffs"]
    assert sorted(top["index"] for top in all_of_them) == [*range(VALUES.size)]


# --- --stages, --layers ---------------------------------------------------------------------------


def test_some_stages_only(diff: Cli) -> None:
    pair = ["apr-f32", "llama-theta-1e4", "--layers", "0"]
    done = diff(*pair, "--stages", "attn_norm, qkv_bias", "--json")
    assert done.status == 0
    found = parsed(done)
    assert list(stages_in(found)) == ["attn_norm", "qkv_bias"]
    assert {stage["stage"] for stage in found["stages"]} == {"attn_norm", "qkv_bias"}
    assert diff(*pair, "--stages", "attn_norm,attn_out").status == 1
    assert diff(*pair, "--stages", "all").status == 1


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (["--stages", "lm_head"], "lm_head"),
        (["--stages", "lm_head,attn_norm"], "layer 1 attn_norm, layer 2 attn_norm, lm_head"),
        (["--stages", "residual", "--layers", "0"], "post_attn_residual, post_ffn_residual"),
        (["--layers", "1"], "layer 1 attn_norm, layer 1 qkv_matmul, layer 1 qkv_bias"),
        (["--layers", "0,1"], "layer 1 attn_norm, layer 1 qkv_matmul, layer 1 qkv_bias"),
    ],
    ids=str,
)
def test_what_is_asked_for_and_not_in_all_is_not_passed(
    diff: Cli, options: list[str], missing: str
) -> None:
    for pair in (["apr-f32", "llama-f32"], ["llama-f32", "apr-f32"]):
        done = diff(*pair, *options)
        assert done.status == 2
        assert last(done).startswith("INCOMPLETE: nothing differs, but ")
        assert missing in last(done)
        assert "not measured" in last(done)


def test_a_layer_without_attention_that_is_asked_for_and_missing_is_not_passed(diff: Cli) -> None:
    dump("x", attn_norm=VALUES)
    dump("x", 1, ffn_up=VALUES, made_up=VALUES)
    dump("y", attn_norm=VALUES)
    assert diff("x", "y").status == 0
    done = diff("x", "y", "--layers", "0,1")
    assert done.status == 2
    assert "layer 1 ffn_up, layer 1 made_up not measured" in last(done)


def test_of_a_layer_that_all_have_the_verdict_depends_on_what_it_would_anyway(diff: Cli) -> None:
    assert diff("apr-f32", "llama-f32", "--layers", "0").status == 0  # without an MLP
    dump("x", 1, ffn_up=VALUES, made_up=VALUES)
    dump("y", 1, ffn_up=VALUES)
    assert diff("x", "y", "--layers", "1").status == 0


@pytest.mark.parametrize(
    "spec",
    ["attention", "mlp", "residual", " mlp ", "attention,mlp", "residual, lm_head", "all,attn_out"],
)
def test_groups_of_stages_are_those_of_capture(diff: Cli, spec: str) -> None:
    found = parsed(diff("apr-f32", "apr-f32", "--stages", spec, "--json"))
    wanted = [stage.name for stage in parse_stages(spec) or ()]
    assert [*stages_in(found)] == [name for name in wanted if name not in ("final_norm", "lm_head")]
    assert {stage["stage"] for stage in found["stages"]} == {*wanted}


def test_of_a_group_some_stages_will_do(diff: Cli, refused: Refused) -> None:
    copy_with("x", lambda values: values)
    copy_with("y", lambda values: values)
    for name in "xy":
        Path(name, "layer-0/attn_scores.bin").unlink()
    options = ["--layers", "0", "--stages", "attention"]
    assert "at float32 precision: 8 stages" in last(diff("x", "y", *options))
    assert "attn_scores" in last(diff("apr-f32", "y", *options))
    line = refused("llama-f32", "llama-bf16", "--stages", "attn_norm,mlp")
    assert "ffn_norm or ffn_gate or ffn_up or ffn_silu or ffn_swigl or ffn_out" in line


def test_stages_are_compared_in_chain_order_whatever_order_is_asked_for(diff: Cli) -> None:
    found = parsed(diff("apr-f32", "llama-f32", "--stages", "attn_out,attn_norm", "--json"))
    assert list(stages_in(found)) == ["attn_norm", "attn_out"]


def test_stages_of_any_name(diff: Cli) -> None:
    for name, factor in (("x", 1), ("y", 3)):
        dump(name, attn_norm=VALUES, made_up=VALUES * factor)
    found = parsed(diff("x", "y", "--stages", "made_up", "--json"))
    assert list(stages_in(found)) == ["made_up"]
    assert stages_in(found)["made_up"]["status"] == "differ"
    done = diff("x", "y")  # only the nine decide
    assert done.status == 0
    assert "made_up" in done.out


@pytest.mark.parametrize("stages", ["nope", "attn_norm,nope", "Attn_norm", "attn_norm.q", "*"])
def test_an_unknown_stage_and_what_is_there(refused: Refused, stages: str) -> None:
    line = refused("apr-f32", "llama-f32", "--stages", stages)
    assert stages.removeprefix("attn_norm,") in line
    assert "apr-f32 holds" in line
    assert "llama-f32 holds" in line
    assert "attn_norm" in line


@pytest.mark.parametrize("stages", ["", ",", "attn_norm,", "attn_norm,,attn_out", " "])
def test_an_empty_name_of_a_stage(refused: Refused, stages: str) -> None:
    assert "--stages" in refused("apr-f32", "llama-f32", "--stages", stages)


def test_some_layers_only(diff: Cli) -> None:
    copy_with("other", lambda values: values)
    aprt("other/layer-1/attn_norm.bin", golden("apr-f32", "attn_norm"), layer=1)
    for layers, wanted in (("0", {0}), ("2", {2}), ("1", {1}), ("0,2", {0, 2}), ("0..2", {0, 1})):
        done = diff("apr-f32", "other", "--layers", layers, "--json")
        assert done.status == (1 if 1 in wanted else 0)
        assert {stage["layer"] for stage in parsed(done)["stages"]} == wanted
    assert diff("apr-f32", "other").status == 1
    found = parsed(diff("apr-f32", "other", "--json"))
    assert found["first_divergence"]["layer"] == 1
    assert "layer 1 attn_norm" in last(diff("apr-f32", "other"))


@pytest.mark.parametrize("layers", ["", "x", "-1", "0-2", "1..1", "2..1", "0,", "0x1", "20000"])
def test_layers_that_are_none(refused: Refused, layers: str) -> None:
    assert "--layers" in refused("apr-f32", "llama-f32", f"--layers={layers}")


def test_a_layer_that_no_dump_has(refused: Refused) -> None:
    line = refused("apr-f32", "llama-f32", "--layers", "7")
    assert "layer 7" in line
    assert "apr-f32 holds" in line


# --- --dtype --------------------------------------------------------------------------------------


def test_an_explicit_precision_is_strict_and_says_what_would_explain_it(diff: Cli) -> None:
    for dtype, status in (("float32", 1), ("float16", 0), ("bfloat16", 0), ("auto", 0)):
        done = diff("apr-f32", "llama-kv16", *MODEL, "--dtype", dtype)
        assert done.status == status
    line = last(diff("apr-f32", "llama-kv16", *MODEL, "--dtype", "float32"))
    assert line.startswith("DIFFER: first at attn_scores")
    assert "float16" in line
    assert "qwenref explain" in line
    line = last(diff("apr-f32", "llama-bf16", *MODEL, "--dtype", "float16"))
    assert line.startswith("DIFFER: first at qkv_matmul")
    assert "bfloat16" in line
    line = last(diff("apr-f32", "llama-theta-1e4", *MODEL, "--dtype", "float32"))
    assert "explain" not in line


@pytest.mark.parametrize("dtype", ["float64", "Float32", "f32", "fp16", "tf32", "", "float32 "])
def test_an_unknown_precision_and_the_choices(refused: Refused, dtype: str) -> None:
    line = refused("apr-f32", "llama-f32", "--dtype", dtype)
    assert repr(dtype) in line
    assert all(name in line for name in ("auto", "float32", "float16", "bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_precision_with_three_paths(diff: Cli, refused: Refused, dtype: str) -> None:
    three = ["apr-f32", "llama-f32", "llama-kv16", *MODEL]
    assert dtype in refused(*three, "--dtype", dtype)
    assert diff(*three, "--dtype", "auto", "--save", "three.json").status == 0
    assert dtype in refused("three.json", "--dtype", dtype)


# --- --tolerance ----------------------------------------------------------------------------------


def test_a_tolerance_replaces_floors(diff: Cli) -> None:
    pair = ("apr-f32", "llama-theta-1e4", *MODEL)
    for options, first in (
        ([], "q_post_rope"),
        (["--tolerance", "10"], None),
        (["--tolerance", "q_post_rope=10"], "k_post_rope"),
        (["--tolerance", "q_post_rope=10", "--tolerance", "k_post_rope=10"], "attn_scores"),
        (["--tolerance", "10", "--tolerance", "attn_scores=1e-3"], "attn_scores"),
        (["--tolerance", "attn_scores=1e-3", "--tolerance", "10"], "attn_scores"),
        (["--tolerance", "1e-9"], "attn_norm"),
        (["--tolerance", "0"], "attn_norm"),
    ):
        done = diff(*pair, *options, "--json")
        found = parsed(done)
        assert done.status == (0 if first is None else 1)
        assert first is None or found["first_divergence"]["stage"] == first
    given = parsed(diff(*pair, "--tolerance", "q_post_rope=10", "--json"))
    origins = {name: stage["floor_origin"] for name, stage in stages_in(given).items()}
    assert origins["q_post_rope"] == "tolerance"
    assert origins["k_post_rope"] == "generic"
    assert stages_in(given)["q_post_rope"]["floor"] == 10


def test_a_tolerance_of_nothing_accepts_the_same_values(diff: Cli) -> None:
    assert diff("apr-f32", "apr-f32", "--tolerance", "0").status == 0


def test_no_tolerance_accepts_nan_or_another_size(diff: Cli) -> None:
    pair = ("apr-diff/a.bin", "apr-diff/nan.bin")
    assert diff(*pair, "--tolerance", "1e300").status == 1
    assert diff("apr-diff/a.bin", "apr-diff/short.bin", "--tolerance", "1e300").status == 2
    assert diff("apr-f32", "llama-flash", "--tolerance", "1e300").status == 2


@pytest.mark.parametrize(
    "tolerance",
    [
        "",
        "x",
        "=",
        "=1",
        "attn_norm=",
        "attn_norm=x",
        "attn_norm",
        "attn_norm=1=2",
        "1e-3,1e-4",
        "nan",
        "inf",
        "-1",
        "attn_norm=nan",
        "attn_norm=inf",
        "attn_norm=-1e-9",
        "1e999",
    ],
)
def test_a_tolerance_that_is_none(refused: Refused, tolerance: str) -> None:
    assert "tolerance" in refused("apr-f32", "llama-f32", f"--tolerance={tolerance}")


def test_a_tolerance_for_a_stage_that_is_not_there(refused: Refused) -> None:
    # it may be stricter than the floor: ignored because of a slip, it would pass what it should not
    assert "attn_nrom" in refused("apr-f32", "llama-f32", "--tolerance", "attn_nrom=1e-12")


# --- --names --------------------------------------------------------------------------------------


@pytest.fixture
def of_hooks(diff: Cli) -> Path:
    """What hooks in transformers would give, made of llama-f32."""
    Path("hooks").mkdir()
    layer = "hooks/model.layers.0"
    np.save(f"{layer}.input_layernorm.npy", golden("llama-f32", "attn_norm"))
    biased = golden("llama-f32", "qkv_bias").reshape(12, 140)
    for name, columns in (("q", slice(84)), ("k", slice(84, 112)), ("v", slice(112, 140))):
        values = np.ascontiguousarray(biased[:, columns])
        np.save(f"{layer}.self_attn.{name}_proj.npy", values)
    np.save(f"{layer}.self_attn.o_proj.npy", golden("llama-f32", "attn_out"))
    np.save(f"{layer}.self_attn.o_proj.input.npy", golden("llama-f32", "attention"))
    return Path("hooks")


def test_a_map_that_comes_with_the_package(diff: Cli, of_hooks: Path) -> None:
    done = diff("apr-f32", of_hooks, "--names", "hf", *MODEL, "--allow-missing", "--json")
    assert done.status == 0
    found = stages_in(parsed(done))
    assert list(found) == ["attn_norm", "qkv_bias", "attention", "attn_out"]
    assert [block["name"] for block in found["qkv_bias"]["blocks"]] == ["q", "k", "v"]
    assert diff("apr-f32", of_hooks, "--names", "hf", *MODEL).status == 2


def test_a_map_of_ones_own(diff: Cli) -> None:
    Path("mine/blk0").mkdir(parents=True)
    golden("llama-f32", "attn_norm").tofile("mine/blk0/norm.f32")
    golden("llama-f32", "attn_norm").tofile("mine/blk0/what.f32")
    Path("names").write_text('{"blk{layer}/norm": "attn_norm"}')
    done = diff("apr-f32", "mine", "--names", "names", "--stages", "attn_norm", "--layers", "0")
    assert done.status == 0
    Path("names").write_text('{"blk{layer}/what": "attn_norm", "blk{layer}/norm": "attn_norm"}')
    assert diff("apr-f32", "mine", "--names", "names").status == 2


def test_an_error_in_v_alone_is_reported_at_the_block_of_v(diff: Cli, of_hooks: Path) -> None:
    file = of_hooks / "model.layers.0.self_attn.v_proj.npy"
    np.save(file, np.load(file)[::-1].copy())
    done = diff("apr-f32", of_hooks, "--names", "hf", *MODEL, "--json")
    assert done.status == 1
    found = parsed(done)
    assert found["first_divergence"] == {"layer": 0, "stage": "qkv_bias", "block": "v"}


def test_names_that_are_refused(refused: Refused) -> None:
    Path("bad.json").write_text('{"{layer}{layer}": "attn_norm"}')
    Path("twice.json").write_text('{"layer-{layer}/attn_out": "attn_norm"}')
    assert "bad.json" in refused("apr-f32", "llama-f32", "--names", "bad.json")
    line = refused("apr-f32", "llama-f32", "--names", "absent.json")
    assert "hf, llama.cpp" in line
    line = refused("apr-f32", "llama-f32", "--names", "twice.json")
    assert "attn_out.bin" in line
    assert "attn_norm.bin" in line
    line = refused("apr-f32", "llama-f32", "--names", "x" * 300)
    assert "print" not in line


# --- --model, or sizes ----------------------------------------------------------------------------

SIZES = ["--heads", 6, "--kv-heads", 2, "--head-dim", 14, "--hidden", 84]


@pytest.mark.parametrize(
    "options", [[*MODEL], ["--model", TINY / "config.json"], SIZES], ids=["dir", "file", "sizes"]
)
def test_shapes_from_a_checkpoint_or_by_hand(diff: Cli, options: list[object]) -> None:
    plain = stages_in(parsed(diff("apr-f32", "llama-f32", "--json")))
    shaped = stages_in(parsed(diff("apr-f32", "llama-f32", *options, "--json")))
    assert plain["qkv_bias"]["blocks"] == []
    assert [block["name"] for block in shaped["qkv_bias"]["blocks"]] == ["q", "k", "v"]
    assert shaped["attn_scores"]["layout"] == {"a": "N T S", "b": "N T S"}
    assert shaped["attn_scores"]["masked"] == {"a": "zero", "b": "zero"}
    assert diff("apr-f32", "llama-f32-native", *options).status == 0


def test_the_model_says_how_many_layers_come_before_the_head(diff: Cli) -> None:
    """After 28 in bfloat16, so much error would be normal; it is 28 if nothing is known."""
    copy_with("other", lambda values: values)
    logits = np.fromfile("other/lm_head.bin", "<f4", offset=12)
    noise = np.random.default_rng(0).standard_normal(logits.size).astype(np.float32)
    noise *= np.float32(0.6) * np.linalg.norm(logits) / np.linalg.norm(noise)
    aprt("other/lm_head.bin", logits + noise, layer=WHOLE_MODEL)
    assert last(diff("apr-f32", "other", *MODEL)).startswith("DIFFER: first at lm_head")
    config = json.loads((TINY / "config.json").read_text()) | {"num_hidden_layers": 28}
    Path("deep.json").write_text(json.dumps(config))
    line = last(diff("apr-f32", "other", "--model", "deep.json"))
    assert line.startswith("INCOMPLETE: nothing differs, but lm_head too noisy to tell")
    assert "`qwenref explain`" in line


def test_a_model_that_is_none(refused: Refused) -> None:
    Path("broken.json").write_text("{")
    Path("llama.json").write_text('{"model_type": "llama"}')
    for model in ("absent", "broken.json", "llama.json", "apr-f32", "/dev/null", "x" * 300):
        line = refused("apr-f32", "llama-f32", "--model", model)
        assert model in line
        assert "print" not in line


@pytest.mark.parametrize("given", range(1, 4))
def test_some_sizes_are_not_enough(refused: Refused, given: int) -> None:
    flags = [SIZES[i : i + 2] for i in range(0, 8, 2)]
    for some in itertools.combinations(flags, given):
        line = refused("apr-f32", "llama-f32", *itertools.chain(*some))
        assert "--heads" in line
        assert "--hidden" in line


@pytest.mark.parametrize("size", ["0", "-1"])
def test_sizes_that_are_none(refused: Refused, size: str) -> None:
    for i in range(1, 8, 2):
        sizes = [*SIZES[:i], size, *SIZES[i + 1 :]]
        assert refused("apr-f32", "llama-f32", *sizes)


def test_sizes_given_twice(refused: Refused) -> None:
    assert "--model" in refused("apr-f32", "llama-f32", *MODEL, *SIZES)


def test_sizes_that_contradict_a_manifest(diff: Cli, refused: Refused) -> None:
    make(Path("x"), "attn_norm")
    make(Path("y"), "attn_norm")
    assert "manifest" in refused("x", "y", *SIZES)
    assert "manifest" in refused("x", "y", *MODEL)
    same = ["--heads", 1, "--kv-heads", 1, "--head-dim", 2, "--hidden", 5]
    assert diff("x", "y", *same).status == 0


# --- --allow-missing, --allow-different-weights, --strict-layout ----------------------------------


def test_what_is_missing_is_allowed_out_loud(diff: Cli) -> None:
    done = diff("apr-f32", "llama-flash", *MODEL, "--allow-missing")
    assert done.status == 0
    for stage in ("attn_scores", "attn_softmax"):
        assert stage in last(done)
    statuses = stages_in(parsed(diff("apr-f32", "llama-flash", "--allow-missing", "--json")))
    assert "attn_scores" not in statuses


def test_what_differs_differs_whatever_may_be_missing(diff: Cli) -> None:
    copy_with("other", lambda values: values * 2, "attn_out")
    Path("other/layer-0/attn_norm.bin").unlink()
    assert diff("apr-f32", "other", "--layers", "0").status == 1
    assert diff("apr-f32", "other", "--layers", "0", "--allow-missing").status == 1


def test_nothing_that_can_be_judged_never_agrees(diff: Cli) -> None:
    dump("x", attn_norm=VALUES)
    dump("y", attn_out=VALUES)
    for options in ([], ["--allow-missing"]):
        done = diff("x", "y", *options)
        assert done.status == 2
        assert last(done).startswith("INCOMPLETE: ")


def test_an_extra_file_is_listed_and_a_missing_one_is_not_passed(diff: Cli) -> None:
    copy_with("other", lambda values: values)
    Path("other/layer-0/attn_norm.bin").rename("other/layer-0/my_norm.bin")
    done = diff("apr-f32", "other", "--layers", "0")
    assert done.status == 2
    assert "attn_norm" in last(done)
    assert "my_norm" in done.out


def edit_manifest(name: str, **changes: object) -> None:
    path = Path(name, "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(digit: str) -> dict[str, object]:
    return {"layers": {"0": f"blake3-halves:{digit * 64}"}, "embedding": None, "biases": False}


def test_other_weights_are_incomparable_unless_allowed_out_loud(diff: Cli) -> None:
    for name, digit in (("x", "1"), ("y", "2")):
        make(Path(name), "attn_norm")
        edit_manifest(name, weights=weights(digit))
    done = diff("x", "y")
    assert done.status == 2
    assert last(done).startswith("INCOMPARABLE: ")
    assert "--allow-different-weights" in last(done)
    found = parsed(diff("x", "y", "--json"))
    assert all(stage["rel_l2"] is None for stage in found["stages"])
    allowed = diff("x", "y", "--allow-different-weights")
    assert allowed.status == 0
    assert "weights" in allowed.out
    assert "weights" in " ".join(
        parsed(diff("x", "y", "--allow-different-weights", "--json"))["notes"]
    )


def test_other_tokens_are_incomparable_whatever_is_allowed(diff: Cli) -> None:
    for name, tokens in (("x", [1, 2, 3]), ("y", [1, 2, 4])):
        make(Path(name), "attn_norm")
        edit_manifest(name, tokens=tokens)
    for options in ([], ["--allow-different-weights"], ["--allow-missing"], ["--tolerance", "9"]):
        done = diff("x", "y", *options)
        assert done.status == 2
        assert last(done).startswith("INCOMPARABLE: ")
        assert "token" in last(done)


def heads_first(values: np.ndarray) -> np.ndarray:
    return values.reshape(12, -1, 14).transpose(1, 0, 2)


def test_another_layout_is_recognised_unless_layouts_are_strict(diff: Cli) -> None:
    copy_with("other", heads_first, "q_post_rope", "k_post_rope")
    done = diff("apr-f32", "other", *MODEL)
    assert done.status == 0
    assert "layout, not arithmetic" in done.out
    layout = stages_in(parsed(diff("apr-f32", "other", *MODEL, "--json")))["q_post_rope"]["layout"]
    assert layout == {"a": "T N H", "b": "N T H"}
    strict = diff("apr-f32", "other", *MODEL, "--strict-layout")
    assert strict.status == 1
    assert "q_post_rope" in last(strict)
    assert diff("apr-f32", "llama-f32", *MODEL, "--strict-layout").status == 0
    assert diff("apr-f32", "llama-f32-native", *MODEL, "--strict-layout").status != 0
    assert diff("apr-f32", "other").status == 1  # whose shapes nobody knows


def test_another_convention_is_a_difference_where_layouts_are_strict(diff: Cli) -> None:
    copy_with("unscaled", lambda values: values * np.float32(14**0.5), "attn_scores")
    assert diff("apr-f32", "unscaled", *MODEL).status == 0
    done = diff("apr-f32", "unscaled", *MODEL, "--strict-layout")
    assert done.status == 1
    assert "attn_scores" in last(done)


# --- --save, and judging what was saved -----------------------------------------------------------

SAVED = "saved.json"


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-q"],
        ["--json"],
        ["--dtype", "float32"],
        ["--dtype", "float16", "--json"],
        ["--dtype", "bfloat16"],
        ["--tolerance", "1e-9"],
        ["--tolerance", "10"],
        ["--tolerance", "q_post_rope=10", "--tolerance", "attn_out=0", "--json"],
        ["--allow-missing"],
        ["--limit", "3"],
        ["--limit", "0", "--json"],
        ["--stages", "attn_norm", "--json"],
        ["--stages", "attn_scores,attn_softmax", "--json"],
        ["--stages", "attn_softmax,attn_out", "--dtype", "float32", "--json"],
        ["--layers", "0", "--json"],
        ["--layers", "0,1", "--json"],
        ["--stages", "residual,lm_head", "--json"],
        ["--stages", "attention", "--json"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("other", ["llama-kv16", "llama-flash", "llama-theta-1e4"])
def test_judged_again_without_the_dumps_as_with_them(
    diff: Cli, other: str, options: list[str]
) -> None:
    for name in ("apr-f32", other):
        Path(name).unlink()
        shutil.copytree(DATA / name, name)
    direct = diff("apr-f32", other, *MODEL, *options)
    assert diff("apr-f32", other, *MODEL, "--save", SAVED) == diff("apr-f32", other, *MODEL)
    for name in ("apr-f32", other):
        shutil.rmtree(name)
    assert diff(SAVED, *options) == direct


def test_three_judged_again(diff: Cli) -> None:
    three = ["apr-f32", "llama-theta-1e4", "llama-f32-native", *MODEL]
    diff(*three, "--save", SAVED)
    for options in ([], ["--json"], ["--tolerance", "10"], ["--stages", "qkv_bias"]):
        assert diff(SAVED, *options) == diff(*three, *options)


def test_two_files_judged_again(diff: Cli) -> None:
    pair = ["apr-diff/a.bin", "apr-diff/b.bin"]
    diff(*pair, "--save", SAVED)
    for options in ([], ["--json"], ["--tolerance", "1"], ["--limit", "1", "--json"]):
        assert diff(SAVED, *options) == diff(*pair, *options)


def test_dumps_that_cannot_be_compared_judged_again(diff: Cli) -> None:
    for pair in (["apr-diff/a.bin", "apr-diff/layer1.bin"], ["apr-f32", "apr-int8-half"]):
        diff(*pair, "--save", SAVED)
        for options in ([], ["--json"], ["--tolerance", "1e9"]):
            assert diff(SAVED, *options) == diff(*pair, *options)
            assert diff(SAVED, *options).status == 2


def test_dumps_with_nan_judged_again(diff: Cli) -> None:
    dump("x", attn_norm=VALUES, attn_out=VALUES)
    dump("y", attn_norm=first_value_set(np.nan), attn_out=VALUES * 0)
    diff("x", "y", "--save", SAVED)
    for options in ([], ["--json"], ["--tolerance", "1e9"]):
        assert diff(SAVED, *options) == diff("x", "y", *options)
        assert diff(SAVED, *options).status == 1


def test_one_stage_of_large_scores_judged_again(diff: Cli) -> None:
    """Floors after the softmax grow with the scores, which may not be among the stages chosen."""
    copy_with("x", lambda values: values * 30, "attn_scores")
    copy_with("y", lambda values: values * 30, "attn_scores")
    aprt("y/layer-0/attn_out.bin", golden("apr-f32", "attn_out") * np.float32(1 + 1e-4))
    diff("x", "y", *MODEL, "--save", SAVED)
    for stages in ("attn_out", "attn_softmax,attn_out"):
        options = ["--layers", "0", "--stages", stages, "--dtype", "float32", "-q"]
        assert diff(SAVED, *options) == diff("x", "y", *MODEL, *options)


@pytest.mark.parametrize(
    "options",
    [
        ["--names", "hf"],
        [*MODEL],
        SIZES,
        ["--save", "again.json"],
        ["--allow-different-weights"],
        ["--strict-layout"],
    ],
    ids=lambda options: str(options[0]),
)
def test_options_that_take_the_dumps(diff: Cli, refused: Refused, options: list[object]) -> None:
    assert diff("apr-f32", "llama-f32", "--save", SAVED).status == 0
    assert "dumps" in refused(SAVED, *options)
    assert not Path("again.json").exists()


def test_stages_and_layers_that_were_not_measured(diff: Cli, refused: Refused) -> None:
    diff("apr-f32", "llama-f32", "--stages", "attn_norm,attn_out", "--save", SAVED)
    assert "attn_scores" in refused(SAVED, "--stages", "attn_scores")
    assert "layer 7" in refused(SAVED, "--layers", "7")
    assert diff(SAVED, "--stages", "attn_out", "--layers", "0").status == 0


def test_what_was_saved_fits_its_schema(diff: Cli) -> None:
    for paths in (["apr-f32", "llama-f32-native"], ["apr-f32", "llama-flash", "apr-int8-half"]):
        diff(*paths, *MODEL, "--save", SAVED)
        found = json.loads(Path(SAVED).read_text())
        assert found["schema"] == "qwenref-measurement-v1"
        assert_fits(found, "measurement-v1")


def test_a_saved_file_is_no_dump(diff: Cli, refused: Refused) -> None:
    diff("apr-f32", "llama-f32", "--save", SAVED)
    assert SAVED in refused(SAVED, SAVED)
    assert SAVED in refused("apr-f32", SAVED)


def test_saving_replaces_a_file_and_leaves_nothing_else(diff: Cli) -> None:
    Path(SAVED).write_text("older")
    before = sorted(Path().iterdir())
    diff("apr-f32", "llama-f32", "--save", SAVED)
    first = Path(SAVED).read_bytes()
    diff("apr-f32", "llama-theta-1e4", "--save", SAVED)
    assert first != Path(SAVED).read_bytes()
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("save", ["absent/saved.json", "", ".", "folder", "x" * 300])
def test_saving_where_nothing_can_be_written(refused: Refused, save: str) -> None:
    Path("folder").mkdir()
    before = sorted(Path().rglob("*"))
    assert "cannot write" in refused("apr-f32", "llama-f32", "--save", save)
    assert sorted(Path().rglob("*")) == before


def test_saving_into_a_read_only_directory(
    diff: Cli, refused: Refused, request: pytest.FixtureRequest
) -> None:
    Path().absolute().chmod(0o755)
    dump("x", attn_norm=VALUES)
    Path("folder").mkdir()
    diff("x", "x", "--save", "folder/saved.json")
    before = Path("folder/saved.json").read_bytes()
    Path("folder").chmod(0o555)
    request.getfixturevalue("powerless")
    assert "cannot write folder/saved.json" in refused("x", "x", "--save", "folder/saved.json")
    assert Path("folder/saved.json").read_bytes() == before
    assert [path.name for path in Path("folder").iterdir()] == ["saved.json"]


def test_saving_never_replaces_what_is_no_file(
    diff: Cli, make_fifo: Callable[[Path], None]
) -> None:
    make_fifo(Path("fifo").absolute())  # as /dev/null or /dev/stdout would be, for root
    assert diff("apr-f32", "llama-f32", "--save", "fifo").status == 2
    assert Path("fifo").is_fifo()


def test_nothing_is_saved_if_dumps_cannot_be_read(refused: Refused) -> None:
    refused("apr-diff/a.bin", "apr-diff/trunc.bin", "--save", SAVED)
    assert not Path(SAVED).exists()


# --- saved files that are hostile -----------------------------------------------------------------


@pytest.fixture
def saved(diff: Cli) -> dict[str, Any]:
    """What --save writes of two stages that differ and agree, as JSON."""
    stages = "qkv_bias,attn_scores,q_post_rope"
    diff("apr-f32", "llama-theta-1e4", *MODEL, "--stages", stages, "--save", SAVED)
    return json.loads(Path(SAVED).read_text())


def with_change(found: dict[str, Any], path: str, value: object) -> None:
    """Change a value by its path: ``stages.0.pairs.0.errors.tokens``; ``...`` removes it."""
    *parents, name = path.split(".")
    at: Any = found
    for parent in parents:
        at = at[int(parent) if isinstance(at, list) else parent]
    key: Any = int(name) if isinstance(at, list) else name
    if value is ...:
        del at[key]
    else:
        at[key] = value


def test_changing_nothing_of_a_saved_file_changes_nothing(diff: Cli, saved: dict[str, Any]) -> None:
    before = diff(SAVED, "--json")
    Path(SAVED).write_text(json.dumps(saved))
    assert diff(SAVED, "--json") == before
    assert before.status == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema": "qwenref-measurement-v1"}',
        b'{"schema": "qwenref-measurement-v2"}',
        b'{"schema": "qwenref-diff-v1"}',
        b"APRT" + bytes(64),
    ],
    ids=lambda content: ascii(content[:40]),
)
def test_a_file_that_was_not_saved(refused: Refused, content: bytes) -> None:
    Path(SAVED).write_bytes(content)
    assert SAVED in refused(SAVED)


def test_a_result_is_not_a_measurement(diff: Cli, refused: Refused) -> None:
    Path(SAVED).write_text(diff("apr-f32", "llama-f32", "--json").out)
    assert SAVED in refused(SAVED)
    assert "manifest.json" in refused(Path("apr-f32", "manifest.json"))


def test_a_truncated_saved_file(refused: Refused, saved: dict[str, Any]) -> None:
    content = json.dumps(saved).encode()
    for kept in (1, 20, len(content) // 3, len(content) // 2, len(content) - 2):
        Path(SAVED).write_bytes(content[:kept])
        assert SAVED in refused(SAVED)


def test_saved_files_that_are_no_files(refused: Refused, make_fifo: Callable[[Path], None]) -> None:
    make_fifo(Path("fifo").absolute())
    for path in ("fifo", "absent.json", "/dev/null", "/dev/zero"):
        assert path in refused(path)


PAIR = "stages.0.pairs.0"
COMPARED = f"{PAIR}.compared"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", "qwenref-measurement-v2"),
        ("schema", ...),
        ("more", 1),
        ("paths", ["a"]),
        ("paths", ["a", "b", "c"]),
        ("paths", ["a", "b", "c", "d"]),
        ("stages", ...),
        ("stages.0.pairs", []),
        (f"{PAIR}.a", 1),
        (f"{PAIR}.b", 2),
        (f"{PAIR}.b", 3),
        (f"{PAIR}.errors", None),
        (f"{PAIR}.compared", None),
        (f"{PAIR}.slices", "some"),
        (f"{PAIR}.errors.whole", -1.0),
        (f"{PAIR}.errors.whole", "0"),
        (f"{PAIR}.errors.tokens", []),
        (f"{PAIR}.errors.tokens", [0.0]),
        (f"{PAIR}.errors.heads", [0.0] * 11),
        (f"{PAIR}.errors.blocks", [0.0] * 2),
        ("stages.0.floors.float32.tokens", []),
        ("stages.0.floors.float32.heads", []),
        ("stages.0.floors.float32.blocks", [1.0] * 4),
        ("stages.0.floors.float32.whole", -1.0),
        ("stages.0.origin", "mine"),
        (f"{COMPARED}.formats", []),
        (f"{COMPARED}.formats", ["float8", None]),
        (f"{COMPARED}.masked", []),
        (f"{COMPARED}.masked", ["zero"] * 3),
        (f"{PAIR}.layout", ["T F"]),
        (f"{PAIR}.layout", ["T F"] * 3),
        (f"{PAIR}.element_at", []),
    ],
)
def test_a_saved_file_that_contradicts_itself(
    refused: Refused, saved: dict[str, Any], path: str, value: object
) -> None:
    with_change(saved, path, value)
    Path(SAVED).write_text(json.dumps(saved))
    for option in ([], ["--json"], ["--tolerance", "1e-9"]):
        assert SAVED in refused(SAVED, *option)


@pytest.mark.parametrize("slices", ["last", "flat"])
@pytest.mark.parametrize("of", ["tokens", "heads", "blocks"])
def test_slices_that_a_saved_file_says_there_are_none_of(
    refused: Refused, saved: dict[str, Any], slices: str, of: str
) -> None:
    for stage in saved["stages"]:
        stage["pairs"][0]["slices"] = slices
        for floors in stage["floors"].values():
            floors[of] = []
    Path(SAVED).write_text(json.dumps(saved))
    assert SAVED in refused(SAVED)


def test_stages_of_other_dumps_than_there_are(refused: Refused, saved: dict[str, Any]) -> None:
    stage = saved["stages"][1]
    stage["pairs"] = [stage["pairs"][0] | {"a": a, "b": b} for a, b in ((0, 1), (0, 2), (1, 2))]
    Path(SAVED).write_text(json.dumps(saved))
    assert SAVED in refused(SAVED)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "nan", '"NaN"', "0x1"])
def test_numbers_in_a_saved_file_that_json_has_not(
    refused: Refused, saved: dict[str, Any], number: str
) -> None:
    for path in (f"{PAIR}.errors.whole", "stages.0.floors.float32.whole", f"{COMPARED}.rms_diff"):
        changed = json.loads(json.dumps(saved))
        with_change(changed, path, "HERE")
        Path(SAVED).write_text(json.dumps(changed).replace('"HERE"', number))
        assert SAVED in refused(SAVED)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("made_by", []),
        ("made_by", ["\x1b[31m\n", None]),
        ("sizes", {}),
        ("sizes", {"N": 0, "K": -1, "H": 0, "D": 0, "T": 0}),
        ("paths.0", "\x1b[31m\r\n\x07\x9b2J\u202e\u2028"),
        ("warnings", ["\x1b[31m\nAGREE: all is well"]),
        ("incomparable", "\x1b[31m\nAGREE: all is well"),
        ("single", True),
        ("stages", []),
        ("stages.0.stage", "\x1b[31m\nAGREE"),
        ("stages.0.stage", "made_up"),
        ("stages.0.stage", "attn_norm"),
        ("stages.0.layer", -1),
        ("stages.0.layer", None),
        ("stages.0.floors", {}),
        ("stages.0.floors", {"float8": ...}),
        (f"{PAIR}.problem", "\x1b[31m\nAGREE"),
        (f"{PAIR}.unsure", "\x1b[31m\nAGREE"),
        (f"{PAIR}.layout", ["\x1b[31m", "\n"]),
        (f"{PAIR}.unscaled", 2),
        (f"{PAIR}.element_at", None),
        (f"{PAIR}.element_at", [10**6, -5]),
        (f"{PAIR}.errors.whole", None),
        (f"{PAIR}.errors.element", 1e308),
        (f"{COMPARED}.cells", 0),
        (f"{COMPARED}.cells", -1),
        (f"{COMPARED}.top_diffs", []),
        (f"{COMPARED}.nonfinite.differ", 5),
        (f"{COMPARED}.nonfinite.a", -5),
        (f"{COMPARED}.masked", ["\x1b[31m", "\n"]),
        (f"{COMPARED}.top_diffs.0.index", -1),
        (f"{COMPARED}.top_diffs.0.index", 10**30),
        (f"{PAIR}.count", 10**30),
    ],
)
def test_odd_values_in_a_saved_file_never_break_the_report(
    diff: Cli, saved: dict[str, Any], path: str, value: object
) -> None:
    if isinstance(value, dict) and ... in value.values():
        value = {"float8": saved["stages"][0]["floors"]["float32"]}
    with_change(saved, path, value)
    Path(SAVED).write_text(json.dumps(saved))
    for options in ([], ["-q"], ["--json"], ["--tolerance", "1e-9"], ["--dtype", "float32"]):
        status, out, err = diff(SAVED, *options)
        if err:
            assert (status, out, err.count("\n")) == (2, "", 1)
        elif "--json" in options:
            json.loads(out)
        else:
            assert all(line.isprintable() for line in out.splitlines())
            assert STATUS[re.split("[:,]", out.splitlines()[-1])[0]] == status
            assert out.splitlines()[-1] != "AGREE: all is well"


# --- names that would steer the terminal ----------------------------------------------------------

EVIL = "x\x1b[31m\r\n\x07\x9b2J\u202e\u2028"
SHOWN = r"\x1b[31m\r\n\x07\x9b2J\u202e\u2028"


def test_strange_characters_in_the_name_of_a_dump_are_shown_escaped(
    diff: Cli, refused: Refused
) -> None:
    dump(EVIL, attn_norm=VALUES)
    dump("y", attn_norm=VALUES)
    for pair in ((EVIL, "y"), ("y", EVIL), (EVIL, EVIL)):
        done = diff(*pair)
        assert done.status == 0
        assert SHOWN in done.out
        assert all(line.isprintable() for line in done.out.splitlines())
    assert parsed(diff(EVIL, "y", "--json"))["paths"] == [EVIL, "y"]
    Path(EVIL, "layer-0", "attn_norm.npy").write_bytes(b"")
    assert SHOWN in refused(EVIL, "y")
    assert SHOWN in refused(f"absent{EVIL}", "y")


def test_strange_characters_in_the_name_of_a_file_are_shown_escaped(diff: Cli) -> None:
    aprt(f"{EVIL}.bin", VALUES)
    aprt("y.bin", VALUES * 2)
    done = diff(f"{EVIL}.bin", "y.bin")
    assert done.status == 1
    assert SHOWN in last(done)
    assert all(line.isprintable() for line in done.out.splitlines())


def test_a_name_that_is_no_unicode(diff: Cli) -> None:
    name = os.fsdecode(b"x\xff")
    dump(name, attn_norm=VALUES)
    dump("y", attn_norm=VALUES)
    assert diff(name, "y").status == 0
    assert diff(name, "y", "-q").status == 0
    assert diff(name, "y", "--json").status == 0
    assert parsed(diff(name, "y", "--json"))["verdict"] == "agree"
    assert diff(name, "y", "--save", SAVED).status == 0
    assert diff(SAVED).status == 0


@pytest.mark.parametrize(
    "option",
    ["--stages", "--layers", "--dtype", "--tolerance", "--names", "--model"],
)
def test_strange_characters_in_an_option_are_shown_escaped(refused: Refused, option: str) -> None:
    assert r"\x1b[31m" in refused("apr-f32", "llama-f32", f"{option}={EVIL}")


def test_strange_characters_in_a_map_are_shown_escaped(refused: Refused) -> None:
    Path("names.json").write_text(json.dumps({f"{EVIL}{{layer}}{{layer}}": "attn_norm"}))
    assert "x1b[31m" in refused("apr-f32", "llama-f32", "--names", "names.json")


def test_a_message_of_a_name_that_is_very_long_is_short(refused: Refused) -> None:
    stages = ",".join(f"stage{i}" for i in range(10_000))
    assert len(refused("apr-f32", "llama-f32", "--stages", stages)) < 3000
