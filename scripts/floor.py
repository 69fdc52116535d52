"""The least that a capture could take: imports, one compilation, reading, products, writing.

    python scripts/floor.py MODEL TOKENS FOLDER

Nothing of it is attention: products of the same shapes, in NumPy, and files of the same sizes. With
no FOLDER it ends when the weights are read.
"""

import sys
from pathlib import Path

import flax.nnx  # noqa: F401 - its import is what is measured
import jax
import numpy as np

from qwenref.model.checkpoint import Checkpoint
from qwenref.model.weights import EMBEDDING, attention_tensors


def main() -> None:
    """Do it."""
    model, T = Path(sys.argv[1]), int(sys.argv[2])
    checkpoint = Checkpoint(model)
    weights = {}
    for field, (name, shape) in attention_tensors(checkpoint.config, 0).items():
        pieces = [piece for _, piece in checkpoint.rows(name, 0, shape[0])]
        weights[field] = np.concatenate(pieces)
    rows = checkpoint.rows_at(EMBEDDING, [n % 300 for n in range(T)])
    jax.block_until_ready(jax.jit(lambda x: x @ x.T)(np.ones((8, 8), np.float32)))
    if len(sys.argv) > 3:
        _multiply_and_write(checkpoint, weights, rows, Path(sys.argv[3]))


def _multiply_and_write(
    checkpoint: Checkpoint, weights: dict[str, np.ndarray], rows: np.ndarray, folder: Path
) -> None:
    K, H, N = (checkpoint.config.sizes[letter] for letter in "KHN")
    folder.mkdir(exist_ok=True)
    x = rows.astype(np.float32)
    q, k, v = (x @ weights[f"{name}_proj"].astype(np.float32).T for name in "qkv")
    qkv = np.concatenate([q, k, v], axis=1)
    for name, array in {"norm": x, "matmul": qkv, "bias": qkv, "q": q, "k": k}.items():
        array.tofile(folder / name)
    mixed = []
    with (folder / "scores").open("wb") as scores, (folder / "softmax").open("wb") as softmax:
        for head in range(N):
            shared = slice(head // (N // K) * H, (head // (N // K) + 1) * H)
            products = q[:, head * H : (head + 1) * H] @ k[:, shared].T
            products.tofile(scores)
            products.tofile(softmax)
            mixed.append(products @ v[:, shared])
    attention = np.concatenate(mixed, axis=1)
    attention.tofile(folder / "attention")
    (attention @ weights["o_proj"].astype(np.float32).T).tofile(folder / "out")


if __name__ == "__main__":
    main()
