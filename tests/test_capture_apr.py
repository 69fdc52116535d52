"""scripts/capture_apr.sh with a stand-in for apr: what it asks for, and where the dump goes."""

import os
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT, TINY

import qwenref

DUMP = ROOT / "tests" / "data" / "apr-f32"

STAND_IN = """#!/usr/bin/env bash
set -eu
echo "$@" >> "$CALLS"
case $1 in
import) [[ $5 == -o ]] && echo model > "$6" ;;
trace) [[ -s $2 && $7 == --save-tensor-dir ]] && cp -r "$DUMP" "$8" && exit "$STATUS" ;;
esac
"""


@pytest.fixture
def apr(tmp_path: Path) -> dict[str, str]:
    """Make an `apr` that notes its arguments and gives a real dump; return the environment."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "apr"
    command.write_text(STAND_IN)
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    mine = {"PATH": path, "CALLS": str(tmp_path / "calls"), "DUMP": str(DUMP), "STATUS": "0"}
    return dict(os.environ) | mine


def capture_apr(env: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "capture_apr.sh"), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_dump_of_apr_trace_ends_up_where_it_is_wanted(
    apr: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "dumps" / "apr"
    done = capture_apr(apr, TINY, output, "0..2")
    assert (done.returncode, done.stderr) == (0, "")
    assert qwenref.read_aprt(output / "layer-0" / "attn_out.bin").layer == 0
    imported, traced = (tmp_path / "calls").read_text().splitlines()
    assert imported.startswith(f"import {TINY} --arch qwen2 -o ")
    assert "--save-tensor all --save-tensor-layers 0..2" in traced
    again = capture_apr(apr, TINY, output)
    assert again.returncode == 2
    assert "exists; give another output directory" in again.stderr


def test_a_trace_that_fails_leaves_nothing(apr: dict[str, str], tmp_path: Path) -> None:
    done = capture_apr(apr | {"STATUS": "3"}, TINY, tmp_path / "dumps" / "apr")
    assert done.returncode == 3
    assert not (tmp_path / "dumps").exists()


def test_without_apr_it_says_how_to_get_it(tmp_path: Path) -> None:
    done = capture_apr({"PATH": "/usr/bin:/bin"}, TINY, tmp_path / "apr")
    assert done.returncode == 2
    assert "apr is not on PATH; install it" in done.stderr
