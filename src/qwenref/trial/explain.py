"""`qwenref explain` for Python: ask one engine's dumps which stage is wrong."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex

import msgspec
import numpy as np

from qwenref.dumps.naming import names_from
from qwenref.dumps.reading import Dump, Source, read_dump
from qwenref.errors import QwenrefError
from qwenref.judge.alignment import side_of
from qwenref.judge.scope import fits, tokens_in
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.tokens import DEFAULT_PROMPT, check_tokens, encode
from qwenref.model.weights import AttentionWeights, check_tensors, read_attention, read_embedding
from qwenref.oracle import computing, whole_numbers
from qwenref.stages import ATTENTION, EMBEDDING, RESIDUAL
from qwenref.trial.blame import Trial
from qwenref.trial.checks import checks
from qwenref.trial.explanation import Explanation
from qwenref.trial.findings import WRONG, explained_stages, weight_noise_of
from qwenref.trial.held import Held
from qwenref.trial.laying_out import readings
from qwenref.trial.recovery import in_words, recovered_tokens, without_weight
from qwenref.trial.replay import CHAIN, Replay
from qwenref.trial.residual import row_of
from qwenref.trial.words import summary_of, verdict_of

ENTERING = "post_ffn_residual"
"""What apr calls the stream that leaves a layer, and enters the next one."""


LEAVING = "post_attn_residual"
"""What apr calls the stream once attn_out is added."""


class _Case(NamedTuple):
    """A dump, and what it is to be compared with.

    Attributes:
        dump: As it was read.
        layer: Which layer.
        checkpoint: None without a model.
        config: Of the checkpoint, or of the manifest.
        tokens: The prompt's.
        tokens_from: Where those are from.
    """

    dump: Dump
    layer: int
    checkpoint: Checkpoint | None
    config: Config
    tokens: list[int] | None
    tokens_from: Literal["manifest", "given", "default"] | None


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
    device: str = "auto",
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
        device: As in `qwenref.run`.

    Raises:
        QwenrefError: Something cannot be read or used; one line says what.
    """
    translate = names_from(names)
    given = None if tokens is None else whole_numbers(tokens)
    checkpoint = None if model is None else Checkpoint(Path(model))
    if prompt is not None and given is not None:
        raise QwenrefError("a prompt and tokens were both given; use one of them")
    cases = [
        _case(read_dump(each, translate), layer, checkpoint, prompt, given)
        for each in (source, *(() if reference is None else (reference,)))
    ]
    with computing("float64", device), np.errstate(over="ignore", invalid="ignore"):
        weights = None
        if checkpoint is not None:
            check_tensors(checkpoint, layer, embedding=layer == 0)
            weights, _ = read_attention(checkpoint, layer)
        found = [_explained(case, weights, exact_weights=exact_weights) for case in cases]
    return found[0] if len(found) == 1 else _tried(*found)


def _case(
    dump: Dump,
    layer: int,
    checkpoint: Checkpoint | None,
    prompt: str | None,
    tokens: list[int] | None,
) -> _Case:
    """Find out what a dump is to be compared with."""
    manifest = dump.manifest
    if checkpoint is not None:
        config = checkpoint.config
        if manifest is not None and manifest.config.sizes.items() - config.sizes.items():
            raise QwenrefError(
                f"{dump.name} is of a model with {manifest.config.sizes}, and {checkpoint.name} "
                f"has { {letter: config.sizes[letter] for letter in 'NKHD'} }"
            )
    elif manifest is not None:
        config = _config_of(manifest.config, layer)
    else:
        raise QwenrefError(
            f"{dump.name} has no manifest: give the checkpoint that the engine ran with --model"
        )
    if layer >= config.num_hidden_layers:
        raise QwenrefError(
            f"layer {layer} does not exist: the checkpoint has {config.num_hidden_layers} layers, "
            "counted from 0"
        )
    origin: Literal["manifest", "given", "default"] | None = None
    if tokens is not None or prompt is not None:
        origin = "given"
    elif manifest is not None and manifest.tokens is not None:
        tokens, origin = manifest.tokens, "manifest"
    if tokens is None and checkpoint is not None and layer == 0:
        origin = origin or "default"
        tokens = encode(DEFAULT_PROMPT if prompt is None else prompt, checkpoint.directory)
    if tokens is not None:
        check_tokens(tokens, config.vocab_size)
    return _Case(dump, layer, checkpoint, config, tokens, origin)


def _config_of(used: Any, layer: int) -> Config:
    """Return the config that a manifest states."""
    fields = msgspec.structs.asdict(used)
    return Config(
        **fields, vocab_size=1 << 24, num_hidden_layers=layer + 1, windows=(None,) * (layer + 1)
    )


def _explained(
    case: _Case, weights: AttentionWeights | None, *, exact_weights: bool
) -> Explanation:
    sizes = {letter: case.config.sizes[letter] for letter in "NKHD"}
    own = _of_layer(case.dump, case.layer)
    if not own.stages:
        raise QwenrefError(f"{case.dump.name} holds no stage of attention of layer {case.layer}")
    T = _length(case, own, sizes)
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
    ways = _ways(own, case.layer, replay.sizes)
    leaving = _leaving(case.dump, case.layer, replay.sizes)
    trial = Trial(replay, ways, leaving, exact_weights=exact_weights)
    misfits = _misfits(own, case.layer, replay)
    found = checks(replay.held, replay.sizes)
    answer = msgspec.structs.replace(
        answer,
        stages=explained_stages(trial, misfits, found),
        checks=found,
        weight_noise=weight_noise_of(trial),
        tokens_recovered=_recovered(case, weights, trial),
    )
    return _concluded(answer)


