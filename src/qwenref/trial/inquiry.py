"""One part of a model explained: a layer, or what follows the last one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from qwenref.errors import QwenrefError
from qwenref.model.formats import in_format
from qwenref.model.weights import (
    AttentionWeights,
    FeedForwardWeights,
    Tensor,
    embedding_table,
    feed_forward_tensors,
    final_norm,
    head_matrix,
    present_attention_tensors,
    read_attention,
    read_embedding,
    read_feed_forward,
    read_final_norm,
)
from qwenref.stages import BETWEEN, LEAVING, RESIDUAL
from qwenref.trial.blame import How, Trial
from qwenref.trial.case import Case, Place, called, length_of, misfits_of, ways_of
from qwenref.trial.checks import checks
from qwenref.trial.dialects import NARROW
from qwenref.trial.explanation import Cause, Explanation
from qwenref.trial.findings import WRONG, explained_stages, weight_noise_of
from qwenref.trial.held import Held
from qwenref.trial.part import HeadPart, LayerPart, Part
from qwenref.trial.precision import all_fit
from qwenref.trial.recovery import in_words, recovered_tokens, without_weight
from qwenref.trial.replay import Replay
from qwenref.trial.tensors import Tensors
from qwenref.trial.words import CARRIED, summary_of, verdict_of


class Entered(NamedTuple):
    """What is known of the stream that enters a part, besides its dump.

    Attributes:
        stream: As it should be, [T, D], if the dump lacks it or has it wrong.
        tainted: Whether an error was made before.
    """

    stream: np.ndarray | None = None
    tainted: bool = False


NOTHING_KNOWN = Entered()


class Found(NamedTuple):
    """What was found.

    Attributes:
        answer: Of this part.
        leaves: What it leaves to the next one.
        entered: What the engine went on with, if that is the stream as it should be: "unused" if it
            was dumped otherwise, "bridged" if it was not dumped.
    """

    answer: Explanation
    leaves: Entered
    entered: Literal["unused", "bridged"] | None


def tensors_of(case: Case, place: Place) -> Iterator[Tensor]:
    """Yield the tensors that explaining a part takes."""
    if case.checkpoint is None:
        return
    config = case.config
    if place is None:
        yield final_norm(config)
        if (None, "lm_head") in case.dump.stages:
            yield head_matrix(config)
        return
    yield from present_attention_tensors(case.checkpoint, place).values()
    if place == 0:
        yield embedding_table(config)
    if case.reaches(place, BETWEEN.name):
        yield from feed_forward_tensors(config, place).values()


def explained(case: Case, place: Place, how: How, entered: Entered = NOTHING_KNOWN) -> Found:
    """Explain a part, within `computing("float64", ...)`.

    Args:
        case: The dump, and what it is compared with.
        place: Which part.
        how: What is asked for.
        entered: What the part before leaves.
    """
    own = case.of(place)
    if not own.stages:
        raise QwenrefError(f"{case.dump.name} holds no stage of {called(place)}")
    T, tokens = length_of(case, own), case.tokens
    answer = Explanation(
        schema="qwenref-explain-v1",
        verdict="incomparable",
        reason="",
        path=case.dump.name,
        model=None if case.checkpoint is None else case.checkpoint.name,
        layer=place,
        tokens=tokens,
        tokens_from=case.tokens_from,
        tokens_recovered=None,
        origins=[],
        weight_noise=None,
        stages=[],
        checks=[],
        summary=[],
    )
    part, weights = part_of(case, place)
    if tokens is not None and len(tokens) != T:
        held = {name: of[0] for name, of in _ways(case, place, part, T).items()}
        return Found(_of_other_length(case, answer, weights, held, T), entered, None)
    if place is not None:
        case.config.refuse_window(place, T)
    stream = entered.stream
    if place == 0 and case.checkpoint is not None and tokens is not None:
        stream, _ = read_embedding(case.checkpoint, tokens)
    replay = Replay(part, T, stream)
    number = case.config.num_hidden_layers if place is None else place
    tensors = Tensors(case.config, weights, case.checkpoint, number, tokens or ())
    stages = case.judged(place, part.chain)
    trial = Trial(replay, stages, _ways(case, place, part, T), tensors, how)
    found = checks(replay.held, replay.sizes)
    misfits = misfits_of(case, place, replay)
    answer = msgspec.structs.replace(
        answer,
        stages=explained_stages(trial, misfits, found, tainted=entered.tainted),
        checks=found,
        weight_noise=weight_noise_of(trial),
        tokens_recovered=_recovered(case, weights, trial) if place == 0 else None,
    )
    answer = concluded(_with_tokens_named(answer))
    return Found(answer, _left_by(trial, answer, entered), _entered(trial, answer))


def part_of(case: Case, place: Place, *, whole: bool = False) -> tuple[Part, dict[str, Any]]:
    """Return a part with the weights that its dumped stages take, or all, and those by name."""
    checkpoint, config = case.checkpoint, case.config
    if place is None:
        norm = None if checkpoint is None else read_final_norm(checkpoint)[0]
        wants_logits = whole or (None, "lm_head") in case.dump.stages
        return HeadPart(config, norm, checkpoint if wants_logits else None), {"final_norm": norm}
    attention: AttentionWeights | None = None
    feed_forward: FeedForwardWeights | None = None
    weights: dict[str, Any] = {}
    if checkpoint is not None:
        attention, _ = read_attention(checkpoint, place)
        weights |= attention._asdict()
    if checkpoint is not None and (whole or case.reaches(place, BETWEEN.name)):
        feed_forward, _ = read_feed_forward(checkpoint, place)
        of_mlp = feed_forward._asdict()
        weights |= {"ffn_norm": of_mlp.pop("norm"), **of_mlp}
    return LayerPart(config, place, attention, feed_forward), weights


def _ways(case: Case, place: Place, part: Part, T: int) -> dict[str, list[Held]]:
    return ways_of(case, place, part.chain, case.config.sizes | {"T": T, "S": T})


def _entered(trial: Trial, answer: Explanation) -> Literal["unused", "bridged"] | None:
    if trial.standings[RESIDUAL].status == "dumped_wrong" and answer.layer != 0:
        return "unused"
    bridging = [of for of in answer.stages if RESIDUAL in of.bridged]
    return "bridged" if any(of.status in CARRIED for of in bridging) else None


def _left_by(trial: Trial, answer: Explanation, entered: Entered) -> Entered:
    """Return what is known of the stream that leaves a layer, besides its dump."""
    replay, name = trial.replay, LEAVING.name
    statuses = {of.stage: of.status for of in answer.stages}
    bad = "added", "inherited"
    if name not in replay.held:
        tainted = entered.tainted or any(status in bad for status in statuses.values())
        direct = replay.can(name) and not replay.bridges(name)
        return Entered(_recomputed(replay) if direct else None, tainted)
    if statuses[name] in WRONG and replay.can(name, first=0):
        return Entered(_recomputed(replay), tainted=True)
    return Entered(None, statuses[name] in bad)


def _recomputed(replay: Replay) -> np.ndarray:
    """Return the stream that leaves a layer, as an engine of the dump's format has it."""
    parts = [replay.compute(LEAVING.name, span)[span.first - span.start :] for span in replay.spans]
    read = replay.reads(LEAVING.name)
    narrow = next((of for of in NARROW if all(all_fit(replay, each, of) for each in read)), "exact")
    return in_format(np.concatenate(parts), narrow)


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


