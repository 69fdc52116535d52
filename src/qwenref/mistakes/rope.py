"""Mistakes in the rotary embedding: each pair (i, i + H/2) by position * theta**(-2i/H)."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from qwenref.mistakes.mistake import Mistake, Setting, any_of, needs
from qwenref.mistakes.projections import block
from qwenref.model.formats import in_format

STAGES = ("q_post_rope", "k_post_rope")
THETAS = (10000.0, 1000000.0, 500000.0, 5000000.0, 100000.0, 160000.0, 10000000.0, 1.0)
"""Of other models: Llama 2, Qwen2.5, Llama 3, Qwen3 2507, Yi, .."""

FAR = 64
"""Positions that are tried beside those of the prompt."""


def heads(s: Setting, values: np.ndarray) -> np.ndarray:
    """Return this stage's heads [T, J, H] of values [T, F]."""
    of = values[:, block(s, s.stage[0])]
    return of.reshape(len(of), -1, s.sizes["H"])


def frequencies(s: Setting, theta: float | None = None) -> np.ndarray:
    """Return theta**(-2i/H), [H/2]."""
    H = s.sizes["H"]
    return (theta or s.config.rope_theta) ** -(np.arange(0, H, 2) / H)


def _angles(s: Setting, frequency: np.ndarray | None = None) -> np.ndarray:
    """Return angles [T, 1, H/2]."""
    of = frequencies(s) if frequency is None else frequency
    return s.positions[:, None, None] * of


def rotated(
    s: Setting,
    x: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    *,
    taken: str = "halves",
    put: str = "halves",
) -> np.ndarray:
    """Rotate pairs that are taken from, and put, (i, i + H/2) or (2i, 2i + 1)."""
    left, right = _pairs(x, taken)
    cos, sin = s.rounded("cos_sin", cos), s.rounded("cos_sin", sin)
    pairs = [
        s.rounded("rotated", left * cos) - s.rounded("rotated", right * sin),
        s.rounded("rotated", right * cos) + s.rounded("rotated", left * sin),
    ]
    if put == "halves":
        return np.concatenate(pairs, axis=-1)
    return np.stack(pairs, axis=-1).reshape(x.shape)


def _pairs(x: np.ndarray, taken: str) -> tuple[np.ndarray, np.ndarray]:
    if taken == "neighbours":
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _by(s: Setting, angles: np.ndarray, **how: str) -> np.ndarray:
    return rotated(s, heads(s, s.given[0]), np.cos(angles), np.sin(angles), **how)


def _interleaved(s: Setting, how: tuple[str, str]) -> np.ndarray:
    taken, put = how
    return _by(s, _angles(s), taken=taken, put=put)


def _mixed(s: Setting) -> np.ndarray:
    """Halves are rotated with cos and sin laid out for neighbours."""
    x = heads(s, s.given[0])
    cos, sin = (
        s.rounded("cos_sin", np.repeat(f(_angles(s)), 2, axis=-1)) for f in (np.cos, np.sin)
    )
    left, right = _pairs(x, "halves")
    across = np.concatenate([-right, left], axis=-1)
    return s.rounded("rotated", x * cos) + s.rounded("rotated", across * sin)


def _theta(s: Setting, theta: float) -> np.ndarray:
    return _by(s, _angles(s, frequencies(s, theta)))


def _turned(s: Setting, dumped: np.ndarray) -> np.ndarray:
    """Return, of each token and pair, the complex number that turned the input, [T, H/2]."""
    before, after = (
        left + 1j * right for left, right in (_pairs(x, "halves") for x in (_finite(s), dumped))
    )
    return np.sum(before.conj() * after, axis=1)


def _finite(s: Setting) -> np.ndarray:
    x = heads(s, s.given[0])
    return np.where(np.isfinite(x), x, 0.0)


def _theta_values(s: Setting, dumped: np.ndarray | None) -> Iterator[float]:
    """Yield known ones, then the one that fits the dump best."""
    yield from (theta for theta in THETAS if theta != s.config.rope_theta)
    if dumped is None or not np.isfinite(dumped).all():
        return
    turned = _turned(s, dumped)

    def likeness(logarithm: np.ndarray) -> np.ndarray:
        of = np.exp(-logarithm[:, None] * (np.arange(0, s.sizes["H"], 2) / s.sizes["H"]))
        turns = np.exp(-1j * of[:, None, :] * s.positions[:, None])
        return np.sum(np.real(turned * turns), axis=(1, 2))

    at, step = math.log(s.config.rope_theta), 0.0
    for number, reach in ((400, 12.0), *((20, 12.0 / 200 / 8**n) for n in range(10))):
        tried = at + np.linspace(-reach, reach, number + 1)
        at, step = float(tried[np.argmax(likeness(tried))]), 2 * reach / number
    best = math.exp(at)
    yield from (float(f"{best:.{digits}g}") for digits in (2, 3, 4))
    if step < 1e-6:
        yield best


