"""Compiled programs are kept, and whatever happens to them is nobody's trouble."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from processes import QUICK, Outcome, Start, ended, snapshot, starting

from qwenref import programs

CAPTURE = (*QUICK, "-q", "-o", "out", "--force")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory after one capture."""
    home = tmp_path_factory.mktemp("home")
    with starting() as start:
        assert run(start, home) == Outcome(0, "", "")
    return home


@pytest.fixture
def home(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "home"))


def run(start: Start, home: Path, **environment: str) -> Outcome:
    done = ended(start(home, *CAPTURE, env={"XDG_CACHE_HOME": f"{home}/cache", **environment}))
    assert done.status == 0
    return done


def store(home: Path) -> Path:
    (folder,) = (home / "cache" / "qwenref" / "programs").iterdir()
    return folder


def entries(home: Path) -> list[Path]:
    return sorted(store(home).iterdir())


def test_the_second_run_compiles_nothing(home: Path, start: Start) -> None:
    kept = snapshot(store(home))
    assert kept
    assert all(name.startswith("jit_") for name in kept)
    done = run(start, home, JAX_LOG_COMPILES="1")
    assert done.err.count("Persistent compilation cache hit") == len(kept)
    assert "PERSISTENT COMPILATION CACHE MISS" not in done.err
    assert snapshot(store(home)) == kept


def test_values_do_not_depend_on_it(home: Path, start: Start) -> None:
    found = snapshot(home / "out")
    run(start, home)
    assert snapshot(home / "out") == found
    run(start, home, QWENREF_CACHE="off")
    assert snapshot(home / "out") == found


def spoil(entry: Path, how: str) -> None:
    if how == "truncated":
        os.truncate(entry, entry.stat().st_size // 2)
    elif how == "empty":
        entry.write_bytes(b"")
    elif how == "another program":
        entry.write_bytes(entry.read_bytes()[::-1])
    elif how == "a link to nothing":
        entry.unlink()
        entry.symlink_to("nowhere")
    else:  # as if JAX had not noticed that the disk is full
        broken = entry.with_name("broken")
        broken.write_bytes(entry.read_bytes()[:-100])
        name, _, _ = entry.name.rpartition(".")
        entry.unlink()
        broken.rename(entry.with_name(f"{name}.{programs._digest(broken)}"))


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "another program", "a link to nothing", "written so"]
)
def test_a_broken_entry_is_deleted_in_silence(how: str, home: Path, start: Start) -> None:
    names, found = [entry.name for entry in entries(home)], snapshot(home / "out")
    spoil(entries(home)[0], how)
    assert run(start, home) == Outcome(0, "", "")
    assert snapshot(home / "out") == found
    run(start, home)
    assert [name.split(".")[0] for name in names] == [
        entry.name.split(".")[0] for entry in entries(home)
    ]
    done = run(start, home, JAX_LOG_COMPILES="1")
    assert done.err.count("Persistent compilation cache hit") == len(names)


def test_it_can_be_switched_off(tmp_path: Path, start: Start) -> None:
    run(start, tmp_path, QWENREF_CACHE="off")
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_the_user_gave_to_jax_is_left_to_jax(tmp_path: Path, start: Start) -> None:
    own = {"JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/own"}
    run(start, tmp_path, **own, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert not (tmp_path / "cache").exists()
    assert [*(tmp_path / "own").iterdir()]


def test_without_a_place_for_it_nothing_is_kept(tmp_path: Path, start: Start) -> None:
    (tmp_path / "cache").write_text("a file")
    assert run(start, tmp_path) == Outcome(0, "", "")


def test_a_folder_that_others_write_to_is_not_trusted(home: Path, start: Start) -> None:
    store(home).chmod(0o777)
    done = run(start, home, JAX_LOG_COMPILES="1")
    assert "Persistent compilation cache hit" not in done.err


def test_a_killed_process_leaves_no_entry(tmp_path: Path, start: Start) -> None:
    environment = {"XDG_CACHE_HOME": f"{tmp_path}/cache"}
    killed = start(tmp_path, *CAPTURE, at="open ", send=signal.SIGKILL, env=environment)
    assert ended(killed).status == -signal.SIGKILL
    (left,) = entries(tmp_path)
    assert left.name.startswith(programs.OWN)
    assert [*left.iterdir()]
    shutil.rmtree(tmp_path / "out")
    run(start, tmp_path)
    assert left.exists()  # it may be at work
    two_days_ago = time.time() - 2 * programs.A_DAY
    os.utime(left, (two_days_ago, two_days_ago))
    run(start, tmp_path)
    assert not left.exists()


def test_the_oldest_go_when_there_are_too_many(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"{home}/cache")
    monkeypatch.setattr(programs, "MOST", 2)
    for age in range(4):
        (store(home) / "new").write_bytes(b"%d" % age)
        digest = programs._digest(store(home) / "new")
        entry = (store(home) / "new").rename(store(home) / f"jit_{age}-cache.{digest}")
        os.utime(entry, (time.time() + 100 - age, time.time() + 100 - age))
    opened = programs._Store.opened()
    assert opened is not None
    assert {"jit_0-cache", "jit_3-cache"} <= {path.name for path in opened.own.iterdir()}
    opened.close()
    assert [entry.name.split(".")[0] for entry in entries(home)] == ["jit_0-cache", "jit_1-cache"]
