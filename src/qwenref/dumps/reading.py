"""Reading whatever dump there is: a directory, one file, or arrays; APRT, .npy or bare float32.

Nothing here knows the names of stages, but for one thing: which of them belong to a layer even if
nothing says which layer that is. Values are mapped, never loaded.
"""

import math
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from qwenref.dumps.aprt import HEADER, VALUE, read_header
from qwenref.dumps.manifest import LIMIT, NAME, Manifest, read_manifest
from qwenref.dumps.naming import Names, Place
from qwenref.dumps.place import PARTIAL
from qwenref.errors import QwenrefError
from qwenref.files import parse_json, read_bounded, reason, require_regular
from qwenref.stages import MAX_LAYERS, OF_LAYERS

ENDINGS = (".bin", ".aprt", ".npy", ".f32", ".raw")
"""Of files that hold a stage: APRT, APRT, NumPy's, and float32 without a header."""

MOST_FILES = 100_000
"""In a dump; 80 layers of 20 stages are 1,600."""

LONGEST_HEADER = 10_000
"""Bytes of a .npy header, as in NumPy."""

_LAYER = re.compile(r"layer[-_]([0-9]+)")

_NPY = re.compile(
    rb"\{\s*'descr':\s*'([<>=|]?f[248])',\s*'fortran_order':\s*(True|False),"
    rb"\s*'shape':\s*\((\s*|\s*[0-9]{1,19}\s*(?:,\s*[0-9]{1,19}\s*)*,?\s*)\),?\s*\}\s*"
)

Key = tuple[int | None, str]
"""Layer (None: of the whole model) and stage."""


class Mapped:
    """The values of a file as a flat array that is read when it is looked at."""

    def __init__(self, values: np.ndarray, pages: mmap.mmap | None = None):
        """Take an array, and the mapping behind it."""
        self.values = values
        self._pages = pages

    def release(self) -> None:
        """Give the memory of what was read so far back; it can be read again."""
        if self._pages is not None and hasattr(self._pages, "madvise"):
            self._pages.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Stored:
    """Where the values of a stage, or of one block of it, are.

    Attributes:
        name: What to call it in messages.
        count: How many values.
        dtype: Theirs.
        shape: Theirs, if that is known.
        says_layer: Whether the file itself names its layer.
        layer: That layer, None for a stage of the whole model.
        offset: Bytes before the values.
        path: The file.
        array: The values, if they are not in a file.
    """

    name: str
    count: int
    dtype: np.dtype
    shape: tuple[int, ...] | None = None
    says_layer: bool = False
    layer: int | None = None
    offset: int = 0
    path: Path | None = None
    array: np.ndarray | None = None

    def mapped(self) -> Mapped:
        """Return the values.

        Raises:
            QwenrefError: The file cannot be read any more.
        """
        if self.array is not None:
            return Mapped(self.array)
        try:
            with (self.path or Path(self.name)).open("rb") as file:
                pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return Mapped(np.frombuffer(pages, self.dtype, self.count, self.offset), pages)
        except (OSError, ValueError) as error:
            raise QwenrefError(f"cannot read {self.name}: {reason(error)}") from error


class Dump(NamedTuple):
    """What somebody computed.

    Attributes:
        name: Its path; for arrays in memory a description.
        manifest: Ours, if there is one.
        stages: Where the values are, by stage and block; None stands for the whole stage.
        axes: Their order, of stages for which it is known.
        single: If it is a single file, whether that says which layer it is of.
        sizes: N, K, H, D, of what `qwenref.run` returns.
    """

    name: str
    manifest: Manifest | None
    stages: dict[Key, dict[str | None, Stored]]
    axes: dict[Key, tuple[str, ...]]
    single: Literal["sure", "unsure"] | None = None
    sizes: dict[str, int] | None = None


Source = str | os.PathLike[str] | Mapping[str, Any] | tuple
"""A dump directory, a file, arrays by stage name, or what `qwenref.run` returns."""


