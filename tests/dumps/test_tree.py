"""Dump directories: a dump appears whole or not at all, and nothing else is ever touched."""

import errno
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from blake3 import blake3

from qwenref.dumps.aprt import read_aprt
from qwenref.dumps.layout import LAYOUTS
from qwenref.dumps.manifest import Manifest, StageFile, read_manifest, write_manifest
from qwenref.dumps.place import PARTIAL, new_dump
from qwenref.dumps.tree import StageWriter, Written
from qwenref.errors import QwenrefError
from qwenref.stages import BY_NAME

PRINT = "blake3:" + "0" * 64
FIELDS: dict[str, Any] = {
    "engine": "qwenref",
    "versions": {},
    "device": "cpu",
    "dtype": "float32",
    "layout": "apr",
    "model": "tiny",
    "prompt": None,
    "tokens": None,
    "input": None,
    "config": {
        "hidden_size": 5,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    },
    "weights": {"layers": {}, "embedding": None, "biases": False},
}


def fill(folder: Path, *stages: str, value: float = 0.5) -> None:
    """Write stages of shape [3, 5] and a manifest, as a capture does between claim and swap.

    A stage of another layer than 0 is called like ``1/attn_norm``.
    """
    files = []
    for stage in stages:
        layer, _, name = stage.rpartition("/")
        written = write(folder, name, np.full((3, 5), value), layer=int(layer or 0))
        files.append(written.file)
    write_manifest(folder, **FIELDS, stages=files)


def write(
    folder: Path, stage: str, values: np.ndarray, *, layer: int = 0, layout: str = "apr"
) -> Written:
    row = BY_NAME[stage]
    sizes = dict(zip(row.axes, values.shape, strict=True))
    with StageWriter(folder, layer, row, sizes, LAYOUTS[layout]) as writer:
        writer.write(values)
        return writer.finish()


def make(directory: Path, *stages: str, force: bool = False, value: float = 0.5) -> None:
    with new_dump(directory, force=force) as folder:
        fill(folder, *stages, value=value)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def old(out: Path) -> Path:
    """A dump of two stages, one of which no test writes again."""
    make(out, "attn_norm", "attn_out", value=-1)
    return out


Snapshot = dict[str, tuple[int, int, bytes]]


def snapshot(directory: Path) -> Snapshot:
    """Return type and mode, inode, and content of a directory and of everything in it."""
    found = {}
    for path in (directory, *directory.rglob("*")):
        status = path.lstat()
        if path.is_symlink():
            content = bytes(path.readlink())
        else:
            content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_ino, content)
    return found


def contents(directory: Path) -> list[bytes]:
    return sorted(content for _, _, content in snapshot(directory).values() if content)


def whole(directory: Path) -> Manifest:
    """Return the manifest after checking that its files are there, and no others."""
    manifest = read_manifest(directory)
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    outside = {name for name in found if not name.startswith(PARTIAL)}
    assert outside == {"manifest.json"} | {stage.file for stage in manifest.stages}
    for stage in manifest.stages:
        content = (directory / stage.file).read_bytes()
        assert stage.fingerprint == f"blake3:{blake3(content).hexdigest()}"
    return manifest


def stages_in(directory: Path) -> list[str]:
    return [stage.stage for stage in whole(directory).stages]


def refusal(directory: Path, *, force: bool = False) -> str:
    """Return why `directory` is refused, having checked that it is and nothing was touched."""
    before = snapshot(directory.parent)
    with pytest.raises(QwenrefError) as caught:
        make(directory, "attn_norm", force=force)
    assert snapshot(directory.parent) == before
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


# Where a dump may go


def test_an_absent_directory_is_made(out: Path) -> None:
    make(out, "attn_norm", "qkv_bias")
    assert stages_in(out) == ["attn_norm", "qkv_bias"]
    assert sorted(snapshot(out)) == [
        ".",
        "layer-0",
        "layer-0/attn_norm.bin",
        "layer-0/qkv_bias.bin",
        "manifest.json",
    ]


