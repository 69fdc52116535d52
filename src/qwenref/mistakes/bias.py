"""Mistakes in adding the biases of q, k and v."""

from collections.abc import Callable
from itertools import permutations, product

import numpy as np

from qwenref.mistakes.beside import SIDES
from qwenref.mistakes.mistake import Mistake, Setting, any_of, needs
from qwenref.mistakes.projections import (
    BLOCKS,
    SUBSETS,
    Beside,
    Shift,
    beside_named,
    block,
    named,
    of_pairs,
    reordered,
    shift_named,
    shifted,
    shifts,
    swapped,
)

STAGE = ("qkv_bias",)
ORDERS = tuple(order for order in permutations(BLOCKS) if order != BLOCKS)


def _bias(s: Setting, layer: int = 0) -> np.ndarray:
    return np.concatenate([s.tensor(f"{name}_bias", layer) for name in BLOCKS])


def _times(factor: float) -> Callable[[Setting, tuple[str, ...]], np.ndarray]:
    """Return biases of some blocks times a factor."""

    def run(s: Setting, blocks: tuple[str, ...]) -> np.ndarray:
        bias = _bias(s)
        for name in blocks:
            bias[block(s, name)] *= factor
        return s.given[0] + bias

    return run


def _in_order(s: Setting, order: tuple[str, ...]) -> np.ndarray:
    bias = _bias(s)
    return s.given[0] + np.concatenate([bias[block(s, name)] for name in order])


def _shifted(s: Setting, by: Shift) -> np.ndarray:
    return s.given[0] + shifted(s, _bias(s), by)


def _of_layer(s: Setting, of: Beside) -> np.ndarray:
    blocks, side = of
    bias, other = _bias(s), _bias(s, side)
    for name in blocks:
        bias[block(s, name)] = other[block(s, name)]
    return s.given[0] + bias


def _pairs(s: Setting, to: bool) -> np.ndarray:
    bias = reordered(s, _bias(s), ("q", "k"), lambda width: of_pairs(s, width, to=to))
    return s.given[0] + bias


def _first_token(s: Setting) -> np.ndarray:
    needs(s.sizes["T"] > 1)
    return s.given[0] + np.where(s.positions == 0, 1.0, 0.0)[:, None] * _bias(s)


def _first_head(s: Setting) -> np.ndarray:
    """Broadcast the first head's bias."""
    bias, H = _bias(s), s.sizes["H"]
    for name in BLOCKS:
        of = bias[block(s, name)]
        of[:] = np.tile(of[:H], len(of) // H)
    return s.given[0] + bias


MISTAKES = (
    Mistake(
        "bias-missing",
        STAGE,
        "the bias of {} is not added",
        "x @ W.T",
        "the same offset in every token",
        _times(0.0),
        any_of(*SUBSETS),
        said=named,
        planted=SUBSETS,
    ),
    Mistake(
        "bias-doubled",
        STAGE,
        "the bias of {} is added twice",
        "x @ W.T + 2 b",
        "the same offset in every token",
        _times(2.0),
        any_of(*SUBSETS),
        said=named,
        planted=(("q", "k", "v"), ("k",)),
    ),
    Mistake(
        "bias-negated",
        STAGE,
        "the bias of {} is subtracted",
        "x @ W.T - b",
        "the same offset in every token",
        _times(-1.0),
        any_of(*SUBSETS),
        said=named,
        planted=(("q", "k", "v"), ("v",)),
    ),
    Mistake(
        "bias-swapped",
        STAGE,
        "biases of {} swapped",
        "b_k for b_v",
        "the same offset in every token",
        lambda s, pair: s.given[0] + swapped(s, _bias(s), pair),
        any_of("kv", "qk", "qv"),
        said=" and ".join,
        planted=("kv",),
    ),
    Mistake(
        "bias-order",
        STAGE,
        "biases in the order {}",
        "another concatenation of b_q, b_k, b_v",
        "the same offset in every token",
        _in_order,
        any_of(*ORDERS),
        said=", ".join,
        planted=(("k", "v", "q"),),
    ),
    Mistake(
        "bias-gguf-order",
        STAGE,
        "biases of q and k {} the order that GGUF stores for interleaved RoPE",
        "b of a head in the order 0, H/2, 1, H/2+1, ..",
        "the same offset in every token",
        _pairs,
        any_of(True, False),
        said={True: "in", False: "read as if in"}.__getitem__,
        planted=(True,),
    ),
    Mistake(
        "bias-shifted",
        STAGE,
        "biases of {}",
        "b[c - n]",
        "the same offset in every token",
        _shifted,
        shifts,
        planted=((BLOCKS, 1), (("q",), -1)),
        said=shift_named,
    ),
    Mistake(
        "bias-of-other-layer",
        STAGE,
        "biases of {}",
        "b of layer + 1 or layer - 1",
        "the same offset in every token",
        _of_layer,
        any_of(*product(SUBSETS, SIDES)),
        planted=((BLOCKS, 1), (("k",), 1)),
        said=beside_named,
    ),
    Mistake(
        "bias-first-token",
        STAGE,
        "the bias is added to the first token alone",
        "x @ W.T + b where t = 0",
        "the same offset in every token but the first",
        _first_token,
    ),
    Mistake(
        "bias-first-head",
        STAGE,
        "the bias of the first head is added to every head",
        "b[c % H]",
        "the same offset in every token, none in the first head",
        _first_head,
    ),
)
