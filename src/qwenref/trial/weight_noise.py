"""Errors that rounded weights make: innocent, and told from faults by what they look like.

Rounded weights add x . dW to a product, where dW is small, of no pattern, and the same for all
tokens. So the errors of two tokens are as alike as their inputs are (of equal inputs they are
equal); no token, head or channel is free of them, and none has far more than others; and their size
is that of the token's input and of the weights, not of the value that they sit on.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qwenref.metrics import MARGIN, Errors
from qwenref.stages import BY_NAME, RESIDUAL
from qwenref.trial.dialects import EXACT
from qwenref.trial.replay import Replay, Skip
from qwenref.trial.residual import compared

MOST = 0.35
"""Relative L2 that 2-bit weights make: 0.27 with Q2_K's blocks of 16, 0.35 with ternary ones."""

UNEVEN = 3.0
"""How many times more, or less, error than the average a token or head may have. Of weights rounded
to 3 to 8 bits, 1.6 and 2.3 at most (scripts/measure_evidence.py, which the next four are of too).
"""

STANDS_OUT = 8.0
"""How many times the rms error of all a single value may be off. Sums of many roundings are normal:
of 10 million, the largest is 5.3; measured 5.2. Inputs with a few large values make 6.2 (apr's Q4_K
attn_out); a channel of zeros among many makes 10.
"""

FREE = 0.05
"""Nine in ten channels have at least this part of the rms error: of a single token's normal errors
nine in ten are above 0.126, and of more tokens above that; measured in small layers, 99 of 100
times more than 0.066.
"""

FOLLOWS = 0.3
"""Correlation of |error| with |value|, but for chance: .02 to .07 in apr's Q4_K dumps, .62 if noise
is in proportion to values (measured the same).
"""

PARALLEL = 0.5
"""Correlation of error with value, but for chance: rounding is not biased; a factor makes it 1."""

OFFSET = 0.5
"""Mean of errors against their rms, but for chance, for the same reason: an offset makes it 1."""

DEVIATIONS = 3.0
"""Of a correlation that is chance: 1 / sqrt(values) is one of them."""

TELLING = 0.25
"""Standard deviation of `_alike` up to which it is evidence."""

MISFIT = 0.7
"""Of `Looks.misfit`: rounded weights 0.5 at most, a missing bias 1 unless all tokens are alike."""

HALF = 0.5
"""Errors of rounded weights make `_alike` 1 on average, others 0."""

ROUNDED = {
    "qkv_matmul": "v",
    "attn_out": "o",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_out": "down",
    "lm_head": "lm_head",
}
"""Stages that are products with weights, and what to call these; of three, the last."""

LINEAR = {"attn_out": ("post_attn_residual", "ffn_norm"), "ffn_out": ("post_ffn_residual",)}
"""Stages after a product in which its error is as it was, but for the size of each channel."""


class Noise(NamedTuple):
    """Whether errors look like those of rounded weights, and of how many bits, by tensor."""

    bits: dict[str, float]


def weight_noise(replay: Replay, name: str, skip: Skip, floors: Errors) -> Noise | None:
    """Return what widths of weights explain the error of a stage; None if none do.

    Args:
        replay: With what the engine dumped.
        name: The stage.
        skip: Whose dumps are not read.
        floors: What is normal of exact weights.
    """
    on_the_way = {name} | replay.bridges(name, skip)
    embedded = RESIDUAL in on_the_way and replay.part.layer == 0
    products = [stage for stage in ROUNDED if stage in on_the_way]
    if not embedded and not products:
        return None
    pieces = [*compared(replay, name, replay.held[name], skip)]
    axis = 0 if pieces[0][1].ndim < 3 or name.endswith("rope") else 1
    truth = np.concatenate([of for _, of, _ in pieces], axis=axis)
    error = np.concatenate([dumped for _, _, dumped in pieces], axis=axis) - truth
    if axis or not np.isfinite(error).all():
        return None  # behind the softmax errors are not linear any more
    truth, error = (of.reshape(len(of), -1) for of in (truth, error))
    biased = name == "qkv_bias" and products
    product = truth - replay.bias(EXACT) if biased else truth
    bits: dict[str, float] = {}
    for part in _parts(replay, name, skip, products):
        off = error[:, part.columns]
        if not off.any() or _is_normal(truth[:, part.columns], off, floors):
            continue
        of = product[:, part.columns]
        if not of.any() or not looks_of(of, off, part.inputs, replay.sizes).unstructured:
            return None
        bits[part.tensor] = min(_bits(of, off), bits.get(part.tensor, np.inf))
    return Noise(bits)


