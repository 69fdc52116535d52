"""Reading what others wrote: each format, manifests of ours and of others, and broken files."""

import io
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from small_dumps import make

from qwenref.dumps.aprt import WHOLE_MODEL
from qwenref.dumps.naming import Names
from qwenref.dumps.place import PARTIAL
from qwenref.dumps.reading import ENDINGS, Dump, Key, read_dump
from qwenref.errors import QwenrefError

VALUES = np.random.default_rng(5).standard_normal((4, 15)).astype(np.float32)
NORM: Key = (0, "attn_norm")


def aprt(values: np.ndarray = VALUES, layer: int = 0, count: int | None = None) -> bytes:
    count = values.size if count is None else count
    return struct.pack("<4sII", b"APRT", layer, count) + values.astype("<f4").tobytes()


def npy(values: np.ndarray = VALUES, **options: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, **options)
    return file.getvalue()


def with_header(text: str, version: tuple[int, int] = (1, 0), values: bytes = bytes(16)) -> bytes:
    """Return an .npy file with any header; values are four of float32 unless given."""
    header = text.encode("latin1")
    size = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + size + header + values


def header_of(descr: object = "<f4", shape: object = (4,), fortran: object = False) -> str:
    return str({"descr": descr, "fortran_order": fortran, "shape": shape})


CONTENT = {
    ".bin": aprt(),
    ".aprt": aprt(),
    ".npy": npy(),
    ".f32": VALUES.tobytes(),
    ".raw": VALUES.tobytes(),
}


def put(root: Path, name: str, content: bytes = CONTENT[".bin"]) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read(path: Path, names: dict[str, str] | None = None) -> Dump:
    return read_dump(path, Names(names))


def values_in(dump: Dump, key: Key = NORM, part: str | None = None) -> np.ndarray:
    return dump.stages[key][part].mapped().values


def refusal(path: Path, names: dict[str, str] | None = None) -> str:
    """Return why something cannot be read: one line, which names a file that is there."""
    with pytest.raises(QwenrefError) as caught:
        read(path, names)
    message = str(caught.value)
    assert message.isprintable()
    return message


def read_or_refused(path: Path) -> Dump | str:
    """Return what is read or, where either will do, why nothing is."""
    try:
        return read(path)
    except QwenrefError as error:
        return str(error)


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    return tmp_path / "dump"


# --- formats --------------------------------------------------------------------------------------


def test_there_is_a_test_for_every_ending() -> None:
    assert set(CONTENT) == set(ENDINGS)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["layer-0/attn_norm", "layer_0_attn_norm", "attn_norm"])
def test_every_format_gives_the_same_values(dump: Path, name: str, ending: str) -> None:
    path = put(dump, name + ending, CONTENT[ending])
    for source in (dump, path):
        found = read(source)
        assert list(found.stages) == [NORM]
        stored = found.stages[NORM][None]
        assert stored.count == VALUES.size
        assert stored.shape == ((4, 15) if ending == ".npy" else None)
        np.testing.assert_array_equal(values_in(found), VALUES.reshape(-1))


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_npy_of_each_width_and_byte_order(dump: Path, order: str, kind: str) -> None:
    stored = VALUES.astype(order + kind)
    put(dump, "layer-0/attn_norm.npy", npy(stored))
    found = values_in(read(dump))
    assert found.dtype.itemsize == int(kind[1])
    np.testing.assert_array_equal(found.astype(np.float64), stored.reshape(-1).astype(np.float64))


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_npy_of_each_version_for_plain_arrays(dump: Path, version: tuple[int, int]) -> None:
    put(dump, "layer-0/attn_norm.npy", npy(version=version))
    np.testing.assert_array_equal(values_in(read(dump)), VALUES.reshape(-1))


@pytest.mark.parametrize("shape", [(60,), (1, 4, 15), (4, 1, 15, 1)])
def test_npy_of_any_number_of_axes(dump: Path, shape: tuple[int, ...]) -> None:
    put(dump, "layer-0/attn_norm.npy", npy(VALUES.reshape(shape)))
    found = read(dump)
    assert found.stages[NORM][None].shape == shape
    np.testing.assert_array_equal(values_in(found), VALUES.reshape(-1))


