"""What a dump is to be compared with, and which of its files are what."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from qwenref.dumps.reading import Dump
from qwenref.errors import QwenrefError
from qwenref.judge.alignment import side_of
from qwenref.judge.scope import fits, tokens_in
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.tokens import DEFAULT_PROMPT, check_tokens, encode
from qwenref.stages import ATTENTION, BETWEEN, EMBEDDING, LEAVING, RESIDUAL
from qwenref.trial.held import Held
from qwenref.trial.laying_out import readings
from qwenref.trial.replay import CHAIN, Replay
from qwenref.trial.residual import row_of


class Case(NamedTuple):
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


def case_of(
    dump: Dump,
    layer: int,
    checkpoint: Checkpoint | None,
    prompt: str | None,
    tokens: list[int] | None,
) -> Case:
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
    return Case(dump, layer, checkpoint, config, tokens, origin)


def _config_of(used: Any, layer: int) -> Config:
    """Return the config that a manifest states."""
    fields = msgspec.structs.asdict(used)
    return Config(
        **fields,
        num_hidden_layers=layer + 1,
        tie_word_embeddings=False,
        windows=(None,) * (layer + 1),
    )


def of_layer(dump: Dump, layer: int) -> Dump:
    """Return what a dump has of one layer's attention, and of the stream that enters it."""
    wanted = {(layer, stage.name) for stage in ATTENTION}
    wanted.add((0, EMBEDDING.name) if layer == 0 else (layer - 1, LEAVING.name))
    stages = {key: parts for key, parts in dump.stages.items() if key in wanted}
    return dump._replace(stages=stages)


def length_of(case: Case, own: Dump, sizes: Mapping[str, int]) -> int:
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
        (layer, EMBEDDING.name if name == LEAVING.name else name): parts
        for (layer, name), parts in dump.stages.items()
    }
    return dump._replace(stages=stages)


def _key(name: str, layer: int) -> tuple[int, str]:
    if name != RESIDUAL:
        return layer, name
    return (0, EMBEDDING.name) if layer == 0 else (layer - 1, LEAVING.name)


def ways_of(own: Dump, layer: int, sizes: Mapping[str, int]) -> dict[str, list[Held]]:
    """Return how each dumped stage may be read."""
    found = {}
    for name in CHAIN:
        side = side_of(own, _key(name, layer)) if _key(name, layer) in own.stages else None
        if side is not None and not side.lacks:
            ways = readings(row_of(name), side, sizes)
            if ways:
                found[name] = ways
    return found


def leaving_of(dump: Dump, layer: int, sizes: Mapping[str, int]) -> Held | None:
    """Return the stream that attn_out was added to, if that was dumped."""
    keys = [key for key in ((layer, BETWEEN.name), (None, BETWEEN.name)) if key in dump.stages]
    side = side_of(dump, keys[0]) if keys else None
    ways = [] if side is None else readings(EMBEDDING, side, sizes)
    return ways[0] if ways else None


def misfits_of(own: Dump, layer: int, replay: Replay) -> dict[str, str]:
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
