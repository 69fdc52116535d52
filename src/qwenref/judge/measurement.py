"""What was measured of two or three dumps: all that judging them takes, and nothing judged.

It can be saved, and judged again with other tolerances when the dumps are gone.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from qwenref.errors import QwenrefError
from qwenref.files import parse_json, read_bounded, write_whole
from qwenref.judge.asked import Asked, asked_for, chosen
from qwenref.metrics import Errors, heads_in
from qwenref.stages import BY_NAME

LETTERS = "abc"
"""What dumps are called in words."""

LIMIT = 1 << 28
"""Bytes; nine stages of 32,768 tokens take about 30 million."""

Narrow = Literal["bfloat16", "float16"]
Held = Literal["zero", "minimum", "values", "NaN"]
_Dump = Annotated[int, msgspec.Meta(ge=0, le=2)]


class TopDifference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the largest differences: index in the first array, as stored, and both values."""

    index: int
    a: float
    b: float
    abs_diff: float


class Nonfinite(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """NaN and infinite values, where cells count.

    Attributes:
        a: How many the first array has.
        b: How many the second has.
        differ: At how many places they are not the same infinity.
        first: Index of the first such place, in the first array as stored.
        token: Its token, if the shape is known.
        head: Its head, likewise.
    """

    a: int = 0
    b: int = 0
    differ: int = 0
    first: int | None = None
    token: int | None = None
    head: int | None = None


class Compared(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of two arrays as a whole; None where a number is not finite or has no meaning.

    Attributes:
        cells: How many pairs of values were compared.
        max_abs_diff: The largest difference; None if there is a NaN, or an infinity on one side.
        max_at: Its token, head, and number within the head.
        rms_diff: The root of the mean of squared differences.
        cosine_sim: Of the two, None if one of them is zero everywhere.
        norm_ratio: ||a|| / ||b||.
        total_variation: Of rows of probabilities: the worst row's.
        formats: Of each array the narrow format that all its values fit.
        nonfinite: NaN and infinite values; they are left out of all else.
        mask_like: Whether, in arrays of unknown shape, both have values that may be a mask's.
        masked: Of each array what its masked cells hold: ``zero``, ``minimum`` (-inf or near the
            least number of a dtype), ``values``, ``NaN``; None if it has none.
        top_diffs: The largest differences, the largest first.
    """

    cells: int
    max_abs_diff: float | None
    max_at: tuple[int, int, int] | None
    rms_diff: float | None
    cosine_sim: float | None
    norm_ratio: float | None
    total_variation: float | None
    formats: tuple[Narrow | None, Narrow | None]
    nonfinite: Nonfinite
    mask_like: bool
    masked: tuple[Held | None, Held | None]
    top_diffs: list[TopDifference]


class Logits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What lm_head of two dumps says of the next token.

    Attributes:
        tokens: Of how many tokens logits were compared: those that are finite in both.
        same: For how many of them both prefer the same next token.
        last: Which one each prefers after the last of them.
        top: How many of the likeliest were looked at.
        overlap: How many of these both have; at the token where that is least.
        divergence: Kullback-Leibler divergence of the softmaxes, in nats, in the direction and at
            the token where it is largest.
    """

    tokens: int
    same: int
    last: tuple[int, int]
    top: int
    overlap: int
    divergence: float


class Pair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage of two dumps.

    Attributes:
        a: Number of the first dump.
        b: Number of the second.
        problem: Why nothing was measured, else None.
        incomparable: Whether the problem is that they are not the same thing.
        count: How many values the first dump has.
        layout: How each of the two stores the stage; None if that is not known.
        unsure: What is doubtful about that, if anything.
        unscaled: Which of the two holds scores before 1/sqrt(H), if one does.
        slices: Which errors there are: of all slices, of those of the last token, or, of arrays
            whose shape is not known, of the whole and of elements.
        errors: Of those.
        element_at: Token and head of the worst element; None if the shape is not known.
        compared: The rest.
        logits: Of lm_head, what it says of the next token.
    """

    a: _Dump
    b: _Dump
    problem: str | None = None
    incomparable: bool = False
    count: int = 0
    layout: tuple[str, str] | None = None
    unsure: str | None = None
    unscaled: _Dump | None = None
    slices: Literal["all", "last", "flat"] = "all"
    errors: Errors | None = None
    element_at: tuple[int, int] | None = None
    compared: Compared | None = None
    logits: Logits | None = None


class StageMeasured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage of all dumps.

    Attributes:
        layer: Its layer, None for the whole model.
        stage: Its name.
        required: Whether the verdict depends on it.
        floors: How much error is normal, by precision, for slices of all tokens.
        origin: Where that is from.
        pairs: Every two dumps.
    """

    layer: int | None
    stage: str
    required: bool
    floors: dict[str, Errors]
    origin: Literal["manifest", "generic"]
    pairs: Annotated[list[Pair], msgspec.Meta(min_length=1, max_length=3)]


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file.

    Attributes:
        schema: Names this format.
        paths: Of the dumps.
        made_by: What their manifests say of them; None without one.
        sizes: N, K, H, D, I, V, L, T, as far as known.
        single: Whether single files were compared, not directories.
        strict_layout: Whether other orders of axes, and conventions, are differences.
        incomparable: Why the dumps are of different things, else None.
        warnings: What the user accepted.
        stages: In chain order.
    """

    schema: Literal["qwenref-measurement-v1"]
    paths: Annotated[list[str], msgspec.Meta(min_length=2, max_length=3)]
    made_by: list[str | None]
    sizes: dict[str, Annotated[int, msgspec.Meta(ge=1)]]
    single: bool
    strict_layout: bool
    incomparable: str | None
    warnings: list[str]
    stages: list[StageMeasured]


def read_measurement(path: Path) -> Measurement:
    """Read what `--save` wrote.

    Raises:
        QwenrefError: It is missing, or not that.
    """
    found = parse_json(path, read_bounded(path, LIMIT), Measurement)
    try:
        _check(found)
    except ValueError as error:
        raise QwenrefError(f"{path}: {error}") from error
    return found


def selected(
    measurement: Measurement, stages: Asked | None, layers: Collection[int] | None
) -> Measurement:
    """Return a measurement cut down to some stages and layers; None for all.

    Raises:
        QwenrefError: One of them was not measured.
    """
    of = {(stage.layer, stage.stage): stage for stage in measurement.stages}
    try:
        keys = chosen(of, stages, layers)
    except LookupError as error:
        raise QwenrefError(f"{error} was not measured") from error
    shared = {
        layer
        for (layer, _), stage in of.items()
        if all(pair.problem is None or pair.incomparable for pair in stage.pairs)
    }
    kept = [
        msgspec.structs.replace(
            of[key], required=of[key].required or asked_for(key, stages, layers, shared)
        )
        for key in keys
    ]
    return msgspec.structs.replace(measurement, stages=kept)


def save_measurement(measurement: Measurement, path: Path) -> None:
    """Write a measurement, to be judged again later; a file that exists is replaced.

    Raises:
        QwenrefError: It cannot be written; then nothing is left.
    """
    write_whole(path, msgspec.json.encode(measurement) + b"\n")


def _check(measurement: Measurement) -> None:
    """Raise `ValueError` if parts of a measurement do not fit each other."""
    dumps = len(measurement.paths)
    if len(measurement.made_by) != dumps:
        raise ValueError(f"it is of {dumps} dumps, made by {len(measurement.made_by)}")
    for stage in measurement.stages:
        pairs = [(pair.a, pair.b) for pair in stage.pairs]
        if pairs != pairs_of(dumps):
            raise ValueError(f"{stage.stage} has pairs {pairs} of {dumps} dumps")
        for pair in stage.pairs:
            _check_pair(stage, pair, measurement.sizes)


def _check_pair(stage: StageMeasured, pair: Pair, sizes: Mapping[str, int]) -> None:
    if pair.problem is not None:
        return
    if pair.errors is None or pair.compared is None:
        raise ValueError(f"{stage.stage} has neither errors nor a problem")
    if pair.unscaled not in (None, pair.a, pair.b):
        raise ValueError(f"{stage.stage} of {pair.a} and {pair.b} has {pair.unscaled} unscaled")
    found = _numbers(pair.errors)
    of_all, of_these = (0, 0, 0), (0, 0, 0)
    if pair.slices != "flat":
        row = BY_NAME.get(stage.stage)
        if row is None or not {"N", "K", "T"} <= sizes.keys() or pair.layout is None:
            raise ValueError(f"{stage.stage} has slices, and its shape is not known")
        of_all = len(row.blocks), heads_in(row, sizes), sizes["T"]
        of_these = (*of_all[:2], sizes["T"] if pair.slices == "all" else 1)
        heads = max(1, of_all[1])
        token, head = pair.element_at or (0, 0)
        if not (0 <= token < of_these[2] and 0 <= head < heads):
            raise ValueError(f"{stage.stage} has no token {token}, head {head}")
    if found != of_these or (
        pair.slices != "flat" and any(_numbers(of) != of_all for of in stage.floors.values())
    ):
        raise ValueError(f"{stage.stage} has too many or too few slices")


def _numbers(errors: Errors) -> tuple[int, int, int]:
    return len(errors.blocks), len(errors.heads), len(errors.tokens)


def pairs_of(dumps: int) -> list[tuple[int, int]]:
    """Return every two of so many dumps."""
    return [(a, b) for a in range(dumps) for b in range(a + 1, dumps)]
