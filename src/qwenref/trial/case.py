"""What a dump is to be compared with, and which of its files are what."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from qwenref.dumps.reading import Dump, Key
from qwenref.errors import QwenrefError
from qwenref.judge.alignment import side_of
from qwenref.judge.comparability import misplaced
from qwenref.judge.scope import fits, tokens_in
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.tokens import DEFAULT_PROMPT, check_tokens, encode
from qwenref.stages import (
    ATTENTION,
    BETWEEN,
    EMBEDDING,
    HEAD,
    LAST_LOGITS,
    LAYER,
    LEAVING,
    MLP,
    RESIDUAL,
)
from qwenref.trial.held import Held
from qwenref.trial.laying_out import readings
from qwenref.trial.replay import Replay
from qwenref.trial.residual import row_of

Place = int | None
"""A layer's number; None for what follows the last one."""

PAST_ATTENTION = {stage.name for stage in (BETWEEN, *MLP)}
"""Stages that show, in any layer, that a dump is of whole layers; `LEAVING` may just enter one."""


def called(place: Place) -> str:
    """Return what a part is called in a sentence."""
    return "the head" if place is None else f"layer {place}"


class Case(NamedTuple):
    """A dump, and what it is to be compared with.

    Attributes:
        dump: As it was read.
        checkpoint: None without a model.
        config: Of the checkpoint, or of the manifest.
        tokens: The prompt's.
        tokens_from: Where those are from.
    """

    dump: Dump
    checkpoint: Checkpoint | None
    config: Config
    tokens: list[int] | None
    tokens_from: Literal["manifest", "given", "default"] | None

    @property
    def sizes(self) -> dict[str, int]:
        """What shapes of stages depend on, but for the number of tokens."""
        return {letter: self.config.sizes[letter] for letter in "NKHDIV"}

    def key(self, place: Place, name: str) -> Key:
        """Return under which key a dump has a stage."""
        if name != RESIDUAL:
            return place, name
        if place == 0:
            return 0, EMBEDDING.name
        return (self.config.num_hidden_layers if place is None else place) - 1, LEAVING.name

    def of(self, place: Place) -> Dump:
        """Return what the dump has of a layer or of the head, and of the stream that enters it."""
        names = [stage.name for stage in (HEAD if place is None else LAYER)]
        wanted = {self.key(place, name) for name in (RESIDUAL, *names)}
        stages = {key: parts for key, parts in self.dump.stages.items() if key in wanted}
        return self.dump._replace(stages=stages)

    def reaches(self, place: Place, after: str) -> bool:
        """Return whether the dump has a stage of a part that comes after another one."""
        names = [stage.name for stage in (HEAD if place is None else LAYER)]
        later = names[names.index(after) + 1 :]
        return any((place, name) in self.dump.stages for name in later)

    def judged(self, place: Place, chain: Sequence[str]) -> list[str]:
        """Return the stages of a part's chain that are judged, whether they were dumped or not.

        All of the head, and of layers if the dump is of whole ones; else those of attention, and up
        to the last one of which there is a file.
        """
        whole = place is None or any(name in PAST_ATTENTION for _, name in self.dump.stages)
        dumped = {name for name in chain if self.key(place, name) in self.dump.stages}
        last = chain[-1:] if whole else [ATTENTION[-1].name]
        return [*chain[: 1 + max(chain.index(name) for name in (*last, *dumped))]]


def case_of(
    dump: Dump,
    places: Sequence[Place] | None,
    checkpoint: Checkpoint | None,
    prompt: str | None,
    tokens: list[int] | None,
) -> Case:
    """Find out what a dump is to be compared with; `places` as in `Case.of`, None for all."""
    stray = misplaced(dump, dump.name)
    if stray:
        raise QwenrefError(f"{stray}: correct the name or the header")
    manifest = dump.manifest
    dumped = [layer for layer, _ in dump.stages if layer is not None]
    layers = dumped if places is None else [place for place in places if place is not None]
    if checkpoint is not None:
        config = checkpoint.config
        if manifest is not None and manifest.config.sizes.items() - config.sizes.items():
            raise QwenrefError(
                f"{dump.name} is of a model with {manifest.config.sizes}, and {checkpoint.name} "
                f"has { {letter: config.sizes[letter] for letter in 'NKHD'} }"
            )
    elif manifest is not None:
        config = _config_of(manifest.config, max((*layers, *dumped), default=0))
    else:
        raise QwenrefError(
            f"{dump.name} has no manifest: give the checkpoint that the engine ran with --model"
        )
    beyond = [layer for layer in layers if not 0 <= layer < config.num_hidden_layers]
    if beyond:
        raise QwenrefError(
            f"layer {beyond[0]} does not exist: the checkpoint has {config.num_hidden_layers} "
            "layers, counted from 0"
        )
    origin: Literal["manifest", "given", "default"] | None = None
    if tokens is not None or prompt is not None:
        origin = "given"
    elif manifest is not None and manifest.tokens is not None:
        tokens, origin = manifest.tokens, "manifest"
    if tokens is None and checkpoint is not None and (0 in layers or prompt is not None):
        origin = origin or "default"
        tokens = encode(DEFAULT_PROMPT if prompt is None else prompt, checkpoint.directory)
    if tokens is not None:
        check_tokens(tokens, config.vocab_size)
    return Case(dump, checkpoint, config, tokens, origin)


def _config_of(used: Any, layer: int) -> Config:
    """Return the config that a manifest states."""
    fields = msgspec.structs.asdict(used)
    return Config(
        **fields,
        num_hidden_layers=layer + 1,
        tie_word_embeddings=False,
        windows=(None,) * (layer + 1),
    )


def length_of(case: Case, own: Dump) -> int:
    """Return how many tokens a dump is of: the prompt's, if files fit that as well as any.

    If none of a part fits anything, and other parts fit the prompt, that is told file by file.
    """
    T = tokens_in([own], case.sizes)
    if case.tokens is not None:
        expected = fits([own], case.sizes, len(case.tokens))
        others = fits([own], case.sizes, T) if T else []
        if len(expected) >= max(1, len(others)) and (others or max(expected) > 1):
            return len(case.tokens)
    if T is None and case.tokens and tokens_in([case.dump], case.sizes) == len(case.tokens):
        return len(case.tokens)
    if T is None:
        raise QwenrefError(f"no file of {own.name} is of a size that {case.sizes} explain")
    return T


def ways_of(
    case: Case, place: Place, chain: Sequence[str], sizes: Mapping[str, int]
) -> dict[str, list[Held]]:
    """Return how each dumped stage may be read."""
    found = {}
    for name in chain:
        key = case.key(place, name)
        side = side_of(case.dump, key) if key in case.dump.stages else None
        if side is not None and not side.lacks:
            ways = readings(row_of(name), side, sizes)
            if ways:
                found[name] = ways
    return found


def misfits_of(case: Case, place: Place, replay: Replay) -> dict[str, str]:
    """Say what is the matter with files that cannot be used."""
    found = {}
    for name in replay.chain:
        key = case.key(place, name)
        if key not in case.dump.stages or name in replay.held:
            continue
        side, stage = side_of(case.dump, key), row_of(name)
        needed = str(int(np.prod([replay.sizes[axis] for axis in stage.axes])))
        if name == LAST_LOGITS.name:
            needed += f", and {replay.sizes['V']} the last of them"
        found[name] = (
            f"the dump lacks {', '.join(side.lacks)} of it"
            if side.lacks
            else f"{side.size} values, but {replay.sizes['T']} tokens make {needed}"
        )
    return found
