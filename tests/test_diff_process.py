"""`qwenref diff` as a process: what it imports, what it takes, and streams that fail."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers import ROOT, TINY
from processes import PATIENCE, Start, ended, one_line

DATA = ROOT / "tests" / "data"
AGREE = ("apr-f32", "llama-f32")
DIFFER = ("apr-f32", "llama-theta-1e4")
INCOMPLETE = ("apr-f32", "llama-flash")
STATUSES = [(AGREE, 0), (DIFFER, 1), (INCOMPLETE, 2)]


def run(
    *arguments: str, cwd: Path = DATA, stdout: int = subprocess.PIPE, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwenref", "diff", *arguments],
        cwd=cwd,
        env=os.environ | env,
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        timeout=PATIENCE,
        check=False,
    )


# What is imported

HEAVY = {"jax", "jaxlib", "flax", "torch", "transformers", "tokenizers", "safetensors", "ml_dtypes"}


@pytest.mark.parametrize(
    "arguments",
    [
        [*AGREE],
        [*DIFFER, "--json", "--model", str(TINY)],
        [*AGREE, "llama-bf16"],
        ["apr-f32/layer-0/attn_scores.bin", "llama-f32", "-q"],
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    code = "import sys; from qwenref.cli import command; status = command(sys.argv[1:]); "
    code += "print('MODULES', *sys.modules); sys.exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", code, "diff", *arguments],
        cwd=DATA,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == (1 if "llama-theta-1e4" in arguments else 0)
    modules = done.stdout.partition("MODULES")[2].split()
    assert {"qwenref", "numpy", "qwenref.judge.diff"} <= {*modules}
    assert HEAVY.isdisjoint(modules)


def test_nothing_heavy_is_imported_from_python_either() -> None:
    code = "import sys, qwenref; print(qwenref.diff('apr-f32', 'llama-f32').verdict, *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=DATA, capture_output=True, text=True, check=True
    )
    verdict, *modules = done.stdout.split()
    assert (verdict, done.stderr) == ("agree", "")
    assert HEAVY.isdisjoint(modules)


# Exit status and streams


@pytest.mark.parametrize(("paths", "status"), STATUSES)
def test_the_exit_status_is_that_of_the_verdict(paths: tuple[str, str], status: int) -> None:
    done = run(*paths)
    assert (done.returncode, done.stderr) == (status, "")
    assert done.stdout.endswith("\n")
    assert all(c.isprintable() or c == "\n" for c in done.stdout)


@pytest.mark.parametrize("option", ["-q", "--json", "--limit=10"])
@pytest.mark.parametrize(("paths", "status"), STATUSES)
def test_nobody_who_reads_does_not_change_the_exit_status(
    paths: tuple[str, str], status: int, option: str
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run(*paths, option, stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (status, "")


def test_a_reader_that_goes_away_early_does_not_change_the_exit_status() -> None:
    command = '"$0" -m qwenref diff apr-f32 llama-theta-1e4 --json --limit 1000000 | true; '
    done = subprocess.run(
        ["bash", "-c", command + 'exit "${PIPESTATUS[0]}"', sys.executable],
        cwd=DATA,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("option", ["-q", "--json", "--limit=10"])
@pytest.mark.parametrize("paths", [AGREE, DIFFER])
def test_a_full_disk_is_trouble_whatever_the_verdict(paths: tuple[str, str], option: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run(*paths, option, stdout=full.fileno())
    assert done.returncode == 2
    one_line(done.stderr, "cannot print", "No space left")


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize(("paths", "status"), [(AGREE, 0), (DIFFER, 1)])
def test_closed_streams_do_not_matter(
    paths: tuple[str, str], status: int, closed: tuple[int, ...]
) -> None:
    launch = "import os, sys; [os.close(n) for n in map(int, sys.argv.pop(1).split())]; "
    launch += "os.execv(sys.executable, [sys.executable, '-m', 'qwenref', *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", launch, " ".join(map(str, closed)), "diff", *paths, "-q"],
        cwd=DATA,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (status, b"")
    assert bool(done.stdout) == (1 not in closed)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_a_name_is_no_reason_to_fail(
    tmp_path: Path, encoding: str
) -> None:
    for name in ("\u00e9", "\u6587"):
        (tmp_path / name).symlink_to(DATA / "apr-f32")
    done = run("\u00e9", "\u6587", cwd=tmp_path, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "AGREE" in done.stdout


def test_an_error_is_one_line_and_nothing_else() -> None:
    done = run("apr-f32", "absent")
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, "absent")
    done = run("apr-diff/a.bin", "apr-diff/trunc.bin", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, "trunc.bin")


@pytest.mark.parametrize("size", [100, 4096])
def test_a_disk_that_is_full_for_what_is_saved(start: Start, tmp_path: Path, size: int) -> None:
    (tmp_path / "saved.json").write_text("older")
    for name in AGREE:
        (tmp_path / name).symlink_to(DATA / name)
    process = start(tmp_path, "diff", *AGREE, "--save", "saved.json", file_size=size)
    outcome = ended(process)
    assert (outcome.status, outcome.out) == (2, "")
    one_line(outcome.err, "cannot write saved.json", "File too large")
    assert (tmp_path / "saved.json").read_text() == "older"
    assert {path.name for path in tmp_path.iterdir()} <= {"saved.json", "moments", *AGREE}


# Interrupted


@pytest.mark.parametrize(
    "at", ["import numpy", "import qwenref.judge.measure$", "import qwenref.judge.summary"]
)
def test_ctrl_c_is_quiet_and_no_verdict(start: Start, tmp_path: Path, at: str) -> None:
    for name in AGREE:
        (tmp_path / name).symlink_to(DATA / name)
    process = start(tmp_path, "diff", *AGREE, "--save", "saved.json", at=at, send=signal.SIGINT)
    outcome = ended(process)
    assert (tmp_path / "moments").read_text()
    assert outcome == (130, "", "")
    assert {path.name for path in tmp_path.iterdir()} <= {"moments", *AGREE}


def test_ctrl_c_in_the_middle_of_large_files(tmp_path: Path) -> None:
    for name in ("a.f32", "b.f32"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 8 << 30)  # takes no room on the disk, and seconds to read
    code = (  # SIGINT may be ignored here, as in background jobs
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from qwenref.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "diff", "a.f32", "b.f32"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (130, b"", b"")


# Memory

MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""A process counts what its parent held when it was started as its own: so the parent is small."""

