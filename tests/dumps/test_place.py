"""Where a dump may go: it appears whole or not at all, and nothing else is ever touched."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_dumps import (
    FIELDS,
    PRINT,
    contents,
    fail_in,
    fill,
    make,
    plant,
    refusal,
    snapshot,
    stages_in,
    write,
)

from qwenref.dumps.aprt import read_aprt
from qwenref.dumps.manifest import StageFile, write_manifest
from qwenref.dumps.place import PARTIAL, new_dump
from qwenref.errors import QwenrefError

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
        final_norm = StageFile("final_norm", None, "final_norm.bin", [11], "V", PRINT)
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
