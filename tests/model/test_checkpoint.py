"""A checkpoint's files: where tensors are found, what an index may say, and reading rows.

Index and shards are text and bytes from outside: whatever they hold, the outcome is an open
checkpoint or one refusal, never a wait, a traceback, or a file outside of the directory.
"""

import json
import os
import re
import shutil
import tracemalloc
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qwenref.errors import QwenrefError
from qwenref.model import checkpoint as module
from qwenref.model.checkpoint import CHUNK, INDEX, INDEX_LIMIT, SINGLE, Checkpoint
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import attention_tensors, read_attention, read_embedding

SHAPE = Shape(84, 6, 2, intermediate_size=16, num_hidden_layers=2, vocab_size=320)
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.layers.0.input_layernorm.weight"
UNNEEDED = "lm_head.weight"
"""A tensor that no attention stage depends on."""

Tensors = dict[str, np.ndarray]


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "single", tmp_path / "single")


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return shutil.copytree(originals / "sharded", tmp_path / "sharded")


def refusal(path: Path) -> str:
    with pytest.raises(QwenrefError) as error:
        Checkpoint(path)
    return str(error.value)


def weight_map(directory: Path) -> dict[str, str]:
    return json.loads((directory / INDEX).read_text())["weight_map"]


def write_index(directory: Path, changes: dict[str, str]) -> None:
    """Write the index anew, with other claims about some tensors."""
    text = json.dumps({"metadata": {}, "weight_map": weight_map(directory) | changes})
    (directory / INDEX).write_text(text)


def all_rows(checkpoint: Checkpoint, name: str, count: int) -> np.ndarray:
    return np.concatenate([piece for _, piece in checkpoint.rows(name, 0, count)])


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


# --- the three ways to name a checkpoint ----------------------------------------------------------


def test_single_file_shards_and_one_named_file_hold_the_same(originals: Path) -> None:
    expected = load_file(originals / "single" / SINGLE)
    for path in ("single", "sharded", f"single/{SINGLE}"):
        checkpoint = Checkpoint(originals / path)
        for name, values in expected.items():
            assert checkpoint.holds(name)
            assert same_bits(all_rows(checkpoint, name, len(values)), values)


def test_a_shard_alone_is_a_checkpoint_of_what_it_holds(sharded: Path) -> None:
    shard = sharded / weight_map(sharded)[EMBEDDING]
    (sharded / INDEX).unlink()
    checkpoint = Checkpoint(shard)
    assert checkpoint.holds(EMBEDDING)
    assert not checkpoint.holds(UNNEEDED)
    assert checkpoint.directory == sharded


def test_a_checkpoint_is_called_by_its_directory_or_file(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Checkpoint(single).name == "single"
    assert Checkpoint(single / SINGLE).name == "single"
    shutil.copyfile(single / SINGLE, single / "my.v2.safetensors")
    assert Checkpoint(single / "my.v2.safetensors").name == "my.v2"
    monkeypatch.chdir(single)
    assert Checkpoint(Path()).name == "single"
    assert Checkpoint(Path(SINGLE)).name == "single"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("models--Qwen--Qwen2.5-7B-Instruct/snapshots/a09a354", "Qwen2.5-7B-Instruct"),
        ("models--mine/snapshots/1", "mine"),
        ("experiments/snapshots/step-1000", "step-1000"),
        ("my--tune", "my--tune"),
    ],
)
def test_a_download_of_huggingface_hub_is_called_by_its_model(
    single: Path, place: str, name: str
) -> None:
    (single.parent / place).parent.mkdir(parents=True, exist_ok=True)
    assert Checkpoint(single.rename(single.parent / place)).name == name


def test_the_name_can_be_printed_whatever_the_directory_is_called(single: Path) -> None:
    strange = single.rename(single.parent / "a\x1b[31m\nb\udcff")
    name = Checkpoint(strange).name
    assert name.isprintable()
    assert name.startswith("a")


