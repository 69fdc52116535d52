"""The command killed, interrupted, raced, and out of disk: nothing that looks finished is left."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import whole
from processes import (
    CAPTURE,
    CHANGES,
    PATIENCE,
    QUICK,
    Outcome,
    Start,
    copy_of,
    ended,
    finished,
    one_line,
    snapshot,
    starting,
)

from qwenref.dumps.manifest import Manifest
from qwenref.dumps.place import PARTIAL

# Killed and interrupted


class Moment(NamedTuple):
    """A run that got a signal just before a change on disk."""

    change: str
    """What the process was about to do; empty if the signal never came."""
    cwd: Path
    ended: Outcome


def at_every_change(
    base: Path, send: int, *arguments: str, before: Callable[[Path], object] = Path.mkdir
) -> list[Moment]:
    """Run the command again and again, with a signal at its first, second, ... last change.

    Args:
        base: Where to make the working directories.
        send: The signal.
        arguments: Of the command, with output `out`.
        before: Makes a working directory.
    """
    moments: list[Moment] = []
    with starting() as start:
        while not moments or moments[-1].change:
            running = []
            for nth in (len(moments) + 1, len(moments) + 2):  # two at a time
                cwd = base / str(nth)
                before(cwd)
                process = start(cwd, *arguments, at=CHANGES, nth=nth, send=send)
                running.append((nth, cwd, process))
            for nth, cwd, process in running:
                outcome = ended(process)
                changes = (cwd / "moments").read_text().splitlines()
                change = changes[-1] if len(changes) == nth else ""
                assert change or outcome.status == 0
                moments.append(Moment(change, cwd, outcome))
    return [moment for moment in moments if moment.change]


@pytest.fixture(scope="module")
def old_dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a small dump in `out`, of tokens and a layout nobody else uses."""
    cwd = tmp_path_factory.mktemp("old")
    with starting() as start:
        arguments = (*CAPTURE, "--stages", "k_post_rope", "--tokens", "9,8", "--layout", "hf")
        assert ended(start(cwd, *arguments, "-o", "out")).status == 0
    return cwd


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, old_dump: Path) -> list[Moment]:
    base = tmp_path_factory.mktemp("killed")
    arguments = (*QUICK, "-o", "out", "--force")
    return at_every_change(base, signal.SIGKILL, *arguments, before=copy_of(old_dump))


def test_kills_come_at_every_kind_of_change(killed: list[Moment]) -> None:
    assert {moment.ended.status for moment in killed} == {-signal.SIGKILL}
    kinds = {moment.change.split()[0] for moment in killed}
    assert kinds >= {"os.mkdir", "open", "os.rename", "os.remove", "os.rmdir"}
    assert len(killed) >= 12


def test_a_killed_capture_never_leaves_what_reads_as_finished_and_is_not(
    killed: list[Moment],
) -> None:
    seen = set()
    for _, cwd, _ in killed:
        manifest = finished(cwd / "out")
        seen.add(manifest and str(manifest.tokens))
    assert seen == {"[9, 8]", None, "[1]"}


def test_a_killed_capture_never_loses_the_old_dump_before_the_new_one_is_in_place(
    killed: list[Moment], old_dump: Path
) -> None:
    old = {content for content in snapshot(old_dump / "out").values() if content}
    for _, cwd, _ in killed:
        manifest = finished(cwd / "out")
        if manifest is None or manifest.tokens == [9, 8]:
            assert old <= set(snapshot(cwd / "out").values())


def test_a_killed_capture_stops_the_next_one_with_a_word_on_how_to_go_on(
    start: Start, killed: list[Moment], tmp_path: Path
) -> None:
    (moment,) = [
        moment
        for moment in killed
        if moment.change.startswith("open") and "manifest" in moment.change
    ]
    before = snapshot(moment.cwd / "out")
    outcome = ended(start(moment.cwd, *QUICK, "-o", "out", "--force"))
    assert outcome.status == 2
    one_line(outcome.err, f"out/{PARTIAL}", "killed", "delete it")
    assert snapshot(moment.cwd / "out") == before


