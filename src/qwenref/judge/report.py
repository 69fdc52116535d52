"""A result as text: what `qwenref diff` prints."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from qwenref.errors import printable
from qwenref.judge.floors import AFTER_SOFTMAX
from qwenref.judge.measurement import LETTERS
from qwenref.judge.result import Result, StageResult
from qwenref.judge.slices import describe

WIDTH = 100

_COUNT = re.compile(r": [0-9]+ stages?( \(generic floor[^)]*\))?")
"""What a line that is too long can do without, since the table says it."""

MOST_LAYERS = 4
"""Of more, a map is shown, and the stages of one of them."""

MOST_PLACES = 30

TICK = 10

_SIGNS = {"agree": ".", "differ": "D", "unmeasured": "?", "blind": "?"}
_STYLES = {"agree": "32", "differ": "31", "unmeasured": "33", "blind": "33"}
_COLUMNS = ("stage", "status", "rel L2", "floor", "ratio", "worst slice")
_GENERIC_FROM = ("attn_scores", *AFTER_SOFTMAX)


def report(result: Result, *, limit: int = 10, color: bool = False) -> str:
    """Return the whole report; its last line is the verdict.

    Args:
        result: What to report.
        limit: How many of the largest differences of the first divergence to show.
        color: Whether statuses are in colour.
    """
    lines = [*_head(result), "", *_table(result, color), *_largest(result, limit), ""]
    lines += [line for note in result.notes for line in _wrapped(f"note: {note}")]
    lines.append(last_line(result))
    return "\n".join(lines) if result.stages else "\n".join([*_head(result), lines[-1]])


def last_line(result: Result) -> str:
    """Return the verdict in words."""
    separator = ", " if result.reason.startswith(("at ", "within ")) else ": "
    line = printable(f"{result.verdict.upper()}{separator}{result.reason}")
    return line if len(line) <= WIDTH else _COUNT.sub("", line)


def _head(result: Result) -> Iterator[str]:
    for letter, path, made_by in zip(LETTERS, result.paths, result.made_by, strict=False):
        yield printable(f"{letter}  {path}  ({made_by or 'no manifest'})")


def _table(result: Result, color: bool) -> Iterator[str]:
    measured = [s for s in result.stages if s.required or s.dim_product is not None]
    layers = sorted({stage.layer for stage in measured if stage.layer is not None})
    stages = measured
    if len(layers) > MOST_LAYERS:
        yield from _map(measured, layers)
        stages = _of_one_layer(result, measured)
    several = len({stage.layer for stage in stages}) > 1 or len(layers) > 1
    rows = [_row(stage) for stage in stages]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    yield _line(_COLUMNS, widths)
    shown: object = ()
    for stage, row in zip(stages, rows, strict=True):
        if several and stage.layer != shown:
            shown = stage.layer
            yield "whole model" if shown is None else f"layer {shown}"
        line = _line(row, widths)
        if color:
            painted = f"\x1b[{_STYLES[stage.status]}m{row[1]}\x1b[0m"
            line = line.replace(row[1], painted, 1)
        yield line
        yield from (f"    {line}" for note in _remarks(stage) for line in _wrapped(note))
    alone = [stage for stage in result.stages if stage not in measured]
    if alone:
        yield from _wrapped(f"not in all of them: {', '.join(_places(alone))}")


def _map(stages: Sequence[StageResult], layers: Sequence[int]) -> Iterator[str]:
    """Yield a line for each stage, with a sign for each layer."""
    of = {(stage.stage, stage.layer): _SIGNS[stage.status] for stage in stages}
    names = dict.fromkeys(stage.stage for stage in stages if stage.layer is not None)
    width = max(map(len, names))
    ticks = (f"{layer:<{TICK}}" for layer in layers[::TICK])
    yield f"{'layer':<{width}}  {''.join(ticks)}".rstrip()
    for name in names:
        signs = "".join(of.get((name, layer), " ") for layer in layers)
        yield f"{printable(name):<{width}}  {signs}".rstrip()
    yield from ("  . agrees   D differs   ? cannot be said", "")


def _of_one_layer(result: Result, stages: Sequence[StageResult]) -> list[StageResult]:
    """Return the stages of the whole model, and of the layer that differs first, else most."""
    first = result.first_divergence
    worst = max(stages, key=lambda stage: (stage.layer is not None, stage.ratio or 0))
    layer = worst.layer if first is None or first.layer is None else first.layer
    return [stage for stage in stages if stage.layer in (layer, None)]


def _places(stages: Sequence[StageResult]) -> Iterator[str]:
    """Yield stages with their layers; of many, how many layers."""
    names = Counter(stage.stage for stage in stages)
    if len(stages) <= MOST_PLACES:
        yield from map(_place, stages)
        return
    for name, layers in names.items():
        yield name if layers == 1 else f"{name} of {layers} layers"


def _place(stage: StageResult) -> str:
    return stage.stage if stage.layer is None else f"{stage.layer}/{stage.stage}"


def _wrapped(text: str) -> list[str]:
    """Return a text in lines that fit."""
    return textwrap.wrap(printable(text), WIDTH - 4, break_on_hyphens=False)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(map(str.ljust, row, widths)).rstrip()[:WIDTH]


def _row(stage: StageResult) -> tuple[str, ...]:
    status = str(stage.status)
    if status == "agree" and stage.floor_origin == "generic" and stage.stage in _GENERIC_FROM:
        status = "agree (generic)"
    if not stage.required:
        status = f"({stage.status})"
    worst = ""
    if stage.worst is not None and stage.rel_l2 != 0:
        times = _floors(stage.worst.ratio, stage.worst.value)
        worst = f"{describe(stage.worst)} ({times} floors)"
    elif stage.rel_l2 == 0:
        worst = "the same values"
    measured = stage.dim_product is not None
    return (
        printable(stage.stage),
        status,
        _number(stage.rel_l2, measured),
        _number(stage.floor, False),
        _floors(stage.ratio, stage.rel_l2) if measured and stage.floor is not None else "-",
        worst,
    )


def _number(value: float | None, measured: bool) -> str:
    if value is None:
        return "inf/NaN" if measured else "-"
    return f"{value:.1e}" if value else "0"


def _floors(ratio: float | None, value: float | None) -> str:
    """Return a number of floors."""
    if ratio is None:
        return "inf" if value is None or value else "-"
    return f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}" if ratio < 1e5 else f"{ratio:.0e}"


def _remarks(stage: StageResult) -> Iterator[str]:
    if stage.reason is not None and stage.status != "agree":
        yield stage.reason
    if stage.odd_one_out is not None:
        yield f"{LETTERS[stage.odd_one_out]} is the odd one out"
    yield from stage.notes


def _largest(result: Result, limit: int) -> Iterator[str]:
    """Yield the largest differences at the first divergence."""
    first = result.first_divergence
    stage = next(
        (s for s in result.stages if first and (s.layer, s.stage) == (first.layer, first.stage)),
        None,
    )
    if stage is None or not stage.max_abs_diff or not limit:
        return
    yield ""
    where = ""
    if stage.max_abs_diff_at is not None:
        token, head, value = stage.max_abs_diff_at
        where = f" (first: token {token}, head {head}, value {value})"
    yield f"largest differences in {printable(stage.stage)}, by index in a{where}"
    yield f"{'index':>12}{'a':>16}{'b':>16}{'|a - b|':>12}"
    for top in stage.top_diffs[:limit]:
        yield f"{top.index:>12}{top.a:>16.8g}{top.b:>16.8g}{top.abs_diff:>12.3g}"
