"""Engines with mistakes: a model's stages grown one after the other, some of them wrong."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwenref.dumps.layout import LAYOUTS
from qwenref.dumps.naming import names_from
from qwenref.dumps.reading import Dump, read_dump
from qwenref.dumps.tree import StageWriter
from qwenref.judge.alignment import side_of
from qwenref.mistakes.mistake import CannotBe, Mistake
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.weights import read_embedding
from qwenref.stages import LAST_LOGITS, LEAVING, RESIDUAL
from qwenref.trial.case import Case, Place
from qwenref.trial.dialects import EXACT, Dialect, result_dialects
from qwenref.trial.executed import Found, planted_as
from qwenref.trial.inquiry import part_of
from qwenref.trial.laying_out import readings
from qwenref.trial.replay import Replay
from qwenref.trial.residual import row_of, weighed
from qwenref.trial.tensors import Tensors


class Plant(NamedTuple):
    """What is planted, and where.

    Attributes:
        mistake: Which.
        value: Of a family.
        stages: Where: one of those where it can be made, or all of them.
    """

    mistake: Mistake
    value: Any
    stages: tuple[str, ...]

    @property
    def text(self) -> str:
        """What it is, in words; of what depends on sizes, nothing."""
        if callable(self.value):
            return ""
        return Found(self.mistake, "", self.value, EXACT, 0.0).text

    def __str__(self) -> str:
        return f"{self.mistake.id} in {' and '.join(self.stages)}" + (
            f" ({self.text})" if self.text else ""
        )


HEALTHY = Plant(Mistake("none", (), "nothing", "", "", lambda s: s.right(*s.given)), None, ())
"""An engine without any mistake."""


class Ground:
    """A part of a model with what enters it, in which mistakes are planted.

    Attributes:
        place: Which part.
        tensors: What else engines may take.
    """

    def __init__(self, case: Case, place: Place, stream: np.ndarray, dtype: str):
        """Read the weights.

        Args:
            case: The model and the prompt.
            place: Which part.
            stream: What enters it.
            dtype: What the engine computes in.
        """
        self.place, self._dtype, self._case, self._stream = place, dtype, case, stream
        self._part, weights = part_of(case, place, whole=True)
        number = case.config.num_hidden_layers if place is None else place
        self.tensors = Tensors(case.config, weights, case.checkpoint, number, case.tokens or ())

    def grown(self, plant: Plant) -> tuple[dict[str, np.ndarray], set[str]]:
        """Return the arrays of an engine with a mistake or none, and the stages in which it shows.

        Raises:
            CannotBe: It cannot be made here.
        """
        replay = Replay(self._part, len(self._stream), self._stream)
        (span,) = replay.spans
        arrays, visible, made = {}, set(), 0
        for name in replay.chain:
            dialect = self._dialect(name)
            if name in plant.stages:
                dialect = planted_as(plant.mistake, plant.value, name, dialect, self.tensors)
            try:
                values = replay.compute(name, span, dialect=dialect)
                made += name in plant.stages
            except CannotBe:
                values = replay.compute(name, span, dialect=self._dialect(name))
            arrays[name] = _dumped(name, values)
            self._hold(replay, name, arrays[name])
            if (
                name in plant.stages
                and not weighed(replay, name, dialect=self._dialect(name)).agrees
            ):
                visible.add(name)
            if plant.mistake.in_file and name in plant.stages:
                values = replay.compute(name, span, dialect=self._dialect(name))
                self._hold(replay, name, _dumped(name, values))
        if plant.stages and not made:
            raise CannotBe
        return arrays, visible

    def _hold(self, replay: Replay, name: str, values: np.ndarray) -> None:
        stage = row_of(name)
        dump = read_dump({stage.name: values}, names_from(None))
        (key,) = dump.stages
        way = readings(stage, side_of(dump, key), replay.sizes)[0]
        used = name == "attn_softmax" and way.masked_cells_are_used()
        replay.hold(name, replace(way, masks=not used))

    def _dialect(self, name: str) -> Dialect:
        if self._dtype == "float32":
            return EXACT
        return next(iter(result_dialects(name, (), self._dtype, stored=True)))

    def write(self, arrays: Mapping[str, np.ndarray], folder: Path, layout: str) -> None:
        """Dump arrays, without a manifest."""
        T = len(self._stream)
        sizes = self._case.config.sizes | {"T": T, "S": T}
        for name, values in arrays.items():
            layer, _ = self._case.key(self.place, name)
            stage = LAST_LOGITS if name == LAST_LOGITS.name else row_of(name)
            if name == RESIDUAL and self.place != 0:
                stage = LEAVING
            arrange = LAYOUTS[layout]
            if name == "attn_softmax":  # an engine without a mask shows it there
                arrange = replace(arrange, masks_scores=False)
            with StageWriter(folder, layer, stage, sizes, arrange) as writer:
                writer.write(values)
                writer.finish()


def _dumped(name: str, values: np.ndarray) -> np.ndarray:
    """Return a stage as engines dump it: of the logits those of the last token."""
    return (values[-1] if name == LAST_LOGITS.name else values).astype(np.float32)


class Engine:
    """A model and a prompt; within `computing("float64", ...)`.

    Attributes:
        places: Its layers, and None for what follows the last one.
    """

    def __init__(self, model: Path, tokens: list[int], dtype: str):
        """Read nothing yet.

        Args:
            model: A checkpoint, whose weights the dtype holds.
            tokens: The prompt's.
            dtype: What the engine computes in.
        """
        checkpoint = Checkpoint(model)
        self._case = Case(Dump("", None, {}, {}), checkpoint, checkpoint.config, tokens, "given")
        self._dtype = dtype
        self._begins, _ = read_embedding(checkpoint, tokens)
        self.places: list[Place] = [*range(checkpoint.config.num_hidden_layers), None]

    def ground(self, place: Place, entering: np.ndarray | None) -> Ground:
        """Return a part, entered by a stream; of layer 0 that is the embedding."""
        stream = self._begins if entering is None else entering
        return Ground(self._case, place, stream, self._dtype)

    def dump(
        self, plants: Mapping[Place, Plant], folder: Path, layout: str
    ) -> dict[Place, set[str]]:
        """Run all of it with mistakes in some parts; return the stages in which they show.

        Raises:
            CannotBe: One cannot be made there.
        """
        stream, visible = None, {}
        for place in self.places:
            ground = self.ground(place, stream)
            arrays, visible[place] = ground.grown(plants.get(place, HEALTHY))
            stream = arrays.get(LEAVING.name)
            if place != 0:
                del arrays[RESIDUAL]
            ground.write(arrays, folder, layout)
        return visible
