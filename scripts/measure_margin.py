"""Measure how far honest computations exceed the noise floor: where MARGIN comes from.

    python scripts/measure_margin.py --engines 16       768 of each class; about ten minutes

Draws engines (scripts/honest_engines.py) on random checkpoints of eight shapes, and prints, by
precision class, quantiles of (error / floor) over engines and stages, each the worst of all slices
(whole, blocks, heads, tokens, element): of chains against the truth, of two chains against each
other, and of single stages from exact inputs.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from honest_engines import HonestEngine, draw_habits

from qwenref.dumps.manifest import Noise
from qwenref.metrics import errors_of, for_all_tokens, sums_of, worst_of
from qwenref.model.attention import Attention
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.precision import PRECISIONS
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import AttentionWeights, read_attention, read_embedding
from qwenref.noise import CLASSES, noise_floor
from qwenref.stages import ATTENTION, RESIDUAL, Stage

QUANTILE = 1 - 1e-4
TOKENS = (1, 2, 7, 24, 65, 200)


@dataclass(frozen=True)
class Case:
    """A random checkpoint; Qwen2.5 has K biases of about 100 in some channels."""

    shape: Shape
    stored: str = "bfloat16"
    huge_biases: bool = False


BASE = Shape(84, 6, 2, 16, 1, 320, seed=1)
CASES = {
    "N=2": Case(Shape(28, 2, 1, 16, 1, 320, seed=1)),
    "float32 weights": Case(replace(BASE, seed=2), "float32"),
    "K=N": Case(Shape(60, 5, 5, 16, 1, 320, seed=3)),
    "K=1, N*H>D": Case(Shape(96, 5, 1, 16, 1, 320, head_dim=26, seed=4), "float16"),
    "G=5, theta 1e4": Case(Shape(320, 10, 2, 16, 1, 320, rope_theta=1e4, seed=5), "float32"),
    "D=896": Case(Shape(896, 14, 2, 16, 1, 320, seed=6)),
    "H=128": Case(Shape(512, 4, 2, 16, 1, 320, head_dim=128, seed=7)),
    "K biases of 100": Case(replace(BASE, seed=8), huge_biases=True),
}


class Ratio(NamedTuple):
    """The worst (error / floor) of all slices of a stage, and where it was found."""

    value: float
    kind: str
    precision: str
    where: str


class Prompt:
    """A prompt: its truth, its floor, and how engines compare with them."""

    def __init__(self, name: str, case: Case, directory: Path, T: int, seed: int):
        """Compute the truth and the floor."""
        checkpoint = Checkpoint(directory)
        self.name = f"{name}, T={T}"
        self.config = checkpoint.config
        self.weights = weights_of(checkpoint, case)
        tokens = np.random.default_rng(seed).integers(0, 320, T).tolist()
        rows, _ = read_embedding(checkpoint, tokens)
        self.rows = rows.astype(np.float32)
        self.floor: Noise = noise_floor(self.config, self.weights, rows, ATTENTION)
        with jax.enable_x64(True):
            self.exact = Attention(self.config, self.weights, PRECISIONS["float64"])
            self.truth = {RESIDUAL: rows.astype(np.float64)}
            self.alone = {}  # stages computed from the truth as float32 arrays hold it
            for stage in ATTENTION:
                method = getattr(self.exact, stage.name)
                inputs = [self.truth[name] for name in stage.computed_from]
                self.truth[stage.name] = np.asarray(method(*inputs))
                held = [x.astype(np.float32).astype(np.float64) for x in inputs]
                self.alone[stage.name] = np.asarray(method(*held))

    def ratios(self, precision: str, engines: int, rng: np.random.Generator) -> Iterator[Ratio]:
        """Compare engines of one class with the truth, and each with the next one."""
        before = None
        for _ in range(engines):
            engine = HonestEngine(self.config, self.weights, draw_habits(rng, precision))
            chain = engine.chain(self.rows)
            for stage in ATTENTION:
                yield self._ratio(stage, "chain", precision, chain[stage.name])
                if before is not None:
                    other = before[stage.name].astype(np.float64)
                    moved = self.truth[stage.name] + (chain[stage.name] - other)
                    yield self._ratio(stage, "pair", precision, moved)
                inputs = [self.truth[name].astype(np.float32) for name in stage.computed_from]
                alone = engine.dumped(stage.name, getattr(engine, stage.name)(*inputs))
                moved = self.truth[stage.name] + (alone - self.alone[stage.name])
                yield self._ratio(stage, "local", precision, moved)
            before = chain

    def _ratio(self, stage: Stage, kind: str, precision: str, array: np.ndarray) -> Ratio:
        truth, sizes = self.truth[stage.name], self.config.sizes
        found = errors_of(stage, sums_of(stage, truth, array - truth, sizes["H"]), sizes)
        noise = self.floor.stages[stage.name]
        floors = (noise.local if kind == "local" else noise.accumulated)[precision]
        every = for_all_tokens(floors, self.floor.tokens, len(self.rows))
        worst = worst_of(found, every)
        if worst is None:  # counted as 0, it would pass for an honest one
            raise ValueError(f"{stage.name} has no floor in {precision}; {self.name}")
        place = f"{stage.name}, {worst.slice} {worst.which}; {self.name}"
        return Ratio(worst.ratio, kind, precision, place)


def weights_of(checkpoint: Checkpoint, case: Case) -> AttentionWeights:
    """Return the weights of layer 0 of a case."""
    weights, _ = read_attention(checkpoint, 0)
    if case.huge_biases:
        np.asarray(weights.q_bias)[:] *= 3
        np.asarray(weights.k_bias)[[1, 5, 9, 13, 16, 20, 23, 26]] = [100, -100] * 4
    return weights


def prompts() -> Iterator[Prompt]:
    """Yield the prompts of all cases."""
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            directory = Path(folder) / name
            write(directory, case.shape, dtype=case.stored)
            for T in TOKENS:
                yield Prompt(name, case, directory, T, seed=T)


def table(ratios: Mapping[tuple[str, str], list[Ratio]]) -> Iterator[str]:
    """Yield the lines of the table."""
    heads = f"{'stages':>8}{'median':>8}{'.99':>7}{'1-1e-4':>8}{'most':>7}"
    yield f"{'class':18}{'kind':7}{heads}  where"
    for (precision, kind), found in ratios.items():
        values = [ratio.value for ratio in found]
        quantiles = np.quantile(values, [0.5, 0.99, QUANTILE, 1])
        numbers = "".join(
            f"{q:{width}.2f}" for q, width in zip(quantiles, (8, 7, 8, 7), strict=True)
        )
        yield f"{precision:18}{kind:7}{len(found):8}{numbers}  {max(found).where}"


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--engines", type=int, default=16, help="of each class, for each prompt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    ratios: dict[tuple[str, str], list[Ratio]] = {}
    for prompt in prompts():
        for precision in CLASSES:
            for ratio in prompt.ratios(precision, arguments.engines, rng):
                ratios.setdefault((ratio.precision, ratio.kind), []).append(ratio)
    print("\n".join(table(dict(sorted(ratios.items())))))
    every = np.array([ratio.value for found in ratios.values() for ratio in found])
    print(f"MARGIN, the {QUANTILE} quantile of {every.size}: {np.quantile(every, QUANTILE):.2f}")


if __name__ == "__main__":
    main()
