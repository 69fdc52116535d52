"""`qwenref diff`: parse, call one function, print."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from qwenref.cli.shared import print_whole, shown_progress
from qwenref.errors import QwenrefError


def diff(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B [C]",
            help="Dump directories or single files; or one FILE.json that --save wrote.",
        ),
    ],
    stages: Annotated[
        str,
        typer.Option(
            metavar="all|attention|mlp|residual|A,B",
            help="Stages to compare: a group as of capture, or any names and groups; in a list "
            "attention is the stage.",
        ),
    ] = "all",
    layers: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="0, or 0,1 or 0..4 (without 4). Default: all."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="Hold the comparison to float32, float16 or bfloat16. auto: to the finest that "
            "explains each stage.",
        ),
    ] = "auto",
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[STAGE=]X", help="Accept a relative L2 of X instead of the noise floor."
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.json|llama.cpp|hf", help="Translate another engine's names of stages."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint directory or config.json: shapes, if no dump has a manifest, and how "
            "many layers there are."
        ),
    ] = None,
    heads: Annotated[int | None, typer.Option(metavar="N", help="Instead of --model.")] = None,
    kv_heads: Annotated[int | None, typer.Option(metavar="K", help="Likewise.")] = None,
    head_dim: Annotated[int | None, typer.Option(metavar="H", help="Likewise.")] = None,
    hidden: Annotated[int | None, typer.Option(metavar="D", help="Likewise.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="How many of the largest differences.")] = 10,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Keep what was measured, to judge it again."),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Accept stages that cannot be judged.")
    ] = False,
    allow_different_weights: Annotated[
        bool, typer.Option("--allow-different-weights", help="Compare all the same.")
    ] = False,
    strict_layout: Annotated[
        bool,
        typer.Option(
            "--strict-layout", help="Another order of axes or convention is a difference."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict only.")] = False,
) -> int:
    """Say whether dumps agree, at which precision, else at which stage they differ first.

    Exit status: 0 they agree, 1 they differ, 2 neither can be said.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads take longer to start than to help
    from qwenref.judge import measurement as measured
    from qwenref.judge.asked import asked_stages, group
    from qwenref.judge.diff import measure_sources, rules_from, sizes_of
    from qwenref.judge.measure import Options
    from qwenref.judge.report import last_line, report
    from qwenref.judge.summary import judge
    from qwenref.stages import GROUPS, parse_layers

    tolerances = _tolerances(tolerance or [])
    chosen_stages = None
    if (spec := stages.strip()) != "all":
        chosen_stages = [group(spec)] if spec in GROUPS else asked_stages(_names(stages))
    chosen_layers = None if layers is None else parse_layers(layers)
    sizes = None if model is None else sizes_of(model)
    options = Options(
        sizes=_sizes(heads, kv_heads, head_dim, hidden, sizes),
        stages=chosen_stages,
        layers=chosen_layers,
        limit=max(1, limit),
        strict_layout=strict_layout,
        allow_different_weights=allow_different_weights,
    )
    if len(paths) == 1:
        if paths[0].is_dir():
            raise QwenrefError(f"{paths[0]} alone: give two or three dumps to compare")
        found = measured.read_measurement(paths[0])
        of_dumps = options._replace(stages=None, layers=None)
        if names or save or of_dumps != Options(limit=options.limit):
            raise QwenrefError(
                "a saved measurement can be judged with another --dtype, --tolerance, "
                "--allow-missing, --stages, --layers or --limit; all else takes the dumps"
            )
        found = measured.selected(found, chosen_stages, chosen_layers)
    else:
        with shown_progress(quiet) as progress:
            found = measure_sources(*paths, names=names, options=options, progress=progress)
    if save:
        measured.save_measurement(found, save)
    result = judge(found, rules_from(dtype, tolerances, allow_missing, found))
    if json:
        text = result.to_json(limit)
    elif quiet:
        text = last_line(result)
    else:
        terminal = sys.stdout is not None and sys.stdout.isatty()
        color = terminal and not os.environ.get("NO_COLOR")
        text = report(result, limit=limit, color=color)
    print_whole(text, json=json)
    return result.exit_status


def _tolerances(given: list[str]) -> dict[str | None, float]:
    """Return tolerances by stage, None standing for all others."""
    tolerances: dict[str | None, float] = {}
    for spec in given:
        stage, equals, number = spec.rpartition("=")
        try:
            if bool(stage) != bool(equals) or "=" in stage:
                raise ValueError
            tolerances[stage or None] = float(number)
        except ValueError:
            raise QwenrefError(f"--tolerance {spec!r}: give X or STAGE=X, like 1e-5") from None
    return tolerances


def _names(stages: str) -> list[str]:
    names = [name.strip() for name in stages.split(",")]
    if not all(names):
        raise QwenrefError(f"--stages {stages!r} has an empty name")
    return names


def _sizes(
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
    hidden: int | None,
    of_model: dict[str, int] | None,
) -> dict[str, int] | None:
    """Return N, K, H, D from the flags, or from the model."""
    given = {"N": heads, "K": kv_heads, "H": head_dim, "D": hidden}
    sizes = {letter: size for letter, size in given.items() if size is not None}
    if not sizes:
        return of_model
    if of_model is not None:
        raise QwenrefError("--model says the sizes already: leave --heads and the others out")
    if len(sizes) < len(given) or min(sizes.values()) < 1:
        raise QwenrefError("give all of --heads, --kv-heads, --head-dim and --hidden, each above 0")
    if sizes["N"] % sizes["K"]:
        raise QwenrefError(f"--heads {heads} is not a multiple of --kv-heads {kv_heads}")
    return sizes
