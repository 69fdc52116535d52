"""Honest choices of engines: what is rounded to what, and which stages are made in one go.

A dialect is executed, like a fault, and then its error is looked at; unlike a fault it is never a
verdict. llama.cpp rounds the operands of its products to the type of their matrices (ggml-cpu.c),
and those of attention to the type of the KV cache; transformers rounds every result
(modeling_qwen2.py); a GPU may round operands to TF32.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np

from qwenref.model.formats import in_format
from qwenref.model.precision import RESULTS
from qwenref.stages import RESIDUAL

NARROW = ("bfloat16", "float16")
"""Formats of results and of whole dumps, in the order in which they are tried."""

FLOATING = ("float16", "bfloat16", "tf32")
BLOCKS = ("q8_0", "q8_K")
"""Formats of the operands of products; activations alone are rounded to blocks."""

MATRICES = {
    "qkv_matmul": "qkv_operands",
    "attn_out": "out_operands",
    "ffn_gate": "ffn_operands",
    "ffn_up": "ffn_operands",
    "ffn_out": "down_operands",
    "lm_head": "head_operands",
}
CACHE = {"attn_scores": "scores_operands", "attention": "attention_operands"}
"""Where the operands of products are rounded: to the format of matrices, or of the KV cache."""

OPERAND_POINTS = MATRICES | CACHE

INPUTS = {"attn_scores": ("q", "k"), "attention": ("probabilities", "v")}
"""What to call operands that may be rounded apart."""

INNER = {
    "attn_norm": {"normed": "x / rms rounded before the weight"},
    "q_post_rope": {"cos_sin": "cos and sin rounded", "rotated": "both products rounded"},
    "k_post_rope": {"cos_sin": "cos and sin rounded", "rotated": "both products rounded"},
    "attn_scores": {"products": "q . k rounded before the scale"},
    "ffn_norm": {"ffn_normed": "x / rms rounded before the weight"},
    "final_norm": {"final_normed": "x / rms rounded before the weight"},
}
"""Where an engine that rounds results may round inside a stage too."""

EARLY = {
    "qkv_matmul": "the product rounded before the bias is added",
    "ffn_silu": "silu(gate) rounded before the product with up",
    "post_attn_residual": "the sum with the residual rounded before the norm",
}
"""What may be rounded on the way to the next stage, or not: transformers adds the bias before the
one rounding, and rounds the product for a dump alone; kernels that fuse two stages round once.
"""


class Fused(NamedTuple):
    """A stage that an engine may make without another one, which it dumps all the same."""

    without: str
    id: str
    text: str


FUSED = {
    "qkv_bias": Fused("qkv_matmul", "fused-bias", "bias added in the same kernel"),
    "ffn_swigl": Fused("ffn_silu", "fused-silu", "silu and product in one kernel"),
    "ffn_norm": Fused("post_attn_residual", "fused-sum", "sum and norm in one kernel"),
}
"""By the stage that is made in one go with the one before it."""

Formats = tuple[tuple[str, str], ...]
"""Rounding points and the format at each."""


class Override(NamedTuple):
    """A stage that is computed otherwise: by mistake.

    Attributes:
        stage: Which.
        compute: Of a replay, the span, whose dumps are not read, the dialect, and the inputs.
    """

    stage: str
    compute: Callable[..., np.ndarray]


@dataclass(frozen=True)
class Dialect:
    """One honest choice.

    Attributes:
        id: A short name.
        text: In words.
        inputs: The format that each input is rounded to; empty for none.
        formats: The format at rounding points (`qwenref.model.precision.POINTS`), of this stage and
            of those that are computed on the way to it.
        result: The format of the result.
        skips: Stages that exist in dumps alone, because the engine makes this one without them.
        flash: Whether `flash_attention` stands for attn_scores, attn_softmax and attention.
        undivided: Whether probabilities are rounded before they are divided by their sum.
        scaled_first: Whether queries are rounded after 1/sqrt(H) was applied to them.
        minus_bias: Whether qkv_matmul is taken as output minus bias.
        then: The format of that difference.
        estimated: Whether it cannot be executed: only how much error it makes is known.
        override: A mistake, in this stage or on the way to it.
    """

    id: str
    text: str
    inputs: tuple[str, ...] = ()
    formats: Formats = ()
    result: str = "exact"
    skips: frozenset[str] = frozenset()
    flash: bool = False
    undivided: bool = False
    scaled_first: bool = False
    minus_bias: bool = False
    then: str = "exact"
    estimated: bool = False
    override: Override | None = None

    @property
    def rounds_unseen(self) -> bool:
        """Whether it rounds what is in no dump, and may flip for what float32 makes of that."""
        return self.flash or self.undivided

    @property
    def on_the_way(self) -> "Dialect":
        """How stages are computed that this one takes and that are not held."""
        return replace(EXACT, formats=self.formats, flash=self.flash, override=self.override)

    @property
    def of_output(self) -> "Dialect":
        """How the output is computed that the bias is taken from."""
        return replace(self, minus_bias=False)

    def rounded_inputs(self, given: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Round the inputs of a stage."""
        if not self.inputs:
            return [*given]
        if self.undivided:
            softmax, v = given
            largest = softmax.max(axis=-1, keepdims=True)
            scaled = np.divide(softmax, largest, out=np.zeros_like(softmax), where=largest > 0)
            return [in_format(scaled, self.inputs[0]) * largest, in_format(v, self.inputs[1])]
        if self.scaled_first:
            q, k = given
            scale = np.float32(q.shape[-1] ** -0.5)
            scaled = (q.astype(np.float32) * scale).astype(np.float64)
            return [in_format(scaled, self.inputs[0]) / scale, in_format(k, self.inputs[1])]
        return [in_format(x, name) for x, name in zip(given, self.inputs, strict=True)]