def read_dump(source: Source, names: Names) -> Dump:
    """Find the stages of a dump; only headers are read.

    Args:
        source: As above; names of arrays are those of files without their ending.
        names: Translates names.

    Raises:
        QwenrefError: It does not exist, is no dump, or a file of it is broken.
    """
    if isinstance(source, tuple):
        arrays: dict[str, Any] = source._asdict()  # pyright: ignore[reportAttributeAccessIssue]
        return Dump("qwenref.run", None, _arrays(arrays, names), {}, sizes=_sizes_of_run(arrays))
    if isinstance(source, Mapping):
        return Dump("arrays in memory", None, _arrays(source, names), {})
    path = Path(source)
    try:
        if path.is_dir():
            return _directory(path, names)
        require_regular(path)
        return _file(path, names)
    except OSError as error:
        raise QwenrefError(f"cannot read {path}: {reason(error)}") from error
    except ValueError as error:  # a NUL in the path
        raise QwenrefError(f"cannot read {str(path)!r}: {error}") from error


def _directory(root: Path, names: Names) -> Dump:
    if (root / PARTIAL).exists():
        raise QwenrefError(
            f"{root} holds no finished dump: a capture is writing there, or was killed; see "
            f"{root / PARTIAL}"
        )
    manifest = _manifest(root)
    files = sorted(_files(root))
    found: dict[Key, dict[str | None, Stored]] = {}
    for path in files:
        inside = path.relative_to(root)
        place = names.place(PurePosixPath(inside.with_suffix("").as_posix()))
        if place is not None:
            _add(found, place, _stored(path))
        elif (layer := _LAYER.match(inside.parts[0])) and int(layer[1]) >= MAX_LAYERS:
            raise QwenrefError(f"{path}: no model has a layer {layer[1]}; rename it or remove it")
    if not found:
        example = f"; {files[0]} is none, see --names" if files else ""
        endings = ", ".join(ENDINGS)
        raise QwenrefError(f"{root} holds no stage in a file that ends in {endings}{example}")
    return Dump(_shown(root), manifest, found, _declared(manifest, found))


def _shown(path: Path) -> str:
    """Return a path as text that can be encoded."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _file(path: Path, names: Names) -> Dump:
    """Return a dump of one stage; its manifest is where that of its directory would be."""
    folder = path.absolute().parent
    place, root = names.place(PurePosixPath(folder.name, path.stem)), folder.parent
    if place is None or place.layer is None:
        place, root = names.place(PurePosixPath(path.stem)) or Place(None, path.stem), folder
    found: dict[Key, dict[str | None, Stored]] = {}
    stored = _stored(path)
    _add(found, place, stored)
    manifest = _manifest(root)
    inside = path.absolute().relative_to(root).as_posix()
    if manifest and inside not in {file.file for file in manifest.stages}:
        manifest = None
    single = "sure" if stored.says_layer or place.layer is not None else "unsure"
    return Dump(_shown(path), manifest, found, _declared(manifest, found), single)


def _arrays(arrays: Mapping[str, Any], names: Names) -> dict[Key, dict[str | None, Stored]]:
    found: dict[Key, dict[str | None, Stored]] = {}
    for name, given in arrays.items():
        values = np.asarray(given)
        if not np.can_cast(values.dtype, np.float64, "same_kind") or not values.size:
            raise QwenrefError(f"{name}: {values.dtype} of shape {values.shape} is no stage")
        if values.dtype.kind != "f":  # of ml_dtypes, which NumPy knows little of
            values = values.astype(np.float32)
        place = names.place(PurePosixPath(name)) or Place(None, name)
        flat = np.ascontiguousarray(values).reshape(-1)
        _add(found, place, Stored(name, flat.size, flat.dtype, values.shape, array=flat))
    return found


def _sizes_of_run(arrays: Mapping[str, Any]) -> dict[str, int]:
    """Return N, K, H, D; which are the same in any layout."""
    D, E, F = (arrays[name].shape[1] for name in ("attn_norm", "attention", "qkv_bias"))
    H = arrays["q_post_rope"].shape[2]
    return {"N": E // H, "K": (F - E) // (2 * H), "H": H, "D": D}


def _add(found: dict[Key, dict[str | None, Stored]], place: Place, stored: Stored) -> None:
    layer = place.layer
    if layer is None and stored.says_layer:
        layer = stored.layer
    elif layer is None and place.stage in OF_LAYERS:
        layer = 0
    parts = found.setdefault((layer, place.stage), {})
    twice = next((parts[part] for part in parts if None in (part, place.part)), None)
    twice = parts.get(place.part, twice)
    if twice is not None:
        raise QwenrefError(
            f"{twice.name} and {stored.name} both hold {place.stage}: remove one of them"
        )
    parts[place.part] = stored


def _files(root: Path) -> Iterator[Path]:
    """Yield the files below a directory that may hold stages.

    Raises:
        QwenrefError: A folder cannot be read, or is a link to one elsewhere, or there are too many
            files: this is no dump.
    """

    def refuse(error: OSError) -> None:
        raise QwenrefError(f"cannot read {error.filename}: {reason(error)}") from error

    home = root.resolve()
    seen, folders = 0, set()
    for folder, inner, files in os.walk(root, onerror=refuse, followlinks=True):
        for link in filter(Path.is_symlink, (Path(folder, name) for name in inner)):
            if not link.resolve().is_relative_to(home):
                raise QwenrefError(
                    f"{link} is a link to a folder outside the dump: copy that here, or remove it"
                )
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in folders:  # a link back
            inner.clear()
            continue
        folders.add((status.st_dev, status.st_ino))
        seen += len(files)
        if seen > MOST_FILES:
            raise QwenrefError(f"{root} holds more than {MOST_FILES} files: that is no dump")
        yield from (Path(folder, name) for name in files if name.endswith(ENDINGS))


def _manifest(root: Path) -> Manifest | None:
    """Return the manifest of a dump of ours; other engines may have a file of that name too."""
    path = root / NAME
    if not path.is_file():
        return None
    found = parse_json(path, read_bounded(path, LIMIT), object)
    if not isinstance(found, dict) or not str(found.get("schema")).startswith("qwenref-"):
        return None
    return read_manifest(root)


def _declared(
    manifest: Manifest | None, found: Mapping[Key, Mapping[str | None, Stored]]
) -> dict[Key, tuple[str, ...]]:
    """Return the axes that a manifest states, of files that are there.

    Raises:
        QwenrefError: A file has not as many values as its manifest says.
    """
    axes = {}
    for file in manifest.stages if manifest else ():
        key = (file.layer, file.stage)
        whole = found.get(key, {}).get(None)
        if whole is None:
            continue
        if whole.count != math.prod(file.shape):
            raise QwenrefError(
                f"{whole.name} has {whole.count} values, and its manifest says shape {file.shape}: "
                "it is not the file that the manifest was written for"
            )
        axes[key] = tuple(file.axes.split())
    return axes


def _stored(path: Path) -> Stored:
    """Look at the header of a file, and check that its size is what that says."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            return _header(file, path)
    except OSError as error:
        raise QwenrefError(f"cannot read {path}: {reason(error)}") from error