def test_missing_parents_are_made(tmp_path: Path) -> None:
    make(tmp_path / "a" / "b" / "out", "attn_norm")
    assert stages_in(tmp_path / "a" / "b" / "out") == ["attn_norm"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_empty_directory_is_used_as_it_is(out: Path) -> None:
    out.mkdir(mode=0o750)
    before = out.stat()
    make(out, "attn_norm")
    assert stages_in(out) == ["attn_norm"]
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)


def test_the_working_directory_is_used_if_it_is_empty(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir()
    monkeypatch.chdir(out)
    make(Path(), "attn_norm")
    assert stages_in(out) == ["attn_norm"]


def test_a_link_to_an_empty_directory_is_followed_and_kept(tmp_path: Path, out: Path) -> None:
    (tmp_path / "real").mkdir()
    out.symlink_to("real")
    make(out, "attn_norm")
    assert out.is_symlink()
    assert stages_in(tmp_path / "real") == ["attn_norm"]


def test_a_link_to_a_dump_is_followed_and_kept_when_it_is_replaced(
    tmp_path: Path, out: Path
) -> None:
    make(tmp_path / "real", "attn_norm")
    out.symlink_to("real")
    make(out, "attn_out", force=True)
    assert out.is_symlink()
    assert stages_in(tmp_path / "real") == ["attn_out"]


def test_the_folder_to_build_in_is_empty_and_on_the_same_file_system(out: Path) -> None:
    with new_dump(out) as folder:
        assert list(folder.iterdir()) == []
        assert folder.parent.parent == out  # else moving into place would be copying
        fill(folder, "attn_norm")
    assert stages_in(out) == ["attn_norm"]


# Where it may not


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_way_is_refused(out: Path, force: bool) -> None:
    out.write_bytes(b"mine")
    assert "exists and is not a directory; give another -o" in refusal(out, force=force)


@pytest.mark.parametrize("force", [False, True])
def test_a_dangling_link_is_refused_and_its_target_not_made(out: Path, force: bool) -> None:
    out.symlink_to("nowhere")
    assert "exists and is not a directory" in refusal(out, force=force)


@pytest.mark.parametrize("force", [False, True])
def test_a_link_in_a_circle_is_refused(out: Path, force: bool) -> None:
    out.symlink_to("out")
    assert str(out) in refusal(out, force=force)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("entry", ["notes.txt", ".hidden", "empty/", "layer-0/attn_norm.bin"])
def test_a_directory_of_somebody_else_is_refused_even_with_force(
    out: Path, force: bool, entry: str
) -> None:
    plant(out, entry)
    message = refusal(out, force=force)
    assert "is not empty and holds no dump of qwenref" in message
    assert message.endswith("; give another -o")


def plant(directory: Path, entry: str) -> None:
    """Put a file into a directory, or an empty folder if the name ends with a slash."""
    path = directory / entry
    path.parent.mkdir(parents=True, exist_ok=True)
    if entry.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(b"mine")


def test_a_dump_of_ours_is_not_replaced_without_force(old: Path) -> None:
    assert "already holds a dump; --force replaces it" in refusal(old)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "entry",
    [
        "notes.txt",
        ".hidden",
        "empty/",
        "layer-0/.hidden",
        "layer-0/attn_norm.bin.bak",
        "layer-0/empty/",
        "layer-1/attn_norm.bin",
        "deep/er/",
        "deep/er/notes.txt",
        f"layer-0/{PARTIAL}/notes.txt",
        "manifest.json~",
    ],
)
def test_a_dump_of_ours_with_anything_else_in_it_is_refused_even_with_force(
    old: Path, force: bool, entry: str
) -> None:
    plant(old, entry)
    message = refusal(old, force=force)
    assert repr(entry.rstrip("/")) in message
    assert "its manifest does not list" in message
    assert "give another -o" in message


@pytest.mark.parametrize("entry", ["link", "layer-0/link", "layer-7"])
@pytest.mark.parametrize("target", ["layer-0", "layer-0/attn_norm.bin", "..", "nowhere"])
def test_a_dump_of_ours_with_a_link_in_it_is_refused_even_with_force(
    old: Path, entry: str, target: str
) -> None:
    (old / entry).symlink_to(old / target)
    message = refusal(old, force=True)
    assert repr(entry) in message
    assert "its manifest does not list" in message


