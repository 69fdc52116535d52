"""The orders in which engines store a stage, and the stage seen through each of them.

Whatever the order, the stage is looked at as [T, J, W]: tokens, heads (1 if it has none, N + 2K for
q, k, v side by side), and what a head holds of a token (D, H, or one score per key).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np

from qwenref.metrics import heads_in
from qwenref.stages import Stage

LAST = "last token"
PADDED = "keys padded"
TRANSPOSED = "N S T"
PARTS = "one file each of q, k, v"


class Arrangement(NamedTuple):
    """One order of a stage's axes.

    Attributes:
        name: What it is called in reports: ``T N H``; as in a manifest, if that can say it.
        sizes: Of the letters T, J, W in the order stored; W with its padding.
        letters: That order.
        width: W without padding.
        blocks: How many heads each of consecutive arrays holds; None for one array of all heads.
    """

    name: str
    sizes: tuple[int, ...]
    letters: str
    width: int
    blocks: tuple[int, ...] | None = None

    def views(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return arrays seen as [T, J, W]: one, or one for each block.

        Args:
            arrays: Flat; as many as there are views, or a single one that holds all.
        """
        T, J, W = (self.sizes[self.letters.index(letter)] for letter in "TJW")
        if self.blocks is not None and len(arrays) == 1:
            edges = np.cumsum([T * W * heads for heads in self.blocks])[:-1]
            arrays = np.split(arrays[0], edges)
        heads = self.blocks or (J,)
        return [self._view(array, J) for array, J in zip(arrays, heads, strict=True)]

    @property
    def padding(self) -> int:
        """How many keys there are with padding; 0 if there is none."""
        keys = self.sizes[self.letters.index("W")]
        return keys if keys > self.width else 0

    def cuts_off_keys(self, arrays: Sequence[np.ndarray]) -> bool:
        """Return whether what it leaves out as padding is not zero everywhere."""
        if not self.padding:
            return False
        return any(array.reshape(self.sizes)[..., self.width :].any() for array in arrays)

    def _view(self, array: np.ndarray, heads: int) -> np.ndarray:
        sizes = [heads if letter == "J" else self.sizes[i] for i, letter in enumerate(self.letters)]
        seen = array.reshape(sizes).transpose([self.letters.index(letter) for letter in "TJW"])
        return seen[:, :, : self.width]


def arrangements(
    stage: Stage, sizes: Mapping[str, int], T: int, counts: Sequence[int]
) -> Iterator[Arrangement]:
    """Yield the orders in which a stage may be stored, the one of `stage.axes` first.

    Args:
        stage: Which stage.
        sizes: N, K, H, D, and I and V if these are known: without, their stages have no shape.
        T: How many tokens there are.
        counts: Of values, for each array that holds a part of the stage: one, or one per block.
    """
    if not has_shape(stage, sizes):
        return
    J, W = heads_and_width(stage, sizes, T)
    letters = "JTW" if stage.masked else "TJW"
    blocks = (sizes["N"], sizes["K"], sizes["K"]) if stage.blocks else None
    if len(counts) > 1:
        if blocks and list(counts) == [T * heads * W for heads in blocks]:
            yield Arrangement(PARTS, (T, J, W), "TJW", W, blocks)
            yield Arrangement(f"{PARTS}, heads first", (J, T, W), "JTW", W, blocks)
        return
    count = counts[0]
    swapped = letters.translate(str.maketrans("TW", "WT"))
    orders = sorted(map("".join, permutations("TJW"))) if J > 1 else (letters, swapped)
    of = {"T": T, "J": J, "W": W}
    if count == T * J * W:
        for order in sorted(orders, key=lambda order: order != letters):
            yield Arrangement(_name(stage, order), tuple(of[c] for c in order), order, W)
        if blocks:
            yield Arrangement("q, then k, then v", (T, J, W), "TJW", W, blocks)
    if T > 1 and count == J * W:
        for order in ("TJW", "TWJ") if J > 1 else ("TJW",):
            yield Arrangement(LAST, tuple((of | {"T": 1})[c] for c in order), order, W)
    if stage.masked:
        tokens_of = {PADDED: T} | ({f"{LAST}, {PADDED}": 1} if T > 1 else {})
        for name, tokens in tokens_of.items():
            padded, rest = divmod(count, J * tokens)
            if padded > T and not rest:
                yield Arrangement(name, (J, tokens, padded), "JTW", W)


def has_shape(stage: Stage, sizes: Mapping[str, int]) -> bool:
    """Return whether the sizes say what shape a stage has."""
    return stage.has_heads or stage.axes[-1] in sizes


def heads_and_width(stage: Stage, sizes: Mapping[str, int], T: int) -> tuple[int, int]:
    """Return J, and W without padding."""
    if stage.masked:
        return sizes["N"], T
    if not stage.has_heads:
        return 1, sizes[stage.axes[-1]]
    return heads_in(stage, sizes), sizes["H"]


def _name(stage: Stage, order: str) -> str:
    """Return the letters of axes in an order, as a manifest writes them where it can."""
    if stage.masked:
        of = {"T": "T", "J": "N", "W": "S"}
    elif not stage.has_heads:
        of = {"T": "T", "J": "", "W": stage.axes[-1]}
    else:
        of = {"T": "T", "J": "J" if stage.blocks else "K" if "K" in stage.axes else "N", "W": "H"}
    name = " ".join(filter(None, (of[letter] for letter in order)))
    if stage.blocks:
        return name.replace("J H", "F")
    return name.replace("N H", "E") if "E" in stage.axes else name


def relation_of(views: Sequence[Sequence[np.ndarray]], *, masked: bool) -> tuple[object, ...]:
    """Return what two ways to see two sides share if they pair the same values.

    Of masked stages it matters too which axes are those of queries and keys.
    """
    relation: list[object] = [len(of) for of in views]
    for a, b in zip(views[0], views[1], strict=False):
        axes = [
            axis
            for axis in zip(a.strides, a.shape, b.strides, b.shape, strict=True)
            if axis[1::2] != (1, 1)
        ]
        relation += [*axes, "masked"] if masked else _merged(sorted(axes, reverse=True))
    return tuple(relation)


def _merged(axes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return axes, (stride, size) of both sides, with those joined that are one run in both."""
    merged: list[tuple[int, ...]] = []
    for stride_a, a, stride_b, b in axes:
        outer = merged[-1] if merged else (0, 0, 0, 0)
        if a == b and outer[0] == stride_a * a and outer[2] == stride_b * b:
            merged[-1] = stride_a, outer[1] * a, stride_b, outer[3] * b
        else:
            merged.append((stride_a, a, stride_b, b))
    return merged
