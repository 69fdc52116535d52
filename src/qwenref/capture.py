"""From a checkpoint and a prompt to a dump directory: what `qwenref capture` does."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import msgspec
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
from qwenref.forward import EnteredHead, EnteredLayer, Forward, Plan
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.tokens import DEFAULT_PROMPT, check_tokens, encode
from qwenref.model.weights import check_tensors, read_embedding
from qwenref.noise import NoiseFloors
from qwenref.oracle import computing
from qwenref.progress import SILENT, Progress
from qwenref.stages import ALL, ATTENTION, EMBEDDING, GROUPS, HEAD, LAYER, LEAVING, Stage

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
        stages: What to write of each of them; the embedding if layer 0 is one of them, and no
            `residual` given. For stages of the whole model all layers are run, whichever are
            written. None for all that these layers have, with those of the whole model if the last
            layer is one of them.
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
        stages = (EMBEDDING, *LAYER, *whole)
    start = _start(checkpoint, layers[0], prompt, tokens, residual)
    if start.stream is not None and layers[0] == 0:
        stages = _without_embedding(stages)
    first = 0 if start.stream is None else layers[0]
    plan = Plan(first, layers, stages, config.num_hidden_layers, all_logits)
    T = start.length(config.hidden_size)
    for layer in plan.run:
        config.refuse_window(layer, T)
    sizes = config.sizes | {"T": T, "S": T}
    planned = [stage for layer in layers for stage in plan.of_layer(layer)] + plan.of_model
    if not planned:
        raise QwenrefError("nothing to write: embedding is a stage of layer 0; name other --stages")
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
        floors = NoiseFloors(config, T) if noise else None
        weights = manifest.Weights({}, rows_print, biases=False)
        dumping = _Dumping(folder, sizes, arrange, plan, floors, weights, progress)
        progress.step("compiling")
        progress.expect(sum(_count(stage, sizes) for stage in planned) * VALUE.itemsize)
        for layer in forward.layers():
            dumping.write_layer(layer)
        if plan.of_model:
            dumping.write_head(forward.head(), forward.stream)
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
            weights=dumping.weights,
            stages=[stage.file for stage in dumping.written],
            noise=dumping.noise,
        )
    return Captured(output, made, dumping.written, T)


class _Dumping:
    """The files of a dump, layer after layer, and what its manifest says of their making.

    Attributes:
        written: The files.
        weights: Fingerprints of what was read.
    """

    def __init__(
        self,
        folder: Path,
        sizes: Mapping[str, int],
        arrange: Layout,
        plan: Plan,
        floors: NoiseFloors | None,
        weights: manifest.Weights,
        progress: Progress,
    ):
        self._folder, self._sizes, self._arrange = folder, sizes, arrange
        self._plan, self._floors, self._progress = plan, floors, progress
        self.written: list[Written] = []
        self.weights = weights
        self._noises: dict[str, StageNoise] = {}

    @property
    def noise(self) -> manifest.Noise | None:
        """The noise floor of each stage, if it was computed of any."""
        if self._floors is None or not self._noises:
            return None
        return manifest.Noise(self._floors.positions.tolist(), self._noises)

    def write_layer(self, layer: EnteredLayer) -> None:
        """Compute and write the stages of a layer."""
        read, stream, pieces = layer
        self._write(read.number, pieces)
        name, made = str(read.number), self.weights
        feed_forwards = {} if read.feed_forward_print is None else {name: read.feed_forward_print}
        self.weights = msgspec.structs.replace(
            made,
            layers=made.layers | {name: read.attention_print},
            feed_forwards=made.feed_forwards | feed_forwards,
            biases=made.biases or read.attention.q_bias is not None,
        )
        needed = [stage for stage in self._plan.needed(read.number) if stage != EMBEDDING]
        if self._floors is not None and needed:
            self._progress.step(f"computing the noise floor of layer {read.number}")
            found = self._floors.of_layer(read.attention, read.feed_forward, stream, needed)
            self._noises |= {
                manifest.floor_name(read.number, stage.name): found[stage.name]
                for stage in self._plan.of_layer(read.number)
                if stage.name in found
            }

    def write_head(self, head: EnteredHead, stream: np.ndarray) -> None:
        """Compute and write the stages of the whole model, which a stream enters."""
        self._write(None, head.pieces)
        matrix_print = None if head.matrix is None else head.matrix.fingerprint
        self.weights = msgspec.structs.replace(
            self.weights, final_norm=head.norm_print, lm_head=matrix_print
        )
        if self._floors is not None:
            sample = None if head.matrix is None else np.concatenate(head.matrix.sample)
            last = not self._plan.all_logits
            found = self._floors.of_head(head.norm, sample, stream, last=last)
            self._noises |= {stage.name: found[stage.name] for stage in self._plan.of_model}

    def _write(self, layer: int | None, pieces: Iterable[Piece]) -> None:
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


def _without_embedding(stages: Collection[Stage]) -> list[Stage]:
    """Return the stages of a run whose embedding is given, and therefore not written.

    Raises:
        QwenrefError: It was asked for, and not only as one of the group ``residual``.
    """
    if EMBEDDING in stages and not {*GROUPS["residual"]} <= {*stages}:
        raise QwenrefError("--input is the embedding itself: leave embedding out of --stages")
    return [stage for stage in stages if stage != EMBEDDING]


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
