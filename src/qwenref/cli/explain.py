"""`qwenref explain`: parse, call one function, print."""

import os
from pathlib import Path
from typing import Annotated

import typer

from qwenref.cli.shared import print_whole, ready_for_jax, shown_progress
from qwenref.interrupts import Interrupts


def explain(
    dump: Annotated[Path, typer.Argument(metavar="DUMP", help="The engine's dump directory.")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint that the engine ran. Without it only what needs no weights is judged."
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What it ran. Default: its manifest, What is 2+2?"),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="IDS|@FILE", help="Token ids instead: 3838,374,220 or @FILE."),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(metavar="DUMP", help="Try this one too: is it the one that is wrong?"),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            metavar="N|A..B|A,B|all", help="Which layers; all: the final norm and lm_head too."
        ),
    ] = "0",
    names: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.json|llama.cpp|hf", help="Translate another engine's names of stages."
        ),
    ] = None,
    exact_weights: Annotated[
        bool, typer.Option("--exact-weights", help="Rounded (quantised) weights are a fault.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not seek mistakes below the noise of rounding.")
    ] = False,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|gpu", help="What to compute on.")
    ] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the last lines.")] = False,
) -> int:
    """Say from an engine's own dumps which stage is wrong, and how precisely it computes.

    Exit status: 0 none is, 1 one is, 2 neither can be said.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # threads take longer to start than to help
    with ready_for_jax(device), Interrupts() as interrupts:
        # not interrupted: an exception in the midst of an import may be lost, or crash it
        from qwenref.model.tokens import parse_tokens
        from qwenref.stages import parse_layers
        from qwenref.trial import explain as explaining
        from qwenref.trial.layer_words import layers_report
        from qwenref.trial.words import last_lines, report

        with interrupts.let_through(), shown_progress(quiet) as progress:
            wanted = parse_layers(layers)
            asked = {
                "model": model,
                "prompt": prompt,
                "tokens": None if tokens is None else parse_tokens(tokens),
                "reference": reference,
                "names": names,
                "exact_weights": exact_weights,
                "quick": quick,
                "device": device,
                "progress": progress.step,
            }
            if wanted is not None and len(wanted) == 1:
                answer = explaining.explain(dump, layer=wanted[0], **asked)
                shown = report(answer)
            else:
                answer = explaining.explain_layers(dump, layers=wanted, **asked)
                shown = layers_report(answer)
    if quiet:
        shown = "\n".join(last_lines(answer))
    print_whole(answer.to_json() if json else shown, json=json)
    return answer.exit_status
