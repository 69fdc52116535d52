"""What the README and its neighbours say is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from qwenref.model.random_checkpoint import Shape, write

README = (ROOT / "README.md").read_text()
DIFF = (ROOT / "docs" / "diff.md").read_text()
EXPLAIN = (ROOT / "docs" / "explain.md").read_text()
TRANSCRIPT = r"```console\n\$ (.*)\n((?:.*\n)*?)```"
CAPTURE, WHOLE, COMPARISON, EXPLANATION = re.findall(TRANSCRIPT, README)
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "JAX_PLATFORMS": "cpu",
}
NUMBER = re.compile(r"-?\b[0-9]+(?:\.[0-9]+)?(?:e[-+][0-9]+)?\b")


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, shell=True, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )


def assert_shown(printed: str, shown: str, rel: float) -> None:
    assert NUMBER.sub("", printed).split() == NUMBER.sub("", shown).split()
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=rel)


@pytest.mark.parametrize(("command", "expected"), [CAPTURE, WHOLE])
def test_capture_prints_what_the_readme_shows(command: str, expected: str, tmp_path: Path) -> None:
    done = run(command, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    # floors have two digits, and how the last one is rounded is the machine's: 1.0 or 1.1
    assert_shown(done.stdout, expected, rel=0.11)


@pytest.mark.parametrize(("command", "expected"), [COMPARISON, *re.findall(TRANSCRIPT, DIFF)])
def test_diff_prints_what_the_docs_show_in_the_repository(
    command: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    assert run(CAPTURE[0], tmp_path).returncode == 0
    done = run(command, tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    lines = zip(done.stdout.splitlines(), expected.splitlines(), strict=True)
    for line, shown in lines:  # rounding, and where it is worst, is the machine's
        if line != shown and " agree " in line:
            line, shown = (text[:50] for text in (line, shown))
        assert_shown(line, shown, rel=0.5)


@pytest.mark.parametrize(("command", "expected"), [EXPLANATION, *re.findall(TRANSCRIPT, EXPLAIN)])
def test_explain_prints_what_the_docs_show_in_the_repository(
    command: str, expected: str, tmp_path: Path
) -> None:
    for name in ("tests", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    write(tmp_path / "tiny256", Shape(256, 4, 2, 512, 2, 320, seed=26))
    done = run(command, tmp_path)
    assert (done.returncode, done.stderr) == (int("FAULT" in expected), "")
    assert_shown(done.stdout, expected, rel=0.5)


@pytest.mark.parametrize("code", PYTHON)
def test_a_python_example_prints_what_its_comment_says(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)


def test_there_are_examples_to_check() -> None:
    assert len(PYTHON) == 1
    assert len(re.findall(TRANSCRIPT, DIFF)) == 1


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(r"^    (pip install .* && pytest)$", README, flags=re.MULTILINE)
    assert f"({command})" in (ROOT / ".ci" / "run").read_text()


OPTIONS = [("capture", option) for option in re.findall(r"`(--[a-z-]+)", README)]
OPTIONS += [("diff", option) for option in re.findall(r"`(--[a-z-]+)", DIFF)]


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_every_option_that_is_named_exists(command: str, option: str) -> None:
    done = run(f"{sys.executable} -m qwenref {command} --help", ROOT)
    assert re.search(rf"(?<![-\w]){option}(?![-\w])", done.stdout)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(map(str, (ROOT / "docs").glob("*")))]
)
def test_every_linked_file_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert all(((ROOT / page).parent / link).exists() for link in links)
