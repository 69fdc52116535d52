"""What a measurement means: contracts/diff-v1.yaml in code."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from qwenref.judge.floors import PRECISIONS, for_elements, for_last_token, seeing
from qwenref.judge.measurement import LETTERS, Compared, Measurement, Nonfinite, Pair, StageMeasured
from qwenref.judge.result import Status
from qwenref.metrics import MARGIN, Errors, Worst, worst_of
from qwenref.stages import HEAD, LAYER

_CHAIN = [stage.name for stage in (*LAYER, *HEAD)]


class Rules(NamedTuple):
    """What a comparison is held to.

    Attributes:
        dtype: ``auto``, or one of `PRECISIONS`.
        tolerances: Relative L2 by stage, None for all others, instead of floors.
        allow_missing: Whether stages that cannot be judged are accepted.
    """

    dtype: str = "auto"
    tolerances: Mapping[str | None, float] = {}
    allow_missing: bool = False


class Judged(NamedTuple):
    """One stage of two dumps, judged.

    Attributes:
        pair: What was measured.
        status: The judgement.
        reason: In words, where the status does not speak for itself.
        precision: What it was held to.
        floors: What is normal there, of the slices that were measured.
        tolerated: Whether these are not floors, but the user's tolerance.
        worst: The slice that is the most times its floor, of those that were judged.
        notes: What else a reader should know.
    """

    pair: Pair
    status: Status
    reason: str | None = None
    precision: str | None = None
    floors: Errors | None = None
    tolerated: bool = False
    worst: Worst | None = None
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many floors it is off; -1 if that is not known."""
        return -1.0 if self.worst is None else self.worst.ratio


def judged_stages(measurement: Measurement, rules: Rules) -> list[list[Judged]]:
    """Judge every stage of every two dumps, in chain order."""
    by_pair = [
        _with_conventions(measurement, _judged_chain(pairs, measurement.stages, rules))
        for pairs in zip(*(stage.pairs for stage in measurement.stages), strict=True)
    ]
    return [list(pairs) for pairs in zip(*by_pair, strict=True)]


def _judged_chain(
    pairs: Sequence[Pair], stages: Sequence[StageMeasured], rules: Rules
) -> list[Judged]:
    """Judge all stages of two dumps; what is seen of their precision holds for later stages."""
    seen = 0
    judged = []
    for pair, stage in zip(pairs, stages, strict=True):
        within = rules.tolerances.get(stage.stage, rules.tolerances.get(None))
        if pair.problem is not None or pair.errors is None or pair.compared is None:
            judged.append(Judged(pair, "unmeasured", pair.problem))
            continue
        if within is not None:
            floors = _tolerance(pair.errors, within)
            judged.append(_held_to(Judged(pair, "agree", floors=floors, tolerated=True)))
            continue
        if rules.dtype != "auto":
            judged.append(_finest(pair, stage, [rules.dtype]))
            continue
        in_chain = stage.stage in _CHAIN
        least = max(PRECISIONS.index(name) for name in ("float32", *pair.compared.formats) if name)
        least = max(seen, least) if in_chain else 0
        one = _finest(pair, stage, PRECISIONS[least:])
        if in_chain:
            agreed = one.status == "agree" and one.precision is not None
            seen = PRECISIONS.index(str(one.precision)) if agreed else least
        judged.append(one)
    return judged


def _finest(pair: Pair, stage: StageMeasured, precisions: Sequence[str]) -> Judged:
    """Judge a stage by the finest precision that explains it, else by the coarsest."""
    of_slices = {"all": lambda floors: floors, "last": for_last_token, "flat": for_elements}
    one = Judged(pair, "blind", "no floor is known")
    for name in precisions:
        if name in stage.floors:
            floors = of_slices[pair.slices](stage.floors[name])
            one = _held_to(Judged(pair, "agree", precision=name, floors=floors))
            if one.status == "agree":
                break
    return one


