"""Names that many tests need."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "weights" / "tiny-qwen2.5"


class Result(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


Cli = Callable[..., Result]
"""The fixture `cli`."""