class _Part(NamedTuple):
    """Which tensor makes some columns, and of which operand [T, I], if that is known."""

    tensor: str
    columns: slice
    inputs: np.ndarray | None = None


def _parts(replay: Replay, name: str, skip: Skip, products: Sequence[str]) -> Iterator[_Part]:
    N, K, H = (replay.sizes[letter] for letter in "NKH")
    first = replay.held[name].first
    if name in ("qkv_matmul", "qkv_bias") and products:
        x = _rows(replay, "attn_norm", skip)[first:]
        yield _Part("q", slice(0, N * H), x)
        yield _Part("k", slice(N * H, (N + K) * H), x)
        yield _Part("v", slice((N + K) * H, None), x)
    elif name in ("q_post_rope", "k_post_rope") and products:
        yield _Part(name[0], slice(None))
    elif name == "attention" and products:
        bridged = {"q_post_rope", "k_post_rope"} & replay.bridges(name, skip)
        if bridged or len(replay.spans) > 1:  # not by v alone; or too much to hold
            yield _Part("v", slice(None))
            return
        x, p = (_rows(replay, of, skip) for of in ("attn_norm", "attn_softmax"))
        for head in range(N):
            yield _Part("v", slice(head * H, (head + 1) * H), p[head, first:] @ x)
    elif products:
        product, *others = products
        linear = not others and name in (product, *LINEAR.get(product, ()))
        linear &= RESIDUAL not in replay.bridges(name, skip)  # a rounded embedding has other errors
        inputs = _rows(replay, BY_NAME[product].computed_from[0], skip)[first:] if linear else None
        yield _Part(ROUNDED[products[-1]], slice(None), inputs)
    else:
        yield _Part("embedding", slice(None))


def _rows(replay: Replay, name: str, skip: Skip) -> np.ndarray:
    """Return all tokens of a stage, as held or computed."""
    axis = BY_NAME[name].axes.index("T")
    return np.concatenate(
        [
            replay.rows(name, span, skip, EXACT).take(
                range(span.first - span.start, span.stop - span.start), axis
            )
            for span in replay.spans
        ],
        axis=axis,
    )


class Looks(NamedTuple):
    """What errors [T, C] look like, each token's relative to the rms of its input.

    Attributes:
        size: Relative L2, as they are.
        most: Rms of the token, head or token of a head that is the most off, of all.
        least: The same of the one that is the least off.
        largest: Of a single value, against the rms of all.
        channel: Rms of a channel against that of all: nine in ten have more.
        follows: Correlation of |error| with |value|.
        parallel: Cosine of error and value.
        offset: Mean of the errors.
        alike: Slope of the cosines of tokens' errors against those of their inputs, over all pairs:
            1 if dW is random, 0 if errors of tokens have nothing in common. 0 if unknown.
        deviation: The standard deviation of that.
        misfit: Rms difference of those cosines: 1 if all tokens have the same error.
        values: How many independent ones there are: equal tokens have equal errors.
    """

    size: float
    most: float
    least: float
    largest: float
    channel: float
    follows: float
    parallel: float
    offset: float
    alike: float
    deviation: float
    misfit: float
    values: float

    @property
    def unstructured(self) -> bool:
        """Whether they are of no pattern, and of a size that rounded weights make."""
        by_chance = DEVIATIONS / self.values**0.5
        return (
            self.size <= MOST
            and self.most <= UNEVEN
            and self.least * UNEVEN >= 1
            and self.largest <= STANDS_OUT
            and self.channel >= FREE
            and self.follows <= max(FOLLOWS, by_chance)
            and abs(self.parallel) <= max(PARALLEL, by_chance)
            and abs(self.offset) <= max(OFFSET, by_chance)
            and (self.deviation > TELLING or self.alike > HALF)
            and self.misfit <= MISFIT
        )


