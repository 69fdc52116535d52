"""What `qwenref explain` finds, as data: what `--json` prints and `qwenref.explain` returns."""

from typing import Literal

import msgspec

Verdict = Literal["agree", "fault", "incomplete", "incomparable"]
Status = Literal["agree", "inherited", "added", "dumped_wrong", "unmeasured", "blind"]

EXIT_STATUS = {"agree": 0, "fault": 1}
"""By verdict; 2 for others."""


class DialectFound(msgspec.Struct, frozen=True):
    """An honest choice that explains a stage, and the relative L2 that it leaves."""

    id: str
    text: str
    error_after: float


class Named(msgspec.Struct, frozen=True):
    """A mistake, by name, that cannot be told from another here; and what would tell, in words."""

    id: str
    text: str
    told_by: str | None = None


class Cause(msgspec.Struct, frozen=True):
    """A mistake that reproduces a stage, and the relative L2 that it leaves (of tokens: None)."""

    id: str
    text: str
    error_after: float | None


class Hidden(msgspec.Struct, frozen=True):
    """A mistake smaller than the noise, and how sure that is."""

    id: str
    text: str
    alpha: float
    z: float


class Unseen(msgspec.Struct, frozen=True):
    """A mistake that would not be seen, and how many distinct tokens would show it."""

    id: str
    text: str
    tokens: int


class Check(msgspec.Struct, frozen=True):
    """A property that holds in any right engine, whatever its weights.

    Attributes:
        name: What is checked.
        status: Whether it holds; ``unmeasured`` if a file is missing.
        value: How far off it is.
        limit: How far it may be.
    """

    name: str
    status: Literal["holds", "fails", "unmeasured"]
    value: float | None = None
    limit: float | None = None


class WorstSlice(msgspec.Struct, frozen=True):
    """The slice of a stage that is the most times its floor.

    Attributes:
        axis: ``whole``, ``block``, ``head``, ``token`` or ``element``.
        index: Number of the block, head or token, else 0; heads of q, k, v are counted through.
        ratio: How many times its floor; None if infinite.
    """

    axis: str
    index: int
    ratio: float | None


class StageExplained(msgspec.Struct, frozen=True):
    """One stage.

    Attributes:
        stage: Its name.
        status: ``agree``: computed as it should be from what the engine dumped before it.
            ``inherited``: likewise, but what it was computed from was wrong. ``added``: the error
            is made here. ``dumped_wrong``: the file is wrong, but what was computed from it is
            right. ``unmeasured``: no usable file. ``blind``: so much error is normal here that
            nothing can be said.
        reason: In words, where the status does not speak for itself.
        dtype: What all its values fit: ``bfloat16`` or ``float16``, else ``float32``.
        total: Relative L2 against the oracle's own chain.
        cosine: Against the oracle's own chain too; shown because others judge by it.
        added: Relative L2 against the stage computed from the dump's own inputs, in float64.
        floor: What is normal of `added`, in the precision that explains it best.
        ratio: How many floors the worst slice is off, in that precision.
        worst: That slice.
        pattern: Where the error sits, in words.
        layout: How the file is laid out.
        computed_from: The dumps that it was recomputed from.
        bridged: The stages without a usable dump that were computed on the way.
        dialects: Honest choices that explain it, equally well.
        cause: The mistake that reproduces it.
        nearest: If none does: one that leaves a tenth of the error at most.
        equivalent: Mistakes that cannot be told from that one here.
        hidden: A mistake below the noise; `equivalent` has those that cannot be told from it.
        unseen: Mistakes too small to be told from the noise with so few tokens.
    """

    stage: str
    status: Status
    reason: str | None = None
    dtype: str | None = None
    total: float | None = None
    cosine: float | None = None
    added: float | None = None
    floor: float | None = None
    ratio: float | None = None
    worst: WorstSlice | None = None
    pattern: str | None = None
    layout: str | None = None
    computed_from: list[str] = []
    bridged: list[str] = []
    dialects: list[DialectFound] = []
    cause: Cause | None = None
    nearest: Cause | None = None
    equivalent: list[Named] = []
    hidden: Hidden | None = None
    unseen: list[Unseen] = []


