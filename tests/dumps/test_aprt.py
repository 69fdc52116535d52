"""APRT files: the bytes are the contract, so every expectation here is written by hand."""

import errno
import gc
import os
import random
import signal
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from qwenref.dumps.aprt import Aprt, AprtWriter, fingerprint_of, read_aprt, write_aprt
from qwenref.errors import QwenrefError, printable

ONE_VALUE = b"APRT" + b"\x00\x00\x00\x00" + b"\x01\x00\x00\x00" + b"\x00\x00\x80\x3f"
"""Layer 0, one value, 1.0."""

LAYER_258 = (
    b"APRT"
    b"\x02\x01\x00\x00"  # 258: tells the byte order
    b"\x06\x00\x00\x00"
    b"\x00\x00\x80\x3f"  # 1.0
    b"\x00\x00\x00\xc0"  # -2.0
    b"\xcd\xcc\xcc\x3d"  # 0.1
    b"\x00\x00\x00\x80"  # -0.0
    b"\x01\x00\x00\x00"  # the smallest subnormal
    b"\xff\xff\x7f\x7f"  # the largest finite
)
LAYER_258_VALUES = [1.0, -2.0, float(np.float32(0.1)), -0.0, 2.0**-149, (2 - 2.0**-23) * 2.0**127]

WHOLE_MODEL = b"APRT\xff\xff\xff\xff\x02\x00\x00\x00\x00\x00\x40\x40\x00\x00\x80\xff"
"""No layer; 3.0 and -inf."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stage.bin"


def refusal(path: str | Path) -> str:
    with pytest.raises(QwenrefError) as caught:
        read_aprt(path)
    message = str(caught.value)
    assert printable(str(path)) in message
    assert "\n" not in message
    return message


def allocated(call: Callable[[], object]) -> int:
    """Return how many bytes `call` had allocated at most; NumPy reports its arrays, too."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Reading


def test_literal_bytes_are_read_value_by_value(path: Path) -> None:
    path.write_bytes(LAYER_258)
    layer, values = read_aprt(path)
    assert layer == 258
    assert values.dtype == np.dtype("<f4")
    assert values.shape == (6,)
    assert values.tolist() == LAYER_258_VALUES
    assert np.signbit(values).tolist() == [False, True, False, True, False, False]


def test_layer_ffffffff_is_read_as_the_whole_model(path: Path) -> None:
    path.write_bytes(WHOLE_MODEL)
    layer, values = read_aprt(path)
    assert layer is None
    assert values.tolist() == [3.0, -np.inf]


def test_the_highest_layer_number_is_still_a_layer(path: Path) -> None:
    path.write_bytes(b"APRT\xfe\xff\xff\xff\x00\x00\x00\x00")
    assert read_aprt(path).layer == 0xFFFFFFFE


def test_a_file_of_no_values_is_read(path: Path) -> None:
    path.write_bytes(b"APRT\x03\x00\x00\x00\x00\x00\x00\x00")
    layer, values = read_aprt(path)
    assert layer == 3
    assert values.shape == (0,)


def test_nan_payloads_survive_reading(path: Path) -> None:
    nans = b"\x01\x00\x80\x7f" + b"\xef\xbe\xed\xff"  # a signalling and a negative quiet one
    path.write_bytes(b"APRT\x00\x00\x00\x00\x02\x00\x00\x00" + nans)
    assert read_aprt(path).values.tobytes() == nans


def test_a_path_may_be_text_or_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(ONE_VALUE)
    (tmp_path / "link").symlink_to("real")
    assert read_aprt(str(tmp_path / "link")).values.tolist() == [1.0]


@pytest.mark.parametrize(
    "name",
    ["layer_0_attn_scores.aprt", "layer_0_attn_softmax.aprt", "layer_0_made_up.aprt", "Ω ☃"],
)
def test_the_reader_knows_no_stage_names(tmp_path: Path, name: str) -> None:
    cells = range(28 * 7 * 7)
    payload = b"".join(struct.pack("<f", cell) for cell in cells)
    (tmp_path / name).write_bytes(b"APRT" + struct.pack("<II", 0, 1372) + payload)
    layer, values = read_aprt(tmp_path / name)
    assert layer == 0
    assert values.reshape(28, 7, 7)[27, 6, 5] == 1370
    assert values.tolist() == list(cells)


