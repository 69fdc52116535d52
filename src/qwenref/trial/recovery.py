"""Which tokens an engine really ran: the rows of the embedding table nearest to what it dumped."""

from collections.abc import Sequence

import numpy as np

from qwenref.model.checkpoint import Checkpoint
from qwenref.model.weights import EMBEDDING

ALIKE = 0.8
"""Cosine from which on a row is believed to be the one. Rows of Q4_K have 0.997, of Q2_K 0.96; rows
of other tokens 0.4 at most in 84 random dimensions.
"""

AS_GOOD = 1e-3
"""Rows whose cosines differ by less cannot be told apart; then the expected token is believed."""

USABLE = 0.05
"""Channels of a norm weight below this part of its rms say nothing of what was multiplied."""


def recovered_tokens(
    checkpoint: Checkpoint, rows: np.ndarray, expected: Sequence[int]
) -> list[int] | None:
    """Return the token of each row; None if some row is like none in the table.

    The table is read once, piece by piece.

    Args:
        checkpoint: With the table.
        rows: An embedding, or attn_norm by the norm's weight, [T, D]; channels that say nothing
            are 0.
        expected: Tokens that are taken if they fit as well as any.
    """
    used = np.any(rows != 0, axis=0)
    rows = np.where(np.isfinite(rows), rows, 0.0)
    unit = rows[:, used].astype(np.float32)
    unit /= _norm(unit)
    best, tokens = np.full(len(rows), -1.0), np.zeros(len(rows), int)
    of_expected = np.full(len(rows), -1.0)
    for first, piece in checkpoint.rows(EMBEDDING, 0, checkpoint.config.vocab_size):
        table = (piece if used.all() else piece[:, used]).astype(np.float32)
        cosines = (table @ unit.T) / _norm(table)
        nearest = cosines.argmax(axis=0)
        found = cosines[nearest, np.arange(len(rows))]
        tokens = np.where(found > best, first + nearest, tokens)
        best = np.maximum(best, found)
        for at, token in enumerate(expected[: len(rows)]):
            if first <= token < first + len(piece):
                of_expected[at] = cosines[token - first, at]
    if np.any(best < ALIKE):
        return None
    for at, token in enumerate(expected[: len(rows)]):
        if of_expected[at] >= best[at] - AS_GOOD:
            tokens[at] = token
    return tokens.tolist()


def without_weight(normed: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return attn_norm by the norm's weight: the embedding but for a factor per token."""
    weight = weight.astype(np.float64)
    usable = np.abs(weight) > USABLE * np.sqrt(np.mean(np.square(weight)))
    return np.where(usable, normed / np.where(usable, weight, 1.0), 0.0)


def in_words(recovered: Sequence[int], expected: Sequence[int]) -> str:
    """Say what an engine ran instead of the tokens that it was to run."""
    text = f"your engine ran {[*recovered]}"
    if [*recovered[1:]] in ([*expected], [*expected[:-1]]) and len(expected) > 1:
        return f"{text}: {recovered[0]} was put in front (a BOS?)"
    if len(expected) > 1 and [*recovered[:-1]] == [*expected[1:]]:
        return f"{text}: the first token is missing"
    if sorted(recovered) == sorted(expected):
        return f"{text}: the same tokens in another order"
    return f"{text}, not {[*expected]}"


def _norm(rows: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.einsum("td,td->t", rows, rows))[:, None]
    return np.where(norms > 0, norms, 1)
