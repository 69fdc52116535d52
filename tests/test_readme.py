"""What the README and its neighbours say is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TINY

from qwenref.capture import capture
from qwenref.stages import ATTENTION

README = (ROOT / "README.md").read_text()
TRANSCRIPTS = re.findall(r"```console\n\$ (.*)\n((?:.*\n)*?)```", README)
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "JAX_PLATFORMS": "cpu",
}


@pytest.mark.parametrize(("command", "expected"), TRANSCRIPTS)
def test_a_transcript_is_what_the_command_prints(
    command: str, expected: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == expected


@pytest.mark.parametrize("code", PYTHON)
def test_a_python_example_prints_what_its_comment_says(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [f"# {line}" for line in done.stdout.splitlines()] == re.findall(r"# \S+(?=:)", code)


def test_the_comparison_in_the_docs_finds_two_engines_in_agreement(tmp_path: Path) -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "dump.md").read_text(), flags=re.DOTALL
    )
    (tmp_path / "dumps").mkdir()
    (tmp_path / "dumps" / "apr").symlink_to(ROOT / "tests" / "data" / "apr-f32")
    capture(TINY, tmp_path / "dumps" / "ref", device="cpu")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    errors = dict(line.split() for line in done.stdout.splitlines())
    assert list(errors) == [stage.name for stage in ATTENTION]
    assert all(float(error) < 1e-6 for error in errors.values())


def test_there_are_examples_to_check() -> None:
    assert len(TRANSCRIPTS) == 1
    assert len(PYTHON) == 1


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(r"^    (pip install .* && pytest)$", README, flags=re.MULTILINE)
    assert f"({command})" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("option", re.findall(r"`(--[a-z-]+)", README))
def test_every_option_the_readme_names_exists(option: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qwenref", "capture", "--help"], capture_output=True, text=True
    )
    assert re.search(rf"(?<![-\w]){option}(?![-\w])", done.stdout)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(map(str, (ROOT / "docs").glob("*")))]
)
def test_every_linked_file_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert all(((ROOT / page).parent / link).exists() for link in links)
