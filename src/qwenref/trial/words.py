"""What was found of one engine's dumps, in words."""

from collections.abc import Iterator, Sequence

from qwenref.errors import printable
from qwenref.stages import RESIDUAL
from qwenref.trial.explanation import (
    Cause,
    Explanation,
    Hidden,
    LayersExplanation,
    StageExplained,
    Verdict,
)
from qwenref.trial.recovery import in_words

ORIGIN = ("added", "dumped_wrong")
CARRIED = ("agree", "inherited")
SHOWN = 3
"""Mistakes that are told, of those too small to be seen."""

PARTS = {
    "norm": ("attn_norm", "ffn_norm", "final_norm"),
    "projections": ("qkv_matmul", "qkv_bias", "attn_out"),
    "RoPE": ("q_post_rope", "k_post_rope"),
    "attention": ("attn_scores", "attn_softmax", "attention"),
    "MLP": ("ffn_gate", "ffn_up", "ffn_silu", "ffn_swigl", "ffn_out"),
    "residual": ("post_attn_residual", "post_ffn_residual"),
    "lm_head": ("lm_head",),
}
"""What the stages are called together."""


CONVICTED = {
    None: "Neither of the two is wrong here.",
    "dump": "The reference is right; the dump is wrong.",
    "reference": "It is the reference that is wrong.",
    "both": "Both are wrong.",
}


def verdict_of(answer: Explanation) -> tuple[Verdict, str]:
    """Return the verdict, and why, in one sentence."""
    if answer.origins:
        return "fault", " ".join(_blame(answer))
    bridged = {name for of in answer.stages if of.status in CARRIED for name in of.bridged}
    open_ = [
        of
        for of in answer.stages
        if of.stage != "embedding"
        and (of.status == "blind" or (of.status == "unmeasured" and of.stage not in bridged))
    ]
    if open_:
        return "incomplete", f"no stage is wrong, but {'; '.join(_open(answer, open_))}"
    noise = ", but for rounded weights" if answer.weight_noise else ""
    over = [of.stage for of in answer.stages if of.status == "unmeasured"]
    across = f"; {listed(over)} not dumped, and bridged" if over else ""
    return "agree", f"every stage follows from what it was computed from{noise}{across}"


def _open(answer: Explanation, stages: Sequence[StageExplained]) -> Iterator[str]:
    """Yield which stages could not be judged, and why."""
    held = [of.stage for of in stages if of.layout is not None]
    if held:
        how = "" if answer.model else ": give the checkpoint with --model"
        yield f"{listed(held)} could not be judged{how}"
    files = [of for of in stages if of.layout is None]
    yield from (f"{of.stage} cannot be used: {of.reason}" for of in files if of.reason is not None)
    absent = [of.stage for of in files if of.reason is None]
    if absent:
        names = _range(absent, [of.stage for of in answer.stages])
        yield f"{names} {'was' if len(absent) == 1 else 'were'} not dumped"


def summary_of(answer: Explanation) -> list[str]:
    """Return the last lines of the report."""
    lines = [f"{part_named(answer.layer)}: {answer.reason}", *causes_of(answer)]
    lines += _unseen(answer.stages)
    how = "; ".join(computes(answer.stages))
    if how:
        lines.append(f"Your engine computes: {how}.")
    if answer.weight_noise is not None:
        lines.append(f"Its weights seem to be rounded {bits_of(answer)}.")
    return lines


def part_named(layer: int | None) -> str:
    """Return what a layer is called, or what follows the last one."""
    return "head" if layer is None else f"layer {layer}"


def causes_of(answer: Explanation) -> Iterator[str]:
    """Yield what the mistakes are; what is made in several stages, once."""
    by_text: dict[str, list[StageExplained]] = {}
    for of in answer.stages:
        if of.cause is not None and of.cause.id != "tokens":
            by_text.setdefault(of.cause.text, []).append(of)
    for text, found in by_text.items():
        left = max(of.cause.error_after or 0.0 for of in found if of.cause is not None)
        others = " (or another: see above)" if any(of.equivalent for of in found) else ""
        one = (
            f"{found[0].stage} to"
            if len(found) == 1
            else f"{listed([of.stage for of in found])} to"
        )
        yield f"Cause: {text}: reproduces {one} {left:.2g}{others}."
    for of in answer.stages:
        if of.hidden is not None:
            others = " (or another: see above)" if of.equivalent else ""
            yield f"Hidden under the noise of {of.stage}: {_certain(of.hidden)}{others}."
    unknown = [of.stage for of in answer.stages if of.status in ORIGIN and of.cause is None]
    if unknown:
        yield f"Cause: unknown, of {listed(unknown)}."
    if answer.tokens_recovered is not None:
        words = in_words(answer.tokens_recovered, answer.tokens or [])
        yield words[0].upper() + words[1:] + "."


