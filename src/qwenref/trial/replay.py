"""Stages of a layer, or of the head, in float64 from the arrays that an engine dumped itself."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from qwenref.chain import Span, spans_of
from qwenref.model.arithmetic import Arithmetic
from qwenref.model.formats import in_format
from qwenref.model.precision import FORMATS, Precision
from qwenref.model.roundoff import Roundoff
from qwenref.noise import LEAST_ROWS, MOST_TOKENS, sampled
from qwenref.stages import BY_NAME, LAST_LOGITS, RESIDUAL, Stage
from qwenref.trial.dialects import (
    BLOCKS,
    EARLY,
    EXACT,
    OPERAND_POINTS,
    Dialect,
    Formats,
    flash_attention,
)
from qwenref.trial.held import Held
from qwenref.trial.part import OF_ATTENTION, OF_FEED_FORWARD, Part

_T = TypeVar("_T")

ROWS = MOST_TOKENS
"""Tokens computed at a time: as many as floors look at, which shares compiled programs."""

LEAST_DRAWS = 8
"""Of honest engines. A token whose softmax hangs in the balance shows in one of them what a rounded
score can do: of one alone, its errors were 4.04 times the largest (scripts/healthy.py --only 2485),
of four 4.7 times, of eight 1.2 times (--only 5465).
"""

WEIGHTED = (*OF_ATTENTION, *OF_FEED_FORWARD, "final_norm", "lm_head")
"""Stages that take weights."""

NARROWER = {
    "float32": ("bfloat16", "float16"),
    "float16": ("bfloat16",),
    "bfloat16": ("float16",),
}
"""By the stored dtype of weights, formats that change them; float16 those below 6e-5."""

FLOAT32 = 2.0**-23
"""Relative error of a difference that a file holds in float32: of two roundings."""

Key = tuple[Any, ...]
"""A stage, and what else decides what was computed."""

Skip = frozenset[str]
"""Stages whose dump is not read: they are computed from what they are computed from."""

NOTHING: Skip = frozenset()


class Replay:
    """Computes stages of one part from what is held, and else from what those are computed from.

    Attributes:
        part: The layer, or the head.
        chain: Its stages, after what enters it.
        held: What the engine dumped, by the name of the stage; `RESIDUAL` for what enters.
        spans: Tokens that are computed at a time.
        positions: Of the tokens at which it is found out what errors are normal.
        draws: How many honest engines that is found out from.
        roundoff: The errors of float32 at those positions.
    """

    def __init__(self, part: Part, T: int, entering: np.ndarray | None):
        """Prepare to compute, within `computing("float64", ...)`.

        Args:
            part: The layer or the head, with the weights that there are.
            T: How many tokens there are.
            entering: The stream that enters it, [T, D], if it is known.
        """
        self.part, self.config, self.chain = part, part.config, part.chain
        self.sizes = self.config.sizes | {"T": T, "S": T}
        self.held: dict[str, Held] = {}
        self.spans = spans_of(0, T, ROWS)
        self._entering = entering
        self._modules: dict[Formats, list[Arithmetic]] = {}
        self._known: dict[Key, Any] = {}
        entered = set() if entering is None else {np.dtype(entering.dtype).name}
        self._dtypes = part.dtypes | entered
        self.positions = sampled(T)
        self.draws = max(-(-LEAST_ROWS // len(self.positions)), LEAST_DRAWS)
        self._sampled = part.sampled(_precision(()))
        self.roundoff = Roundoff(self._sampled, self.positions, self.draws)

    def without_dumps(self) -> "Replay":
        """Return the same layer, computed from what enters it alone."""
        other = object.__new__(Replay)
        other.__dict__ |= self.__dict__ | {"held": {}, "_known": {}}
        return other

    def entered_by(self, rows: np.ndarray) -> "Replay":
        """Return the same layer, computed from another stream that enters it, [T, D]."""
        other = self.without_dumps()
        T = len(rows)
        other.sizes, other.spans = self.sizes | {"T": T, "S": T}, spans_of(0, T, ROWS)
        other._entering = rows
        return other

    def hold(self, name: str, held: Held) -> None:
        """Take a dump of a stage, or another reading of it."""
        self.held[name] = held
        place = self.chain.index(name)
        self._known = {
            key: of
            for key, of in self._known.items()
            if self.chain.index(key[0]) < place or (key[0] == name and key[1] == "computed")
        }

    def spans_for(self, held: Held) -> list[Span]:
        """Return which tokens to compute at a time for a dump; of logits, those that it has."""
        first = held.first if held.stage.name == LAST_LOGITS.name else 0
        return [
            span._replace(start=max(span.start, first), first=max(span.first, first))
            for span in self.spans
            if span.stop > first
        ]

    def remember(self, key: Key, make: Callable[[], _T]) -> _T:
        """Make something, unless it is known from before; of a long prompt, keep little.

        Args:
            key: The stage it is of, and "computed" if it does not depend on that stage's dump.
            make: How to make it.
        """
        if key not in self._known:
            made = make()
            if len(self.spans) > 1:
                return made
            self._known[key] = made
        return self._known[key]

    def can(self, name: str, skip: Skip = NOTHING, first: int | None = None) -> bool:
        """Return whether a stage can be computed, from what is held but for `skip`.

        Args:
            name: Which stage.
            skip: Whose dumps are not read.
            first: From which token on; None for those that the stage's own dump has, or all.
        """
        if name == RESIDUAL:
            return self._entering is not None
        if name in WEIGHTED and name not in self.part.weighted:
            return False
        return all(
            self._suffices(before, since, skip) or self.can(before, skip, since)
            for before, since in self._needs(name, first)
        )

    def reads(self, name: str, skip: Skip = NOTHING, first: int | None = None) -> set[str]:
        """Return the stages whose dumps are read when a stage is computed; as in `can`."""
        found: set[str] = set()
        for before, since in self._needs(name, first):
            if self.holds(before, skip):
                found.add(before)
            if not self._suffices(before, since, skip):
                found |= self.reads(before, skip, since)
        return found

    def bridges(self, name: str, skip: Skip = NOTHING, first: int | None = None) -> set[str]:
        """Return the stages that are computed on the way to a stage, not read; as in `can`."""
        found: set[str] = set()
        for before, since in self._needs(name, first):
            if not self._suffices(before, since, skip):
                found |= {before} | self.bridges(before, skip, since)
        return found

    def _needs(self, name: str, first: int | None) -> Iterator[tuple[str, int]]:
        """Yield what a stage is computed from, and from which token on."""
        if first is None:
            first = self.held[name].first if name in self.held else 0
        for before, keyed in _inputs(name):
            yield before, 0 if keyed else first

    def compute(
        self, name: str, span: Span, skip: Skip = NOTHING, dialect: Dialect = EXACT
    ) -> np.ndarray:
        """Return a stage for the tokens of a span, float64 in the axes of the stage.

        A dialect is that of this stage and of those that are computed on the way to it.
        """
        if name == RESIDUAL:
            rows = self.table_rows(slice(span.start, span.stop))
            formats = dict(dialect.formats)
            rows = in_format(rows, formats.get("table", formats.get("stored", "exact")))
            return in_format(self._made(name, [rows], span, skip, dialect), dialect.result)
        skip = skip | dialect.skips
        if dialect.minus_bias:
            output = self.compute("qkv_bias", span, skip | {name}, dialect.of_output)
            return in_format(output - self.bias(dialect), dialect.then)
        formats = self._needed(dialect.formats)
        like = replace(dialect, id="", text="", result="exact", formats=formats)
        if like.override is not None and like.override.stage not in self.bridges(name, skip) | {
            name
        }:
            like = replace(like, override=None)
        if like.override is not None:  # every mistake is computed once
            values = self._unrounded(name, span, skip, like)
        else:
            values = self.remember(
                (name, "computed", span, skip, like),
                lambda: self._unrounded(name, span, skip, like),
            )
        early = dict(formats).get(name) if name in EARLY else None
        return self.rounded(name, values, early or dialect.result)

    def _unrounded(self, name: str, span: Span, skip: Skip, dialect: Dialect) -> np.ndarray:
        if dialect.flash and name == "attention":
            q = self.rows("q_post_rope", span, skip, dialect)
            k, v = (self._keys(each, skip, dialect) for each in ("k_post_rope", "qkv_bias"))
            return flash_attention(q, k, v, span.start)
        given = [
            self._keys(each, skip, dialect) if keyed else self.rows(each, span, skip, dialect)
            for each, keyed in _inputs(name)
        ]
        return self._made(name, dialect.rounded_inputs(given), span, skip, dialect)

    def _made(
        self, name: str, given: Sequence[np.ndarray], span: Span, skip: Skip, dialect: Dialect
    ) -> np.ndarray:
        """Return what a stage makes of its inputs, by mistake if the dialect has one here."""
        if dialect.override is not None and dialect.override.stage == name:
            return dialect.override.compute(self, span, skip, dialect, given)
        return self.made(name, given, span, dialect)

    def made(
        self, name: str, given: Sequence[np.ndarray], span: Span, dialect: Dialect
    ) -> np.ndarray:
        """Return what a stage makes of inputs for the tokens of a span."""
        if name == RESIDUAL:
            return given[0]
        stage = BY_NAME[name]
        position: tuple[object, ...] = ()
        if stage.positioned:
            rows = span.stop - span.start
            position = (span.start,) if stage.sliced else (np.full(rows, span.start),)
        values = self.apply(stage, given, position, dialect)
        return (
            self._without_masked_nan(values, given, span.start) if name == "attention" else values
        )

    def _without_masked_nan(
        self, values: np.ndarray, given: Sequence[np.ndarray], first: int
    ) -> np.ndarray:
        """Return attention in which no NaN is 0 * NaN: a query does not see what is masked."""
        softmax, v = given
        if np.isfinite(v).all():
            return values
        seen = np.tril(np.ones_like(softmax), first)
        stage = BY_NAME["attention"]
        reached = self.apply(stage, [seen, (~np.isfinite(v)).astype(np.float64)], (), EXACT)
        finite = self.apply(stage, [softmax, np.where(np.isfinite(v), v, 0.0)], (), EXACT)
        return np.where(reached > 0, values, finite)

    def holds(self, name: str, skip: Skip) -> bool:
        """Return whether a stage's dump may be read."""
        return name in self.held and name not in skip

    def _suffices(self, name: str, first: int, skip: Skip) -> bool:
        """Return whether a dump has the tokens that are needed."""
        return self.holds(name, skip) and self.held[name].first <= first

    def rows(self, name: str, span: Span, skip: Skip, dialect: Dialect) -> np.ndarray:
        """Return what is held of a stage, for other tokens what it is computed from."""
        held = self.held[name] if self.holds(name, skip) else None
        if held is not None and held.first <= span.start:
            return held.rows(span.start, span.stop)
        if held is None or self.can(name, skip, span.start):
            values = self.compute(name, span, skip, dialect.on_the_way)
        else:  # of other tokens nothing is asked
            values = np.zeros(held.rows(held.first, held.first + 1).shape)
            values = values.repeat(span.stop - span.start, axis=held.stage.axes.index("T"))
        if held is not None and held.first < span.stop:
            values = _with_rows(values, held, span.start, held.rows(held.first, span.stop))
        return values

    def _keys(self, name: str, skip: Skip, dialect: Dialect) -> np.ndarray:
        """Return what queries look at: of qkv_bias v alone, [T, K*H]; of k_post_rope all."""
        key = name, "keys", skip, dialect.on_the_way
        if key not in self._known:
            width = self.sizes["K"] * self.sizes["H"] if BY_NAME[name].blocks else 0
            parts = [
                self.rows(name, span, skip, dialect)[span.first - span.start :, ..., -width:]
                for span in self.spans
            ]
            self._known[key] = np.concatenate(parts)
        return self._known[key]

    def rounded(self, name: str, values: np.ndarray, narrow: str) -> np.ndarray:
        """Round a stage as the engine has it, which may be scaled otherwise than ours."""
        factor = self.factor(name)
        return in_format(values / factor, narrow) * factor

    def factor(self, name: str) -> float:
        """Return how a stage is scaled that is held, against ours."""
        return self.held[name].factor if name in self.held else 1.0

    def weights_may_be(self, name: str, skip: Skip) -> list[Formats]:
        """Return how an engine may hold weights: as they are, or rounded; or the table alone."""
        narrower = NARROWER.get(self.part.stored, ())
        found: list[Formats] = [()]
        if self.part.weighted:
            found += [(("stored", narrow),) for narrow in narrower]
        if self.part.layer == 0 and RESIDUAL in self.bridges(name, skip) | {name}:
            found += [(("table", narrow),) for narrow in narrower]
        return found

    def output_fits(self, narrow: str) -> bool:
        """Return whether qkv_matmul with the bias is rounded to a format, as far as is held."""
        output, product = self.held.get("qkv_bias"), self.held["qkv_matmul"]
        bias = self.bias(replace(EXACT, formats=(("stored", narrow),)))
        for span in self.spans:
            first = max(span.first, product.first)
            if first < span.stop and output is not None and output.first <= first:
                values, slack = output.rows(first, span.stop), 0.0
            elif first < span.stop:
                values = product.rows(first, span.stop) + bias
                slack = FLOAT32 * (np.abs(values) + np.abs(bias))
            else:
                continue
            if np.any(np.abs(in_format(values, narrow) - values) > slack):
                return False
        return True

    def bias(self, dialect: Dialect) -> np.ndarray:
        """Return the biases of q, k and v, as a dialect stores them."""
        rows = self.positions if len(self.spans) > 1 else np.arange(self.sizes["T"])
        none = np.zeros((len(rows), self.sizes["F"]))
        return self.apply(BY_NAME["qkv_bias"], [none], (), dialect)[:1]

    def apply(
        self, stage: Stage, given: Sequence[np.ndarray], position: tuple[object, ...], of: Dialect
    ) -> np.ndarray:
        """Return what a stage makes of its inputs; `position` as `model.attention` takes it."""
        key = self._needed(of.formats)
        if key not in self._modules:
            self._modules[key] = self.part.modules(_precision(key))
        return self._applied(self._modules[key], stage, given, position, of)

    def sample(
        self, stage: Stage, given: Sequence[np.ndarray], position: tuple[object, ...], of: Dialect
    ) -> np.ndarray:
        """Return the same; of lm_head some entries of the vocabulary."""
        key = self._needed(of.formats)
        modules = self.part.sampled(_precision(key)) if key else self._sampled
        return self._applied(modules, stage, given, position, of)

    def _applied(
        self,
        modules: Sequence[Arithmetic],
        stage: Stage,
        given: Sequence[np.ndarray],
        position: tuple[object, ...],
        of: Dialect,
    ) -> np.ndarray:
        operands = dict(of.formats).get(OPERAND_POINTS.get(stage.name, ""))
        if operands in BLOCKS:
            given = [in_format(x, operands) for x in given]
        return self.part.compute(modules, stage, *given, *position)

    def _needed(self, formats: Formats) -> Formats:
        """Leave out that weights are rounded to what they are stored in."""
        return tuple(of for of in formats if of[0] != "stored" or {of[1]} != self._dtypes)

    def is_table(self, name: str) -> bool:
        """Return whether what is held are rows of the embedding table, as the oracle has them."""
        held = self.held.get(name)
        if name != RESIDUAL or held is None or self._entering is None:
            return False
        return all(
            np.array_equal(held.rows(first, span.stop), self.table_rows(slice(first, span.stop)))
            for span in self.spans
            for first in [max(span.first, held.first)]
            if first < span.stop
        )

    def table_rows(self, tokens: slice | np.ndarray) -> np.ndarray:
        """Return some rows of what enters the layer, as the oracle has it."""
        if self._entering is None:
            raise ValueError("what enters the layer is not known: see `can`")
        return self._entering[tokens].astype(np.float64)


def _precision(formats: Formats) -> Precision:
    """Return float64 that rounds at some points."""
    points = {point: of for point, of in formats if of in FORMATS and point != "table"}
    return Precision("float64", {"stored": "exact", **points})


def _inputs(name: str) -> Iterator[tuple[str, bool]]:
    """Yield what a stage is computed from, and whether queries look at all its tokens."""
    if name != RESIDUAL:
        stage = BY_NAME[name]
        for at, before in enumerate(stage.computed_from):
            yield before, stage.sliced and at > 0


def _with_rows(values: np.ndarray, held: Held, start: int, rows: np.ndarray) -> np.ndarray:
    """Put what is held in the place of the last tokens."""
    at = *([slice(None)] * held.stage.axes.index("T")), slice(held.first - start, None)
    values = values.copy()
    values[at] = rows
    return values
