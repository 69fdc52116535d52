"""The same numbers, laid out as one engine or another writes them.

The arithmetic knows nothing of this: attention computes every stage in the axes of
`qwenref.stages`, scores unmasked, and a layout rearranges the finished array.
"""

from collections.abc import Iterator
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

    def parts(self, stage: Stage, values: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the rows of the first axis of `values` in this layout, one after the other.

        Args:
            stage: Which stage `values` is.
            values: Its array in the axes of `stage.axes`, scores unmasked.
        """
        order = [stage.axes.index(axis) for axis in self.axes(stage)]
        for part in values.transpose(order):
            yield np.tril(part) if self.masks_scores and stage.masked else part


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