def _unseen(stages: Sequence[StageExplained]) -> Iterator[str]:
    """Yield which mistakes would be too small to be seen."""
    found = sorted((one for of in stages for one in of.unseen), key=lambda of: of.tokens)
    if not found:
        return
    shown = [f"{of.text} ({of.tokens})" for of in found[:SHOWN]]
    more = [f"{len(found) - SHOWN} more"] if len(found) > SHOWN else []
    yield f"Too small to be seen here, with fewer distinct tokens than: {listed(shown + more)}."


def _blame(answer: Explanation) -> Iterator[str]:
    added = [of for of in answer.stages if of.status == "added"]
    wrong = [of for of in answer.stages if of.status == "dumped_wrong"]
    hidden = [of.stage for of in answer.stages if of.hidden is not None]
    if hidden:
        verb = "holds" if len(hidden) == 1 else "hold"
        yield f"{listed(hidden)} {verb} a mistake that is smaller than the noise of rounding."
    if added:
        verb = "adds" if len(added) == 1 else "add"
        yield f"{listed([_span(of) for of in added])} {verb} the error ({_sizes(added)})."
    if wrong:
        files = listed([of.stage for of in wrong])
        one = len(wrong) == 1
        yield (
            f"The file{'s' * (not one)} of {files} {'is' if one else 'are'} wrong, but what was "
            "computed from it is right: the engine did not use these values (stale file, wrong "
            "hook, captured too early or too late?)."
        )
    yield from _around(answer)


def _around(answer: Explanation) -> Iterator[str]:
    """Yield what is said of the stages before and after the first that is wrong."""
    names = [of.stage for of in answer.stages]
    first = next(at for at, name in enumerate(names) if name in answer.origins)
    before = [of for of in answer.stages[:first] if of.status != "unmeasured"]
    earlier = [of.stage for of in before if of.status == "inherited"]
    after = [of.stage for of in answer.stages[first:] if of.status == "inherited"]
    said = []
    if earlier:
        said.append(f"Before it, {_inherit(earlier, names)} an error of an earlier layer")
    elif before and all(of.status == "agree" for of in before):
        said.append("Everything before agrees")
    if after:
        what = _inherit(after, names, "only ")
        said.append(f"{what} it" if said else f"After it, {what} it")
    if said:
        yield f"{'; '.join(said)}."


def _inherit(names: Sequence[str], chain: Sequence[str], only: str = "") -> str:
    return f"{_range(names, chain)} {only}inherit{'s' * (len(names) == 1)}"


def _span(of: StageExplained) -> str:
    """Return a stage, with what it was computed from if others lie between."""
    sources = [*(["the layer before"] if RESIDUAL in of.bridged else []), *of.computed_from]
    if not of.bridged or not sources:
        return of.stage
    return f"{of.stage} (somewhere between {listed(sources)} and it)"


def _sizes(added: Sequence[StageExplained]) -> str:
    """Return how large the errors are that stages add, against what is normal, and where."""
    reasons = [of.reason for of in added if of.reason is not None]
    errors = [f"{of.added:.2g}" for of in added if of.reason is None and of.added is not None]
    floors = [of.floor for of in added if of.reason is None and of.floor is not None]
    words = [*reasons]
    if errors:
        words.append(listed(errors))
    if floors:
        words.append(f"floor {max(floors):.1e}")
    patterns = {of.pattern for of in added if of.pattern}
    return "; ".join([*words, *(patterns if len(patterns) == 1 else ())])


def computes(stages: Sequence[StageExplained]) -> Iterator[str]:
    """Yield for each part of the layer in which precision it is computed."""
    said: dict[str, list[str]] = {}
    for part, names in PARTS.items():
        texts = dict.fromkeys(
            _precision(of) for of in stages if of.stage in names and of.status in CARRIED
        )
        texts.pop("float32", None) if len(texts) > 1 else None
        if texts:
            said.setdefault(", ".join(texts), []).append(part)
    for text, parts in said.items():
        cache = "attention" in parts and len(parts) == 1 and text == "operands rounded to float16"
        yield f"{listed(parts)}: {text}{' (f16 KV cache?)' if cache else ''}"


def _precision(of: StageExplained) -> str:
    return of.dialects[0].text if of.dialects else "float32"


