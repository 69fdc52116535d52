"""A dump directory: built aside, then moved into place with the manifest last.

A directory is a finished dump if, and only if, it holds a valid manifest.json.
"""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenref.dumps import manifest
from qwenref.dumps.aprt import write_aprt
from qwenref.dumps.layout import Layout
from qwenref.errors import QwenrefError
from qwenref.files import reason
from qwenref.stages import Stage

PARTIAL = ".qwenref-partial"
"""Name of the folder, inside the dump directory, in which a dump is built.

Making it is what claims the directory: of two captures only one succeeds. A killed capture leaves
it behind, and with it the evidence that the directory holds no finished dump.
"""


@contextmanager
def new_dump(directory: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder to build a dump in; if all goes well, make it the dump of `directory`.

    The body writes the stage files and manifest.json into the folder it is given. After it the
    files are moved into `directory`, the manifest last. If the body fails or is interrupted,
    `directory` is left exactly as it was, absent if it was absent.

    Args:
        directory: Absent, empty, or (with `force`) a dump of ours that holds nothing else.
        force: Whether to replace such a dump.

    Raises:
        QwenrefError: `directory` is something else, cannot be written, is full, or is being
            written by another capture.
    """
    try:
        _check_replaceable(directory, force)
        absent = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        try:
            for folder in reversed(absent):
                folder.mkdir(exist_ok=True)
            with _claimed(directory) as partial:
                replaced = _check_replaceable(directory, force)
                new = partial / "new"
                new.mkdir()
                yield new
                _swap(directory, replaced, partial / "replaced", new)
        except BaseException:
            for folder in absent:
                with suppress(OSError):  # not empty: somebody else uses it
                    folder.rmdir()
            raise
    except OSError as error:
        raise QwenrefError(f"cannot write the dump {directory}: {reason(error)}") from error


def _check_replaceable(directory: Path, force: bool) -> list[str]:
    """Return the names to move out of the way: none, or all entries of a dump of ours."""
    if not os.path.lexists(directory):
        return []
    if not directory.is_dir():
        raise QwenrefError(f"output {directory} exists and is not a directory; give another -o")
    entries = sorted(entry.name for entry in directory.iterdir() if entry.name != PARTIAL)
    if not entries:
        return []
    if not (directory / manifest.NAME).exists():
        raise QwenrefError(
            f"output {directory} is not empty and holds no dump of qwenref; give another -o"
        )
    listed = {stage.file for stage in manifest.read_manifest(directory).stages}
    foreign = sorted(_files_below(directory) - listed - {manifest.NAME})
    if foreign:
        raise QwenrefError(
            f"output {directory} holds {foreign[0]!r}, which its manifest does not list, so it is "
            "not replaced; give another -o"
        )
    if not force:
        raise QwenrefError(f"output {directory} already holds a dump; --force replaces it")
    return entries


def _files_below(directory: Path) -> set[str]:
    """Return everything in a directory that is not a plain sub-directory, by relative path.

    A link counts as the file it is, and an empty sub-directory as itself.
    """
    found = set()
    for folder, folders, files in os.walk(directory):
        here = Path(folder)
        if here == directory:
            folders[:] = [name for name in folders if name != PARTIAL]
        links = [name for name in folders if (here / name).is_symlink()]
        names = files + links if files or folders or here == directory else ["."]
        found.update((here / name).relative_to(directory).as_posix() for name in names)
    return found


@contextmanager
def _claimed(directory: Path) -> Iterator[Path]:
    partial = directory / PARTIAL
    try:
        partial.mkdir()
    except FileExistsError:
        raise QwenrefError(
            f"{partial} exists: another capture is writing there, or one was killed; if none is "
            "running, delete it"
        ) from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _swap(directory: Path, old: list[str], replaced: Path, new: Path) -> None:
    """Move the entries `old` out of `directory` and those of `new` in; on failure, move back.

    The old manifest goes first and the new one comes last, so that at no moment a manifest lies
    beside files that are not its own.
    """
    replaced.mkdir()
    out = sorted(old, key=lambda name: name != manifest.NAME)
    into = sorted((entry.name for entry in new.iterdir()), key=lambda name: name == manifest.NAME)
    moves = [(directory / name, replaced / name) for name in out]
    moves += [(new / name, directory / name) for name in into]
    begun = []
    try:
        for source, target in moves:
            begun.append((source, target))
            source.rename(target)
    except BaseException:
        for source, target in reversed(begun):
            if os.path.lexists(target):
                target.rename(source)
        raise


class Written(NamedTuple):
    """A stage file, the root mean square of its values, and how many of them are not finite."""

    file: manifest.StageFile
    rms: float
    nonfinite: int


def write_stage(
    folder: Path, layer: int, stage: Stage, values: np.ndarray, layout: Layout
) -> Written:
    """Write one stage of one layer into a dump that is being built.

    Args:
        folder: As `new_dump` gives it.
        layer: The layer's number.
        stage: Which stage `values` is.
        values: Its array in the axes of `stage.axes`, scores unmasked, any float dtype.
        layout: How to lay the file out.
    """
    squares, nonfinite = 0.0, 0

    def watched() -> Iterator[np.ndarray]:
        nonlocal squares, nonfinite
        for part in layout.parts(stage, values):
            with np.errstate(over="ignore"):  # float64 beyond float32's range becomes inf
                part = part.astype(np.float32)
            squares += float(np.sum(np.square(part, dtype=np.float64)))
            nonfinite += part.size - int(np.count_nonzero(np.isfinite(part)))
            yield part

    name = manifest.stage_path(layer, stage.name)
    (folder / name).parent.mkdir(exist_ok=True)
    fingerprint = write_aprt(folder / name, layer, watched(), values.size)
    axes = layout.axes(stage)
    sizes = dict(zip(stage.axes, values.shape, strict=True))
    file = manifest.StageFile(
        stage=stage.name,
        layer=layer,
        file=name,
        shape=[sizes[axis] for axis in axes],
        axes=" ".join(axes),
        fingerprint=fingerprint,
    )
    return Written(file, math.sqrt(squares / values.size), nonfinite)
