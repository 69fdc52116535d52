"""The fields of config.json that the stages depend on, and refusal of what would change them."""

from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any

import msgspec

from qwenref.errors import QwenrefError
from qwenref.files import parse_json, read_bounded
from qwenref.stages import MAX_LAYERS

CONFIG_LIMIT = 1 << 20
"""Bytes; published Qwen2.5 configs have about 700."""

# A hundred times the sizes of the largest published model (72B: D=8192 N=64 V=152064 L=80).
_Layers = Annotated[int, msgspec.Meta(ge=1, le=MAX_LAYERS)]
_Width = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Heads = Annotated[int, msgspec.Meta(ge=1, le=1 << 14)]
_Vocabulary = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class Config(msgspec.Struct, frozen=True):
    """What the stages of a Qwen2.5 checkpoint depend on.

    Attributes:
        hidden_size: D.
        num_attention_heads: N, query heads.
        num_key_value_heads: K, key/value heads; N is a multiple of K.
        head_dim: H, even.
        intermediate_size: I, width of the MLP.
        rms_norm_eps: Added to the mean square in RMSNorm.
        rope_theta: Base of the rotary frequencies theta**(-2i/H).
        vocab_size: V, rows of the embedding.
        num_hidden_layers: Layers in the checkpoint.
        tie_word_embeddings: Whether lm_head multiplies with the embedding table.
        windows: For each layer its sliding window in tokens, or None.
    """

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int
    num_hidden_layers: int
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis letter that does not depend on the prompt."""
        N, K, H = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        of_attention = {"D": self.hidden_size, "N": N, "K": K, "H": H}
        of_attention |= {"E": N * H, "F": (N + 2 * K) * H}
        return of_attention | {"I": self.intermediate_size, "V": self.vocab_size}

    def refuse_window(self, layer: int, tokens: int) -> None:
        """Raise `QwenrefError` if a sliding window would hide keys of a prompt in this layer."""
        window = self.windows[layer]
        if window is not None and tokens > window:
            raise QwenrefError(
                f"layer {layer} has a sliding window of {window} tokens in force, and the prompt "
                f"has {tokens}: sliding windows are not supported; use at most {window} tokens"
            )


class _Kind(msgspec.Struct):
    """What decides whether the rest of the file is worth reading."""

    model_type: Any = None
    architectures: list[str] | None = None
    quantization_config: Any = None
    is_causal: Any = True


class _File(msgspec.Struct):
    """config.json as published by transformers 4 and 5."""

    hidden_size: _Width
    num_attention_heads: _Heads
    num_key_value_heads: _Heads
    intermediate_size: _Width
    rms_norm_eps: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    vocab_size: _Vocabulary
    num_hidden_layers: _Layers
    hidden_act: Any = "silu"
    tie_word_embeddings: bool = False
    head_dim: _Heads | None = None
    rope_theta: float | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    use_sliding_window: bool = False
    sliding_window: _Vocabulary | None = None
    max_window_layers: Annotated[int, msgspec.Meta(ge=0)] | None = None
    layer_types: list[str] | None = None


def read_config(path: Path) -> Config:
    """Read and check a config.json.

    Absent `head_dim` means D/N; absent `use_sliding_window` and `tie_word_embeddings` mean false,
    absent `hidden_act` silu, as in transformers; a null `rope_scaling` and
    the rope type "default" mean plain RoPE. Every other field is required or irrelevant here.

    Raises:
        QwenrefError: The file is missing, no JSON, not a Qwen2 config, inconsistent, or asks for
            something that would change the numbers: RoPE scaling, quantised weights, two-way
            attention, another activation.
    """
    content = read_bounded(path, CONFIG_LIMIT)
    kind = parse_json(path, content, _Kind)
    try:
        _refuse_other_kinds(kind)
        raw = parse_json(path, content, _File)
        return _checked(raw)
    except ValueError as error:
        raise QwenrefError(f"{path}: {error}") from error


def _refuse_other_kinds(kind: _Kind) -> None:
    if kind.model_type != "qwen2":
        raise ValueError(f"model_type is {short(kind.model_type)}; only 'qwen2' is supported")
    if kind.architectures is not None and "Qwen2ForCausalLM" not in kind.architectures:
        raise ValueError(
            f"architectures is {short(kind.architectures)}; only 'Qwen2ForCausalLM' is supported"
        )
    if kind.quantization_config is not None:
        raise ValueError(
            "quantization_config is set: quantised checkpoints are not supported; "
            "use the unquantised bf16, f16 or f32 one"
        )
    if kind.is_causal is not True:
        raise ValueError("is_causal is not true: two-way attention is not supported")


def _checked(raw: _File) -> Config:
    D, N, K = raw.hidden_size, raw.num_attention_heads, raw.num_key_value_heads
    if N % K:
        raise ValueError(f"num_attention_heads {N} is not a multiple of num_key_value_heads {K}")
    if raw.head_dim is None and D % N:
        raise ValueError(
            f"hidden_size {D} is not a multiple of num_attention_heads {N}, and head_dim is absent"
        )
    if raw.hidden_act != "silu":
        raise ValueError(f"hidden_act is {short(raw.hidden_act)}; only 'silu' is supported")
    H = raw.head_dim or D // N
    if H % 2:
        raise ValueError(f"head size {H} is odd; RoPE rotates pairs")
    return Config(
        hidden_size=D,
        num_attention_heads=N,
        num_key_value_heads=K,
        head_dim=H,
        intermediate_size=raw.intermediate_size,
        rms_norm_eps=raw.rms_norm_eps,
        rope_theta=_plain_rope_theta(raw),
        vocab_size=raw.vocab_size,
        num_hidden_layers=raw.num_hidden_layers,
        tie_word_embeddings=raw.tie_word_embeddings,
        windows=_windows(raw),
    )


def _plain_rope_theta(raw: _File) -> float:
    """Return theta, from wherever it stands; refuse every RoPE but the plain one.

    transformers 5 writes `rope_parameters`, transformers 4 `rope_theta` and `rope_scaling`, and
    reads either; a silent default of 10000, as there, would be a wrong answer.
    """
    found = {"rope_theta": raw.rope_theta}
    partial = {"partial_rotary_factor": raw.partial_rotary_factor}
    for where in ("rope_parameters", "rope_scaling"):
        fields = getattr(raw, where) or {}
        kinds = {str(fields[key]) for key in ("rope_type", "type") if fields.get(key) is not None}
        unexplained = set() if kinds else fields.keys() - {"rope_theta", "partial_rotary_factor"}
        if kinds - {"default"} or unexplained:
            named = short(sorted(kinds or unexplained))
            raise ValueError(
                f"{where} asks for {named}: only plain RoPE is supported, and this one would "
                "change the numbers"
            )
        found[f"{where}.rope_theta"] = fields.get("rope_theta")
        partial[f"{where}.partial_rotary_factor"] = fields.get("partial_rotary_factor")
    for where, factor in partial.items():
        if factor not in (None, 1):
            raise ValueError(f"{where} is {short(factor)}: only full rotary embedding is supported")
    given = {where: theta for where, theta in found.items() if theta is not None}
    if not given:
        raise ValueError("rope_theta is missing (at top level and in rope_parameters)")
    for where, theta in given.items():
        if not isinstance(theta, int | float) or not 1 < theta < 1e30:
            raise ValueError(f"{where} is {short(theta)}; a number between 1 and 1e30 is needed")
    if len(set(given.values())) > 1:
        stated = ", ".join(f"{where} {theta}" for where, theta in given.items())
        raise ValueError(f"rope_theta is given twice and disagrees: {stated}")
    return float(next(iter(given.values())))


def _windows(raw: _File) -> tuple[int | None, ...]:
    """Return each layer's sliding window, as transformers' Qwen2Config decides it.

    Published configs carry a `sliding_window` number with `use_sliding_window` false: no window.
    """
    L = raw.num_hidden_layers
    if raw.layer_types is not None:
        unknown = set(raw.layer_types) - {"full_attention", "sliding_attention"}
        if unknown or len(raw.layer_types) != L:
            raise ValueError(
                f"layer_types must name full_attention or sliding_attention for each of {L} layers"
            )
        slides = [kind == "sliding_attention" for kind in raw.layer_types]
    elif raw.use_sliding_window and raw.sliding_window is not None:
        if raw.max_window_layers is None:
            raise ValueError("use_sliding_window is true, but max_window_layers is missing")
        slides = [layer >= raw.max_window_layers for layer in range(L)]
    else:
        slides = [False] * L
    if any(slides) and raw.sliding_window is None:
        raise ValueError("layer_types names sliding_attention, but sliding_window is missing")
    return tuple(raw.sliding_window if slide else None for slide in slides)
