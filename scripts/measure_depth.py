"""Measure how well the generic floor tells the errors of layers above 0.

    python scripts/measure_depth.py --layers 24

Runs transformers' Qwen2 in float16 and bfloat16 on random checkpoints, compares each stage of each
layer with float32, and prints (error / floor) of whole stages: smallest, median, largest; that is
where the growth with depth in `qwenref.judge.floors.generic_floors` comes from.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from capture_hf import load, stages_of
from transformers.utils import logging

from qwenref.judge.floors import generic_floors
from qwenref.model.config import read_config
from qwenref.model.random_checkpoint import Shape, write
from qwenref.stages import ATTENTION

T = 30
SEEDS = (3, 4)


def ratios(directory: Path, dtype: str, layers: int) -> np.ndarray:
    """Return error / floor of whole stages: [layers, stages]."""
    tokens = np.random.default_rng(0).integers(0, 320, T).tolist()
    every = range(layers)
    exact, rounded = (
        stages_of(load(directory, of, layers - 1), tokens, every) for of in ("float32", dtype)
    )
    sizes = read_config(directory / "config.json").sizes
    found = np.zeros((layers, len(ATTENTION)))
    for layer in every:
        scores = exact[layer]["attn_scores"][:, *np.tril_indices(T)]
        rms = float(np.sqrt(np.mean(np.square(scores))))
        for number, stage in enumerate(ATTENTION):
            a, b = (np.float64(of[layer][stage.name]) for of in (exact, rounded))
            if stage.masked:
                a, b = np.tril(a), np.tril(b)
            floor = generic_floors(layer, stage.name, sizes, T, rms)[dtype].whole or np.nan
            found[layer, number] = np.linalg.norm(a - b) / np.linalg.norm(a) / floor
    return found


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=24)
    layers = parser.parse_args().layers
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            directory = Path(folder) / str(seed)
            write(directory, Shape(84 * (seed - 2), 6, 2, 152, layers, 320, seed=seed))
            for dtype in ("float16", "bfloat16"):
                found = ratios(directory, dtype, layers)
                numbers = [f"{q(found[1:]):.2f}" for q in (np.min, np.median, np.max)]
                print(f"seed {seed}, {dtype}: {', '.join(numbers)}")


if __name__ == "__main__":
    main()