def test_one_whole_file_wins_over_an_index(single: Path, sharded: Path) -> None:
    shutil.copyfile(single / SINGLE, sharded / SINGLE)
    (sharded / INDEX).write_text("no index")
    assert Checkpoint(sharded).holds(EMBEDDING)


@pytest.mark.parametrize(
    "name",
    ["absent", "absent.safetensors", "a/b/c", "x" * 300, "x" * 300 + ".safetensors", "x/" * 3000],
    ids=["directory", "file", "deep", "long directory", "long file", "very deep"],
)
def test_a_model_that_does_not_exist_is_refused(tmp_path: Path, name: str) -> None:
    assert "no model" in refusal(tmp_path / name)


def test_a_file_that_is_no_safetensors_file_is_no_model(single: Path) -> None:
    assert "no model" in refusal(single / "config.json")
    (single / SINGLE).rename(single / "model.gguf")
    assert "no model" in refusal(single / "model.gguf")


def test_a_directory_without_weights_is_refused(single: Path) -> None:
    (single / SINGLE).unlink()
    message = refusal(single)
    assert SINGLE in message
    assert INDEX in message


def test_a_directory_or_file_without_config_is_refused(single: Path) -> None:
    (single / "config.json").unlink()
    for path in (single, single / SINGLE):
        message = refusal(path)
        assert f"{single / 'config.json'}" in message
        assert "does not exist" in message


def test_a_link_that_leads_to_itself_is_no_model(tmp_path: Path) -> None:
    for name in ("loop", "loop.safetensors"):
        (tmp_path / name).symlink_to(name)
        assert "no model" in refusal(tmp_path / name)


# --- what an index may say ------------------------------------------------------------------------


def test_shards_linked_as_in_the_hugging_face_cache_are_read(
    sharded: Path, originals: Path, tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b2c"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    checkpoint = Checkpoint(snapshot)
    expected = load_file(originals / "single" / SINGLE)[EMBEDDING]
    assert same_bits(all_rows(checkpoint, EMBEDDING, 320), expected)
    assert Checkpoint(snapshot / weight_map(snapshot)[NORM]).holds(NORM)


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "sub/inside.safetensors",
        "./here.safetensors",
        "sub/../here.safetensors",
        "sub//inside.safetensors",
        "sub\\inside.safetensors",
        "..\\outside.safetensors",
        "\\here.safetensors",
        "C:here.safetensors",
        "C:\\here.safetensors",
        "\\\\server\\share\\here.safetensors",
        "here.safetensors/",
        "here.safetensors\0",
        "here\0.safetensors",
        "here.safetensors\0.safetensors",
        "here.bin",
        "here",
        "",
        ".",
        "..",
        "/",
    ],
)
def test_a_shard_that_is_no_plain_file_name_is_refused_even_if_it_is_there(
    sharded: Path, shard: str
) -> None:
    (sharded / "sub").mkdir()
    whole = sharded / weight_map(sharded)[UNNEEDED]
    for place in ("../outside", "sub/inside", "here"):
        shutil.copyfile(whole, sharded / f"{place}.safetensors")
    for place in ("sub\\inside", "..\\outside", "\\here", "C:here", "C:\\here"):
        shutil.copyfile(whole, sharded / f"{place}.safetensors")
    shutil.copyfile(whole, sharded / "here.bin")
    shutil.copyfile(whole, sharded / "here")
    write_index(sharded, {UNNEEDED: "here.safetensors"})
    assert Checkpoint(sharded).holds(UNNEEDED)
    write_index(sharded, {UNNEEDED: shard})
    message = refusal(sharded)
    assert UNNEEDED in message
    assert repr(shard) in message


def test_an_absolute_path_to_a_good_shard_is_refused(sharded: Path) -> None:
    shard = f"{sharded / weight_map(sharded)[UNNEEDED]}"
    write_index(sharded, {UNNEEDED: shard})
    assert repr(shard) in refusal(sharded)


def test_a_shard_with_a_name_too_long_for_a_file_is_refused(sharded: Path) -> None:
    write_index(sharded, {UNNEEDED: "x" * 300 + ".safetensors"})
    assert "xxx" in refusal(sharded)


