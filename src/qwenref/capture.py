"""From a checkpoint and a prompt to a dump directory: what `qwenref capture` does."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

import qwenref
from qwenref.chain import Piece
from qwenref.dumps import manifest
from qwenref.dumps.aprt import MAX_VALUES, VALUE, Aprt, read_aprt
from qwenref.dumps.layout import Layout, layout_named
from qwenref.dumps.manifest import StageNoise
from qwenref.dumps.place import new_dump
from qwenref.dumps.tree import StageWriter, Written
from qwenref.errors import QwenrefError
from qwenref.forward import Forward, Plan
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.tokens import DEFAULT_PROMPT, check_tokens, encode
from qwenref.model.weights import check_tensors, read_embedding
from qwenref.noise import NoiseFloors
from qwenref.oracle import computing
from qwenref.progress import SILENT, Progress
from qwenref.stages import ALL, ATTENTION, EMBEDDING, HEAD, LAYER, LEAVING, Stage

NO_RESIDUAL = {stage.name for stage in ALL} - {EMBEDDING.name, LEAVING.name}
"""Stages that no layer is entered by."""


class Captured(NamedTuple):
    """A finished dump."""

    directory: Path
    manifest: manifest.Manifest
    written: list[Written]
    length: int
    """T"""


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
    layers: Sequence[int] | None = (0,),
    prompt: str | None = None,
    tokens: list[int] | None = None,
    stages: Collection[Stage] | None = ATTENTION,
    dtype: str = "float32",
    device: str = "auto",
    layout: str = "apr",
    residual: Path | None = None,
    force: bool = False,
    noise: bool = True,
    all_logits: bool = False,
    progress: Progress = SILENT,
) -> Captured:
    """Compute stages of some layers and write them as a dump directory.

    Args:
        model: A checkpoint directory, or one .safetensors file with config.json beside it.
        output: The dump directory; default: the model's name with ``-qwenref``, here.
        layers: Whose stages to write, in order; None for all layers.
        prompt: The text; `DEFAULT_PROMPT` if neither it nor `tokens` nor `residual` is given.
        tokens: The token ids, instead of `prompt`.
        stages: What to write of each of them; the embedding if layer 0 is one of them. For stages
            of the whole model all layers are run, whichever are written. None for all that these
            layers have, with those of the whole model if the last layer is one of them.
        dtype: As in `qwenref.run`. The files hold float32.
        device: "auto", "cpu" or "gpu".
        layout: "apr" or "hf", see `qwenref.dumps.layout`.
        residual: An APRT file [T, D]: the residual stream that enters the first of the layers.
        force: Whether to replace a dump that `output` holds.
        noise: Whether to compute the noise floor too.
        all_logits: Whether to write lm_head of all tokens, not of the last one alone.
        progress: Told each step, and how many bytes are written.

    Raises:
        QwenrefError: Something cannot be used; one line says what, and nothing is written.
    """
    arrange = layout_named(layout)
    checkpoint = Checkpoint(model)
    config = checkpoint.config
    layers = _existing(layers, config)
    if stages is None:
        whole = HEAD if layers[-1] == config.num_hidden_layers - 1 else ()
        stages = (*LAYER, *whole) if residual else (EMBEDDING, *LAYER, *whole)
    start = _start(checkpoint, layers[0], prompt, tokens, residual)
    if start.stream is not None and EMBEDDING in stages:
        raise QwenrefError("a run from --input has no stage embedding: name other --stages")
    first = 0 if start.stream is None else layers[0]
    plan = Plan(first, layers, stages, config.num_hidden_layers, all_logits)
    T = start.length(config.hidden_size)
    for layer in plan.run:
        config.refuse_window(layer, T)
    sizes = config.sizes | {"T": T, "S": T}
    planned = [stage for layer in layers for stage in plan.of_layer(layer)] + plan.of_model
    if not planned:
        raise QwenrefError("nothing to write: embedding is a stage of layer 0")
    _refuse_uncountable(planned, sizes)
    check_tensors(checkpoint, plan.tensors(checkpoint, embedding=start.stream is None))
    output = output or Path(f"{checkpoint.name}-qwenref")

    with (
        computing(dtype, device) as (precision, taken),
        new_dump(output, force=force) as folder,
    ):
        progress.step(f"reading the weights of layer {first}")
        if start.stream is None:
            rows, rows_print = read_embedding(checkpoint, start.tokens)
        else:
            rows, rows_print = start.stream.values.reshape(T, -1), None
        forward = Forward(checkpoint, plan, rows, precision)
        dumping = _Dumping(folder, sizes, arrange, progress)
        progress.step("compiling")
        progress.expect(sum(_count(stage, sizes) for stage in planned) * VALUE.itemsize)
        attentions, feed_forwards, biases = {}, {}, False
        floors = NoiseFloors(config, T)
        noises: dict[str, StageNoise] = {}
        for read, stream, pieces in forward.layers():
            dumping.write(read.number, pieces)
            name = str(read.number)
            attentions[name] = read.attention_print
            if read.feed_forward_print is not None:
                feed_forwards[name] = read.feed_forward_print
            biases |= read.attention.q_bias is not None
            needed = [stage for stage in plan.needed(read.number) if stage != EMBEDDING]
            if noise and needed:
                progress.step(f"computing the noise floor of layer {read.number}")
                found = floors.of_layer(read.attention, read.feed_forward, stream, needed)
                noises |= {
                    manifest.floor_name(read.number, stage.name): found[stage.name]
                    for stage in plan.of_layer(read.number)
                    if stage.name in found
                }
        final_norm_print = head_print = None
        if plan.of_model:
            norm, final_norm_print, matrix, pieces = forward.head()
            dumping.write(None, pieces)
            head_print = None if matrix is None else matrix.fingerprint
            if noise:
                sample = None if matrix is None else np.concatenate(matrix.sample)
                found = floors.of_head(norm, sample, forward.stream, last=not all_logits)
                noises |= {stage.name: found[stage.name] for stage in plan.of_model}
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
                layers=attentions,
                embedding=rows_print,
                biases=biases,
                feed_forwards=feed_forwards,
                final_norm=final_norm_print,
                lm_head=head_print,
            ),
            stages=[stage.file for stage in dumping.written],
            noise=manifest.Noise(floors.positions.tolist(), noises) if noises else None,
        )
    return Captured(output, made, dumping.written, T)


class _Dumping:
    """The files of a dump, layer after layer."""

    def __init__(self, folder: Path, sizes: Mapping[str, int], arrange: Layout, progress: Progress):
        self._folder, self._sizes, self._arrange = folder, sizes, arrange
        self._progress = progress
        self.written: list[Written] = []

    def write(self, layer: int | None, pieces: Iterable[Piece]) -> None:
        """Write the stages of a layer, or of the whole model."""
        where = "" if layer is None else f" of layer {layer}"
        with ExitStack() as files:
            writers: dict[Stage, StageWriter] = {}
            for stage, first, values, channel in pieces:
                self._progress.step(f"writing {stage.name}{where}")
                if stage not in writers:
                    writer = StageWriter(self._folder, layer, stage, self._sizes, self._arrange)
                    writers[stage] = files.enter_context(writer)
                writers[stage].write(values, first, channel)
                self._progress.advance(values.size * VALUE.itemsize)
            self.written += [writer.finish() for writer in writers.values()]


def _existing(layers: Sequence[int] | None, config: Config) -> Sequence[int]:
    if layers is None:
        return range(config.num_hidden_layers)
    beyond = [layer for layer in layers if layer >= config.num_hidden_layers]
    if beyond:
        raise QwenrefError(
            f"layer {beyond[0]} does not exist: the checkpoint has {config.num_hidden_layers} "
            "layers, counted from 0"
        )
    return layers


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
