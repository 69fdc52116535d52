"""APRT, the file: one stage of one layer as float32 values.

    bytes 0..3    "APRT"
    bytes 4..7    layer, u32 little-endian; 0xFFFFFFFF marks a stage of the whole model
    bytes 8..11   number of values, u32 little-endian
    then          that many float32 values, little-endian, row-major

No name, shape or dtype: the stage is in the path, all else in the manifest. contracts/aprt-v1.yaml
is the normative text.
"""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from blake3 import blake3

from qwenref.errors import QwenrefError
from qwenref.files import reason

MAGIC = b"APRT"
WHOLE_MODEL = 0xFFFFFFFF
MAX_VALUES = 0xFFFFFFFF
HEADER = struct.Struct("<4sII")
VALUE = np.dtype("<f4")


class Aprt(NamedTuple):
    """One file's content: `layer` is None for a whole-model stage, `values` is flat float32."""

    layer: int | None
    values: np.ndarray


def read_aprt(path: str | Path) -> Aprt:
    """Read one APRT file, whatever stage it holds.

    Raises:
        QwenrefError: It cannot be read, is no APRT file, or its size is not what its header says
            (an older model format begins with the same four letters).
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise QwenrefError(f"{path} {'is no regular file' if path.exists() else 'is missing'}")
        with path.open("rb") as file:
            size = path.stat().st_size
            header = file.read(HEADER.size)
            if len(header) < HEADER.size:
                raise QwenrefError(f"{path} has {size} bytes; an APRT header alone has 12")
            magic, layer, count = HEADER.unpack(header)
            if magic != MAGIC:
                raise QwenrefError(f"{path} begins with {magic!r}, not with {MAGIC!r}")
            expected = HEADER.size + VALUE.itemsize * count
            if size != expected:
                raise QwenrefError(
                    f"{path} has {size} bytes, but its header promises {count} values: "
                    f"{expected} bytes; it is truncated, or another kind of file"
                )
            values = np.fromfile(file, VALUE, count)
    except OSError as error:
        raise QwenrefError(f"cannot read {path}: {reason(error)}") from error
    if values.size != count:
        raise QwenrefError(f"{path} shrank while it was read")
    return Aprt(None if layer == WHOLE_MODEL else layer, values)


def write_aprt(path: str | Path, layer: int | None, parts: Iterable[np.ndarray], count: int) -> str:
    """Write one APRT file that does not exist yet, and return its fingerprint.

    Args:
        path: Where to; never overwritten.
        layer: Layer number, or None for a stage of the whole model.
        parts: The values in row-major order, in pieces of any shape; cast to float32.
        count: How many values there are in all.

    Returns:
        ``blake3:`` and the BLAKE3 hash of the whole file, as `b3sum` prints it.

    Raises:
        QwenrefError: `count` or `layer` does not fit its u32 field.
        ValueError: `parts` does not hold `count` values.
        OSError: The file cannot be written.
    """
    if not 0 <= count <= MAX_VALUES:
        raise QwenrefError(f"{count} values do not fit an APRT file, which counts them in 32 bits")
    if layer is not None and not 0 <= layer < WHOLE_MODEL:
        raise QwenrefError(f"layer {layer} does not fit an APRT file")
    header = HEADER.pack(MAGIC, WHOLE_MODEL if layer is None else layer, count)
    digest = blake3(header)
    written = 0
    with Path(path).open("xb") as file:
        file.write(header)
        for part in parts:
            values = np.ascontiguousarray(part, VALUE).reshape(-1)
            file.write(values.data)
            digest.update(values.view(np.uint8).data)
            written += values.size
    if written != count:
        raise ValueError(f"{written} values given, {count} announced")
    return f"blake3:{digest.hexdigest()}"


def fingerprint_of(path: str | Path) -> str:
    """Return what `write_aprt` returned when it wrote this file.

    Raises:
        OSError: The file cannot be read.
    """
    return f"blake3:{blake3().update_mmap(path).hexdigest()}"
