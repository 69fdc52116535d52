"""From a checkpoint and a prompt to a dump directory: what `qwenref capture` does."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

import qwenref
from qwenref.chain import chain_pieces
from qwenref.dumps import manifest
from qwenref.dumps.aprt import MAX_VALUES, VALUE, Aprt, read_aprt
from qwenref.dumps.layout import layout_named
from qwenref.dumps.place import new_dump
from qwenref.dumps.tree import StageWriter, Written
from qwenref.errors import QwenrefError
from qwenref.model.attention import Attention
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.tokens import DEFAULT_PROMPT, check_tokens, encode
from qwenref.model.weights import check_tensors, read_attention, read_embedding
from qwenref.noise import noise_floor
from qwenref.oracle import computing
from qwenref.progress import SILENT, Progress
from qwenref.stages import ATTENTION, EMBEDDING, Stage

NO_RESIDUAL = {stage.name for stage in ATTENTION} | {
    *("post_attn_residual", "ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "ffn_out"),
    *("final_norm", "lm_head"),
}
"""Stages that `apr trace` dumps (0.72.3) and no layer is entered by."""


class Captured(NamedTuple):
    """A finished dump."""

    directory: Path
    manifest: manifest.Manifest
    written: list[Written]


class Start(NamedTuple):
    """Where a run begins: at tokens (with their text, if any), or at a given residual stream."""

    text: str | None
    tokens: list[int]
    stream: Aprt | None

    def length(self, hidden_size: int) -> int:
        """The number of tokens, T."""
        return len(self.tokens) if self.stream is None else self.stream.values.size // hidden_size


def capture(
    model: Path,
    output: Path | None = None,
    *,
    layers: Sequence[int] = (0,),
    prompt: str | None = None,
    tokens: list[int] | None = None,
    stages: Collection[Stage] = ATTENTION,
    dtype: str = "float32",
    device: str = "auto",
    layout: str = "apr",
    residual: Path | None = None,
    force: bool = False,
    noise: bool = True,
    progress: Progress = SILENT,
) -> Captured:
    """Compute stages of one layer and write them as a dump directory.

    Args:
        model: A checkpoint directory, or one .safetensors file with config.json beside it.
        output: The dump directory; default: the model's name with ``-qwenref``, here.
        layers: Layer 0; or the one layer that `residual` enters.
        prompt: The text; `DEFAULT_PROMPT` if neither it nor `tokens` nor `residual` is given.
        tokens: The token ids, instead of `prompt`.
        stages: What to write.
        dtype: As in `qwenref.run`. The files hold float32.
        device: "auto", "cpu" or "gpu".
        layout: "apr" or "hf", see `qwenref.dumps.layout`.
        residual: An APRT file [T, D]: the residual stream that enters the layer.
        force: Whether to replace a dump that `output` holds.
        noise: Whether to compute the noise floor too.
        progress: Told each step, and how many bytes are written.

    Raises:
        QwenrefError: Something cannot be used; one line says what, and nothing is written.
    """
    arrange = layout_named(layout)
    checkpoint = Checkpoint(model)
    config = checkpoint.config
    layer = _the_layer(layers, config, residual)
    start = _start(checkpoint, layer, prompt, tokens, residual)
    if start.stream is not None and EMBEDDING in stages:
        raise QwenrefError("a run from --input has no stage embedding: leave it out")
    T = start.length(config.hidden_size)
    config.refuse_window(layer, T)
    sizes = config.sizes | {"T": T, "S": T}
    _refuse_uncountable(stages, sizes)
    check_tensors(checkpoint, layer, embedding=start.stream is None)
    output = output or Path(f"{checkpoint.name}-qwenref")

    with (
        computing(dtype, device) as (precision, taken),
        new_dump(output, force=force) as folder,
    ):
        progress.step(f"reading the weights of layer {layer}")
        weights, weights_print = read_attention(checkpoint, layer)
        if start.stream is None:
            rows, rows_print = read_embedding(checkpoint, start.tokens)
        else:
            rows, rows_print = start.stream.values.reshape(T, -1), None
        pieces = chain_pieces(Attention(config, weights, precision), rows, stages)
        progress.step("compiling")
        progress.expect(sum(_count(stage, sizes) for stage in stages) * VALUE.itemsize)
        with ExitStack() as files:
            writers: dict[Stage, StageWriter] = {}
            for stage, first, values in pieces:
                progress.step(f"writing {stage.name}")
                if stage not in writers:
                    writer = StageWriter(folder, layer, stage, sizes, arrange)
                    writers[stage] = files.enter_context(writer)
                writers[stage].write(values, first)
                progress.advance(values.size * VALUE.itemsize)
            written = [writer.finish() for writer in writers.values()]
        floor = None
        judged = [stage for stage in stages if stage != EMBEDDING]
        if noise and judged:
            progress.step("computing the noise floor")
            floor = noise_floor(config, weights, rows, judged)
        made = manifest.write_manifest(
            folder,
            engine="qwenref",
            versions={"qwenref": qwenref.__version__}
            | {package: version(package) for package in ("jax", "jaxlib", "numpy")},
            device=taken,
            dtype=dtype,
            layout=layout,
            model=checkpoint.name,
            prompt=start.text,
            tokens=start.tokens or None,
            input=None if start.stream is None else start.stream.fingerprint,
            config=config,
            weights=manifest.Weights(
                layers={str(layer): weights_print},
                embedding=rows_print,
                biases=weights.q_bias is not None,
            ),
            stages=[stage.file for stage in written],
            noise=floor,
        )
    return Captured(output, made, written)


def _the_layer(layers: Sequence[int], config: Config, residual: Path | None) -> int:
    beyond = [layer for layer in layers if layer >= config.num_hidden_layers]
    if beyond:
        raise QwenrefError(
            f"layer {beyond[0]} does not exist: the checkpoint has {config.num_hidden_layers} "
            "layers, counted from 0"
        )
    if residual is not None:
        if len(layers) != 1:
            raise QwenrefError("--input enters one layer: name just that one with --layers")
        return layers[0]
    above = [layer for layer in layers if layer > 0]
    if above:
        raise QwenrefError(
            f"layer {above[0]}: only layer 0 can be computed from tokens; for another one, give "
            "the residual stream that enters it with --input"
        )
    return 0


def _start(
    checkpoint: Checkpoint,
    layer: int,
    text: str | None,
    tokens: list[int] | None,
    residual: Path | None,
) -> Start:
    if text is not None and tokens is not None:
        raise QwenrefError("--prompt and --tokens were both given; use one of them")
    if text is None and tokens is None and residual is None:
        text = DEFAULT_PROMPT
    if text is not None:
        tokens = encode(text, checkpoint.directory)
    if tokens is not None:
        check_tokens(tokens, checkpoint.config.vocab_size)
    stream = None
    if residual is not None:
        stream = _read_residual(residual, layer, checkpoint.config.hidden_size, tokens)
    return Start(text, tokens or [], stream)


def _read_residual(path: Path, layer: int, D: int, tokens: list[int] | None) -> Aprt:
    """Read the residual stream [T, D] that enters `layer` from another engine's dump."""
    found = read_aprt(path)
    name = re.sub(r"^layer_\d+_", "", path.stem)
    wanted = ("post_ffn_residual", layer - 1) if layer else ("embedding", 0)
    right = found.layer in (layer, layer - 1)  # what leaves a layer enters the next
    if name in ("embedding", "post_ffn_residual"):
        right = (name, found.layer) == wanted
    if name in NO_RESIDUAL or not right:
        marked = "the whole model" if found.layer is None else f"layer {found.layer}"
        raise QwenrefError(
            f"{path}, marked as of {marked}, is not what enters layer {layer}; apr calls that "
            f"{wanted[0]} of layer {wanted[1]}"
        )
    T, rest = divmod(found.values.size, D)
    if rest or not T:
        raise QwenrefError(
            f"{path} has {found.values.size} values: not one or more tokens of hidden_size {D}"
        )
    if tokens is not None and len(tokens) != T:
        raise QwenrefError(f"{path} has {T} tokens, but {len(tokens)} were given")
    bad = found.values.size - int(np.count_nonzero(np.isfinite(found.values)))
    if bad:
        raise QwenrefError(f"{path} holds {bad} NaN or infinite values")
    return found


def _refuse_uncountable(stages: Collection[Stage], sizes: Mapping[str, int]) -> None:
    for stage in stages:
        count = _count(stage, sizes)
        if count > MAX_VALUES:
            raise QwenrefError(
                f"{stage.name} of {sizes['T']} tokens has {count} values, and an APRT file counts "
                f"at most {MAX_VALUES}: use fewer tokens, or leave it out with --stages"
            )


def _count(stage: Stage, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[axis] for axis in stage.axes)
