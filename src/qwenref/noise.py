"""The noise floor: how much error is innocent in each stage, for one prompt and its weights.

It is the relative L2 of honest computations against the float64 truth, for each class of honest
engines. All of them are run in float64, by the same stage methods as the truth, and what their
arithmetic adds is put in: errors of float32 sums drawn at random (`qwenref.model.roundoff`), and
results or operands really rounded. *Accumulated* is the error of a chain of its own; *local* that
of one stage from exact inputs; *inputs* that of one exact stage whose inputs were rounded, as in
dumps of engines that do not read back what they dump.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array

from qwenref.dumps.manifest import Noise, StageNoise
from qwenref.metrics import Sums, floors_of, of_draws, sums_of
from qwenref.model.arithmetic import Arithmetic
from qwenref.model.attention import Attention
from qwenref.model.config import Config
from qwenref.model.feed_forward import FeedForward
from qwenref.model.formats import in_format
from qwenref.model.head import SampledHead
from qwenref.model.precision import FORMATS, PRECISIONS, one_rounding
from qwenref.model.roundoff import Roundoff, StageErrors, generator
from qwenref.model.weights import AttentionWeights, FeedForwardWeights
from qwenref.stages import HEAD, LEAVING, RESIDUAL, Stage, needed_for


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

PRODUCTS = {
    *("qkv_matmul", "attn_scores", "attention", "attn_out"),
    *("ffn_gate", "ffn_up", "ffn_out", "lm_head"),
}
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
        chains: As R engines of each class compute it: [C, R, ...], in the order of `CLASSES`.
    """

    truth: np.ndarray
    chains: np.ndarray


class NoiseFloors:
    """The noise floors of one layer after the other, on JAX's default device.

    Attributes:
        positions: Of the tokens that they are computed for.
    """

    def __init__(self, config: Config, T: int):
        """Begin where engines have made no errors yet.

        Args:
            config: Sizes, eps and theta.
            T: How many tokens there are.
        """
        self.positions = sampled(T)
        self._config = config
        self._left: Runs | None = None

    def of_layer(
        self,
        attention: AttentionWeights,
        feed_forward: FeedForwardWeights | None,
        rows: np.ndarray,
        wanted: Collection[Stage],
    ) -> dict[str, StageNoise]:
        """Compute the floors of stages of the next layer, by their names.

        Args:
            attention: Weights of the layer.
            feed_forward: More of them, if a stage after attn_out is wanted.
            rows: The residual stream that enters it, [T, D].
            wanted: Which stages of `qwenref.stages.LAYER`; `LEAVING` is needed for the next layer.
        """
        chain = needed_for(wanted)
        floors = {}
        with jax.enable_x64(True), np.errstate(over="ignore", invalid="ignore"):
            exact = PRECISIONS["float64"]
            modules: list[Arithmetic] = [Attention(self._config, attention, exact)]
            if feed_forward is not None:
                modules.append(FeedForward(self._config, feed_forward, exact))
            layer = _Modules(modules, attention.q_proj.dtype, self.positions)
            runs = {RESIDUAL: layer.entered_by(rows[self.positions], self._left)}
            self._left = None
            for number, stage in enumerate(chain, start=1):
                given = [runs[name] for name in stage.computed_from]
                runs[stage.name], floors[stage.name] = layer.compute(stage, given)
                later = {name for after in chain[number:] for name in after.computed_from}
                if stage == LEAVING:
                    self._left = runs[stage.name]
                runs = {name: runs[name] for name in runs.keys() & later}
        return floors

    def of_head(
        self, norm: np.ndarray, sample: np.ndarray | None, rows: np.ndarray, *, last: bool
    ) -> dict[str, StageNoise]:
        """Compute the floors of the stages of the whole model, after those of its last layer.

        Args:
            norm: Weight of the final norm, [D].
            sample: Some rows of lm_head's matrix, [O, D]; None if that stage is not wanted.
            rows: The residual stream that leaves the last layer, [T, D].
            last: Whether lm_head is wanted of the last token alone.
        """
        final_norm, lm_head = HEAD
        nothing = np.zeros((1, len(norm)), norm.dtype)
        head = SampledHead(
            self._config, norm, nothing if sample is None else sample, PRECISIONS["float64"]
        )
        with jax.enable_x64(True), np.errstate(over="ignore", invalid="ignore"):
            modules = _Modules([head], norm.dtype, self.positions)
            stream = modules.entered_by(rows[self.positions], self._left)
            normed, floor = modules.compute(final_norm, [stream])
            floors = {final_norm.name: floor}
            if sample is not None:
                if last:
                    normed = Runs(normed.truth[-1:], normed.chains[:, :, -1:])
                _, floors[lm_head.name] = modules.compute(lm_head, [normed])
        return floors