def looks_of(
    truth: np.ndarray, error: np.ndarray, inputs: np.ndarray | None, sizes: Mapping[str, int]
) -> Looks:
    """Return what errors look like.

    Args:
        truth: [T, C].
        error: [T, C], not zero everywhere.
        inputs: Operand of the product, [T, I], if it is known.
        sizes: H.
    """
    relative = _rms(error) / _rms(truth)
    scales = np.ones(len(error))
    if inputs is not None:
        scales = np.sqrt(np.mean(np.square(inputs), axis=1))
    error, truth = (of / np.where(scales, scales, 1.0)[:, None] for of in (error, truth))
    size, by_head = _rms(error), _by_head(error, sizes["H"])
    parts = [*map(_rms, by_head), *map(_rms, by_head.swapaxes(0, 1))]
    channels = np.sqrt(np.mean(np.square(error), axis=0))
    norms = np.linalg.norm(error) * np.linalg.norm(truth)
    tokens = int(np.count_nonzero(error.any(axis=1)))
    alike, deviation, misfit = (0.0, np.inf, 0.0) if inputs is None else _alike(error, inputs)
    return Looks(
        size=relative,
        most=max(parts) / size,
        least=min(parts) / size,
        largest=float(np.abs(error).max()) / size,
        channel=float(np.quantile(channels, 0.1)) / size,
        follows=_correlation(np.abs(error), np.abs(truth)),
        parallel=float(np.vdot(error, truth) / norms),
        offset=float(np.mean(error)) / size,
        alike=alike,
        deviation=deviation,
        misfit=misfit,
        values=error.shape[1] * tokens**2 / float(np.sum(np.square(_cosines(error)))),
    )


def _alike(error: np.ndarray, inputs: np.ndarray) -> tuple[float, float, float]:
    """Return `Looks.alike`, its standard deviation, and `Looks.misfit`."""
    a, b = (_cosines(of)[np.triu_indices(len(of), 1)] for of in (error, inputs))
    total = float(np.vdot(b, b))
    if not total:
        return 0.0, np.inf, _rms(a) if a.size else 0.0
    deviation = float(np.sqrt(1 / (error.shape[1] * total)))
    return float(np.vdot(a, b)) / total, deviation, _rms(a - b)


def _cosines(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(norms, norms, 1.0)
    return unit @ unit.T


def _by_head(values: np.ndarray, H: int) -> np.ndarray:
    """Return [T, J, H], or [T, 1, C] if the columns are not made of heads."""
    width = H if values.shape[1] % H == 0 else values.shape[1]
    return values.reshape(len(values), -1, width)


def _is_normal(truth: np.ndarray, error: np.ndarray, floors: Errors) -> bool:
    """Return whether errors are no larger than exact weights make them."""
    if floors.whole is None or floors.element is None:
        return False
    size, largest = _rms(truth), float(np.abs(error).max())
    return _rms(error) <= MARGIN * floors.whole * size and largest <= (
        MARGIN * floors.element * size
    )


def _bits(truth: np.ndarray, error: np.ndarray) -> float:
    """Return how many bits make such an error: blocks of 32, rounded to 2**(bits-1) - 1 steps.

    Of 32 normal numbers the largest is 2.07, and a uniform error has an rms of 1/sqrt(12).
    """
    return float(1 + np.log2(1 + 2.07 / 12**0.5 / (_rms(error) / _rms(truth))))


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(np.vdot(a, b) / norms) if norms else 0.0
