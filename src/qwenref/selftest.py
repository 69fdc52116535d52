"""Plant every known mistake, explain what was dumped, and count how many are found and named."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from qwenref.dumps.layout import LAYOUTS
from qwenref.mistakes.catalogue import MISTAKES
from qwenref.mistakes.mistake import CannotBe
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.random_checkpoint import Shape, write
from qwenref.oracle import computing
from qwenref.planting import HEALTHY, Engine, Ground, Plant
from qwenref.stages import ATTENTION, HEAD, LEAVING, RESIDUAL
from qwenref.trial.case import Place
from qwenref.trial.explain import explain, explain_layers
from qwenref.trial.explanation import Explanation
from qwenref.trial.findings import label

SHAPES = {
    "84 wide, 6 heads, 2 key heads": Shape(84, 6, 2, 152, 3, 320),
    "72 wide, 4 heads, 4 key heads": Shape(72, 4, 4, 16, 3, 320, head_dim=18),
    "128 wide, 4 heads of 64, 2 key heads": Shape(128, 4, 2, 16, 3, 320, head_dim=64),
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


class Field:
    """An engine without mistakes, and the parts of it in which mistakes are planted."""

    def __init__(self, folder: Path, cell: Cell):
        """Make the model, and run it.

        Args:
            folder: Where to; it is made.
            cell: Which.
        """
        # where precision matters the weights must not be rounded
        write(folder, SHAPES[cell.shape], dtype=cell.dtype)
        self.model = folder
        self.tokens = _tokens(folder, cell.T)
        engine, stream = Engine(folder, self.tokens, cell.dtype), None
        self._grounds: dict[Place, Ground] = {}
        for place in engine.places:
            self._grounds[place] = ground = engine.ground(place, stream)
            stream = ground.grown(HEALTHY)[0].get(LEAVING.name)

    def ground(self, plant: Plant) -> Ground:
        """Return where a mistake is planted: those of attention, and none, in layer 0."""
        if not plant.stages or {*plant.stages} & BEGINNING:
            return self._grounds[0]
        return self._grounds[None if {*plant.stages} & OF_HEAD else MIDDLE]

    def explained(
        self, ground: Ground, arrays: dict[str, np.ndarray], folder: Path, layout: str
    ) -> Explanation:
        """Dump the arrays of a part, and explain them."""
        ground.write(arrays, folder, layout)
        return explain(folder, model=self.model, tokens=self.tokens, layer=ground.place)


def _tokens(model: Path, T: int) -> list[int]:
    vocabulary = Checkpoint(model).config.vocab_size
    return np.random.default_rng(T).integers(vocabulary, size=T).tolist()


BEGINNING = {RESIDUAL, *(stage.name for stage in ATTENTION)}
OF_HEAD = {stage.name for stage in HEAD}
MIDDLE = 1
"""The layer in which mistakes of the MLP and the residual are planted."""


def outcome_of(field: Field, plant: Plant, layout: str, folder: Path) -> Outcome | None:
    """Plant a mistake, dump, explain; None if it cannot be made here."""
    ground = field.ground(plant)
    try:
        arrays, visible = ground.grown(plant)
    except CannotBe:
        return None
    answer = field.explained(ground, arrays, folder, layout)
    return _outcome(plant, layout, visible, answer)


def _outcome(plant: Plant, layout: str, visible: set[str], answer: Explanation) -> Outcome:
    """Say what became of a plant in one part."""
    expected, made = (
        {label(name, answer.layer) for name in names} for names in (visible, plant.stages)
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
            outcome = outcome_of(field, plant, [*LAYOUTS][number % 2], dump)
            rmtree(dump)
            if outcome is not None:
                yield outcome


DEEP = Cell("84 wide, 6 heads, 2 key heads", 7, "float32")
LAYERS = 6
"""Of the model in which mistakes are planted two at a time."""

IN_DEPTH = {
    "attn_norm": "norm-weight-forgotten",
    "qkv_matmul": "projection-untransposed",
    "qkv_bias": "bias-missing",
    "q_post_rope": "rope-interleaved",
    "attn_scores": "scores-scale",
    "attn_softmax": "mask-missing",
    "attention": "values-keys",
    "attn_out": "output-untransposed",
    "post_attn_residual": "residual-missing",
    "ffn_norm": "norm-of-stream",
    "ffn_gate": "mlp-swapped",
    "ffn_silu": "silu-other",
    "ffn_swigl": "product-unactivated",
    "ffn_out": "down-untransposed",
    "post_ffn_residual": "layer-skipped",
}
"""Mistakes that are planted there, by the stage where they are made, or begin."""

IN_HEAD = {"final_norm": "norm-skipped", "lm_head": "head-untransposed"}


def outcomes_in_depth(cell: Cell = DEEP, layers: int = LAYERS, every: int = 1) -> Iterator[Outcome]:
    """Plant two mistakes in different layers, or in one and the head, or every so many; first none.

    The whole model is dumped and explained, and of each of its parts it is found out what became of
    what was planted there.
    """
    with TemporaryDirectory() as folder, computing("float64", "cpu"):
        model = Path(folder) / "model"
        write(model, replace(SHAPES[cell.shape], num_hidden_layers=layers), dtype=cell.dtype)
        tokens = _tokens(model, cell.T)
        engine = Engine(model, tokens, cell.dtype)
        chosen = islice(_pairs(layers), None, None, every)
        for number, pair in enumerate(({}, *chosen)):
            dump, layout = Path(folder) / "dump", [*LAYOUTS][number % 2]
            dump.mkdir()
            visible = engine.dump(pair, dump, layout)
            answer = explain_layers(dump, model=model, tokens=tokens)
            for part in answer.parts:
                plant = pair.get(part.layer, HEALTHY)
                yield _outcome(plant, layout, visible[part.layer], part)
            rmtree(dump)


def _pairs(layers: int) -> Iterator[dict[Place, Plant]]:
    """Yield two mistakes by the parts where they are made."""
    first_of = {(plant.mistake.id, plant.stages[0]): plant for plant in [*plants()][::-1]}
    in_layers, in_head = (
        [first_of[id_, name] for name, id_ in of.items()] for of in (IN_DEPTH, IN_HEAD)
    )
    for number, first in enumerate(in_layers):
        layer = 1 + number % (layers - 3)
        yield {layer: first, layer + 2: in_layers[number - 5]}
    for number, last in enumerate(in_head):
        yield {number: in_layers[-1 - number], None: last}


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