EXACT = Dialect("exact", "float32")


def with_weights(dialect: Dialect, weights: Formats) -> Dialect:
    """Return a dialect of an engine that holds weights, or the embedding table, in a format."""
    if not weights or "stored" in dict(dialect.formats):
        return dialect
    ((point, narrow),) = weights
    what = "weights" if point == "stored" else "embedding table"
    exact = dialect.id == EXACT.id
    return replace(
        dialect,
        id="-".join([what.split()[-1], narrow, *([] if exact else [dialect.id])]),
        text=f"{what} rounded to {narrow}" + ("" if exact else f", {dialect.text}"),
        formats=(*dialect.formats, *weights),
    )


def with_operands(dialect: Dialect, narrow: str) -> Dialect:
    """Return a dialect in whose name it stands that operands are rounded too."""
    if narrow == "exact":
        return dialect
    return replace(
        dialect,
        id=f"{dialect.id}-operands-{narrow}",
        text=f"{dialect.text}, operands to {narrow} or finer",
    )


def operand_dialects(stage: str, bridges: Collection[str], weights: Formats) -> Iterator[Dialect]:
    """Yield how the operands of products may be rounded, those first that round the least.

    Args:
        stage: The stage that is computed.
        bridges: Stages that are computed on the way.
        weights: What weights are rounded to; if they are, that may be all.
    """
    if weights:
        yield EXACT
    on_the_way = {stage, *bridges}
    matrices = [point for name, point in MATRICES.items() if name in on_the_way]
    caches = [point for name, point in CACHE.items() if name in on_the_way]
    if stage in INPUTS and not bridges:
        yield from _apart(stage)
        return
    of_matrices = ["exact", *(FLOATING + BLOCKS if matrices else ())]
    of_caches = ["exact", *(FLOATING if caches else ())]
    if {"attn_scores", "attn_softmax", "attention"} <= on_the_way:
        of_caches.append("flash")
    pairs = sorted(product(of_matrices, of_caches), key=lambda pair: -pair.count("exact"))
    for matrix, cache in pairs[1:]:
        yield _of_products(matrices, matrix, caches, cache)
    if stage in INPUTS:
        yield from _apart(stage)


def _of_products(
    matrices: Sequence[str], matrix: str, caches: Sequence[str], cache: str
) -> Dialect:
    names, texts, formats = [], [], []
    if matrix != "exact":
        names.append(f"operands-{matrix}")
        texts.append(f"operands rounded to {matrix}")
        formats += [(point, matrix) for point in matrices]
    if cache == "flash":
        names.append("flash-float16")
        texts.append("flash attention with q, k, v and the running sum of values in float16")
    elif cache != "exact":
        names.append(f"{'cache' if names else 'operands'}-{cache}")
        texts.append(f"{'those of attention' if texts else 'operands rounded'} to {cache}")
        formats += [(point, cache) for point in caches]
    return Dialect(
        "-".join(names), ", ".join(texts), formats=tuple(formats), flash=cache == "flash"
    )


