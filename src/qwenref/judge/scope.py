"""What there is to compare in two or three dumps: sizes, how many tokens, which stages."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from qwenref.dumps.manifest import Manifest
from qwenref.dumps.reading import Dump, Key, Stored
from qwenref.errors import QwenrefError
from qwenref.judge.arrangement import LAST, PADDED, arrangements, has_shape, heads_and_width
from qwenref.judge.asked import NINE, Asked, asked_for, chosen
from qwenref.stages import ALL, BY_NAME, MAX_LAYERS

PADDING = 32
"""Keys are padded to a multiple of so many, or more, by llama.cpp."""

_NAMES = [stage.name for stage in ALL]


def sizes_in(
    manifests: Sequence[Manifest], given: Mapping[str, int] | None
) -> dict[str, int] | None:
    """Return N, K, H, D, and I, V and L if known: of a manifest, and given ones."""
    if not manifests:
        return None if given is None else dict(given)
    sizes = dict(given or {}) | manifests[0].config.sizes
    if given is not None and given.items() - sizes.items():
        raise QwenrefError(
            f"the sizes given are {dict(given)}, but a manifest says {manifests[0].config.sizes}"
        )
    return sizes


def tokens_in(dumps: Sequence[Dump], sizes: Mapping[str, int] | None) -> int | None:
    """Return T: what a manifest says, else what files fit best: whole rather than in part."""
    for manifest in (dump.manifest for dump in dumps if dump.manifest):
        for file in manifest.stages:
            by_letter = dict(zip(file.axes.split(), file.shape, strict=True))
            if "T" in by_letter:
                return by_letter["T"]
    if sizes is None:
        return None
    lengths = {T for dump in dumps for T in _lengths(dump, sizes) if T}
    return max(lengths, key=lambda T: (sum(fits(dumps, sizes, T)), T), default=None)


def fits(dumps: Sequence[Dump], sizes: Mapping[str, int], T: int) -> list[int]:
    """Return how well each file that fits a number of tokens does: 3, or less if just in part."""
    ways = (
        next(arrangements(BY_NAME[name], sizes, T, [part.count for part in parts.values()]), None)
        for dump in dumps
        for (_, name), parts in dump.stages.items()
        if name in BY_NAME
    )
    return [
        3 - (LAST in way.name) - (PADDED in way.name)
        for way in ways
        if way and not (LAST in way.name and way.padding % PADDING)
    ]


def _lengths(dump: Dump, sizes: Mapping[str, int]) -> Iterator[int]:
    """Yield for each stage of known shape how many tokens it has; 0 if it does not fit."""
    for (_, name), parts in dump.stages.items():
        if name not in BY_NAME or not has_shape(BY_NAME[name], sizes):
            continue
        row, count = BY_NAME[name], sum(part.count for part in parts.values())
        if row.masked:
            yield from _queries(count, sizes["N"], parts[None])
        elif None in parts:
            T, rest = divmod(count, math.prod(heads_and_width(row, sizes, 1)))
            yield 0 if rest else T


def _queries(count: int, N: int, stored: Stored) -> list[int]:
    """Return what T may be, of N T T scores or of N T scores with padded keys.

    Without a shape it is not told from those, if as many keys may be padded ones.
    """
    if stored.shape is not None and len(stored.shape) > 1:
        return sorted({*stored.shape})
    T = math.isqrt(count // N)
    return [] if count != N * T * T or (T > 1 and T * T % PADDING == 0) else [T]


def keys_in(
    dumps: Sequence[Dump], stages: Asked | None, layers: Collection[int] | None
) -> dict[Key, bool]:
    """Return the stages to compare, in chain order, and whether the verdict depends on each.

    It depends on what was asked for (`asked_for`), and on the nine of attention in layers of which
    all dumps have some, even if a dump lacks them; on the other stages of the table where all dumps
    have them; on no others.

    Args:
        dumps: In which to look.
        stages: Those that are wanted; None for all.
        layers: Their layers; None for all, and the stages of the whole model.

    Raises:
        QwenrefError: A stage or layer that was asked for is in none of the dumps.
    """
    every = {key for dump in dumps for key in dump.stages}
    try:
        keys = sorted(chosen(every, stages, layers), key=_place_in_chain)
    except LookupError as error:
        raise QwenrefError(f"none of the dumps has {error}; {holdings(dumps)}") from error
    common = set.intersection(*({*dump.stages} for dump in dumps))
    shared = {layer for layer, _ in common}
    with_attention = set.intersection(
        *({layer for layer, name in dump.stages if name in NINE} for dump in dumps)
    )
    single = any(dump.single for dump in dumps)
    return {
        key: single
        or asked_for(key, stages, layers, shared)
        or (key[1] in NINE and key[0] in with_attention)
        or (key[1] in BY_NAME and key in common)
        for key in keys
    }


def _place_in_chain(key: Key) -> tuple[int, int, str]:
    layer, name = key
    known = _NAMES.index(name) if name in _NAMES else len(_NAMES)
    return MAX_LAYERS if layer is None else layer, known, name


def holdings(dumps: Sequence[Dump]) -> str:
    """Say what dumps hold, shortly."""
    texts = []
    for dump in dumps:
        names = [name if la is None else f"{la}/{name}" for la, name in dump.stages]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        texts.append(f"{dump.name} holds {', '.join(names[:3])}{more}")
    return "; ".join(texts) + "; --names translates other engines' names"