def test_a_pipe_in_a_dump_of_ours_is_refused_even_with_force(old: Path) -> None:
    os.mkfifo(old / "pipe")
    assert "'pipe', which its manifest does not list" in refusal(old, force=True)


def test_a_dump_whose_files_were_moved_away_behind_a_link_is_refused(old: Path) -> None:
    (old / "layer-0").rename(old.parent / "elsewhere")
    (old / "layer-0").symlink_to("../elsewhere")
    assert "'layer-0', which its manifest does not list" in refusal(old, force=True)


def test_the_file_behind_a_link_in_place_of_a_stage_is_never_touched(
    tmp_path: Path, old: Path
) -> None:
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (old / "layer-0" / "attn_norm.bin").unlink()
    (old / "layer-0" / "attn_norm.bin").symlink_to(tmp_path / "elsewhere")
    make(old, "attn_norm", force=True)
    assert stages_in(old) == ["attn_norm"]
    assert not (old / "layer-0" / "attn_norm.bin").is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == b"mine"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        b'{"name": "an app", "start_url": "/"}',
        b"",
        b"\xff\xfe",
        b'{"schema": "qwenref-manifest-v2"}',
    ],
)
def test_a_manifest_that_is_not_ours_is_refused_even_with_force(
    out: Path, force: bool, content: bytes
) -> None:
    out.mkdir()
    (out / "manifest.json").write_bytes(content)
    (out / "index.html").write_bytes(b"mine")
    message = refusal(out, force=force)
    assert str(out / "manifest.json") in message
    assert "give another -o" in message


def test_a_manifest_that_is_no_file_is_refused_even_with_force(out: Path) -> None:
    (out / "manifest.json").mkdir(parents=True)
    message = refusal(out, force=True)
    assert "not a regular file" in message
    assert "give another -o" in message