def test_npy_in_fortran_order_is_refused_unless_that_is_no_order(dump: Path) -> None:
    path = put(dump, "layer-0/attn_norm.npy", npy(np.asfortranarray(VALUES)))
    line = refusal(dump)
    assert str(path) in line
    assert "Fortran" in line
    values = VALUES.reshape(-1)[:4]
    put(
        dump, "layer-0/attn_norm.npy", with_header(header_of(fortran=True), values=values.tobytes())
    )
    np.testing.assert_array_equal(values_in(read(dump)), values)


@pytest.mark.parametrize(
    "values",
    [
        VALUES.astype(ml_dtypes.bfloat16),
        VALUES.astype(np.int8),
        VALUES.astype(np.int32),
        VALUES.astype(np.int64),
        VALUES.astype(np.uint16),
        VALUES.astype(bool),
        VALUES.astype(np.complex64),
        VALUES.astype(np.longdouble),
        VALUES.astype("U8"),
        VALUES.astype("S8"),
        VALUES.astype("M8[s]"),
        VALUES.astype("V4"),
        VALUES.astype([("value", "f4")]),
    ],
    ids=lambda values: str(values.dtype),
)
def test_npy_of_what_are_no_real_numbers(dump: Path, values: np.ndarray) -> None:
    path = put(dump, "layer-0/attn_norm.npy", npy(values))
    line = refusal(dump)
    assert str(path) in line
    assert "float32" in line


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_ever_unpickled(dump: Path, tmp_path: Path) -> None:
    planted = Planted(tmp_path / "planted")
    array = np.empty(1, object)
    array[0] = planted
    for content in (npy(array), pickle.dumps(planted), pickle.dumps(VALUES)):
        put(dump, "layer-0/attn_norm.npy", content)
        assert "attn_norm.npy" in refusal(dump)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    "content",
    [
        with_header(header_of(shape=(10**30, 10**30))),
        with_header(header_of(shape=(1 << 62,))),
        with_header(header_of(shape=(5,))),
        with_header(header_of(shape=(3,))),
        with_header(header_of(shape=())),
        with_header(header_of(shape=(4, 0))),
        with_header(header_of(shape=(0,)), values=b""),
        with_header(header_of(shape=(-4,))),
        with_header(header_of(shape=(-2, -2))),
        with_header(header_of(shape=(-4, -1))),
        with_header(header_of(shape=[4])),
        with_header(header_of(shape=4)),
        with_header(header_of(shape=(4.0,))),
        with_header(header_of(shape=None)),
        with_header(header_of(fortran=1)),
        with_header(header_of(descr="<f3")),
        with_header(header_of(descr="")),
        with_header(header_of(descr=None)),
        with_header(header_of(descr=())),
        with_header(header_of(descr=("<f4",))),
        with_header(header_of(descr=("<f4", (4,)))),
        with_header(header_of(descr=[])),
        with_header(header_of(descr=[()])),
        with_header(header_of(descr="f4, (")),
        with_header(header_of(descr="\ud800")),
        with_header(header_of(descr="<f4\0")),
        with_header(header_of() + "\0"),
        with_header(header_of() + " " * 20_000),
        with_header(header_of(shape=(4,) + (1,) * 9_000)),
        with_header("{'shape': (" + "9" * 9_000 + ",)}"),
        with_header("-" * 9_000 + "1"),
        with_header("[" * 4_000 + "]" * 4_000),
        with_header("(" * 4_000),
        with_header("{'descr': '<f4', 'shape': (4,"),
        with_header("'''"),
        with_header("  1\n 2\n   3"),
        with_header("{[]: 1}"),
        with_header("{1: 2, 'descr': '<f4'}"),
        with_header("{'descr': '<f4'}"),
        with_header(header_of()[:-1] + ", 'more': 1}"),
        with_header("[]"),
        with_header("__import__('os').getpid()"),
        with_header(""),
        with_header("\xff\n\r\x1b[31m"),
        with_header(header_of(), version=(4, 0)),
        with_header(header_of(), version=(0, 0)),
        with_header(header_of(), version=(255, 255)),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(60),
        b"\x93NUMPY\x01\x00\xff\xff" + bytes(60),
        b"\x93NUMPY\x01\x00\xff",
        b"\x93NUMPY\x01",
        b"\x93NUMPY",
        b"\x93NUM",
        b"NUMPY\x93\x01\x00" + bytes(60),
        b"PK\x03\x04" + bytes(60),
        aprt(),
        VALUES.tobytes(),
    ],
    ids=lambda content: ascii(content[10:60]),
)
def test_npy_with_a_hostile_header(dump: Path, content: bytes) -> None:
    path = put(dump, "layer-0/attn_norm.npy", content)
    assert str(path) in refusal(dump)
    assert str(path) in refusal(path)