def _held_to(one: Judged) -> Judged:
    """Fill in the status: whether some slice exceeds its floor, or the user's tolerance."""
    errors, compared, floors = one.pair.errors, one.pair.compared, one.floors
    if errors is None or compared is None or floors is None:
        return one
    kept, margin = (floors, 1.0) if one.tolerated else (seeing(floors), MARGIN)
    if floors.whole is not None and (errors.whole is None or errors.whole > margin * floors.whole):
        kept = msgspec.structs.replace(kept, whole=floors.whole)
    one = one._replace(worst=worst_of(errors, kept))
    if compared.nonfinite.differ:
        return one._replace(status="differ", reason=_nonfinite(one.pair, compared.nonfinite))
    if compared.cells == 0:
        return one._replace(status="unmeasured", reason="no finite value is in both")
    if errors.whole == 0 and compared.max_abs_diff:
        return one._replace(status="differ", reason="values are too small to be compared")
    if one.ratio > margin:
        return one._replace(status="differ", reason=_without_scale(one.pair, errors, compared))
    if one.pair.slices == "flat" and compared.mask_like and errors.whole != 0:
        return one._replace(status="blind", reason=one.pair.unsure)
    if compared.nonfinite.a > compared.cells:
        return one._replace(status="blind", reason="most values are infinite in both")
    if kept.whole is None and errors.whole != 0:
        normal = "unbounded" if floors.whole is None else f"{floors.whole:.1g}"
        return one._replace(status="blind", reason=f"the error that is normal, {normal}, hides all")
    return one


def _tolerance(errors: Errors, within: float) -> Errors:
    """Return one relative L2 for all slices; it is no measure of a single element."""
    return Errors(
        within,
        [within] * len(errors.blocks),
        [within] * len(errors.heads),
        [within] * len(errors.tokens),
        None,
    )


def _nonfinite(pair: Pair, found: Nonfinite) -> str:
    a, b = letters_of(pair)
    where = f"index {found.first}" if found.token is None else f"token {found.token}"
    return f"{found.a} NaN or infinite values in {a}, {found.b} in {b}, first at {where}"


def _without_scale(pair: Pair, errors: Errors, compared: Compared) -> str | None:
    """Say why a relative error is no number, if it is none."""
    if errors.whole is not None:
        return None
    if compared.norm_ratio is not None and compared.norm_ratio != 0:
        return "values are too large to be compared"
    return f"{LETTERS[pair.b if compared.norm_ratio is None else pair.a]} is zero everywhere"


def letters_of(pair: Pair) -> tuple[str, str]:
    """Return what the two dumps of a pair are called."""
    return LETTERS[pair.a], LETTERS[pair.b]


def _with_conventions(measurement: Measurement, chain: list[Judged]) -> list[Judged]:
    """Decide whether scores that are unscaled, or masked otherwise, are just another convention.

    They are if the softmax that was made of them agrees.
    """
    softmax = {
        stage.layer: judged
        for stage, judged in zip(measurement.stages, chain, strict=True)
        if stage.stage == "attn_softmax"
    }
    return [
        _by_softmax(one, softmax.get(stage.layer), measurement.strict_layout)
        if stage.stage == "attn_scores"
        else one
        for stage, one in zip(measurement.stages, chain, strict=True)
    ]


def _by_softmax(scores: Judged, softmax: Judged | None, strict: bool) -> Judged:
    said = ", ".join(_conventions(scores.pair))
    if scores.status == "differ" and scores.pair.unscaled is not None:
        return scores._replace(notes=(*scores.notes, said))
    if scores.status != "agree" or not said:
        return scores
    if strict:
        return scores._replace(status="differ", reason=f"{said}, and the layout is strict")
    if softmax is None or softmax.status == "unmeasured":
        reason = f"{said}: without attn_softmax it cannot be told whether that is a convention"
        return scores._replace(status="differ", reason=reason)
    if softmax.status == "agree":
        return scores._replace(notes=(*scores.notes, f"{said}: a convention, attn_softmax agrees"))
    reason = f"{said}, and attn_softmax does not show that this is a convention"
    return scores._replace(status=softmax.status, reason=reason)


def _conventions(pair: Pair) -> Iterator[str]:
    """Yield in which ways the scores of two dumps are written otherwise."""
    if pair.compared is None:
        return
    if pair.unscaled is not None:
        yield f"{LETTERS[pair.unscaled]} holds scores before 1/sqrt(H)"
    held = pair.compared.masked
    if held[0] != held[1] and None not in held:
        each = (f"{kind} in {name}" for kind, name in zip(held, letters_of(pair), strict=True))
        yield f"masked cells hold {', '.join(each)}"
