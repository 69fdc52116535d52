"""A stage as an engine dumped it, read a few tokens at a time in the axes of `qwenref.stages`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        factor: What to multiply with, where 1/sqrt(H) was applied later or earlier than by us.
        masks: Whether cells that no query sees count as 0. An engine that forgets the mask has
            probabilities there, and uses them.
    """

    stage: Stage
    mapped: Sequence[Mapped]
    way: Arrangement
    first: int = 0
    factor: float = 1.0
    masks: bool = True

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens (or queries) from `start` to `stop`, float64; masked cells are 0."""
        return self._taken(slice(start - self.first, stop - self.first), start)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the tokens at some positions; of queries, what they make of keys at those.

        The first token that it has stands for those that it lacks.
        """
        taken = self._taken(np.maximum(positions - self.first, 0), None)
        if not self.stage.masked:
            return taken
        taken = taken[:, :, positions]
        taken[:, positions > positions[:, None]] = 0
        return taken

    @property
    def stored(self) -> "Held":
        """The same, without the factor: as it was rounded when it was stored."""
        return replace(self, factor=1.0)

    @property
    def layout(self) -> str:
        """What to call the way in which it is stored."""
        if self.factor == 1:
            return self.way.name
        return f"{self.way.name}, {'before' if self.factor < 1 else 'after'} 1/sqrt(H)"

    def any_nonfinite(self) -> bool:
        """Return whether there is a NaN or an infinity, be it behind the mask."""
        return not all(np.isfinite(each.values).all() for each in self.mapped)

    def masked_cells_are_used(self) -> bool:
        """Return whether there is something in cells that no query sees."""
        (view,) = self.way.views([each.values for each in self.mapped])
        return any(view[token, :, self.first + token + 1 :].any() for token in range(len(view)))

    def _taken(self, tokens: slice | np.ndarray, first: int | None) -> np.ndarray:
        views = self.way.views([each.values for each in self.mapped])
        parts = [view[tokens].astype(np.float64) for view in views]
        for each in self.mapped:
            each.release()
        values = np.concatenate(parts, axis=1) * self.factor  # [t, J, W]
        if not self.stage.masked:
            sizes = values.shape if len(self.stage.axes) == 3 else (len(values), -1)
            return values.reshape(sizes)
        values = values.swapaxes(0, 1)
        return np.tril(values, first) if self.masks and first is not None else values