def test_a_header_of_python_2_is_read_without_a_warning_or_refused(dump: Path) -> None:
    old = "{'descr': '<f4', 'fortran_order': False, 'shape': (4L,)}"
    put(dump, "layer-0/attn_norm.npy", with_header(old))
    found = read_or_refused(dump)
    assert "attn_norm.npy" in found if isinstance(found, str) else values_in(found).size == 4


def test_a_header_of_version_3_is_read_or_refused(dump: Path) -> None:
    put(dump, "layer-0/attn_norm.npy", npy(version=(3, 0)))
    found = read_or_refused(dump)
    if isinstance(found, str):
        assert "attn_norm.npy" in found
    else:
        np.testing.assert_array_equal(values_in(found), VALUES.reshape(-1))


# --- files that are broken ------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_truncated_file(dump: Path, ending: str) -> None:
    content = CONTENT[ending]
    for kept in (1, 3, 7, 11, 13, len(content) - 5, len(content) - 1):
        path = put(dump, f"layer-0/attn_norm{ending}", content[:kept])
        assert str(path) in refusal(dump)
        assert str(path) in refusal(path)


@pytest.mark.parametrize("ending", [".bin", ".aprt", ".npy"])
@pytest.mark.parametrize("change", [-4, 1, 4, 4096])
def test_a_file_that_is_shorter_or_longer_than_it_says(
    dump: Path, ending: str, change: int
) -> None:
    content = CONTENT[ending][:change] if change < 0 else CONTENT[ending] + bytes(change)
    path = put(dump, f"layer-0/attn_norm{ending}", content)
    line = refusal(dump)
    assert str(path) in line
    assert f"{len(content)} bytes" in line


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_empty_file(dump: Path, ending: str) -> None:
    path = put(dump, f"layer-0/attn_norm{ending}", b"")
    assert str(path) in refusal(dump)


@pytest.mark.parametrize("ending", [".bin", ".aprt", ".npy"])
def test_a_file_of_no_values(dump: Path, ending: str) -> None:
    none = VALUES[:0]
    path = put(dump, f"layer-0/attn_norm{ending}", npy(none) if ending == ".npy" else aprt(none))
    assert str(path) in refusal(dump)


@pytest.mark.parametrize("ending", [".bin", ".aprt"])
@pytest.mark.parametrize(
    "content",
    [
        b"APRT" + struct.pack("<IIQQ", 2, 0, 64, 1 << 20) + bytes(range(256)) * 8,
        b"APRT" + bytes(8 + 4),
        aprt(count=VALUES.size - 1),
        aprt(count=VALUES.size + 1),
        aprt(count=0xFFFFFFFF),
        aprt(count=0),
        b"TRPA" + struct.pack(">II", 0, VALUES.size) + VALUES.tobytes(),
        b"aprt" + aprt()[4:],
        npy(),
        VALUES.tobytes(),
        b"GGUF" + bytes(4096),
    ],
    ids=lambda content: ascii(content[:24]),
)
def test_a_file_that_is_not_aprt_or_an_old_model(dump: Path, ending: str, content: bytes) -> None:
    path = put(dump, f"layer-0/attn_norm{ending}", content)
    assert str(path) in refusal(dump)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_fifo_that_nobody_writes_to(
    dump: Path, ending: str, make_fifo: Callable[[Path], None]
) -> None:
    path = put(dump, "layer-0/attn_out.bin").with_name(f"attn_norm{ending}")
    make_fifo(path)
    assert str(path) in refusal(dump)
    assert str(path) in refusal(path)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "absent", "absent/attn_norm.bin"])
def test_what_is_no_file(path: str) -> None:
    assert path in refusal(Path(path))


