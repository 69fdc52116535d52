"""The stage graph: what is computed from what, and how each array is laid out.

Everything else follows this table: capturing calls the method of each row in order, a layout is
another order of a row's axes, and contracts/stages-v1.yaml states the same rows.

Sizes, everywhere in this project: T query tokens, S key tokens, D hidden size, N query heads,
K key/value heads, G = N/K, H head size, E = N*H, F = (N+2K)*H, I width of the MLP, V vocabulary.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from qwenref.errors import QwenrefError

RESIDUAL = "residual"
"""The stream that enters a layer, [T, D]: at layer 0 the embedding, above it the layer before's
`LEAVING`. The one that leaves the last layer enters the stages of the whole model."""


@dataclass(frozen=True)
class Stage:
    """One named array of a forward pass.

    Attributes:
        name: As in file names, manifests and the method that computes it.
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

    @property
    def has_heads(self) -> bool:
        """Whether its values are those of heads."""
        return not {"D", "I", "V"} & {*self.axes}


_PAIRS = ("N", "T", "S")

EMBEDDING = Stage("embedding", ("T", "D"), ())
"""What enters layer 0; it counts as a stage of that layer."""

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

BETWEEN = Stage("post_attn_residual", ("T", "D"), (RESIDUAL, "attn_out"))
"""The stream with what attention adds."""

MLP = (
    Stage("ffn_norm", ("T", "D"), ("post_attn_residual",)),
    Stage("ffn_gate", ("T", "I"), ("ffn_norm",)),
    Stage("ffn_up", ("T", "I"), ("ffn_norm",)),
    Stage("ffn_silu", ("T", "I"), ("ffn_gate",)),
    Stage("ffn_swigl", ("T", "I"), ("ffn_silu", "ffn_up")),
    Stage("ffn_out", ("T", "D"), ("ffn_swigl",)),
)
"""The sub-stages of one MLP."""

LEAVING = Stage("post_ffn_residual", ("T", "D"), ("post_attn_residual", "ffn_out"))
"""The stream with what the MLP adds: it leaves the layer, and enters the next one."""

LAYER = (*ATTENTION, BETWEEN, *MLP, LEAVING)
"""The stages of each decoder layer."""

HEAD = (
    Stage("final_norm", ("T", "D"), (RESIDUAL,)),
    Stage("lm_head", ("T", "V"), ("final_norm",)),
)
"""The stages of the whole model, after its last layer."""

LAST_LOGITS = Stage("lm_head", ("V",), ("final_norm",))
"""lm_head as engines compute and dump it: of the last token alone."""

MAX_LAYERS = 1 << 14
"""A hundred times the layers of the deepest published Qwen2.5 (72B: 80), and more."""

ALL = (EMBEDDING, *LAYER, *HEAD)
BY_NAME = {stage.name: stage for stage in ALL}
OF_LAYERS = {stage.name for stage in (EMBEDDING, *LAYER)}

GROUPS = {
    "all": ALL,
    "attention": ATTENTION,
    "mlp": MLP,
    "residual": (EMBEDDING, BETWEEN, LEAVING),
}
"""By the names that ``--stages`` takes for several of them."""

_CHOICE = f"stages are {', '.join(GROUPS)}, or any of {', '.join(BY_NAME)}"


def needed_for(wanted: Collection[Stage]) -> tuple[Stage, ...]:
    """Return the stages of `LAYER` that computing `wanted` takes, in chain order."""
    names = {stage.name for stage in wanted}
    for stage in reversed(LAYER):
        if stage.name in names:
            names.update(stage.computed_from)
    return tuple(stage for stage in LAYER if stage.name in names)


def parse_stages(spec: str) -> tuple[Stage, ...] | None:
    """Return the stages that `--stages` names, in chain order.

    ``all`` is None: those of the layers that are asked for, and those of the whole model only if
    its last layer is one of them.

    Args:
        spec: The name of one of `GROUPS`; or names of stages and groups, separated by commas,
            where ``attention`` is the stage of that name.

    Raises:
        QwenrefError: A name is unknown; the message suggests the nearest one.
    """
    if spec.strip() == "all":
        return None
    if spec.strip() in GROUPS:
        return GROUPS[spec.strip()]
    wanted: set[Stage] = set()
    for name in (part.strip() for part in spec.split(",")):
        if not name:
            raise QwenrefError(f"--stages {spec!r} has an empty name; {_CHOICE}")
        if name not in GROUPS and name not in BY_NAME:
            raise QwenrefError(f"unknown stage {name!r}: {_suggestion(name)}")
        wanted.update([BY_NAME[name]] if name in BY_NAME else GROUPS[name])
    return tuple(stage for stage in ALL if stage in wanted)


def parse_layers(spec: str) -> tuple[int, ...] | None:
    """Return the layers that ``--layers`` names: ``0``, ``0,1``, ``0..4`` (without 4).

    ``all`` is None, since how many there are depends on the checkpoint.

    Raises:
        QwenrefError: The text is none of these, or names no layer.
    """
    if spec.strip() == "all":
        return None
    layers: set[int] = set()
    for part in spec.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:\.\.([0-9]{1,9}))?", part.strip())
        if not match:
            raise QwenrefError(
                f"--layers {spec!r}: give all, or numbers and ranges like 0 or 0,1 or 0..4"
            )
        first = int(match[1])
        last = first + 1 if match[2] is None else int(match[2])
        if last <= first:
            raise QwenrefError(f"--layers {spec!r}: {part} is empty; the end is exclusive")
        if last > MAX_LAYERS:
            raise QwenrefError(f"--layers {spec!r}: no model has {last} layers")
        layers.update(range(first, last))
    return tuple(sorted(layers))


def parse_logits(spec: str) -> bool:
    """Return whether ``--logits`` asks for those of all tokens.

    Raises:
        QwenrefError: The text is neither "all" nor "last".
    """
    if spec not in ("all", "last"):
        raise QwenrefError(f"--logits {spec!r}: give all, or last for those of the last token")
    return spec == "all"


def _suggestion(name: str) -> str:
    import difflib  # only a wrong name pays for it

    nearest = difflib.get_close_matches(name.lower(), (*GROUPS, *BY_NAME), n=1, cutoff=0)
    return f"did you mean {nearest[0]!r}? {_CHOICE}"
