"""What holds in any right engine, whatever its weights."""

from collections.abc import Callable, Mapping

import numpy as np

from qwenref.metrics import finite
from qwenref.trial.explanation import Check
from qwenref.trial.held import Held

ROUNDED = 2.0**-6
"""Relative: eight roundings to bfloat16, half a unit in the last place each. Coarser than the
coarsest honest engine: these checks find what is altogether wrong, where nothing else can be done.
"""


def checks(held: Mapping[str, Held], sizes: Mapping[str, int]) -> list[Check]:
    """Check what is there of a layer, all its tokens at once.

    Args:
        held: The dumps, by stage.
        sizes: N, K, H and T.
    """
    complete = {name: of for name, of in held.items() if of.first == 0}
    return [_check(name, needs, of, complete, sizes) for name, (needs, of) in CHECKS.items()]


_Rows = Mapping[str, np.ndarray]
_Measure = Callable[[_Rows, Mapping[str, int]], float]


def _check(
    name: str,
    needs: tuple[str, ...],
    measure: _Measure,
    held: Mapping[str, Held],
    sizes: Mapping[str, int],
) -> Check:
    if not all(stage in held for stage in needs):
        return Check(name, "unmeasured")
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        value = measure({stage: held[stage].rows(0, sizes["T"]) for stage in needs}, sizes)
    return Check(name, "holds" if value <= ROUNDED else "fails", finite(value), ROUNDED)


def _rows_sum_to_one(rows: _Rows, _: Mapping[str, int]) -> float:
    return float(np.abs(rows["attn_softmax"].sum(axis=-1) - 1).max())


def _keeps_norms(block: str) -> _Measure:
    def measure(rows: _Rows, sizes: Mapping[str, int]) -> float:
        before, after = _before_and_after(rows, sizes, block)
        lengths = (np.hypot(*np.split(of, 2, axis=-1)) for of in (before, after))
        was, now = lengths
        return float(np.max(np.abs(now - was) / np.maximum(was, np.sqrt(np.mean(np.square(was))))))

    return measure


def _leaves_position_0(block: str) -> _Measure:
    def measure(rows: _Rows, sizes: Mapping[str, int]) -> float:
        before, after = _before_and_after(rows, sizes, block)
        return _relative(after[0] - before[0], before[0])

    return measure


def _before_and_after(
    rows: _Rows, sizes: Mapping[str, int], block: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the heads of q or k before and after RoPE."""
    N, K = sizes["N"], sizes["K"]
    heads = slice(0, N) if block == "q" else slice(N, N + K)
    return _heads(rows["qkv_bias"], sizes)[:, heads], rows[f"{block}_post_rope"]


def _first_attends_to_itself(rows: _Rows, sizes: Mapping[str, int]) -> float:
    K = sizes["K"]
    v = np.repeat(_heads(rows["qkv_bias"], sizes)[0, -K:], sizes["N"] // K, axis=0)
    return _relative(rows["attention"][0] - v.reshape(-1), v)


def _one_bias(rows: _Rows, _: Mapping[str, int]) -> float:
    added = rows["qkv_bias"] - rows["qkv_matmul"]
    return _relative(added - added[:1], rows["qkv_bias"])


def _heads(qkv: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
    return qkv.reshape(len(qkv), -1, sizes["H"])


def _relative(difference: np.ndarray, of: np.ndarray) -> float:
    """Return the largest difference, on the scale of the rms."""
    return float(np.abs(difference).max() / np.sqrt(np.mean(np.square(of))))


CHECKS: dict[str, tuple[tuple[str, ...], _Measure]] = {
    "rows of attn_softmax sum to 1": (("attn_softmax",), _rows_sum_to_one),
    "q_post_rope keeps the length of every pair": (
        ("qkv_bias", "q_post_rope"),
        _keeps_norms("q"),
    ),
    "k_post_rope keeps the length of every pair": (
        ("qkv_bias", "k_post_rope"),
        _keeps_norms("k"),
    ),
    "q_post_rope leaves position 0 alone": (("qkv_bias", "q_post_rope"), _leaves_position_0("q")),
    "k_post_rope leaves position 0 alone": (("qkv_bias", "k_post_rope"), _leaves_position_0("k")),
    "attention of token 0 is v of token 0": (("attention", "qkv_bias"), _first_attends_to_itself),
    "qkv_bias adds the same to every token": (("qkv_matmul", "qkv_bias"), _one_bias),
}
"""What is checked, of which stages (the last one is to blame), and how far off it is."""
