"""docs/dump-from-your-engine.md: its writers write APRT, its names are those of real stages."""

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from comparison import NOISE
from helpers import ROOT, TINY
from transformers import Qwen2ForCausalLM

import qwenref
from qwenref.capture import capture
from qwenref.dumps.naming import Place, names_from
from qwenref.stages import ALL, ATTENTION, BY_NAME, LAST_LOGITS, LAYER

PAGE = (ROOT / "docs" / "dump-from-your-engine.md").read_text()
MAPS = {path.stem: path for path in (ROOT / "src" / "qwenref" / "dumps" / "names").glob("*.json")}
ENDINGS = (".bin", ".aprt", ".npy", ".f32", ".raw")
WHOLE_MODEL = 0xFFFFFFFF

C_MAIN = """
#include <stdlib.h>
int main(int argc, char **argv) {
    float values[64];
    uint32_t count = (uint32_t)fread(values, 4, 64, stdin);
    if (argc != 3) return 2;
    return write_aprt(argv[1], (uint32_t)strtoul(argv[2], NULL, 10), values, count) != 0;
}
"""
RUST_MAIN = """
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut std::io::stdin(), &mut bytes)?;
    let values: Vec<f32> =
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let arguments: Vec<String> = std::env::args().collect();
    Ok(write_aprt(&arguments[1], arguments[2].parse()?, &values)?)
}
"""
PYTHON_MAIN = """
import sys
write_aprt(sys.argv[1], int(sys.argv[2]), np.frombuffer(sys.stdin.buffer.read(), "<f4"))
"""

COMPILERS = {
    "c": ("cc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O2"),
    "rust": ("rustc", "--edition", "2021", "-D", "warnings"),
}
MAINS = {"c": C_MAIN, "rust": RUST_MAIN, "python": PYTHON_MAIN}
SUFFIXES = {"c": ".c", "rust": ".rs", "python": ".py"}
LANGUAGES = [
    language
    for language in MAINS
    if language not in COMPILERS or shutil.which(COMPILERS[language][0])
]
"""Those that this machine can run; Python at least."""

AWKWARD = np.array(
    [
        0x3F800000,  # 1.0
        0x80000000,  # -0.0
        0x7F800000,  # inf
        0xFF800000,  # -inf
        0x7FC00000,  # NaN
        0xFFC01234,  # NaN with a sign and a payload
        0x7F800001,  # a signalling NaN
        0x00000001,  # the smallest subnormal
        0x807FFFFF,  # the largest subnormal, negative
        0x7F7FFFFF,  # the largest finite
        0x3DCCCCCD,  # 0.1
    ],
    "<u4",
)

Write = Callable[[str | Path, int, bytes], int]
"""Writes bytes of float32 values for a layer; returns the exit status."""


def block(language: str) -> str:
    """Return the one block of the page in that language."""
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    return code


def rows(heading: str) -> list[list[str]]:
    """Return the rows of the table that has this heading, without the heading."""
    lines = PAGE.splitlines()
    start = lines.index(heading) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[start:end]]


