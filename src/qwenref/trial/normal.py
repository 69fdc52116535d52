"""What is normal of a stage that is computed from dumps: the errors of honest engines."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from qwenref.judge.floors import for_last_token
from qwenref.metrics import MARGIN, Errors, Sums, floors_of, for_all_tokens, sums_of
from qwenref.model.formats import in_format, spacing
from qwenref.model.roundoff import generator
from qwenref.noise import sums_of_draws
from qwenref.stages import BY_NAME, EMBEDDING, RESIDUAL, Stage
from qwenref.trial.dialects import EXACT, MATRICES, OPERAND_POINTS, Dialect
from qwenref.trial.held import Held
from qwenref.trial.replay import Replay, Skip


class Honest(NamedTuple):
    """How engines compute, besides in float32.

    Attributes:
        result: How results are rounded.
        held_in: The format that dumps were rounded to after the engine used their values.
        operands: The format that operands of products are rounded to.
    """

    result: str = "exact"
    held_in: str = "exact"
    operands: str = "exact"


class Runs(NamedTuple):
    """A stage at the replay's positions: its value, and what R honest engines make of it."""

    value: np.ndarray
    draws: np.ndarray


def floor_of(
    replay: Replay, name: str, skip: Skip, dialect: Dialect, honest: Honest | None = None
) -> Errors:
    """Return the errors that are normal for a stage that is computed from what is held.

    Args:
        replay: What it is computed with.
        name: Which stage; it is held.
        skip: Whose dumps are not read.
        dialect: What is computed; its result is rounded as it says, but for `honest`.
        honest: What engines it is normal of.
    """
    honest = honest or Honest(dialect.result)
    skip = skip | dialect.skips
    if dialect.minus_bias:
        stage = BY_NAME["qkv_bias"]
        value, draws = _unrounded(replay, stage.name, skip | {name}, honest)
        bias = replay.bias(dialect)
        value, draws = value - bias, _rounded(replay, name, draws, honest.result) - bias
        draws = in_format(draws, dialect.then)
    else:
        stage = EMBEDDING if name == RESIDUAL else BY_NAME[name]
        value, draws = _unrounded(replay, name, skip, honest)
        if name == RESIDUAL and dialect.override is not None:  # it is computed, not looked up
            unknown = generator(name, "computed").uniform(-0.5, 0.5, draws.shape)
            draws = draws + unknown * spacing(draws, "float32")
        draws = _rounded(replay, name, draws, honest.result)
    (floors,) = floors_of(
        stage, sums_of_draws(stage, value, draws[None], replay.roundoff), replay.sizes
    )
    floors = for_all_tokens(floors, replay.positions.tolist(), replay.sizes["T"])
    return for_last_token(floors) if replay.held[name].first else floors


def share_of_rows_off(
    replay: Replay, name: str, skip: Skip, honest: Honest, normal: float
) -> float:
    """Return in how many rows (a head of a token), of all, honest engines are off.

    Args:
        replay: What the stage is computed with.
        name: Which stage.
        skip: Whose dumps are not read.
        honest: What engines; what the rounding of results does to exact values does not count.
        normal: Relative size of an element's error that is no error.
    """
    runs = _unrounded(replay, name, skip, honest)
    value, draws = (replay.rounded(name, of, honest.result) for of in runs)
    return rows_off(sums_of(BY_NAME[name], value, draws - value, replay.sizes["H"]), normal)


def rows_off(sums: Sums, normal: float) -> float:
    """Return in how many rows (a head of a token), of all, a value is off by more than `normal`."""
    scale = np.sqrt(sums.scale.min(axis=0) / sums.cells)
    least = MARGIN * normal * np.maximum(scale, scale.mean())
    return float(np.mean(sums.largest > least))


def _unrounded(replay: Replay, name: str, skip: Skip, honest: Honest) -> Runs:
    if name == RESIDUAL:
        return _entered(replay)
    if not replay.bridges(name, skip):
        honest = honest._replace(result="exact")
    return replay.remember(
        (name, "computed", skip, honest), lambda: _computed(replay, BY_NAME[name], skip, honest)
    )