def test_every_shard_of_the_index_must_be_there(sharded: Path) -> None:
    needed = {tensor.name for tensor in attention_tensors(Checkpoint(sharded).config, 0).values()}
    claims = weight_map(sharded)
    spare = set(claims.values()) - {claims[name] for name in (*needed, EMBEDDING)}
    assert spare
    for shard in sorted(set(claims.values())):
        (sharded / shard).rename(sharded / "away")
        message = refusal(sharded)
        assert shard in message
        assert "missing" in message
        (sharded / shard).symlink_to("nowhere")
        assert shard in refusal(sharded)
        (sharded / shard).unlink()
        (sharded / "away").rename(sharded / shard)


def test_a_shard_that_does_not_hold_what_the_index_claims_is_refused(sharded: Path) -> None:
    claims = weight_map(sharded)
    assert claims[UNNEEDED] != claims[EMBEDDING]
    write_index(sharded, {UNNEEDED: claims[EMBEDDING]})
    message = refusal(sharded)
    assert UNNEEDED in message
    assert claims[EMBEDDING] in message
    write_index(sharded, {UNNEEDED: claims[UNNEEDED], "invented": claims[EMBEDDING]})
    assert "'invented'" in refusal(sharded)


def test_a_tensor_that_the_index_leaves_out_is_not_held(sharded: Path) -> None:
    claims = weight_map(sharded)
    del claims[NORM]
    (sharded / INDEX).write_text(json.dumps({"weight_map": claims}))
    checkpoint = Checkpoint(sharded)
    assert not checkpoint.holds(NORM)
    assert checkpoint.problems({NORM: (84,)}) == [f"{NORM} is missing"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b'{"weight_map": null}',
        b'{"weight_map": []}',
        b'{"weight_map": "model.safetensors"}',
        b'{"weight_map": {"a": null}}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": ["model.safetensors"]}}',
        b'{"weight_map": {"a": {"b": "c"}}}',
        b'{"weight_map": {"a": "\xff"}}',
        b'{"weight_map": {"\xff": "a"}}',
        b'{"weight_map": {"a": "\\ud800"}}',
        b'{"weight_map": NaN}',
        b"[" * 100_000,
        b'{"weight_map": ' + b'{"a": ' * 100_000,
        b'{"metadata": ' + b"[" * 100_000,
    ],
)
def test_an_index_that_is_none_is_refused_by_name(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    assert f"{sharded / INDEX}" in refusal(sharded)


def test_what_else_an_index_says_does_not_matter(sharded: Path) -> None:
    index = {"weight_map": weight_map(sharded), "metadata": {"total_size": -1}, "x": [None, 1e9]}
    (sharded / INDEX).write_text(json.dumps(index))
    assert Checkpoint(sharded).holds(NORM)


def test_a_huge_index_is_refused_without_being_read(sharded: Path) -> None:
    os.truncate(sharded / INDEX, 1 << 40)
    tracemalloc.start()
    try:
        assert "larger than" in refusal(sharded)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * INDEX_LIMIT


# --- files that are damaged or something else -----------------------------------------------------

GARBAGE = np.random.default_rng(0).bytes(100_000)


def header_of(file: bytes) -> int:
    """Return where the header of a safetensors file ends."""
    return 8 + int.from_bytes(file[:8], "little")


def test_a_file_truncated_anywhere_is_refused_by_name(single: Path, sharded: Path) -> None:
    for path in (single / SINGLE, sharded / weight_map(sharded)[UNNEEDED]):
        whole = path.read_bytes()
        data, size = header_of(whole), len(whole)
        for length in (0, 1, 7, 8, 9, data // 2, data - 1, data, data + 1, size // 2, size - 1):
            path.write_bytes(whole[:length])
            message = refusal(path.parent)
            assert f"{path}" in message
            assert "truncated" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        GARBAGE,
        bytes(100_000),
        b"\xff" * 100_000,
        b"GGUF" + bytes(1000),
        b"PK\x03\x04" + bytes(1000),
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (9).to_bytes(8, "little") + b'{"a":{}} ',
        (1 << 63).to_bytes(8, "little") + bytes(1000),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:12]),
)
def test_content_that_is_no_safetensors_is_refused_by_name(single: Path, content: bytes) -> None:
    (single / SINGLE).write_bytes(content)
    for path in (single, single / SINGLE):
        assert f"{single / SINGLE}" in refusal(path)


