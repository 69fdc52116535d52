"""The noise floor: how much error is innocent in each stage, for one prompt and its weights.

It is the relative L2 of honest computations against the float64 truth, for each class of honest
engines. All of them are run in float64, by the same stage methods as the truth, and what their
arithmetic adds is put in: errors of float32 sums drawn at random (`qwenref.model.roundoff`), and
results or operands really rounded. *Accumulated* is the error of a chain of its own; *local* that
of one stage from exact inputs; *inputs* that of one exact stage whose inputs were rounded, as in
dumps of engines that do not read back what they dump.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array

from qwenref.dumps.manifest import Noise, StageNoise
from qwenref.metrics import Errors, floors_of, sums_of
from qwenref.model.attention import Attention
from qwenref.model.config import Config
from qwenref.model.precision import FORMATS, PRECISIONS, nearest, one_rounding
from qwenref.model.roundoff import Roundoff, StageErrors, generator
from qwenref.model.weights import AttentionWeights
from qwenref.stages import RESIDUAL, Stage, needed_for


class Rounds(NamedTuple):
    """What a class of engines rounds to, besides computing in float32: names in `FORMATS`."""

    results: str = "exact"
    operands: str = "exact"


CLASSES = {
    "float32": Rounds(),
    "float16": Rounds(results="float16"),
    "bfloat16": Rounds(results="bfloat16"),
    "float16-operands": Rounds(operands="float16"),
    "bfloat16-operands": Rounds(operands="bfloat16"),
    "tf32-operands": Rounds(operands="tf32"),
}
"""The precision classes, by their names in a manifest."""

PRODUCTS = {"qkv_matmul", "attn_scores", "attention", "attn_out"}
"""The stages whose inputs are operands of a product."""

DUMPED = ("float32", "float16", "bfloat16")
"""What a dump may have been rounded to."""

MOST_TOKENS = 64
"""Of a longer prompt, so many tokens are looked at, each in its position."""

WINDOW = 8
"""They are neighbours in groups of so many, since a token attends to its neighbours."""

GROWTH = 1 / 6
"""With more keys to choose from, more of the scores' error goes through the softmax: by the ratio
of all tokens to those looked at, to this power. Measured by scripts/measure_long_prompts.py.
"""

LEAST_ROWS = 8
"""Tokens times draws: fewer would make the floor of a short prompt a matter of luck."""


class Runs(NamedTuple):
    """The same array, exact and as honest engines have it, all in float64.

    Attributes:
        truth: Exact.
        chains: By class, as R engines of it compute it: [R, ...].
    """

    truth: np.ndarray
    chains: dict[str, np.ndarray]


def noise_floor(
    config: Config, weights: AttentionWeights, rows: np.ndarray, wanted: Collection[Stage]
) -> Noise:
    """Compute the noise floor of stages of one layer, on JAX's default device.

    Args:
        config: Sizes, eps and theta.
        weights: The layer's.
        rows: The residual stream that enters it, [T, D].
        wanted: Which stages of `qwenref.stages.ATTENTION`.
    """
    positions = sampled(len(rows))
    chain = needed_for(wanted)
    floors = {}
    with jax.enable_x64(True), np.errstate(over="ignore", invalid="ignore"):
        layer = _Layer(config, weights, positions)
        runs = {RESIDUAL: layer.entered_by(rows[positions])}
        for number, stage in enumerate(chain, start=1):
            runs[stage.name], noise = layer.compute(stage, [runs[s] for s in stage.computed_from])
            if stage in wanted:
                floors[stage.name] = noise
            later = {name for after in chain[number:] for name in after.computed_from}
            runs = {name: runs[name] for name in runs.keys() & later}
    return Noise(positions.tolist(), floors)


def sampled(T: int) -> np.ndarray:
    """Return the positions of the tokens that are looked at: all, or windows from first to last."""
    if T <= MOST_TOKENS:
        return np.arange(T)
    starts = np.linspace(0, T - WINDOW, MOST_TOKENS // WINDOW).astype(int)
    return (starts[:, None] + np.arange(WINDOW)).reshape(-1)


class _Layer:
    """One layer, and the tokens for which to compute its stages."""

    def __init__(self, config: Config, weights: AttentionWeights, positions: np.ndarray):
        T = len(positions)
        self.sizes = config.sizes
        self.stored = ml_dtypes.finfo(weights.q_proj.dtype).nmant
        self.shifts = positions - np.arange(T)
        self.growth = ((positions[-1] + 1) / T) ** GROWTH
        self.layer = Attention(config, weights, PRECISIONS["float64"])
        draws = max(-(-LEAST_ROWS // T), min(2, MOST_TOKENS // T))
        self.roundoff = Roundoff(self.layer, positions, draws)
        # the first draw rounds values as they are, the others as if they were a bit smaller: that
        # rounds them otherwise, but not more, and engines may scale them too
        self.scales = np.append(1, 2 ** -generator("scales").random(draws - 1))

    def entered_by(self, rows: np.ndarray) -> Runs:
        """Return the stream that enters the layer, as all classes hold it."""
        truth = rows.astype(np.float64)
        held = {name: nearest(truth, FORMATS[of.results]) for name, of in CLASSES.items()}
        draws = self.roundoff.draws
        return Runs(truth, {name: np.stack([rows] * draws) for name, rows in held.items()})

    def compute(self, stage: Stage, given: Sequence[Runs]) -> tuple[Runs, StageNoise]:
        """Compute a stage in all classes, and its floors."""
        operands = {
            name: rounds.operands if stage.name in PRODUCTS else "exact"
            for name, rounds in CLASSES.items()
        }
        batches = [[self._drawn(x.truth[None], name) for x in given] for name in FORMATS]
        batches += [
            [self._drawn(x.chains[name], operands[name]) for x in given] for name in CLASSES
        ]
        computed = self._computed(stage, batches)
        from_rounded = dict(zip(FORMATS, computed, strict=False))
        chains = dict(zip(CLASSES, computed[len(FORMATS) :], strict=True))

        truth = from_rounded["exact"][0]
        added = self.roundoff.of(stage, [x.truth for x in given], truth)
        accumulated, local = {}, {}
        for name, rounds in CLASSES.items():
            errors = self._errors(stage, name, added)
            chains[name] = chains[name] + errors
            accumulated[name] = self._drawn(chains[name], rounds.results)
            local[name] = self._drawn(from_rounded[operands[name]] + errors, rounds.results)
        if stage.name == "attn_softmax":
            accumulated = {
                name: truth + self.growth * (runs - truth) for name, runs in accumulated.items()
            }
        inputs = {name: from_rounded[name][:1] for name in DUMPED}  # as they are: it is a dump
        floors = [
            {name: self._floors(stage, truth, runs) for name, runs in part.items()}
            for part in (accumulated, local, inputs)
        ]
        # the rounding of qkv_matmul exists in dumps alone
        goes_on = chains if stage.name == "qkv_matmul" else accumulated
        return Runs(truth, goes_on), StageNoise(*floors)

    def _computed(self, stage: Stage, batches: list[list[np.ndarray]]) -> list[np.ndarray]:
        """Compute a stage exactly from several batches of inputs, [B, ...] each, in one go."""
        together = [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]
        computed = np.asarray(_in_float64(self.layer, stage, together, self.shifts))
        ends = np.cumsum([len(batch[0]) for batch in batches])
        return np.split(computed, ends[:-1])

    def _errors(self, stage: Stage, name: str, added: StageErrors) -> np.ndarray:
        """Draw what a class adds to a stage before it rounds the result: [R, ...]."""
        rounds = CLASSES[name]
        narrow = FORMATS[rounds.operands if rounds.results == "exact" else rounds.results]
        inner = 0 if rounds.results == "exact" else added.inner
        rounds_weights = rounds.results != "exact" or stage.name in PRODUCTS
        weights = added.weights if rounds_weights and self.stored > narrow.mantissa else 0
        scale = one_rounding(narrow) * np.hypot(inner, weights)
        if not np.any(scale):
            return added.float32
        drawn = generator(stage.name, name).standard_normal(added.float32.shape)
        return added.float32 + scale * drawn

    def _drawn(self, runs: np.ndarray, name: str) -> np.ndarray:
        """Round R runs, or one run in R ways, to a format: [R, ...]."""
        if name == "exact":
            return runs
        scales = self.scales.reshape(-1, *[1] * (runs.ndim - 1))
        return nearest(runs * scales, FORMATS[name]) / scales

    def _floors(self, stage: Stage, truth: np.ndarray, runs: np.ndarray) -> Errors:
        """Return the floor that several runs show: the mean square error, and the largest."""
        draws = [sums_of(stage, truth, run - truth, self.sizes["H"]) for run in runs]
        error = np.mean([draw.error for draw in draws], axis=0)
        largest = np.max([draw.largest for draw in draws], axis=0)
        if stage.name == "attn_softmax":  # its rms is smaller with more keys, its peaks are not
            largest *= self.roundoff.unseen_keys[:, None] ** 0.5
        return floors_of(stage, draws[0]._replace(error=error, largest=largest), self.sizes)


@partial(jax.jit, static_argnums=1)
def _in_float64(layer: Attention, stage: Stage, inputs: list[Array], shifts: Array) -> Array:
    """Compute a stage from B sets of inputs, [B, ...]; weights are widened once for all."""
    position = (shifts,) if stage.positioned and not stage.sliced else ()
    method = getattr(layer, stage.name)
    return jax.vmap(lambda *given: method(*given, *position))(*inputs)
