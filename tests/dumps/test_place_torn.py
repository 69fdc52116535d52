"""A swap that fails half-way, and interrupts that come while the system works for us."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import whole
from small_dumps import contents, fail_in, make, snapshot, stages_in

from qwenref.dumps.manifest import read_manifest
from qwenref.dumps.place import PARTIAL
from qwenref.errors import QwenrefError

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