def _with_positions(s: Setting, positions: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return _by(s, positions(s.positions)[:, None, None] * frequencies(s))


def _offset(s: Setting, by: int) -> np.ndarray:
    return _with_positions(s, lambda at: at + by)


def _scaled(s: Setting, by: float) -> np.ndarray:
    return _with_positions(s, lambda at: at * by)


def _listed(s: Setting, positions: tuple[int, ...]) -> np.ndarray:
    return _with_positions(s, lambda at: np.asarray(positions, np.float64)[at])


def _positions_of(s: Setting, dumped: np.ndarray | None) -> Iterator[tuple[int, ...]]:
    """Yield for each token the position that its rotation is of."""
    if dumped is None or not np.isfinite(dumped).all() or len(dumped) < s.sizes["T"]:
        return
    tried = np.arange(-FAR, 2 * s.sizes["T"] + FAR)
    turns = np.exp(-1j * tried[:, None] * frequencies(s))
    found = tried[np.argmax(np.real(_turned(s, dumped) @ turns.T), axis=1)]
    if not np.array_equal(found, s.positions):
        yield tuple(found.tolist())


def _offsets(s: Setting, dumped: np.ndarray | None) -> Iterator[int]:
    yield from (1, -1, 2)
    for positions in _positions_of(s, dumped):
        steps = {after - before for before, after in enumerate(positions)}
        if len(steps) == 1 and not steps & {1, -1, 2}:
            yield steps.pop()


def _in_words(positions: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, positions[:8]))
    return shown + (", .." if len(positions) > 8 else "")


def _reversed(s: Setting) -> np.ndarray:
    return _by(s, -_angles(s))


def _swapped(s: Setting) -> np.ndarray:
    angles = _angles(s)
    return rotated(s, heads(s, s.given[0]), np.sin(angles), np.cos(angles))


def _one_sign(s: Setting, which: int) -> np.ndarray:
    """Return the rotation with the wrong sign in one half."""
    angles, x = _angles(s), heads(s, s.given[0])
    pair = [
        np.split(rotated(s, x, np.cos(angles), np.sin(sign * angles)), 2, axis=-1)[half]
        for half, sign in enumerate((-1, 1) if which == 0 else (1, -1))
    ]
    return np.concatenate(pair, axis=-1)