def bits_of(answer: Explanation) -> str:
    """Return ``to about 4 bits: q and k; to about 6 bits: v``."""
    tensors: dict[int, list[str]] = {}
    for name in ("embedding", "q", "k", "v", "o", "gate", "up", "down", "lm_head"):
        bits = getattr(answer.weight_noise, name)
        if bits is not None:
            tensors.setdefault(round(bits), []).append(name)
    return "; ".join(f"to about {bits} bits: {listed(of)}" for bits, of in tensors.items())


def listed(names: Sequence[str]) -> str:
    """Return names as ``a, b and c``."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _range(names: Sequence[str], chain: Sequence[str]) -> str:
    """Return stages as ``a .. b`` if they follow each other."""
    if len(names) > 2 and [*names] == [*chain][chain.index(names[0]) :][: len(names)]:
        return f"{names[0]} .. {names[-1]}"
    return listed(names)


def report(answer: Explanation) -> str:
    """Return the whole report; its last lines are the summary."""
    title = f"{answer.path}, {part_named(answer.layer)}, against {answer.model or 'no model'}"
    lines = [title, *of_tokens(answer), "", *table(answer), "", *last_lines(answer)]
    if answer.reference is not None:
        lines += ["", *report(answer.reference).splitlines(), "", CONVICTED[answer.convicted]]
    return "\n".join(printable(line) for line in lines)


def table(answer: Explanation) -> Iterator[str]:
    """Yield a line for each stage, what there is to say of it, and the checks that fail."""
    columns = ("stage", "status", "added", "floor", "ratio", "total", "cosine", "layout")
    rows = [_row(of) for of in answer.stages]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for of, row in zip((None, *answer.stages), (columns, *rows), strict=True):
        yield "  ".join(map(str.ljust, row, widths)).rstrip()
        if of is not None:
            yield from (f"    {note}" for note in _notes(of))
    for check in answer.checks:
        if check.status == "fails":
            yield f"check fails: {check.name} (off by {_number(check.value)})"


def last_lines(answer: Explanation | LayersExplanation) -> list[str]:
    """Return the verdict, and what it means, in words."""
    first, *others = answer.summary
    return [f"{answer.verdict.upper()}: {first}", *others]


def of_tokens(answer: Explanation | LayersExplanation) -> Iterator[str]:
    """Yield which tokens a dump was compared for, and how those are known."""
    if answer.tokens is None:
        return
    shown = ", ".join(map(str, answer.tokens[:12]))
    more = f" and {len(answer.tokens) - 12} more" if len(answer.tokens) > 12 else ""
    origin = {
        "default": "of `What is 2+2?`, which is assumed: give --prompt or --tokens if not",
        "manifest": "as its manifest says",
        "given": "as given",
    }[answer.tokens_from or "given"]
    yield f"{len(answer.tokens)} tokens {shown}{more}, {origin}"


def _row(of: StageExplained) -> tuple[str, ...]:
    if of.status == "unmeasured" and of.layout is None:
        return of.stage, of.status, "-", "-", "-", "-", "-", ""
    ratio = "-" if of.ratio is None else f"{of.ratio:.2g}" if of.ratio < 1e4 else f"{of.ratio:.0e}"
    return (
        of.stage,
        of.status,
        _number(of.added),
        _number(of.floor),
        ratio,
        _number(of.total),
        "-" if of.cosine is None else f"{of.cosine:.5f}",
        of.layout or "",
    )


def _notes(of: StageExplained) -> Iterator[str]:
    if of.reason is not None:
        yield of.reason
    if of.pattern is not None:
        yield f"off: {of.pattern}"
    if of.cause is not None:
        yield f"cause: {_explained(of.cause)}"
    elif of.nearest is not None:
        yield f"cause unknown; nearest: {_explained(of.nearest)}"
    if of.hidden is not None:
        yield f"hidden under the noise: {_certain(of.hidden)}"
    for other in of.equivalent:
        told = f"; {other.told_by} would tell" if other.told_by else ", and on other prompts"
        yield f"or {other.text}: the same here{told}"
    if of.bridged and of.computed_from:
        yield f"computed from {listed(of.computed_from)}: {listed(of.bridged)} cannot be read"
    for at, dialect in enumerate(of.dialects):
        yield f"{'or ' * (at > 0)}{dialect.text}: leaves {_number(dialect.error_after)}"


def _certain(hidden: Hidden) -> str:
    return f"{hidden.text} ({hidden.alpha:.2f} times in the error, z {hidden.z:.0f})"


def _explained(cause: Cause) -> str:
    left = "" if cause.error_after is None else f": leaves {_number(cause.error_after)}"
    return cause.text + left


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value else "0"