def test_bytes_that_follow_the_last_tensor_are_refused(single: Path) -> None:
    with (single / SINGLE).open("ab") as file:
        file.write(b"x")
    assert f"{single / SINGLE}" in refusal(single)


@pytest.mark.parametrize("kind", ["directory", "fifo", "null device"])
def test_something_that_is_no_file_is_refused_at_once(
    single: Path, sharded: Path, make_fifo: Callable[[Path], None], kind: str
) -> None:
    shard = weight_map(sharded)[UNNEEDED]
    for place in (
        single / SINGLE,
        sharded / shard,
        sharded / INDEX,
        single / "config.json",
    ):
        place.rename(place.parent / "away")
        if kind == "directory":
            place.mkdir()
        elif kind == "fifo":
            make_fifo(place)
        else:
            place.symlink_to(os.devnull)
        assert f"{place}" in refusal(place.parent)
        place.rmdir() if kind == "directory" else place.unlink()
        (place.parent / "away").rename(place)
    Checkpoint(single)
    Checkpoint(sharded)


def test_a_fifo_named_as_the_model_is_refused_at_once(
    single: Path, make_fifo: Callable[[Path], None]
) -> None:
    make_fifo(single / "pipe.safetensors")
    assert "no model" in refusal(single / "pipe.safetensors")


# --- problems, rows -------------------------------------------------------------------------------


def test_problems_name_every_tensor_that_cannot_be_read(single: Path) -> None:
    tensors: Tensors = load_file(single / SINGLE)
    tensors["a"] = np.zeros((2, 3), np.int8)
    tensors["b"] = np.zeros((2, 3), np.float64)
    save_file(tensors, single / SINGLE)
    checkpoint = Checkpoint(single)
    found = checkpoint.problems({"a": (3, 2), "b": (2, 3), "c": (1,), NORM: (84,)})
    assert found == [
        "a has shape [2, 3], the config says [3, 2]",
        "a is stored as I8, not as one of BF16, F16, F32",
        "b is stored as F64, not as one of BF16, F16, F32",
        "c is missing",
    ]
    assert checkpoint.problems({NORM: (84, 1)}) != []
    assert checkpoint.problems({NORM: ()}) != []
    assert checkpoint.problems({}) == []


