"""Mistakes in RMSNorm: x / sqrt(mean(x**2) + eps) * w."""

from collections.abc import Iterator

import numpy as np

from qwenref.mistakes.mistake import Mistake, Setting, any_of, needs
from qwenref.stages import BY_NAME, RESIDUAL

STAGE = ("attn_norm", "ffn_norm", "final_norm")
WEIGHT = {"attn_norm": "norm", "ffn_norm": "ffn_norm", "final_norm": "final_norm"}
"""The weight of each norm, by its name in `qwenref.trial.tensors`."""

POINT = {"attn_norm": "normed", "ffn_norm": "ffn_normed", "final_norm": "final_normed"}
"""Where x / rms is rounded, if it is."""

EPS = (1e-5, 1e-6, 0.0, 1e-8, 1e-12, 1e-7, 1e-3)
"""Defaults of other models and libraries."""


def _mean_square(x: np.ndarray) -> np.ndarray:
    return np.mean(np.square(x), axis=-1, keepdims=True)


def _scaled(
    s: Setting, x: np.ndarray, square: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Return x / sqrt(square) * w."""
    w = _own_weight(s) if weight is None else weight
    normed = np.divide(x, np.sqrt(square), out=np.zeros_like(x), where=square > 0)
    return s.rounded(POINT[s.stage], normed) * w


def _own_weight(s: Setting) -> np.ndarray:
    return s.tensor(WEIGHT[s.stage])


def _stream(s: Setting) -> np.ndarray:
    """Return what is normalised, of all tokens."""
    return s.everywhere(BY_NAME[s.stage].computed_from[0])


def _with_eps(s: Setting, eps: float) -> np.ndarray:
    (x,) = s.given
    return _scaled(s, x, _mean_square(x) + eps)


def _eps_values(s: Setting, dumped: np.ndarray | None) -> Iterator[float]:
    """Yield known values, then what the dumped rows say: (x . w / y)**2 - mean(x**2)."""
    own = s.config.rms_norm_eps
    yield from (eps for eps in EPS if eps != own)
    if dumped is None:
        return
    (x,) = s.given
    along = x * _own_weight(s)
    factors = np.vecdot(along, dumped) / np.vecdot(along, along)
    with np.errstate(divide="ignore", invalid="ignore"):
        eps = 1 / np.square(factors) - _mean_square(x)[:, 0]
    eps = eps[np.isfinite(eps)]
    if len(eps) and np.median(eps) > 0:
        yield float(f"{np.median(eps):.2g}")
        yield float(np.median(eps))


def _eps_outside(s: Setting) -> np.ndarray:
    (x,) = s.given
    root = np.sqrt(_mean_square(x)) + s.config.rms_norm_eps
    return _scaled(s, x, np.square(root))


def _eps_of_sum(s: Setting) -> np.ndarray:
    (x,) = s.given
    return _scaled(s, x, _mean_square(x) + s.config.rms_norm_eps / s.sizes["D"])


def _eps_of_maximum(s: Setting) -> np.ndarray:
    """The row is divided by its largest value, lest squares overflow, and then eps is added."""
    (x,) = s.given
    largest = np.abs(x).max(axis=-1, keepdims=True)
    return _scaled(s, x, _mean_square(x) + s.config.rms_norm_eps * np.square(largest))


def _multiplied(s: Setting) -> np.ndarray:
    (x,) = s.given
    square = _mean_square(x) + s.config.rms_norm_eps
    return _scaled(s, x, 1 / square)


def _centred(s: Setting) -> np.ndarray:
    (x,) = s.given
    x = x - x.mean(axis=-1, keepdims=True)
    return _scaled(s, x, _mean_square(x) + s.config.rms_norm_eps)


def _variance(s: Setting) -> np.ndarray:
    (x,) = s.given
    return _scaled(s, x, x.var(axis=-1, keepdims=True) + s.config.rms_norm_eps)


def _sum(s: Setting) -> np.ndarray:
    (x,) = s.given
    return _scaled(s, x, _mean_square(x) * s.sizes["D"] + s.config.rms_norm_eps)


def _one_less(s: Setting) -> np.ndarray:
    (x,) = s.given
    D = s.sizes["D"]
    return _scaled(s, x, _mean_square(x) * D / (D - 1) + s.config.rms_norm_eps)


def _no_root(s: Setting) -> np.ndarray:
    (x,) = s.given
    return _scaled(s, x, np.square(_mean_square(x) + s.config.rms_norm_eps))


def _over_tokens(s: Setting) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    (x,) = s.given
    square = np.mean(np.square(_stream(s)), axis=0)
    return _scaled(s, x, np.broadcast_to(square + s.config.rms_norm_eps, x.shape))


def _over_all(s: Setting) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    (x,) = s.given
    square = np.mean(np.square(_stream(s)), keepdims=True)
    return _scaled(s, x, np.broadcast_to(square + s.config.rms_norm_eps, (len(x), 1)))


def _of_token(s: Setting, token: int) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    (x,) = s.given
    row = _stream(s)[token]
    return _scaled(s, x, np.full((len(x), 1), np.mean(np.square(row)) + s.config.rms_norm_eps))


def _per_shard(s: Setting, number: int) -> np.ndarray:
    """The channels of a token lie on several devices, whose sums are not added up."""
    (x,) = s.given
    needs(s.sizes["D"] % number == 0)
    parts = x.reshape(len(x), number, -1)
    square = np.broadcast_to(_mean_square(parts), parts.shape).reshape(x.shape)
    return _scaled(s, x, square + s.config.rms_norm_eps)


def _weight(s: Setting, weight: np.ndarray) -> np.ndarray:
    (x,) = s.given
    return _scaled(s, x, _mean_square(x) + s.config.rms_norm_eps, weight)


def _twice(s: Setting) -> np.ndarray:
    return s.right(s.right(*s.given))


def _skipped(s: Setting) -> np.ndarray:
    return s.given[0]


def _weight_alone(s: Setting) -> np.ndarray:
    return s.given[0] * _own_weight(s)


Other = tuple[str, int]
"""A weight, and how many layers further on."""

OTHERS: dict[str, tuple[Other, ...]] = {
    "attn_norm": (("ffn_norm", 0), ("norm", 1), ("norm", -1), ("ffn_norm", -1), ("final_norm", 0)),
    "ffn_norm": (("norm", 0), ("ffn_norm", 1), ("ffn_norm", -1), ("norm", 1), ("final_norm", 0)),
    "final_norm": (("ffn_norm", -1), ("norm", -1)),
}


def _of_other(s: Setting, other: Other) -> np.ndarray:
    needs(other in OTHERS[s.stage])
    return _weight(s, s.tensor(*other))


def _other_named(other: Other) -> str:
    name, beside = other
    of = {"norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}.get(name)
    layer = {0: "", 1: " of the next layer", -1: " of the layer before"}[beside]
    return "the final norm" if of is None else of + layer


def _of_stream(s: Setting, name: str) -> np.ndarray:
    needs(s.stage == "ffn_norm")
    return s.right(s.rows(name))


def _of_repeated(s: Setting) -> np.ndarray:
    needs(s.stage == "attn_norm" and len(s.positions) == s.sizes["T"])
    return s.right(s.again(s.given[0]))


def _before(s: Setting) -> np.ndarray:
    (x,) = s.given
    x = x * _own_weight(s)
    return _scaled(s, x, _mean_square(x) + s.config.rms_norm_eps, np.ones(s.sizes["D"]))


MISTAKES = (
    Mistake(
        "norm-eps",
        STAGE,
        "eps {} in the norm",
        "x / sqrt(mean(x**2) + eps') * w",
        "a factor per token, the further from 1 the smaller the token's values are",
        _with_eps,
        _eps_values,
        planted=(1e-5, 1e-3, 0.0, 2e-6),
    ),
    Mistake(
        "norm-eps-outside",
        STAGE,
        "eps added to the root, not under it",
        "x / (sqrt(mean(x**2)) + eps) * w",
        "a factor per token, the further from 1 the smaller the token's values are",
        _eps_outside,
    ),
    Mistake(
        "norm-eps-of-sum",
        STAGE,
        "eps added to the sum of squares, before it is divided by D",
        "x / sqrt((sum(x**2) + eps) / D) * w",
        "a factor per token, the further from 1 the smaller the token's values are",
        _eps_of_sum,
    ),
    Mistake(
        "norm-eps-of-maximum",
        STAGE,
        "eps added after the row was divided by its largest value",
        "x / sqrt(mean(x**2) + eps * max(x)**2) * w",
        "a factor per token, the further from 1 the larger its peak is",
        _eps_of_maximum,
    ),
    Mistake(
        "norm-multiplied",
        STAGE,
        "multiplied with the root mean square, not divided by it",
        "x * sqrt(mean(x**2) + eps) * w",
        "a factor per token",
        _multiplied,
    ),
    Mistake(
        "norm-mean-subtracted",
        STAGE,
        "LayerNorm instead of RMSNorm: the mean is subtracted",
        "(x - mean(x)) / sqrt(var(x) + eps) * w",
        "an offset per token, in proportion to w",
        _centred,
    ),
    Mistake(
        "norm-variance",
        STAGE,
        "divided by the standard deviation, not by the root mean square",
        "x / sqrt(var(x) + eps) * w",
        "a factor per token",
        _variance,
    ),
    Mistake(
        "norm-sum",
        STAGE,
        "the sum of squares instead of their mean",
        "x / sqrt(sum(x**2) + eps) * w",
        "all values by a factor of about 1/sqrt(D)",
        _sum,
    ),
    Mistake(
        "norm-one-less",
        STAGE,
        "the sum of squares divided by D - 1",
        "x / sqrt(sum(x**2) / (D - 1) + eps) * w",
        "all values by a factor of sqrt(1 - 1/D)",
        _one_less,
    ),
    Mistake(
        "norm-no-root",
        STAGE,
        "divided by the mean square, not by its root",
        "x / (mean(x**2) + eps) * w",
        "a factor per token",
        _no_root,
    ),
    Mistake(
        "norm-over-tokens",
        STAGE,
        "the mean square over the tokens of a channel, not over the channels of a token",
        "x / sqrt(mean over T of x**2, + eps) * w",
        "a factor per channel and token",
        _over_tokens,
    ),
    Mistake(
        "norm-over-all",
        STAGE,
        "one mean square for all tokens together",
        "x / sqrt(mean over T and D of x**2, + eps) * w",
        "a factor per token",
        _over_all,
    ),
    Mistake(
        "norm-of-token",
        STAGE,
        "every token divided by the root mean square of token {}",
        "x / sqrt(mean(x[t]**2) + eps) * w",
        "a factor per token, 1 for one of them",
        _of_token,
        lambda s, _: (0, s.sizes["T"] - 1),
        planted=(0,),
    ),
    Mistake(
        "norm-per-shard",
        STAGE,
        "each of {} shards of the channels has a root mean square of its own",
        "x[i] / sqrt(mean(x[i]**2) + eps) * w[i]",
        "a factor per token and shard",
        _per_shard,
        any_of(2, 4, 8),
        planted=(2, 4),
    ),
    Mistake(
        "norm-weight-forgotten",
        STAGE,
        "the norm's weight forgotten",
        "x / sqrt(mean(x**2) + eps)",
        "a factor per channel, the same for all tokens",
        lambda s: _weight(s, np.ones(s.sizes["D"])),
    ),
    Mistake(
        "norm-one-plus-weight",
        STAGE,
        "1 + w instead of w, as Gemma stores its norms",
        "x / sqrt(mean(x**2) + eps) * (1 + w)",
        "a factor per channel, the same for all tokens",
        lambda s: _weight(s, 1 + _own_weight(s)),
    ),
    Mistake(
        "norm-two-plus-weight",
        STAGE,
        "2 + w instead of w: Gemma's 1 is added twice",
        "x / sqrt(mean(x**2) + eps) * (2 + w)",
        "a factor per channel, the same for all tokens",
        lambda s: _weight(s, 2 + _own_weight(s)),
    ),
    Mistake(
        "norm-weight-twice",
        STAGE,
        "the norm's weight applied twice",
        "x / sqrt(mean(x**2) + eps) * w * w",
        "a factor per channel, the same for all tokens",
        lambda s: _weight(s, np.square(_own_weight(s))),
    ),
    Mistake(
        "norm-weight-first",
        STAGE,
        "the weight applied before the norm",
        "x*w / sqrt(mean((x*w)**2) + eps)",
        "a factor per token",
        _before,
    ),
    Mistake(
        "norm-of-other",
        STAGE,
        "the weight of another norm: {}",
        "x / sqrt(mean(x**2) + eps) * w'",
        "a factor per channel, the same for all tokens",
        _of_other,
        lambda s, _: OTHERS[s.stage],
        planted=(("ffn_norm", 0), ("norm", 0), ("norm", 1), ("ffn_norm", -1), ("final_norm", 0)),
        said=_other_named,
    ),
    Mistake(
        "norm-of-stream",
        ("ffn_norm",),
        "the second norm of {}",
        "norm of another array",
        "nothing alike",
        _of_stream,
        any_of(RESIDUAL, "attn_out"),
        planted=(RESIDUAL, "attn_out"),
        said={
            RESIDUAL: "what entered the layer: attention and MLP side by side",
            "attn_out": "attn_out, without the residual",
        }.__getitem__,
    ),
    Mistake(
        "norm-of-repeated",
        ("attn_norm",),
        "the norm of what leaves the layer: it is run twice",
        "norm(f(x))",
        "nothing alike",
        _of_repeated,
    ),
    Mistake(
        "norm-twice",
        STAGE,
        "the norm applied twice",
        "norm(norm(x))",
        "a factor per channel and token",
        _twice,
    ),
    Mistake(
        "norm-without-division",
        STAGE,
        "multiplied with the weight, but not divided by the root mean square",
        "x * w",
        "a factor per token",
        _weight_alone,
    ),
    Mistake(
        "norm-skipped",
        STAGE,
        "the norm is skipped",
        "x",
        "equal to the stream",
        _skipped,
    ),
)
