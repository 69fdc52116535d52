"""Names that many tests need."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from blake3 import blake3
from safetensors.numpy import load_file, save_file

from qwenref.dumps.manifest import Manifest, read_manifest
from qwenref.dumps.place import PARTIAL
from qwenref.model.attention import Attention
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.precision import Precision
from qwenref.model.weights import read_attention
from qwenref.stages import Stage

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "weights" / "tiny-qwen2.5"


Tensors = dict[str, np.ndarray]
"""By name, as in a safetensors file."""


class Result(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


Cli = Callable[..., Result]
"""The fixture `cli`."""


def attention_of(directory: Path, precision: Precision) -> Attention:
    """Return layer 0 of a checkpoint; within `computing`, of the same arithmetic."""
    checkpoint = Checkpoint(directory)
    weights, _ = read_attention(checkpoint, 0)
    return Attention(checkpoint.config, weights, precision)


def replay(attention: Attention, stage: Stage, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a stage as our method computes it from another engine's arrays, by stage name."""
    method = getattr(attention, stage.name)
    return np.asarray(method(*(arrays[name] for name in stage.computed_from)))


def change_tensors(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Rewrite the one file of a checkpoint, as transformers reads it too."""
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def whole(directory: Path) -> Manifest:
    """Return the manifest of a dump after checking that its files, and no others, are there."""
    manifest = read_manifest(directory)
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    outside = {name for name in found if not name.startswith(PARTIAL)}
    assert outside == {"manifest.json"} | {stage.file for stage in manifest.stages}
    for stage in manifest.stages:
        content = (directory / stage.file).read_bytes()
        assert stage.fingerprint == f"blake3:{blake3(content).hexdigest()}"
    return manifest
