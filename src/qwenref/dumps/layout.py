"""The same numbers, laid out as one engine or another writes them.

The arithmetic knows nothing of this: attention computes every stage in the axes of
`qwenref.stages`, scores unmasked, and a layout rearranges the finished array.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from qwenref.errors import QwenrefError
from qwenref.stages import Stage


@dataclass(frozen=True)
class Layout:
    """One engine's habit.

    Attributes:
        head_major: Whether q_post_rope and k_post_rope put heads before tokens.
        masks_scores: Whether attn_scores holds +0.0 where the key comes after the query, instead
            of a product that no softmax reads. (attn_softmax holds zeros there in any layout.)
    """

    head_major: bool
    masks_scores: bool

    def axes(self, stage: Stage) -> tuple[str, ...]:
        """Return the axis letters of a stage in this layout."""
        if self.head_major and stage.axes[0] == "T" and len(stage.axes) == 3:
            tokens, heads, channels = stage.axes
            return heads, tokens, channels
        return stage.axes

    def runs(
        self,
        stage: Stage,
        values: np.ndarray,
        first: int,
        sizes: Mapping[str, int],
        channel: int = 0,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(start, run)`: the values of each contiguous run in the laid out, flat array.

        Args:
            stage: Which stage `values` belongs to.
            values: Its array in the axes of `stage.axes`, scores unmasked, for the tokens (or
                queries) from `first` on.
            first: Position of the first of them.
            sizes: Of the letters of its axes: of the whole array.
            channel: Which of its last axis the first one given is.
        """
        axes, T = self.axes(stage), sizes["T"]
        width = sizes[axes[-1]]
        if len(axes) == 1:
            yield channel, values
            return
        if values.shape[-1] < width:
            for token, part in enumerate(values):
                yield (first + token) * width + channel, part
            return
        values = values.transpose([stage.axes.index(axis) for axis in axes])
        if axes[0] == "T":
            yield first * math.prod(values.shape[1:]), values
            return
        for head, part in enumerate(values):
            start = (head * T + first) * part.shape[1]
            yield start, np.tril(part, first) if self.masks_scores and stage.masked else part


LAYOUTS = {
    "apr": Layout(head_major=False, masks_scores=True),
    "hf": Layout(head_major=True, masks_scores=False),
}
"""apr: what `apr trace --save-tensor` writes; hf: what hooks in transformers usually give."""


def layout_named(name: str) -> Layout:
    """Return the layout of that name.

    Raises:
        QwenrefError: There is none.
    """
    if name not in LAYOUTS:
        raise QwenrefError(f"unknown layout {name!r}; layouts are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