@pytest.mark.parametrize("path", ["x" * 300, "x" * 300 + ".bin", "a\0b", "a.bin/b.bin"])
def test_paths_that_cannot_be(tmp_path: Path, path: str) -> None:
    put(tmp_path, "a.bin")
    refusal(tmp_path / path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_called_like_a_stage_is_no_stage(dump: Path, ending: str) -> None:
    put(dump, "layer-0/attn_out.bin")
    (dump / f"layer-0/attn_norm{ending}").mkdir()
    assert list(read(dump).stages) == [(0, "attn_out")]
    assert "no stage" in refusal(dump / f"layer-0/attn_norm{ending}")


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_may_not_be_read(
    tmp_path: Path, ending: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    path = Path(f"attn_norm{ending}")
    path.write_bytes(CONTENT[ending])
    read(path)  # imports what there is to import
    path.chmod(0)
    request.getfixturevalue("powerless")
    for source in (path, Path()):
        line = refusal(source)
        assert str(path) in line
        assert "Permission denied" in line


def test_a_folder_that_may_not_be_read(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    put(Path(), "layer-0/attn_norm.bin")
    put(Path(), "layer-1/attn_norm.bin")
    assert len(read(Path()).stages) == 2
    Path("layer-1").chmod(0)
    request.getfixturevalue("powerless")
    assert "Permission denied" in refusal(Path())


# --- links ----------------------------------------------------------------------------------------


def test_a_link_to_a_file_is_that_file(dump: Path, tmp_path: Path) -> None:
    put(tmp_path, "elsewhere")
    (dump / "layer-0").mkdir(parents=True)
    (dump / "layer-0/attn_norm.bin").symlink_to(tmp_path / "elsewhere")
    for source in (dump, dump / "layer-0/attn_norm.bin"):
        np.testing.assert_array_equal(values_in(read(source)), VALUES.reshape(-1))


@pytest.mark.parametrize("target", ["nowhere", "attn_norm.bin"])
def test_a_link_to_nothing_or_to_itself(dump: Path, target: str) -> None:
    path = put(dump, "layer-0/attn_out.bin").with_name("attn_norm.bin")
    path.symlink_to(target)
    assert str(path) in refusal(dump)
    assert str(path) in refusal(path)


def test_a_link_that_leads_round_in_a_circle(dump: Path) -> None:
    put(dump, "layer-0/attn_norm.bin")
    (dump / "layer-0/up").symlink_to("..")
    (dump / "round").symlink_to(".")
    assert list(read(dump).stages) == [NORM]


@pytest.mark.parametrize("link", ["layer-1", "layer-0/more", "root"])
def test_a_link_to_a_folder_outside_is_neither_followed_nor_left_out_silently(
    link: str, dump: Path, tmp_path: Path
) -> None:
    put(tmp_path, "other/attn_norm.bin", aprt(layer=1))
    put(dump, "layer-0/attn_norm.bin")
    for target in (tmp_path / "other", "/"):
        (dump / link).symlink_to(target)
        line = refusal(dump)
        assert line.startswith(f"{dump / link} is a link to a folder outside")
        (dump / link).unlink()


def test_a_link_to_a_folder_inside_is_that_folder(dump: Path, tmp_path: Path) -> None:
    put(dump, "run-1/attn_norm.bin")
    (dump / "layer-0").symlink_to("run-1")
    (tmp_path / "link").symlink_to(dump)
    for root in (dump, tmp_path / "link"):
        assert NORM in read(root).stages


def test_the_folder_that_cannot_be_read_is_named(
    dump: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(dump, "layer-0/below/attn_norm.bin").parent
    scan = os.scandir

    def failing(folder: str) -> Any:
        if Path(folder) == path:
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", failing)
    assert refusal(dump) == f"cannot read {path}: Permission denied"


def test_a_dump_that_is_a_link_is_that_dump(dump: Path, tmp_path: Path) -> None:
    put(dump, "layer-0/attn_norm.bin")
    (tmp_path / "link").symlink_to(dump)
    assert list(read(tmp_path / "link").stages) == [NORM]


# --- which stage, which layer ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("layer-16384/attn_norm.bin", 16384),
        ("layer-99999999999/attn_norm.bin", 99999999999),
        ("layer-20000/below/x.npy", 20000),
        ("layer_20000_attn_norm.bin", 20000),
    ],
)
def test_a_layer_that_no_model_has_is_not_left_out_silently(
    name: str, number: int, dump: Path
) -> None:
    put(dump, "layer-0/attn_norm.bin")
    path = put(dump, name)
    assert refusal(dump).startswith(f"{path}: no model has a layer {number}")
    path.unlink()
    put(dump, "layer-16383/attn_norm.bin", aprt(layer=16383))
    put(dump, "layers/layer-20000/attn_norm.bin")  # nothing of ours
    assert {*read(dump).stages} == {NORM, (16383, "attn_norm")}


@pytest.mark.parametrize(
    "second",
    [
        "layer-0/attn_norm.aprt",
        "layer-0/attn_norm.npy",
        "layer-0/attn_norm.raw",
        "layer-00/attn_norm.bin",
        "layer_0_attn_norm.bin",
        "attn_norm.bin",
        "attn_norm.f32",
    ],
)
def test_two_files_for_one_stage(dump: Path, second: str) -> None:
    put(dump, "layer-0/attn_norm.bin")
    put(dump, second, CONTENT[Path(second).suffix])
    line = refusal(dump)
    assert "attn_norm.bin" in line
    assert second in line


def test_a_stage_and_a_block_of_it_and_two_of_one_block(dump: Path) -> None:
    names = {"a": "qkv_bias.q", "b": "qkv_bias.q"}
    put(dump, "a.bin")
    put(dump, "b.npy", npy())
    for line in (refusal(dump, names), refusal(dump, names | {"b": "qkv_bias"})):
        assert "a.bin" in line
        assert "b.npy" in line
    both = read(dump, names | {"b": "qkv_bias.v"})
    assert set(both.stages[0, "qkv_bias"]) == {"q", "v"}


def test_the_same_stage_of_two_layers(dump: Path) -> None:
    put(dump, "layer-0/attn_norm.bin")
    put(dump, "layer-1/attn_norm.bin", aprt(layer=1))
    put(dump, "layer_2_attn_norm.aprt", aprt(layer=2))
    assert set(read(dump).stages) == {(layer, "attn_norm") for layer in range(3)}


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("layer-3/attn_norm.bin", aprt(layer=3), (3, "attn_norm")),
        ("layer_3_attn_norm.aprt", aprt(layer=3), (3, "attn_norm")),
        ("layer-3/attn_norm.npy", npy(), (3, "attn_norm")),
        ("attn_norm.bin", aprt(layer=3), (3, "attn_norm")),
        ("attn_norm.f32", VALUES.tobytes(), (0, "attn_norm")),
        ("made_up.bin", aprt(layer=3), (3, "made_up")),
        ("made_up.f32", VALUES.tobytes(), (None, "made_up")),
        ("final_norm.bin", aprt(layer=WHOLE_MODEL), (None, "final_norm")),
        ("final_norm.npy", npy(), (None, "final_norm")),
        ("embedding.bin", aprt(layer=0), (0, "embedding")),
        ("embedding.npy", npy(), (0, "embedding")),
    ],
)
def test_the_layer_is_in_the_path_else_in_the_header(
    dump: Path, name: str, content: bytes, key: Key
) -> None:
    path = put(dump, name, content)
    assert list(read(dump).stages) == [key]
    assert list(read(path).stages) == [key]


