"""Putting a finished dump in its place: built aside, then moved, the manifest last.

A directory is a finished dump if, and only if, it holds a valid manifest.json.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qwenref.dumps.manifest import NAME, read_manifest
from qwenref.errors import QwenrefError
from qwenref.files import reason
from qwenref.interrupts import Interrupts

PARTIAL = ".qwenref-partial"
"""Name of the folder, inside the dump directory, in which a dump is built.

Making it is what claims the directory: of two captures only one succeeds. A killed capture leaves
it behind, and with it the evidence that the directory holds no finished dump.
"""

_CLAIMED = (
    "{} exists: another capture is writing there, or one was killed; if none is running, look into "
    "it and delete it"
)


@contextmanager
def new_dump(directory: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder to build a dump in; if all goes well, make it the dump of `directory`.

    The body writes the stage files and manifest.json into the folder it is given. After it they
    are moved into `directory`, the manifest last. If the body fails or is interrupted, `directory`
    is left exactly as it was, absent if it was absent. An interrupt that comes while files are
    moved or removed waits until that is done.

    Args:
        directory: Absent, empty, or (with `force`) a dump of ours that holds nothing else.
        force: Whether to replace such a dump.

    Raises:
        QwenrefError: `directory` is something else, cannot be written, is full, or is being
            written by another capture.
    """
    try:
        with Interrupts() as interrupts:
            if os.path.lexists(directory / PARTIAL):
                raise QwenrefError(_CLAIMED.format(directory / PARTIAL))
            _check_replaceable(directory, force)
            with _made(directory), _claimed(directory) as partial:
                _check_replaceable(directory, force)
                new = partial / "new"
                new.mkdir()
                with interrupts.let_through():
                    yield new
                _swap(directory, _check_replaceable(directory, force), partial, interrupts)
                shutil.rmtree(partial / "replaced", ignore_errors=True)
    except OSError as error:
        raise QwenrefError(f"cannot write the dump {directory}: {reason(error)}") from error


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Make a directory and its parents; on failure remove those that were absent."""
    absent = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        for folder in reversed(absent):
            folder.mkdir(exist_ok=True)
        yield
    except BaseException:
        for folder in absent:
            with suppress(OSError):  # not empty: somebody else uses it
                folder.rmdir()
        raise


@contextmanager
def _claimed(directory: Path) -> Iterator[Path]:
    """Make the folder that claims a directory; in the end remove it, with what is in `new`.

    If the files of the old dump could not be moved back, they stay in it.
    """
    partial = directory / PARTIAL
    try:
        partial.mkdir()
    except FileExistsError:
        raise QwenrefError(_CLAIMED.format(partial)) from None
    try:
        yield partial
    finally:
        shutil.rmtree(partial / "new", ignore_errors=True)
        for folder in (partial / "replaced", partial):
            with suppress(OSError):
                folder.rmdir()


def _swap(directory: Path, old: list[str], partial: Path, interrupts: Interrupts) -> None:
    """Move the entries `old` out of `directory` and the new ones in; on failure, move them back.

    The old manifest goes first, the new one comes last, and meanwhile both are called otherwise:
    at no moment does a manifest lie beside files that are not its own.
    """
    new, replaced = partial / "new", partial / "replaced"
    replaced.mkdir()
    moves = [(directory / name, replaced / name) for name in old if name != NAME]
    if old:
        moves.insert(0, (directory / NAME, replaced / "old-manifest"))
    moves.append((new / NAME, new / "new-manifest"))
    moves += [(file, directory / file.name) for file in sorted(new.iterdir()) if file.name != NAME]
    moves.append((new / "new-manifest", directory / NAME))
    begun: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            begun.append((source, target))
            source.rename(target)
        interrupts.deliver()  # while all can still be undone
    except BaseException:
        try:
            for source, target in reversed(begun):
                if not os.path.lexists(source):  # else it was this move that failed
                    target.rename(source)
        except OSError as error:
            raise QwenrefError(
                f"cannot move back the files of {directory} ({reason(error)}): look for them in "
                f"{partial}"
            ) from error
        raise


def _check_replaceable(directory: Path, force: bool) -> list[str]:
    """Return the names to move out of the way: none, or all entries of a dump of ours."""
    if not os.path.lexists(directory):
        return []
    if not directory.is_dir():
        raise QwenrefError(f"output {directory} exists and is not a directory; give another -o")
    entries = sorted(entry.name for entry in directory.iterdir() if entry.name != PARTIAL)
    if not entries:
        return []
    try:
        listed = {stage.file for stage in read_manifest(directory).stages}
    except QwenrefError as error:
        raise QwenrefError(
            f"output {directory} is not empty and holds no dump of qwenref ({error}); give another "
            "-o"
        ) from error
    foreign = sorted(_files_below(directory) - listed - {NAME})
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

    def refuse(error: OSError) -> None:
        raise error  # else a folder that may not be read counts as empty

    found = set()
    for folder, folders, files in os.walk(directory, onerror=refuse):
        here = Path(folder)
        if here == directory:
            folders[:] = [name for name in folders if name != PARTIAL]
        links = [name for name in folders if (here / name).is_symlink()]
        names = files + links if files or folders or here == directory else ["."]
        found.update((here / name).relative_to(directory).as_posix() for name in names)
    return found