def _exponent(s: Setting, how: str) -> np.ndarray:
    H, theta = s.sizes["H"], s.config.rope_theta
    numbers = np.arange(H // 2)
    exponents = {
        "i/H": numbers / H,
        "4i/H": 4 * numbers / H,
        "2i/D": 2 * numbers / s.sizes["D"],
        "2(i+1)/H": 2 * (numbers + 1) / H,
        "2i/(H-2)": 2 * numbers / max(H - 2, 1),
        "-2i/H": -2 * numbers / H,
    }
    needs(how != "2i/D" or s.sizes["D"] != H)
    return _by(s, _angles(s, theta ** -exponents[how]))


def _backwards(s: Setting) -> np.ndarray:
    return _by(s, _angles(s, frequencies(s)[::-1]))


def _partial(s: Setting, how: tuple[float, bool]) -> np.ndarray:
    """Rotate the first channels alone, as heads of that many, or by the first frequencies."""
    part, own = how
    x, width = heads(s, s.given[0]), int(s.sizes["H"] * part) // 2 * 2
    needs(0 < width < s.sizes["H"])
    of = s.config.rope_theta ** -(np.arange(0, width, 2) / (width if own else s.sizes["H"]))
    angles = s.positions[:, None, None] * of
    turned = rotated(s, x[..., :width], np.cos(angles), np.sin(angles))
    return np.concatenate([turned, x[..., width:]], axis=-1)


def _part_named(how: tuple[float, bool]) -> str:
    part, own = how
    return f"{part:.0%} of each head's channels rotated, " + (
        "as heads of that size" if own else "by the first frequencies"
    )


def _coarse(s: Setting, how: tuple[str, str]) -> np.ndarray:
    what, narrow = how
    of = frequencies(s)
    if what == "frequencies":
        return _by(s, _angles(s, in_format(of, narrow)))
    return _by(s, in_format(_angles(s), narrow))


def _first_pairs(s: Setting, part: float) -> np.ndarray:
    number = int(s.sizes["H"] // 2 * part)
    needs(0 < number < s.sizes["H"] // 2)
    of = frequencies(s)
    of[number:] = 0
    return _by(s, _angles(s, of))


def _skipped(s: Setting) -> np.ndarray:
    return heads(s, s.given[0])


def _by_head(s: Setting) -> np.ndarray:
    x = heads(s, s.given[0])
    return _by(s, np.arange(x.shape[1])[:, None] * frequencies(s))


def _before_bias(s: Setting) -> np.ndarray:
    x, angles = heads(s, s.given[0]), _angles(s)
    bias = s.tensor(f"{s.stage[0]}_bias").reshape(1, *x.shape[1:])
    return rotated(s, x - bias, np.cos(angles), np.sin(angles)) + bias


def _some_heads(s: Setting, number: str) -> np.ndarray:
    x, N = heads(s, s.given[0]), s.sizes["N"]
    first = {"first": 1, "first K": s.sizes["K"]}[number]
    needs(first < x.shape[1] and N > 1)
    values = x.copy()
    angles = _angles(s)
    values[:, :first] = rotated(s, x[:, :first], np.cos(angles), np.sin(angles))
    return values


def _interpolated(s: Setting, factor: float) -> np.ndarray:
    """NTK-aware: theta * factor**(H/(H-2))."""
    H = s.sizes["H"]
    needs(H > 2)
    return _theta(s, s.config.rope_theta * factor ** (H / (H - 2)))


def _yarn(s: Setting, length: int) -> np.ndarray:
    """YaRN with factor 4 (arXiv 2309.00071), as Qwen2.5 suggests for long texts."""
    H, factor = s.sizes["H"], 4.0
    own = frequencies(s)

    def edge(turns: float) -> float:
        return H * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(s.config.rope_theta))

    low, high = max(math.floor(edge(32.0)), 0), min(math.ceil(edge(1.0)), H - 1)
    ramp = np.clip((np.arange(H // 2) - low) / max(high - low, 1e-3), 0, 1)
    angles = _angles(s, own / factor * ramp + own * (1 - ramp))
    size = 0.1 * math.log(factor) + 1
    return rotated(s, heads(s, s.given[0]), size * np.cos(angles), size * np.sin(angles))


def _llama3(s: Setting) -> np.ndarray:
    """Frequencies of Llama 3.1: factor 8, low 1, high 4, length 8192."""
    own = frequencies(s)
    turns = 8192 * own / (2 * math.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    return _by(s, _angles(s, (1 - smooth) * own / 8 + smooth * own))


def _head_norm(s: Setting, after: bool) -> np.ndarray:
    x = heads(s, s.given[0])

    def norm(of: np.ndarray) -> np.ndarray:
        return of / np.sqrt(np.mean(np.square(of), axis=-1, keepdims=True) + s.config.rms_norm_eps)

    angles = _angles(s)
    turned = rotated(s, x if after else norm(x), np.cos(angles), np.sin(angles))
    return norm(turned) if after else turned


def _rope(
    name: str, text: str, formula: str, shows: str, run: Callable[..., np.ndarray], **more: Any
) -> Mistake:
    return Mistake(f"rope-{name}", STAGES, text, formula, shows, run, **more)


_NOT_FIRST = "all but the first token"

MISTAKES = (
    _rope(
        "interleaved",
        "interleaved RoPE pairs: {}",
        "pairs (2i, 2i+1) rotated",
        _NOT_FIRST,
        _interleaved,
        values=any_of(
            ("neighbours", "neighbours"), ("neighbours", "halves"), ("halves", "neighbours")
        ),
        planted=(("neighbours", "neighbours"), ("neighbours", "halves")),
        said={
            ("neighbours", "neighbours"): "(2i, 2i+1) instead of halves (i, i+H/2)",
            ("neighbours", "halves"): "taken from (2i, 2i+1), put to halves (i, i+H/2)",
            ("halves", "neighbours"): "taken from halves (i, i+H/2), put to (2i, 2i+1)",
        }.__getitem__,
    ),
    _rope(
        "table-interleaved",
        "cos and sin laid out for interleaved pairs, but halves rotated",
        "angle of channel c: position * theta**(-2 (c // 2) / H)",
        _NOT_FIRST,
        _mixed,
    ),
    _rope(
        "theta",
        "rope_theta {}",
        "position * theta'**(-2i/H)",
        f"{_NOT_FIRST}, and all but the first pair; more in later tokens",
        _theta,
        values=_theta_values,
        planted=(10000.0, 1010000.0),
        said="{:g}".format,
    ),
    _rope(
        "offset",
        "positions are off by {}",
        "(position + n) * theta**(-2i/H)",
        "every token, by about the same angle",
        _offset,
        values=_offsets,
        planted=(1, -1, 7),
        said="{:+d}".format,
    ),
    _rope(
        "scaled",
        "positions multiplied with {}, as linear scaling does",
        "position * c * theta**(-2i/H)",
        f"{_NOT_FIRST}, more in later tokens",
        _scaled,
        values=any_of(0.25, 0.5, 2.0, 0.125, 4.0),
        planted=(0.25,),
        said="{:g}".format,
    ),
    _rope(
        "positions",
        "tokens have the positions {}",
        "other positions * theta**(-2i/H)",
        "the tokens that have another position",
        _listed,
        values=_positions_of,
        planted=((0, 0, *range(1, 23)), (0, *range(23))),
        said=_in_words,
        general=True,
    ),
    _rope(
        "reversed",
        "rotated in the other direction",
        "-position * theta**(-2i/H)",
        _NOT_FIRST,
        _reversed,
    ),
    _rope(
        "cos-sin-swapped",
        "cos and sin swapped",
        "x * sin + rotate_half(x) * cos",
        "every token, the first too",
        _swapped,
    ),
    _rope(
        "one-sign",
        "the wrong sign in the {} half alone",
        "(x1 cos + x2 sin, x2 cos + x1 sin)",
        f"{_NOT_FIRST}, half of the channels",
        _one_sign,
        values=any_of(0, 1),
        planted=(0, 1),
        said=("first", "second").__getitem__,
    ),
    _rope(
        "exponent",
        "frequencies theta**-({}) instead of theta**-(2i/H)",
        "position * theta**(-another exponent)",
        f"{_NOT_FIRST}, and all but the first pair",
        _exponent,
        values=any_of("i/H", "4i/H", "2i/D", "2(i+1)/H", "2i/(H-2)", "-2i/H"),
        planted=("i/H", "2i/D"),
    ),
    _rope(
        "backwards",
        "frequencies from the last pair to the first",
        "position * theta**(-2(H/2-1-i)/H)",
        _NOT_FIRST,
        _backwards,
    ),
    _rope(
        "partial",
        "only {}",
        "partial rotary embedding",
        f"{_NOT_FIRST}, many channels",
        _partial,
        values=any_of(*product((0.25, 0.5, 0.75), (True, False))),
        planted=((0.5, True), (0.5, False)),
        said=_part_named,
    ),
    _rope(
        "coarse",
        "{}",
        "position * theta**(-2i/H), rounded before cos and sin",
        f"{_NOT_FIRST}, more in later tokens",
        _coarse,
        values=any_of(*product(("frequencies", "angles"), ("bfloat16", "float16"))),
        planted=(("frequencies", "bfloat16"), ("angles", "bfloat16"), ("frequencies", "float16")),
        said=" rounded to ".join,
        rounds=True,
    ),
    _rope(
        "first-pairs",
        "only the first {:.0%} of the pairs rotated",
        "angle 0 in the others",
        f"{_NOT_FIRST}, pairs of low frequency",
        _first_pairs,
        values=any_of(0.25, 0.5, 0.75),
        planted=(0.5,),
    ),
    _rope("skipped", "not rotated", "x", _NOT_FIRST, _skipped),
    _rope(
        "twice",
        "rotated twice",
        "2 * position * theta**(-2i/H)",
        f"{_NOT_FIRST}, more in later tokens",
        partial(_scaled, by=2.0),
    ),
    _rope(
        "by-head",
        "rotated by the number of the head, not by the position",
        "head * theta**(-2i/H)",
        "every token, all but the first head",
        _by_head,
    ),
    _rope(
        "before-bias",
        "the bias added after the rotation",
        "rotate(x - b) + b",
        _NOT_FIRST,
        _before_bias,
    ),
    _rope(
        "some-heads",
        "only the {} rotated",
        "x in the other heads",
        f"{_NOT_FIRST}, all but some heads",
        _some_heads,
        values=any_of("first", "first K"),
        planted=("first",),
        said={"first": "first head is", "first K": "first K heads are"}.__getitem__,
    ),
    _rope(
        "ntk",
        "theta raised for a context {:g} times as long (NTK)",
        "(theta * c**(H/(H-2)))**(-2i/H)",
        f"{_NOT_FIRST}, and all but the first pair",
        _interpolated,
        values=any_of(2.0, 4.0, 8.0),
        planted=(4.0,),
    ),
    _rope(
        "yarn",
        "YaRN with factor 4 of a context of {}",
        "frequencies between theta**(-2i/H) / 4 and theta**(-2i/H), cos and sin times 1.14",
        "every token, all values 1.14 times too large",
        _yarn,
        values=any_of(32768, 131072),
        planted=(32768,),
    ),
    _rope(
        "llama3",
        "frequencies scaled as Llama 3.1 does",
        "low frequencies divided by 8",
        f"{_NOT_FIRST}, pairs of low frequency",
        _llama3,
    ),
    _rope(
        "head-norm",
        "heads normalised {} RoPE, as Qwen3 does",
        "x / sqrt(mean(x**2) + eps), over a head",
        "a factor per head and token",
        _head_norm,
        values=any_of(False, True),
        planted=(False,),
        said=("before", "after").__getitem__,
    ),
)