class WeightNoise(msgspec.Struct, frozen=True):
    """How many bits the weights seem to be rounded to, tensor by tensor; None: they are exact."""

    embedding: float | None = None
    q: float | None = None
    k: float | None = None
    v: float | None = None
    o: float | None = None
    gate: float | None = None
    up: float | None = None
    down: float | None = None
    lm_head: float | None = None


class Explanation(msgspec.Struct, frozen=True):
    """The whole answer.

    Attributes:
        schema: Names this format.
        verdict: ``fault`` if a stage or file is wrong; ``incomplete`` if something could not be
            judged; ``incomparable`` if the dump is of something else.
        reason: Why, in words.
        path: The dump.
        model: The checkpoint; None without one.
        layer: Which layer; None for what follows the last one.
        tokens: What it was compared for.
        tokens_from: Where those are from: ``manifest``, ``given`` or ``default``.
        tokens_recovered: What the engine ran instead, if that is something else.
        origins: Stages whose status is ``added`` or ``dumped_wrong``, or with a hidden mistake.
        weight_noise: Set if the engine seems to compute with rounded weights.
        stages: In chain order; the embedding if it was dumped. Attention's in any case, others up
            to the last one that was dumped.
        checks: What needs no weights.
        summary: The last lines of the report.
        reference: The same of the reference, if one was given.
        convicted: Which of the two is wrong: ``dump``, ``reference``, ``both``, or None.
    """

    schema: Literal["qwenref-explain-v1"]
    verdict: Verdict
    reason: str
    path: str
    model: str | None
    layer: int | None
    tokens: list[int] | None
    tokens_from: Literal["manifest", "given", "default"] | None
    tokens_recovered: list[int] | None
    origins: list[str]
    weight_noise: WeightNoise | None
    stages: list[StageExplained]
    checks: list[Check]
    summary: list[str]
    reference: "Explanation | None" = None
    convicted: Literal["dump", "reference", "both"] | None = None

    @property
    def exit_status(self) -> int:
        """0 agree, 1 fault, 2 incomplete or incomparable."""
        return EXIT_STATUS.get(self.verdict, 2)

    def to_json(self) -> str:
        """Return it as JSON, indented."""
        return as_json(self)


class Origin(msgspec.Struct, frozen=True):
    """Where an error is made: a layer (None: after the last one) and a stage."""

    layer: int | None
    stage: str


class LayersExplanation(msgspec.Struct, frozen=True):
    """The answer for several layers, and what follows them.

    Attributes:
        schema: Names this format.
        verdict: ``fault`` if any part is at fault; else ``incomparable`` or ``incomplete`` if one
            is, or if parts that were asked for were not dumped.
        reason: Why, in words.
        path: The dump.
        model: The checkpoint; None without one.
        tokens: What it was compared for.
        tokens_from: Where those are from.
        origins: Of all parts, in order.
        parts: Layers in order, then the final norm and lm_head.
        summary: The last lines of the report.
        reference: The same of the reference, if one was given.
        convicted: Which of the two is wrong.
    """

    schema: Literal["qwenref-explain-layers-v1"]
    verdict: Verdict
    reason: str
    path: str
    model: str | None
    tokens: list[int] | None
    tokens_from: Literal["manifest", "given", "default"] | None
    origins: list[Origin]
    parts: list[Explanation]
    summary: list[str]
    reference: "LayersExplanation | None" = None
    convicted: Literal["dump", "reference", "both"] | None = None

    @property
    def exit_status(self) -> int:
        """0 agree, 1 fault, 2 incomplete or incomparable."""
        return EXIT_STATUS.get(self.verdict, 2)

    def to_json(self) -> str:
        """Return it as JSON, indented."""
        return as_json(self)


def as_json(answer: msgspec.Struct) -> str:
    """Return an answer as JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(answer)).decode() + "\n"