@pytest.fixture(scope="module", params=LANGUAGES)
def write(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """The page's writer in one language, compiled if need be."""
    language = request.param
    folder = tmp_path_factory.mktemp(language)
    source = folder / f"writer{SUFFIXES[language]}"
    source.write_text(block(language) + MAINS[language])
    command = [sys.executable, str(source)]
    if language in COMPILERS:
        command = [str(folder / "writer")]
        built = subprocess.run(
            [*COMPILERS[language], "-o", *command, str(source)], capture_output=True, text=True
        )
        assert (built.returncode, built.stderr) == (0, "")

    def run(path: str | Path, layer: int, values: bytes) -> int:
        arguments = [*command, str(path), str(layer)]
        return subprocess.run(arguments, input=values, capture_output=True).returncode

    return run


@pytest.mark.parametrize(("layer", "read"), [(0, 0), (258, 258), (WHOLE_MODEL, None)])
def test_what_the_writers_write_is_read_bit_for_bit(
    layer: int, read: int | None, write: Write, tmp_path: Path
) -> None:
    path = tmp_path / "stage.bin"
    assert write(path, layer, AWKWARD.tobytes()) == 0
    found = qwenref.read_aprt(path)
    assert found.layer == read
    assert np.array_equal(found.values.view("<u4"), AWKWARD)


def test_the_writers_write_these_literal_bytes(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "stage.bin"
    assert write(path, 258, struct.pack("<2f", -2.0, 0.1)) == 0
    assert path.read_bytes() == (
        b"APRT\x02\x01\x00\x00\x02\x00\x00\x00" + b"\x00\x00\x00\xc0" + b"\xcd\xcc\xcc\x3d"
    )
    assert write(path, WHOLE_MODEL, b"") == 0
    assert path.read_bytes() == b"APRT\xff\xff\xff\xff\x00\x00\x00\x00"


@pytest.mark.parametrize("where", ["missing/stage.bin", "/dev/full"])
def test_a_file_that_cannot_be_written_is_no_success(
    where: str, write: Write, tmp_path: Path
) -> None:
    assert write(tmp_path / where, 0, AWKWARD.tobytes()) != 0


def test_the_numpy_writer_takes_views_in_logical_order(tmp_path: Path) -> None:
    written = np.arange(6, dtype=np.float64).reshape(2, 3).T
    names: dict[str, Callable[..., None]] = {}
    exec(block("python"), names)
    names["write_aprt"](tmp_path / "stage.bin", 0, written)
    assert qwenref.read_aprt(tmp_path / "stage.bin").values.tolist() == [0, 3, 1, 4, 2, 5]


def test_the_page_says_for_each_stage_where_it_is() -> None:
    stated = [(name, shape) for name, shape, _ in rows("| stage | shape | take it |")]
    of_last_token = [*ALL[:-1], LAST_LOGITS]
    assert stated == [
        (stage.name, f"[{', '.join(stage.axes)}]".replace("S", "T")) for stage in of_last_token
    ]
    mistaken = [row[0] for row in rows("| stage | it is not |")]
    assert mistaken == [stage.name for stage in ALL if stage.name in mistaken]
    assert {*mistaken} > {stage.name for stage in ATTENTION}


def no_doubles(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Return an object of JSON, in which no key may come twice."""
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def assert_is_map(text: str) -> None:
    names = json.loads(text, object_pairs_hook=no_doubles)
    assert text == json.dumps(names, indent=2) + "\n"  # one line each
    for pattern, stage in names.items():
        name, _, part = stage.partition(".")
        assert name in BY_NAME
        assert not part or part in BY_NAME[name].blocks
        assert pattern.count("{layer}") == (BY_NAME[name] in LAYER)
        assert not pattern.endswith(ENDINGS)


@pytest.mark.parametrize("name", MAPS)
def test_a_shipped_map_leads_to_stages(name: str) -> None:
    assert_is_map(MAPS[name].read_text())
    assert f"--names {name}`" in PAGE


def test_the_pages_map_leads_to_stages() -> None:
    assert_is_map(block("json"))


def test_both_maps_are_there() -> None:
    assert set(MAPS) == {"hf", "llama.cpp"}


@pytest.mark.parametrize("name", ["Qcur", "Kcur", "Vcur"])
def test_a_name_that_comes_several_times_stands_for_the_last_operation(name: str) -> None:
    """The order is that of the page; with the operation appended, each stands for itself."""
    llama = json.loads(MAPS["llama.cpp"].read_text())
    part = name[0].lower()
    orders = dict(rows("| name | in this order |"))
    (order,) = (order for names, order in orders.items() if f"`{name}-0`" in names)
    last = f"{part}_post_rope" if order.endswith("after RoPE") else f"qkv_bias.{part}"
    assert llama[f"{name}-{{layer}}"] == last
    assert llama[f"{name}-{{layer}}-MUL_MAT"] == f"qkv_matmul.{part}"
    assert llama[f"{name}-{{layer}}-ADD"] == f"qkv_bias.{part}"
    assert llama.get(f"{name}-{{layer}}-ROPE", last) == last


@pytest.mark.parametrize(
    ("name", "heading", "which"),
    [("hf", "| file | stage |", 0), ("llama.cpp", "| stage | name |", 1)],
)
def test_the_pages_tables_are_what_the_maps_know(name: str, heading: str, which: int) -> None:
    names = names_from(name)
    stated: dict[Place, set[str]] = {}
    for row in rows(heading):
        for path in re.findall(r"`([\w.-]+)`", row[which]):
            place = names.place(PurePosixPath(path.removesuffix(".npy")))
            if place is not None and place.stage in BY_NAME:  # `k_proj` is short for a path
                assert place.stage in row[1 - which]
                stated.setdefault(place, set()).add(path)
    known = {line.partition(".")[0] for line in json.loads(MAPS[name].read_text()).values()}
    assert {place.stage for place in stated} == known
    assert {place.layer for place in stated} == {0, None}


def test_hooks_on_transformers_modules_give_what_the_map_says(tmp_path: Path) -> None:
    tokens = [3, 1, 4, 1, 5]
    model = Qwen2ForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    names = json.loads(MAPS["hf"].read_text())
    hooked = {pattern.replace("{layer}", str(layer)) for pattern in names for layer in range(3)}
    (tmp_path / "hf").mkdir()
    for path in hooked:

        def hook(_: object, args: tuple, output: torch.Tensor, path: str = path) -> None:
            values = args[0] if path.endswith(".input") else output
            np.save(tmp_path / "hf" / f"{path}.npy", values[0].float().numpy())

        model.get_submodule(path.removesuffix(".input")).register_forward_hook(hook)
    with torch.inference_mode():
        model(torch.tensor([tokens]), use_cache=False)
    capture(TINY, tmp_path / "ours", tokens=tokens, layers=None, stages=None)
    result = qwenref.diff(tmp_path / "ours", tmp_path / "hf", names="hf", allow_missing=True)
    wanted = {name.partition(".")[0] for name in names.values()}
    agree = [stage for stage in result.stages if stage.status == "agree"]
    assert {stage.stage for stage in agree} == wanted, result.reason
    assert len(agree) == 3 * len(wanted) - 2 * 3  # embedding, final_norm and lm_head come once
    assert max(stage.rel_l2 or 0 for stage in agree) <= NOISE
    trial = qwenref.explain_layers(tmp_path / "hf", model=TINY, tokens=tokens, names="hf")
    assert trial.verdict == "agree", trial.reason
