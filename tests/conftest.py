"""What all tests share: shapes and types checked at every call, and the command line in-process."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from helpers import Cli, Result
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook("qwenref", "beartype.beartype")  # before the first import of qwenref
jax.config.update("jax_numpy_dtype_promotion", "strict")
settings.register_profile(
    "qwenref", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("qwenref")


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Cli]:
    """Run `qwenref ARGS` in this process, in an empty working directory, `tmp_path`/"cwd"."""
    from qwenref.cli import main

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["qwenref", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        code = exit_.value.code
        captured = capsys.readouterr()
        return Result(0 if code is None else int(code), str(captured.out), str(captured.err))

    yield run
    signal.signal(signal.SIGTERM, handler)
