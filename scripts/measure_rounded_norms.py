"""Measure what norms whose steps are rounded look like beside mistakes; for docs/benchmarks.md.

    python scripts/measure_rounded_norms.py

An engine may round the mean of the squares, the root or all steps to 16 bits, or cut them off.
Printed is how far that, and the smallest mistakes, take the result from that of a norm of which the
result alone is rounded (relative L2), how often `qwenref explain` blames the stage, and how far a
row's common factor is from 1 at most where it does not.
"""

from collections.abc import Callable, Set
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from qwenref.dumps.layout import LAYOUTS
from qwenref.mistakes.catalogue import MISTAKES
from qwenref.mistakes.mistake import Mistake, Setting
from qwenref.mistakes.norm import WEIGHT
from qwenref.model.formats import in_format, spacing
from qwenref.oracle import computing
from qwenref.planting import HEALTHY, Plant
from qwenref.selftest import LENGTHS, SHAPES, Cell, Field
from qwenref.trial.dialects import NARROW

STAGES = ("ffn_norm", "final_norm")

STEPS = frozenset({"square", "mean", "sum", "root", "normed"})
HONEST = {
    "root rounded": {"root"},
    "mean and root rounded": {"mean", "root"},
    "every step rounded": STEPS,
    "every step cut off": STEPS | {"result"},
}
MISTAKEN = {
    "eps 0.001": ("norm-eps", 1e-3),
    "D - 1": ("norm-one-less", None),
    "standard deviation": ("norm-variance", None),
}


def _cut_off(values: np.ndarray, narrow: str) -> np.ndarray:
    nearest = in_format(values, narrow)
    beyond = np.abs(nearest) > np.abs(values)
    return np.where(beyond, nearest - np.sign(values) * spacing(values, narrow), nearest)


def _rounding(narrow: str, points: Set[str]) -> Callable[[Setting], np.ndarray]:
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


def _plant(what: str, stage: str, narrow: str) -> Plant:
    if what in HONEST:
        run = _rounding(narrow, HONEST[what])
        return Plant(Mistake("rounded", STAGES, what, "", "", run), None, (stage,))
    id_, value = MISTAKEN[what]
    (mistake,) = (of for of in MISTAKES if of.id == id_)
    return Plant(mistake, value, (stage,))


def _measured(cell: Cell, what: str) -> list[tuple[float, float, bool]]:
    """Return of each norm: relative L2, the largest factor less 1, and whether it is blamed."""
    found = []
    with TemporaryDirectory() as folder, computing("float64", "cpu"):
        field = Field(Path(folder) / "model", cell)
        for stage in STAGES:
            plant = _plant(what, stage, cell.dtype)
            ground, dump = field.ground(plant), Path(folder) / stage
            dump.mkdir()
            usual, other = (ground.grown(of)[0] for of in (HEALTHY, plant))
            right, values = (of[stage].astype(np.float64) for of in (usual, other))
            answer = field.explained(ground, other, dump, next(iter(LAYOUTS)))
            factors = np.vecdot(right, values) / np.vecdot(right, right)
            off = float(np.linalg.norm(values - right) / np.linalg.norm(right))
            found.append((off, float(np.abs(factors - 1).max()), stage in answer.origins))
    return found


def main() -> None:
    """Print a table."""
    print("| engine | norm | relative L2 | blamed | else, factor off by, at most |")
    print("|---|---|---|---|---|")
    for narrow in NARROW:
        for what in (*HONEST, *MISTAKEN):
            cells = [Cell(shape, T, narrow) for shape in SHAPES for T in LENGTHS]
            found = [one for cell in cells for one in _measured(cell, what)]
            errors = [of[0] for of in found]
            innocent = [factor for _, factor, blamed in found if not blamed]
            print(
                f"| {narrow} | {what} | {min(errors):.2%} to {max(errors):.2%} "
                f"| {len(found) - len(innocent)} of {len(found)} "
                f"| {f'{max(innocent):.2%}' if innocent else '-'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
