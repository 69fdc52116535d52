"""Dumps of other engines: real ones from tests/data, and what transformers computes just now."""

from argparse import Namespace
from pathlib import Path

import capture_hf
from helpers import ROOT, TINY

from qwenref.capture import capture
from qwenref.judge.floors import PRECISIONS
from qwenref.model.tokens import DEFAULT_PROMPT

DATA = ROOT / "tests" / "data"
FAULTY = ("apr-rope-interleaved", "llama-theta-1e4")

Dumps = dict[str, Path]
"""Dump directories by name: ``ours``, ``hf-DTYPE-LAYOUT``, and those of tests/data."""


def captured_from_hf(
    output: Path, *, dtype: str = "float32", layout: str = "apr", layers: str = "0"
) -> Path:
    """Let transformers compute the bundled checkpoint's default prompt."""
    options = {"model": TINY, "prompt": DEFAULT_PROMPT, "tokens": None, "force": False}
    more = {"dtype": dtype, "layout": layout, "layers": layers, "stages": "attention"}
    capture_hf.capture(Namespace(**options, **more, output=output))
    return output


def dumped_by_all(folder: Path) -> Dumps:
    """Return ours, those of transformers in three dtypes and two layouts, and all of tests/data."""
    capture(TINY, folder / "ours")
    for dtype in PRECISIONS:
        for layout in ("apr", "hf"):
            captured_from_hf(folder / f"hf-{dtype}-{layout}", dtype=dtype, layout=layout)
    return {path.name: path for path in (*folder.iterdir(), *DATA.iterdir())}