@pytest.mark.parametrize("beside", ["nothing", "a dump"])
def test_what_a_killed_capture_left_is_refused_with_a_word_on_how_to_go_on(
    out: Path, beside: str
) -> None:
    if beside == "a dump":
        make(out, "attn_norm")
    plant(out, f"{PARTIAL}/new/layer-0/attn_norm.bin")
    message = refusal(out, force=True)
    assert str(out / PARTIAL) in message
    assert "another capture is writing there, or one was killed" in message
    assert "delete it" in message


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("beside", ["nothing", "a dump"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_foreign_thing_of_the_same_name_is_refused(
    out: Path, force: bool, beside: str, kind: str
) -> None:
    if beside == "a dump":
        make(out, "attn_norm")
    if kind == "file":
        plant(out, PARTIAL)
    else:
        out.mkdir(exist_ok=True)
        (out / PARTIAL).symlink_to("nowhere")
    assert PARTIAL in refusal(out, force=force)


def test_a_place_below_a_file_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(QwenrefError, match=r"cannot write the dump .*/a/b: Not a directory"):
        make(tmp_path / "file" / "a" / "b", "attn_norm")
    assert list(snapshot(tmp_path)) == [".", "file"]


def test_a_name_too_long_for_the_file_system_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(QwenrefError, match=r"cannot write the dump .*: File name too long"):
        make(tmp_path / "a" / ("x" * 300) / "b", "attn_norm")
    assert list(snapshot(tmp_path)) == ["."]


# Replacing


def test_force_replaces_a_dump_as_a_whole(old: Path) -> None:
    inode = old.stat().st_ino
    with new_dump(old, force=True) as folder:
        fill(folder, "attn_norm", "qkv_bias", value=2)
        assert stages_in(old) == ["attn_norm", "attn_out"]  # until the new one is complete
    assert stages_in(old) == ["attn_norm", "qkv_bias"]
    assert not (old / "layer-0" / "attn_out.bin").exists()
    assert set(read_aprt(old / "layer-0" / "attn_norm.bin").values.tolist()) == {2.0}
    assert old.stat().st_ino == inode


def test_force_replaces_other_layers_and_whole_model_stages(out: Path) -> None:
    with new_dump(out) as folder:
        (folder / "final_norm.bin").write_bytes(b"x")
        final_norm = StageFile("final_norm", None, "final_norm.bin", [1], "V", PRINT)
        attn_out = write(folder, "attn_out", np.ones((3, 5)), layer=3).file
        write_manifest(folder, **FIELDS, stages=[attn_out, final_norm])
    make(out, "attn_norm", force=True)
    assert stages_in(out) == ["attn_norm"]
    assert sorted(snapshot(out)) == [".", "layer-0", "layer-0/attn_norm.bin", "manifest.json"]


def test_force_replaces_a_dump_whose_stage_files_were_deleted(old: Path) -> None:
    (old / "layer-0" / "attn_out.bin").unlink()
    make(old, "qkv_bias", force=True)
    assert stages_in(old) == ["qkv_bias"]


def test_force_is_no_trouble_where_nothing_is(out: Path) -> None:
    make(out, "attn_norm", force=True)
    assert stages_in(out) == ["attn_norm"]


# Two at once


@pytest.mark.parametrize("force", [False, True])
def test_a_second_capture_is_refused_and_does_not_disturb_the_first(out: Path, force: bool) -> None:
    with new_dump(out) as folder:
        assert "another capture is writing there" in refusal(out, force=force)
        fill(folder, "attn_norm")
        assert "another capture is writing there" in refusal(out, force=force)
    assert stages_in(out) == ["attn_norm"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("other", ["a dump", "a file"])
def test_what_appears_just_before_the_directory_is_claimed_is_seen(
    out: Path, monkeypatch: pytest.MonkeyPatch, other: str, force: bool
) -> None:
    mkdir = os.mkdir

    def overtaken(path: Any, *args: Any) -> None:
        if os.fspath(path) == str(out / PARTIAL):
            monkeypatch.undo()
            if other == "a dump":
                make(out, "attn_out")
            else:
                plant(out, "notes.txt")
        mkdir(path, *args)

    out.mkdir()
    monkeypatch.setattr(os, "mkdir", overtaken)
    if other == "a dump" and force:
        make(out, "attn_norm", force=True)
        assert stages_in(out) == ["attn_norm"]
    else:
        word = "already holds a dump" if other == "a dump" else "holds no dump of qwenref"
        with pytest.raises(QwenrefError, match=word):
            make(out, "attn_norm", force=force)
        assert not (out / PARTIAL).exists()
        assert len(contents(out)) == (2 if other == "a dump" else 1)


@pytest.mark.parametrize("entry", ["notes.txt", "layer-0/notes.txt", "layer-1/notes.txt"])
@pytest.mark.parametrize("stage", ["attn_norm", "1/attn_norm"])
def test_what_somebody_puts_there_while_a_dump_is_replaced_survives(
    old: Path, entry: str, stage: str
) -> None:
    kept = contents(old)
    try:
        with new_dump(old, force=True) as folder:
            fill(folder, stage)
            plant(old, entry)
    except QwenrefError as error:  # refusing is right, and so is a new dump beside the file
        assert str(old) in str(error)  # noqa: PT017
        assert contents(old) == sorted([*kept, b"mine"])
    assert (old / entry).read_bytes() == b"mine"
    assert not (old / PARTIAL).exists()


@pytest.mark.parametrize("entry", ["notes.txt", "manifest.json", "layer-0", "layer-0/notes.txt"])
def test_what_somebody_puts_there_while_a_dump_is_built_survives(out: Path, entry: str) -> None:
    try:
        with new_dump(out) as folder:
            fill(folder, "attn_norm")
            plant(out, entry)
    except QwenrefError as error:
        assert str(out) in str(error)  # noqa: PT017
    assert (out / entry).read_bytes() == b"mine"
    assert not (out / PARTIAL).exists()


# A body that fails


FAILURES = [
    ValueError("a bug"),
    QwenrefError("bad weights"),
    OSError(errno.ENOSPC, "No space left on device"),
    MemoryError(),
    KeyboardInterrupt(),
    SystemExit(143),
]


def fail_in(directory: Path, failure: BaseException, *, late: bool, force: bool) -> BaseException:
    with pytest.raises(BaseException) as caught, new_dump(directory, force=force) as folder:  # noqa: PT011, PT012
        if late:
            fill(folder, "attn_norm", "qkv_bias")
        else:
            write(folder, "attn_norm", np.ones((3, 5)))
        raise failure
    return caught.value


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize("place", ["absent", "deep", "empty", "dump"])
def test_a_body_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, failure: BaseException, place: str, late: bool
) -> None:
    directory = tmp_path / ("a/b/out" if place == "deep" else "out")
    if place == "empty":
        directory.mkdir()
    elif place == "dump":
        make(directory, "attn_out")
    before = snapshot(tmp_path)
    raised = fail_in(directory, failure, late=late, force=place == "dump")
    assert snapshot(tmp_path) == before
    if isinstance(failure, OSError):
        assert isinstance(raised, QwenrefError)
        assert str(raised) == f"cannot write the dump {directory}: No space left on device"
    else:
        assert raised is failure


def test_only_parents_that_were_absent_are_removed_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    before = snapshot(tmp_path)
    fail_in(tmp_path / "a" / "b" / "c" / "out", ValueError(), late=True, force=False)
    assert snapshot(tmp_path) == before


def test_parents_that_somebody_else_began_to_use_are_kept(tmp_path: Path) -> None:
    def use_and_fail() -> None:
        with new_dump(tmp_path / "a" / "b" / "out"):
            plant(tmp_path / "a", "notes.txt")
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        use_and_fail()
    assert sorted(snapshot(tmp_path)) == [".", "a", "a/notes.txt"]


# A swap that fails


class Renames(NamedTuple):
    """What `Path.rename` was asked to do, and who is told before and after it does so."""

    done: list[tuple[Path, Path]]
    before: list[Callable[[int], None]]
    after: list[Callable[[int], None]]


@pytest.fixture
def renames(monkeypatch: pytest.MonkeyPatch) -> Iterator[Renames]:
    seen = Renames([], [], [])
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        seen.done.append((self, target))
        number = len(seen.done)
        for tell in seen.before:
            tell(number)
        result = rename(self, target)
        for tell in seen.after:
            tell(number)
        return result

    monkeypatch.setattr(Path, "rename", watched)
    yield seen
    assert seen.done, "the swap no longer goes through Path.rename, so nothing was tested"


def replace(directory: Path) -> None:
    make(directory, "attn_norm", "qkv_bias", "1/embedding", force=True, value=2)


SWAP = range(1, 7)
"""The renames of `replace`: old manifest, old layer; new manifest aside, layers 0, 1; manifest."""


def test_replacing_takes_these_renames(old: Path, renames: Renames) -> None:
    replace(old)
    assert len(renames.done) == len(SWAP)
    assert stages_in(old) == ["attn_norm", "qkv_bias", "embedding"]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", SWAP)
@pytest.mark.parametrize(
    "failure",
    [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt(), SystemExit(143)],
    ids=lambda failure: type(failure).__name__,
)
def test_a_failure_at_any_rename_leaves_the_old_dump_as_it_was(
    old: Path, renames: Renames, number: int, failure: BaseException, moment: str
) -> None:
    def strike(now: int) -> None:
        if now == number:
            raise failure

    (renames.before if moment == "before" else renames.after).append(strike)
    before = snapshot(old.parent)
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        replace(old)
    assert snapshot(old.parent) == before
    assert stages_in(old) == ["attn_norm", "attn_out"]
    if isinstance(failure, OSError):
        assert str(caught.value) == f"cannot write the dump {old}: Input/output error"
    else:
        assert caught.value is failure


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_failure_at_any_rename_of_a_first_dump_leaves_nothing(
    tmp_path: Path, renames: Renames, number: int, moment: str
) -> None:
    def strike(now: int) -> None:
        if now == number:
            raise OSError(errno.EIO, "Input/output error")

    (renames.before if moment == "before" else renames.after).append(strike)
    with pytest.raises(QwenrefError, match="Input/output error"):
        make(tmp_path / "a" / "out", "attn_norm")
    assert list(snapshot(tmp_path)) == ["."]


@pytest.mark.parametrize("number", SWAP)
def test_an_old_dump_that_cannot_be_moved_back_is_not_deleted(
    old: Path, renames: Renames, number: int
) -> None:
    def strike(now: int) -> None:
        if now >= number:
            raise OSError(errno.EROFS, "Read-only file system")

    renames.before.append(strike)
    kept = contents(old)
    with pytest.raises(QwenrefError, match="Read-only file system"):
        replace(old)
    assert set(kept) <= set(contents(old))


@pytest.mark.parametrize("first", [True, False])
def test_at_no_moment_lies_a_manifest_beside_files_that_are_not_its_own(
    out: Path, renames: Renames, first: bool
) -> None:
    if not first:
        make(out, "attn_norm", "attn_out")
    states = []

    def look(_: int) -> None:
        states.append("whole" if (out / "manifest.json").exists() and whole(out) else "none")

    renames.before.append(look)
    renames.after.append(look)
    replace(out)
    changes = [state for state, last in zip(states, ["", *states], strict=False) if state != last]
    assert changes == (["none", "whole"] if first else ["whole", "none", "whole"])


def test_at_no_moment_reads_any_folder_as_finished_that_is_not(old: Path, renames: Renames) -> None:
    # a process killed at that moment would leave it so
    def look(number: int) -> None:
        for manifest in old.rglob("manifest.json"):
            for stage in read_manifest(manifest.parent).stages:
                assert (manifest.parent / stage.file).exists(), (number, manifest)

    renames.after.append(look)
    replace(old)
    assert len(renames.done) == len(SWAP)


# Interrupts that come while the system works for us


def interrupting(
    monkeypatch: pytest.MonkeyPatch, name: str, matches: Callable[[str], bool]
) -> list[str]:
    """Send a real SIGINT right after each call of `os.name` whose path matches, once."""
    original, sent = getattr(os, name), []

    def call(path: Any, *args: Any, **options: Any) -> object:
        result = original(path, *args, **options)
        if matches(os.fspath(path)) and not sent:
            sent.append(os.fspath(path))
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(os, name, call)
    return sent


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Make SIGINT raise KeyboardInterrupt, even where it is ignored, as in background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("folder", ["a", "a/out", f"a/out/{PARTIAL}", f"a/out/{PARTIAL}/new"])
def test_an_interrupt_just_as_a_folder_is_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    sent = interrupting(monkeypatch, "mkdir", lambda path: path == str(tmp_path / folder))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "a" / "out", "attn_norm")
    assert sent == [str(tmp_path / folder)]
    assert list(snapshot(tmp_path)) == ["."]


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("name", "what"), [("unlink", "attn_out.bin"), ("rmdir", "layer-0"), ("rmdir", "replaced")]
)
def test_an_interrupt_while_the_old_dump_is_deleted_leaves_the_new_one_alone_and_whole(
    old: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    sent = interrupting(monkeypatch, name, lambda path: Path(path).name == what)
    with pytest.raises(KeyboardInterrupt):
        replace(old)
    assert len(sent) == 1
    assert stages_in(old) == ["attn_norm", "qkv_bias", "embedding"]
    assert not (old / PARTIAL).exists()


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("what", ["attn_norm.bin", "manifest.json"])
def test_a_second_interrupt_while_the_first_is_cleaned_up_leaves_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    sent = interrupting(monkeypatch, "unlink", lambda path: Path(path).name == what)
    raised = fail_in(out, KeyboardInterrupt(), late=True, force=False)
    assert isinstance(raised, KeyboardInterrupt)
    assert len(sent) == 1
    assert not out.exists()


# One stage


def test_a_stage_is_described_as_it_is_written(out: Path) -> None:
    out.mkdir()
    values = np.arange(2 * 3 * 5, dtype=np.float64).reshape(2, 3, 5)  # T N H
    file, rms, nonfinite = write(out, "q_post_rope", values, layer=7)
    content = (out / "layer-7" / "q_post_rope.bin").read_bytes()
    assert file == StageFile(
        stage="q_post_rope",
        layer=7,
        file="layer-7/q_post_rope.bin",
        shape=[2, 3, 5],
        axes="T N H",
        fingerprint=f"blake3:{blake3(content).hexdigest()}",
    )
    assert read_aprt(out / file.file).layer == 7
    assert read_aprt(out / file.file).values.tolist() == list(range(30))
    assert rms == pytest.approx(math.sqrt(sum(i * i for i in range(30)) / 30), rel=1e-15)
    assert nonfinite == 0


def test_a_stage_in_another_layout_has_that_shape_and_order(out: Path) -> None:
    out.mkdir()
    values = np.arange(2 * 3 * 5, dtype=np.float32).reshape(2, 3, 5)
    file, _, _ = write(out, "q_post_rope", values, layout="hf")
    assert (file.shape, file.axes) == ([3, 2, 5], "N T H")
    expected = [15 * t + 5 * n + h for n in range(3) for t in range(2) for h in range(5)]
    assert read_aprt(out / file.file).values.tolist() == expected


def test_a_stage_written_by_slices_is_the_stage_written_whole(tmp_path: Path) -> None:
    scores = np.arange(1, 1 + 2 * 3 * 3, dtype=np.float32).reshape(2, 3, 3)
    for name in ("whole", "slices"):
        (tmp_path / name).mkdir()
    whole = write(tmp_path / "whole", "attn_scores", scores)
    row, sizes = BY_NAME["attn_scores"], {"N": 2, "T": 3, "S": 3}
    with StageWriter(tmp_path / "slices", 0, row, sizes, LAYOUTS["apr"]) as writer:
        writer.write(scores[:, 2:], 2)
        writer.write(scores[:, :2])
        slices = writer.finish()
    assert slices.file == whole.file
    assert slices.rms == pytest.approx(whole.rms, rel=1e-15)
    assert read_aprt(tmp_path / "slices" / whole.file.file).values.tolist() == [
        *(1, 0, 0, 4, 5, 0, 7, 8, 9),
        *(10, 0, 0, 13, 14, 0, 16, 17, 18),
    ]


def test_the_rms_and_the_nonfinite_count_are_of_what_the_file_holds(out: Path) -> None:
    out.mkdir()
    scores = np.array([[[3, np.nan, np.inf], [4, -np.inf, -np.inf], [0, 0, 0]]])
    apr = write(out, "attn_scores", scores)
    assert (apr.rms, apr.nonfinite) == (np.inf, 1)  # above the diagonal are zeros
    hf = write(out, "attn_scores", scores, layer=1, layout="hf")
    assert math.isnan(hf.rms)
    assert hf.nonfinite == 4
    scores[0, 1:] = 0
    fine = write(out, "attn_scores", scores, layer=2)
    assert (fine.rms, fine.nonfinite) == (1.0, 0)  # 3 in nine cells


def test_a_value_beyond_float32_becomes_infinite_and_is_counted(out: Path) -> None:
    out.mkdir()
    _, rms, nonfinite = write(out, "attn_norm", np.array([[1e39, -1e300, 3e38]]))
    assert read_aprt(out / "layer-0" / "attn_norm.bin").values.tolist() == [
        np.inf,
        -np.inf,
        float(np.float32(3e38)),
    ]
    assert (rms, nonfinite) == (np.inf, 2)


def test_the_rms_of_large_values_does_not_overflow(out: Path) -> None:
    out.mkdir()
    assert write(out, "attn_norm", np.full((2, 2), 3e38)).rms == float(np.float32(3e38))


def test_a_stage_is_never_written_twice(out: Path) -> None:
    out.mkdir()
    write(out, "attn_norm", np.ones((1, 2)))
    with pytest.raises(FileExistsError, match=r"attn_norm\.bin"):
        write(out, "attn_norm", np.zeros((1, 2)))
    assert read_aprt(out / "layer-0" / "attn_norm.bin").values.tolist() == [1, 1]


def test_an_unfinished_stage_is_an_error(out: Path) -> None:
    out.mkdir()
    row, sizes = BY_NAME["attn_norm"], {"T": 3, "D": 2}
    with StageWriter(out, 0, row, sizes, LAYOUTS["apr"]) as writer:
        writer.write(np.ones((2, 2)))
        with pytest.raises(ValueError, match="not each of 6 values"):
            writer.finish()
