"""What was found layer by layer: the verdict on all of them, and the report in words."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, takewhile

import msgspec

from qwenref.errors import printable
from qwenref.stages import HEAD, LAYER, LEAVING
from qwenref.trial.case import Case, Place
from qwenref.trial.explanation import Explanation, LayersExplanation, Origin, Status, Verdict
from qwenref.trial.inquiry import concluded
from qwenref.trial.words import (
    CONVICTED,
    bits_of,
    causes_of,
    computes,
    last_lines,
    listed,
    of_tokens,
    table,
)

SIGNS: Mapping[Status, str] = {
    "agree": ".",
    "inherited": "i",
    "added": "A",
    "dumped_wrong": "F",
    "unmeasured": "-",
    "blind": "?",
}

SHOWN = 2
"""Parts that are at fault and shown stage by stage; `--layers N` shows another one."""

TICK = 5
"""Layers from one number to the next."""


def with_wrong_file(answer: Explanation) -> Explanation:
    """Say of a layer that only the file of the stream that leaves it is wrong."""
    stages = [
        msgspec.structs.replace(of, status="dumped_wrong") if of.stage == LEAVING.name else of
        for of in answer.stages
    ]
    return concluded(msgspec.structs.replace(answer, stages=stages))


def with_bridged_stream(answer: Explanation) -> Explanation:
    """Leave out that the stream that leaves a layer was not dumped: what follows is right."""
    last = answer.stages[-1] if answer.stages else None
    if last is None or (last.stage, last.status) != (LEAVING.name, "unmeasured") or last.reason:
        return answer
    return concluded(msgspec.structs.replace(answer, stages=answer.stages[:-1]))


def concluded_layers(
    case: Case, layers: Sequence[int] | None, parts: list[Explanation]
) -> LayersExplanation:
    """Return the answer for all parts; if `layers` is None, the whole model was asked for."""
    origins = [Origin(part.layer, stage) for part in parts for stage in part.origins]
    missing = _missing(case.config.num_hidden_layers, parts) if layers is None else []
    verdict, reason = _verdict(parts, missing)
    answer = LayersExplanation(
        schema="qwenref-explain-layers-v1",
        verdict=verdict,
        reason=reason,
        path=case.dump.name,
        model=None if case.checkpoint is None else case.checkpoint.name,
        tokens=case.tokens,
        tokens_from=case.tokens_from,
        origins=origins,
        parts=parts,
        summary=[],
    )
    return msgspec.structs.replace(answer, summary=[reason, *_summary(answer)])


def _missing(depth: int, parts: Sequence[Explanation]) -> list[Place]:
    """Return the layers of which nothing was dumped, and None if nothing is of the head."""
    found = [part.layer for part in parts]
    return [place for place in (*range(depth), None) if place not in found]


def _verdict(parts: Sequence[Explanation], missing: Sequence[Place]) -> tuple[Verdict, str]:
    faulty = [part for part in parts if part.verdict == "fault"]
    if faulty:
        first = faulty[0]
        before = [
            of.layer for of in takewhile(lambda of: of is not first, parts) if of.verdict == "agree"
        ]
        agree = f"{_named(before)} agree{'s' * (len(before) == 1)}; " if before else ""
        return "fault", f"{agree}{_named([first.layer])}: {first.reason}"
    for part in parts:
        if part.verdict == "incomparable":
            return "incomparable", f"{_named([part.layer])}: {part.reason}"
    open_ = [part for part in parts if part.verdict == "incomplete"]
    if open_ or missing:
        said = [f"{_named(places)}: {reason}" for reason, places in _reasons(open_)]
        said += [f"nothing was dumped of {_named(missing)}"] if missing else []
        return "incomplete", "; ".join(said)
    right = [part.layer for part in parts]
    noise = ", but for rounded weights" if any(part.weight_noise for part in parts) else ""
    agree = "agree" if len(right) > 1 else "agrees"
    words = f"{_named(right)} {agree}: every stage follows from what it was computed from"
    return "agree", words + noise


def _together(said: Iterable[tuple[str, Place]]) -> Iterator[tuple[str, list[Place]]]:
    """Yield what is said, if it is anything, and of which parts, once each."""
    found: dict[str, list[Place]] = {}
    for text, place in said:
        found.setdefault(text, []).append(place)
    found.pop("", None)
    yield from found.items()


def _reasons(parts: Iterable[Explanation]) -> Iterator[tuple[str, list[Place]]]:
    return _together((part.reason, part.layer) for part in parts)


def _summary(answer: LayersExplanation) -> Iterator[str]:
    """Yield the causes, what else is wrong, and how the engine computes."""
    faulty = [part for part in answer.parts if part.verdict == "fault"]
    for reason, places in _reasons(faulty[1:]):
        yield f"{_capital(_named(places))}: {reason}"
    causes = [(line, part.layer) for part in faulty for line in causes_of(part)]
    for line, places in _together(causes):
        yield line if len(faulty) == 1 else f"{_capital(_named(places))}: {line}"
    how = [("; ".join(computes(part.stages)), part.layer) for part in answer.parts]
    for text, places in _together(how):
        yield f"Your engine computes in {_named(places)}: {text}."
    rounded = [(bits_of(part), part.layer) for part in answer.parts if part.weight_noise]
    for text, places in _together(rounded):
        yield f"Its weights seem to be rounded in {_named(places)} {text}."


def _named(places: Sequence[Place]) -> str:
    """Return ``layers 0 to 12, 14 and the head``."""
    numbers = [place for place in places if place is not None]
    runs = [[*run] for _, run in groupby(numbers, key=lambda n: n - numbers.index(n))]
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    said = [f"layer{'s' * (len(numbers) > 1)} {listed(texts)}"] if numbers else []
    return " and ".join([*said, *(["the head"] if None in places else [])])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def layers_report(answer: LayersExplanation) -> str:
    """Return the whole report; its last lines are the summary."""
    title = f"{answer.path}, layer by layer, against {answer.model or 'no model'}"
    lines = [title, *of_tokens(answer), ""]
    if any(part.stages for part in answer.parts):
        lines += [*_map(answer.parts), ""]
    for part in [part for part in answer.parts if part.verdict == "fault"][:SHOWN]:
        lines += [_named([part.layer]), *table(part), ""]
    lines += last_lines(answer)
    if answer.reference is not None:
        lines += ["", *layers_report(answer.reference).splitlines(), ""]
        lines.append(CONVICTED[answer.convicted])
    return "\n".join(printable(line) for line in lines)


def _map(parts: Sequence[Explanation]) -> Iterator[str]:
    """Yield a line for each stage, with a sign for each layer."""
    signs = {(of.stage, part.layer): SIGNS[of.status] for part in parts for of in part.stages}
    layers = [part.layer for part in parts if part.layer is not None]
    names = [name for name in ("embedding", *(s.name for s in LAYER)) if _has(signs, name, layers)]
    width = max(len(name) for name, _ in signs)
    if layers:
        yield f"{'layer':<{width}}  {''.join(f'{of:<{TICK}}' for of in layers[::TICK])}".rstrip()
    for name in names:
        row = "".join(signs.get((name, layer), " ") for layer in layers)
        yield f"{name:<{width}}  {row}".rstrip()
    for stage in HEAD:
        if (stage.name, None) in signs:
            yield f"{stage.name:<{width}}  {signs[stage.name, None]}"
    yield "  . agrees   i inherits   A adds an error   F the file is wrong   - unmeasured   ? blind"


def _has(signs: Mapping[tuple[str, Place], str], name: str, layers: Sequence[int]) -> bool:
    return any((name, layer) in signs for layer in layers)
