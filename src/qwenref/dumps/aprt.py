"""APRT, the file: one stage of one layer as float32 values.

    bytes 0..3    "APRT"
    bytes 4..7    layer, u32 little-endian; 0xFFFFFFFF marks a stage of the whole model
    bytes 8..11   number of values, u32 little-endian
    then          that many float32 values, little-endian, row-major

No name, shape or dtype: the stage is in the path, all else in the manifest. contracts/aprt-v1.yaml
is the normative text.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import ArrayLike

from qwenref.errors import QwenrefError
from qwenref.files import reason, require_regular

MAGIC = b"APRT"
WHOLE_MODEL = 0xFFFFFFFF
MAX_VALUES = 0xFFFFFFFF
HEADER = struct.Struct("<4sII")
VALUE = np.dtype("<f4")


class Aprt(NamedTuple):
    """One file's content: `layer` is None for a whole-model stage, `values` is flat float32."""

    layer: int | None
    values: np.ndarray

    @property
    def fingerprint(self) -> str:
        """That of the file, see `fingerprint_of`."""
        digest = blake3(_header(self.layer, self.values.size))
        return f"blake3:{digest.update(self.values.view(np.uint8).data).hexdigest()}"


def read_aprt(path: str | Path) -> Aprt:
    """Read one APRT file, whatever stage it holds.

    Raises:
        QwenrefError: It cannot be read, is no APRT file, or its size is not what its header says
            (an older model format begins with the same four letters).
    """
    path = Path(path)
    try:
        require_regular(path)
        with path.open("rb") as file:
            layer, count = read_header(file, path)
            values = np.fromfile(file, VALUE, count)
    except OSError as error:
        raise QwenrefError(f"cannot read {path}: {reason(error)}") from error
    if values.size != count:
        raise QwenrefError(f"{path} shrank while it was read")
    return Aprt(layer, values)


def read_header(file: BinaryIO, path: Path) -> tuple[int | None, int]:
    """Return layer (None for a whole-model stage) and count of an APRT file open at its start.

    Raises:
        QwenrefError: As `read_aprt`.
        OSError: The file cannot be read.
    """
    size = os.fstat(file.fileno()).st_size
    header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise QwenrefError(f"{path} has {size} bytes; an APRT header alone has 12")
    magic, layer, count = HEADER.unpack(header)
    if magic != MAGIC:
        raise QwenrefError(
            f"{path} is not an APRT file: it begins with {magic!r}, not with {MAGIC!r}"
        )
    expected = HEADER.size + VALUE.itemsize * count
    if size != expected:
        raise QwenrefError(
            f"{path} has {size} bytes, but its header promises {count} values: {expected} bytes; "
            "it is truncated, or another kind of file"
        )
    return None if layer == WHOLE_MODEL else layer, count


class AprtWriter:
    """An APRT file that does not exist yet, written in runs of values in any order."""

    def __init__(self, path: str | Path, layer: int | None, count: int):
        """Create the file.

        Args:
            path: Where; a file that exists is never overwritten.
            layer: Layer number, or None for a stage of the whole model.
            count: How many values there will be.

        Raises:
            QwenrefError: `count` or `layer` does not fit its u32 field.
            OSError: The file cannot be created.
        """
        header = _header(layer, count)
        self.path = Path(path)
        self._count = count
        self._runs: list[tuple[int, int]] = []
        self._file = self.path.open("xb")
        self._file.write(header)

    def write(self, start: int, values: np.ndarray) -> np.ndarray:
        """Write consecutive values, the first of which has index `start`; each index just once.

        Returns:
            The values as written: flat float32, infinite where float64 exceeds its range.

        Raises:
            ValueError: They begin before the first or end after the last value.
        """
        with np.errstate(over="ignore"):
            run = np.ascontiguousarray(values, VALUE).reshape(-1)
        end = start + run.size
        if not 0 <= start <= end <= self._count:
            raise ValueError(f"{self.path} has no values {start} to {end}, only {self._count}")
        self._file.seek(HEADER.size + VALUE.itemsize * start)
        self._file.write(run.data)
        if run.size:
            self._runs.append((start, end))
        return run

    def __enter__(self) -> "AprtWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def finish(self) -> str:
        """Close the file and return its fingerprint, see `fingerprint_of`.

        Raises:
            ValueError: A value was not written, or written twice.
        """
        self._file.close()
        runs = sorted(self._runs)
        if [start for start, _ in runs] + [self._count] != [0] + [end for _, end in runs]:
            raise ValueError(f"{self.path}: not each of {self._count} values was written once")
        return fingerprint_of(self.path)


def write_aprt(path: str | Path, layer: int | None, values: ArrayLike) -> str:
    """Write a whole array as an APRT file that does not exist yet; return its fingerprint.

    Args:
        path: Where to; a file that exists is never overwritten.
        layer: Layer number, or None for a stage of the whole model.
        values: Any shape, row-major; cast to float32.

    Raises:
        QwenrefError: The size or `layer` does not fit its u32 field, or the values are not real
            numbers.
        OSError: The file cannot be written.
    """
    array = np.asarray(values)
    if not np.can_cast(array.dtype, np.float64, "same_kind"):
        raise QwenrefError(f"values of dtype {array.dtype} do not fit an APRT file")
    writer = AprtWriter(path, layer, array.size)
    try:
        with writer:
            writer.write(0, array)
            return writer.finish()
    except BaseException:
        writer.path.unlink()
        raise


def fingerprint_of(path: str | Path) -> str:
    """Return ``blake3:`` and the BLAKE3 hash of a file, as `b3sum` prints it.

    Raises:
        OSError: The file cannot be read.
    """
    digest = blake3()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"blake3:{digest.hexdigest()}"


def _header(layer: int | None, count: int) -> bytes:
    if not 0 <= count <= MAX_VALUES:
        raise QwenrefError(f"{count} values do not fit an APRT file: it counts in 32 bits")
    if layer is not None and not 0 <= layer < WHOLE_MODEL:
        raise QwenrefError(f"layer {layer} does not fit an APRT file")
    return HEADER.pack(MAGIC, WHOLE_MODEL if layer is None else layer, count)
