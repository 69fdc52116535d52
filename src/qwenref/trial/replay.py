"""One layer's stages, computed in float64 from the arrays that an engine dumped itself."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np

from qwenref.chain import Span, spans_of
from qwenref.metrics import Errors, floors_of, sums_of
from qwenref.model.attention import Attention
from qwenref.model.config import Config
from qwenref.model.precision import FORMATS, Precision
from qwenref.model.roundoff import Roundoff, generator
from qwenref.model.weights import AttentionWeights
from qwenref.noise import LEAST_ROWS, MOST_TOKENS, sampled
from qwenref.stages import BY_NAME, EMBEDDING, RESIDUAL, Stage
from qwenref.trial.dialects import (
    BLOCKS,
    EXACT,
    OPERAND_POINTS,
    Dialect,
    Formats,
    flash_attention,
    in_format,
    minus_bias,
)
from qwenref.trial.held import Held

ROWS = MOST_TOKENS
"""Tokens computed at a time: as many as floors look at, which shares compiled programs."""

WEIGHTED = ("attn_norm", "qkv_matmul", "qkv_bias", "attn_out")
"""Stages that take weights."""

NARROWER = {
    "float32": ("bfloat16", "float16"),
    "float16": ("bfloat16",),
    "bfloat16": ("float16",),
}
"""By the stored dtype of weights, formats that change them; float16 those below 6e-5."""

FLOAT32 = 2.0**-23
"""Relative error of a difference that a file holds in float32: of two roundings."""

Skip = frozenset[str]
"""Stages whose dump is not read: they are computed from what they are computed from."""

NOTHING: Skip = frozenset()


class Runs(NamedTuple):
    """A stage at some positions: its value, and what R honest float32 engines make of it."""

    value: np.ndarray
    draws: np.ndarray


class Replay:
    """Computes stages of one layer from what is held, and else from what those are computed from.

    Attributes:
        held: What the engine dumped, by the name of the stage; `RESIDUAL` for what enters.
        spans: Tokens that are computed at a time.
        proven: Of a stage and a format, whether the engine goes on with what it has rounded to it.
    """

    def __init__(
        self,
        config: Config,
        weights: AttentionWeights | None,
        T: int,
        entering: np.ndarray | None,
    ):
        """Prepare to compute, within `computing("float64", ...)`.

        Args:
            config: Sizes, eps and theta.
            weights: The layer's; None if there are none: then `WEIGHTED` cannot be computed.
            T: How many tokens there are.
            entering: The stream that enters the layer, [T, D], if it is known.
        """
        self.config = config
        self._weighted = weights is not None
        none = AttentionWeights(*[np.zeros(0, np.float32)] * 8)
        self._weights = jax.device_put(weights or none)  # once, for every rounding
        self.sizes = config.sizes | {"T": T, "S": T}
        self.held: dict[str, Held] = {}
        self.proven: dict[tuple[str, str], bool] = {}
        self.spans = spans_of(0, T, ROWS)
        self._entering = entering
        self._layers: dict[Formats, Attention] = {}
        self._known: dict[tuple[object, ...], np.ndarray] = {}
        self._runs: dict[tuple[str, _Normal], Runs] = {}
        self._positions = sampled(T)
        n = len(self._positions)
        self._draws = max(-(-LEAST_ROWS // n), min(2, MOST_TOKENS // n))
        self._roundoff = Roundoff(self._layer(EXACT), self._positions, self._draws)

    def without_dumps(self) -> "Replay":
        """Return the same layer, computed from what enters it alone."""
        other = object.__new__(Replay)
        other.__dict__ |= self.__dict__ | {"held": {}, "_known": {}, "_runs": {}}
        return other

    def hold(self, name: str, held: Held) -> None:
        """Take a dump of a stage, or another reading of it."""
        self.held[name] = held
        self.proven.clear()
        self._known.clear()
        self._runs.clear()
        self._known.clear()
        self._runs.clear()

    def can(self, name: str, skip: Skip = NOTHING) -> bool:
        """Return whether a stage can be computed, from what is held but for `skip`."""
        if name == RESIDUAL:
            return self._entering is not None
        if name in WEIGHTED and not self._weighted:
            return False
        return all(
            self._suffices(before, keyed, skip) or self.can(before, skip)
            for before, keyed in _inputs(name)
        )

    def reads(self, name: str, skip: Skip = NOTHING) -> set[str]:
        """Return the stages whose dumps are read when a stage is computed."""
        found: set[str] = set()
        for before, keyed in _inputs(name):
            if self._holds(before, skip):
                found.add(before)
            if not self._suffices(before, keyed, skip):
                found |= self.reads(before, skip)
        return found

    def bridges(self, name: str, skip: Skip = NOTHING) -> set[str]:
        """Return the stages that are computed on the way to a stage, not read."""
        found: set[str] = set()
        for before, keyed in _inputs(name):
            if not self._suffices(before, keyed, skip):
                found |= {before} | self.bridges(before, skip)
        return found

    def compute(
        self, name: str, span: Span, skip: Skip = NOTHING, dialect: Dialect = EXACT
    ) -> np.ndarray:
        """Return a stage for the tokens of a span, float64 in the axes of the stage.

        A dialect is that of this stage and of those that are computed on the way to it.
        """
        if name == RESIDUAL:
            rows = self._table_rows(slice(span.start, span.stop))
            formats = dict(dialect.formats)
            return in_format(rows, formats.get("table", formats.get("stored", "exact")))
        skip = skip | dialect.skips
        if dialect.flash and name == "attention":
            q = self._rows("q_post_rope", span, skip, dialect)
            k, v = (self._keys(each, skip, dialect) for each in ("k_post_rope", "qkv_bias"))
            return flash_attention(q, k, v, span.start)
        if dialect.minus_bias:
            output = self.compute("qkv_bias", span, skip | {name}, dialect.of_output)
            return in_format(output - self._bias(dialect), dialect.then)
        stage = BY_NAME[name]
        first, *keyed = stage.computed_from
        given = [self._rows(first, span, skip, dialect)]
        given += [self._keys(each, skip, dialect) for each in keyed]
        given = dialect.rounded_inputs(given)
        position: tuple[object, ...] = ()
        if stage.positioned:
            rows = span.stop - span.start
            position = (span.start,) if stage.sliced else (np.full(rows, span.start),)
        values = self._computed(stage, given, position, dialect)
        if name == "attention":
            values = self._without_masked_nan(values, given, span.start)
        return self._rounded(name, values, dialect.result)

    def _without_masked_nan(
        self, values: np.ndarray, given: Sequence[np.ndarray], first: int
    ) -> np.ndarray:
        """Return attention in which no NaN is 0 * NaN: a query does not see what is masked."""
        softmax, v = given
        if np.isfinite(v).all():
            return values
        seen = np.tril(np.ones_like(softmax), first)
        stage = BY_NAME["attention"]
        reached = self._computed(stage, [seen, (~np.isfinite(v)).astype(np.float64)], (), EXACT)
        finite = self._computed(stage, [softmax, np.where(np.isfinite(v), v, 0.0)], (), EXACT)
        return np.where(reached > 0, values, finite)

    def floor(
        self,
        name: str,
        skip: Skip = NOTHING,
        *,
        dialect: Dialect = EXACT,
        held_in: str = "exact",
        operands: str = "exact",
    ) -> Errors:
        """Return the errors that are normal for a stage that is computed from what is held.

        Args:
            name: Which stage.
            skip: Whose dumps are not read.
            dialect: How results are rounded.
            held_in: The format that dumps were rounded to after the engine used their values.
            operands: The format that operands of products are rounded to.
        """
        normal = _Normal(skip | dialect.skips, dialect.result, held_in, operands)
        if name == RESIDUAL:
            stage, runs = EMBEDDING, self._entered()
        elif dialect.minus_bias:
            stage = BY_NAME["qkv_bias"]
            runs = self._computed_runs(stage, normal._replace(skip=normal.skip | {name}))
        else:
            stage = BY_NAME[name]
            runs = self._computed_runs(stage, normal)
        draws = [self._rounded(name, draw, dialect.result) for draw in runs.draws]
        if dialect.minus_bias:
            bias = self._bias(dialect)
            runs = runs._replace(value=runs.value - bias)
            draws = [in_format(draw - bias, dialect.then) for draw in draws]
        sums = [sums_of(stage, runs.value, draw - runs.value, self.sizes["H"]) for draw in draws]
        largest = np.max([each.largest for each in sums], axis=0)
        if name == "attn_softmax":  # its rms is smaller with more keys, its peaks are not
            largest *= self._roundoff.unseen_keys[:, None] ** 0.5
        error = np.mean([each.error for each in sums], axis=0)
        return floors_of(stage, sums[0]._replace(error=error, largest=largest), self.sizes)

    def entering(self, start: int, stop: int) -> np.ndarray:
        """Return what enters the layer, as dumped, else as the oracle has it."""
        held = self.held.get(RESIDUAL)
        if held is not None and held.first <= start:
            return held.rows(start, stop)
        return self._table_rows(slice(start, stop))

    @property
    def positions(self) -> list[int]:
        """Of the tokens that floors are of."""
        return self._positions.tolist()

    def _holds(self, name: str, skip: Skip) -> bool:
        return name in self.held and name not in skip

    def _suffices(self, name: str, keyed: bool, skip: Skip) -> bool:
        """Return whether a dump has the tokens that are needed: of keys all of them."""
        return self._holds(name, skip) and not (keyed and self.held[name].first)

    def _rows(self, name: str, span: Span, skip: Skip, dialect: Dialect) -> np.ndarray:
        """Return what is held of a stage, for other tokens what it is computed from."""
        held = self.held[name] if self._holds(name, skip) else None
        if held is not None and held.first <= span.start:
            return held.rows(span.start, span.stop)
        key = name, span, skip, dialect.on_the_way
        if key not in self._known:
            if held is None or self.can(name, skip):
                values = self.compute(name, span, skip, dialect.on_the_way)
            else:  # of other tokens nothing is asked
                values = np.zeros(held.rows(held.first, held.first + 1).shape)
                values = values.repeat(span.stop - span.start, axis=held.stage.axes.index("T"))
            if held is not None and held.first < span.stop:
                values = _with_rows(values, held, span.start, held.rows(held.first, span.stop))
            if len(self.spans) > 1:  # of a long prompt, little is held at a time
                return values
            self._known[key] = values
        return self._known[key]

    def _keys(self, name: str, skip: Skip, dialect: Dialect) -> np.ndarray:
        """Return what queries look at: of qkv_bias v alone, [T, K*H]; of k_post_rope all."""
        key = name, "keys", skip, dialect.on_the_way
        if key not in self._known:
            width = self.sizes["K"] * self.sizes["H"] if BY_NAME[name].blocks else 0
            parts = [
                self._rows(name, span, skip, dialect)[span.first - span.start :, ..., -width:]
                for span in self.spans
            ]
            self._known[key] = np.concatenate(parts)
        return self._known[key]

    def _rounded(self, name: str, values: np.ndarray, narrow: str) -> np.ndarray:
        """Round a stage as the engine has it, which may be scaled otherwise than ours."""
        factor = self.held[name].factor if name in self.held else 1.0
        return in_format(values / factor, narrow) * factor

    def weights_may_be(self, name: str, skip: Skip) -> list[Formats]:
        """Return how an engine may hold weights: as they are, or rounded; or the table alone."""
        narrower = NARROWER.get(np.dtype(self._weights.norm.dtype).name, ())
        found: list[Formats] = [()]
        if self._weighted:
            found += [(("stored", narrow),) for narrow in narrower]
        if RESIDUAL in self.bridges(name, skip) | {name}:
            found += [(("table", narrow),) for narrow in narrower]
        return found

    def output_fits(self, narrow: str) -> bool:
        """Return whether qkv_matmul with the bias is rounded to a format, as far as is held."""
        output, product = self.held.get("qkv_bias"), self.held["qkv_matmul"]
        bias = self._bias(minus_bias(narrow))
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

    def _bias(self, dialect: Dialect) -> np.ndarray:
        """Return the biases of q, k and v, as a dialect stores them."""
        rows = self._positions if len(self.spans) > 1 else np.arange(self.sizes["T"])
        none = np.zeros((len(rows), self.sizes["F"]))
        return self._computed(BY_NAME["qkv_bias"], [none], (), dialect)[:1]

    def _computed(
        self, stage: Stage, given: Sequence[np.ndarray], position: tuple[object, ...], of: Dialect
    ) -> np.ndarray:
        operands = dict(of.formats).get(OPERAND_POINTS.get(stage.name, ""))
        if operands in BLOCKS:
            given = [in_format(x, operands) for x in given]
        return np.asarray(getattr(self._layer(of), stage.name)(*given, *position))

    def _layer(self, dialect: Dialect) -> Attention:
        key = dialect.formats
        if key not in self._layers:
            formats = {point: of for point, of in dialect.formats if of in FORMATS}
            formats.pop("table", None)
            precision = Precision("float64", {"stored": "exact", **formats})
            self._layers[key] = Attention(self.config, self._weights, precision)
        return self._layers[key]

    def _run(self, name: str, normal: "_Normal") -> Runs:
        if (name, normal) not in self._runs:
            held = self.held[name] if self._holds(name, normal.skip) else None
            if held is not None and not held.first:
                runs = self._held_run(name, normal.held_in)
            elif name == RESIDUAL and self._entering is not None:
                runs = self._entered()
            elif name != RESIDUAL and self.can(name, normal.skip):
                value, draws = self._computed_runs(BY_NAME[name], normal)
                runs = Runs(value, in_format(draws, normal.result))
            else:
                runs = self._held_run(name, normal.held_in)
            if held is not None and held.first:
                own = self._held_run(name, normal.held_in)
                runs = Runs(
                    *(_last_from(of, last, held) for of, last in zip(runs, own, strict=True))
                )
            self._runs[name, normal] = runs
        return self._runs[name, normal]

    def _entered(self) -> Runs:
        value = self._table_rows(self._positions)
        return Runs(value, np.stack([value] * self._draws))

    def _table_rows(self, tokens: slice | np.ndarray) -> np.ndarray:
        if self._entering is None:
            raise ValueError("what enters the layer is not known: see `can`")
        return self._entering[tokens].astype(np.float64)

    def _held_run(self, name: str, held_in: str) -> Runs:
        held = self.held[name]
        stored = held.stored.at(self._positions)
        stored = np.where(np.isfinite(stored), stored, 0.0)
        draws = np.stack([stored] * self._draws)
        if held_in != "exact":
            unknown = generator(name, held_in).uniform(-0.5, 0.5, draws.shape)
            draws += unknown * spacing(stored, held_in)
        return Runs(stored * held.factor, draws * held.factor)

    def _computed_runs(self, stage: Stage, normal: "_Normal") -> Runs:
        runs = [self._run(before, normal) for before in stage.computed_from]
        position: tuple[object, ...] = ()
        if stage.positioned:
            shifts = self._positions - np.arange(len(self._positions))
            position = (0,) if stage.sliced else (shifts,)
        value = self._computed(stage, [run.value for run in runs], position, EXACT)
        added = self._roundoff.of(stage, [run.value for run in runs], value).float32
        rounded = stage.name in OPERAND_POINTS and normal.operands != "exact"
        if not rounded and all(np.array_equal(run.draws[0], run.value) for run in runs):
            return Runs(value, value + added)
        point = ((OPERAND_POINTS[stage.name], normal.operands),) if rounded else ()
        like = replace(EXACT, formats=point)
        draws = [
            self._computed(stage, [run.draws[r] for run in runs], position, like)
            for r in range(self._draws)
        ]
        return Runs(value, np.stack(draws) + added)


class _Normal(NamedTuple):
    """What honest engines are that floors are of: see `Replay.floor`."""

    skip: Skip
    result: str
    held_in: str
    operands: str


def _inputs(name: str) -> Iterator[tuple[str, bool]]:
    """Yield what a stage is computed from, and whether queries look at all its tokens."""
    if name != RESIDUAL:
        for at, before in enumerate(BY_NAME[name].computed_from):
            yield before, at > 0


def _with_rows(values: np.ndarray, held: Held, start: int, rows: np.ndarray) -> np.ndarray:
    """Put what is held in the place of the last tokens."""
    at = *([slice(None)] * held.stage.axes.index("T")), slice(held.first - start, None)
    values = values.copy()
    values[at] = rows
    return values


def _last_from(values: np.ndarray, own: np.ndarray, held: Held) -> np.ndarray:
    """Take the last token of another array, [.., T, ..] or several of them, [R, .., T, ..]."""
    axis = held.stage.axes.index("T") + values.ndim - len(held.stage.axes)
    at = *([slice(None)] * axis), slice(-1, None)
    values = values.copy()
    values[at] = own[at]
    return values


def spacing(values: np.ndarray, narrow: str) -> np.ndarray:
    """Return the distance of neighbours in a format, at each value; 0 at 0."""
    _, exponents = np.frexp(values)
    _, least = np.frexp(FORMATS[narrow].smallest or np.finfo(values.dtype).tiny)
    steps = np.ldexp(1.0, np.maximum(exponents, least) - 1 - FORMATS[narrow].mantissa)
    return np.where(values == 0, 0.0, steps)
