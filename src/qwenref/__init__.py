"""An independent JAX oracle for Qwen2.5.

`run` computes the nine stages of layer 0's attention in memory; the command `qwenref capture`
writes them, or every stage of every layer, as files. `diff` compares dumps of any engine, as the
command `qwenref diff` does; in tests, `assert_stages_close` asserts that they agree. `explain` and
`explain_layers` ask one engine alone. Importing this package imports neither jax nor numpy; using a
name does.
"""

from typing import TYPE_CHECKING

from qwenref.errors import QwenrefError

if TYPE_CHECKING:
    from qwenref.dumps.aprt import read_aprt as read_aprt
    from qwenref.dumps.aprt import write_aprt as write_aprt
    from qwenref.judge.diff import assert_stages_close as assert_stages_close
    from qwenref.judge.diff import diff as diff
    from qwenref.oracle import Stages as Stages
    from qwenref.oracle import run as run
    from qwenref.trial.explain import explain as explain
    from qwenref.trial.explain import explain_layers as explain_layers

__version__ = "0.1.0"
__all__ = [
    "QwenrefError",
    "Stages",
    "assert_stages_close",
    "diff",
    "explain",
    "explain_layers",
    "read_aprt",
    "run",
    "write_aprt",
]

_HOMES = {
    "Stages": "qwenref.oracle",
    "assert_stages_close": "qwenref.judge.diff",
    "diff": "qwenref.judge.diff",
    "explain": "qwenref.trial.explain",
    "explain_layers": "qwenref.trial.explain",
    "read_aprt": "qwenref.dumps.aprt",
    "run": "qwenref.oracle",
    "write_aprt": "qwenref.dumps.aprt",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
