"""From judged stages to a verdict and the result that is printed."""

from collections.abc import Iterator, Sequence

import msgspec

from qwenref.judge.floors import PRECISIONS
from qwenref.judge.measurement import LETTERS, Logits, Measurement, StageMeasured
from qwenref.judge.result import (
    Divergence,
    PairResult,
    Result,
    Sides,
    StageResult,
    Status,
    Verdict,
)
from qwenref.judge.slices import blocks_of, describe, ratio_of, standing_out, worst_slice
from qwenref.judge.verdict import Judged, Rules, judged_stages, letters_of
from qwenref.stages import BY_NAME

SAME_RMS = 0.99
"""A difference that is carried on keeps its rms but for rounding, far less than this even in
bfloat16: 2e-3 of it.
"""


def judge(measurement: Measurement, rules: Rules) -> Result:
    """Judge what was measured of two or three dumps: contracts/diff-v1.yaml has the rules."""
    judged = judged_stages(measurement, rules)
    stages = [
        _stage(measurement, stage, pairs)
        for stage, pairs in zip(measurement.stages, judged, strict=True)
    ]
    stages = _with_recoveries(stages)
    required = [stage for stage in stages if stage.required]
    verdict, reason = _verdict(measurement, required, rules)
    differing = required if verdict == "differ" else []
    first = next((stage for stage in differing if stage.status == "differ"), None)
    if first is not None:
        reason = _first_words(measurement, first, rules)
    return Result(
        schema="qwenref-diff-v1",
        verdict=verdict,
        reason=reason,
        first_divergence=None
        if first is None
        else Divergence(first.layer, first.stage, first.block),
        odd_one_out=None if first is None else first.odd_one_out,
        paths=measurement.paths,
        made_by=measurement.made_by,
        notes=[*measurement.warnings, *_allowed(verdict, required)],
        single=measurement.single and len(measurement.paths) == 2,
        stages=stages,
    )


def _severity(one: Judged) -> tuple[bool, float, float]:
    """Return what makes a pair the worst; two whose worst slice is alike differ as a whole."""
    errors = one.pair.errors
    whole = None if errors is None else errors.whole
    return one.status == "differ", one.ratio, -1.0 if whole is None else whole


def _stage(measurement: Measurement, stage: StageMeasured, pairs: Sequence[Judged]) -> StageResult:
    """Return one stage: the numbers of its worst pair, the status of all."""
    status = _status([one.status for one in pairs])
    shown = max(pairs, key=_severity)
    odd = _odd_one_out(pairs)
    result = StageResult(
        layer=stage.layer,
        stage=stage.stage,
        status=status,
        reason=next((one.reason for one in pairs if one.status == status), None),
        required=stage.required,
        pairs=[_pair(one) for one in pairs],
        odd_one_out=odd,
        notes=[*_notes(measurement, pairs)],
    )
    pair, compared = shown.pair, shown.pair.compared
    if compared is None or pair.errors is None:
        return result
    floor = None if shown.floors is None else shown.floors.whole
    return msgspec.structs.replace(
        result,
        precision=shown.precision,
        dim_product=pair.count,
        max_abs_diff=compared.max_abs_diff,
        max_abs_diff_index=compared.top_diffs[0].index
        if compared.max_at and compared.top_diffs
        else None,
        max_abs_diff_at=None if pair.slices == "flat" else compared.max_at,
        rms_diff=compared.rms_diff,
        cosine_sim=compared.cosine_sim,
        rel_l2=pair.errors.whole,
        norm_ratio=compared.norm_ratio,
        total_variation=compared.total_variation,
        floor=floor,
        ratio=ratio_of(pair.errors.whole, floor),
        floor_origin="tolerance" if shown.tolerated else stage.origin,
        layout=Sides(*(pair.layout or (None, None))),
        masked=Sides(*compared.masked),
        nonfinite=compared.nonfinite,
        blocks=blocks_of(stage, shown),
        block=standing_out(measurement, stage, shown),
        worst=worst_slice(measurement, stage, shown),
        top_diffs=compared.top_diffs,
        logits=pair.logits,
    )


def _status(found: Sequence[Status]) -> Status:
    worst: tuple[Status, ...] = ("differ", "unmeasured", "blind", "agree")
    return next(status for status in worst if status in found)


