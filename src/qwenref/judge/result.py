"""The result of a comparison as data: what `--json` prints and `qwenref.diff` returns."""

from typing import Literal

import msgspec

from qwenref.dumps.aprt import WHOLE_MODEL
from qwenref.judge.measurement import Logits, Nonfinite, TopDifference

Verdict = Literal["agree", "differ", "incomplete", "incomparable"]
Status = Literal["agree", "differ", "unmeasured", "blind"]


class Divergence(msgspec.Struct, frozen=True):
    """The first stage in chain order that differs, and which block of it, if one stands out."""

    layer: int | None
    stage: str
    block: str | None


class Sides(msgspec.Struct, frozen=True):
    """Something that is said of each of two dumps; None where it is not known or does not apply."""

    a: str | None
    b: str | None


class Block(msgspec.Struct, frozen=True):
    """One of q, k, v: relative L2, its floor, and how many times that; None: no finite number."""

    name: str
    rel_l2: float | None
    floor: float | None
    ratio: float | None


class Worst(msgspec.Struct, frozen=True):
    """The slice that is the most times its floor.

    Attributes:
        axis: ``whole``, ``block``, ``head``, ``token`` or ``element``.
        index: Number of the block, head or token, else 0; heads of q, k, v are counted through.
        name: What to call it: ``k head 1``.
        value: Relative L2; of an element the difference over the rms of its token and head. None:
            infinite, or NaN.
        floor: What is normal there.
        ratio: How many times its floor; None if infinite.
        others: If two dumps differ in this slice alone of its kind, the largest value of the other
            slices; else None.
    """

    axis: str
    index: int
    name: str
    value: float | None
    floor: float | None
    ratio: float | None
    others: float | None


class PairResult(msgspec.Struct, frozen=True):
    """One stage of two of the dumps."""

    a: int
    b: int
    rel_l2: float | None
    floor: float | None
    ratio: float | None
    status: Status
    precision: str | None
    reason: str | None


class StageResult(msgspec.Struct, frozen=True):
    """One stage; of three dumps the numbers are those of the pair that is the most floors apart.

    Attributes:
        layer: None for the whole model.
        stage: Its name.
        status: ``unmeasured``: not in all dumps. ``blind``: so much error is normal that nothing
            can be said.
        reason: In words, where the status does not speak for itself.
        required: Whether the verdict depends on it.
        precision: What it is held to: the finest that explains it.
        dim_product: How many values the file of the first dump has.
        max_abs_diff: The largest difference.
        max_abs_diff_index: Where, in the first file as stored.
        max_abs_diff_at: Its token, head, and number within the head; None if shapes are unknown.
        rms_diff: Root mean square of the difference.
        cosine_sim: To look at; nothing is judged by it.
        rel_l2: ||a - b|| / min(||a||, ||b||).
        norm_ratio: ||a|| / ||b||.
        total_variation: Of the worst row of attn_softmax.
        floor: The relative L2 that is normal for the whole.
        ratio: `rel_l2` over `floor`.
        floor_origin: ``manifest``, ``generic``, or ``tolerance`` for what the user gave.
        layout: How each stores it.
        masked: What cells hold that no softmax reads.
        nonfinite: NaN and infinite values.
        blocks: q, k, v.
        block: The one of them in which dumps differ; None if they do in all, or if there are none.
        worst: The worst slice.
        pairs: Every two of the dumps.
        odd_one_out: The dump that two others disagree with.
        notes: What else a reader should know.
        top_diffs: The largest differences.
        logits: Of lm_head, what it says of the next token.
    """

    layer: int | None
    stage: str
    status: Status
    reason: str | None
    required: bool
    precision: str | None = None
    dim_product: int | None = None
    max_abs_diff: float | None = None
    max_abs_diff_index: int | None = None
    max_abs_diff_at: tuple[int, int, int] | None = None
    rms_diff: float | None = None
    cosine_sim: float | None = None
    rel_l2: float | None = None
    norm_ratio: float | None = None
    total_variation: float | None = None
    floor: float | None = None
    ratio: float | None = None
    floor_origin: Literal["manifest", "generic", "tolerance"] | None = None
    layout: Sides = Sides(None, None)
    masked: Sides = Sides(None, None)
    nonfinite: Nonfinite | None = None
    blocks: list[Block] = []
    block: str | None = None
    worst: Worst | None = None
    pairs: list[PairResult] = []
    odd_one_out: int | None = None
    notes: list[str] = []
    top_diffs: list[TopDifference] = []
    logits: Logits | None = None


