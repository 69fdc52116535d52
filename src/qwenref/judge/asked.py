"""Which stages and layers a user asks for, and what the verdict then depends on."""

from collections.abc import Collection, Iterable

from qwenref.dumps.reading import Key
from qwenref.stages import ATTENTION, BY_NAME, GROUPS

NINE = {stage.name for stage in ATTENTION}

Asked = Collection[Collection[str]]
"""Stages that were asked for, each a name alone, or the names of a group, some of which will do."""


def asked_stages(names: Iterable[str]) -> Asked:
    """Return what names stand for: a group, or a stage; ``attention`` is that stage."""
    return [(name,) if name in BY_NAME else group(name) for name in names]


def group(name: str) -> Collection[str]:
    """Return the names of the stages of a group; of a name that is none, itself."""
    return [stage.name for stage in GROUPS[name]] if name in GROUPS else (name,)


def chosen(
    keys: Collection[Key], stages: Asked | None, layers: Collection[int] | None
) -> list[Key]:
    """Return the keys that were asked for, None standing for all.

    Raises:
        LookupError: There is none of a stage, group or layer; the text is its name.
    """
    names, places = {name for _, name in keys}, {layer for layer, _ in keys}
    for of in stages or ():
        if names.isdisjoint(of):
            raise LookupError(f"stage {' or '.join(of)}")
    for layer in sorted(set(layers or ()) - places):
        raise LookupError(f"layer {layer}")
    wanted = names if stages is None else {name for of in stages for name in of}
    return [
        (layer, name)
        for layer, name in keys
        if name in wanted and (layers is None or layer in layers)
    ]


def asked_for(
    key: Key,
    stages: Asked | None,
    layers: Collection[int] | None,
    shared: Collection[int | None],
) -> bool:
    """Return whether the verdict depends on a chosen key, even if a dump lacks it.

    A choice of stages asks for each of them; one of layers for the nine stages of attention in
    each, and for all there is where dumps have nothing in common.

    Args:
        key: One of those that `chosen` returns.
        stages: As given to it.
        layers: Likewise.
        shared: Layers of which all dumps have the same stage.
    """
    layer, name = key
    return stages is not None or (layers is not None and (name in NINE or layer not in shared))
