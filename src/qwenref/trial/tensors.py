"""Tensors that an engine may have taken by mistake, read when they are asked for."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qwenref.mistakes.mistake import CannotBe
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.weights import (
    HEAD,
    Tensor,
    attention_tensors,
    embedding_table,
    feed_forward_tensors,
    final_norm,
    head_matrix,
)

PIECE = 1 << 21
"""Values of a matrix that are held in float64 at a time: 16 MiB."""


class Tensors:
    """One layer's, and by an offset those of the layers beside it."""

    def __init__(
        self,
        config: Config,
        weights: Mapping[str, np.ndarray | None] | None = None,
        checkpoint: Checkpoint | None = None,
        layer: int = 0,
        tokens: Sequence[int] = (),
    ):
        """Read nothing yet.

        Args:
            config: What says how large tensors are.
            weights: The layer's, as they were read, by the names of `named_tensors`.
            checkpoint: Where others are.
            layer: Which layer; of what follows the last one, the number of layers.
            tokens: The prompt, if it is known.
        """
        self._tokens = tokens
        self._config, self._weights, self._checkpoint = config, weights or {}, checkpoint
        self._layer = layer

    def vector(self, name: str, beside: int = 0) -> np.ndarray:
        """Return a vector in float64, by its name in `named_tensors`.

        Raises:
            CannotBe: There is none.
        """
        return np.concatenate([*self._rows(name, beside)])

    def table(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Return rows of a table of all tokens, for those at some positions, [T, D].

        Raises:
            CannotBe: There is none, or the tokens are not known.
        """
        shape = self._config.vocab_size, self._config.hidden_size
        if self._checkpoint is None or len(self._tokens) <= positions.max():
            raise CannotBe
        if self._checkpoint.problems({name: shape}):
            raise CannotBe
        tokens = np.asarray(self._tokens)[positions].tolist()
        return self._checkpoint.rows_at(name, tokens).astype(np.float64)

    def product(
        self, x: np.ndarray, name: str, beside: int = 0, *, as_it_lies: bool = False
    ) -> np.ndarray:
        """Return x @ W.T for a matrix [O, I]; or x @ W, where W is [I, O] as it lies in memory.

        Raises:
            CannotBe: There is none.
        """
        if not as_it_lies:
            return np.concatenate([x @ rows.T for rows in self._rows(name, beside)], axis=1)
        width, _ = named_tensors(self._config, self._layer)[name].shape
        total, start = None, 0
        for rows in self._rows(name, beside):
            total = np.zeros((len(x), width)) if total is None else total
            first, lead = divmod(start, width)
            whole = np.zeros(-(-(lead + rows.size) // width) * width)  # 0 for what is beside
            whole[lead : lead + rows.size] = rows.ravel()
            whole = whole.reshape(-1, width)
            total += x[:, first : first + len(whole)] @ whole
            start += rows.size
        return np.zeros(0) if total is None else total

    def _rows(self, name: str, beside: int) -> Iterator[np.ndarray]:
        """Yield a tensor in pieces, float64."""
        own = self._weights.get(name)
        if beside == 0 and own is not None:
            rows = max(1, PIECE // (own.size // len(own)))
            for start in range(0, len(own), rows):
                yield own[start : start + rows].astype(np.float64)
            return
        tensor = named_tensors(self._config, self._layer + beside)[name]
        if self._checkpoint is None or self._checkpoint.problems({tensor.name: tensor.shape}):
            raise CannotBe
        for _, piece in self._checkpoint.rows(tensor.name, 0, tensor.shape[0]):
            yield piece.astype(np.float64)


def named_tensors(config: Config, layer: int) -> dict[str, Tensor]:
    """Return the tensors of a layer and of the whole model, by short names."""
    of_mlp = feed_forward_tensors(config, layer)
    return {
        **attention_tensors(config, layer),
        "ffn_norm": of_mlp.pop("norm"),
        **of_mlp,
        "final_norm": final_norm(config),
        "lm_head": head_matrix(config),
        "embedding": embedding_table(config),
        "untied_head": embedding_table(config)._replace(name=HEAD),
    }
