"""The files of a dump: where each stage lies, written whole or by slices."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenref.dumps import manifest
from qwenref.dumps.aprt import AprtWriter
from qwenref.dumps.layout import Layout
from qwenref.stages import Stage


class Written(NamedTuple):
    """A stage file, the root mean square of its values, and how many of them are not finite."""

    file: manifest.StageFile
    rms: float
    nonfinite: int


class StageWriter:
    """One stage, in a dump that is being built; written whole or by slices."""

    def __init__(
        self,
        folder: Path,
        layer: int | None,
        stage: Stage,
        sizes: Mapping[str, int],
        layout: Layout,
    ):
        """Create the file.

        Args:
            folder: As `new_dump` gives it.
            layer: The layer's number, None for a stage of the whole model.
            stage: The stage.
            sizes: Of the letters of its axes.
            layout: How to lay the file out.
        """
        self.stage = stage
        self._layer, self._sizes, self._layout = layer, sizes, layout
        self._name = manifest.stage_path(layer, stage.name)
        (folder / self._name).parent.mkdir(exist_ok=True)
        self._count = math.prod(sizes[axis] for axis in stage.axes)
        self._file = AprtWriter(folder / self._name, layer, self._count)
        self._squares, self._nonfinite = 0.0, 0

    def write(self, values: np.ndarray, first: int = 0, channel: int = 0) -> None:
        """Write the tokens (or queries) from position `first` on, of each the values from one on.

        Args:
            values: In the axes of `stage.axes`, scores unmasked, any float dtype.
            first: Position of the first token in it.
            channel: Which of the stage's last axis the first one in it is.
        """
        for start, run in self._layout.runs(self.stage, values, first, self._sizes, channel):
            written = self._file.write(start, run)
            self._squares += float(np.sum(np.square(written, dtype=np.float64)))
            self._nonfinite += written.size - int(np.count_nonzero(np.isfinite(written)))

    def __enter__(self) -> "StageWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def finish(self) -> Written:
        """Close the file and say what it is."""
        axes = self._layout.axes(self.stage)
        file = manifest.StageFile(
            stage=self.stage.name,
            layer=self._layer,
            file=self._name,
            shape=[self._sizes[axis] for axis in axes],
            axes=" ".join(axes),
            fingerprint=self._file.finish(),
        )
        return Written(file, math.sqrt(self._squares / self._count), self._nonfinite)
