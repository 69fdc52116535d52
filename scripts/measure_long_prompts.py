"""Measure how well the noise floor of a long prompt, made from 64 of its tokens, tells its errors.

    python scripts/measure_long_prompts.py --tokens 100 300 1000 3000

For random checkpoints and prompts, runs layer 0 in each dtype and prints, for each stage, the
error of the whole against the float64 truth, in units of its floor; and the worst of all slices.
Noise grows with the number of keys: that is where GROWTH in qwenref/noise.py comes from.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import qwenref
from qwenref.metrics import errors_of, for_all_tokens, sums_of, worst_of
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import read_attention, read_embedding
from qwenref.noise import noise_floor
from qwenref.stages import ATTENTION

SHAPES = {
    "tiny": Shape(84, 6, 2, 16, 1, 320, seed=1),
    "H=14, N=2": Shape(84, 2, 1, 16, 1, 320, head_dim=14, seed=2),
    "H=64": Shape(256, 4, 2, 16, 1, 320, seed=3),
}
DTYPES = ("float32", "float16", "bfloat16")


def ratios(directory: Path, T: int) -> Iterator[tuple[str, list[float], float]]:
    """Yield, by dtype: error / floor of each whole stage, and of the worst slice."""
    checkpoint = Checkpoint(directory)
    sizes = checkpoint.config.sizes
    tokens = np.random.default_rng(T).integers(0, 320, T).tolist()
    weights, _ = read_attention(checkpoint, 0)
    rows, _ = read_embedding(checkpoint, tokens)
    floor = noise_floor(checkpoint.config, weights, rows, ATTENTION)
    truth = qwenref.run(directory, tokens, dtype="float64")
    for dtype in DTYPES:
        run = qwenref.run(directory, tokens, dtype=dtype)
        wholes, worst = [], 0.0
        for stage in ATTENTION:
            exact, found = (getattr(of, stage.name).astype(np.float64) for of in (truth, run))
            errors = errors_of(stage, sums_of(stage, exact, found - exact, sizes["H"]), sizes)
            floors = floor.stages[stage.name].accumulated[dtype]
            judged = worst_of(errors, for_all_tokens(floors, floor.tokens, T))
            if judged is None:
                raise ValueError(f"{stage.name} has no floor in {dtype}")
            wholes.append((errors.whole or np.nan) / (floors.whole or np.nan))
            worst = max(worst, judged.ratio)
        yield dtype, wholes, worst


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 300, 1000, 3000])
    arguments = parser.parse_args()
    names = " ".join(f"{stage.name[-12:]:>12}" for stage in ATTENTION)
    print(f"{'shape':10} {'tokens':>6} {'dtype':8} {names} {'worst slice':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            write(Path(folder) / name, shape)
            for T in arguments.tokens:
                for dtype, wholes, worst in ratios(Path(folder) / name, T):
                    numbers = " ".join(f"{ratio:12.2f}" for ratio in wholes)
                    print(f"{name:10} {T:6} {dtype:8} {numbers} {worst:12.2f}")


if __name__ == "__main__":
    main()