def _concluded(answer: Explanation) -> Explanation:
    """Fill in verdict, reason and summary."""
    origins = [of.stage for of in answer.stages if of.status in WRONG]
    answer = msgspec.structs.replace(answer, origins=origins)
    verdict, reason = verdict_of(answer)
    answer = msgspec.structs.replace(answer, verdict=verdict, reason=reason)
    return msgspec.structs.replace(answer, summary=summary_of(answer))


def _of_layer(dump: Dump, layer: int) -> Dump:
    """Return what a dump has of one layer's attention, and of the stream that enters it."""
    wanted = {(layer, stage.name) for stage in ATTENTION}
    wanted.add((0, EMBEDDING.name) if layer == 0 else (layer - 1, ENTERING))
    stages = {key: parts for key, parts in dump.stages.items() if key in wanted}
    return dump._replace(stages=stages)


def _length(case: _Case, own: Dump, sizes: Mapping[str, int]) -> int:
    """Return how many tokens the dump is of: the prompt's, if files fit that as well as any."""
    files = [_with_embedding(own)]
    T = tokens_in(files, sizes)
    if case.tokens is not None:
        expected = fits(files, sizes, len(case.tokens))
        others = fits(files, sizes, T) if T else []
        if len(expected) >= max(1, len(others)) and (others or max(expected) > 1):
            return len(case.tokens)
    if T is None:
        raise QwenrefError(f"no file of {own.name} is of a size that {dict(sizes)} explain")
    return T


def _with_embedding(dump: Dump) -> Dump:
    """Return a dump whose entering stream is called an embedding, which it is laid out as."""
    stages = {
        (layer, EMBEDDING.name if name == ENTERING else name): parts
        for (layer, name), parts in dump.stages.items()
    }
    return dump._replace(stages=stages)


def _key(name: str, layer: int) -> tuple[int, str]:
    if name != RESIDUAL:
        return layer, name
    return (0, EMBEDDING.name) if layer == 0 else (layer - 1, ENTERING)


def _ways(own: Dump, layer: int, sizes: Mapping[str, int]) -> dict[str, list[Held]]:
    """Return how each dumped stage may be read."""
    found = {}
    for name in CHAIN:
        side = side_of(own, _key(name, layer)) if _key(name, layer) in own.stages else None
        if side is not None and not side.lacks:
            ways = readings(row_of(name), side, sizes)
            if ways:
                found[name] = ways
    return found


def _leaving(dump: Dump, layer: int, sizes: Mapping[str, int]) -> Held | None:
    """Return the stream that attn_out was added to, if that was dumped."""
    keys = [key for key in ((layer, LEAVING), (None, LEAVING)) if key in dump.stages]
    side = side_of(dump, keys[0]) if keys else None
    ways = [] if side is None else readings(EMBEDDING, side, sizes)
    return ways[0] if ways else None


def _misfits(own: Dump, layer: int, replay: Replay) -> dict[str, str]:
    """Say what is the matter with files that cannot be used."""
    found = {}
    for name in CHAIN:
        key = _key(name, layer)
        if key not in own.stages or name in replay.held:
            continue
        side, stage = side_of(own, key), row_of(name)
        needed = int(np.prod([replay.sizes[axis] for axis in stage.axes]))
        found[name] = (
            f"the dump lacks {', '.join(side.lacks)} of it"
            if side.lacks
            else f"{side.size} values, but {replay.sizes['T']} tokens make {needed}"
        )
    return found


def _of_other_length(
    case: _Case,
    answer: Explanation,
    own: Dump,
    sizes: Mapping[str, int],
    T: int,
    weights: AttentionWeights | None,
) -> Explanation:
    """Say that a dump has another number of tokens, and which they are, if that can be seen."""
    expected = case.tokens or []
    reason = f"the dump has {T} tokens, and the prompt {len(expected)}"
    ways = _ways(own, case.layer, {**case.config.sizes, "T": T, "S": T})
    held = {name: of[0] for name, of in ways.items() if of[0].first == 0}
    recovered = _recovered_from(case, weights, held, T, expected)
    if recovered is not None:
        reason += f": {in_words(recovered, expected)}"
    return msgspec.structs.replace(
        answer, reason=reason, tokens_recovered=recovered, summary=[reason]
    )


def _recovered(case: _Case, weights: AttentionWeights | None, trial: Trial) -> list[int] | None:
    """Return the tokens that the engine ran, if they are not those of the prompt."""
    begins = (trial.standings[name] for name in (RESIDUAL, "attn_norm"))
    first = next((of for of in begins if of.account is not None), None)
    if first is None or case.tokens is None or first.status not in WRONG:
        return None
    found = _recovered_from(case, weights, trial.replay.held, len(case.tokens), case.tokens)
    return None if found == case.tokens else found


def _recovered_from(
    case: _Case,
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
