"""How much error is normal: from a manifest, else from a table of what is normal in general."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import astuple

from qwenref.dumps.manifest import Manifest, floor_name
from qwenref.files import parse_json, read_bounded
from qwenref.metrics import MARGIN, Error, Errors, for_all_tokens, heads_in
from qwenref.stages import BY_NAME, EMBEDDING

PRECISIONS = ("float32", "float16", "bfloat16")
"""The classes that a comparison may be held to, from the finest to the coarsest."""

BLIND = 0.3
"""A floor that, times MARGIN, is this or more lets too much pass to be evidence: a comparison held
to it would not notice that a tenth of all values are wrong altogether (sqrt(0.1) is 0.32).
"""

GENERIC_FILE = Path(__file__).with_name("generic_floor.json")
"""Written by scripts/measure_generic_floor.py."""

AFTER_SOFTMAX = ("attn_softmax", "attention", "attn_out")
"""Whose errors are larger if scores are."""

DEPTH = 28
"""Layers of Qwen2.5 1.5B and 7B; of other published ones there are up to three times as many."""

LAST_STAGES = ("final_norm", "lm_head")
"""Stages of the whole model, that apr dumps; they come after all layers."""

Floors = dict[str, Errors]
"""By precision: a floor for each slice of a stage."""


class SliceFloors(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One floor for each kind of slice, as `qwenref.metrics.Errors` names them."""

    whole: float
    block: float
    head: float
    token: float
    element: float


class UpTo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is normal in prompts of at most so many tokens, by stage and precision."""

    tokens: int
    stages: dict[str, dict[str, SliceFloors]]


class Generic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is normal in general, at layer 0.

    Attributes:
        scores_rms: Floors of `AFTER_SOFTMAX` are for scores of at most this root mean square, and
            grow in proportion.
        lengths: From the shortest prompts to the longest.
    """

    scores_rms: float
    lengths: list[UpTo]


def floors_in(manifest: Manifest, layer: int | None, stage: str) -> Floors | None:
    """Return the accumulated floors of a stage that a manifest has, of all its tokens."""
    noise, name = manifest.noise, floor_name(layer, stage)
    if noise is None or name not in noise.stages:
        return None
    accumulated = noise.stages[name].accumulated
    known = {name: accumulated[name] for name in PRECISIONS if name in accumulated}
    return {  # of logits, perhaps of the last token alone
        name: for_all_tokens(of, noise.tokens[-len(of.tokens) :], noise.tokens[-1] + 1)
        for name, of in known.items()
    }


def widest(known: Sequence[Floors]) -> Floors | None:
    """Return the larger floor of each slice, of manifests that may have been made elsewhere."""
    if not known:
        return None
    first, *others = known
    for other in others:
        first = {
            name: Errors(*map(_wider, astuple(first[name]), astuple(other[name])))
            for name in first.keys() & other.keys()
        }
    return first


def _wider(a: Error | list[Error], b: Error | list[Error]) -> Any:
    if isinstance(a, list) and isinstance(b, list):
        return [_wider(x, y) for x, y in zip(a, b, strict=True)]
    return None if a is None or b is None else max(a, b)  # pyright: ignore[reportArgumentType]


def generic_floors(
    layer: int | None,
    stage: str,
    sizes: Mapping[str, int] | None,
    T: int | None,
    scores_rms: float | None,
    depth: int = DEPTH,
) -> Floors:
    """Return floors of a stage for no prompt in particular.

    A stage that is none of the nine has the largest floors of all of them, the embedding those
    of attn_norm, which is rounded as often. Above layer 0 a stage inherits what L layers add to the
    residual stream twice each, about the error of attn_out; like noise that adds up to
    sqrt(own^2 + 2 L attn_out^2). Transformers' errors in 24 random layers are 0.1 to 1.6 times that
    (scripts/measure_depth.py).

    Args:
        layer: Which, None if that is not known, or for the whole model.
        stage: The stage's name.
        sizes: N and K, if known: else there are floors for the whole and elements alone.
        T: How many tokens there are at most; None for the longest prompts.
        scores_rms: Root mean square of attn_scores, if known.
        depth: How many layers the model has.
    """
    generic = _generic()
    longest = generic.lengths[-1]
    up_to = next((up for up in generic.lengths if T is not None and up.tokens >= T), longest)
    larger = max(1.0, (scores_rms or 0.0) / generic.scores_rms)
    floors = {}
    for name in PRECISIONS:
        known = up_to.stages.get("attn_norm" if stage == EMBEDDING.name else stage)
        own = known[name] if known else _largest(up_to, name)
        by = 1.0 if known and stage not in AFTER_SOFTMAX else larger
        own, out = (astuple(of) for of in (own, up_to.stages["attn_out"][name]))
        before = depth if stage in LAST_STAGES else layer or 0
        growth = math.sqrt(2 * before) * larger
        of = (math.hypot(by * a, growth * b) for a, b in zip(own, out, strict=True))
        floors[name] = _for_slices(SliceFloors(*of), stage, sizes, T)
    return floors


def _for_slices(
    of: SliceFloors, stage: str, sizes: Mapping[str, int] | None, T: int | None
) -> Errors:
    row = BY_NAME.get(stage)
    if row is None or sizes is None or T is None:
        return Errors(of.whole, [], [], [], of.element)
    return Errors(
        of.whole,
        [of.block] * len(row.blocks),
        [of.head] * heads_in(row, sizes),
        [of.token] * T,
        of.element,
    )


def _largest(up_to: UpTo, precision: str) -> SliceFloors:
    rows = [astuple(of[precision]) for of in up_to.stages.values()]
    return SliceFloors(*map(max, zip(*rows, strict=True)))


@cache
def _generic() -> Generic:
    return parse_json(GENERIC_FILE, read_bounded(GENERIC_FILE, 1 << 20), Generic)


def for_last_token(floors: Errors) -> Errors:
    """Return floors of slices of the last token alone, from those of slices of all tokens.

    A head of one token is a row: no more off than its worst element.
    """
    last = floors.tokens[-1]

    def least(floor: float | None, other: float | None) -> float | None:
        return None if floor is None or other is None else max(floor, other)

    return Errors(
        last,
        [least(block, last) for block in floors.blocks],
        [least(head, floors.element) for head in floors.heads],
        [last],
        floors.element,
    )


def for_elements(floors: Errors) -> Errors:
    """Return the errors, or floors, of what is judged of an array of unknown shape."""
    return Errors(floors.whole, [], [], [], floors.element)


def seeing(floors: Errors) -> Errors:
    """Return floors without those that let nearly everything pass."""
    return Errors(
        _seeing(floors.whole),
        [*map(_seeing, floors.blocks)],
        [*map(_seeing, floors.heads)],
        [*map(_seeing, floors.tokens)],
        _seeing(floors.element),
    )


def _seeing(floor: Error) -> Error:
    return floor if floor is not None and floor * MARGIN < BLIND else None
