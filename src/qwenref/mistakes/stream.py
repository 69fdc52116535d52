"""Mistakes in the residual stream: the two sums of a layer, and whole layers."""

import numpy as np

from qwenref.mistakes.mistake import Mistake, Setting, any_of, needs
from qwenref.stages import BETWEEN, LEAVING, RESIDUAL

SUMS, LAST = (BETWEEN.name, LEAVING.name), (LEAVING.name,)
NORM = {BETWEEN.name: "attn_norm", LEAVING.name: "ffn_norm"}
"""What is made of the stream before the part whose result is added to it."""

TIMES = {
    "the stream is added twice": (2.0, 1.0),
    "what is added to the stream is added twice": (1.0, 2.0),
    "what is added to the stream is subtracted": (1.0, -1.0),
    "the mean, not the sum": (0.5, 0.5),
}


def _times(s: Setting, which: str) -> np.ndarray:
    stream, added = s.given
    of_stream, of_added = TIMES[which]
    return of_stream * stream + of_added * added


def _of_embedding(s: Setting) -> np.ndarray:
    return s.table("model.embed_tokens.weight") + s.given[1]


def _repeated(s: Setting) -> np.ndarray:
    needs(len(s.positions) == s.sizes["T"])
    return s.again(s.right(*s.given))


MISTAKES = (
    Mistake(
        "residual-missing",
        SUMS,
        "the residual is missing: nothing is added to {}",
        "attn_out, or ffn_out",
        "equal to it",
        lambda s, which: s.given[which],
        any_of(1, 0),
        planted=(1, 0),
        said=("the stream", "what attention or the MLP makes").__getitem__,
    ),
    Mistake(
        "residual-times",
        SUMS,
        "{}",
        "a * x + b * y",
        "everywhere",
        _times,
        any_of(*TIMES),
        planted=tuple(TIMES),
    ),
    Mistake(
        "residual-of-norm",
        SUMS,
        "the normalised stream is added, not the stream itself",
        "norm(x) + y",
        "everywhere",
        lambda s: s.rows(NORM[s.stage]) + s.given[1],
    ),
    Mistake(
        "residual-of-embedding",
        SUMS,
        "the residual of the wrong layer: the embedding is added",
        "embedding + y",
        "everywhere",
        _of_embedding,
    ),
    Mistake(
        "residual-of-entering",
        LAST,
        "the residual of the wrong place: what entered the layer, without attention",
        "x + ffn_out",
        "off by attn_out",
        lambda s: s.rows(RESIDUAL) + s.given[1],
    ),
    Mistake(
        "residual-of-attention",
        LAST,
        "attention's result is added again",
        "post_attn_residual + attn_out + ffn_out",
        "off by attn_out",
        lambda s: s.right(*s.given) + s.rows("attn_out"),
    ),
    Mistake(
        "layer-skipped",
        LAST,
        "the layer is skipped: what enters it leaves it",
        "x",
        "equal to the stream before",
        lambda s: s.rows(RESIDUAL),
    ),
    Mistake(
        "layer-repeated",
        LAST,
        "the layer is run twice",
        "f(f(x))",
        "everywhere",
        _repeated,
    ),
)
