"""Mistakes in the logits, final_norm @ W.T."""

from collections.abc import Iterator

import numpy as np

from qwenref.mistakes.mistake import Mistake, Setting, any_of, needs
from qwenref.mistakes.products import of_products
from qwenref.stages import RESIDUAL

STAGE = ("lm_head",)
CAPS = (30.0, 50.0)
"""Of Gemma 2's logits and attention scores."""

PADDED = (64, 128, 256, 512)
"""Sizes to whose multiples vocabularies are padded, shard by shard."""


def _shifts(s: Setting, dumped: np.ndarray | None) -> Iterator[tuple[str, int]]:
    """Yield shifts by one, and by how far the largest logit is from where it should be."""
    for what in ("rows", "columns"):
        yield from ((what, 1), (what, -1))
    if dumped is not None and np.isfinite(dumped).any():
        right = s.right(*s.given)
        by = int(np.nanargmax(dumped[-1])) - int(np.argmax(right[-1]))
        if abs(by) > 1:
            yield "rows", by


def _of_embedding(s: Setting) -> np.ndarray:
    needs(not s.config.tie_word_embeddings)
    return s.product(s.given[0], "embedding")


def _untied(s: Setting) -> np.ndarray:
    needs(s.config.tie_word_embeddings)
    return s.product(s.given[0], "untied_head")


def _padded(s: Setting, how: tuple[int, int]) -> np.ndarray:
    """Each shard of the vocabulary is padded, and its padding not left out."""
    shards, multiple = how
    values = s.right(*s.given)
    width = values.shape[1]
    needs(width % shards == 0 and (width // shards) % multiple != 0)
    parts = values.reshape(len(values), shards, -1)
    parts = np.pad(parts, [(0, 0), (0, 0), (0, -parts.shape[2] % multiple)])
    return parts.reshape(len(values), -1)[:, :width]


def _of_token(s: Setting, back: int) -> np.ndarray:
    """The logits of another token: of the first one, or of one before."""
    needs(s.sizes["T"] > max(back, 1))
    positions = s.positions - back if back else np.zeros_like(s.positions)
    return s.right(s.everywhere("final_norm")[np.maximum(positions, 0)])


def _token_named(back: int) -> str:
    return {0: "the first token", 1: "the token before"}.get(back, f"the token {back} before")


def _softmax(s: Setting, logarithm: bool) -> np.ndarray:
    values = s.right(*s.given)
    shifted = values - values.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True)
    return shifted - np.log(total) if logarithm else np.exp(shifted) / total


def _capped(s: Setting, cap: float) -> np.ndarray:
    return cap * np.tanh(s.right(*s.given) / cap)


MISTAKES = (
    *of_products("head", STAGE, _shifts),
    Mistake(
        "head-of-embedding",
        STAGE,
        "the embedding table instead of lm_head's own matrix, as if the two were tied",
        "x @ embedding.T",
        "nothing alike",
        _of_embedding,
    ),
    Mistake(
        "head-untied",
        STAGE,
        "lm_head.weight instead of the embedding table, which it is tied to",
        "x @ lm_head.T",
        "nothing alike",
        _untied,
    ),
    Mistake(
        "head-padded",
        STAGE,
        "the vocabulary in {}, and the padding not left out",
        "rows of the second part come too late",
        "right in the first part alone",
        _padded,
        any_of(*((shards, multiple) for shards in (2, 4, 8) for multiple in PADDED)),
        planted=((2, 64), (4, 64)),
        said=lambda how: f"{how[0]} parts, each padded to a multiple of {how[1]}",
    ),
    Mistake(
        "head-of-token",
        STAGE,
        "the logits are those of {}",
        "final_norm[t'] @ W.T",
        "nothing alike",
        _of_token,
        any_of(0, 1, 2, 3),
        planted=(0, 1),
        said=_token_named,
    ),
    Mistake(
        "head-without-norm",
        STAGE,
        "lm_head takes the stream before the final norm",
        "residual @ W.T",
        "nothing alike",
        lambda s: s.right(s.rows(RESIDUAL)),
    ),
    Mistake(
        "head-without-norm-weight",
        STAGE,
        "lm_head takes the final norm before its weight",
        "(final_norm / w) @ W.T",
        "everywhere",
        lambda s: s.right(s.given[0] / s.tensor("final_norm")),
    ),
    Mistake(
        "head-softmax",
        STAGE,
        "{} of the logits, not the logits",
        "softmax(x @ W.T)",
        "all at most 1, or at most 0",
        _softmax,
        any_of(False, True),
        planted=(False, True),
        said={False: "softmax", True: "the logarithm of the softmax"}.__getitem__,
    ),
    Mistake(
        "head-capped",
        STAGE,
        "logits capped softly at {:g}, as Gemma does",
        "c * tanh(x @ W.T / c)",
        "the larger, the more",
        _capped,
        any_of(*CAPS),
        planted=(30.0,),
    ),
)
