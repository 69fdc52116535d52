"""From a checkpoint and a prompt to a dump directory: what `qwenref capture` does."""

import math
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

import qwenref
from qwenref.dumps import manifest
from qwenref.dumps.aprt import MAX_VALUES, fingerprint_of, read_aprt
from qwenref.dumps.layout import layout_named
from qwenref.dumps.tree import Written, new_dump, write_stage
from qwenref.errors import QwenrefError
from qwenref.model.attention import Attention
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.tokens import DEFAULT_PROMPT, check_range, encode
from qwenref.model.weights import read_attention, read_embedding
from qwenref.run import chain_values, computing
from qwenref.stages import ATTENTION, EMBEDDING, Stage


class Captured(NamedTuple):
    """A finished dump."""

    directory: Path
    manifest: manifest.Manifest
    written: list[Written]


class Prompt(NamedTuple):
    """What was asked: a text and its tokens, tokens alone, or neither, with a residual stream."""

    text: str | None
    tokens: list[int] | None


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
    progress: Callable[[str], object] = lambda _: None,
) -> Captured:
    """Compute stages of one layer and write them as a dump directory.

    Args:
        model: A checkpoint directory, or one .safetensors file with config.json beside it.
        output: The dump directory; default: the model's name with ``-qwenref``, here.
        layers: Layer 0; or the one layer that `residual` enters.
        prompt: The text; `DEFAULT_PROMPT` if neither it nor `tokens` nor `residual` is given.
        tokens: The token ids, instead of `prompt`.
        stages: What to write.
        dtype: "float32" or "float64": what to compute in. The files hold float32.
        device: "auto", "cpu" or "gpu".
        layout: "apr" or "hf", see `qwenref.dumps.layout`.
        residual: An APRT file [T, D]: the residual stream that enters the layer.
        force: Whether to replace a dump that `output` holds.
        progress: Called with the name of each step before it begins.

    Raises:
        QwenrefError: Something cannot be used; one line says what, and nothing is written.
    """
    arrange = layout_named(layout)
    checkpoint = Checkpoint(model)
    config = checkpoint.config
    layer = _the_layer(layers, config, residual)
    asked = _prompt(checkpoint, prompt, tokens, residual)
    stream = None
    if residual is not None:
        if EMBEDDING in stages:
            raise QwenrefError("a run from --input has no stage embedding: leave it out")
        stream = _read_residual(residual, layer, config, asked.tokens)
    T = len(asked.tokens or []) if stream is None else len(stream)
    config.refuse_window(layer, T)
    _refuse_uncountable(stages, config, T)
    output = output or Path(f"{checkpoint.name}-qwenref")

    with computing(dtype, device) as taken, new_dump(output, force=force) as folder:
        progress(f"reading the weights of layer {layer}")
        weights, weights_print = read_attention(checkpoint, layer)
        rows_print = None
        if stream is None:
            stream, rows_print = read_embedding(checkpoint, asked.tokens or [])
        stream = stream.astype(dtype)
        written = []
        if EMBEDDING in stages:
            written.append(write_stage(folder, layer, EMBEDDING, stream, arrange))
        progress("compiling and computing")
        for stage, values in chain_values(Attention(config, weights), stream, stages):
            progress(f"writing {stage.name}")
            written.append(write_stage(folder, layer, stage, values, arrange))
        made = manifest.write_manifest(
            folder,
            engine="qwenref",
            versions={"qwenref": qwenref.__version__}
            | {package: version(package) for package in ("jax", "jaxlib", "numpy")},
            device=taken,
            dtype=dtype,
            layout=layout,
            model=checkpoint.name,
            prompt=asked.text,
            tokens=asked.tokens,
            input=None if residual is None else fingerprint_of(residual),
            config=config,
            weights=manifest.Weights(
                layers={str(layer): weights_print},
                embedding=rows_print,
                biases=weights.q_bias is not None,
            ),
            stages=[stage.file for stage in written],
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


def _prompt(
    checkpoint: Checkpoint, text: str | None, tokens: list[int] | None, residual: Path | None
) -> Prompt:
    if text is not None and tokens is not None:
        raise QwenrefError("--prompt and --tokens were both given; use one of them")
    if text is None and tokens is None and residual is None:
        text = DEFAULT_PROMPT
    if text is not None:
        tokens = encode(text, checkpoint.directory)
    if tokens is not None:
        if not tokens:
            raise QwenrefError("the prompt is empty: it has no tokens")
        check_range(tokens, checkpoint.config.vocab_size)
    return Prompt(text, tokens)


def _read_residual(path: Path, layer: int, config: Config, tokens: list[int] | None) -> np.ndarray:
    """Read the residual stream [T, D] that enters `layer` from another engine's dump."""
    found = read_aprt(path)
    # apr calls the stream that enters layer n the post_ffn_residual of layer n-1
    if found.layer is not None and found.layer not in (layer, layer - 1):
        raise QwenrefError(
            f"{path} says that it belongs to layer {found.layer}; what enters layer {layer} is "
            f"marked {layer}, or {layer - 1} (whose output it is)"
        )
    D = config.hidden_size
    T, rest = divmod(found.values.size, D)
    if rest or not T:
        raise QwenrefError(f"{path} has {found.values.size} values, no multiple of hidden_size {D}")
    if tokens is not None and len(tokens) != T:
        raise QwenrefError(f"{path} has {T} tokens, but {len(tokens)} were given")
    bad = int(np.count_nonzero(~np.isfinite(found.values)))
    if bad:
        raise QwenrefError(f"{path} holds {bad} NaN or infinite values")
    return found.values.reshape(T, D)


def _refuse_uncountable(stages: Collection[Stage], config: Config, T: int) -> None:
    sizes = config.sizes | {"T": T, "S": T}
    for stage in stages:
        count = math.prod(sizes[axis] for axis in stage.axes)
        if count > MAX_VALUES:
            raise QwenrefError(
                f"{stage.name} of {T} tokens has {count} values, more than the {MAX_VALUES} that "
                "an APRT file can count: use fewer tokens, or leave it out with --stages"
            )
