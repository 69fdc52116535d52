"""Plant every known mistake, explain what was dumped, and count how many are found and named."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwenref.dumps.layout import LAYOUTS
from qwenref.dumps.naming import names_from
from qwenref.dumps.reading import read_dump
from qwenref.dumps.tree import StageWriter
from qwenref.mistakes.catalogue import MISTAKES
from qwenref.mistakes.mistake import CannotBe, Mistake
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.random_checkpoint import Shape
from qwenref.model.weights import read_attention, read_embedding
from qwenref.trial.case import ways_of
from qwenref.trial.dialects import EXACT, Dialect, result_dialects
from qwenref.trial.explain import explain
from qwenref.trial.explanation import Explanation
from qwenref.trial.findings import label
from qwenref.trial.naming import Found, planted_as
from qwenref.trial.replay import CHAIN, Replay
from qwenref.trial.residual import row_of, weighed
from qwenref.trial.tensors import Tensors

SHAPES = {
    "84 wide, 6 heads, 2 key heads": Shape(84, 6, 2, 152, 2, 320),
    "72 wide, 4 heads, 4 key heads": Shape(72, 4, 4, 16, 2, 320, head_dim=18),
    "128 wide, 4 heads of 64, 2 key heads": Shape(128, 4, 2, 16, 2, 320, head_dim=64),
}
LENGTHS = (2, 7, 24)
DTYPES = ("float32", "bfloat16", "float16")


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


class Outcome(NamedTuple):
    """What became of a plant.

    Attributes:
        plant: It.
        cell: Where it was planted: shape, number of tokens, dtype, layout.
        visible: Whether it makes more of an error than is normal.
        localised: Whether exactly its stages are found to be wrong.
        named: Whether it is the cause, or cannot be told from it.
        said: What is said instead.
    """

    plant: Plant
    cell: str
    visible: bool
    localised: bool
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
    """One model and prompt, in which mistakes are planted."""

    def __init__(self, model: Path, T: int, dtype: str, seed: int = 0):
        """Read the model.

        Args:
            model: A checkpoint.
            T: How many tokens.
            dtype: What the engine computes in.
            seed: Of the prompt.
        """
        self.checkpoint = Checkpoint(model)
        self.dtype = dtype
        vocabulary = self.checkpoint.config.vocab_size
        self.tokens = np.random.default_rng([seed, T]).integers(vocabulary, size=T).tolist()
        self.weights, _ = read_attention(self.checkpoint, 0)
        self.entering, _ = read_embedding(self.checkpoint, self.tokens)
        self.tensors = Tensors(self.checkpoint.config, self.weights, self.checkpoint, 0)

    def grown(self, plant: Plant) -> tuple[dict[str, np.ndarray], set[str]]:
        """Return the arrays of an engine with a mistake, and the stages in which it shows.

        Raises:
            CannotBe: It cannot be made here.
        """
        replay = Replay(self.checkpoint.config, self.weights, len(self.tokens), self.entering)
        (span,) = replay.spans
        arrays, visible, made = {}, set(), 0
        for name in CHAIN:
            dialect = self._dialect(name)
            if name in plant.stages:
                dialect = planted_as(plant.mistake, plant.value, name, dialect, self.tensors)
            try:
                values = replay.compute(name, span, dialect=dialect)
                made += name in plant.stages
            except CannotBe:
                values = replay.compute(name, span, dialect=self._dialect(name))
            arrays[name] = values.astype(np.float32)
            self._hold(replay, name, arrays[name])
            if (
                name in plant.stages
                and not weighed(replay, name, dialect=self._dialect(name)).agrees
            ):
                visible.add(name)
            if plant.mistake.in_file and name in plant.stages:
                values = replay.compute(name, span, dialect=self._dialect(name))
                self._hold(replay, name, values.astype(np.float32))
        if not made:
            raise CannotBe
        return arrays, visible

    def _hold(self, replay: Replay, name: str, values: np.ndarray) -> None:
        dump = read_dump({label(name): values}, names_from(None))
        way = ways_of(dump, 0, replay.sizes)[name][0]
        used = name == "attn_softmax" and way.masked_cells_are_used()
        replay.hold(name, replace(way, masks=not used))

    def _dialect(self, name: str) -> Dialect:
        if self.dtype == "float32":
            return EXACT
        return next(iter(result_dialects(name, (), self.dtype, stored=True)))

    def explained(self, arrays: dict[str, np.ndarray], folder: Path, layout: str) -> Explanation:
        """Dump arrays without a manifest, and explain them."""
        sizes = self.checkpoint.config.sizes | {"T": len(self.tokens), "S": len(self.tokens)}
        for name, values in arrays.items():
            arrange = LAYOUTS[layout]
            if name == "attn_softmax":  # an engine without a mask shows it there
                arrange = replace(arrange, masks_scores=False)
            with StageWriter(folder, 0, row_of(name), sizes, arrange) as writer:
                writer.write(values)
                writer.finish()
        return explain(folder, model=self.checkpoint.directory, tokens=self.tokens)


def outcome_of(field: Field, plant: Plant, layout: str, folder: Path) -> Outcome | None:
    """Plant a mistake, dump, explain; None if it cannot be made here."""
    try:
        arrays, visible = field.grown(plant)
    except CannotBe:
        return None
    answer = field.explained(arrays, folder, layout)
    expected = {label(name) for name in visible}
    found = {
        of.stage: {(one.id, one.text) for one in (of.cause, *of.equivalent)}
        for of in answer.stages
        if of.cause is not None
    }
    said = "; ".join(
        f"{name}: {' or '.join(text for _, text in causes)}" for name, causes in found.items()
    )
    return Outcome(
        plant,
        f"{layout}",
        bool(visible),
        {*answer.origins} == expected,
        bool(visible) and all(_names(plant, found.get(name, set())) for name in expected),
        f"{', '.join(answer.origins)}: {said}",
    )


def _names(plant: Plant, causes: set[tuple[str, str]]) -> bool:
    """Return whether a mistake is among those that are named."""
    if plant.mistake.general:
        return bool(causes)
    return (plant.mistake.id, plant.text) in causes