def _odd_one_out(pairs: Sequence[Judged]) -> int | None:
    """Return the dump that the other two, which agree, differ from."""
    if [one.status for one in pairs].count("differ") != 2:
        return None
    agreeing = [one.pair for one in pairs if one.status == "agree"]
    return 3 - agreeing[0].a - agreeing[0].b if agreeing else None


def _pair(one: Judged) -> PairResult:
    whole = None if one.pair.errors is None else one.pair.errors.whole
    floor = None if one.floors is None else one.floors.whole
    return PairResult(
        one.pair.a,
        one.pair.b,
        whole,
        floor,
        ratio_of(whole, floor),
        one.status,
        one.precision,
        one.reason,
    )


def _notes(measurement: Measurement, pairs: Sequence[Judged]) -> Iterator[str]:
    """Yield what a reader should know of a stage, besides its numbers."""
    several = len(pairs) > 1
    for one in pairs:
        pair = one.pair
        who = f"{LETTERS[pair.a]} and {LETTERS[pair.b]}: " if several else ""
        if pair.problem is not None:
            continue
        if pair.slices == "flat":
            yield f"{who}shape unknown: only the whole and single values are judged"
        elif len(set(pair.layout or ())) > 1 and pair.unsure is None and one.status == "agree":
            a, b = pair.layout or ("", "")
            yield f"{who}same numbers, stored as {a} and as {b}: layout, not arithmetic"
        if pair.slices == "last":
            yield f"{who}only the last token is compared"
        if pair.logits is not None:
            yield f"{who}{_next_token(pair.logits, letters_of(pair))}"
        if pair.unsure is not None:
            yield f"{who}{pair.unsure} ({' / '.join(pair.layout or ())})"
        yield from (f"{who}{note}" for note in one.notes)
        if pair.compared is not None and not one.notes:
            held = {kind for kind in pair.compared.masked if kind not in (None, "zero")}
            if held:
                yield f"{who}masked cells hold {' and '.join(sorted(held))}; they do not count"
            found = pair.compared.nonfinite
            if found.a and found.b and not found.differ:
                yield f"{who}{found.a} values are the same infinities in both, and left out"


def _next_token(logits: Logits, letters: tuple[str, str]) -> str:
    """Say which token comes next, and how sure that is."""
    if logits.tokens > 1:
        text = f"the same next token after {logits.same} of {logits.tokens}"
    elif logits.same:
        text = f"next token {logits.last[0]} in both"
    else:
        each = (f"{token} in {of}" for token, of in zip(logits.last, letters, strict=True))
        text = f"next token {', '.join(each)}"
    likeliest = f"{logits.overlap} of the {logits.top} likeliest in both"
    return f"{text}; {likeliest}; divergence {logits.divergence:.1e} nats"


def _with_recoveries(stages: Sequence[StageResult]) -> list[StageResult]:
    """Add a note to each stage that looks better than the one before just because it is larger.

    That can be said where something is added to the same blocks, as in qkv_bias to qkv_matmul: the
    difference itself did not shrink.
    """
    by_key = {(stage.layer, stage.stage): stage for stage in stages}
    found = []
    for stage in stages:
        row = BY_NAME.get(stage.stage)
        before = by_key.get((stage.layer, row.computed_from[0])) if row and row.blocks else None
        blocked = before is not None and BY_NAME[before.stage].blocks
        found.append(_recovered(before, stage) if before and blocked else stage)
    return found


def _recovered(before: StageResult, after: StageResult) -> StageResult:
    numbers = before.rel_l2, after.rel_l2, before.rms_diff, after.rms_diff
    if before.status != "differ" or None in numbers:
        return after
    was, now, rms_was, rms_now = (number or 0.0 for number in numbers)
    if not now < was or rms_now < SAME_RMS * rms_was:
        return after
    note = (
        f"looks better than {before.stage} ({now:.2g} after {was:.2g}) only because its values are "
        f"larger: the rms of the difference is {rms_now:.2g} after {rms_was:.2g}"
    )
    return msgspec.structs.replace(after, notes=[*after.notes, note])