@pytest.mark.parametrize("layer", [0, 2, WHOLE_MODEL])
def test_a_header_that_contradicts_the_path_is_kept_to_be_reported(dump: Path, layer: int) -> None:
    path = put(dump, "layer-1/attn_norm.bin", aprt(layer=layer))
    for source in (dump, path):
        stored = read(source).stages[1, "attn_norm"][None]
        assert stored.says_layer
        assert stored.layer == (None if layer == WHOLE_MODEL else layer)


@pytest.mark.parametrize(
    ("name", "content", "single"),
    [
        ("layer-1/attn_norm.f32", VALUES.tobytes(), "sure"),
        ("layer_1_attn_norm.npy", npy(), "sure"),
        ("x.bin", aprt(), "sure"),
        ("attn_norm.npy", npy(), "unsure"),
        ("x.raw", VALUES.tobytes(), "unsure"),
    ],
)
def test_a_single_file_knows_whether_it_knows_its_layer(
    dump: Path, name: str, content: bytes, single: str
) -> None:
    assert read(put(dump, name, content)).single == single


@pytest.mark.parametrize("name", ["a b.bin", "\u00e9.bin", "scores (copy).f32", "x", "x.data"])
def test_a_single_file_may_be_called_anything(dump: Path, name: str) -> None:
    path = put(dump, name, CONTENT.get(Path(name).suffix, aprt()))
    (found,) = read(path).stages
    assert found[1] == Path(name).stem