def noise_floor(
    config: Config, weights: AttentionWeights, rows: np.ndarray, wanted: Collection[Stage]
) -> Noise:
    """Compute the noise floor of stages of attention alone, of a layer entered without errors.

    Args:
        config: Sizes, eps and theta.
        weights: The layer's.
        rows: The residual stream that enters it, [T, D].
        wanted: Which stages of `qwenref.stages.ATTENTION`.

    Returns:
        Floors by the stage's name.
    """
    floors = NoiseFloors(config, len(rows))
    found = floors.of_layer(weights, None, rows, wanted)
    of_wanted = {stage.name: found[stage.name] for stage in wanted}
    return Noise(floors.positions.tolist(), of_wanted)


def sums_of_draws(stage: Stage, truth: np.ndarray, draws: np.ndarray, roundoff: Roundoff) -> Sums:
    """Sum up by how much honest engines are off: the mean square, and the largest.

    Args:
        stage: Which stage these are.
        truth: Exact, in the axes of the stage.
        draws: What R engines, of several classes, compute: [..., R, ...].
        roundoff: Knows which tokens of the prompt they are.
    """
    sums = of_draws(sums_of(stage, truth, draws - truth, roundoff.config.sizes["H"]))
    if stage.name == "attn_softmax":  # its rms is smaller with more keys, its peaks are not
        sums = sums._replace(largest=sums.largest * roundoff.unseen_keys[:, None] ** 0.5)
    return sums


