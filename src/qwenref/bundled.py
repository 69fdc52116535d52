"""The tiny checkpoint that ships with qwenref, in a wheel and in a source tree."""

from pathlib import Path


def tiny_checkpoint() -> Path:
    """Return the directory of the bundled checkpoint.

    Random weights of an awkward shape: D=84 N=6 K=2 H=14 V=320, 3 layers, bfloat16, K biases of
    about 3. scripts/make_tiny_checkpoint.py makes it.
    """
    package = Path(__file__).resolve().parent
    installed = package / "weights" / "tiny-qwen2.5"
    return installed if installed.is_dir() else package.parents[1] / "weights" / "tiny-qwen2.5"
