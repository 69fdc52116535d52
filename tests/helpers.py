"""Names that many tests need."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from qwenref.dumps.manifest import Manifest, read_manifest
from qwenref.dumps.place import PARTIAL

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "weights" / "tiny-qwen2.5"


class Result(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


Cli = Callable[..., Result]
"""The fixture `cli`."""


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
