"""The command line: parse, call one function, print, exit.

Exit status: 0 done, 1 the dumps differ, a stage is wrong, the self-test is not met, or nobody reads
the output any more, 2 trouble, 130 interrupted.
"""

import gc
import os
import signal
import sys
from contextlib import suppress
from typing import Annotated

import typer

import qwenref
from qwenref.cli.capture import capture
from qwenref.cli.diff import diff
from qwenref.cli.explain import explain
from qwenref.cli.selftest import selftest
from qwenref.errors import QwenrefError, printable
from qwenref.files import reason

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(capture)
app.command()(diff)
app.command()(explain)
app.command()(selftest)


def main() -> None:
    """Run the command line as a process of its own, and exit."""
    gc.disable()  # nothing to gain in so short a life; importing JAX takes a sixth less without
    while os.open(os.devnull, os.O_RDWR) <= 2:  # a standard stream was closed: else a stage file
        pass  # gets its number, and with it what libraries write there
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    status = command(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done but for taking the process down
    gc.freeze()  # else the interpreter spends a quarter of a second on a last search for garbage
    sys.exit(status)


def command(arguments: list[str]) -> int:
    """Run the command line; trouble is one line on standard error. Return the exit status."""
    try:
        return app(arguments or ["--help"], standalone_mode=False) or 0
    except typer.TyperException as error:
        return _trouble(error.format_message())
    except QwenrefError as error:
        return _trouble(str(error))
    except OSError as error:  # all others are QwenrefErrors
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
        return _trouble(f"cannot print: {reason(error)}")


def _trouble(message: str) -> int:
    with suppress(OSError):
        typer.echo(f"qwenref: error: {printable(message)}", err=True)
    return 2


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"qwenref {qwenref.__version__}")
        raise typer.Exit
    return asked


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compute Qwen2.5 independently, stage by stage, to judge other engines by it."""