def killed_when(
    start: Start, cwd: Path, due: Callable[[float, Path], bool]
) -> tuple[Outcome, Manifest | None]:
    """Kill a capture as soon as `due` says so of the seconds passed and the output directory."""
    cwd.mkdir()
    begun = time.monotonic()
    process = start(cwd, *CAPTURE, "-o", "out")
    while process.poll() is None and not due(time.monotonic() - begun, cwd / "out"):
        time.sleep(0.001)
    process.kill()
    return ended(process), finished(cwd / "out")


def test_a_capture_killed_at_any_time_leaves_nothing_that_reads_as_finished(
    start: Start, tmp_path: Path
) -> None:
    for delay in (0.1, 0.5, 0.8, 1.0, 1.2, 1.4):
        outcome, manifest = killed_when(
            start, tmp_path / str(delay), lambda passed, _, delay=delay: passed > delay
        )
        assert outcome.status in (0, -signal.SIGKILL)
        assert outcome.status == -signal.SIGKILL or manifest is not None


def test_a_capture_killed_once_it_has_claimed_the_directory_leaves_no_dump(
    start: Start, tmp_path: Path
) -> None:
    def claimed(_: float, out: Path) -> bool:
        return (out / PARTIAL).exists()

    def half_written(_: float, out: Path) -> bool:
        return any((out / PARTIAL).rglob("*.bin"))

    for due in (claimed, half_written):
        cwd = tmp_path / due.__name__
        outcome, manifest = killed_when(start, cwd, due)
        assert (outcome.status, manifest) == (-signal.SIGKILL, None)
        assert (cwd / "out" / PARTIAL).exists()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Moment]:
    base = tmp_path_factory.mktemp("interrupted")
    return at_every_change(base, signal.SIGINT, *QUICK, "-o", "out")


EVERYTHING = (*CAPTURE, "--layers", "all", "--stages", "all", "--tokens", "1")