@settings(max_examples=100)
@given(
    chunk=st.integers(1, 4000),
    bounds=st.tuples(st.integers(0, 320), st.integers(0, 320)),
    name=st.sampled_from([EMBEDDING, "model.norm.weight"]),
)
def test_rows_are_exactly_those_asked_for_in_pieces_of_bounded_size(
    originals: Path, chunk: int, bounds: tuple[int, int], name: str
) -> None:
    expected = load_file(originals / "single" / SINGLE)[name]
    start, stop = (min(bound, len(expected)) for bound in bounds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        pieces = list(Checkpoint(originals / "sharded").rows(name, start, stop))
    following = start
    for row, piece in pieces:
        assert row == following
        assert 0 < piece.nbytes <= max(chunk, expected[0].nbytes)
        assert same_bits(piece, expected[row : row + len(piece)])
        following = row + len(piece)
    assert following == max(start, stop)


@settings(max_examples=50)
@given(chunk=st.integers(1, 4000), start=st.integers(0, 320), data=st.data())
def test_an_array_is_filled_with_rows_piece_by_piece(
    originals: Path, chunk: int, start: int, data: st.DataObject
) -> None:
    expected = load_file(originals / "single" / SINGLE)[EMBEDDING]
    count = data.draw(st.integers(0, 320 - start))
    into = np.full((count, 84), np.nan, expected.dtype)
    following = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        for row, piece in Checkpoint(originals / "sharded").read(EMBEDDING, into, start):
            assert row == following
            assert np.shares_memory(piece, into)
            assert piece.nbytes <= max(chunk, expected[0].nbytes)
            following = row + len(piece)
            assert same_bits(into[:following], expected[start : start + following])
            assert np.isnan(into[following:].astype(np.float32)).all()
    assert following == count


@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.0.self_attn.q_proj.bias"])
@pytest.mark.parametrize("rows", [[], [0], [83, 0, 5, 5], range(84)])
def test_single_rows_are_in_the_order_given(
    originals: Path, rows: Sequence[int], name: str
) -> None:
    expected = load_file(originals / "single" / SINGLE)[name]
    found = Checkpoint(originals / "sharded").rows_at(name, rows)
    assert same_bits(found, expected[list(rows)])


def test_a_tensor_of_many_megabytes_arrives_in_pieces(single: Path) -> None:
    values = np.random.default_rng(1).standard_normal((30_000, 84), np.float32)
    save_file({"big": values, "flat": values.reshape(-1)}, single / SINGLE)
    checkpoint = Checkpoint(single)
    for name, expected in (("big", values), ("flat", values.reshape(-1))):
        pieces = [piece for _, piece in checkpoint.rows(name, 0, len(expected))]
        assert len(pieces) == 3
        assert max(piece.nbytes for piece in pieces) <= CHUNK
        assert same_bits(np.concatenate(pieces), expected)


def test_only_what_layer_0_and_the_prompt_need_is_read(single: Path, originals: Path) -> None:
    tensors: Tensors = load_file(single / SINGLE)
    expected, expected_print = read_attention(Checkpoint(originals / "single"), 0)
    needed = {tensor.name for tensor in attention_tensors(Checkpoint(single).config, 0).values()}
    spoiled = [
        np.zeros((3, 5), np.int8),
        np.full((4,), np.nan, np.float32),
        np.zeros((0,), np.float16),
        np.zeros((), np.float64),
        np.ones((2,), np.bool_),
    ]
    others = sorted(set(tensors) - needed - {EMBEDDING})
    assert len(others) > len(spoiled)
    for number, name in enumerate(others):
        tensors[name] = spoiled[number % len(spoiled)]
    save_file(tensors, single / SINGLE)
    checkpoint = Checkpoint(single)
    weights, found_print = read_attention(checkpoint, 0)
    assert found_print == expected_print
    for found, value in zip(weights, expected, strict=True):
        assert same_bits(np.asarray(found), np.asarray(value))
    rows, _ = read_embedding(checkpoint, [3])
    assert same_bits(rows, tensors[EMBEDDING][3:4])


def test_layer_0_alone_is_enough(tmp_path: Path, originals: Path) -> None:
    write(tmp_path / "part", SHAPE, shard_bytes=60_000, layers_written=1)
    _, found = read_attention(Checkpoint(tmp_path / "part"), 0)
    _, expected = read_attention(Checkpoint(originals / "single"), 0)
    assert found == expected


# --- anything at all ------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
PARTS = st.sampled_from(["..", "/", "\\", "model-00001-of-00004", ".safetensors", "C:", "\0", "x"])
SHARDS = st.lists(PARTS, max_size=5).map("".join)


@settings(max_examples=150)
@given(data=st.data())
def test_any_mutation_of_an_index_gives_a_checkpoint_or_a_refusal(
    sharded: Path, originals: Path, data: st.DataObject
) -> None:
    index: dict[str, Any] = json.loads((originals / "sharded" / INDEX).read_text())
    claims = index["weight_map"]
    for name in data.draw(st.lists(st.sampled_from(sorted(claims)), max_size=2)):
        claims[name] = data.draw(SHARDS | JSON)
    claims.update(data.draw(st.dictionaries(st.text(max_size=5), SHARDS, max_size=1)))
    index.update(data.draw(st.dictionaries(st.sampled_from(["weight_map", "x"]), JSON, max_size=1)))
    content = bytearray(json.dumps(index).encode())
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    for position, byte in data.draw(st.lists(places, max_size=2)):
        content[position] = byte
    if data.draw(st.integers(0, 9)) == 0:
        del content[data.draw(st.integers(0, len(content))) :]
    (sharded / INDEX).write_bytes(content)
    tracemalloc.start()
    opened, message = None, ""
    try:
        opened = Checkpoint(sharded)
    except QwenrefError as error:
        message = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < (1 << 20) + 64 * len(content)
    if opened is None:
        assert f"{sharded}" in message
    else:
        assert not opened.holds("nothing")


@settings(max_examples=150)
@given(flips=st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_to_a_header_gives_weights_or_a_refusal(
    single: Path, originals: Path, flips: list[tuple[int, int]]
) -> None:
    content = bytearray((originals / "single" / SINGLE).read_bytes())
    for position, byte in flips:
        content[position % header_of(bytes(content[:8]))] = byte
    (single / SINGLE).write_bytes(content)
    norm, message = None, ""
    try:
        checkpoint = Checkpoint(single)
        norm = read_attention(checkpoint, 0)[0].norm
    except QwenrefError as error:
        message = str(error)
    if norm is None:
        assert "single" in message
    else:
        assert norm.shape == (84,)


def test_a_file_that_is_cut_off_while_it_is_read_is_refused(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 1)  # a row at a time
    checkpoint, path = Checkpoint(single), single / SINGLE
    rows = [
        checkpoint.rows(name, 0, len(values))
        for name, values in load_file(path).items()
        if len(values) > 1
    ]
    assert all(next(each) for each in rows)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(QwenrefError, match=r"model\.safetensors is truncated: it ends 1 bytes"):
        deque(chain.from_iterable(rows), maxlen=0)


def other_values(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: values + values for name, values in tensors.items()}, path.parent / "other")
    (path.parent / "other").replace(path)


def other_types(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: v.astype(np.float32) for name, v in tensors.items()}, path.parent / "other")
    (path.parent / "other").replace(path)


