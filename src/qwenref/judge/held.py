"""A stage as an engine dumped it, read a few tokens at a time in the axes of `qwenref.stages`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwenref.dumps.reading import Mapped
from qwenref.judge.arrangement import Arrangement
from qwenref.stages import Stage


@dataclass(frozen=True)
class Held:
    """One stage of a dump.

    Attributes:
        stage: Which.
        mapped: Where its values are: one array, or one for each block.
        way: In which order.
        first: Position of the first token that it has.
        factor: What to multiply scores with that are not scaled as ours are.
    """

    stage: Stage
    mapped: Sequence[Mapped]
    way: Arrangement
    first: int = 0
    factor: float = 1.0

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens (or queries) from `start` to `stop`, float64; masked cells are 0."""
        return self._taken(slice(start - self.first, stop - self.first), start)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the tokens at some positions; of queries, what they make of keys at those."""
        taken = self._taken(positions - self.first, None)
        if not self.stage.masked:
            return taken
        hidden = positions > positions[:, None]
        taken = taken[:, :, positions]
        taken[:, hidden] = 0
        return taken

    def all_masked(self) -> np.ndarray:
        """Return what the cells hold that no softmax reads, of a masked stage."""
        (view,) = self.way.views([each.values for each in self.mapped])
        queries = self.first + np.arange(len(view))
        hidden = np.arange(view.shape[2]) > queries[:, None]
        return view.swapaxes(1, 2)[hidden]

    def _taken(self, tokens: slice | np.ndarray, first: int | None) -> np.ndarray:
        views = self.way.views([each.values for each in self.mapped])
        parts = [view[tokens].astype(np.float64) for view in views]
        for each in self.mapped:
            each.release()
        values = np.concatenate(parts, axis=1)  # [t, J, W]
        if not self.stage.masked:
            sizes = values.shape if len(self.stage.axes) == 3 else (len(values), -1)
            return values.reshape(sizes)
        values = values.swapaxes(0, 1) * self.factor
        return values if first is None else np.tril(values, first)
