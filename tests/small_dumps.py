"""Small dumps to put in place, and what is found of them afterwards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import whole

from qwenref.dumps.layout import LAYOUTS
from qwenref.dumps.manifest import write_manifest
from qwenref.dumps.place import new_dump
from qwenref.dumps.tree import StageWriter, Written
from qwenref.errors import QwenrefError
from qwenref.stages import BY_NAME

PRINT = "blake3:" + "0" * 64
FIELDS: dict[str, Any] = {
    "engine": "qwenref",
    "versions": {},
    "device": "cpu",
    "dtype": "float32",
    "layout": "apr",
    "model": "tiny",
    "prompt": None,
    "tokens": None,
    "input": None,
    "config": {
        "hidden_size": 5,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "intermediate_size": 7,
        "vocab_size": 11,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    },
    "weights": {"layers": {}, "embedding": None, "biases": False},
}


def fill(folder: Path, *stages: str, value: float = 0.5) -> None:
    """Write stages of shape [3, 5] and a manifest, as a capture does between claim and swap.

    A stage of another layer than 0 is called like ``1/attn_norm``.
    """
    files = []
    for stage in stages:
        layer, _, name = stage.rpartition("/")
        written = write(folder, name, np.full((3, 5), value), layer=int(layer or 0))
        files.append(written.file)
    write_manifest(folder, **FIELDS, stages=files)


def write(
    folder: Path, stage: str, values: np.ndarray, *, layer: int = 0, layout: str = "apr"
) -> Written:
    row = BY_NAME[stage]
    sizes = dict(zip(row.axes, values.shape, strict=True))
    with StageWriter(folder, layer, row, sizes, LAYOUTS[layout]) as writer:
        writer.write(values)
        return writer.finish()


def make(directory: Path, *stages: str, force: bool = False, value: float = 0.5) -> None:
    with new_dump(directory, force=force) as folder:
        fill(folder, *stages, value=value)


Snapshot = dict[str, tuple[int, int, bytes]]


def snapshot(directory: Path) -> Snapshot:
    """Return type and mode, inode, and content of a directory and of everything in it."""
    found = {}
    for path in (directory, *directory.rglob("*")):
        status = path.lstat()
        if path.is_symlink():
            content = bytes(path.readlink())
        else:
            content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(directory))] = (status.st_mode, status.st_ino, content)
    return found


def contents(directory: Path) -> list[bytes]:
    return sorted(content for _, _, content in snapshot(directory).values() if content)


def stages_in(directory: Path) -> list[str]:
    return [stage.stage for stage in whole(directory).stages]


def refusal(directory: Path, *, force: bool = False) -> str:
    """Return why `directory` is refused, having checked that it is and nothing was touched."""
    before = snapshot(directory.parent)
    with pytest.raises(QwenrefError) as caught:
        make(directory, "attn_norm", force=force)
    assert snapshot(directory.parent) == before
    message = str(caught.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


def plant(directory: Path, entry: str) -> None:
    """Put a file into a directory, or an empty folder if the name ends with a slash."""
    path = directory / entry
    path.parent.mkdir(parents=True, exist_ok=True)
    if entry.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(b"mine")


def fail_in(directory: Path, failure: BaseException, *, late: bool, force: bool) -> BaseException:
    with pytest.raises(BaseException) as caught, new_dump(directory, force=force) as folder:  # noqa: PT011, PT012
        if late:
            fill(folder, "attn_norm", "qkv_bias")
        else:
            write(folder, "attn_norm", np.ones((3, 5)))
        raise failure
    return caught.value