def concluded(answer: Explanation) -> Explanation:
    """Fill in origins, verdict, reason and summary."""
    origins = [of.stage for of in answer.stages if of.status in WRONG or of.hidden is not None]
    answer = msgspec.structs.replace(answer, origins=origins)
    verdict, reason = verdict_of(answer)
    answer = msgspec.structs.replace(answer, verdict=verdict, reason=reason)
    return msgspec.structs.replace(answer, summary=summary_of(answer))


def _of_other_length(
    case: Case,
    answer: Explanation,
    weights: Mapping[str, Any],
    held: Mapping[str, Held],
    T: int,
) -> Explanation:
    """Say that a dump has another number of tokens, and which they are, if that can be seen."""
    expected = case.tokens or []
    reason = f"the dump has {T} tokens, and the prompt {len(expected)}"
    recovered = None
    if answer.layer == 0:
        recovered = _recovered_from(case, weights, held, T, expected)
    if recovered is not None:
        reason += f": {in_words(recovered, expected)}"
    return msgspec.structs.replace(
        answer, reason=reason, tokens_recovered=recovered, summary=[reason]
    )


def _recovered(case: Case, weights: Mapping[str, Any], trial: Trial) -> list[int] | None:
    """Return the tokens that the engine ran, if they are not those of the prompt."""
    begins = (trial.standings[name] for name in (RESIDUAL, "attn_norm"))
    first = next((of for of in begins if of.account is not None), None)
    if first is None or case.tokens is None or first.status not in WRONG:
        return None
    found = _recovered_from(case, weights, trial.replay.held, len(case.tokens), case.tokens)
    return None if found == case.tokens else found


def _recovered_from(
    case: Case,
    weights: Mapping[str, Any],
    held: Mapping[str, Held],
    T: int,
    expected: Sequence[int],
) -> list[int] | None:
    if case.checkpoint is None:
        return None
    for name in (RESIDUAL, "attn_norm"):
        if name in held and held[name].first == 0:
            rows = held[name].rows(0, T)
            if name == "attn_norm":
                rows = without_weight(rows, np.asarray(weights["norm"]))
            found = recovered_tokens(case.checkpoint, rows, expected)
            if found is not None:
                return found
    return None
