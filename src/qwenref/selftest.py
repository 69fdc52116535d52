"""Plant every known mistake, explain what was dumped, and count how many are found and named."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from qwenref.dumps.layout import LAYOUTS
from qwenref.dumps.naming import names_from
from qwenref.dumps.reading import Dump, read_dump
from qwenref.dumps.tree import StageWriter
from qwenref.judge.alignment import side_of
from qwenref.mistakes.catalogue import MISTAKES
from qwenref.mistakes.mistake import CannotBe, Mistake
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import read_embedding
from qwenref.oracle import computing
from qwenref.stages import ATTENTION, HEAD, LAST_LOGITS, LEAVING, RESIDUAL
from qwenref.trial.case import Case, Place
from qwenref.trial.dialects import EXACT, Dialect, result_dialects
from qwenref.trial.executed import Found, planted_as
from qwenref.trial.explain import explain
from qwenref.trial.explanation import Explanation
from qwenref.trial.findings import label
from qwenref.trial.inquiry import part_of
from qwenref.trial.laying_out import readings
from qwenref.trial.replay import Replay
from qwenref.trial.residual import row_of, weighed
from qwenref.trial.tensors import Tensors

SHAPES = {
    "84 wide, 6 heads, 2 key heads": Shape(84, 6, 2, 152, 2, 320),
    "72 wide, 4 heads, 4 key heads": Shape(72, 4, 4, 16, 2, 320, head_dim=18),
    "128 wide, 4 heads of 64, 2 key heads": Shape(128, 4, 2, 16, 2, 320, head_dim=64),
}
LENGTHS = (2, 7, 24)
DTYPES = ("float32", "bfloat16", "float16")


class Part(NamedTuple):
    """Of what is visible, at least."""

    found: float
    named: float


PROMISED = {
    "float32": Part(1.0, 0.98),
    "bfloat16": Part(0.98, 0.95),
    "float16": Part(0.98, 0.95),
}
"""By what the engine computes in. Where results are rounded, what is barely visible may be taken
for another way to round. What is measured, which is more, has docs/benchmarks.md.
"""


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


class Cell(NamedTuple):
    """Where mistakes are planted.

    Attributes:
        shape: Of the model, of `SHAPES`.
        T: How many tokens.
        dtype: What the engine computes in.
    """

    shape: str
    T: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.shape}, {self.T} tokens, {self.dtype}"


class Outcome(NamedTuple):
    """What became of a plant.

    Attributes:
        plant: It.
        layout: Of the dump.
        visible: Whether it makes more of an error than is normal.
        localised: Whether exactly its stages are found to be wrong; if it is not visible, whether
            no other stage is.
        hidden: Whether it is found below the noise.
        named: Whether it is the cause, or cannot be told from it.
        said: What is said instead.
    """

    plant: Plant
    layout: str
    visible: bool
    localised: bool
    hidden: bool
    named: bool
    said: str


def plants() -> Iterator[Plant]:
    """Yield all of them: RoPE's mistakes in q and k at once, those of any stage in one."""
    for mistake in MISTAKES:
        values = (None,) if mistake.values is None else mistake.planted
        places = [mistake.stages] if len(mistake.stages) <= 2 else [(of,) for of in mistake.stages]
        for value in values:
            for stages in places:
                yield Plant(mistake, value, stages)


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

    def explained(self, arrays: dict[str, np.ndarray], folder: Path, layout: str) -> Explanation:
        """Dump arrays without a manifest, and explain them."""
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
        model = None if self._case.checkpoint is None else self._case.checkpoint.directory
        return explain(folder, model=model, tokens=self._case.tokens, layer=self.place)


def _dumped(name: str, values: np.ndarray) -> np.ndarray:
    """Return a stage as engines dump it: of the logits those of the last token."""
    return (values[-1] if name == LAST_LOGITS.name else values).astype(np.float32)


