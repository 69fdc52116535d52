"""`qwenref explain` for Python: ask one engine's dumps which stage is wrong."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import SupportsIndex

import msgspec
import numpy as np

from qwenref.dumps.naming import names_from
from qwenref.dumps.reading import Dump, Source, read_dump
from qwenref.errors import QwenrefError
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.weights import (
    AttentionWeights,
    check_tensors,
    embedding_table,
    present_attention_tensors,
    read_attention,
    read_embedding,
)
from qwenref.oracle import computing, whole_numbers
from qwenref.stages import RESIDUAL
from qwenref.trial.blame import How, Trial
from qwenref.trial.case import (
    Case,
    case_of,
    leaving_of,
    length_of,
    misfits_of,
    of_layer,
    ways_of,
)
from qwenref.trial.checks import checks
from qwenref.trial.explanation import Cause, Explanation
from qwenref.trial.findings import WRONG, explained_stages, weight_noise_of
from qwenref.trial.held import Held
from qwenref.trial.recovery import in_words, recovered_tokens, without_weight
from qwenref.trial.replay import Replay
from qwenref.trial.tensors import Tensors
from qwenref.trial.words import summary_of, verdict_of


def explain(
    source: Source,
    *,
    model: str | Path | None = None,
    prompt: str | None = None,
    tokens: Iterable[SupportsIndex] | None = None,
    reference: Source | None = None,
    layer: int = 0,
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
        layer: Which layer.
        names: As in `qwenref.diff`.
        exact_weights: Whether rounded weights are a fault.
        quick: Whether mistakes are not sought below the noise.
        device: As in `qwenref.run`.
        progress: Called with the name of each step before it begins.

    Raises:
        QwenrefError: Something cannot be read or used; one line says what.
    """
    translate = names_from(names)
    given = None if tokens is None else whole_numbers(tokens)
    checkpoint = None if model is None else Checkpoint(Path(model))
    if prompt is not None and given is not None:
        raise QwenrefError("a prompt and tokens were both given; use one of them")
    cases = [
        case_of(read_dump(each, translate), layer, checkpoint, prompt, given)
        for each in (source, *(() if reference is None else (reference,)))
    ]
    with computing("float64", device), np.errstate(over="ignore", invalid="ignore"):
        weights = None
        if checkpoint is not None:
            tensors = [*present_attention_tensors(checkpoint, layer).values()]
            table = [embedding_table(checkpoint.config)] if layer == 0 else []
            check_tensors(checkpoint, tensors + table)
            weights, _ = read_attention(checkpoint, layer)
        how = How(exact_weights, quick, progress)
        found = [_explained(case, weights, how) for case in cases]
    return found[0] if len(found) == 1 else _tried(*found)


def _explained(case: Case, weights: AttentionWeights | None, how: How) -> Explanation:
    sizes = {letter: case.config.sizes[letter] for letter in "NKHDIV"}
    own = of_layer(case.dump, case.layer)
    if not own.stages:
        raise QwenrefError(f"{case.dump.name} holds no stage of attention of layer {case.layer}")
    T = length_of(case, own, sizes)
    tokens = case.tokens
    answer = Explanation(
        schema="qwenref-explain-v1",
        verdict="incomparable",
        reason="",
        path=case.dump.name,
        model=None if case.checkpoint is None else case.checkpoint.name,
        layer=case.layer,
        tokens=tokens,
        tokens_from=case.tokens_from,
        tokens_recovered=None,
        origins=[],
        weight_noise=None,
        stages=[],
        checks=[],
        summary=[],
    )
    if tokens is not None and len(tokens) != T:
        return _of_other_length(case, answer, own, sizes, T, weights)
    case.config.refuse_window(case.layer, T)
    entering = None
    if case.layer == 0 and case.checkpoint is not None and tokens is not None:
        entering, _ = read_embedding(case.checkpoint, tokens)
    replay = Replay(case.config, weights, T, entering)
    ways = ways_of(own, case.layer, replay.sizes)
    leaving = leaving_of(case.dump, case.layer, replay.sizes)
    tensors = Tensors(case.config, weights, case.checkpoint, case.layer, tokens or ())
    trial = Trial(replay, ways, leaving, tensors, how)
    misfits = misfits_of(own, case.layer, replay)
    found = checks(replay.held, replay.sizes)
    answer = msgspec.structs.replace(
        answer,
        stages=explained_stages(trial, misfits, found),
        checks=found,
        weight_noise=weight_noise_of(trial),
        tokens_recovered=_recovered(case, weights, trial),
    )
    return _concluded(_with_tokens_named(answer))


