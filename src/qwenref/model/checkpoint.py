"""A checkpoint on disk: where each tensor lies, and reading parts of it without holding more.

The safetensors library parses and validates the files; names, shapes and dtypes are compared here
with what the configuration says, so that nothing is allocated because a file claims it.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import ml_dtypes
import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from qwenref.errors import QwenrefError, printable
from qwenref.files import parse_json, read_bounded, reason
from qwenref.model.config import Config, read_config

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_LIMIT = 1 << 24
"""Bytes; the index of the 72B, the largest published, has about 80,000."""

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
"""The stored dtypes that widen to float32 without loss, by their names in a file's header."""

LFS_POINTER = b"version https://git-lfs"
"""What a file begins with that was cloned without its content."""

CHUNK = 1 << 22
"""Bytes read at a time."""

HEADER_LIMIT = 100_000_000
"""Bytes of a file's header: the library refuses more."""


class Checkpoint:
    """Configuration and tensors of one model directory or one .safetensors file.

    Attributes:
        name: What to call it: the directory's name, or that of a file given instead, without
            its ending, unless it is "model" or a shard of it.
        directory: Where config.json and tokenizer.json lie.
        config: The checked configuration.
    """

    def __init__(self, path: Path):
        """Open a checkpoint; no tensor is read.

        Args:
            path: A directory with config.json and model.safetensors, or with
                model.safetensors.index.json and the shards it names; or one .safetensors file
                with config.json beside it.

        Raises:
            QwenrefError: Something is missing, malformed, or leads out of the directory.
        """
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        self._layouts: dict[Path, _Layout] = {}
        try:
            self._open(path)
        except OSError as error:  # a name too long, a folder that may not be entered
            where = error.filename or path
            raise QwenrefError(f"no model: cannot look into {where}: {reason(error)}") from error

    def _open(self, path: Path) -> None:
        if path.is_dir():
            self.directory = path
            self.name = _name(path.resolve())
        elif path.suffix == ".safetensors" and path.is_file():
            self.directory = path.parent
            generic = path.stem.startswith("model")  # as transformers calls all of them
            self.name = _name(path.parent.resolve()) if generic else printable(path.stem)
        else:
            found = (
                "is something else" if path.exists() else "does not exist (nothing is downloaded)"
            )
            raise QwenrefError(
                f"no model: {path} {found}; give a local checkpoint directory or .safetensors file"
            )
        self.config: Config = read_config(self.directory / "config.json")
        if not path.is_dir():
            self._files = _tensors_of(path)
        elif (path / SINGLE).exists():  # as transformers: one whole file wins over an index
            self._files = _tensors_of(path / SINGLE)
        elif (path / INDEX).exists():
            self._files = _indexed_tensors(path)
        else:
            raise QwenrefError(f"no weights: {path} has neither {SINGLE} nor {INDEX}")

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Return what keeps the tensors in `shapes` from being read: absence, shape, dtype."""
        found = []
        for name, expected in shapes.items():
            if name not in self._files:
                found.append(f"{name} is missing")
                continue
            shape, dtype = self._header(name)
            if shape != expected:
                found.append(f"{name} has shape {list(shape)}, the config says {list(expected)}")
            if dtype not in DTYPES:
                found.append(f"{name} is stored as {dtype}, not as one of {', '.join(DTYPES)}")
        return found

    def holds(self, name: str) -> bool:
        """Return whether the checkpoint has a tensor of this exact name."""
        return name in self._files

    def dtype(self, name: str) -> np.dtype:
        """Return the stored dtype of a tensor that `problems` found readable."""
        return DTYPES[self._header(name)[1]]

    def read(self, name: str, into: np.ndarray, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Fill an array with rows of a tensor; yield each piece once it is there.

        They are read, not mapped: the library would hold the interpreter's lock while pages come
        from the disk.

        Args:
            name: Of a tensor that `problems` found readable.
            into: Of the tensor's stored dtype, contiguous, [rows, ..].
            start: Row of the tensor that the first one is.

        Yields:
            Consecutive pieces of `into`, each with the number of its first row, and of at most
            `CHUNK` bytes (one row, if that is larger).
        """
        step = self._step(name)
        with self._reading(name) as file:
            self._seek(file, name, start, len(into))
            for row in range(0, len(into), step):
                piece = into[row : row + step]
                _fill(piece, file, self._files[name])
                yield row, piece

    def rows(self, name: str, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(row, values)` for consecutive pieces of rows `start` to `stop`, stored dtype.

        Each piece is at most `CHUNK` bytes (one row, if that is larger).
        """
        step = self._step(name)
        with self._reading(name) as file:
            self._seek(file, name, start, max(0, stop - start))
            for row in range(start, stop, step):
                piece = self._empty(name, min(step, stop - row))
                _fill(piece, file, self._files[name])
                yield row, piece

    def rows_at(self, name: str, rows: Sequence[int]) -> np.ndarray:
        """Return single rows of a tensor, [rows, ..], in the order given, stored dtype."""
        values = self._empty(name, len(rows))
        with self._reading(name) as file:
            for at, row in enumerate(rows):
                self._seek(file, name, row, 1)
                _fill(values[at : at + 1], file, self._files[name])
        return values

    def _empty(self, name: str, rows: int) -> np.ndarray:
        return np.empty((rows, *self._header(name)[0][1:]), self.dtype(name))

    def _row_bytes(self, name: str) -> int:
        return self.dtype(name).itemsize * math.prod(self._header(name)[0][1:])

    def _step(self, name: str) -> int:
        """Return how many rows are read at a time."""
        return max(1, CHUNK // self._row_bytes(name))

    @contextmanager
    def _reading(self, name: str) -> Iterator[FileIO]:
        """Open the file of a tensor, which must be the one that was opened before."""
        path = self._files[name]
        try:
            with path.open("rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                version = found.st_ino, found.st_size, found.st_mtime_ns
                if path not in self._layouts:
                    self._layouts[path] = _Layout(version, _begins(file, path))
                layout = self._layouts[path]
                if version != layout.version or name not in layout.begins:
                    raise QwenrefError(f"{path} was changed while it was read: start again")
                yield file
        except OSError as error:
            raise QwenrefError(f"cannot read {path}: {reason(error)}") from error

    def _seek(self, file: FileIO, name: str, row: int, count: int) -> None:
        """Go to where some rows begin, which must be the tensor's."""
        if not 0 <= row <= row + count <= self._header(name)[0][0]:
            raise IndexError(f"{name} has no {count} rows from {row} on")
        file.seek(self._layouts[self._files[name]].begins[name] + row * self._row_bytes(name))

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._headers:
            with _opened(self._files[name]) as file:
                header = file.get_slice(name)
                self._headers[name] = tuple(header.get_shape()), header.get_dtype()
        return self._headers[name]


def _fill(array: np.ndarray, file: FileIO, path: Path) -> None:
    """Read as many bytes as an array has.

    Raises:
        QwenrefError: The file ends before that.
    """
    left = array.reshape(-1).view(np.uint8).data
    while left:
        count = file.readinto(left)
        if not count:
            raise QwenrefError(f"{path} is truncated: it ends {len(left)} bytes too early")
        left = left[count:]


class _Layout(NamedTuple):
    """Where each tensor begins in a file, and inode, size and time of change of that file."""

    version: tuple[int, int, int]
    begins: dict[str, int]


class _Entry(msgspec.Struct):
    data_offsets: tuple[int, int] = (0, 0)


def _begins(file: FileIO, path: Path) -> dict[str, int]:
    """Return where each tensor begins in a file that the library has checked."""
    size = int.from_bytes(file.read(8), "little")
    header = np.empty(min(size, HEADER_LIMIT), np.uint8)
    _fill(header, file, path)
    entries = parse_json(path, header.tobytes(), dict[str, _Entry])
    return {name: 8 + size + entry.data_offsets[0] for name, entry in entries.items()}


def _name(directory: Path) -> str:
    """Return a directory's name, or NAME for models--ORG--NAME/snapshots/REVISION, a HF cache."""
    cache = directory.parent.parent.name
    if directory.parent.name == "snapshots" and cache.startswith("models--"):
        return printable(cache.rpartition("--")[2])
    return printable(directory.name) or "model"


def _opened(path: Path) -> safe_open:
    """Open a safetensors file; the library checks the header against the file's size.

    Raises:
        QwenrefError: The file is missing, truncated, or no safetensors file.
    """
    if not path.is_file():
        raise QwenrefError(f"{path} is missing, or is not a regular file")
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        try:
            with path.open("rb") as file:
                start = file.read(len(LFS_POINTER))
        except OSError as refused:
            raise QwenrefError(f"cannot read {path}: {reason(refused)}") from refused
        if start == LFS_POINTER:
            raise QwenrefError(f"{path} is a Git LFS pointer: run git lfs pull") from error
        raise QwenrefError(
            f"{path} is truncated or is no safetensors file: {reason(error)}"
        ) from error


def _tensors_of(path: Path) -> dict[str, Path]:
    with _opened(path) as file:
        return dict.fromkeys(file.keys(), path)


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _indexed_tensors(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor that the index names, every claim checked.

    The index is text from outside: a shard must be a plain file name, exist, and hold the tensors
    that the index says it holds.
    """
    index = directory / INDEX
    parsed = parse_json(index, read_bounded(index, INDEX_LIMIT), _Index)
    held: dict[str, dict[str, Path]] = {}
    for name, shard in parsed.weight_map.items():
        if shard not in held:
            if not _is_plain_file_name(shard):
                raise QwenrefError(
                    f"{index}: tensor {name!r} points to {shard!r}; a shard must be a .safetensors "
                    "file in the same directory"
                )
            if not (directory / shard).exists():
                raise QwenrefError(
                    f"shard {directory / shard} is missing, though {INDEX} names it: complete the "
                    "download, or give the one .safetensors file that holds the layer as --model"
                )
            held[shard] = _tensors_of(directory / shard)
        if name not in held[shard]:
            raise QwenrefError(f"{index}: {shard} does not hold {name!r}, though the index says so")
    return {name: held[shard][name] for name, shard in parsed.weight_map.items()}


def _is_plain_file_name(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and "\0" not in name
        and PurePosixPath(name).name == name
        and PureWindowsPath(name).name == name
    )
