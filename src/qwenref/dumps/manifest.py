"""manifest.json: what a dump directory holds, and from what it was computed.

There is no clock and no path in it: the same run gives the same bytes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from qwenref.dumps.aprt import MAX_VALUES
from qwenref.errors import QwenrefError
from qwenref.files import parse_json, read_bounded
from qwenref.metrics import Errors, heads_in
from qwenref.stages import BY_NAME

NAME = "manifest.json"
LIMIT = 1 << 26
"""Bytes; a million token ids take about ten million."""

_Fingerprint = Annotated[str, msgspec.Meta(pattern="^blake3:[0-9a-f]{64}$", max_length=71)]
_OfWeights = Annotated[str, msgspec.Meta(pattern="^blake3-halves:[0-9a-f]{64}$", max_length=78)]
_Layer = Annotated[int, msgspec.Meta(ge=0, lt=MAX_VALUES)]
_Token = Annotated[int, msgspec.Meta(ge=0, le=MAX_VALUES)]
_LayerName = Annotated[str, msgspec.Meta(pattern="^[0-9]{1,9}$", max_length=9)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_VALUES)]


class UsedConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of config.json that the stages depend on."""

    hidden_size: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size
    head_dim: _Size
    intermediate_size: _Size
    vocab_size: _Size
    rms_norm_eps: float
    rope_theta: float

    @property
    def sizes(self) -> dict[str, int]:
        """N, K, H, D, I and V."""
        return {
            "N": self.num_attention_heads,
            "K": self.num_key_value_heads,
            "H": self.head_dim,
            "D": self.hidden_size,
            "I": self.intermediate_size,
            "V": self.vocab_size,
        }