@pytest.mark.parametrize(
    ("send", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
@pytest.mark.parametrize("at", ["open .*layer-1/ffn_up", "open .*lm_head"])
def test_a_run_through_all_layers_that_is_stopped_in_the_middle(
    send: int, status: int, at: str, tmp_path: Path, start: Start
) -> None:
    outcome = ended(start(tmp_path, *EVERYTHING, "-o", "out", at=at, send=send))
    assert (outcome.status, outcome.out) == (status, "")
    assert finished(tmp_path / "out") is None
    if send != signal.SIGKILL:
        assert not (tmp_path / "out").exists()


def early_and_late(moments: list[Moment]) -> tuple[list[Moment], list[Moment]]:
    """Split into those before the dump was in place, by its last rename, and those after."""
    last = max(n for n, moment in enumerate(moments) if moment.change.startswith("os.rename"))
    return moments[: last + 1], moments[last + 1 :]


def test_ctrl_c_exits_with_130_and_without_a_traceback(interrupted: list[Moment]) -> None:
    assert len(interrupted) >= 9
    for moment in interrupted:
        assert moment.ended.status == 130, moment.change
        assert moment.ended.out == ""
        assert moment.ended.err.strip() in ("", "Aborted!", "Aborted."), moment.change


def test_ctrl_c_before_the_dump_is_in_place_leaves_nothing_behind(
    interrupted: list[Moment],
) -> None:
    early, _ = early_and_late(interrupted)
    assert len(early) >= 7
    for moment in early:
        assert list(snapshot(moment.cwd)) == ["moments"], moment.change


def test_ctrl_c_once_the_dump_is_in_place_leaves_the_whole_dump_or_nothing(
    interrupted: list[Moment],
) -> None:
    _, late = early_and_late(interrupted)
    assert len(late) >= 1
    for moment in late:
        if (moment.cwd / "out").exists():
            assert whole(moment.cwd / "out").tokens == [1], moment.change
        assert not (moment.cwd / "out" / PARTIAL).exists(), moment.change


def test_ctrl_c_and_sigterm_at_other_moments_leave_nothing_behind(
    start: Start, tmp_path: Path, old_dump: Path
) -> None:
    fresh, old = Path.mkdir, copy_of(old_dump)
    cases = [
        (signal.SIGINT, "import jax$", fresh, 130),
        (signal.SIGINT, r"import jax\._src\.lax", fresh, 130),
        (signal.SIGINT, "os.rename out/layer-0", old, 130),
        (signal.SIGTERM, "import jax$", fresh, 143),
        (signal.SIGTERM, r"import flax", fresh, 143),
        (signal.SIGTERM, "open .*attn_norm", fresh, 143),
        (signal.SIGTERM, "open .*manifest", old, 143),
        (signal.SIGTERM, f"os.rename out/{PARTIAL}/new/manifest", old, 143),
    ]
    for number in range(0, len(cases), 2):
        running = []
        for case, (send, at, before, status) in enumerate(cases[number : number + 2], number):
            cwd = tmp_path / str(case)
            before(cwd)
            files = snapshot(cwd)
            process = start(cwd, *QUICK, "-o", "out", "--force", at=at, send=send)
            running.append((process, cwd, files, status))
        for process, cwd, files, status in running:
            outcome = ended(process)
            (cwd / "moments").unlink()
            assert (outcome.status, outcome.out) == (status, "")
            assert "Traceback" not in outcome.err
            assert snapshot(cwd) == files


def test_a_hangup_that_nohup_ignores_is_ignored(start: Start, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a new process inherits
    try:
        process = start(tmp_path, *QUICK, "-o", "out", at="open .*attn_norm", send=signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert ended(process).status == 0
    assert whole(tmp_path / "out").tokens == [1]


# Two at once


def ends_of(*processes: subprocess.Popen[str]) -> list[Outcome]:
    return sorted(map(ended, processes))


def until_stopped(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    status = 0
    while not status:
        assert time.monotonic() < deadline
        time.sleep(0.002)
        _, status = os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG)
    assert os.WIFSTOPPED(status)


def test_of_two_captures_into_one_new_directory_exactly_one_wins_whole(
    start: Start, tmp_path: Path
) -> None:
    a = start(tmp_path, *QUICK, "-o", "out/deep")
    b = start(tmp_path, *CAPTURE, "--stages", "attn_norm", "--tokens", "2", "-o", "out/deep")
    won, lost = ends_of(a, b)
    assert (won.status, won.err) == (0, "")
    assert (lost.status, lost.out) == (2, "")
    one_line(lost.err, "out/deep")
    assert whole(tmp_path / "out" / "deep").tokens == ([1] if a.returncode == 0 else [2])
    assert not (tmp_path / "out" / "deep" / PARTIAL).exists()


def test_of_two_captures_that_replace_one_dump_the_last_to_finish_is_there_whole(
    start: Start, tmp_path: Path, old_dump: Path
) -> None:
    copy_of(old_dump)(tmp_path)
    a = start(tmp_path, *QUICK, "-o", "out", "--force")
    b = start(tmp_path, *CAPTURE, "--stages", "attn_out", "--tokens", "2", "-o", "out", "--force")
    first, second = ends_of(a, b)
    assert first.status == 0
    assert second.status in (0, 2)
    if second.status == 2:
        one_line(second.err, "out")
    winners = {str([1]): a.returncode, str([2]): b.returncode}
    assert winners[str(whole(tmp_path / "out").tokens)] == 0
    assert not (tmp_path / "out" / PARTIAL).exists()


def test_a_capture_overtaken_before_it_claims_the_directory_loses_to_the_one_that_finished(
    start: Start, tmp_path: Path
) -> None:
    slow = start(tmp_path, *QUICK, "-o", "out", at=f"os.mkdir out/{PARTIAL}$", send=signal.SIGSTOP)
    until_stopped(slow)
    fast = ended(start(tmp_path, *QUICK, "-o", "out", "--layout", "hf"))
    before = snapshot(tmp_path / "out")
    slow.send_signal(signal.SIGCONT)
    outcome = ended(slow)
    assert fast.status == 0
    assert outcome.status == 2
    one_line(outcome.err, "out", "already holds a dump", "--force")
    assert snapshot(tmp_path / "out") == before
    assert whole(tmp_path / "out").layout == "hf"


def test_a_capture_that_comes_amid_the_swap_of_another_one_loses(
    start: Start, tmp_path: Path, old_dump: Path
) -> None:
    copy_of(old_dump)(tmp_path)
    at = f"os.rename out/{PARTIAL}/new/layer-0"
    slow = start(tmp_path, *QUICK, "-o", "out", "--force", at=at, send=signal.SIGSTOP)
    until_stopped(slow)
    assert finished(tmp_path / "out") is None
    fast = ended(start(tmp_path, *QUICK, "-o", "out", "--force", "--layout", "hf"))
    slow.send_signal(signal.SIGCONT)
    assert ended(slow).status == 0
    assert whole(tmp_path / "out").layout == "apr"
    assert fast.status == 2
    one_line(fast.err, "another capture is writing")


# Trouble with the disk


def test_a_full_disk_leaves_nothing_behind(start: Start, tmp_path: Path, old_dump: Path) -> None:
    # a limit on the size of files: the system refuses a write just as on a full disk
    stage, manifest, logits = (tmp_path / name for name in ("stage", "manifest", "logits"))
    stage.mkdir()
    logits.mkdir()
    copy_of(old_dump)(manifest)
    before = snapshot(manifest)
    running = (
        start(stage, *CAPTURE, "-o", "out/deep/er", file_size=5000),
        start(manifest, *QUICK, "-o", "out", "--force", file_size=600),
        start(logits, *EVERYTHING, "-o", "out", file_size=1000),  # all layers' files are smaller
    )
    for process in running:
        outcome = ended(process)
        assert (outcome.status, outcome.out) == (2, "")
        one_line(outcome.err, "cannot write the dump out", "File too large")
    for folder in (stage, manifest, logits):
        (folder / "moments").unlink()
    assert snapshot(stage) == snapshot(logits) == {}
    assert snapshot(manifest) == before


def test_an_output_that_cannot_be_written_is_one_line_and_changes_nothing(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    below = start(tmp_path, *QUICK, "-o", "file/deep/out", "--force")
    proc = start(tmp_path, *QUICK, "-o", "/proc/qwenref", "--force")
    itself = start(tmp_path, *QUICK, "-o", "file", "--force")
    for process, words in (
        (below, ["file/deep/out", "Not a directory"]),
        (proc, ["cannot write the dump /proc/qwenref"]),
        (itself, ["file exists and is not a directory"]),
    ):
        outcome = ended(process)
        assert (outcome.status, outcome.out) == (2, "")
        one_line(outcome.err, *words)
    (tmp_path / "moments").unlink()
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_a_home_given_by_mistake_with_force_is_never_touched(start: Start, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / "empty").mkdir()
    (home / ".ssh" / "id").write_bytes(b"secret")
    (home / "thesis.txt").write_bytes(b"years of work")
    (home / "link").symlink_to("thesis.txt")
    before = snapshot(tmp_path)
    process = start(tmp_path, *QUICK, "-o", str(home), "--force", env={"HOME": str(home)})
    outcome = ended(process)
    assert outcome.status == 2
    one_line(outcome.err, str(home), "is not empty", "give another -o")
    (tmp_path / "moments").unlink()
    assert snapshot(tmp_path) == before
