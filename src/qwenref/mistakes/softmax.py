"""Mistakes in the mask and in softmax over the keys that a query may see."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np

from qwenref.mistakes.mistake import Mistake, Setting, any_of, needs

STAGE = ("attn_softmax",)

LOST = 0.03
"""Of a row's sum, at least, to tell what took it: rounding to bfloat16 takes 0.004 at most."""


def _visible(s: Setting, offset: int = 0) -> np.ndarray:
    """Return which keys are at most `offset` after each query, [T, S]."""
    return np.arange(s.given[0].shape[-1]) <= s.positions[:, None] + offset


def _softmax(scores: np.ndarray, visible: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return softmax over visible cells; rows without any are NaN."""
    largest = np.max(np.where(visible, scores, -np.inf), axis=axis, keepdims=True)
    powers = np.where(visible, np.exp(scores - largest), 0.0)
    return powers / powers.sum(axis=axis, keepdims=True)


def _masked(s: Setting, visible: np.ndarray) -> np.ndarray:
    return _softmax(s.unmasked(), visible)


def _off_by_one(s: Setting, by: int) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    return _masked(s, _visible(s, by))


def _not_itself(s: Setting, first: str) -> np.ndarray:
    """Queries do not see themselves; the first one sees nothing."""
    needs(s.sizes["T"] > 1)
    found = _masked(s, _visible(s, -1))
    found[:, s.positions == 0] = EMPTY[first](found.shape[-1])
    return found


def _everything(s: Setting) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    return _masked(s, np.ones_like(_visible(s)))


def _window(s: Setting, width: int) -> np.ndarray:
    needs(0 < width < s.sizes["T"])
    far = np.arange(s.given[0].shape[-1]) <= s.positions[:, None] - width
    return _masked(s, _visible(s) & ~far)


def _windows(s: Setting, dumped: np.ndarray | None) -> Iterator[int]:
    """Yield how many keys the last query looks at."""
    if dumped is None:
        yield from (4, 8)
        return
    for row in (dumped[:, -1], dumped[:, len(dumped[0]) // 2]):
        yield int(np.count_nonzero(row.any(axis=0)))


def _transposed(s: Setting) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    return _masked(s, np.arange(s.given[0].shape[-1]) >= s.positions[:, None])


def _chunked(s: Setting, width: int) -> np.ndarray:
    """Queries see the keys of their own chunk alone."""
    needs(0 < width < s.sizes["T"])
    same = np.arange(s.given[0].shape[-1]) // width == (s.positions // width)[:, None]
    return _masked(s, _visible(s) & same)


def _prefix(s: Setting, length: int) -> np.ndarray:
    needs(1 < length < s.sizes["T"] + 1)
    first = np.arange(s.given[0].shape[-1]) < length
    return _masked(s, _visible(s) | first)


def _prefixes(s: Setting, dumped: np.ndarray | None) -> Iterator[int]:
    if dumped is not None:
        seen = int(np.count_nonzero(dumped[:, 0].any(axis=0)))
        if seen < s.sizes["T"]:
            yield seen


EMPTY = {
    "zeros": lambda keys: 0.0,
    "NaN": lambda keys: np.nan,
    "the same for all keys": lambda keys: 1 / keys,
}
"""What there may be in the row of a query that sees no key."""


def _first_hidden(s: Setting, how: tuple[int, str]) -> np.ndarray:
    number, empty = how
    needs(number < s.sizes["T"])
    keys = s.given[0].shape[-1]
    found = _masked(s, _visible(s) & (np.arange(keys) >= number))
    found[:, s.positions < number] = EMPTY[empty](keys)
    return found


def _multiplied(s: Setting) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    scores = np.where(_visible(s), s.given[0], 0.0)
    return _softmax(scores, np.ones_like(_visible(s)))


def _weak(s: Setting, by: float) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    scores = s.unmasked() - np.where(_visible(s), 0.0, by)
    return _softmax(scores, np.ones_like(_visible(s)))


def _after(s: Setting) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    return np.where(_visible(s), _everything(s), 0.0)


def _over_queries(s: Setting) -> np.ndarray:
    needs(s.sizes["T"] > 1 and len(s.positions) == s.sizes["T"])
    return _softmax(s.unmasked(), _visible(s), axis=-2)


def _over_heads(s: Setting) -> np.ndarray:
    needs(s.sizes["N"] > 1)
    scores = np.where(_visible(s), s.given[0], 0.0)
    return np.where(_visible(s), _softmax(scores, np.ones_like(scores, bool), axis=0), 0.0)


def _temperature(s: Setting, factor: float) -> np.ndarray:
    return _softmax(s.given[0] * factor, _visible(s))


def _temperatures(s: Setting, dumped: np.ndarray | None) -> Iterator[float]:
    H = s.sizes["H"]
    yield from (np.log(2), 1 / np.log(2), H**-0.5, H**0.5, 2.0, 0.5)
    if dumped is None or not np.isfinite(dumped).all():
        return
    right, seen = s.right(*s.given), _visible(s)
    usable = seen & (right > 1e-6) & (dumped > 1e-6)
    weight = np.where(usable, np.minimum(right, dumped), 0.0)
    scores = np.where(usable, s.given[0], 0.0)
    logs = np.log(np.where(usable, dumped, 1.0))
    total = np.maximum(weight.sum(axis=-1, keepdims=True), 1e-300)
    scores, logs = (x - (x * weight).sum(axis=-1, keepdims=True) / total for x in (scores, logs))
    squares = np.sum(weight * scores * scores)
    if squares > 0:
        found = float(np.sum(weight * scores * logs) / squares)
        if found > 0:
            yield from (float(f"{found:.{digits}g}") for digits in (2, 3))
            yield found


def _base(factor: float) -> str:
    names = {
        np.log(2): "2**s instead of e**s",
        1 / np.log(2): "e**(s * log2(e)): the base changed twice",
    }
    return next(
        (text for at, text in names.items() if abs(at - factor) < 1e-9),
        f"scores times {factor:.4g}",
    )


def _sink(s: Setting, sink: float) -> np.ndarray:
    """One more key, with a score, and no value."""
    scores, seen = s.given[0], _visible(s)
    largest = np.maximum(np.max(np.where(seen, scores, -np.inf), axis=-1, keepdims=True), sink)
    powers = np.where(seen, np.exp(scores - largest), 0.0)
    return powers / (powers.sum(axis=-1, keepdims=True) + np.exp(sink - largest))


def _one_unscaled(s: Setting) -> np.ndarray:
    scores, seen = s.given[0], _visible(s)
    largest = np.max(np.where(seen, scores, -np.inf), axis=-1, keepdims=True)
    powers = np.where(seen, np.exp(scores - largest), 0.0)
    return powers / (powers.sum(axis=-1, keepdims=True) + 1)


def _sinks(s: Setting, dumped: np.ndarray | None) -> Iterator[float]:
    yield 0.0
    if dumped is None or not np.isfinite(dumped).all():
        return
    lost = 1 - dumped.sum(axis=-1)
    shows = (lost > LOST) & (lost < 1)
    if shows.any():
        total = np.where(_visible(s), np.exp(s.given[0]), 0.0).sum(axis=-1)[shows]
        found = float(np.median(np.log(total * lost[shows] / (1 - lost[shows]))))
        yield from (float(f"{found:.2g}"), found)


class _Dropout(NamedTuple):
    """Which probabilities are kept, and what those are multiplied with."""

    kept: np.ndarray
    factor: float


def _dropped(s: Setting, how: _Dropout) -> np.ndarray:
    right = s.right(*s.given)
    needs(how.kept.shape == right.shape)
    return np.where(how.kept, right * how.factor, 0.0)


def _dropouts(s: Setting, dumped: np.ndarray | None) -> Iterator[_Dropout]:
    """Yield which are kept: that is random, and can be known from the dump alone."""
    if dumped is None or not np.isfinite(dumped).all():
        return
    right = s.right(*s.given)
    kept = (dumped != 0) & (right > 0)
    if kept.any() and not kept.all(where=_visible(s)):
        factor = float(np.median(dumped[kept] / right[kept]))
        yield from (_Dropout(kept, float(f"{factor:.2g}")), _Dropout(kept, factor))


def _some_dropped(s: Setting) -> _Dropout:
    right = s.right(*s.given)
    kept = np.random.default_rng(0).uniform(size=right.shape) > 0.1
    needs(not kept[right > 0].all())
    return _Dropout(kept, 1 / 0.9)


def _undivided(s: Setting) -> np.ndarray:
    scores, seen = s.given[0], _visible(s)
    largest = np.max(np.where(seen, scores, -np.inf), axis=-1, keepdims=True)
    return np.where(seen, np.exp(scores - largest), 0.0)


def _sigmoid(s: Setting) -> np.ndarray:
    return np.where(_visible(s), 1 / (1 + np.exp(-s.given[0])), 0.0)


def _logarithm(s: Setting) -> np.ndarray:
    right = s.right(*s.given)
    return np.where(_visible(s), np.log(np.where(right > 0, right, 1.0)), 0.0)


def _linear(s: Setting) -> np.ndarray:
    """No exponential: scores divided by their sum."""
    seen = np.where(_visible(s), s.given[0], 0.0)
    return seen / seen.sum(axis=-1, keepdims=True)


def _twice(s: Setting) -> np.ndarray:
    return s.right(s.right(*s.given))


def _overflowing(s: Setting, largest: float) -> np.ndarray:
    """exp(s) without the largest subtracted, in a format that ends somewhere."""
    powers = np.where(_visible(s), np.exp(s.given[0]), 0.0)
    needs(bool(np.any(powers > largest)))
    powers = np.where(powers > largest, np.inf, powers)
    total = powers.sum(axis=-1, keepdims=True)
    return powers / np.where(total > largest, np.inf, total)


MISTAKES = (
    Mistake(
        "mask-missing",
        STAGE,
        "no causal mask",
        "softmax over all keys",
        "all tokens but the last",
        _everything,
    ),
    Mistake(
        "mask-off-by-one",
        STAGE,
        "the mask off by {:+d}: a query sees keys that come after it",
        "keys up to t + n",
        "all tokens but the last",
        _off_by_one,
        any_of(1, 2),
        planted=(1,),
    ),
    Mistake(
        "mask-not-itself",
        STAGE,
        "the mask off by -1: a query does not see itself; the first one's row is {}",
        "keys up to t - 1",
        "every token",
        _not_itself,
        any_of(*EMPTY),
        planted=tuple(EMPTY),
    ),
    Mistake(
        "mask-window",
        STAGE,
        "a sliding window of {}",
        "keys after t - w",
        "tokens from w on",
        _window,
        _windows,
        planted=(4, 1),
    ),
    Mistake(
        "mask-chunked",
        STAGE,
        "queries see the {} keys of their own chunk alone",
        "keys of the same t // w",
        "tokens from w on",
        _chunked,
        lambda s, _: range(1, min(s.sizes["T"], 65)),
        planted=(4,),
    ),
    Mistake(
        "mask-transposed",
        STAGE,
        "the mask transposed: a query sees what comes after it",
        "keys from t on",
        "every token",
        _transposed,
    ),
    Mistake(
        "mask-prefix",
        STAGE,
        "all queries see the first {} keys",
        "keys up to t, and up to n",
        "the first n - 1 tokens",
        _prefix,
        _prefixes,
        planted=(3,),
    ),
    Mistake(
        "mask-first-hidden",
        STAGE,
        "masked as if they were padding: {}",
        "keys from n to t",
        "every token",
        _first_hidden,
        any_of(*product((1, 2, 3, 4), EMPTY)),
        planted=((1, "zeros"), (1, "the same for all keys"), (2, "NaN")),
        said=lambda how: f"the first {how[0]} keys; rows that see none are {how[1]}",
    ),
    Mistake(
        "mask-of-zeros",
        STAGE,
        "masked scores are 0, not -inf",
        "softmax of s * mask",
        "all tokens but the last",
        _multiplied,
    ),
    Mistake(
        "mask-weak",
        STAGE,
        "masked scores are only {:g} smaller",
        "softmax of s - c where masked",
        "all tokens but the last",
        _weak,
        any_of(1.0, 5.0, 10.0),
        planted=(5.0,),
    ),
    Mistake(
        "mask-after-softmax",
        STAGE,
        "masked after softmax: rows do not sum to 1",
        "softmax over all keys, then * mask",
        "all tokens but the last, by a factor per row",
        _after,
    ),
    Mistake(
        "softmax-over-queries",
        STAGE,
        "softmax over the queries",
        "exp(s) / sum over t of exp(s)",
        "every row",
        _over_queries,
    ),
    Mistake(
        "softmax-over-heads",
        STAGE,
        "softmax over the heads",
        "exp(s) / sum over n of exp(s)",
        "every row",
        _over_heads,
    ),
    Mistake(
        "softmax-temperature",
        STAGE,
        "{}",
        "softmax(c * s)",
        "every row but the first",
        _temperature,
        _temperatures,
        planted=(float(np.log(2)), 0.5, 1.1),
        said=_base,
    ),
    Mistake(
        "softmax-sink",
        STAGE,
        "one more in the sum: an attention sink of {:.3g}",
        "exp(s) / (sum of exp(s) + exp(c))",
        "every row by a factor",
        _sink,
        _sinks,
        planted=(0.0, 1.5),
    ),
    Mistake(
        "softmax-one-unscaled",
        STAGE,
        "1 added to the sum, which the largest score was subtracted in, and not in the 1",
        "exp(s - largest) / (sum of exp(s - largest) + 1)",
        "every row by a factor",
        _one_unscaled,
    ),
    Mistake(
        "softmax-dropout",
        STAGE,
        "dropout left on: some are 0, the others times {}",
        "p * random zeros / (1 - rate)",
        "every row",
        _dropped,
        _dropouts,
        planted=(_some_dropped,),
        said=lambda how: f"{how.factor:.3g}",
        general=True,
    ),
    Mistake(
        "softmax-undivided",
        STAGE,
        "not divided by the sum",
        "exp(s - largest)",
        "every row by a factor",
        _undivided,
    ),
    Mistake(
        "softmax-sigmoid",
        STAGE,
        "sigmoid instead of softmax",
        "1 / (1 + exp(-s))",
        "every row",
        _sigmoid,
    ),
    Mistake(
        "softmax-logarithm",
        STAGE,
        "log_softmax instead of softmax",
        "log(softmax(s))",
        "every row",
        _logarithm,
    ),
    Mistake(
        "softmax-linear",
        STAGE,
        "scores divided by their sum, without exp",
        "s / sum of s",
        "every row",
        _linear,
    ),
    Mistake(
        "softmax-twice",
        STAGE,
        "softmax applied twice",
        "softmax(softmax(s))",
        "every row but the first",
        _twice,
    ),
    Mistake(
        "softmax-overflow",
        STAGE,
        "exp overflows beyond {:g}: the largest score is not subtracted",
        "exp(s) / sum of exp(s), inf / inf",
        "NaN, in rows of large scores",
        _overflowing,
        any_of(65504.0, 3.4028235e38),
        planted=(65504.0,),
    ),
)