def test_stages_that_nobody_has_heard_of(dump: Path) -> None:
    put(dump, "layer-0/ffn_swigl.bin")
    put(dump, "layer-0/my-own.npy", npy())
    put(dump, "logits.raw", VALUES.tobytes())
    assert set(read(dump).stages) == {(0, "ffn_swigl"), (0, "my-own"), (None, "logits")}


def test_a_dump_of_another_engines_names(dump: Path) -> None:
    for name in ("blk4/norm.f32", "blk4/v.f32", "blk4/unknown.f32"):
        put(dump, name, VALUES.tobytes())
    found = read(dump, {"blk{layer}/norm": "attn_norm", "blk{layer}/v": "qkv_bias.v"})
    assert {key: set(parts) for key, parts in found.stages.items()} == {
        (4, "attn_norm"): {None},
        (4, "qkv_bias"): {"v"},
    }


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["layer-0/attn_norm.txt"], ["a/b/c.bin"]])
def test_a_directory_without_any_stage(dump: Path, files: list[str]) -> None:
    dump.mkdir()
    for name in files:
        put(dump, name)
    line = refusal(dump)
    assert str(dump) in line
    assert all(ending in line for ending in ENDINGS)
    assert ("--names" in line) == ("a/b/c.bin" in files)


def test_what_else_lies_there_does_not_matter(dump: Path) -> None:
    put(dump, "layer-0/attn_norm.bin")
    for name in (
        "README.md",
        "layer-0/attn_norm.png",
        "layer-0/old/attn_norm.bin",
        "a.npz",
        "b.pt",
    ):
        put(dump, name, b"anything")
    assert list(read(dump).stages) == [NORM]


# --- manifests ------------------------------------------------------------------------------------


def edit_manifest(dump: Path, **changes: object) -> None:
    path = dump / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_manifest_gives_axes(dump: Path) -> None:
    make(dump, "attn_norm", "attn_out")
    found = read(dump)
    assert found.manifest is not None
    assert found.axes == {NORM: ("T", "D"), (0, "attn_out"): ("T", "D")}
    np.testing.assert_array_equal(values_in(found), np.full(15, 0.5))


def test_a_single_file_has_the_manifest_of_its_directory(dump: Path) -> None:
    make(dump, "attn_norm", "1/attn_norm")
    for layer in (0, 1):
        found = read(dump / f"layer-{layer}/attn_norm.bin")
        assert found.manifest is not None
        assert found.axes == {(layer, "attn_norm"): ("T", "D")}


@pytest.mark.parametrize("name", ["layer-0/attn_out.bin", "layer-0/attn_norm.npy", "x.bin"])
def test_a_manifest_says_nothing_of_a_file_that_it_does_not_list(dump: Path, name: str) -> None:
    make(dump, "attn_norm")
    found = read(put(dump, name, CONTENT[Path(name).suffix]))
    assert found.manifest is None
    assert found.axes == {}


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"name": "model", "files": []}',
        '{"schema": "other-v1", "stages": {}}',
        '{"schema": 1}',
        '{"schema": null}',
        '{"schema": {"qwenref-manifest-v1": 1}}',
        "[]",
        '["attn_norm.bin"]',
        '"text"',
        "null",
    ],
)
def test_a_manifest_of_another_tool_does_not_matter(dump: Path, content: str) -> None:
    put(dump, "layer-0/attn_norm.bin")
    (dump / "manifest.json").write_text(content)
    for source in (dump, dump / "layer-0/attn_norm.bin"):
        found = read(source)
        assert found.manifest is None
        np.testing.assert_array_equal(values_in(found), VALUES.reshape(-1))


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "qwenref-manifest-v2"},
        {"layout": "mine"},
        {"stages": None},
        {"stages": [{}]},
        {"config": {}},
        {"tokens": [-1]},
        {"tokens": [1]},
        {"more": 1},
    ],
)
def test_a_malformed_manifest_of_ours(dump: Path, changes: dict[str, object]) -> None:
    make(dump, "attn_norm")
    edit_manifest(dump, **changes)
    for source in (dump, dump / "layer-0/attn_norm.bin"):
        assert "manifest.json" in refusal(source)