def other_values_in_place(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", [other_values, other_types, other_values_in_place])
def test_a_file_that_is_another_than_the_one_before_is_refused(
    single: Path, change: Callable[[Path], None]
) -> None:
    checkpoint = Checkpoint(single)
    assert len(checkpoint.rows_at(EMBEDDING, [1])) == 1
    change(single / SINGLE)
    changed = re.escape(f"{single / SINGLE} was changed while it was read: start again")
    with pytest.raises(QwenrefError, match=changed):
        checkpoint.rows_at(EMBEDDING, [1])
    with pytest.raises(QwenrefError, match=changed):
        next(checkpoint.rows(EMBEDDING, 0, 1))
    with pytest.raises(QwenrefError, match=changed):
        read_attention(checkpoint, 0)


@pytest.mark.parametrize(("start", "count"), [(0, 321), (320, 1), (-1, 1), (5, 316)])
def test_rows_that_a_tensor_does_not_have_are_never_read(
    single: Path, start: int, count: int
) -> None:
    checkpoint = Checkpoint(single)
    into = np.empty((count, 84), checkpoint.dtype(EMBEDDING))
    with pytest.raises(IndexError):
        next(checkpoint.read(EMBEDDING, into, start))
    with pytest.raises(IndexError):
        next(checkpoint.rows(EMBEDDING, start, start + count))
    with pytest.raises(IndexError):
        checkpoint.rows_at(EMBEDDING, range(start, start + count))


def test_a_file_that_is_replaced_while_it_is_read_is_refused(single: Path) -> None:
    checkpoint = Checkpoint(single)
    assert checkpoint.dtype(EMBEDDING)
    save_file({"other": np.zeros(3, np.float32)}, single / "model.safetensors")
    with pytest.raises(QwenrefError, match=r"was changed while it was read"):
        next(checkpoint.rows(EMBEDDING, 0, 1))
    (single / "model.safetensors").unlink()
    with pytest.raises(QwenrefError, match=r"cannot read .*model\.safetensors: No such"):
        next(checkpoint.rows(EMBEDDING, 0, 1))