@pytest.mark.parametrize("begin", [b"TRPA", b"APRt", b"GGUF", b"\x00\x00\x00\x00", b"PK\x03\x04"])
def test_another_magic_is_refused_and_shown(path: Path, begin: bytes) -> None:
    path.write_bytes(begin + ONE_VALUE[4:])
    message = refusal(path)
    assert repr(begin) in message
    assert "APRT" in message


@pytest.mark.parametrize("length", range(12))
def test_a_file_shorter_than_a_header_is_refused(path: Path, length: int) -> None:
    path.write_bytes(ONE_VALUE[:length])
    message = refusal(path)
    assert f"{length} bytes" in message
    assert "12" in message


@pytest.mark.parametrize("missing", [1, 4, 5, 23])
def test_a_truncated_file_is_refused_with_both_sizes(path: Path, missing: int) -> None:
    path.write_bytes(LAYER_258[:-missing])
    message = refusal(path)
    assert f"{36 - missing} bytes" in message
    assert "6 values" in message
    assert "36 bytes" in message
    assert "truncated" in message


@pytest.mark.parametrize("extra", [b"\x00", b"\x00\x00\x80\x3f", LAYER_258])
def test_a_file_longer_than_its_count_is_refused(path: Path, extra: bytes) -> None:
    path.write_bytes(LAYER_258 + extra)
    message = refusal(path)
    assert f"{36 + len(extra)} bytes" in message
    assert "36 bytes" in message
    assert "another kind of file" in message


def test_a_count_of_four_billion_in_a_short_file_allocates_nothing(path: Path) -> None:
    path.write_bytes(b"APRT\x00\x00\x00\x00\xff\xff\xff\xff")
    messages: list[str] = []
    assert allocated(lambda: messages.append(refusal(path))) < 100_000
    assert "4294967295 values" in messages[0]
    assert "12 bytes" in messages[0]


def test_a_count_that_would_wrap_around_in_32_bits_is_not_believed(path: Path) -> None:
    path.write_bytes(b"APRT\x00\x00\x00\x00\x01\x00\x00\x40\x00\x00\x80\x3f")  # 4 * count = 4
    assert "1073741825 values" in refusal(path)


def test_a_large_sparse_file_with_a_lying_count_is_not_loaded(path: Path) -> None:
    path.write_bytes(ONE_VALUE)
    os.truncate(path, 1 << 33)
    messages: list[str] = []
    assert allocated(lambda: messages.append(refusal(path))) < 100_000
    assert f"{1 << 33} bytes" in messages[0]


def test_a_missing_file_is_named(path: Path) -> None:
    assert "does not exist" in refusal(path)


def test_a_dangling_link_counts_as_missing(path: Path) -> None:
    path.symlink_to("nowhere")
    assert "does not exist" in refusal(path)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert "not a regular file" in refusal(tmp_path)