def _header(file: BinaryIO, path: Path) -> Stored:
    if path.suffix == ".npy":
        return _npy(file, path)
    if path.suffix in (".f32", ".raw"):
        size = os.fstat(file.fileno()).st_size
        if not size or size % VALUE.itemsize:
            raise QwenrefError(f"{path} has {size} bytes: not a number of float32 values")
        return Stored(str(path), size // VALUE.itemsize, VALUE, path=path)
    layer, count = read_header(file, path)
    if not count:
        raise QwenrefError(f"{path} holds no values")
    return Stored(str(path), count, VALUE, None, True, layer, HEADER.size, path)


def _npy(file: BinaryIO, path: Path) -> Stored:
    """Read the header of a .npy file: its grammar is that of a Python dict, which is never run."""
    magic, version = file.read(6), file.read(2)
    if magic != b"\x93NUMPY" or version[:1] not in (b"\1", b"\2", b"\3"):
        raise QwenrefError(f"{path} is no .npy file: it begins with {magic + version!r}")
    length = int.from_bytes(file.read(2 if version[:1] == b"\1" else 4), "little")
    header = file.read(min(length, LONGEST_HEADER))
    fields = _NPY.fullmatch(header)
    if fields is None:
        shown = header[:80].decode("ascii", "backslashreplace")
        raise QwenrefError(f"{path} is not .npy of float16, float32 or float64 values: {shown}")
    dtype = np.dtype(fields[1].decode())
    shape = tuple(int(size) for size in fields[3].split(b",") if size.strip())
    if fields[2] == b"True" and sum(size > 1 for size in shape) > 1:
        raise QwenrefError(f"{path} is in Fortran order; save np.ascontiguousarray(...) of it")
    count, offset = math.prod(shape), file.tell()
    expected = offset + count * dtype.itemsize
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        raise QwenrefError(f"{path} has {size} bytes, but its header promises {expected}")
    if not count:
        raise QwenrefError(f"{path} holds no values")
    return Stored(str(path), count, dtype, shape, offset=offset, path=path)
