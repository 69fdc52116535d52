"""Measure how small a mistake may be that `qwenref explain` still sees; for docs/faults.md.

    python scripts/measure_smallest.py --tokens 2 7 40 64

Planted in the first model of `qwenref selftest`, ever smaller by a third of a decade, from what is
surely seen until it is not; printed is the smallest that was seen, in steps. Results are written to
docs/smallest.json, which scripts/write_faults.py takes.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qwenref.mistakes.catalogue import MISTAKES
from qwenref.mistakes.mistake import CannotBe, Mistake, Setting
from qwenref.oracle import computing
from qwenref.planting import Plant
from qwenref.selftest import SHAPES, Cell, Field

RESULT = Path(__file__).resolve().parents[1] / "docs" / "smallest.json"

STEPS = 3
"""Sizes that are tried within a decade."""


def _known(name: str, value: Callable[[float], float]) -> Callable[[float], Plant]:
    """Return mistakes of a family whose value follows from how large they are."""
    (mistake,) = (of for of in MISTAKES if of.id == name)
    return lambda size: Plant(mistake, value(size), mistake.stages)


def _own(stage: str, run: Callable[[Setting, float], np.ndarray]) -> Callable[[float], Plant]:
    """Return mistakes that are in no list."""

    def plant(size: float) -> Plant:
        mistake = Mistake("own", (stage,), "", "", "", lambda s: run(s, size))
        return Plant(mistake, None, (stage,))

    return plant


def _row(s: Setting, size: float) -> np.ndarray:
    """Change one row of the weights by a part of itself: 2 negates it."""
    values = s.right(*s.given).copy()
    values[:, 3] *= 1 - size
    return values


def _element(s: Setting, size: float) -> np.ndarray:
    """Change one value by a part of the root mean square."""
    values = s.right(*s.given).copy()
    values.reshape(-1)[-1] += size * np.sqrt(np.mean(np.square(values)))
    return values


FAMILIES: dict[str, tuple[Callable[[float], Plant], float]] = {
    "eps 1e-6 times 1 + x in the norm": (_known("norm-eps", lambda x: 1e-6 * (1 + x)), 1e4),
    "rope_theta 1e6 times 1 + x": (_known("rope-theta", lambda x: 1e6 * (1 + x)), 1e3),
    "positions times 1 + x": (_known("rope-scaled", lambda x: 1 + x), 10.0),
    "softmax of scores times 1 + x": (_known("softmax-temperature", lambda x: 1 + x), 10.0),
    "one weight row of q times 1 - x": (_own("qkv_matmul", _row), 10.0),
    "one weight row of the output times 1 - x": (_own("attn_out", _row), 10.0),
    "one value of qkv_bias off by x rms": (_own("qkv_bias", _element), 100.0),
    "one value of attention off by x rms": (_own("attention", _element), 100.0),
}
"""By what they are: mistakes, and the largest x that is tried."""

LISTED = (
    ("norm-eps", 0.0, "eps 0 instead of 1e-6"),
    ("norm-eps-outside", None, "eps added to the root"),
    ("norm-mean-subtracted", None, "the mean subtracted in the norm"),
    ("norm-one-less", None, "divided by D - 1 in the norm"),
    ("rope-first-pairs", 0.75, "only 75% of RoPE's pairs rotated"),
    ("rope-llama3", None, "RoPE's frequencies scaled as Llama 3.1 does"),
    ("scores-capped", 50.0, "scores capped softly at 50"),
)
"""Mistakes that the matched filter knows: id, value, in words."""


def seen(field: Field, plant: Plant) -> str:
    """Return how a mistake is found: ``seen``, ``hidden`` below the noise, or ``no``."""
    ground = field.ground(plant)
    arrays, _ = ground.grown(plant)
    with tempfile.TemporaryDirectory() as folder:
        answer = field.explained(ground, arrays, Path(folder), "hf")
    if not answer.origins:
        return "no"
    return "hidden" if any(of.hidden for of in answer.stages) else "seen"


def smallest(field: Field, make: Callable[[float], Plant], largest: float) -> float | None:
    """Return the smallest size that is still found, of all that are larger; None: none is."""
    found = None
    for step in itertools.count():
        size = largest * 10 ** (-step / STEPS)
        if size < 1e-9 or seen(field, make(size)) == "no":
            return found
        found = size
    raise AssertionError


def main() -> None:
    """Parse the command line, plant, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 7, 40, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    result: dict[str, Any] = {"tokens": options.tokens, "smallest": {}, "listed": {}}
    for dtype, T in itertools.product(options.dtypes, options.tokens):
        with tempfile.TemporaryDirectory() as folder, computing("float64", "cpu"):
            field = Field(Path(folder) / "model", Cell(next(iter(SHAPES)), T, dtype))
            for text, (make, largest) in FAMILIES.items():
                size = smallest(field, make, largest)
                result["smallest"].setdefault(f"{text}, {dtype}", []).append(size)
                print(T, dtype, text, size, flush=True)
            for name, value, text in LISTED:
                (mistake,) = (of for of in MISTAKES if of.id == name)
                try:
                    how = seen(field, Plant(mistake, value, mistake.stages))
                except CannotBe:
                    how = "-"
                result["listed"].setdefault(f"{text}, {dtype}", []).append(how)
                print(T, dtype, text, how, flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
