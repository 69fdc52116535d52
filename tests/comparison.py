"""Comparing stage arrays: relative L2 of the whole and of every block and head apart."""

from collections.abc import Iterator, Mapping

import numpy as np

from qwenref.stages import Stage

NOISE = 1e-5
"""Relative L2 that two healthy float32 computations stay within at every stage, block and head.

From the issue that asked for it; measured: 2e-7 to 4e-7 on D=84, 1.5e-6 for apr on D=896.
"""


def rel_l2(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return ||a - b|| / ||b|| in float64; 0 if both are zero everywhere."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = float(np.linalg.norm(a - b))
    return 0.0 if difference == 0 else difference / float(np.linalg.norm(b))


def slices(
    stage: Stage, values: np.ndarray, sizes: Mapping[str, int]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the whole array of a stage, its blocks and its heads, each with a name.

    Args:
        stage: Which stage `values` is.
        values: Its array in the axes of `stage.axes`.
        sizes: Of D, N, K, H, E, F.
    """
    yield "whole", values
    E, kv = sizes["E"], sizes["K"] * sizes["H"]
    edges = np.cumsum([0, E, kv, kv])
    for block, start, stop in zip(stage.blocks, edges, edges[1:], strict=False):
        yield block, values[:, start:stop]
    heads = stage.axes.index("N") if "N" in stage.axes else None
    if stage.axes[1:] == ("K", "H"):
        heads = 1
    if stage.axes == ("T", "E"):
        values, heads = values.reshape(len(values), sizes["N"], sizes["H"]), 1
    if heads is not None:
        for head, part in enumerate(np.moveaxis(values, heads, 0)):
            yield f"head {head}", part


def worst(
    stage: Stage, ours: np.ndarray, theirs: np.ndarray, sizes: Mapping[str, int]
) -> tuple[float, str]:
    """Return the largest relative L2 over all slices, and the slice it is in."""
    assert ours.shape == theirs.shape
    pairs = zip(slices(stage, ours, sizes), slices(stage, theirs, sizes), strict=True)
    return max((rel_l2(a, b), f"{stage.name}, {name}") for (name, a), (_, b) in pairs)
