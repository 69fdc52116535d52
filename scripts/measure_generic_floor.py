"""Measure how much error is normal where no manifest tells it: writes judge/generic_floor.json.

    python scripts/measure_generic_floor.py         about two minutes, 5 GB

Computes the noise floor of random checkpoints and prompts, the shapes of the family and the odd
ones of scripts/measure_margin.py, for prompts of up to some lengths. Of a head, a token or an
element the largest of these floors is kept. Of a whole stage or a block it is the median, but at
least half the largest: since whole stages are seldom more than one floor off, MARGIN covers the
rest, and the largest would call bfloat16 operands float16.

Scores that are larger let more of their error through the softmax, in proportion; so floors from
attn_softmax on are kept for scores of an rms of at most SCORES_RMS, and whoever uses them
multiplies.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import msgspec
import numpy as np
from measure_margin import CASES, Case, weights_of

from qwenref.chain import Layer, layer_pieces
from qwenref.judge.floors import AFTER_SOFTMAX, GENERIC_FILE, PRECISIONS, Generic, SliceFloors, UpTo
from qwenref.metrics import Errors
from qwenref.model import precision
from qwenref.model.attention import Attention
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import AttentionWeights, read_embedding
from qwenref.noise import noise_floor
from qwenref.stages import ATTENTION, BY_NAME

FAMILY = {
    "0.5B": Case(Shape(896, 14, 2, 16, 1, 320, seed=1)),
    "7B": Case(Shape(3584, 28, 4, 16, 1, 320, seed=2)),
    "72B": Case(Shape(8192, 64, 8, 16, 1, 320, seed=3)),
}
LENGTHS = {64: (2, 12, 64), 2048: (2048,), 32768: (32768,)}
"""Prompts that are computed, by the most tokens that they stand for."""

SCORES_RMS = 4.0
"""About that of the checkpoints made by the recipe of scripts/make_tiny_checkpoint.py."""


def floors_of(case: Case, directory: Path) -> Iterator[tuple[int, str, str, SliceFloors]]:
    """Yield (most tokens, stage, class, floors) of one checkpoint."""
    write(directory, case.shape, dtype=case.stored)
    checkpoint = Checkpoint(directory)
    weights = weights_of(checkpoint, case)
    rng = np.random.default_rng(0)
    for most, lengths in LENGTHS.items():
        growth = 1.0
        for T in lengths:
            rows, _ = read_embedding(checkpoint, rng.integers(0, 320, T).tolist())
            noise = noise_floor(checkpoint.config, weights, rows, ATTENTION)
            growth = max(1.0, scores_rms(checkpoint, weights, rows[:64]) / SCORES_RMS)
            for stage in ATTENTION:
                for name in PRECISIONS:
                    errors = noise.stages[stage.name].accumulated[name]
                    by = growth if stage.name in AFTER_SOFTMAX else 1.0
                    yield most, stage.name, name, largest(errors, by)
        print(f"{directory.name}, {most} tokens: scores {growth * SCORES_RMS:.1f}", flush=True)


def scores_rms(checkpoint: Checkpoint, weights: AttentionWeights, rows: np.ndarray) -> float:
    """Return the root mean square of the scores that a query sees."""
    with jax.enable_x64(True):
        attention = Attention(checkpoint.config, weights, precision.PRECISIONS["float64"])
        pieces = layer_pieces(Layer(attention), rows, [BY_NAME["attn_scores"]])
        scores = np.concatenate([piece.values for piece in pieces], axis=1)
    seen = scores[:, *np.tril_indices(len(rows))]
    return float(np.sqrt(np.mean(seen**2)))


def largest(errors: Errors, by: float) -> SliceFloors:
    """Return the largest floor of each kind of slice, for scores smaller by a factor."""
    every = (
        [errors.whole],
        errors.blocks or [errors.whole],
        errors.heads or [errors.whole],
        errors.tokens,
        [errors.element],
    )
    return SliceFloors(*(max(floor or 0.0 for floor in floors) / by for floors in every))


def main() -> None:
    """Measure, and write the table."""
    found: dict[int, dict[str, dict[str, list[SliceFloors]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case_name, case in (CASES | FAMILY).items():
            for most, stage, name, floors in floors_of(case, Path(folder) / case_name):
                of_stage = found.setdefault(most, {}).setdefault(stage, {})
                of_stage.setdefault(name, []).append(floors)
    lengths = [
        UpTo(most, {stage: {n: typical(f) for n, f in of.items()} for stage, of in stages.items()})
        for most, stages in found.items()
    ]
    text = msgspec.json.format(msgspec.json.encode(Generic(SCORES_RMS, lengths)), indent=1)
    GENERIC_FILE.write_bytes(text + b"\n")
    print(f"written: {GENERIC_FILE}")


def typical(found: Sequence[SliceFloors]) -> SliceFloors:
    """Return the floors that stand for those of several prompts, two digits of them."""
    columns = np.array([msgspec.structs.astuple(floors) for floors in found])
    largest = columns.max(axis=0)
    floors = np.concatenate([np.maximum(np.median(columns, axis=0), largest / 2)[:2], largest[2:]])
    return SliceFloors(*(float(f"{floor:.2g}") for floor in floors))


if __name__ == "__main__":
    main()
