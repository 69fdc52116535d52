"""What the benchmark says of processes is true, and its command works."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from measured import forget, measure

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench.py"
TAKES_200_MB = "held = bytearray(200_000_000)"
STARTS_ANOTHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{TAKES_200_MB}'])"


def test_memory_is_that_of_the_whole_tree() -> None:
    bare = measure([sys.executable, "-c", ""]).peak
    assert 5e6 <= bare <= 50e6
    alone = measure([sys.executable, "-c", TAKES_200_MB]).peak
    assert bare + 190e6 <= alone <= bare + 210e6
    parent = measure([sys.executable, "-c", STARTS_ANOTHER]).peak
    assert alone + 5e6 <= parent <= alone + 50e6


def test_bytes_that_are_read_and_those_that_are_loaded(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(20_000_000))
    cached = measure(["cat", str(file)])
    assert 20_000_000 <= cached.read <= 20_100_000
    assert cached.loaded <= 1_000_000
    forget(file)
    assert measure(["cat", str(file)]).read >= 20_000_000


def test_another_exit_status_is_an_error() -> None:
    with pytest.raises(subprocess.CalledProcessError) as raised:
        measure([sys.executable, "-c", "raise SystemExit('what it said')"])
    assert b"what it said" in raised.value.stderr
    assert measure(["false"], status=1).seconds > 0


def test_the_command() -> None:
    command = [sys.executable, str(SCRIPT), "--only", "diff", "--repeats", "1", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert found["versions"]["jax"]
    assert len(found["results"]) == 3
    for result in found["results"]:
        for runs in result["runs"].values():
            (run,) = runs
            assert run["seconds"] > 0
            assert run["peak"] > 1e6
