"""What a mistake is: one stage computed otherwise; and what it is computed from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwenref.model.config import Config


@dataclass(frozen=True)
class Setting:
    """What one stage has at hand for some of its tokens (or queries). All arrays are float64.

    Attributes:
        stage: Its name.
        given: What it is computed from, in the axes of `qwenref.stages`.
        positions: Of the tokens, [T].
        config: Sizes, eps and theta.
        sizes: T (of all tokens), S, D, N, K, G, H, E, F.
        right: What the stage makes of what it is given, or of something else.
        rounded: Values as the engine rounds them at a point of `qwenref.model.precision.POINTS`.
        rows: Another stage, for these tokens.
        everywhere: Another stage, for all tokens.
        unmasked: Scores of these queries, with what they do not see, [N, T, S].
        tensor: A vector of the checkpoint, by its name in `qwenref.trial.tensors`; of a layer,
            counted from this one.
        table: Another table's rows of these tokens, [T, D], by its name in the checkpoint.
        again: What leaves the layer if that enters it, of all tokens.
        product: x @ W.T, where W is found like a vector; or x @ W, as W lies in memory.
    """

    stage: str
    given: tuple[np.ndarray, ...]
    positions: np.ndarray
    config: Config
    sizes: Mapping[str, int]
    right: Callable[..., np.ndarray]
    rounded: Callable[[str, np.ndarray], np.ndarray]
    rows: Callable[[str], np.ndarray]
    everywhere: Callable[[str], np.ndarray]
    unmasked: Callable[[], np.ndarray]
    tensor: Callable[..., np.ndarray]
    table: Callable[[str], np.ndarray]
    again: Callable[[np.ndarray], np.ndarray]
    product: Callable[..., np.ndarray]


class CannotBe(Exception):  # noqa: N818  (it is no error: it does not apply here)
    """A mistake that cannot be made here: sizes do not allow it, or something is not known."""


@dataclass(frozen=True)
class Mistake:
    """One mistake, or a family of them that differ in a value.

    Attributes:
        id: A short name.
        stages: Where it is made: at each of these, for itself.
        text: In words; ``{}`` for the value.
        formula: What is computed.
        shows: What it looks like.
        run: Computes the stage; of a family, with a value. It raises `CannotBe`.
        values: Of a family: likely values, from a setting and what was dumped (None if that is
            another stage).
        planted: Of a family: values that `qwenref selftest` plants, or functions of a setting that
            return them.
        said: Of a family: the value in words; None if the text formats it.
        in_file: Whether it is made when a file is written, and nothing is computed from it.
        general: Whether it only describes what is off; anything else explains more.
        rounds: Whether it is a way to round: below the noise it is none, and where that is nearly a
            tie, values may go the other way.
    """

    id: str
    stages: tuple[str, ...]
    text: str
    formula: str
    shows: str
    run: Callable[..., np.ndarray]
    values: Callable[[Setting, np.ndarray | None], Iterable[Any]] | None = None
    planted: tuple[Any, ...] = ()
    said: Callable[[Any], str] | None = None
    in_file: bool = False
    general: bool = False
    rounds: bool = False


def any_of(*values: Any) -> Callable[[Setting, np.ndarray | None], Iterable[Any]]:
    """Return likely values that do not depend on anything."""
    return lambda setting, dumped: values


def needs(holds: bool) -> None:
    """Give up unless something holds.

    Raises:
        CannotBe: It does not.
    """
    if not holds:
        raise CannotBe
