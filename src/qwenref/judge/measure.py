"""From two or three dumps to a measurement: what can be compared, in which order, how far off."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from qwenref.dumps.manifest import Manifest
from qwenref.dumps.reading import Dump, Key, Mapped
from qwenref.errors import QwenrefError
from qwenref.judge.alignment import Side, Way, by_block, choose, side_of
from qwenref.judge.arrangement import Arrangement
from qwenref.judge.asked import Asked
from qwenref.judge.comparability import accepted, as_one_stage, difference
from qwenref.judge.distance import distance
from qwenref.judge.floors import (
    AFTER_SOFTMAX,
    DEPTH,
    Floors,
    floors_in,
    for_elements,
    generic_floors,
    widest,
)
from qwenref.judge.logits import logits_of
from qwenref.judge.measurement import LETTERS, Measurement, Pair, StageMeasured, pairs_of
from qwenref.judge.scope import PADDING, holdings, keys_in, sizes_in, tokens_in
from qwenref.judge.seen import Piece
from qwenref.metrics import errors_of, worst_element_of
from qwenref.progress import SILENT, Progress
from qwenref.stages import ALL, BY_NAME, Stage

FLAT = Stage("flat", ("T", "D"), ())
"""An array of unknown shape: cut in rows, which stand in for tokens where an element is scaled."""

LEAST_ROW, MOST_ROWS = 64, 1 << 15
"""Values and number of such rows: 64 is the smallest head of the family, so that few rows mix
heads; and what is kept of each row stays small.
"""

NARROWEST = 16
"""Values that a token has at least in any stage but scores: 128 in the family, 28 in our tests."""


class Options(NamedTuple):
    """How to compare.

    Attributes:
        sizes: N, K, H, D, if the user knows them; and of a model I, V, and L, its layers.
        stages: Which to compare; None for all.
        layers: Which layers; None for all, and the stages of the whole model.
        limit: How many of the largest differences to keep.
        strict_layout: Whether another order of axes, or another convention, is a difference.
        allow_different_weights: Whether to compare dumps of different weights.
    """

    sizes: Mapping[str, int] | None = None
    stages: Asked | None = None
    layers: Collection[int] | None = None
    limit: int = 10
    strict_layout: bool = False
    allow_different_weights: bool = False


def measure(dumps: Sequence[Dump], options: Options, progress: Progress = SILENT) -> Measurement:
    """Measure how far every two of two or three dumps are apart.

    Args:
        dumps: Two or three.
        options: How.
        progress: Told each stage, and how many bytes are looked at.

    Raises:
        QwenrefError: A file is broken, or nothing is there to compare.
    """
    dumps, clash = as_one_stage(dumps)
    manifests = [dump.manifest for dump in dumps if dump.manifest]
    sizes = sizes_in(manifests, options.sizes or next((d.sizes for d in dumps if d.sizes), None))
    allowed = options.allow_different_weights
    problem = clash or difference(dumps, allow_different_weights=allowed)
    T = tokens_in(dumps, sizes)
    telling = {stage.name for stage in ALL if not stage.masked}
    held = {name for dump in dumps for _, name in dump.stages}
    if options.sizes and T is None and telling & held:
        raise QwenrefError(f"the sizes {dict(options.sizes)} fit no file of {dumps[0].name}")
    stages = []
    if problem is None:
        keys = keys_in(dumps, options.stages, options.layers)
        if not keys:
            raise QwenrefError(f"nothing to compare: {holdings(dumps)}")
        pairs = [(key, dumps[n]) for key in keys for pair in pairs_of(len(dumps)) for n in pair]
        parts = [part for key, dump in pairs for part in dump.stages.get(key, {}).values()]
        progress.expect(sum(part.count * part.dtype.itemsize for part in parts))
        run = _Run(dumps, sizes, T, options, progress)
        stages = [run.stage(key, required) for key, required in keys.items()]
    return Measurement(
        schema="qwenref-measurement-v1",
        paths=[dump.name for dump in dumps],
        made_by=[_made_by(dump.manifest) for dump in dumps],
        sizes={**(sizes or {}), **({"T": T} if T else {})},
        single=any(dump.single for dump in dumps),
        strict_layout=options.strict_layout,
        incomparable=problem,
        warnings=accepted(dumps, allow_different_weights=allowed),
        stages=stages,
    )


class _Run:
    """What all stages of one comparison share."""

    def __init__(
        self,
        dumps: Sequence[Dump],
        sizes: Mapping[str, int] | None,
        T: int | None,
        options: Options,
        progress: Progress,
    ):
        self._dumps, self._sizes, self._T, self._options = dumps, sizes, T, options
        self._progress = progress
        self._scores_rms: dict[int | None, float | None] = {}

    def stage(self, key: Key, required: bool) -> StageMeasured:
        """Measure one stage of all dumps."""
        self._progress.step(f"comparing {key[1]}")
        known = (floors_in(dump.manifest, *key) for dump in self._dumps if dump.manifest)
        floors = widest([floors for floors in known if floors])
        origin = "generic" if floors is None else "manifest"
        if floors is None:
            rms = self._rms_of_scores(key[0]) if key[1] in AFTER_SOFTMAX else None
            floors = generic_floors(*key, self._sizes, self._most_tokens(), rms, self._depth())
        pairs = [self._pair(key, a, b, floors) for a, b in pairs_of(len(self._dumps))]
        return StageMeasured(*key, required, floors, origin, pairs)

    def _rms_of_scores(self, layer: int | None) -> float | None:
        """Return the root mean square of attn_scores in the dump where it is smallest."""
        if layer not in self._scores_rms and self._sizes is not None:
            self._scores_rms[layer] = None
            key = layer, "attn_scores"
            floors = generic_floors(*key, self._sizes, self._most_tokens(), None)
            for a, b in pairs_of(len(self._dumps)):
                self._pair(key, a, b, floors)
        return self._scores_rms.get(layer)

    def _depth(self) -> int:
        """Return how many layers the model has; if nothing says so, that dumps may not have all."""
        dumped = (layer for dump in self._dumps for layer, _ in dump.stages if layer is not None)
        return (self._sizes or {}).get("L") or max(DEPTH, max(dumped, default=0) + 1)

    def _most_tokens(self) -> int:
        """Return how many tokens there are, or at most: N T T scores are at least T T."""
        if self._T is not None:
            return self._T
        return min(
            math.isqrt(stored.count)
            if name in BY_NAME and BY_NAME[name].masked
            else max(1, stored.count // NARROWEST)
            for dump in self._dumps
            for (_, name), parts in dump.stages.items()
            for stored in parts.values()
        )

    def _pair(self, key: Key, a: int, b: int, floors: Floors) -> Pair:
        """Measure one stage of two dumps."""
        sides = side_of(self._dumps[a], key), side_of(self._dumps[b], key)
        for number, side in zip((a, b), sides, strict=True):
            name = LETTERS[number]
            if not side.parts:
                return Pair(a, b, problem=f"{name} has none")
            if side.lacks:
                return Pair(a, b, problem=f"{name} lacks {', '.join(side.lacks)} of it")
        counts = [side.size for side in sides]
        ways = self._ways(key[1], sides)
        mapped = [[stored.mapped() for stored in side.parts] for side in sides]
        arrays = [[each.values for each in of] for of in mapped]
        together = [*mapped[0], *mapped[1]]
        if ways is not None and all(of and of[0].padding % PADDING for of in ways):
            ways = None  # as many keys on both sides: real ones
        if ways is not None and self._T == 1:
            ways = [  # one query may have many keys that are no padding
                [way for way in of if not way.cuts_off_keys(side)]
                for of, side in zip(ways, arrays, strict=True)
            ]
        if ways is not None and all(ways):
            stage, factors = BY_NAME[key[1]], self._factors(key[1], sides)
            way = choose(stage, arrays, ways, factors, floors, together)
            pair = Pair(a, b, count=counts[0])
            return self._shaped(pair, key[0], stage, arrays, together, way)
        if counts[0] != counts[1] or len(arrays[0]) + len(arrays[1]) > 2:
            problem = f"{counts[0]} values against {counts[1]}, which no layout explains"
            return Pair(a, b, problem=problem, incomparable=True)
        row = BY_NAME.get(key[1])
        pair = Pair(a, b, count=counts[0], slices="flat")
        masked = row is None or row.masked
        return self._flat(pair, arrays[0][0], arrays[1][0], together, maybe_masked=masked)

    def _ways(self, name: str, sides: Sequence[Side]) -> list[list[Arrangement]] | None:
        """Return how each of two sides may be stored; None if that is not known of both."""
        row = BY_NAME.get(name)
        if row is None or self._sizes is None or self._T is None:
            return None
        ways = [side.ways(row, self._sizes, self._T) for side in sides]
        if self._options.strict_layout:  # as the first one is stored
            first = ways[0][:1]
            ways = [first, first] if first and first[0] in ways[1] else []
        return ways if ways and all(ways) else None

    def _factors(self, name: str, sides: Sequence[Side]) -> list[float]:
        """Return what the second side may have to be multiplied with: for unscaled scores.

        If one side states its axes, it is the other one that is not scaled as ours are.
        """
        factors = [1.0]
        if name == "attn_scores" and not self._options.strict_layout and self._sizes is not None:
            root = math.sqrt(self._sizes["H"])
            stated = [side.axes is not None for side in sides]
            factors += [root] if stated[1] or not stated[0] else []
            factors += [1 / root] if stated[0] or not stated[1] else []
        return factors

    def _flat(
        self,
        pair: Pair,
        a: np.ndarray,
        b: np.ndarray,
        mapped: Sequence[Mapped],
        *,
        maybe_masked: bool,
    ) -> Pair:
        """Compare two arrays of which only the order of values is known."""
        width = max(LEAST_ROW, -(-a.size // MOST_ROWS))
        rows, rest = divmod(a.size, width)
        cuts = [(0, slice(0, rows * width), width), (rows, slice(rows * width, None), rest)]
        pieces = [
            Piece(a[cut].reshape(-1, 1, cells), b[cut].reshape(-1, 1, cells), row, 0, 0, base=a)
            for row, cut, cells in cuts
            if a[cut].size
        ]
        sums, compared = distance(
            pieces,
            mapped,
            first_query=None,
            probabilities=False,
            factor=1.0,
            limit=self._options.limit,
            masks=maybe_masked,
            progress=self._progress,
        )
        errors = errors_of(FLAT, sums, {})
        bad = msgspec.structs.replace(compared.nonfinite, token=None, head=None)
        compared = msgspec.structs.replace(compared, nonfinite=bad)
        unsure = None
        if compared.mask_like and errors.whole:
            unsure = "values like those of a mask may hide differences: give the shapes (--model)"
        return msgspec.structs.replace(
            pair, errors=for_elements(errors), compared=compared, unsure=unsure
        )

    def _shaped(
        self,
        pair: Pair,
        layer: int | None,
        stage: Stage,
        arrays: Sequence[Sequence[np.ndarray]],
        mapped: Sequence[Mapped],
        way: Way,
    ) -> Pair:
        """Compare two arrays of known shape."""
        sizes = self._sizes or {}
        views = by_block(stage, sizes, way, arrays)
        last = len(views[0][0]) == 1
        pieces, head, start = [], 0, 0
        own = arrays[0] if len(arrays[0]) > 1 else [arrays[0][0]] * len(views[0])
        for a, b, array in zip(*views, own, strict=True):
            pieces.append(Piece(a, b, row=0, head=head, start=start, base=array))
            head += a.shape[1]
            start += array.size if len(arrays[0]) > 1 else 0
        sums, compared = distance(
            pieces,
            mapped,
            first_query=(self._T or 1) - len(views[0][0]) if stage.masked else None,
            probabilities=stage.name == "attn_softmax",
            factor=way.factor,
            limit=self._options.limit,
            progress=self._progress,
        )
        if stage.name == "attn_scores":
            rms = math.sqrt(sums.scale.sum(axis=(1, 2)).min() / sums.cells.sum())
            rms /= max(1.0, way.factor)  # else it is that of scores before 1/sqrt(H)
            self._scores_rms[layer] = min(rms, self._scores_rms.get(layer) or math.inf)
        logits = None
        if stage.name == "lm_head":
            (of_a, *_), (of_b, *_) = views
            logits = logits_of(of_a[:, 0], of_b[:, 0])
        unscaled = None
        if way.factor != 1:
            unscaled = pair.b if way.factor < 1 else pair.a
        return msgspec.structs.replace(
            pair,
            layout=(way.a.name, way.b.name),
            unsure=way.unsure,
            unscaled=unscaled,
            slices="last" if last and (self._T or 1) > 1 else "all",
            errors=errors_of(stage, sums, sizes),
            element_at=worst_element_of(stage, sums, sizes),
            compared=compared,
            logits=logits,
        )


def _made_by(manifest: Manifest | None) -> str | None:
    if manifest is None:
        return None
    version = manifest.versions.get(manifest.engine, "")
    return f"{manifest.engine} {version}, {manifest.dtype} on {manifest.device}".replace(" ,", ",")
