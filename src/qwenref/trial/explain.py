"""`qwenref explain` for Python: ask one engine's dumps which stage is wrong."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import SupportsIndex, TypeVar

import msgspec
import numpy as np

from qwenref.dumps.naming import names_from
from qwenref.dumps.reading import Source, read_dump
from qwenref.errors import QwenrefError
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.weights import check_tensors
from qwenref.oracle import computing, whole_numbers
from qwenref.stages import HEAD, LAYER, RESIDUAL
from qwenref.trial.blame import How
from qwenref.trial.case import Case, Place, called, case_of
from qwenref.trial.explanation import Explanation, LayersExplanation
from qwenref.trial.inquiry import NOTHING_KNOWN, explained, tensors_of
from qwenref.trial.layer_words import concluded_layers, with_bridged_stream, with_wrong_file

_Answer = TypeVar("_Answer", Explanation, LayersExplanation)


def explain(
    source: Source,
    *,
    model: str | Path | None = None,
    prompt: str | None = None,
    tokens: Iterable[SupportsIndex] | None = None,
    reference: Source | None = None,
    layer: int | None = 0,
    names: str | Path | None = None,
    exact_weights: bool = False,
    quick: bool = False,
    device: str = "auto",
    progress: Callable[[str], object] = lambda _: None,
) -> Explanation:
    """Find out which stage of an engine is wrong, and in which precision it computes.

    Args:
        source: A dump directory, arrays by stage name, or what `qwenref.run` returns.
        model: The checkpoint that the engine ran. Without it only what needs no weights is judged,
            and that takes a manifest.
        prompt: The text that it ran; `tokens` instead, or what the manifest says, or
            `DEFAULT_PROMPT`.
        tokens: The token ids.
        reference: Another dump, of the reference: if that is the one that is wrong, it is said so.
        layer: Which layer; None for the final norm and lm_head.
        names: As in `qwenref.diff`.
        exact_weights: Whether rounded weights are a fault.
        quick: Whether mistakes are not sought below the noise.
        device: As in `qwenref.run`.
        progress: Called with the name of each step before it begins.

    Raises:
        QwenrefError: Something cannot be read or used; one line says what.
    """
    cases = _cases([layer], model, prompt, tokens, names, source, reference)
    how = How(exact_weights, quick, progress)
    with computing("float64", device), np.errstate(over="ignore", invalid="ignore"):
        dump, *others = [_of_one_layer(case, layer, how) for case in cases]
    return _tried(dump, *others) if others else dump


def explain_layers(
    source: Source,
    *,
    model: str | Path | None = None,
    prompt: str | None = None,
    tokens: Iterable[SupportsIndex] | None = None,
    reference: Source | None = None,
    layers: Sequence[int] | None = None,
    names: str | Path | None = None,
    exact_weights: bool = False,
    quick: bool = False,
    device: str = "auto",
    progress: Callable[[str], object] = lambda _: None,
) -> LayersExplanation:
    """Find out which stages of an engine are wrong, layer by layer.

    Every stage is held to what the engine dumped before it, so that errors do not add up with
    depth. One layer's weights are in memory at a time.

    Args:
        source: As of `explain`, and so are all that are not named here.
        model: The checkpoint.
        prompt: The text.
        tokens: The token ids.
        reference: Another dump.
        layers: Which layers; None for all that were dumped, and the final norm and lm_head.
        names: Another engine's names.
        exact_weights: Whether rounded weights are a fault.
        quick: Whether mistakes are not sought below the noise.
        device: What to compute on.
        progress: Called with the name of each step before it begins.

    Raises:
        QwenrefError: Something cannot be read or used; one line says what.
    """
    cases = _cases(layers, model, prompt, tokens, names, source, reference)
    how = How(exact_weights, quick, progress)
    with computing("float64", device), np.errstate(over="ignore", invalid="ignore"):
        dump, *others = [_layer_by_layer(case, layers, how) for case in cases]
    return _tried(dump, *others) if others else dump


def _cases(
    places: Sequence[Place] | None,
    model: str | Path | None,
    prompt: str | None,
    tokens: Iterable[SupportsIndex] | None,
    names: str | Path | None,
    *sources: Source | None,
) -> list[Case]:
    """Read the dumps, and what they are to be compared with."""
    translate = names_from(names)
    given = None if tokens is None else whole_numbers(tokens)
    checkpoint = None if model is None else Checkpoint(Path(model))
    if prompt is not None and given is not None:
        raise QwenrefError("a prompt and tokens were both given; use one of them")
    return [
        case_of(read_dump(each, translate), places, checkpoint, prompt, given)
        for each in sources
        if each is not None
    ]


def _check_tensors(case: Case, places: Iterable[Place]) -> None:
    if case.checkpoint is not None:
        check_tensors(case.checkpoint, [of for place in places for of in tensors_of(case, place)])


def _of_one_layer(case: Case, layer: Place, how: How) -> Explanation:
    _check_tensors(case, [layer])
    return explained(case, layer, how).answer


def _layer_by_layer(case: Case, layers: Sequence[int] | None, how: How) -> LayersExplanation:
    """Explain layer after layer: what one leaves, enters the next one."""
    places = _places(case, layers)
    _check_tensors(case, places)
    parts: list[Explanation] = []
    entered, before = NOTHING_KNOWN, None
    for place in places:
        if case.key(place, RESIDUAL)[0] != before:
            entered = NOTHING_KNOWN
        found = explained(case, place, _in_part(how, called(place)), entered)
        if found.entered == "unused":
            parts[-1] = with_wrong_file(parts[-1])
        elif found.entered == "bridged":
            parts[-1] = with_bridged_stream(parts[-1])
        parts.append(found.answer)
        if found.answer.verdict == "incomparable":
            break
        entered, before = found.leaves, place
    return concluded_layers(case, layers, parts)


def _in_part(how: How, name: str) -> How:
    return how._replace(progress=lambda step: how.progress(f"{name}: {step}"))


def _places(case: Case, layers: Sequence[int] | None) -> list[Place]:
    """Return which parts of the model are to be explained: those of which a stage was dumped."""
    if layers is not None:
        if not layers:
            raise QwenrefError("no layer was asked for: name one, or leave that out for all")
        return [*layers]
    names = {stage.name for stage in (*LAYER, *HEAD)}
    dumped = {place for place, name in case.dump.stages if name in names}
    if not dumped:
        raise QwenrefError(f"{case.dump.name} holds no stage of any layer")
    of_layers = sorted(place for place in dumped if place is not None)
    return [*of_layers, *([None] if None in dumped else [])]


def _tried(dump: _Answer, reference: _Answer) -> _Answer:
    """Say which of two is wrong."""
    faults = dump.verdict == "fault", reference.verdict == "fault"
    who = {(True, True): "both", (True, False): "dump", (False, True): "reference"}
    convicted = who.get(faults)
    return msgspec.structs.replace(dump, reference=reference, convicted=convicted)