ALLOWED = 200e6
"""Bytes above the interpreter, from the issue that asked for it; measured: 54 MB."""


class Peak(NamedTuple):
    """How a process ended, and the most memory that it held."""

    status: int
    bytes: float


def peak(*arguments: str) -> Peak:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    status, size = map(int, done.stdout.split())
    return Peak(status, size * (1 if sys.platform == "darwin" else 1024))


@pytest.fixture(scope="module")
def interpreter() -> float:
    status, size = peak("-c", "import typer, numpy")
    assert status == 0
    return size


def different(folder: Path, megabytes: int) -> tuple[str, str]:
    """Write two files of so many MB that differ everywhere; return their paths."""
    values = np.random.default_rng(1).standard_normal(megabytes << 18, np.float32)
    folder.mkdir()
    paths = []
    for name in ("attn_norm.f32", "attn_norm.raw"):
        values.tofile(folder / name)
        values *= 2
        paths.append(str(folder / name))
    return paths[0], paths[1]


def test_memory_does_not_depend_on_the_size_of_files(tmp_path: Path, interpreter: float) -> None:
    small = peak("-m", "qwenref", "diff", *different(tmp_path / "small", 64))
    large = peak("-m", "qwenref", "diff", *different(tmp_path / "large", 256))
    assert (small.status, large.status) == (1, 1)
    assert small.bytes <= interpreter + ALLOWED
    assert large.bytes <= interpreter + ALLOWED
    assert large.bytes <= small.bytes + 20e6


def test_memory_of_scores_of_known_shape_in_two_layouts(tmp_path: Path, interpreter: float) -> None:
    T, N = 2048, 6  # 100 MB
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((N, T, T), np.float32)
    for name, values in (("a", scores), ("b", scores.transpose(0, 2, 1))):
        (tmp_path / name).mkdir()
        values.tofile(tmp_path / name / "attn_scores.raw")
    del scores
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for other in (a, b):
        found = peak("-m", "qwenref", "diff", a, other, "--model", str(TINY))
        assert found.status in (0, 1, 2)
        assert found.bytes <= interpreter + ALLOWED