def _with_tokens_named(answer: Explanation) -> Explanation:
    """Name other tokens as the cause of the first stage that is wrong."""
    if answer.tokens_recovered is None:
        return answer
    words = in_words(answer.tokens_recovered, answer.tokens or [])
    cause = Cause("tokens", f"other tokens: {words}", None)
    first = next(at for at, of in enumerate(answer.stages) if of.status in WRONG)
    named = msgspec.structs.replace(answer.stages[first], cause=cause, nearest=None)
    stages = [*answer.stages[:first], named, *answer.stages[first + 1 :]]
    return msgspec.structs.replace(answer, stages=stages)


def _concluded(answer: Explanation) -> Explanation:
    """Fill in verdict, reason and summary."""
    origins = [of.stage for of in answer.stages if of.status in WRONG or of.hidden is not None]
    answer = msgspec.structs.replace(answer, origins=origins)
    verdict, reason = verdict_of(answer)
    answer = msgspec.structs.replace(answer, verdict=verdict, reason=reason)
    return msgspec.structs.replace(answer, summary=summary_of(answer))


def _of_other_length(
    case: Case,
    answer: Explanation,
    own: Dump,
    sizes: Mapping[str, int],
    T: int,
    weights: AttentionWeights | None,
) -> Explanation:
    """Say that a dump has another number of tokens, and which they are, if that can be seen."""
    expected = case.tokens or []
    reason = f"the dump has {T} tokens, and the prompt {len(expected)}"
    ways = ways_of(own, case.layer, {**case.config.sizes, "T": T, "S": T})
    held = {name: of[0] for name, of in ways.items() if of[0].first == 0}
    recovered = _recovered_from(case, weights, held, T, expected)
    if recovered is not None:
        reason += f": {in_words(recovered, expected)}"
    return msgspec.structs.replace(
        answer, reason=reason, tokens_recovered=recovered, summary=[reason]
    )


def _recovered(case: Case, weights: AttentionWeights | None, trial: Trial) -> list[int] | None:
    """Return the tokens that the engine ran, if they are not those of the prompt."""
    begins = (trial.standings[name] for name in (RESIDUAL, "attn_norm"))
    first = next((of for of in begins if of.account is not None), None)
    if first is None or case.tokens is None or first.status not in WRONG:
        return None
    found = _recovered_from(case, weights, trial.replay.held, len(case.tokens), case.tokens)
    return None if found == case.tokens else found


def _recovered_from(
    case: Case,
    weights: AttentionWeights | None,
    held: Mapping[str, Held],
    T: int,
    expected: Sequence[int],
) -> list[int] | None:
    if case.checkpoint is None or weights is None or case.layer != 0:
        return None
    for name in (RESIDUAL, "attn_norm"):
        if name in held and held[name].first == 0:
            rows = held[name].rows(0, T)
            if name == "attn_norm":
                rows = without_weight(rows, np.asarray(weights.norm))
            found = recovered_tokens(case.checkpoint, rows, expected)
            if found is not None:
                return found
    return None


def _tried(dump: Explanation, reference: Explanation) -> Explanation:
    """Say which of two is wrong."""
    faults = dump.verdict == "fault", reference.verdict == "fault"
    who = {(True, True): "both", (True, False): "dump", (False, True): "reference"}
    convicted = who.get(faults)
    return msgspec.structs.replace(dump, reference=reference, convicted=convicted)
