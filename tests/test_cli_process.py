"""The command as a process: what it prints, imports and needs, on a terminal and without."""

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import whole
from processes import (
    CAPTURE,
    PATIENCE,
    QUICK,
    Outcome,
    Start,
    ended,
    one_line,
    snapshot,
    starting,
)

import qwenref
from qwenref.cli import shared

# A healthy run


class Healthy(NamedTuple):
    """One prompt captured twice, with a table and with --json."""

    table: Outcome
    json: Outcome
    first: Path
    second: Path


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Healthy:
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    with starting() as start:
        table = start(first, *CAPTURE, "-o", "out")
        json = start(second, *CAPTURE, "-o", "out", "--json")
        return Healthy(ended(table), ended(json), first / "out", second / "out")


def test_a_healthy_run_exits_0_with_nothing_on_standard_error(healthy: Healthy) -> None:
    assert (healthy.table.status, healthy.table.err) == (0, "")
    assert (healthy.json.status, healthy.json.err) == (0, "")
    assert len(whole(healthy.first).stages) == 9


def test_the_same_run_twice_gives_the_same_bytes(healthy: Healthy) -> None:
    assert len(snapshot(healthy.first)) == 11  # nine stages, manifest, folder
    assert snapshot(healthy.first) == snapshot(healthy.second)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_every_dtype_gives_the_same_bytes_twice_and_on_one_core(
    dtype: str, start: Start, tmp_path: Path
) -> None:
    cores = os.sched_getaffinity(0)
    running = []
    for name, allowed in (("all", cores), ("one", {min(cores)})):
        (tmp_path / name).mkdir()
        os.sched_setaffinity(0, allowed)  # which a new process inherits
        try:
            running.append(start(tmp_path / name, *CAPTURE, "--dtype", dtype, "-o", "out"))
        finally:
            os.sched_setaffinity(0, cores)
    assert [ended(process).status for process in running] == [0, 0]
    assert snapshot(tmp_path / "all") == snapshot(tmp_path / "one")


def test_json_prints_exactly_the_text_of_the_manifest(healthy: Healthy) -> None:
    assert healthy.json.out.encode() == (healthy.second / "manifest.json").read_bytes()


def test_no_terminal_codes_without_a_terminal(healthy: Healthy) -> None:
    assert healthy.table.out.count("\n") == 12  # title, heading, nine stages, what is normal
    for text in (*healthy.table[1:], *healthy.json[1:]):
        assert all(character.isprintable() or character == "\n" for character in text)


def test_the_installed_command_is_this_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("qwenref"), "--version"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout == f"qwenref {qwenref.__version__}\n"


# What is imported


@pytest.mark.parametrize(
    "code",
    [
        "import qwenref",
        "import qwenref; qwenref.__version__; qwenref.QwenrefError; dir(qwenref)",
        "import runpy; sys.argv = ['qwenref', '--help']; runpy.run_module('qwenref')",
        "import runpy; sys.argv = ['qwenref', 'capture', '--help']; runpy.run_module('qwenref')",
    ],
    ids=["package", "package attributes", "--help", "capture --help"],
)
def test_neither_jax_nor_numpy_is_imported_for(code: str, tmp_path: Path) -> None:
    watched = "import atexit, sys; atexit.register(lambda: print('MODULES', *sys.modules));"
    done = subprocess.run(
        [sys.executable, "-c", watched + code],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    text, _, modules = done.stdout.partition("MODULES")
    assert "qwenref" in modules.split()
    assert {"jax", "jaxlib", "numpy", "flax"}.isdisjoint(modules.split())
    assert ("Usage" in text) == ("--help" in code)
    assert done.stderr == ""


# A terminal


XTERM = {"TERM": "xterm-256color"}


class Terminal:
    """The visible text of a terminal, for the few codes that rich's spinner uses."""

    def __init__(self):
        self.lines = [""]
        self.row = self.column = 0
        self.cursor_shown = True

    def feed(self, text: str) -> None:
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+|\x1b", text):
            if token == "\r":
                self.column = 0
            elif token == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif token in ("\x1b[?25l", "\x1b[?25h"):
                self.cursor_shown = token.endswith("h")
            elif token == "\x1b[2K":
                self.lines[self.row] = ""
            elif match := re.fullmatch(r"\x1b\[(\d*)A", token):
                self.row -= int(match[1] or 1)
            elif not re.fullmatch(r"\x1b\[[0-9;]*m", token):
                assert token.isprintable(), token
                line = self.lines[self.row].ljust(self.column)
                end = self.column + len(token)
                self.lines[self.row] = line[: self.column] + token + line[end:]
                self.column = end

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).rstrip("\n")


