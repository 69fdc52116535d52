"""`qwenref diff` for Python: compare dumps, get the result as data, or assert that they agree."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from qwenref.dumps.naming import names_from
from qwenref.dumps.reading import Source, read_dump
from qwenref.errors import QwenrefError
from qwenref.files import reason
from qwenref.judge.asked import asked_stages
from qwenref.judge.floors import PRECISIONS
from qwenref.judge.measure import Options, measure
from qwenref.judge.measurement import Measurement
from qwenref.judge.report import report
from qwenref.judge.result import Result
from qwenref.judge.summary import judge
from qwenref.judge.verdict import Rules
from qwenref.model.config import read_config
from qwenref.progress import SILENT, Progress


def diff(
    *sources: Source,
    stages: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    dtype: str = "auto",
    tolerance: float | int | Mapping[str | None, float] | None = None,
    names: str | Path | None = None,
    model: str | Path | None = None,
    limit: int = 10,
    allow_missing: bool = False,
    allow_different_weights: bool = False,
    strict_layout: bool = False,
) -> Result:
    """Compare two or three dumps.

    Args:
        sources: Dump directories, single files, arrays by stage name, or what `qwenref.run`
            returns.
        stages: Names of stages to compare, or of groups as of ``qwenref capture --stages``, but
            that ``attention`` is the stage; default all.
        layers: Layers to compare; default all.
        dtype: The precision they are held to: ``float32``, ``float16`` or ``bfloat16``; ``auto``
            finds the finest that explains each stage.
        tolerance: Relative L2 that is accepted instead of the noise floor; of all stages, or by
            stage, None standing for all others.
        names: A JSON file from another engine's names to stages, or ``llama.cpp`` or ``hf``.
        model: A checkpoint directory or its config.json, for the shapes, if no dump has a manifest,
            and for how many layers there are.
        limit: How many of the largest differences to keep.
        allow_missing: Whether stages that cannot be judged are accepted.
        allow_different_weights: Whether dumps of different weights are compared.
        strict_layout: Whether another order of axes, or another convention, is a difference.

    Raises:
        QwenrefError: Something cannot be read or used; one line says what.
    """
    measurement = measure_sources(
        *sources,
        names=names,
        options=Options(
            sizes=None if model is None else sizes_of(Path(model)),
            stages=None if stages is None else asked_stages(stages),
            layers=None if layers is None else [*layers],
            limit=limit,
            strict_layout=strict_layout,
            allow_different_weights=allow_different_weights,
        ),
    )
    return judge(measurement, rules_from(dtype, tolerance, allow_missing, measurement))


def assert_stages_close(*sources: Source, **options: object) -> None:
    """Raise `AssertionError`, whose text is the report, unless dumps agree.

    Args:
        sources: As those of `diff`.
        options: As those of `diff`.

    Raises:
        AssertionError: They differ, or it cannot be said that they agree.
        QwenrefError: Something cannot be read or used; one line says what.
    """
    __tracebackhide__ = True
    result = diff(*sources, **options)  # pyright: ignore[reportArgumentType]
    if result.verdict != "agree":
        raise AssertionError("\n" + report(result))


def measure_sources(
    *sources: Source, names: str | Path | None, options: Options, progress: Progress = SILENT
) -> Measurement:
    """Read dumps and measure how far they are apart.

    Raises:
        QwenrefError: They cannot be read, or their number is not two or three.
    """
    if not 2 <= len(sources) <= 3:
        raise QwenrefError(f"give two or three dumps to compare, not {len(sources)}")
    if options.limit < 1:
        raise QwenrefError(f"the limit is {options.limit}; at least 1 is needed")
    translate = names_from(names)
    return measure([read_dump(source, translate) for source in sources], options, progress)


def rules_from(
    dtype: str,
    tolerance: float | int | Mapping[str | None, float] | None,
    allow_missing: bool,
    measurement: Measurement,
) -> Rules:
    """Return rules, checked against what they are for.

    Raises:
        QwenrefError: A precision does not exist or is given for three dumps, a tolerance is no
            positive number, or of a stage that was not compared.
    """
    if dtype not in ("auto", *PRECISIONS):
        raise QwenrefError(f"unknown dtype {dtype!r}; give auto, {', '.join(PRECISIONS)}")
    if dtype != "auto" and len(measurement.paths) > 2:
        raise QwenrefError(f"dtype {dtype} holds two dumps to a precision; leave it out with three")
    if tolerance is None:
        tolerances: Mapping[str | None, float] = {}
    else:
        tolerances = tolerance if isinstance(tolerance, Mapping) else {None: float(tolerance)}
    for value in tolerances.values():
        if not 0 <= value < float("inf"):
            raise QwenrefError(f"a tolerance is {value}; a relative L2 of 0 or more is needed")
    known = {stage.stage for stage in measurement.stages}
    unknown = sorted(stage for stage in tolerances if stage is not None and stage not in known)
    if unknown and measurement.incomparable is None:
        raise QwenrefError(f"a tolerance is for {unknown[0]}, which was not compared")
    return Rules(dtype, tolerances, allow_missing)


def sizes_of(model: Path) -> dict[str, int]:
    """Return N, K, H, D, I, V and L of a checkpoint directory, or of its config.json.

    Raises:
        QwenrefError: There is no such file, or it is no config of Qwen2.5.
    """
    try:
        config = read_config(model / "config.json" if model.is_dir() else model)
    except OSError as error:
        raise QwenrefError(f"cannot read {model}: {reason(error)}") from error
    return {letter: config.sizes[letter] for letter in "NKHDIV"} | {"L": config.num_hidden_layers}
