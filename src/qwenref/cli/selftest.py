"""`qwenref selftest`: parse, call, print."""

import os
from typing import Annotated

import typer

from qwenref.cli.shared import ready_for_jax, shown_progress
from qwenref.interrupts import Interrupts


def selftest(
    full: Annotated[
        bool, typer.Option("--full", help="All shapes, lengths and precisions: hours.")
    ] = False,
    every: Annotated[
        int, typer.Option(min=1, metavar="N", help="Plant every Nth mistake only, to be done soon.")
    ] = 1,
) -> int:
    """Plant every known mistake in a random model, and see whether explain finds and names it.

    Exit status: 0 all is found, and named as far as is promised; 1 not.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with ready_for_jax("cpu"), Interrupts() as interrupts:
        from qwenref.selftest import (
            DEEP,
            LAYERS,
            PROMISED,
            cells,
            outcomes_in,
            outcomes_in_depth,
            score_of,
        )

        with interrupts.let_through():
            found, met = [], True
            rows = [(str(cell), cell.dtype, outcomes_in(cell, every)) for cell in cells(full=full)]
            in_depth = outcomes_in_depth(every=every)
            rows.append((f"{LAYERS} layers, two mistakes each", DEEP.dtype, in_depth))
            typer.echo(f"{'':56}visible  found  named  invisible  hidden  false alarms")
            for name, dtype, outcomes in rows:
                here = []
                with shown_progress(quiet=False) as progress:
                    for of in outcomes:
                        here.append(of)
                        progress.step(f"{name}: {of.plant}")
                found += here
                score = score_of(here)
                met = met and score.meets(PROMISED[dtype])
                typer.echo(
                    f"{name:56}{score.visible:7}{score.localised:7}{score.named:7}"
                    f"{score.invisible:11}{score.hidden:8}{score.false_alarms:14}"
                )
                for of in here:
                    if of.localised and (of.named or not (of.visible or of.hidden)):
                        continue
                    what = "named otherwise" if of.localised else "found otherwise"
                    typer.echo(f"    {what}: {of.plant}; said: {of.said or 'nothing'}")
    planted = {str(of.plant) for of in found if of.plant.stages}
    for plant in sorted(planted - {str(of.plant) for of in found if of.visible}):
        typer.echo(f"    invisible everywhere here: {plant}")
    typer.echo(
        "As many mistakes are found and named as is promised."
        if met
        else "Fewer mistakes are found or named than is promised."
    )
    return int(not met)
