"""Which stage a file holds, by its name: ours, apr's tests', or another engine's by a map."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

import msgspec

from qwenref.errors import QwenrefError
from qwenref.files import parse_json, read_bounded
from qwenref.stages import BY_NAME, EMBEDDING, MAX_LAYERS

LIMIT = 1 << 20
"""Bytes of a names file; the shipped ones have less than three thousand."""

SHIPPED = Path(__file__).parent / "names"

_OURS = re.compile(r"(?:layer-([0-9]{1,9})/|layer_([0-9]{1,9})_)?([A-Za-z0-9_.-]+)")
_Stage = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]+(\.[qkv])?\Z")]


class Place(NamedTuple):
    """What a file holds.

    Attributes:
        layer: None if the name does not say; a stage of the whole model has none.
        stage: Its name, as in `qwenref.stages` if it is one of those.
        part: The block of the stage that the file holds alone; None for a whole stage.
    """

    layer: int | None
    stage: str
    part: str | None = None


class Names:
    """Translates the path of a file, below the dump's directory and without its ending."""

    def __init__(self, patterns: Mapping[str, str] | None = None):
        """Prepare to translate.

        Args:
            patterns: From another engine's names, in which ``{layer}`` stands for a number, to
                stages, or blocks of stages like ``qkv_bias.v``. Our own names are known anyway.

        Raises:
            ValueError: A pattern has ``{layer}`` twice, or a stage has no such block.
        """
        self._patterns = []
        for pattern, stage in (patterns or {}).items():
            if pattern.count("{layer}") > 1:
                raise ValueError(f"{pattern!r} has {{layer}} twice")
            name, _, part = stage.partition(".")
            if part and (name not in BY_NAME or part not in BY_NAME[name].blocks):
                raise ValueError(f"{stage!r}: {name} has no block {part!r}")
            expression = re.escape(pattern).replace(r"\{layer\}", "([0-9]{1,9})")
            self._patterns.append((re.compile(expression), name, part or None))

    def place(self, path: PurePosixPath) -> Place | None:
        """Return what a file holds, None if nothing that is known."""
        for expression, stage, part in self._patterns:
            if match := expression.fullmatch(str(path)):
                return _placed(next(iter(match.groups()), None), stage, part)
        if match := _OURS.fullmatch(str(path)):
            return _placed(match[1] or match[2], match[3], None)
        return None


def _placed(number: str | None, stage: str, part: str | None) -> Place | None:
    if number is not None and int(number) >= MAX_LAYERS:
        return None
    if stage == EMBEDDING.name and number is None:
        number = "0"
    return Place(None if number is None else int(number), stage, part)


def names_from(spec: str | Path | None) -> Names:
    """Return the names that ``--names`` asks for: a file, or one of the maps that come with us.

    Raises:
        QwenrefError: There is no such file or map, or it is no object of names and stages.
    """
    if spec is None:
        return Names()
    shipped = {file.stem: file for file in SHIPPED.glob("*.json")}
    path = shipped.get(str(spec), Path(spec))
    if not os.path.lexists(path):
        known = ", ".join(sorted(shipped))
        raise QwenrefError(f"--names {spec}: no such file, and the maps that we have are {known}")
    content = read_bounded(path, LIMIT)
    patterns = parse_json(path, content, dict[str, _Stage])
    try:
        return Names(patterns)
    except ValueError as error:
        raise QwenrefError(f"{path}: {error}") from error