def test_a_truncated_manifest_of_ours(dump: Path) -> None:
    make(dump, "attn_norm")
    path = dump / "manifest.json"
    content = path.read_bytes()
    for kept in (0, 1, 20, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:kept])
        assert "manifest.json" in refusal(dump)


def test_a_manifest_that_nobody_writes_to(dump: Path, make_fifo: Callable[[Path], None]) -> None:
    put(dump, "layer-0/attn_norm.bin")
    make_fifo(dump / "manifest.json")
    found = read_or_refused(dump)
    assert "manifest.json" in found if isinstance(found, str) else found.manifest is None


def test_a_file_that_its_manifest_was_not_written_for(dump: Path) -> None:
    make(dump, "attn_norm", "attn_out")
    path = put(dump, "layer-0/attn_norm.bin", aprt(VALUES.reshape(-1)[:14]))
    for source in (dump, path):
        line = refusal(source)
        assert str(path) in line
        assert "14 values" in line
        assert "[3, 5]" in line
    assert list(read(dump / "layer-0/attn_out.bin").stages) == [(0, "attn_out")]


def test_a_file_that_the_manifest_lists_and_that_is_gone(dump: Path) -> None:
    make(dump, "attn_norm", "attn_out")
    (dump / "layer-0/attn_norm.bin").unlink()
    assert list(read(dump).stages) == [(0, "attn_out")]


def test_a_dump_that_is_being_written(dump: Path) -> None:
    put(dump, "layer-0/attn_norm.bin")
    put(dump, f"{PARTIAL}/new/layer-0/attn_norm.bin")
    line = refusal(dump)
    assert "finished" in line
    assert PARTIAL in line
    make(dump.with_name("done"), "attn_norm")
    (dump.with_name("done") / PARTIAL).mkdir()
    assert PARTIAL in refusal(dump.with_name("done"))


# --- nothing is loaded ----------------------------------------------------------------------------


def resident() -> int:
    """Return how many bytes of memory this process takes."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("ending", [".f32", ".bin", ".npy"])
def test_a_file_of_two_gigabytes_takes_no_memory(dump: Path, ending: str) -> None:
    count = 1 << 29
    head = {
        ".f32": b"",
        ".bin": struct.pack("<4sII", b"APRT", 0, count),
        ".npy": with_header(header_of(shape=(count,)), values=b""),
    }[ending]
    path = put(dump, f"layer-0/attn_norm{ending}", head)
    os.truncate(path, len(head) + 4 * count)
    before = resident()
    values = values_in(read(dump))
    assert values.size == count
    assert values[0] == values[-1] == 0
    assert resident() - before < 20e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_what_was_read_can_be_given_back(dump: Path) -> None:
    path = put(dump, "layer-0/attn_norm.f32", b"")
    os.truncate(path, 1 << 27)
    mapped = read(dump).stages[NORM][None].mapped()
    before = resident()
    assert not mapped.values.any()
    assert resident() - before > 1e8
    mapped.release()
    assert resident() - before < 20e6
    assert not mapped.values[::4096].any()


def test_a_dump_is_only_read(dump: Path) -> None:
    put(dump, "layer-0/attn_norm.bin")
    values = values_in(read(dump))
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_vanishes_or_shrinks_between_looking_and_reading(
    dump: Path, ending: str
) -> None:
    path = put(dump, f"layer-0/attn_norm{ending}", CONTENT[ending])
    stored = read(dump).stages[NORM][None]
    for size in (100, 0):
        os.truncate(path, size)
        with pytest.raises(QwenrefError, match="attn_norm"):
            stored.mapped()
    path.unlink()
    with pytest.raises(QwenrefError, match="attn_norm"):
        stored.mapped()