class Weights(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fingerprints of the weights, independent of how they are stored.

    Attributes:
        layers: For each layer (its number as a string) that of its attention tensors.
        embedding: That of the prompt's rows of the embedding table; None if they were not read.
        biases: Whether the q, k and v projections have biases; without, qkv_bias is qkv_matmul.
        feed_forwards: For each layer that of its MLP and the norm before, where they were read.
        final_norm: That of the norm after the last layer, if it was read.
        lm_head: That of the matrix of lm_head, the embedding table if they are tied, if read.
    """

    layers: dict[_LayerName, _OfWeights]
    embedding: _OfWeights | None
    biases: bool
    feed_forwards: dict[_LayerName, _OfWeights] = {}
    final_norm: _OfWeights | None = None
    lm_head: _OfWeights | None = None


class StageFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage file.

    Attributes:
        stage: Its name.
        layer: Its layer, or None for a stage of the whole model.
        file: Path relative to the manifest: ``layer-0/attn_scores.bin``.
        shape: Sizes of its axes, row-major.
        axes: Letters of its axes, separated by blanks, as in `qwenref.stages`.
        fingerprint: BLAKE3 of the file.
    """

    stage: Annotated[str, msgspec.Meta(pattern="^[a-z0-9_]+$")]
    layer: _Layer | None
    file: Annotated[str, msgspec.Meta(pattern=r"^(layer-[0-9]+/)?[a-z0-9_]+\.bin$")]
    shape: list[_Size]
    axes: Annotated[str, msgspec.Meta(pattern="^[A-Z]( [A-Z])*$")]
    fingerprint: _Fingerprint


class StageNoise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The noise floor of one stage, by precision class; `qwenref.noise` has the definition.

    Attributes:
        accumulated: Of a chain of its own.
        local: Of one stage from exact inputs.
        inputs: Of one exact stage from inputs rounded to float32, float16 or bfloat16.
    """

    accumulated: dict[str, Errors]
    local: dict[str, Errors]
    inputs: dict[str, Errors]


class Noise(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The noise floor of a dump.

    Attributes:
        tokens: The positions that it was computed for, in order; all of them if there are few.
        stages: By the file without its ending: ``layer-0/attn_scores``.
    """

    tokens: Annotated[list[_Token], msgspec.Meta(min_length=1)]
    stages: dict[str, StageNoise]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file.

    Attributes:
        schema: Names this format.
        engine: Who computed: ``qwenref`` or ``transformers``.
        versions: Of the packages that the numbers depend on.
        device: What it was computed on.
        dtype: What it was computed in; the files hold float32 in any case.
        layout: How the files lay out the stages, see `qwenref.dumps.layout`.
        model: The checkpoint's name.
        prompt: The text, if the tokens were made from one.
        tokens: The token ids, or None if the run began at a residual stream without them.
        input: Fingerprint of the residual stream that the run began at, if not at the embedding.
        config: What the stages depend on besides weights and tokens.
        weights: Their fingerprints.
        stages: The files, in the order in which they were computed.
        noise: How much error is innocent, if that was computed.
    """

    schema: Literal["qwenref-manifest-v1"]
    engine: str
    versions: dict[str, str]
    device: str
    dtype: Literal["float64", "float32", "bfloat16", "float16"]
    layout: Literal["apr", "hf"]
    model: str
    prompt: str | None
    tokens: list[_Token] | None
    input: _Fingerprint | None
    config: UsedConfig
    weights: Weights
    stages: list[StageFile]
    noise: Noise | None = None

    def to_json(self) -> str:
        """Return the text of manifest.json: one line for each field, and for each stage."""
        lines = []
        for field, value in msgspec.to_builtins(self).items():
            if field == "stages":
                text = "[\n    " + ",\n    ".join(map(_json, value)) + "\n  ]"
            elif field == "noise" and value is not None:
                floors = [f'"{name}": {_json(floor)}' for name, floor in value["stages"].items()]
                text = f'{{"tokens": {_json(value["tokens"])}, "stages": {{\n    '
                text += ",\n    ".join(floors) + "\n  }}"
            else:
                text = _json(value)
            lines.append(f'  "{field}": {text}')
        return "{\n" + ",\n".join(lines) + "\n}\n"


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def stage_path(layer: int | None, stage: str) -> str:
    """Return where a stage lies in a dump, relative to its directory, as `apr trace` places it."""
    return f"{stage}.bin" if layer is None else f"layer-{layer}/{stage}.bin"


def floor_name(layer: int | None, stage: str) -> str:
    """Return by what name `Noise.stages` has the floor of a stage."""
    return stage_path(layer, stage).removesuffix(".bin")


def write_manifest(directory: Path, **fields: Any) -> Manifest:
    """Write manifest.json into a directory that has none, and return what it says.

    Args:
        directory: Where the stage files lie.
        fields: Those of `Manifest`, except `schema`; checked as when they are read.
    """
    fields["schema"] = "qwenref-manifest-v1"
    manifest = _consistent(msgspec.convert(fields, Manifest, from_attributes=True))
    with (directory / NAME).open("x", encoding="utf-8", newline="\n") as file:
        file.write(manifest.to_json())
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a dump directory; the stage files are not looked at.

    Raises:
        QwenrefError: It is missing, malformed, of another schema, or contradicts itself.
    """
    path = directory / NAME
    manifest = parse_json(path, read_bounded(path, LIMIT), Manifest)
    try:
        return _consistent(manifest)
    except ValueError as error:
        raise QwenrefError(f"{path}: {error}") from error


def _consistent(manifest: Manifest) -> Manifest:
    """Return the manifest, or raise `ValueError` if it contradicts itself."""
    places = [(stage.layer, stage.stage) for stage in manifest.stages]
    if len(set(places)) < len(places):
        raise ValueError("a stage is listed twice")
    sizes = manifest.config.sizes
    if manifest.tokens is not None:
        sizes["T"] = sizes["S"] = len(manifest.tokens)
    for stage in manifest.stages:
        if stage.file != stage_path(stage.layer, stage.stage):
            raise ValueError(f"{stage.stage} of layer {stage.layer} cannot be at {stage.file!r}")
        axes = stage.axes.split(" ")
        same = [sizes.setdefault(axis, size) for axis, size in zip(axes, stage.shape, strict=False)]
        if len(axes) != len(stage.shape) or axes != stage.axes.split() or same != stage.shape:
            raise ValueError(f"{stage.stage} cannot have shape {stage.shape} of axes {stage.axes}")
        if math.prod(stage.shape) > MAX_VALUES:
            raise ValueError(f"{stage.stage} of shape {stage.shape} does not fit an APRT file")
    if manifest.noise is not None:
        _check_noise(manifest, manifest.noise, sizes)
    return manifest


def _check_noise(manifest: Manifest, noise: Noise, sizes: Mapping[str, int]) -> None:
    listed = {floor_name(file.layer, file.stage): file for file in manifest.stages}
    tokens = noise.tokens
    if tokens != sorted(set(tokens)) or [tokens[0], tokens[-1] + 1] != [0, sizes.get("T")]:
        raise ValueError("the tokens of noise are not some of the prompt's, from first to last")
    for name, floor in noise.stages.items():
        if name not in listed or listed[name].stage not in BY_NAME:
            raise ValueError(f"noise has a stage {name!r}, and there is no such file")
        stage = BY_NAME[listed[name].stage]
        looked_at = 1 if listed[name].axes == "V" else len(tokens)  # logits of the last token
        wanted = len(stage.blocks), heads_in(stage, sizes), looked_at
        for part in (floor.accumulated, floor.local, floor.inputs):
            for of, errors in part.items():
                if (len(errors.blocks), len(errors.heads), len(errors.tokens)) != wanted:
                    raise ValueError(f"noise of {name} in {of} has too many or too few slices")
