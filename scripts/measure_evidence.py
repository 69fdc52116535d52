"""Measure what the thresholds of `qwenref explain` tell apart (qwenref.trial).

    python scripts/measure_evidence.py --cases 1000

Prints quantiles over dumps of honest engines (scripts/healthy.py), and over honest weights that are
rounded to 3 to 8 bits in blocks; beside them, of what must not be taken for those.
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from healthy import MODELS, SCALES, Healthy, checkpoint_of
from honest_engines import Habits, HonestEngine

from qwenref.model.weights import read_attention, read_embedding
from qwenref.trial import blame, evidence, laying_out, precision
from qwenref.trial.residual import residual_of
from qwenref.trial.weight_noise import Looks, looks_of

QUANTILES = (0.0, 0.001, 0.01, 0.5, 0.99, 0.999, 1.0)
BLOCK = 32
WIDTHS = (3, 4, 5, 6, 8)

TAKEN = "taken for rounded weights"

Measured = dict[str, list[float]]


def watched(module: Any, name: str, note: Callable[..., None]) -> None:
    """Let a function of a module tell what it is called with, and what it returns."""
    original = getattr(module, name)

    def watching(*arguments: Any) -> Any:
        found = original(*arguments)
        note(*arguments, found)
        return found

    setattr(module, name, watching)


def of_engines(cases: int) -> Measured:
    """Explain honest dumps, and note what evidence there was."""
    found: Measured = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def orders(replay: Any, name: str, ways: Any, *_: Any) -> None:
        if len(ways) > 1 and replay.can(name):
            # of a wrong order that has the same values in the same places nothing can be told
            errors = [laying_out._error(replay, name, way) for way in ways]
            right = min(errors)
            note("CLEARLY: order that is right", right)
            for error in errors:
                if error > right:
                    note("CLEARLY: orders that are wrong", error)

    def flips(replay: Any, name: str, skip: Any, left: Any, taken: bool) -> None:
        before, after = residual_of(replay, name, skip).errors.whole, left.residual.errors.whole
        if before and after is not None:
            note(f"FLIPS: part that is left, {'' if taken else 'not '}taken", after / before)

    def rows(*arguments: Any) -> None:
        found, expected = arguments[-1]
        if expected:
            note("RARE: rows off, against those that rounded inputs make so", found / expected)

    watched(blame, "lay_out", orders)
    watched(precision, "are_flips", flips)
    watched(evidence, "rows_of_inputs", rows)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(cases):
            Healthy(number, Path(folder)).explained()
    return found


def rounded_in_blocks(weight: np.ndarray, bits: int) -> np.ndarray:
    """Round each block of 32 weights to whole multiples of its largest / (2**(bits-1) - 1)."""
    flat = np.pad(weight.ravel(), (0, -weight.size % BLOCK)).reshape(-1, BLOCK)
    unit = np.abs(flat).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    whole = np.rint(np.divide(flat, unit, out=np.zeros_like(flat), where=unit != 0))
    return (whole * unit).ravel()[: weight.size].reshape(weight.shape)


def products(folder: Path) -> Iterator[tuple[dict[str, int], np.ndarray, np.ndarray]]:
    """Yield sizes, inputs and weights of each product with weights, for prompts of many lengths."""
    for model, variant, T in itertools.product(
        range(len(MODELS)), range(len(SCALES)), (1, 2, 7, 33)
    ):
        checkpoint = checkpoint_of(folder, model, variant)
        weights, _ = read_attention(checkpoint, 0)
        tokens = np.random.default_rng([model, variant, T]).integers(320, size=T).tolist()
        rows, _ = read_embedding(checkpoint, tokens)
        arrays = HonestEngine(checkpoint.config, weights, Habits()).chain(rows.astype(np.float32))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            inputs = arrays["attention" if name == "o_proj" else "attn_norm"]
            weight = np.asarray(getattr(weights, name)).astype(np.float64)
            yield checkpoint.config.sizes, inputs.astype(np.float64), weight


def of_weights() -> Measured:
    """Return what errors of rounded weights look like, and those of some faults."""
    found: Measured = {}
    rng = np.random.default_rng(0)

    def note(kind: str, looks: Looks) -> None:
        for field, value in looks._asdict().items():
            if field != "alike" or looks.deviation <= 0.25:
                found.setdefault(f"{field}: {kind}", []).append(value)
        found.setdefault(f"{TAKEN}: {kind}", []).append(float(looks.unstructured))

    with tempfile.TemporaryDirectory() as folder:
        for sizes, inputs, weight in products(Path(folder)):
            truth = inputs @ weight.T
            for bits in WIDTHS:
                off = inputs @ (rounded_in_blocks(weight, bits) - weight).T
                note("rounded weights", looks_of(truth, off, inputs, sizes))
            for kind, factor in (
                ("2 % noise", 0.02 * rng.normal(size=truth.shape)),
                ("x 1.01", np.full(truth.shape, 0.01)),
                ("a channel x 0", -1.0 * (np.arange(truth.shape[1]) == 3) + 0 * truth),
                (
                    "a token x 1.03",
                    0.03 * (np.arange(len(truth)) == len(truth) - 1)[:, None] + 0 * truth,
                ),
            ):
                note(kind, looks_of(truth, truth * factor, inputs, sizes))
            if len(truth) > 1:
                bias = np.broadcast_to(0.1 * rng.normal(size=truth.shape[1]), truth.shape)
                note("a missing bias", looks_of(truth, bias, inputs, sizes))
    return found


def table(found: Measured) -> None:
    """Print quantiles."""
    print(f"{'':58}{'number':>8}" + "".join(f"{q:>9}" for q in QUANTILES))
    for name in sorted(found):
        if name.startswith(TAKEN):
            print(f"{name:58}{len(found[name]):8}{np.mean(found[name]):9.1%}")
            continue
        values = np.quantile(np.nan_to_num(found[name], posinf=9e9), QUANTILES)
        print(f"{name:58}{len(found[name]):8}" + "".join(f"{value:9.3g}" for value in values))


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=1000, help="how many honest dumps")
    options = parser.parse_args()
    table(of_weights())
    table(of_engines(options.cases))


if __name__ == "__main__":
    main()
