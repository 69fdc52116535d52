"""From the standing of each stage to what is reported of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from qwenref.judge.floors import for_last_token, generic_floors
from qwenref.metrics import MARGIN, finite, worst_of
from qwenref.stages import EMBEDDING, RESIDUAL
from qwenref.trial.blame import Standing, Trial
from qwenref.trial.dialects import NARROW
from qwenref.trial.executed import Found
from qwenref.trial.explanation import (
    Cause,
    Check,
    DialectFound,
    Hidden,
    Named,
    StageExplained,
    Status,
    Unseen,
    WeightNoise,
    WorstSlice,
)
from qwenref.trial.matched_filter import Below
from qwenref.trial.naming import Naming
from qwenref.trial.part import CHAIN
from qwenref.trial.pattern import pattern_of
from qwenref.trial.precision import all_fit
from qwenref.trial.replay import Replay
from qwenref.trial.residual import residual_of
from qwenref.trial.telling import told_by

WRONG = ("added", "dumped_wrong")


def explained_stages(
    trial: Trial, misfits: Mapping[str, str], found: Sequence[Check], *, tainted: bool = False
) -> list[StageExplained]:
    """Return all stages in chain order; what enters the layer only if that was dumped.

    Args:
        trial: Its standings.
        misfits: Why files of some stages cannot be used.
        found: Checks, which decide where a stage cannot be computed.
        tainted: Whether an error was made before what enters.
    """
    oracle = trial.replay.without_dumps()
    place = trial.replay.part.layer
    wrong = {RESIDUAL} if tainted else set()
    stages = []
    for name in trial.stages:
        standing = trial.standings[name]
        if (
            name == RESIDUAL
            and name in trial.replay.held
            and (standing.account is None or place != 0)
        ):
            continue  # it is where the replay begins, or the layer before is blamed for it
        if name not in trial.replay.held:
            if name != RESIDUAL or name in misfits:
                stages.append(StageExplained(label(name, place), "unmeasured", misfits.get(name)))
            continue
        replay = trial.replay
        dtype = next((of for of in NARROW if all_fit(replay, name, of)), "float32")
        total, cosine, normal = None, None, False
        if oracle.can(name):
            oracle.held = {name: replay.held[name]}
            residual = residual_of(oracle, name)
            total, cosine = residual.errors.whole, residual.cosine
            floors = generic_floors(
                None, label(name, place), replay.sizes, replay.sizes["T"], None
            )[dtype]
            worst = worst_of(residual.errors, for_last_token(floors) if residual.first else floors)
            normal = not residual.contradictions and (worst is None or worst.ratio <= MARGIN)
        status, reason = standing.status, standing.reason
        if standing.account is None:
            failing = [of.name for of in found if of.status == "fails" and blamed(of) == name]
            if failing:
                status, reason = "added", f"{failing[0]}, in any right engine, and not here"
        sources = replay.reads(name, standing.skip)
        if status == "agree" and sources & wrong and not normal:
            status = "inherited"
        if status in ("added", "inherited"):
            wrong.add(name)
        found_here = _stage(trial, standing, status, reason)
        stages.append(msgspec.structs.replace(found_here, dtype=dtype, total=total, cosine=cosine))
    return stages


def label(name: str, place: int | None = 0) -> str:
    """Return what a stage of a layer, or of what follows the last one, is called in reports."""
    return EMBEDDING.name if name == RESIDUAL and place == 0 else name


def blamed(check: Check) -> str:
    """Return the stage that a failing check speaks against."""
    return next(name for name in (*CHAIN, "") if name and name in check.name)


def _stage(trial: Trial, standing: Standing, status: Status, reason: str | None) -> StageExplained:
    name, replay = standing.name, trial.replay
    way, shown = replay.held[name].layout, label(name, replay.part.layer)
    if standing.account is None:
        return StageExplained(shown, status, reason, layout=way)
    best = standing.account.weighed
    contradictions = best.residual.contradictions
    if standing.bits and status not in WRONG:
        each = [f"{tensor} to about {of:.0f} bits" for tensor, of in standing.bits.items()]
        reason = f"as rounded weights make it: {', '.join(each)}"
    if contradictions and status in WRONG:
        reason = f"{contradictions} NaN or infinite values that do not follow from what is before"
    worst = best.worst
    return StageExplained(
        stage=shown,
        status=status,
        reason=reason,
        added=None if contradictions else standing.account.added.residual.errors.whole,
        floor=best.floors.whole,
        ratio=None if worst is None or contradictions else finite(worst.ratio),
        worst=None
        if worst is None
        else WorstSlice(
            worst.slice.removesuffix("s"),
            best.residual.first + worst.which if worst.slice == "tokens" else worst.which,
            finite(worst.ratio),
        ),
        pattern=pattern_of(replay, name, standing.skip, best) if status in WRONG else None,
        layout=way,
        computed_from=_in_order(replay, replay.reads(name, standing.skip))
        if name != RESIDUAL
        else [],
        bridged=_in_order(replay, replay.bridges(name, standing.skip)) if name != RESIDUAL else [],
        dialects=[
            DialectFound(of.dialect.id, of.dialect.text, of.error_after)
            for of in standing.account.choices
        ],
        **_causes(trial, standing.naming),
        **_hidden(trial, standing.below),
    )


def _causes(trial: Trial, naming: Naming | None) -> dict[str, Any]:
    """Return the fields that name a mistake."""
    if naming is None or not (naming.causes or naming.nearest):
        return {}
    if naming.nearest is not None:
        return {"nearest": _cause(naming.nearest)}
    best, *others = naming.causes
    return {"cause": _cause(best), "equivalent": _equivalent(trial, best, others)}


def _equivalent(trial: Trial, best: Found, others: Iterable[Found]) -> list[Named]:
    """Return what cannot be told from the best, once each."""
    same = {(of.mistake.id, of.text): of for of in others}
    same.pop((best.mistake.id, best.text), None)
    return [
        Named(*name, told_by(trial.replay, trial.tensors, best, of)) for name, of in same.items()
    ]


def _hidden(trial: Trial, below: Below | None) -> dict[str, Any]:
    """Return the fields of what is below the noise."""
    if below is None:
        return {}
    unseen = [Unseen(of.mistake.id, of.text, tokens) for of, tokens in below.unseen]
    if not below.hidden:
        return {"unseen": unseen}
    best, *others = below.hidden
    said = Hidden(best.found.mistake.id, best.found.text, best.alpha, best.z)
    same = _equivalent(trial, best.found, (of.found for of in others))
    return {"hidden": said, "equivalent": same, "unseen": unseen}


def _cause(of: Found) -> Cause:
    return Cause(of.mistake.id, of.text, of.error_after)


def _in_order(replay: Replay, names: set[str]) -> list[str]:
    return [label(name, replay.part.layer) for name in replay.chain if name in names]


def weight_noise_of(trial: Trial) -> WeightNoise | None:
    """Return the widths of weights that seem to be rounded; None if none do."""
    bits: dict[str, float] = {}
    for standing in trial.standings.values():
        if standing.status not in WRONG:
            bits |= {tensor: round(of, 1) for tensor, of in standing.bits.items()}
    return WeightNoise(**bits) if bits else None
