"""`qwenref capture`: parse, call one function, print."""

from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Annotated

import typer

from qwenref.cli.shared import ready_for_jax, shown_progress
from qwenref.errors import printable
from qwenref.interrupts import Interrupts

if TYPE_CHECKING:
    from qwenref.capture import Captured


def capture(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint directory, or one .safetensors file with config.json beside it. "
            "Default: the tiny checkpoint that comes with qwenref."
        ),
    ] = None,
    layers: Annotated[
        str, typer.Option(metavar="SPEC", help="0, or 0,1 or 0..4 (without 4); see --input.")
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
        str, typer.Option(metavar="all|A,B", help="Stages to write; also: embedding.")
    ] = "all",
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
            help="APRT file [T, D] with the residual stream that enters the one layer of "
            "--layers, which may then be any.",
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
    json: Annotated[bool, typer.Option("--json", help="Print the manifest, as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No table, no progress.")] = False,
) -> None:
    """Write the stages of one layer's attention as APRT files, with a manifest."""
    with (
        ready_for_jax(device),
        shown_progress(quiet) as progress,
        Interrupts() as interrupts,
    ):
        # not interrupted: an exception in the midst of an import may be lost, or crash it
        from qwenref import capture as capturing
        from qwenref.bundled import tiny_checkpoint
        from qwenref.model.tokens import parse_tokens
        from qwenref.stages import parse_layers, parse_stages

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
                progress=progress,
            )
    for stage in done.written:
        if stage.nonfinite:
            found = f"{stage.file.stage} holds {stage.nonfinite} NaN or infinite values"
            typer.echo(f"qwenref: warning: {found}", err=True)
    if json:
        typer.echo(done.manifest.to_json(), nl=False)
    elif not quiet:
        typer.echo(_table(done, residual))


def _table(done: "Captured", residual: Path | None) -> str:
    """Return what was written, one line a stage."""
    made = done.manifest
    first = made.stages[0]
    T = first.shape[first.axes.split().index("T")]
    start = "" if made.prompt is None else f" of {short(made.prompt)}"
    start += "" if residual is None else f" entering from {residual}"
    title = f"{made.model}, layer {first.layer}, {T} tokens{start}, {made.dtype} on {made.device}"
    floors = {} if made.noise is None else made.noise.stages
    classes = ("float32", "float16", "bfloat16") if floors else ()
    rows = [("stage", "shape", "rms", *classes, f"file in {done.directory}")]
    for stage in done.written:
        floor = floors.get(stage.file.stage)
        errors = [floor and floor.accumulated[name].whole for name in classes]
        normal = ["-" if error is None else f"{error:.1e}" for error in errors]
        file = stage.file
        rows.append((file.stage, str(file.shape), f"{stage.rms:.3e}", *normal, file.file))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if floors:
        lines.append(
            f"{', '.join(classes)}: how large a relative L2 error is normal there, for this prompt"
        )
    return "\n".join(printable(line) for line in lines)
