"""Measure honest roundings beside mistakes that they hide in 16 bits; for docs/benchmarks.md.

    python scripts/measure_hidden.py

An engine may round the mean of a norm's squares, the root or all its steps to 16 bits, or cut them
off; or the operands of lm_head to bfloat16 and its result to float16. Printed is how far that, and
the smallest mistakes, take the result from that of an engine that rounds results alone (relative
L2), how often `qwenref explain` blames the stage, and how far a row's common factor is from 1 at
most where it does not.
"""

from collections.abc import Callable, Set
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from qwenref.dumps.layout import LAYOUTS
from qwenref.mistakes.catalogue import MISTAKES
from qwenref.mistakes.mistake import Mistake, Setting
from qwenref.mistakes.norm import WEIGHT
from qwenref.model.formats import in_format, spacing
from qwenref.oracle import computing
from qwenref.planting import HEALTHY, Plant
from qwenref.selftest import LENGTHS, SHAPES, Cell, Field

NORMS, HEAD = ("ffn_norm", "final_norm"), ("lm_head",)
STEPS = frozenset({"square", "mean", "sum", "root", "normed"})

Run = Callable[[Setting], np.ndarray]


def _cut_off(values: np.ndarray, narrow: str) -> np.ndarray:
    nearest = in_format(values, narrow)
    beyond = np.abs(nearest) > np.abs(values)
    return np.where(beyond, nearest - np.sign(values) * spacing(values, narrow), nearest)


def _norm(narrow: str, points: Set[str]) -> Run:
    """Return a norm of which some steps are rounded; if the result is one of them, cut off."""
    to = _cut_off if "result" in points else in_format

    def run(s: Setting) -> np.ndarray:
        def rounded(point: str, values: np.ndarray) -> np.ndarray:
            return to(values, narrow) if point in points else values

        (x,) = s.given
        squares = rounded("square", np.square(x))
        mean = rounded("mean", squares.mean(axis=-1, keepdims=True))
        root = rounded("root", rounded("sum", mean + s.config.rms_norm_eps) ** -0.5)
        return rounded("result", rounded("normed", x * root) * s.tensor(WEIGHT[s.stage]))

    return run


def _head(s: Setting) -> np.ndarray:
    return s.right(in_format(s.given[0], "bfloat16"))


class Row(NamedTuple):
    """What is measured.

    Attributes:
        text: In words.
        dtype: What the engine computes in.
        stages: Where.
        run: What is honest; or the id of a mistake.
        value: Of a family of them.
    """

    text: str
    dtype: str
    stages: tuple[str, ...]
    run: Run | str
    value: float | None = None

    def plant(self, stage: str) -> Plant:
        """Return it as it is planted in a stage."""
        mistake = (
            next(of for of in MISTAKES if of.id == self.run)
            if isinstance(self.run, str)
            else Mistake("honest", self.stages, self.text, "", "", self.run)
        )
        return Plant(mistake, self.value, (stage,))


ROWS = [
    row
    for narrow in ("bfloat16", "float16")
    for row in (
        Row("norm: root rounded", narrow, NORMS, _norm(narrow, {"root"})),
        Row("norm: mean and root rounded", narrow, NORMS, _norm(narrow, {"mean", "root"})),
        Row("norm: every step rounded", narrow, NORMS, _norm(narrow, STEPS)),
        Row("norm: every step cut off", narrow, NORMS, _norm(narrow, STEPS | {"result"})),
        Row("*norm: eps 0.001*", narrow, NORMS, "norm-eps", 1e-3),
        Row("*norm: D - 1*", narrow, NORMS, "norm-one-less"),
        Row("*norm: standard deviation*", narrow, NORMS, "norm-variance"),
    )
]
ROWS += [
    Row("lm_head: operands in bfloat16", "float16", HEAD, _head),
    Row("*lm_head: capped at 30*", "float16", HEAD, "head-capped", 30.0),
]


class Outcome(NamedTuple):
    """What came of it: relative L2, the largest factor less 1, and whether the stage is blamed."""

    error: float
    factor: float
    blamed: bool


def _outcomes(row: Row, cell: Cell) -> list[Outcome]:
    found = []
    with TemporaryDirectory() as folder, computing("float64", "cpu"):
        field = Field(Path(folder) / "model", cell)
        for stage in row.stages:
            plant = row.plant(stage)
            ground, dump = field.ground(plant), Path(folder) / stage
            dump.mkdir()
            usual, other = (ground.grown(of)[0] for of in (HEALTHY, plant))
            right, values = (of[stage].astype(np.float64) for of in (usual, other))
            answer = field.explained(ground, other, dump, next(iter(LAYOUTS)))
            error = float(np.linalg.norm(values - right) / np.linalg.norm(right))
            factors = np.vecdot(right, values) / np.vecdot(right, right)
            found.append(Outcome(error, float(np.abs(factors - 1).max()), bool(answer.origins)))
    return found


def main() -> None:
    """Print a table; mistakes are in italics."""
    print("| engine | what | relative L2 | blamed | else, factor off by, at most |")
    print("|---|---|---|---|---|")
    for row in ROWS:
        cells = [Cell(shape, T, row.dtype) for shape in SHAPES for T in LENGTHS]
        found = [one for cell in cells for one in _outcomes(row, cell)]
        errors = [of.error for of in found]
        factors = [of.factor for of in found if not of.blamed]
        print(
            f"| {row.dtype} | {row.text} | {min(errors):.2%} to {max(errors):.2%} "
            f"| {len(found) - len(factors)} of {len(found)} "
            f"| {f'{max(factors):.2%}' if factors else '-'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