def _verdict(
    measurement: Measurement, required: Sequence[StageResult], rules: Rules
) -> tuple[Verdict, str]:
    """Return the verdict, and why."""
    if measurement.incomparable is not None:
        return "incomparable", measurement.incomparable
    for stage, result in zip(
        (stage for stage in measurement.stages if stage.required), required, strict=True
    ):
        clash = next((pair for pair in stage.pairs if pair.incomparable), None)
        if clash is not None:
            return "incomparable", f"{_place(result)} has {clash.problem}"
    if any(stage.status == "differ" for stage in required):
        return "differ", ""
    if not required:
        return "incomplete", "no stage of attention is in all of them"
    open_ = [stage for stage in required if stage.status != "agree"]
    agreeing = [stage for stage in required if stage.status == "agree"]
    if open_ and not (rules.allow_missing and agreeing):
        why = "; ".join(
            f"{_names(of)} {said}"
            for said, of in (
                ("not measured", [s for s in open_ if s.status == "unmeasured"]),
                (
                    "too noisy to tell: ask `qwenref explain`",
                    [s for s in open_ if s.status == "blind"],
                ),
            )
            if of
        )
        return "incomplete", f"nothing differs, but {why}"
    return "agree", _precisions(agreeing, open_)


def _allowed(verdict: Verdict, required: Sequence[StageResult]) -> Iterator[str]:
    """Say what was not judged, if that was allowed."""
    open_ = [stage for stage in required if stage.status != "agree"]
    if verdict == "agree" and open_:
        yield f"not judged, as allowed: {', '.join(map(_place, open_))}"


def _precisions(stages: Sequence[StageResult], open_: Sequence[StageResult]) -> str:
    """Say in how many stages dumps agree, and at which precision, and which were not judged."""
    lacking = f", without {_names(open_)}" if open_ else ""
    count = f": {len(stages)} stage{'s' * (len(stages) > 1)}"
    held = [(stage, _coarsest([stage])) for stage in stages if stage.precision is not None]
    if not held:
        return f"within the tolerance{count}{lacking}"
    steps = held[:1]
    for stage, precision in held:
        if precision != steps[-1][1]:
            steps.append((stage, precision))
    *earlier, (last, precision) = steps
    text = f"at {precision} precision"
    if earlier:
        before = [f"{precision} from {_place(stage)}" for stage, precision in earlier[1:]]
        before.append(f"{earlier[0][1]} before")
        text += f" from {_place(last)} on ({', '.join(before)})"
    return f"{text}{count}{_generic([stage for stage, _ in held])}{lacking}"


def _generic(stages: Sequence[StageResult]) -> str:
    """Say whether floors of other prompts stood for some stages' own."""
    of = [stage for stage in stages if stage.floor_origin == "generic"]
    which = f" of {_names(of)}" if len(of) < len(stages) else ""
    return f" (generic floor{which})" if of else ""


def _coarsest(stages: Sequence[StageResult]) -> str:
    """Return the coarsest precision that any two dumps are held to."""
    names = {pair.precision for stage in stages for pair in stage.pairs if pair.precision}
    return max(names, key=PRECISIONS.index)


def _first_words(measurement: Measurement, first: StageResult, rules: Rules) -> str:
    """Say where dumps differ first."""
    text = f"first at {_place(first)}" + (f", block {first.block}" if first.block else "")
    explanation = "" if rules.dtype == "auto" else _explained_by(measurement, rules)
    if explanation:
        return text + explanation
    if first.reason is not None:
        text += f": {first.reason}"
    elif first.worst is not None:
        text += f": {describe(first.worst)}"
    if len(measurement.paths) > 2:
        odd = first.odd_one_out
        agreeing = [pair for pair in first.pairs if pair.status == "agree"]
        if odd is not None:
            text += f"; {LETTERS[odd]} is the odd one out"
        elif not agreeing:
            text += "; no two agree"
    return text


def _explained_by(measurement: Measurement, rules: Rules) -> str:
    """Say which coarser precision would explain a difference, if one would."""
    auto = judge(measurement, rules._replace(dtype="auto"))
    if auto.verdict != "agree":
        return ""
    coarsest = _coarsest([stage for stage in auto.stages if stage.required])
    return f"; {coarsest} would explain it, and `qwenref explain` can prove it"


def _names(stages: Sequence[StageResult]) -> str:
    more = f" and {len(stages) - 3} more" if len(stages) > 3 else ""
    return ", ".join(map(_place, stages[:3])) + more


def _place(stage: StageResult) -> str:
    """Return a stage with its layer, if that is not layer 0."""
    return f"layer {stage.layer} {stage.stage}" if stage.layer else stage.stage
