"""Mistakes in attention, softmax times the values."""

import numpy as np

from qwenref.mistakes.mistake import Mistake, Setting, any_of, needs
from qwenref.mistakes.scores import LATE, MAPS, heads_before_rope, late, late_named, mapped

STAGE = ("attention",)


def _v(s: Setting) -> np.ndarray:
    """Return the values, [S, K, H]."""
    K, H = s.sizes["K"], s.sizes["H"]
    return s.given[1][:, -K * H :].reshape(-1, K, H)


def _mixed(s: Setting, p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return heads side by side, [T, E], of p [N, T, S] and v [S, K or N, H]."""
    return _joined(_by_head(s, p, v))


def _by_head(s: Setting, p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return [N, T, H]."""
    if v.shape[1] != s.sizes["N"]:
        v = np.repeat(v, s.sizes["G"], axis=1)
    p, v = (s.rounded("attention_operands", x) for x in (p, v))
    return np.matmul(p, v.swapaxes(0, 1))


def _joined(heads: np.ndarray) -> np.ndarray:
    return heads.swapaxes(0, 1).reshape(heads.shape[1], -1)


def _with_values(s: Setting, v: np.ndarray) -> np.ndarray:
    return _mixed(s, s.given[0], v)


def in_order(s: Setting, heads: np.ndarray, how: str) -> np.ndarray:
    """Return heads [T, N, H] side by side, [T, E], in one of `ORDERS`.

    Raises:
        CannotBe: It is the right one, here, or not all tokens are at hand.
    """
    T, N, H = heads.shape
    if how == "channels before heads":
        return heads.swapaxes(1, 2).reshape(T, -1)
    if how == "heads after channels":
        return heads.reshape(T, H, N).swapaxes(1, 2).reshape(T, -1)
    if how == "heads backwards":
        return heads[:, ::-1].reshape(T, -1)
    if how == "the transposition forgotten":
        needs(T == s.sizes["T"] > 1)
        return heads.swapaxes(0, 1).reshape(T, -1)
    needs(s.sizes["K"] > 1 and s.sizes["G"] > 1)
    shape = (s.sizes["K"], s.sizes["G"])
    shape = shape if how == "heads of a group apart" else shape[::-1]
    return heads.reshape(T, *shape, H).swapaxes(1, 2).reshape(T, -1)


def _head_order(s: Setting, how: str) -> np.ndarray:
    return in_order(s, _by_head(s, s.given[0], _v(s)).swapaxes(0, 1), how)


ORDERS = (
    "channels before heads",
    "heads backwards",
    "the transposition forgotten",
    "heads of a group apart",
    "heads of a group together",
)


def _keys_for_values(s: Setting, rotated: bool) -> np.ndarray:
    if rotated:
        return _with_values(s, s.everywhere("k_post_rope"))
    return _with_values(s, heads_before_rope(s, s.everywhere("qkv_bias"), "k"))


def _before_bias(s: Setting) -> np.ndarray:
    return _with_values(s, heads_before_rope(s, s.everywhere("qkv_matmul"), "v"))


def _rotated(s: Setting) -> np.ndarray:
    v, H = _v(s), s.sizes["H"]
    of = s.config.rope_theta ** -(np.arange(0, H, 2) / H)
    angles = np.arange(len(v))[:, None, None] * of
    cos, sin, left, right = np.cos(angles), np.sin(angles), v[..., : H // 2], v[..., H // 2 :]
    return _with_values(
        s, np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    )


def _late(s: Setting, how: tuple[int, bool]) -> np.ndarray:
    return _with_values(s, late(_v(s), *how))


def _transposed(s: Setting) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    return _mixed(s, s.everywhere("attn_softmax").swapaxes(1, 2)[:, s.positions], _v(s))


def _scores(s: Setting) -> np.ndarray:
    seen = np.arange(len(s.given[1])) <= s.positions[:, None]
    return _mixed(s, np.where(seen, s.rows("attn_scores"), 0.0), _v(s))


def _mean(s: Setting) -> np.ndarray:
    seen = np.arange(len(s.given[1])) <= s.positions[:, None]
    p = np.broadcast_to(seen / seen.sum(axis=-1, keepdims=True), s.given[0].shape)
    return _mixed(s, p, _v(s))


def _own(s: Setting) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    p = np.broadcast_to(np.arange(len(s.given[1])) == s.positions[:, None], s.given[0].shape)
    return _mixed(s, p.astype(np.float64), _v(s))


def _other_head(s: Setting, by: int) -> np.ndarray:
    needs(s.sizes["N"] > 1)
    return _mixed(s, np.roll(s.given[0], by, axis=0), _v(s))


def _part(s: Setting, part: str) -> np.ndarray:
    S = len(s.given[1])
    needs(S > 1)
    p, keys = s.given[0], np.arange(S)
    left_out = {
        "the last key of each query": keys == s.positions[:, None],
        "the first key": keys == 0,
        "the second half of the keys": keys >= (S + 1) // 2,
        "the first half of the keys": keys < (S + 1) // 2,
    }[part]
    return _mixed(s, np.where(left_out, 0.0, p), _v(s))


PARTS = (
    "the last key of each query",
    "the first key",
    "the second half of the keys",
    "the first half of the keys",
)

MISTAKES = (
    Mistake(
        "values-gqa",
        STAGE,
        "query head n reads KV head {} for its values, not n // G",
        "p[n] . v[m]",
        "some heads",
        lambda s, how: _with_values(s, mapped(s, _v(s), how)),
        any_of(*MAPS),
        planted=tuple(MAPS),
    ),
    Mistake(
        "values-head-order",
        STAGE,
        "heads put side by side in the wrong order: {}",
        "another order of [T, N, H]",
        "all but some channels",
        _head_order,
        any_of(*ORDERS),
        planted=ORDERS[:3],
    ),
    Mistake(
        "values-keys",
        STAGE,
        "keys {} RoPE in the place of values",
        "p . k",
        "every token",
        _keys_for_values,
        any_of(True, False),
        planted=(True, False),
        said={True: "after", False: "before"}.__getitem__,
    ),
    Mistake(
        "values-before-bias",
        STAGE,
        "values taken before their bias",
        "p . (x W_v.T)",
        "the same offset in every token",
        _before_bias,
    ),
    Mistake(
        "values-rotated",
        STAGE,
        "RoPE applied to the values too",
        "p . rotate(v)",
        "all but the first token",
        _rotated,
    ),
    Mistake(
        "values-late",
        STAGE,
        "values are {}",
        "p[s] . v[s - n]",
        "every token",
        _late,
        any_of(*LATE),
        planted=LATE[:3],
        said=late_named,
    ),
    Mistake(
        "values-transposed",
        STAGE,
        "probabilities transposed",
        "p[s, t] . v[s]",
        "every token",
        _transposed,
    ),
    Mistake(
        "values-scores",
        STAGE,
        "scores in the place of probabilities",
        "s . v",
        "every token",
        _scores,
    ),
    Mistake(
        "values-mean",
        STAGE,
        "all keys weigh the same",
        "mean of v",
        "all but the first token",
        _mean,
    ),
    Mistake(
        "values-own",
        STAGE,
        "each token has its own value alone",
        "v[t]",
        "all but the first token",
        _own,
    ),
    Mistake(
        "values-other-head",
        STAGE,
        "probabilities of the head {:+d} further",
        "p[n + 1] . v",
        "some heads",
        _other_head,
        any_of(1, -1),
        planted=(1,),
    ),
    Mistake(
        "values-part-of-keys",
        STAGE,
        "the sum leaves out {}",
        "sum over some keys of p v",
        "every token",
        _part,
        any_of(*PARTS),
        planted=PARTS,
    ),
)