def test_a_pipe_is_refused_without_waiting_for_a_writer(path: Path) -> None:
    def alarm(*_: object) -> None:
        raise TimeoutError("the reader waits for a writer")

    os.mkfifo(path)
    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(5)
    try:
        assert "not a regular file" in refusal(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_what_the_system_says_about_an_unreadable_file_is_passed_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    path.write_bytes(ONE_VALUE)
    monkeypatch.setattr(Path, "open", denied)  # permission bits do not stop root
    assert refusal(path) == f"cannot read {path}: Permission denied"


def test_a_name_too_long_for_the_file_system_is_an_error_of_ours(tmp_path: Path) -> None:
    assert "cannot read" in refusal(tmp_path / ("x" * 300))


def test_a_nul_in_the_path_is_an_error_of_ours() -> None:
    assert "does not exist" in refusal("stage\0.bin")


def independent_parse(content: bytes) -> tuple[int | None, bytes] | None:
    """Return layer and value bytes, or None if the content is no APRT file."""
    if len(content) < 12 or content[:4] != b"APRT":
        return None
    layer, count = (int.from_bytes(content[at : at + 4], "little") for at in (4, 8))
    if len(content) - 12 != 4 * count:
        return None
    return (None if layer == 2**32 - 1 else layer), content[12:]


def almost_aprt() -> st.SearchStrategy[bytes]:
    """Generate headers that are right or nearly so, before contents that fit or nearly so."""
    magic = st.just(b"APRT") | st.binary(min_size=4, max_size=4)
    layer = st.sampled_from([0, 1, 27, 2**31, 2**32 - 2, 2**32 - 1]) | st.integers(0, 2**32 - 1)
    payload = st.binary(max_size=64) | st.integers(0, 16).flatmap(
        lambda count: st.binary(min_size=4 * count, max_size=4 * count)
    )

    def build(magic: bytes, layer: int, payload: bytes, wrong: int) -> bytes:
        return magic + struct.pack("<II", layer, (len(payload) // 4 + wrong) % 2**32) + payload

    wrong = st.just(0) | st.sampled_from([1, -1, 2**30, 2**32 - 1])
    return st.builds(build, magic, layer, payload, wrong)


@given(content=st.binary(max_size=80) | almost_aprt())
@example(content=b"")
@example(content=ONE_VALUE)
@example(content=WHOLE_MODEL)
@example(content=b"APRT" + b"\xff" * 8)
def test_any_bytes_are_read_exactly_or_refused_within_their_own_size(
    path: Path, content: bytes
) -> None:
    path.write_bytes(content)
    results: list[Aprt | QwenrefError] = []

    def read() -> None:
        try:
            results.append(read_aprt(path))
        except QwenrefError as error:
            results.append(error)

    assert allocated(read) < len(content) + 100_000
    expected, (found,) = independent_parse(content), results
    if expected is None:
        assert isinstance(found, QwenrefError)
        assert str(path) in str(found)
    else:
        assert isinstance(found, Aprt)
        assert (found.layer, found.values.tobytes()) == expected


# Writing


def write_runs(path: Path, layer: int | None, count: int, *runs: tuple[int, np.ndarray]) -> str:
    with AprtWriter(path, layer, count) as writer:
        for start, values in runs:
            writer.write(start, values)
        return writer.finish()


def test_the_writer_writes_these_literal_bytes(path: Path) -> None:
    write_aprt(path, 258, np.array(LAYER_258_VALUES, np.float32))
    assert path.read_bytes() == LAYER_258


def test_no_layer_is_written_as_ffffffff(path: Path) -> None:
    write_aprt(path, None, np.array([3, -np.inf], np.float32))
    assert path.read_bytes() == WHOLE_MODEL


def test_a_file_of_no_values_is_a_header(path: Path) -> None:
    write_aprt(path, 3, np.empty((2, 0), np.float32))
    assert path.read_bytes() == b"APRT\x03\x00\x00\x00\x00\x00\x00\x00"


def test_float64_is_rounded_to_nearest_even(path: Path) -> None:
    half = 2.0**-24  # of the last bit of 1.0
    write_aprt(path, 0, np.array([0.1, 1 + half, 1 + 3 * half, 1 + half + 2.0**-50, 2.0**-150]))
    assert path.read_bytes()[12:] == bytes.fromhex("cdcccc3d 0000803f 0200803f 0100803f 00000000")


@pytest.mark.parametrize("dtype", ["<f2", ">f4", ">f8", "<i8", "?"])
def test_other_dtypes_and_byte_orders_are_cast(path: Path, dtype: str) -> None:
    write_aprt(path, 0, np.array([0, 1], dtype))
    assert path.read_bytes()[12:] == bytes.fromhex("00000000 0000803f")


def test_nan_payloads_survive_writing(path: Path) -> None:
    nans = b"\x01\x00\x80\x7f" + b"\xef\xbe\xed\xff"
    write_aprt(path, 0, np.frombuffer(nans, "<f4"))
    assert path.read_bytes()[12:] == nans


CUBE = np.arange(30, dtype=np.float32).reshape(2, 3, 5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array(7.0), [7]),
        (CUBE, list(range(30))),
        (np.asfortranarray(CUBE), list(range(30))),
        (
            CUBE.transpose(2, 0, 1),
            [15 * b + 5 * c + a for a in range(5) for b in range(2) for c in range(3)],
        ),
        (CUBE[1, :, ::-2], [19, 17, 15, 24, 22, 20, 29, 27, 25]),
        (np.broadcast_to(np.float32(3), (2, 2)), [3, 3, 3, 3]),
    ],
    ids=["no axis", "cube", "Fortran order", "transposed", "negative stride", "broadcast"],
)
def test_arrays_of_any_shape_and_order_are_written_row_by_row(
    path: Path, values: np.ndarray, expected: list[int]
) -> None:
    write_aprt(path, 0, values)
    assert path.read_bytes()[8:] == struct.pack(f"<I{len(expected)}f", len(expected), *expected)


def test_the_array_is_left_as_it_is(path: Path) -> None:
    values = np.arange(6.0)
    values.flags.writeable = False
    write_aprt(path, 0, values)
    assert values.tolist() == [0, 1, 2, 3, 4, 5]


def test_runs_in_any_order_give_the_bytes_of_the_whole(tmp_path: Path) -> None:
    values = np.arange(11.0)
    whole = write_aprt(tmp_path / "whole", 2, values)
    runs = [(8, values[8:]), (0, values[:3]), (5, values[5:8].reshape(3, 1)), (3, values[3:5])]
    runs.insert(2, (4, values[:0]))
    assert write_runs(tmp_path / "runs", 2, 11, *runs) == whole
    assert (tmp_path / "runs").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_large_stage_is_written_run_by_run(path: Path) -> None:
    run = np.ones(1 << 16, np.float64)
    peak = allocated(
        lambda: write_runs(path, 0, 64 << 16, *((i << 16, run) for i in reversed(range(64))))
    )
    assert path.stat().st_size == 12 + 4 * (64 << 16)
    assert read_aprt(path).values.min() == 1
    assert peak < 4_000_000  # a quarter of the file


def test_the_fingerprint_is_the_blake3_of_the_file(tmp_path: Path) -> None:
    for name, count in (("none", 0), ("few", 13), ("many", 1 << 19)):
        fingerprint = write_aprt(tmp_path / name, 5, np.arange(float(count)))
        content = (tmp_path / name).read_bytes()
        assert fingerprint == f"blake3:{blake3(content).hexdigest()}"
        assert fingerprint_of(tmp_path / name) == fingerprint


def test_the_fingerprint_of_an_empty_file_is_the_published_one(path: Path) -> None:
    path.write_bytes(b"")
    published = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert fingerprint_of(path) == f"blake3:{published}"


def test_the_fingerprint_covers_layer_and_values(tmp_path: Path) -> None:
    zero = np.zeros(1, np.float32)
    prints = {
        write_aprt(tmp_path / "a", 0, zero),
        write_aprt(tmp_path / "b", 1, zero),
        write_aprt(tmp_path / "c", None, zero),
        write_aprt(tmp_path / "d", 0, -zero),
    }
    assert len(prints) == 4


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling link"])
def test_nothing_is_ever_overwritten(tmp_path: Path, path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "directory":
        path.mkdir()
    else:
        if kind == "link":
            target.write_bytes(b"mine")
        path.symlink_to(target)
    with pytest.raises(FileExistsError, match=r"stage\.bin"):
        write_aprt(path, 0, np.zeros(1, np.float32))
    assert kind != "file" or path.read_bytes() == b"mine"
    assert target.exists() == (kind == "link")
    assert kind != "link" or target.read_bytes() == b"mine"


def test_an_array_beyond_32_bits_is_refused_before_a_file_exists(path: Path) -> None:
    def refused() -> None:
        with pytest.raises(QwenrefError, match="4294967296 values do not fit"):
            write_aprt(path, 0, np.broadcast_to(np.float32(0), (1 << 16, 1 << 16)))

    assert allocated(refused) < 1_000_000
    assert not path.exists()


@pytest.mark.parametrize("count", [2**32, 2**63, -1])
def test_a_count_beyond_32_bits_is_refused_before_a_file_exists(path: Path, count: int) -> None:
    with pytest.raises(QwenrefError, match=f"{count} values do not fit"):
        AprtWriter(path, 0, count)
    assert not path.exists()


@pytest.mark.parametrize("layer", [-1, 2**32 - 1, 2**32])
def test_a_layer_that_does_not_fit_is_refused_before_a_file_exists(path: Path, layer: int) -> None:
    with pytest.raises(QwenrefError, match=f"layer {layer} does not fit"):
        write_aprt(path, layer, np.zeros(1, np.float32))
    assert not path.exists()


@pytest.mark.parametrize("count", [4, 6, 2**32 - 1])
def test_more_or_fewer_values_than_announced_are_an_error(path: Path, count: int) -> None:
    with pytest.raises(ValueError, match=r"stage\.bin"):
        write_runs(path, 0, count, (0, np.ones(3)), (3, np.ones(2)))
    refusal(path)


@pytest.mark.parametrize(
    "runs",
    [
        [(3, 3), (3, 3)],
        [(0, 3), (0, 3)],
        [(0, 4), (3, 2)],
        [(1, 6)],
        [(0, 3), (100, 3)],
    ],
    ids=["second half twice", "first half twice", "overlap", "one too far", "far beyond"],
)
def test_runs_that_overlap_or_leave_a_hole_are_an_error(
    path: Path, runs: list[tuple[int, int]]
) -> None:
    # a hole would read as zeros that nobody computed
    with pytest.raises(ValueError, match=r"stage\.bin"):
        write_runs(path, 0, 6, *((start, np.ones(size)) for start, size in runs))


def test_a_negative_start_never_touches_the_header(path: Path) -> None:
    with AprtWriter(path, 0, 1) as writer, pytest.raises(ValueError, match="-1"):
        writer.write(-1, np.ones(1, np.float32))
    assert path.read_bytes() == b"APRT\x00\x00\x00\x00\x01\x00\x00\x00"


@pytest.mark.parametrize("count", [1, 6, 2**32 - 1])
def test_an_unfinished_file_never_reads_as_a_stage(path: Path, count: int) -> None:
    with AprtWriter(path, 0, count) as writer:
        refusal(path)
        with pytest.raises(ValueError, match=f"not each of {count} values"):
            writer.finish()
    refusal(path)


def test_a_failed_write_leaves_no_file_neither_open_nor_on_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AprtWriter, "write", full)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(OSError, match="No space left"):
            write_aprt(path, 0, np.ones(3))
        gc.collect()
    assert [str(warning.message) for warning in seen] == []
    assert not path.exists()


@pytest.mark.parametrize("values", [["no number"], [1j], [None]])
def test_what_is_no_real_number_is_refused(path: Path, values: list) -> None:
    with pytest.raises(QwenrefError, match=r"values of dtype .* do not fit an APRT file"):
        write_aprt(path, 0, values)
    assert not path.exists()


def test_an_unwritable_place_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="file/stage"):
        write_aprt(tmp_path / "file" / "stage.bin", 0, np.ones(1))
    with pytest.raises(FileNotFoundError, match="absent/stage"):
        write_aprt(tmp_path / "absent" / "stage.bin", 0, np.ones(1))


@given(
    layer=st.none() | st.integers(0, 2**32 - 2),
    content=st.integers(0, 40).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n)),
    cuts=st.lists(st.integers(0, 40)),
    order=st.randoms(use_true_random=False),
)
def test_any_values_in_any_runs_come_back_bit_for_bit(
    path: Path, layer: int | None, content: bytes, cuts: list[int], order: random.Random
) -> None:
    path.unlink(missing_ok=True)
    values = np.frombuffer(content, "<f4")
    bounds = [0, *sorted(min(cut, values.size) for cut in cuts), values.size]
    runs = [(start, values[start:stop]) for start, stop in pairwise(bounds)]
    order.shuffle(runs)
    write_runs(path, layer, values.size, *runs)
    assert path.read_bytes() == (
        b"APRT"
        + (2**32 - 1 if layer is None else layer).to_bytes(4, "little")
        + values.size.to_bytes(4, "little")
        + content
    )
    found = read_aprt(path)
    assert (found.layer, found.values.tobytes()) == (layer, content)