class Result(msgspec.Struct, frozen=True):
    """The result of comparing two or three dumps.

    Attributes:
        schema: Names this format.
        verdict: agree, differ, incomplete or incomparable.
        reason: The verdict in words.
        first_divergence: The first stage that differs.
        odd_one_out: Of three, the dump that differs from the other two there.
        paths: Of the dumps.
        made_by: What their manifests say of them.
        notes: What the user accepted, and what else a reader should know.
        single: Whether these are two single files.
        stages: In chain order.
    """

    schema: Literal["qwenref-diff-v1"]
    verdict: Verdict
    reason: str
    first_divergence: Divergence | None
    odd_one_out: int | None
    paths: list[str]
    made_by: list[str | None]
    notes: list[str]
    single: bool
    stages: list[StageResult]

    @property
    def exit_status(self) -> int:
        """0 if they agree, 1 if they differ, 2 if it could not be said."""
        return {"agree": 0, "differ": 1}.get(self.verdict, 2)

    def to_json(self, limit: int | None = None) -> str:
        """Return what `qwenref diff --json` prints: JSON without NaN or Infinity.

        Of two single files that is what apr prints of them, and ours beside it; else this result.

        Args:
            limit: How many of the largest differences of each stage; all that were kept if None.
        """
        stages = [
            msgspec.structs.replace(stage, top_diffs=stage.top_diffs[:limit])
            for stage in self.stages
        ]
        result = msgspec.structs.replace(self, stages=stages)
        printed = _of_files(result) if self.single else result
        return msgspec.json.format(msgspec.json.encode(printed), indent=2).decode() + "\n"


class FileResult(StageResult, frozen=True, kw_only=True):
    """What we say of two single files: their stage, whose `reason` and `notes` are all there are.

    Attributes:
        verdict: As in `Result`.
        made_by: As in `Result`.
    """

    verdict: Verdict
    made_by: list[str | None]


class StageDiff(msgspec.Struct, frozen=True):
    """What `apr diff --values --json` (0.72.3) prints of two single files, and ours beside it.

    Fields mean what they do there, but a number that is not finite, or has no meaning, is null
    (there a cosine of 0), NaN is never skipped, and masked cells are left out if shapes are known.
    """

    schema: Literal["apr-stage-diff-v1"]
    path_a: str
    path_b: str
    layer: int | None
    dim_product: int | None
    max_abs_diff: float | None
    max_abs_diff_index: int | None
    rms_diff: float | None
    cosine_sim: float | None
    top_diffs: list[TopDifference]
    qwenref: FileResult


def _of_files(result: Result) -> StageDiff:
    nothing = StageResult(layer=None, stage="", status="unmeasured", reason=None, required=True)
    stage = next(iter(result.stages), nothing)
    fields = msgspec.structs.asdict(stage)
    fields |= {"reason": result.reason, "notes": [*result.notes, *stage.notes]}
    path_a, path_b = result.paths
    return StageDiff(
        schema="apr-stage-diff-v1",
        path_a=path_a,
        path_b=path_b,
        layer=WHOLE_MODEL if stage.layer is None and result.stages else stage.layer,
        dim_product=stage.dim_product,
        max_abs_diff=stage.max_abs_diff,
        max_abs_diff_index=stage.max_abs_diff_index,
        rms_diff=stage.rms_diff,
        cosine_sim=stage.cosine_sim,
        top_diffs=stage.top_diffs,
        qwenref=FileResult(**fields, verdict=result.verdict, made_by=result.made_by),
    )