def _rounded(replay: Replay, name: str, draws: np.ndarray, narrow: str) -> np.ndarray:
    """Round results as honest engines may; that some value is nearly in the format is luck."""
    if narrow == "exact":
        return draws
    factor = replay.factor(name)
    stored = draws / factor
    off = generator(name, narrow, "result").uniform(-0.5, 0.5, draws.shape)
    exact = in_format(stored, narrow) == stored
    return np.where(exact, stored, stored + off * spacing(stored, narrow)) * factor


def _run(replay: Replay, name: str, skip: Skip, honest: Honest) -> Runs:
    """Return a stage as it is held, else as honest engines compute it."""
    held = replay.held[name] if replay.holds(name, skip) else None
    if held is not None and not held.first:
        return _held(replay, name, honest.held_in)
    if name == RESIDUAL and replay.can(name):
        runs = _entered(replay)
    elif held is None or replay.can(name, skip, 0):
        value, draws = _unrounded(replay, name, skip, honest)
        runs = Runs(value, in_format(draws, honest.result))
    else:
        runs = _held(replay, name, honest.held_in)
    if held is None:
        return runs
    own = _held(replay, name, honest.held_in)
    return Runs(*(_last_from(of, last, held) for of, last in zip(runs, own, strict=True)))


def _entered(replay: Replay) -> Runs:
    value = replay.table_rows(replay.positions)
    return Runs(value, np.stack([value] * replay.draws))


def _held(replay: Replay, name: str, held_in: str) -> Runs:
    held = replay.held[name]
    stored = held.stored.at(replay.positions)
    stored = np.where(np.isfinite(stored), stored, 0.0)
    draws = np.stack([stored] * replay.draws)
    if held_in != "exact" and not replay.is_table(name):
        unknown = generator(name, held_in).uniform(-0.5, 0.5, draws.shape)
        draws += unknown * spacing(stored, held_in)
    value, draws = stored * held.factor, draws * held.factor
    if held.factor != 1:  # the engine multiplied too, in float32
        steps = np.spacing(np.abs(value).astype(np.float32))
        draws += generator(name, "scaled").uniform(-0.5, 0.5, draws.shape) * steps
    return Runs(value, draws)


def _computed(replay: Replay, stage: Stage, skip: Skip, honest: Honest) -> Runs:
    """Return a stage as honest engines compute it, before its result is rounded."""
    runs = [_run(replay, before, skip, honest) for before in stage.computed_from]
    position: tuple[object, ...] = ()
    if stage.positioned:
        shifts = replay.positions - np.arange(len(replay.positions))
        position = (0,) if stage.sliced else (shifts,)
    value = replay.sample(stage, [run.value for run in runs], position, EXACT)
    added = replay.roundoff.of(stage, [run.value for run in runs], value).float32
    rounded = stage.name in OPERAND_POINTS and honest.operands != "exact"
    if not rounded and all(np.array_equal(run.draws[0], run.value) for run in runs):
        return Runs(value, value + added)
    point = ((OPERAND_POINTS[stage.name], honest.operands),) if rounded else ()
    like = replace(EXACT, formats=point)
    if stage.name in MATRICES:  # reading the matrix takes longer than multiplying
        (run,) = runs
        rows = run.draws.reshape(-1, run.draws.shape[-1])
        draws = replay.sample(stage, [rows], position, like).reshape(replay.draws, *value.shape)
        return Runs(value, draws + added)
    draws = [
        replay.sample(stage, [run.draws[r] for run in runs], position, like)
        for r in range(replay.draws)
    ]
    return Runs(value, np.stack(draws) + added)


def _last_from(values: np.ndarray, own: np.ndarray, held: Held) -> np.ndarray:
    """Take the last token of another array, [.., T, ..] or several of them, [R, .., T, ..]."""
    axis = held.stage.axes.index("T") + values.ndim - len(held.stage.axes)
    at = *([slice(None)] * axis), slice(-1, None)
    values = values.copy()
    values[at] = own[at]
    return values
