"""The stage graph: what is computed from what, and how each array is laid out.

Everything else follows this table: capturing calls the attention method of each row in order, a
layout is another order of a row's axes, and contracts/stages-v1.yaml states the same rows.

Sizes, everywhere in this project: T query tokens, S key tokens, D hidden size, N query heads,
K key/value heads, G = N/K, H head size, E = N*H, F = (N+2K)*H.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from qwenref.errors import QwenrefError

RESIDUAL = "residual"
"""The stream that enters the layer, [T, D]: at layer 0 the embedding, above it the layer before."""


@dataclass(frozen=True)
class Stage:
    """One named array of a forward pass.

    Attributes:
        name: As in file names, manifests and the method of `qwenref.model.attention.Attention`.
        axes: The letters of its axes, in the order in which the array is computed.
        computed_from: The stages (or `RESIDUAL`) whose arrays its method takes, in that order.
        blocks: Names of the parts that its last axis concatenates; their widths are E, K*H, K*H.
        masked: Whether cells with key position > query position mean nothing.
        sliced: Whether its method takes a slice of the queries, so that [N, T, S] never exists
            whole.
        positioned: Whether its method takes the position of the first token given.
    """

    name: str
    axes: tuple[str, ...]
    computed_from: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    masked: bool = False
    sliced: bool = False
    positioned: bool = False


_PAIRS = ("N", "T", "S")

EMBEDDING = Stage("embedding", ("T", "D"), ())

ATTENTION = (
    Stage("attn_norm", ("T", "D"), (RESIDUAL,)),
    Stage("qkv_matmul", ("T", "F"), ("attn_norm",), blocks=("q", "k", "v")),
    Stage("qkv_bias", ("T", "F"), ("qkv_matmul",), blocks=("q", "k", "v")),
    Stage("q_post_rope", ("T", "N", "H"), ("qkv_bias",), positioned=True),
    Stage("k_post_rope", ("T", "K", "H"), ("qkv_bias",), positioned=True),
    Stage("attn_scores", _PAIRS, ("q_post_rope", "k_post_rope"), masked=True, sliced=True),
    Stage("attn_softmax", _PAIRS, ("attn_scores",), masked=True, sliced=True, positioned=True),
    Stage("attention", ("T", "E"), ("attn_softmax", "qkv_bias"), sliced=True),
    Stage("attn_out", ("T", "D"), ("attention",)),
)
"""The nine sub-stages of one attention layer, in the order in which they are computed."""

MAX_LAYERS = 1 << 14
"""A hundred times the layers of the deepest published Qwen2.5 (72B: 80), and more."""

ALL = (EMBEDDING, *ATTENTION)
BY_NAME = {stage.name: stage for stage in ALL}
_CHOICE = f"stages are all, or any of {', '.join(BY_NAME)}"


def needed_for(wanted: Iterable[Stage]) -> tuple[Stage, ...]:
    """Return the stages of `ATTENTION` that computing `wanted` takes, in chain order."""
    names = {stage.name for stage in wanted}
    for stage in reversed(ATTENTION):
        if stage.name in names:
            names.update(stage.computed_from)
    return tuple(stage for stage in ATTENTION if stage.name in names)


def parse_stages(spec: str) -> tuple[Stage, ...]:
    """Return the stages that `--stages` names, in chain order.

    Args:
        spec: Names separated by commas; ``all`` stands for the nine of `ATTENTION`.

    Raises:
        QwenrefError: A name is unknown; the message suggests the nearest one.
    """
    names = {name.strip() for name in spec.split(",")}
    if "all" in names:
        names = names - {"all"} | {stage.name for stage in ATTENTION}
    for name in sorted(names - BY_NAME.keys()):
        if not name:
            raise QwenrefError(f"--stages {spec!r} has an empty name; {_CHOICE}")
        raise QwenrefError(f"unknown stage {name!r}: {_suggestion(name)}")
    return tuple(stage for stage in ALL if stage.name in names)


def parse_layers(spec: str) -> tuple[int, ...]:
    """Return the layers that ``--layers`` names: ``0``, ``0,1``, ``0..4`` (without 4).

    Raises:
        QwenrefError: The text is none of these, or names no layer.
    """
    layers: set[int] = set()
    for part in spec.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\.\.([0-9]{1,9}))?", part.strip())
        if not match:
            raise QwenrefError(f"--layers {spec!r}: give numbers and ranges like 0 or 0,1 or 0..4")
        first = int(match[1])
        last = first + 1 if match[2] is None else int(match[2])
        if last <= first:
            raise QwenrefError(f"--layers {spec!r}: {part} is empty; the end is exclusive")
        if last > MAX_LAYERS:
            raise QwenrefError(f"--layers {spec!r}: no model has {last} layers")
        layers.update(range(first, last))
    return tuple(sorted(layers))


def _suggestion(name: str) -> str:
    import difflib  # only a wrong name pays for it

    nearest = difflib.get_close_matches(name.lower(), ("all", *BY_NAME), n=1, cutoff=0)
    return f"did you mean {nearest[0]!r}? {_CHOICE}"
