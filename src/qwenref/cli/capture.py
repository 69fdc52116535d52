"""`qwenref capture`: parse, call one function, print."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Annotated

import typer

from qwenref.cli.shared import ready_for_jax, shown_progress
from qwenref.errors import printable
from qwenref.interrupts import Interrupts

if TYPE_CHECKING:
    from qwenref.capture import Captured
    from qwenref.dumps.tree import Written


def capture(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint directory, or one .safetensors file with config.json beside it. "
            "Default: the tiny checkpoint that comes with qwenref."
        ),
    ] = None,
    layers: Annotated[
        str, typer.Option(metavar="SPEC", help="0, or 0,5 or 0..4 (without 4), or all.")
    ] = "0",
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text to tokenize, as it is. Default: What is 2+2?"),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="IDS|@FILE", help="Token ids instead: 3838,374,220 or @FILE."),
    ] = None,
    stages: Annotated[
        str,
        typer.Option(
            metavar="GROUPS|A,B",
            help="Stages to write: attention, mlp, residual, all, or names, as final_norm,lm_head.",
        ),
    ] = "attention",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="float32, float64; bfloat16, float16: rounding where transformers rounds.",
        ),
    ] = "float32",
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|gpu", help="What to compute on.")
    ] = "auto",
    layout: Annotated[
        str,
        typer.Option(
            metavar="apr|hf",
            help="apr: as `apr trace` writes. hf: q and k head-major, scores unmasked.",
        ),
    ] = "apr",
    residual: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="APRT file [T, D] with the residual stream that enters the first of --layers; "
            "the run begins there.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Dump directory. Default: NAME-qwenref, here."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a dump of qwenref that is already there.")
    ] = False,
    no_noise: Annotated[
        bool, typer.Option("--no-noise", help="Do not compute how much error is normal.")
    ] = False,
    logits: Annotated[
        str, typer.Option(metavar="last|all", help="Of which tokens to write lm_head.")
    ] = "last",
    json: Annotated[bool, typer.Option("--json", help="Print the manifest, as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No table, no progress.")] = False,
) -> None:
    """Write the stages of attention, or of whole layers, as APRT files, with a manifest."""
    with (
        ready_for_jax(device),
        shown_progress(quiet) as progress,
        Interrupts() as interrupts,
    ):
        # not interrupted: an exception in the midst of an import may be lost, or crash it
        from qwenref import capture as capturing
        from qwenref.bundled import tiny_checkpoint
        from qwenref.model.tokens import parse_tokens
        from qwenref.stages import parse_layers, parse_logits, parse_stages

        with interrupts.let_through():
            done = capturing.capture(
                model or tiny_checkpoint(),
                output,
                layers=parse_layers(layers),
                prompt=prompt,
                tokens=None if tokens is None else parse_tokens(tokens),
                stages=parse_stages(stages),
                dtype=dtype,
                device=device,
                layout=layout,
                residual=residual,
                force=force,
                noise=not no_noise,
                all_logits=parse_logits(logits),
                progress=progress,
            )
    for stage in done.written:
        if stage.nonfinite:
            found = f"{stage.file.file} holds {stage.nonfinite} NaN or infinite values"
            typer.echo(f"qwenref: warning: {found}", err=True)
    if json:
        typer.echo(done.manifest.to_json(), nl=False)
    elif not quiet:
        typer.echo(_table(done, residual))


def _table(done: "Captured", residual: Path | None) -> str:
    """Return what was written: one line a stage, of all layers together."""
    from qwenref.dumps.manifest import floor_name

    made = done.manifest
    layers = sorted({stage.layer for stage in made.stages if stage.layer is not None})
    start = "" if made.prompt is None else f" of {short(made.prompt)}"
    start += "" if residual is None else f" entering from {residual}"
    where = f"{_layers(layers)}, {done.length} tokens{start}"
    title = f"{made.model}, {where}, {made.dtype} on {made.device}"
    floors = {} if made.noise is None else made.noise.stages
    classes = ("float32", "float16", "bfloat16") if floors else ()
    rows = [("stage", "shape", "rms", *classes, f"file in {done.directory}")]
    for of in _by_name(done.written):
        known = [floors.get(floor_name(stage.file.layer, stage.file.stage)) for stage in of]
        normal = [
            _largest([floor.accumulated[name].whole for floor in known if floor is not None])
            for name in classes
        ]
        file, *others = [stage.file for stage in of]
        path = f"layer-*/{file.stage}.bin" if others else file.file
        ends = (f"{end(stage.rms for stage in of):.3e}" for end in (min, max))
        rms = " to ".join(dict.fromkeys(ends))
        rows.append((file.stage, str(file.shape), rms, *normal, path))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if floors:
        where = "there" if len(layers) < 2 else "in the layer where it is largest"
        normal = f"how large a relative L2 error is normal {where}, for this prompt"
        lines.append(f"{', '.join(classes)}: {normal}")
    return "\n".join(printable(line) for line in lines)


def _layers(layers: Sequence[int]) -> str:
    if not layers:
        return "the whole model"
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == [*range(layers[0], layers[-1] + 1)]:
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"


def _by_name(written: "Iterable[Written]") -> "list[list[Written]]":
    """Return the files of each stage, in the order of the stages."""
    grouped: dict[str, list[Written]] = {}
    for stage in written:
        grouped.setdefault(stage.file.stage, []).append(stage)
    return list(grouped.values())


def _largest(errors: Sequence[float | None]) -> str:
    """Return the largest of the errors that are normal in several layers."""
    known = [error for error in errors if error is not None]
    return f"{max(known):.1e}" if known and len(known) == len(errors) else "-"
