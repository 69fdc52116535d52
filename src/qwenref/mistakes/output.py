"""Mistakes in the output projection, attention @ W_o.T."""

from collections.abc import Iterator

import numpy as np

from qwenref.mistakes.beside import of_layer_beside
from qwenref.mistakes.mistake import Mistake, Setting, any_of, needs
from qwenref.mistakes.products import of_beside, of_products
from qwenref.mistakes.projections import of_pairs
from qwenref.mistakes.values import in_order
from qwenref.stages import RESIDUAL

STAGE = ("attn_out",)


def _skipped(s: Setting) -> np.ndarray:
    needs(s.sizes["E"] == s.sizes["D"])
    return s.given[0]


def _heads(s: Setting) -> np.ndarray:
    (x,) = s.given
    return x.reshape(len(x), s.sizes["N"], s.sizes["H"])


def _head_order(s: Setting, how: str) -> np.ndarray:
    return s.right(in_order(s, _heads(s), how))


ORDERS = (
    "channels before heads",
    "heads after channels",
    "heads backwards",
    "the transposition forgotten",
    "heads of a group apart",
    "heads of a group together",
)


def _without_head(s: Setting, head: int) -> np.ndarray:
    needs(s.sizes["N"] > 1)
    heads = _heads(s).copy()
    heads[:, head] = 0
    return s.right(heads.reshape(len(heads), -1))


def _group(s: Setting, which: int) -> np.ndarray:
    """The part of one of several devices, whose parts are not summed."""
    needs(s.sizes["K"] > 1)
    heads = _heads(s)
    kept = np.arange(s.sizes["N"]) // s.sizes["G"] == which
    return s.right(np.where(kept[:, None], heads, 0.0).reshape(len(heads), -1))


def _swapped_pair(s: Setting, head: int) -> np.ndarray:
    needs(s.sizes["N"] > 1)
    heads = _heads(s).copy()
    heads[:, [head, head + 1]] = heads[:, [head + 1, head]]
    return s.right(heads.reshape(len(heads), -1))


def _biased(s: Setting) -> np.ndarray:
    needs(s.sizes["E"] == s.sizes["D"])
    return s.right(*s.given) + s.tensor("q_bias")


def _residual(s: Setting) -> np.ndarray:
    return s.right(*s.given) + s.rows(RESIDUAL)


def _normed(s: Setting) -> np.ndarray:
    return s.right(*s.given) + s.rows("attn_norm")


def _pairs(s: Setting, to: bool) -> np.ndarray:
    (x,) = s.given
    return s.right(x[:, of_pairs(s, x.shape[1], to=to)])


def _shifts(s: Setting, _: np.ndarray | None) -> Iterator[tuple[str, int]]:
    for by in (1, s.sizes["H"]):
        for what in ("rows", "columns"):
            yield from ((what, by), (what, -by))


MISTAKES = (
    *of_products("output", STAGE, _shifts),
    of_layer_beside("output", STAGE, of_beside),
    Mistake(
        "output-skipped",
        STAGE,
        "the output projection is missing",
        "attention",
        "equal to attention",
        _skipped,
    ),
    Mistake(
        "output-head-order",
        STAGE,
        "heads taken in the wrong order: {}",
        "another order of [T, N, H] @ W_o.T",
        "nothing alike",
        _head_order,
        any_of(*ORDERS),
        planted=ORDERS[:4],
    ),
    Mistake(
        "output-two-heads-swapped",
        STAGE,
        "heads {} swapped",
        "x with two heads exchanged @ W_o.T",
        "everywhere",
        _swapped_pair,
        lambda s, _: range(s.sizes["N"] - 1),
        planted=(0,),
        said=lambda head: f"{head} and {head + 1}",
    ),
    Mistake(
        "output-without-head",
        STAGE,
        "head {} is left out",
        "sum over the other heads",
        "everywhere",
        _without_head,
        lambda s, _: range(s.sizes["N"]),
        planted=(0, 1),
    ),
    Mistake(
        "output-one-group",
        STAGE,
        "only the heads of key head {} are summed",
        "the part of one device, not reduced",
        "everywhere",
        _group,
        lambda s, _: range(s.sizes["K"]),
        planted=(0,),
    ),
    Mistake(
        "output-bias",
        STAGE,
        "a bias is added that the model does not have: that of q",
        "x @ W_o.T + b_q",
        "the same offset in every token",
        _biased,
    ),
    Mistake(
        "output-plus-residual",
        STAGE,
        "the residual stream is added already",
        "x @ W_o.T + residual",
        "everywhere, by the embedding",
        _residual,
    ),
    Mistake(
        "output-plus-norm",
        STAGE,
        "the normalised stream is added instead of the residual",
        "x @ W_o.T + attn_norm",
        "everywhere, by attn_norm",
        _normed,
    ),
    Mistake(
        "output-gguf-order",
        STAGE,
        "inputs permuted as GGUF permutes q and k ({})",
        "x in the order 0, H/2, 1, H/2+1, .. @ W_o.T",
        "nothing alike",
        _pairs,
        any_of(True, False),
        said={True: "to pairs", False: "to halves"}.__getitem__,
        planted=(True,),
    ),
)