class Field:
    """One model and prompt; within `computing("float64", ...)`."""

    def __init__(self, folder: Path, cell: Cell):
        """Make the model, and run it without any mistake.

        Args:
            folder: Where to; it is made.
            cell: Which.
        """
        # where precision matters the weights must not be rounded
        write(folder, SHAPES[cell.shape], dtype=cell.dtype)
        checkpoint = Checkpoint(folder)
        rng = np.random.default_rng(cell.T)
        tokens = rng.integers(checkpoint.config.vocab_size, size=cell.T).tolist()
        case = Case(Dump("", None, {}, {}), checkpoint, checkpoint.config, tokens, "given")
        stream, _ = read_embedding(checkpoint, tokens)
        self._grounds: dict[Place, Ground] = {}
        for layer in range(checkpoint.config.num_hidden_layers):
            self._grounds[layer] = ground = Ground(case, layer, stream, cell.dtype)
            stream = ground.grown(HEALTHY)[0][LEAVING.name]
        self._grounds[None] = Ground(case, None, stream, cell.dtype)

    def ground(self, plant: Plant) -> Ground:
        """Return where a mistake is planted: those of attention, and none, in layer 0."""
        if not plant.stages or {*plant.stages} & BEGINNING:
            return self._grounds[0]
        return self._grounds[None if {*plant.stages} & OF_HEAD else MIDDLE]


BEGINNING = {RESIDUAL, *(stage.name for stage in ATTENTION)}
OF_HEAD = {stage.name for stage in HEAD}
MIDDLE = 1
"""The layer in which mistakes of the MLP and the residual are planted."""


def outcome_of(ground: Ground, plant: Plant, layout: str, folder: Path) -> Outcome | None:
    """Plant a mistake, dump, explain; None if it cannot be made here."""
    try:
        arrays, visible = ground.grown(plant)
    except CannotBe:
        return None
    answer = ground.explained(arrays, folder, layout)
    expected, made = (
        {label(name, ground.place) for name in names} for names in (visible, plant.stages)
    )
    origins, hidden = {*answer.origins}, {of.stage for of in answer.stages if of.hidden is not None}
    found = {
        of.stage: {(one.id, one.text) for one in (of.cause, of.hidden, *of.equivalent) if one}
        for of in answer.stages
        if of.cause is not None or of.hidden is not None
    }
    said = "; ".join(
        f"{name}: {' or '.join(text for _, text in causes)}" for name, causes in found.items()
    )
    return Outcome(
        plant,
        layout,
        bool(visible),
        expected <= origins <= expected | (made & hidden),
        bool(hidden & made),
        bool(origins) and all(_names(plant, found.get(name, set())) for name in expected | origins),
        f"{', '.join(answer.origins)}: {said}",
    )


def _names(plant: Plant, causes: set[tuple[str, str]]) -> bool:
    """Return whether a mistake is among those that are named."""
    if plant.mistake.general:
        return bool(causes)
    return (plant.mistake.id, plant.text) in causes


def cells(*, full: bool) -> list[Cell]:
    """Return all cells, or a sample: a shape, a length, float32."""
    if not full:
        return [Cell(next(iter(SHAPES)), 7, "float32")]
    return [Cell(*of) for of in product(SHAPES, LENGTHS, DTYPES)]


def outcomes_in(cell: Cell, every: int = 1, first: int = 0) -> Iterator[Outcome]:
    """Plant all mistakes in a cell, or every so many; first of all none."""
    with TemporaryDirectory() as folder, computing("float64", "cpu"):
        field = Field(Path(folder) / "model", cell)
        chosen = islice(plants(), first, None, every)
        for number, plant in enumerate((HEALTHY, *chosen)):
            dump = Path(folder) / "dump"
            dump.mkdir()
            outcome = outcome_of(field.ground(plant), plant, [*LAYOUTS][number % 2], dump)
            rmtree(dump)
            if outcome is not None:
                yield outcome


class Score(NamedTuple):
    """How many plants were visible, found where they were planted, and named.

    Attributes:
        visible: Those that make more of an error than is normal.
        localised: Of those, in whose stages an error was found, and in no other.
        named: Of those too, that are the cause, or cannot be told from it.
        invisible: The others.
        hidden: Of those, that were found below the noise.
        false_alarms: Of those, or of nothing, for which another stage was blamed.
    """

    visible: int
    localised: int
    named: int
    invisible: int
    hidden: int
    false_alarms: int

    def meets(self, promised: Part) -> bool:
        """Whether as many are found and named as is promised, and nothing else is blamed."""
        return (
            self.localised >= promised.found * self.visible
            and self.named >= promised.named * self.visible
            and not self.false_alarms
        )


def score_of(outcomes: Sequence[Outcome]) -> Score:
    """Count."""
    visible = [of for of in outcomes if of.visible]
    invisible = [of for of in outcomes if not of.visible]
    return Score(
        len(visible),
        sum(of.localised for of in visible),
        sum(of.named for of in visible),
        sum(bool(of.plant.stages) for of in invisible),
        sum(of.hidden for of in invisible),
        sum(not of.localised for of in invisible),
    )
