"""What all tests share: shapes and types checked at every call, and the command line in-process."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from beartype.claw import beartype_package
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

from qwenref.model.random_checkpoint import Shape, write

# Before the first import of qwenref. Where no shapes are annotated, types are checked without
# jaxtyping, at a tenth of the cost; but cli imports some names for type checkers alone, and only
# jaxtyping lets that pass.
install_import_hook(["qwenref.model", "qwenref.noise", "qwenref.cli"], "beartype.beartype")
beartype_package("qwenref")
jax.config.update("jax_numpy_dtype_promotion", "strict")
settings.register_profile(
    "qwenref", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("qwenref")

from helpers import Cli, Result  # noqa: E402 - imports qwenref
from processes import Start, starting  # noqa: E402

SMALL = Shape(84, 6, 2, intermediate_size=16, num_hidden_layers=2, vocab_size=320)


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs for the next run of the tests, apart from the user's."""
    os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir("programs"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Run `qwenref ARGS` in this process, in an empty working directory, `tmp_path`/"cwd"."""
    from qwenref.cli import command

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        status = command([*map(str, arguments)])
        captured = capsys.readouterr()
        return Result(status, str(captured.out), str(captured.err))

    return run


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the command in processes of its own."""
    with starting() as start:
        yield start


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Make SIGINT raise KeyboardInterrupt, even where it is ignored, as in background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def powerless() -> Iterator[None]:
    """Be nobody for a while, if we are root, whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, in one file and in four shards."""
    folder = tmp_path_factory.mktemp("originals")
    write(folder / "single", SMALL)
    write(folder / "sharded", SMALL, shard_bytes=60_000)
    return folder


@pytest.fixture(scope="session")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dumps of many engines, of the same prompt and weights, by name: see `engines`."""
    from engines import dumped_by_all  # imports torch

    return dumped_by_all(tmp_path_factory.mktemp("engines"))


@pytest.fixture
def make_fifo() -> Iterator[Callable[[Path], None]]:
    """Make FIFOs that nobody writes to, and fail if somebody waits for one all the same.

    A process that opens the FIFO after a minute lets him go; an alarm would not do, since the wait
    may be in a library that never returns to the interpreter.
    """
    helpers = []

    def make(path: Path) -> None:
        os.mkfifo(path)
        release = ["sh", "-c", 'sleep 60; exec 3<>"$0"', str(path)]
        helpers.append(subprocess.Popen(release, start_new_session=True))

    yield make
    waited = [helper for helper in helpers if helper.poll() is not None]
    for helper in helpers:
        if helper.poll() is None:
            os.killpg(helper.pid, signal.SIGKILL)
            helper.wait()
    assert not waited