def on_a_terminal(run: Callable[[int], subprocess.Popen[str]]) -> tuple[int, str, Terminal]:
    """Run a process on a new terminal; return its status, all that it wrote, and what is seen."""
    ours, theirs = os.openpty()
    try:
        process = run(theirs)
        os.close(theirs)
        written = b""
        while select.select([ours], [], [], PATIENCE)[0]:
            try:
                block = os.read(ours, 65536)
            except OSError:  # Linux: the last process has closed it
                break
            if not block:
                break
            written += block
        status = process.wait(PATIENCE)
    finally:
        os.close(ours)
    terminal = Terminal()
    terminal.feed(written.decode())
    return status, written.decode(), terminal


@pytest.mark.parametrize("after", [0, 300])
def test_a_terminal_shows_progress_of_what_takes_long_and_keeps_only_the_table(
    after: int, start: Start, tmp_path: Path, healthy: Healthy
) -> None:
    def run(end: int) -> subprocess.Popen[str]:
        return start(
            tmp_path,
            *CAPTURE,
            *("-o", "out"),
            shown_after=after,
            env=XTERM,
            stdin=end,
            stdout=end,
            stderr=end,
        )

    status, written, terminal = on_a_terminal(run)
    assert status == 0
    assert ("computing the noise floor" in written) == (after == 0)
    assert terminal.text == healthy.table.out.rstrip("\n")
    assert terminal.cursor_shown
    assert snapshot(tmp_path / "out") == snapshot(healthy.first)


def test_ctrl_c_on_a_terminal_leaves_a_clean_line_and_the_cursor(
    start: Start, tmp_path: Path
) -> None:
    def run(end: int) -> subprocess.Popen[str]:
        return start(
            tmp_path,
            *QUICK,
            *("-o", "out"),
            at="open .*attn_norm",
            send=signal.SIGINT,
            shown_after=0,
            env=XTERM,
            stdin=end,
            stdout=end,
            stderr=end,
        )

    status, written, terminal = on_a_terminal(run)
    assert status == 130
    assert "writing attn_norm" in written
    assert terminal.text == ""
    assert terminal.cursor_shown
    assert not (tmp_path / "out").exists()


def test_progress_tells_bytes_and_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(shared, "monotonic", lambda: now)
    shown = shared._Shown()
    try:
        shown.step("writing attn_scores")
        assert str(shown) == "writing attn_scores"
        shown.expect(15_000_000_000)
        shown.advance(3_000_000_000)
        now += 20.5
        assert str(shown) == "writing attn_scores: 3.0 GB of 15.0 GB, 1:22 left"
        shown.advance(12_000_000_000)
        shown.step("computing the noise floor")
        assert str(shown) == "computing the noise floor"
    finally:
        shown.end()


def test_diff_shows_progress_too(start: Start, tmp_path: Path, healthy: Healthy) -> None:
    def run(end: int) -> subprocess.Popen[str]:
        dump = str(healthy.first)
        return start(tmp_path, "diff", dump, dump, shown_after=0, env=XTERM, stderr=end)

    status, written, terminal = on_a_terminal(run)
    assert status == 0
    assert re.search(r"comparing [a-z_]{6,}", written)  # whichever the refresh meets
    assert terminal.cursor_shown
    assert terminal.text == ""


# Trouble with the streams


def test_a_report_that_cannot_be_printed_is_trouble_in_one_line(
    start: Start, tmp_path: Path
) -> None:
    with (tmp_path / "report").open("wb") as report:
        report.seek(60_000)  # beyond what a file may get: as if the disk were full just there
        process = start(tmp_path, *QUICK, "-o", "out", file_size=50_000, stdout=report.fileno())
        outcome = ended(process)
    assert outcome.status == 2
    one_line(outcome.err, "File too large")


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("capture", "--help")])
def test_help_that_cannot_be_printed_is_trouble_in_one_line(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "qwenref", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE,
        )
    assert done.returncode == 2
    one_line(done.stderr, "cannot print", "No space left")


@pytest.mark.parametrize("closed", [(2,), (1,), (0, 1, 2)])
def test_closed_standard_streams_do_not_matter(closed: tuple[int, ...], tmp_path: Path) -> None:
    # their numbers are free for files then; nothing that is printed may end up in one
    launch = "import os, sys; [os.close(n) for n in map(int, sys.argv.pop(1).split())]; "
    launch += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = ["-m", "qwenref", *QUICK, "-o", "out", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", launch, " ".join(map(str, closed)), *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    assert done.stdout == (b"" if 1 in closed else manifest)
    assert whole(tmp_path / "out").tokens == [1]
