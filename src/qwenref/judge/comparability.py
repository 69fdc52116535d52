"""Whether dumps are of the same thing at all: stage, layer, tokens, weights."""

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations

from qwenref.dumps.manifest import Manifest
from qwenref.dumps.reading import Dump
from qwenref.judge.measurement import LETTERS
from qwenref.stages import BY_NAME


def as_one_stage(dumps: Sequence[Dump]) -> tuple[Sequence[Dump], str | None]:
    """If a dump is a single file, cut all down to its stage; return why that cannot be, if so.

    A file says in its path or header which stage of which layer it holds, or it does not.
    """
    files = [dump for dump in dumps if dump.single]
    if not files:
        return dumps, None
    keys = [next(iter(dump.stages)) for dump in files]
    names = [name for _, name in keys if name in BY_NAME] or [name for _, name in keys[:1]]
    stated = [layer for dump, (layer, _) in zip(files, keys, strict=True) if dump.single == "sure"]
    layers = stated or [layer for layer, _ in keys]
    for what, found in (("stages", names), ("layers", layers)):
        if len(set(found)) > 1:
            each = " and ".join(map(str, found))
            return dumps, f"the files are of different {what}: {each}"
    key = layers[0], names[0]
    cut = []
    for dump in dumps:
        own = next(iter(dump.stages)) if dump.single else key
        stages = {key: dump.stages[own]} if own in dump.stages else {}
        axes = {key: dump.axes[own]} if own in dump.axes else {}
        cut.append(dump._replace(stages=stages, axes=axes))
    return cut, None


def difference(dumps: Sequence[Dump], *, allow_different_weights: bool) -> str | None:
    """Return why dumps are not of the same thing, None if nothing says so."""
    for letter, dump in zip(LETTERS, dumps, strict=False):
        found = misplaced(dump, letter)
        if found:
            return found
    layers = [{layer for layer, name in dump.stages if name in BY_NAME} for dump in dumps]
    if all(layers) and not set.intersection(*layers):
        each = [f"{name} has {_listed(of)}" for name, of in zip(LETTERS, layers, strict=False)]
        return "no layer is in all of them: " + ", ".join(each)
    for (first, a), (second, b) in _with_manifests(dumps):
        problem = _other_input(a, b)
        if problem is None and not allow_different_weights:
            problem = _other_weights(a, b)
        if problem:
            return f"{first} and {second} {problem}"
    return None


def misplaced(dump: Dump, called: str) -> str | None:
    """Return which file of a dump says in its header that it is of another layer, if one does."""
    for (layer, name), parts in dump.stages.items():
        for part in parts.values():
            if part.says_layer and part.layer != layer:
                says = f"in its header that it is of {_named(part.layer)}"
                return f"{name} of {_named(layer)} of {called} says {says}"
    return None


def accepted(dumps: Sequence[Dump], *, allow_different_weights: bool) -> list[str]:
    """Return what was allowed, and would make dumps incomparable otherwise."""
    problems = (_other_weights(a, b) for (_, a), (_, b) in _with_manifests(dumps))
    if allow_different_weights and any(problems):
        return ["the weights are different, as allowed: differences may be theirs"]
    return []


def _with_manifests(
    dumps: Sequence[Dump],
) -> Iterator[tuple[tuple[str, Manifest], tuple[str, Manifest]]]:
    """Return every two dumps that have manifests, each with its name."""
    named = zip(LETTERS, dumps, strict=False)
    return combinations([(name, dump.manifest) for name, dump in named if dump.manifest], 2)


def _named(layer: int | None) -> str:
    return "the whole model" if layer is None else f"layer {layer}"


def _listed(layers: Collection[int | None]) -> str:
    numbers = ", ".join(map(str, sorted(layer for layer in layers if layer is not None)))
    return " and ".join([f"layer {numbers}"] * bool(numbers) + ["the head"] * (None in layers))


def _other_input(a: Manifest, b: Manifest) -> str | None:
    if a.tokens is not None and b.tokens is not None and a.tokens != b.tokens:
        if len(a.tokens) != len(b.tokens):
            return f"are of {len(a.tokens)} and {len(b.tokens)} tokens"
        at = next(i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y)
        return f"are of other tokens: {a.tokens[at]} and {b.tokens[at]} at position {at}"
    if a.input is not None and b.input is not None and a.input != b.input:
        return "were entered by different residual streams"
    return None


def _other_weights(a: Manifest, b: Manifest) -> str | None:
    if a.config != b.config:
        return "are of different models: their manifests differ in config"
    ours, theirs = (_prints(manifest) for manifest in (a, b))
    for what, fingerprint in ours.items():
        if theirs.get(what, fingerprint) != fingerprint:
            return f"are of different {what}; --allow-different-weights compares"
    return None


def _prints(manifest: Manifest) -> dict[str, str]:
    """Return the fingerprints of all weights that a manifest has, by what they are called."""
    weights = manifest.weights
    found = {f"weights in layer {n}": weights.layers[n] for n in sorted(weights.layers, key=int)}
    found |= {f"MLP weights in layer {n}": of for n, of in weights.feed_forwards.items()}
    others = {
        "embedding tables": weights.embedding,
        "weights of the final norm": weights.final_norm,
        "matrices of lm_head": weights.lm_head,
    }
    return found | {what: of for what, of in others.items() if of is not None}
