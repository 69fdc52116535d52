"""Mistakes in the scores, q . k / sqrt(H)."""

from collections.abc import Callable, Iterator

import numpy as np

from qwenref.mistakes.mistake import Mistake, Setting, any_of, needs
from qwenref.mistakes.projections import block

STAGE = ("attn_scores",)

FACTORS = {
    "missing": lambda of: 1.0,
    "1/H": lambda of: 1 / of["H"],
    "sqrt(H), inverted": lambda of: of["H"] ** 0.5,
    "1/sqrt(D)": lambda of: of["D"] ** -0.5,
    "1/sqrt(K*H)": lambda of: (of["K"] * of["H"]) ** -0.5,
    "1/sqrt(N)": lambda of: of["N"] ** -0.5,
    "1/sqrt(H/2)": lambda of: (of["H"] / 2) ** -0.5,
    "1/sqrt(2H)": lambda of: (of["H"] * 2) ** -0.5,
    "1/8, of heads of 64": lambda of: 0.125,
    "1/sqrt(128), of heads of 128": lambda of: 128**-0.5,
    "H**-0.25": lambda of: of["H"] ** -0.25,
}
"""What there may be instead of 1/sqrt(H)."""

CAPS = (50.0, 30.0, 20.0)


def products(s: Setting, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return q . k, [N, T, S], of q [T, N, H] and k [S, N, H]."""
    q, k = (s.rounded("scores_operands", x) for x in (q, k))
    return s.rounded("products", np.matmul(q.swapaxes(0, 1), k.transpose(1, 2, 0)))


def _shared(s: Setting, k: np.ndarray) -> np.ndarray:
    """Return k [S, K, H] as query heads read it, [S, N, H]."""
    return np.repeat(k, s.sizes["G"], axis=1)


def _scores(s: Setting, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    return products(s, q, _shared(s, k)) * s.sizes["H"] ** -0.5


def _scaled(s: Setting, how: str) -> np.ndarray:
    factor = FACTORS[how](s.sizes)
    needs(abs(factor * s.sizes["H"] ** 0.5 - 1) > 1e-9)
    q, k = s.given
    return products(s, q, _shared(s, k)) * factor


def heads_before_rope(s: Setting, values: np.ndarray, name: str) -> np.ndarray:
    """Return q, k or v as heads, of [T, F]."""
    of = values[:, block(s, name)]
    return of.reshape(len(of), -1, s.sizes["H"])


def _unrotated(s: Setting, which: str) -> np.ndarray:
    q, k = s.given
    if "q" in which:
        q = heads_before_rope(s, s.rows("qkv_bias"), "q")
    if "k" in which:
        k = heads_before_rope(s, s.everywhere("qkv_bias"), "k")
    return _scores(s, q, k)


def _transposed(s: Setting) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    q, k = s.everywhere("q_post_rope"), s.given[1]
    whole = _scores(s, q, k)
    return whole.swapaxes(1, 2)[:, s.positions]


def tiled(s: Setting, kv: np.ndarray) -> np.ndarray:
    """Return k or v for head n from head n % K."""
    return np.tile(kv, (1, s.sizes["G"], 1))


MAPS: dict[str, Callable[[Setting, np.ndarray], np.ndarray]] = {
    "n % K": tiled,
    "0": lambda s, kv: np.repeat(kv[:, :1], s.sizes["N"], axis=1),
    "K-1 - n//G": lambda s, kv: np.repeat(kv[:, ::-1], s.sizes["G"], axis=1),
    "(n//G + 1) % K": lambda s, kv: np.repeat(np.roll(kv, -1, axis=1), s.sizes["G"], axis=1),
    "min(n, K-1)": lambda s, kv: kv[:, np.minimum(np.arange(s.sizes["N"]), s.sizes["K"] - 1)],
}
"""Which key or value head query head n may read, instead of n // G."""


def mapped(s: Setting, kv: np.ndarray, how: str) -> np.ndarray:
    """Return k or v as query heads read it by one of `MAPS`, [S, N, H].

    Raises:
        CannotBe: It is the right way, here.
    """
    N, K = s.sizes["N"], s.sizes["K"]
    number = MAPS[how](s, np.arange(K)[None, :, None])[0, :, 0]
    needs(not np.array_equal(number, np.arange(N) // s.sizes["G"]))
    return MAPS[how](s, kv)


def _mapped(s: Setting, how: str) -> np.ndarray:
    q, k = s.given
    return products(s, q, mapped(s, k, how)) * s.sizes["H"] ** -0.5


def _capped(s: Setting, cap: float) -> np.ndarray:
    return cap * np.tanh(s.right(*s.given) / cap)


def _distances(s: Setting) -> np.ndarray:
    """Return how far behind its query each key is, [T, S]."""
    return s.positions[:, None] - np.arange(len(s.given[1]))


def _distance_bias(s: Setting, kind: str) -> np.ndarray:
    N = s.sizes["N"]
    slopes = 2.0 ** (-8 * (np.arange(N) + 1) / N) * (1 if kind == "ALiBi" else -1)
    return s.right(*s.given) - slopes[:, None, None] * _distances(s)


def _slope(s: Setting, slopes: tuple[float, ...]) -> np.ndarray:
    return s.right(*s.given) - np.array(slopes)[:, None, None] * _distances(s)


def _slopes(s: Setting, dumped: np.ndarray | None) -> Iterator[tuple[float, ...]]:
    if dumped is None or s.sizes["T"] < 2:
        return
    visible = np.maximum(_distances(s), 0)
    off = np.where(visible > 0, s.right(*s.given) - dumped, 0)
    yield tuple((np.sum(off * visible, axis=(1, 2)) / max(np.sum(np.square(visible)), 1)).tolist())


def _late(s: Setting, how: tuple[int, bool]) -> np.ndarray:
    q, k = s.given
    return _scores(s, q, late(k, *how))


def late(rows: np.ndarray, by: int, empty: bool) -> np.ndarray:
    """Return keys or values that lie in the wrong slots of the cache; its first may be empty.

    Raises:
        CannotBe: There are no others.
    """
    needs(len(rows) > 1)
    rows = np.roll(rows, by, axis=0)
    if empty:
        rows[:by] = 0
    return rows


LATE = ((1, False), (-1, False), (1, True), (2, True))
"""By how many slots, and whether the first ones hold zeros."""


def late_named(how: tuple[int, bool]) -> str:
    """Return one of `LATE` in words."""
    by, empty = how
    return f"shifted by {by:+d} tokens in the cache" + (", whose first are zeros" if empty else "")


def _part(s: Setting, part: str) -> np.ndarray:
    q, k = s.given
    q, half = q.copy(), s.sizes["H"] // 2
    q[..., half:] = 0 if part == "first" else q[..., half:]
    q[..., :half] = 0 if part == "second" else q[..., :half]
    return _scores(s, q, k)


def _query(s: Setting) -> np.ndarray:
    """Queries in the place of keys."""
    q = s.everywhere("q_post_rope")
    return products(s, s.given[0], q) * s.sizes["H"] ** -0.5


MISTAKES = (
    Mistake(
        "scores-scale",
        STAGE,
        "scale {} instead of 1/sqrt(H)",
        "q . k * c",
        "all scores by one factor",
        _scaled,
        any_of(*FACTORS),
        planted=("missing", "1/H", "sqrt(H), inverted", "1/sqrt(D)"),
    ),
    Mistake(
        "scores-before-rope",
        STAGE,
        "{} taken before RoPE",
        "q or k of qkv_bias",
        "all but the first cell",
        _unrotated,
        any_of("q", "k", "qk"),
        planted=("q", "k", "qk"),
        said={"q": "queries", "k": "keys", "qk": "queries and keys"}.__getitem__,
    ),
    Mistake(
        "scores-transposed",
        STAGE,
        "queries and keys swapped",
        "q[s] . k[t] / sqrt(H)",
        "all cells off the diagonal",
        _transposed,
    ),
    Mistake(
        "scores-gqa",
        STAGE,
        "query head n reads KV head {} for its keys, not n // G",
        "q[n] . k[m] / sqrt(H)",
        "some heads",
        _mapped,
        any_of(*MAPS),
        planted=tuple(MAPS),
    ),
    Mistake(
        "scores-capped",
        STAGE,
        "soft cap of {:g}, as Gemma 2 has",
        "c * tanh(s / c)",
        "large scores, towards 0",
        _capped,
        any_of(*CAPS),
        planted=(50.0,),
    ),
    Mistake(
        "scores-alibi",
        STAGE,
        "a bias by distance: {}",
        "s - slope of the head * (t - s)",
        "all cells off the diagonal, in proportion to the distance",
        _distance_bias,
        any_of("ALiBi", "ALiBi with the wrong sign"),
        planted=("ALiBi",),
    ),
    Mistake(
        "scores-distance",
        STAGE,
        "a bias that grows with the distance",
        "s - c of the head * (t - s)",
        "all cells off the diagonal, in proportion to the distance",
        _slope,
        _slopes,
        planted=((0.1,),),
        general=True,
    ),
    Mistake(
        "scores-keys-late",
        STAGE,
        "keys are {}",
        "q[t] . k[s - n] / sqrt(H)",
        "all cells",
        _late,
        any_of(*LATE),
        planted=LATE[:3],
        said=late_named,
    ),
    Mistake(
        "scores-part-of-head",
        STAGE,
        "summed over the {} half of each head alone",
        "sum over H/2 channels of q k / sqrt(H)",
        "all cells",
        _part,
        any_of("first", "second"),
        planted=("first",),
    ),
    Mistake(
        "scores-of-queries",
        STAGE,
        "queries in the place of keys",
        "q . q / sqrt(H)",
        "all cells",
        _query,
    ),
)
