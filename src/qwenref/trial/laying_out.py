"""In which order of axes a dumped stage is meant: that in which it is what it was computed from.

A stage that is both oddly laid out and wrong fits in no order; then the stages that were computed
from it decide, and what its sibling (k for q) is laid out as.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from qwenref.judge.alignment import Side
from qwenref.judge.floors import BLIND
from qwenref.judge.scope import PADDING
from qwenref.stages import Stage
from qwenref.trial.held import Held
from qwenref.trial.replay import NOTHING, Replay, Skip
from qwenref.trial.residual import compared, row_of

CLEARLY = 0.5
"""Of two orders, the one with at most this part of the other's error is meant. Right ones of honest
dumps are off by 0.1 at most, or by 0.27 if weights have 3 bits; wrong ones by 1.4 in the median, by
0.42 or more in 99 of 100 (scripts/measure_evidence.py): the others have the same values.
"""

SCALED = {"attn_scores": (0.0, -0.5), "q_post_rope": (0.0, 0.5)}
"""Powers of H by which stages may have to be multiplied: some engines apply 1/sqrt(H) to queries,
llama.cpp does in its softmax.
"""

SIBLINGS = {"q_post_rope": "k_post_rope", "k_post_rope": "q_post_rope"}


def readings(stage: Stage, side: Side, sizes: Mapping[str, int]) -> list[Held]:
    """Return all ways to read a dumped stage of T tokens, the likeliest first."""
    mapped = [stored.mapped() for stored in side.parts]
    T, found = sizes["T"], []
    for way in side.ways(stage, sizes, T):
        first = T - len(way.views([each.values for each in mapped])[0])
        if way.padding % PADDING:
            continue
        if T == 1 and way.cuts_off_keys([each.values for each in mapped]):
            continue  # they may be real ones, of a longer context
        found += [
            Held(stage, mapped, way, first, sizes["H"] ** power)
            for power in SCALED.get(stage.name, (0.0,))
        ]
    if stage.name == "attn_softmax":
        found += [replace(held, masks=False) for held in found if held.masked_cells_are_used()]
    return found


def lay_out(replay: Replay, name: str, ways: Sequence[Held], skip: Skip = NOTHING) -> None:
    """Let a replay hold a stage as it is meant, as far as what it is computed from can tell."""
    known = replay.can(name, skip, min(way.first for way in ways))
    errors = [_error(replay, name, way, skip) for way in ways] if known else []
    if not errors:
        replay.hold(name, ways[0])
        return
    least = min(errors)
    best = ways[errors.index(least)]
    odd = best.first != ways[0].first or row_of(name).masked  # tokens and keys for each other
    meant = least < CLEARLY * errors[0] and (not odd or least < BLIND)
    replay.hold(name, best if meant else ways[0])


def lay_out_by_consumers(
    replay: Replay, name: str, ways: Sequence[Held], consumers: Sequence[str]
) -> None:
    """Choose again: by what was computed from it; if it is wrong in any order, by its sibling."""
    before = replay.held[name]
    ways = [before, *(way for way in ways if way.first == before.first and way is not before)]
    if before.factor == 1 and replay.can(name) and _error(replay, name, before) < BLIND:
        ways = [way for way in ways if way.factor == 1]  # what fits is not scaled
    errors = []
    for way in ways if consumers else ():
        replay.hold(name, way)
        errors.append(max(_error(replay, after, replay.held[after]) for after in consumers))
    replay.hold(name, before)
    if errors and min(errors) < BLIND:
        if min(errors) < CLEARLY * errors[0]:
            replay.hold(name, ways[errors.index(min(errors))])
        return
    if _error(replay, name, before) < BLIND:
        return
    sibling = replay.held.get(SIBLINGS.get(name, ""))
    alike = [way for way in ways if sibling is not None and way.way.letters == sibling.way.letters]
    replay.hold(name, alike[0] if alike else before)


def lay_out_siblings(
    replay: Replay, ways: Mapping[str, Sequence[Held]], consumers: Sequence[str]
) -> None:
    """Choose again for q and k at once, which are both wrong, by what was computed from them."""
    names = [*SIBLINGS]
    before = [replay.held[name] for name in names]
    pairs = [
        (q, k)
        for q, k in product(*(ways[name] for name in names))
        if q.way.letters == k.way.letters and (q.first, k.first) == tuple(of.first for of in before)
    ]
    errors = []
    for pair in (before, *pairs):
        for name, way in zip(names, pair, strict=True):
            replay.hold(name, way)
        errors.append(max(_error(replay, after, replay.held[after]) for after in consumers))
    best = errors.index(min(errors))
    fits = errors[best] < min(BLIND, CLEARLY * errors[0])
    for name, way in zip(names, (before, *pairs)[best] if fits else before, strict=True):
        replay.hold(name, way)


def _error(replay: Replay, name: str, way: Held, skip: Skip = NOTHING) -> float:
    """Return the relative L2 of a stage, read in one way; what is not finite is off by the rms."""
    stage = row_of(name)
    off, of, seen = 0.0, 0.0, False
    spans = replay.spans_for(way)
    ends = [*dict.fromkeys((spans[0], spans[-1]))]
    with np.errstate(invalid="ignore", over="ignore"):
        for first, truth, dumped in compared(replay, name, way, skip, spans=ends):
            if stage.masked:
                truth, dumped = np.tril(truth, first), np.tril(dumped, first)
            finite = np.isfinite(truth) & np.isfinite(dumped)
            seen |= bool(finite.any())
            squares = np.square(truth[np.isfinite(truth)])
            off += float(np.sum(np.square((dumped - truth)[finite])))
            clash = np.count_nonzero(np.isfinite(truth) != np.isfinite(dumped))
            off += clash * float(np.mean(squares)) if squares.size else 0.0
            of += float(np.sum(squares))
    return math.sqrt(off / of) if of else math.inf if off or not seen else 0.0