def _apart(stage: str) -> Iterator[Dialect]:
    """Yield how the two operands of a product may be rounded, together or apart."""
    names = INPUTS[stage]
    pairs = [*product(("exact", *FLOATING), repeat=2)]
    for pair in sorted(pairs, key=lambda pair: (-pair.count("exact"), pair[0] != pair[1])):
        if pair == ("exact", "exact"):
            continue
        if pair[0] == pair[1]:
            yield Dialect(f"operands-{pair[0]}", f"operands rounded to {pair[0]}", pair)
            continue
        rounded = [(name, to) for name, to in zip(names, pair, strict=True) if to != "exact"]
        yield Dialect(
            "-".join(f"{name}-{to}" for name, to in rounded),
            " and ".join(f"{name} rounded to {to}" for name, to in rounded),
            pair,
        )
    first, second = names
    scores = stage == "attn_scores"
    how = "after 1/sqrt(H)" if scores else "before they are divided by their sum"
    for to, of in pairs:
        if to != "exact":
            yield Dialect(
                f"{'scaled' if scores else 'undivided'}-{to}-{second}-{of}",
                f"{first} rounded to {to} {how}" + ("" if of == "exact" else f", {second} to {of}"),
                (to, of),
                undivided=not scores,
                scaled_first=scores,
            )


def minus_bias(output: Dialect = EXACT, then: str = "exact") -> Dialect:
    """Return that qkv_matmul is taken as output minus bias.

    Args:
        output: How the output is computed: a dialect of qkv_bias.
        then: The format of the difference.
    """
    exact = output.id == EXACT.id
    return replace(
        output,
        id="output-minus-bias" + ("" if exact else f"-{output.id}"),
        text="output minus bias" + ("" if exact else f": {output.text}"),
        minus_bias=True,
        then=then,
    )


def result_dialects(
    stage: str, bridges: Collection[str], narrow: str, *, stored: bool
) -> Iterator[Dialect]:
    """Yield how results may be rounded to a format, and what may be rounded on the way.

    Args:
        stage: The stage that is computed.
        bridges: Stages that are computed on the way; their results are rounded too.
        narrow: The format.
        stored: Whether weights are rounded to it as well.
    """
    between = [name for name in bridges if name in RESULTS and name not in EARLY]
    if stage == RESIDUAL:
        yield Dialect(
            f"result-{narrow}",
            f"result rounded to {narrow}",
            formats=(("stored", narrow),),
            result=narrow,
        )
        return
    found: dict[str, str] = {}
    for name in (stage, *bridges):
        found |= INNER.get(name, {})
    inner = [*found.items()]
    some = (inner, *([one] for one in inner if len(inner) > 1), *([[]] if inner else []))
    unseen = [(point, text) for point, text in EARLY.items() if point in bridges]
    for early, chosen in product((False, True) if unseen else (False,), some):
        points = [*chosen, *(unseen if early else ())]
        once = stage == "qkv_bias" and "qkv_matmul" in bridges and not early
        text = f"{'bias added before the one rounding' if once else 'result rounded'} to {narrow}"
        names = [point for point, _ in points]
        formats = [(point, narrow) for point in (*(["stored"] * stored), *between, *names)]
        yield Dialect(
            "-".join([f"result-{narrow}", *names]),
            ", ".join([text, *(words for _, words in points)]),
            formats=tuple(formats),
            result=narrow,
        )


def flash_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int) -> np.ndarray:
    """Attend key by key, as llama.cpp does with a float16 cache (ggml_flash_attn_ext, CPU).

    Operands are rounded to float16, and so is the running sum of values after each key.

    Args:
        q: [T, N, H].
        k: [S, K, H].
        v: [S, K*H].
        first: Position of the first query.

    Returns:
        [T, E].
    """
    T, N, H = q.shape
    S, K, _ = k.shape
    q, k, v = (in_format(x, "float16") for x in (q, k, v.reshape(S, K, H)))
    scores = np.einsum("TKGH,SKH->STKG", q.reshape(T, K, N // K, H), k).reshape(S, T, N)
    scores = scores.astype(np.float32) * np.float32(H**-0.5)
    largest, total, mixed = (
        np.full((T, N), -np.inf, np.float32),
        np.zeros((T, N)),
        np.zeros((T, N, H)),
    )
    for key in range(S):
        seen = slice(max(0, key - first), None)  # the queries that see it
        score = scores[key, seen]
        above = np.maximum(largest[seen], score)
        kept, weight = np.exp(largest[seen] - above), np.exp(score - above)
        values = np.repeat(v[key], N // K, axis=0)
        scaled = (mixed[seen] * kept[:, :, None]).astype(np.float32).astype(np.float16)
        added = scaled + weight[:, :, None] * values
        mixed[seen] = added.astype(np.float32).astype(np.float16)
        total[seen] = total[seen] * kept + weight
        largest[seen] = above
    return (mixed / total[:, :, None]).reshape(T, -1)