def sampled(T: int) -> np.ndarray:
    """Return the positions of the tokens that are looked at: all, or windows from first to last."""
    if T <= MOST_TOKENS:
        return np.arange(T)
    starts = np.linspace(0, T - WINDOW, MOST_TOKENS // WINDOW).astype(int)
    return (starts[:, None] + np.arange(WINDOW)).reshape(-1)


class _Modules:
    """Some modules, and the tokens for which to compute their stages."""

    def __init__(self, modules: Sequence[Arithmetic], stored: np.dtype, positions: np.ndarray):
        T = len(positions)
        self.sizes = modules[0].config.sizes
        self.stored = ml_dtypes.finfo(stored).nmant
        self.shifts = positions - np.arange(T)
        self.growth = ((positions[-1] + 1) / T) ** GROWTH
        self.modules = modules
        draws = max(-(-LEAST_ROWS // T), min(2, MOST_TOKENS // T))
        self.roundoff = Roundoff(modules, positions, draws)
        # the first draw rounds values as they are, the others as if they were a bit smaller: that
        # rounds them otherwise, but not more, and engines may scale them too
        self.scales = np.append(1, 2 ** -generator("scales").random(draws - 1))

    def entered_by(self, rows: np.ndarray, left: Runs | None) -> Runs:
        """Return the stream that enters the layer, as all classes hold it.

        Args:
            rows: The stream, [T, D].
            left: What left the layer before: the errors of the classes, if any were made.
        """
        truth = rows.astype(np.float64)
        if left is not None:
            # rounded again: next to ties, what the stream is off by would decide between neighbours
            return Runs(truth, self._store(truth + (left.chains - left.truth)))
        held = np.stack([in_format(truth, of.results) for of in CLASSES.values()])
        return Runs(truth, held[:, None].repeat(self.roundoff.draws, axis=1))

    def compute(self, stage: Stage, given: Sequence[Runs]) -> tuple[Runs, StageNoise]:
        """Compute a stage in all classes, and its floors."""
        operands = [
            rounds.operands if stage.name in PRODUCTS else "exact" for rounds in CLASSES.values()
        ]
        # exact inputs are rounded in R ways to operands, in one way as in a dump
        ways = dict.fromkeys(("exact", *DUMPED), 1)
        ways |= {name: self.roundoff.draws for name in operands if name != "exact"}
        inputs = [self._together(x, ways, operands) for x in given]
        *of_truth, of_chains = np.split(self._computed(stage, inputs), np.cumsum([*ways.values()]))
        from_rounded = dict(zip(ways, of_truth, strict=True))
        truth = from_rounded["exact"][0]
        added = self.roundoff.of(stage, [x.truth for x in given], truth)
        errors = np.stack([self._errors(stage, name, added) for name in CLASSES])
        chains = of_chains.reshape(errors.shape) + errors
        # the rounding of qkv_matmul exists in dumps alone
        accumulated = self._store(chains.copy() if stage.name == "qkv_matmul" else chains)
        if stage.name == "attn_softmax":
            chains = accumulated = truth + self.growth * (accumulated - truth)
        for name, local in zip(operands, errors, strict=True):
            local += from_rounded[name]
        dumped = np.stack([from_rounded[name][:1] for name in DUMPED])
        floors = self._floors(stage, truth, (accumulated, self._store(errors), dumped))
        return Runs(truth, chains), floors

    def _together(self, x: Runs, ways: Mapping[str, int], operands: Sequence[str]) -> np.ndarray:
        """Return an input as exact engines get it, and then as all classes do: [B, ...].

        Args:
            x: The input.
            ways: In how many ways its truth is rounded to each format.
            operands: What each class rounds its own to.
        """
        draws = self.roundoff.draws
        exact = [self._drawn(x.truth[None], name, count) for name, count in ways.items()]
        chains = [self._drawn(*of, draws) for of in zip(x.chains, operands, strict=True)]
        return np.concatenate(exact + chains)

    def _computed(self, stage: Stage, inputs: list[np.ndarray]) -> np.ndarray:
        """Compute a stage exactly from B sets of inputs, [B, ...] each, in one go."""
        name = "sampled_lm_head" if stage.name == "lm_head" else stage.name
        module = next(module for module in self.modules if hasattr(module, name))
        return np.asarray(_in_float64(module, stage, name, inputs, self.shifts))

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

    def _drawn(self, runs: np.ndarray, name: str, draws: int) -> np.ndarray:
        """Round R runs, or one run in R ways, to a format: [R, ...]."""
        if name == "exact":
            return runs
        scales = self.scales[:draws].reshape(-1, *[1] * (runs.ndim - 1))
        return in_format(runs * scales, name) / scales

    def _store(self, runs: np.ndarray) -> np.ndarray:
        """Round all classes [C, R, ...] to what they store results in, in place."""
        for of_class, rounds in zip(runs, CLASSES.values(), strict=True):
            if rounds.results != "exact":
                of_class[...] = self._drawn(of_class, rounds.results, len(of_class))
        return runs

    def _floors(self, stage: Stage, truth: np.ndarray, parts: Sequence[np.ndarray]) -> StageNoise:
        """Return the floors that runs [.., R, ...] show: accumulated, local, of inputs rounded."""
        sums = [sums_of_draws(stage, truth, runs, self.roundoff) for runs in parts]
        error, largest = (
            np.concatenate([getattr(part, of) for part in sums]) for of in ("error", "largest")
        )
        floors = floors_of(stage, sums[0]._replace(error=error, largest=largest), self.sizes)
        C = len(CLASSES)
        return StageNoise(
            dict(zip(CLASSES, floors[:C], strict=True)),
            dict(zip(CLASSES, floors[C : 2 * C], strict=True)),
            dict(zip(DUMPED, floors[2 * C :], strict=True)),
        )


@partial(jax.jit, static_argnums=(1, 2))
def _in_float64(
    module: Arithmetic, stage: Stage, name: str, inputs: list[Array], shifts: Array
) -> Array:
    """Compute a stage from B sets of inputs, [B, ...]; weights are widened once for all."""
    position = (shifts,) if stage.positioned and not stage.sliced else ()
    method = getattr(module, name)
    return jax.vmap(lambda *given: method(*given, *position))(*inputs)
