"""Slices of a stage by name: which one is the worst, and where two dumps differ."""

import math
from collections.abc import Mapping, Sequence

from qwenref.judge.measurement import Measurement, StageMeasured
from qwenref.judge.result import Block, Worst
from qwenref.judge.verdict import Judged
from qwenref.metrics import MARGIN, Error, Errors, finite
from qwenref.stages import BY_NAME

_AXES = {"heads": "head", "tokens": "token", "blocks": "block"}


def blocks_of(stage: StageMeasured, one: Judged) -> list[Block]:
    """Return the errors of q, k and v, if the stage has them."""
    names = BY_NAME[stage.stage].blocks if stage.stage in BY_NAME else ()
    errors = one.pair.errors.blocks if one.pair.errors else []
    floors = one.floors.blocks if one.floors else [None] * len(errors)
    return [
        Block(name, error, floor, ratio_of(error, floor))
        for name, error, floor in zip(names, errors, floors, strict=False)
    ]


def worst_slice(measurement: Measurement, stage: StageMeasured, one: Judged) -> Worst | None:
    """Return the worst slice, with its name."""
    if one.worst is None or one.pair.errors is None or one.floors is None:
        return None
    kind, which = one.worst.slice, one.worst.which
    axis = _AXES.get(kind, kind)
    values, floors = ([*_values(of, kind)] for of in (one.pair.errors, one.floors))
    margin = 1.0 if one.tolerated else MARGIN
    others = [
        pair for number, pair in enumerate(zip(values, floors, strict=True)) if number != which
    ]
    within = all(v is not None and f is not None and v <= margin * f for v, f in others)
    alone = one.status == "differ" and within
    index = measurement.sizes["T"] - 1 if axis == "token" and one.pair.slices == "last" else which
    return Worst(
        axis=axis,
        index=index,
        name=_name(measurement.sizes, stage.stage, axis, index, one.pair.element_at),
        value=values[which],
        floor=floors[which],
        ratio=finite(one.worst.ratio),
        others=max((value for value, _ in others if value is not None), default=None)
        if alone
        else None,
    )


def _values(errors: Errors, kind: str) -> Sequence[Error]:
    found = getattr(errors, kind)
    return found if isinstance(found, list) else [found]


def _name(
    sizes: Mapping[str, int], stage: str, axis: str, index: int, at: Sequence[int] | None
) -> str:
    """Return what to call a slice."""
    row = BY_NAME.get(stage)
    if axis == "block" and row is not None:
        return f"{row.blocks[index]} block"
    if axis == "head":
        return _head(sizes, stage, index)
    if axis == "element" and at is not None:
        headless = row is None or not row.has_heads
        return f"one value of token {at[0]}" + (
            "" if headless else f", {_head(sizes, stage, at[1])}"
        )
    return {"token": f"token {index}", "element": "one value"}.get(axis, axis)


def _head(sizes: Mapping[str, int], stage: str, index: int) -> str:
    if stage not in BY_NAME or not BY_NAME[stage].blocks:
        return f"head {index}"
    block, within = _block_of_head(sizes, index)
    return f"{block} head {within}"


def _block_of_head(sizes: Mapping[str, int], index: int) -> tuple[str, int]:
    for name, heads in (("q", sizes["N"]), ("k", sizes["K"])):
        if index < heads:
            return name, index
        index -= heads
    return "v", index


def standing_out(measurement: Measurement, stage: StageMeasured, one: Judged) -> str | None:
    """Return the block in which two dumps differ; None if in all, or if there are no blocks."""
    blocks, margin = blocks_of(stage, one), 1.0 if one.tolerated else MARGIN
    if one.status != "differ" or not blocks:
        return None
    off = [block for block in blocks if block.rel_l2 is None or (block.ratio or 0.0) > margin]
    if len(off) == len(blocks):
        return None
    if off:
        return max(off, key=lambda block: math.inf if block.ratio is None else block.ratio).name
    if one.worst is not None and one.worst.slice == "heads":
        return _block_of_head(measurement.sizes, one.worst.which)[0]
    at = one.pair.element_at
    return None if at is None else _block_of_head(measurement.sizes, at[1])[0]


def describe(worst: Worst) -> str:
    """Return a slice in words: ``head 3: 0.41, others <= 2e-07``."""
    value = "not finite" if worst.value is None else f"{worst.value:.2g}"
    text = f"{worst.name}: {value}"
    return f"{text}, others <= {worst.others:.2g}" if worst.others is not None else text


def ratio_of(value: Error, floor: Error) -> float | None:
    """Return how many floors a value is; None if either is not known or the ratio is infinite."""
    if value is None or floor is None or (value and not floor):
        return None
    return finite(value / floor) if value else 0.0
