"""How an engine's author compares his own arrays with qwenref, on tiny random weights.

Put your engine in place of `my_attention_scores`; `test_my_engine` is all that your suite needs.
"""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import qwenref
from qwenref.model.random_checkpoint import Shape, write

TOKENS = [87, 104, 97, 116, 32, 105, 115]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    write(directory, Shape(84, 6, 2, 16, 1, 320, rope_theta=1e6, seed=7))
    return directory


def test_my_engine(model: Path) -> None:
    expected = qwenref.run(model, TOKENS).attn_scores  # [N, T, T], zero above the diagonal
    mine = my_attention_scores(model, TOKENS)
    assert relative_error(mine, expected) < 1e-5


def test_a_theta_that_is_two_times_too_small_would_be_caught(model: Path) -> None:
    expected = qwenref.run(model, TOKENS).attn_scores
    mine = my_attention_scores(model, TOKENS, theta=5e5)
    assert relative_error(mine, expected) > 1e-3


def relative_error(mine: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(mine - expected) / np.linalg.norm(expected))


def my_attention_scores(model: Path, tokens: list[int], theta: float = 1e6) -> np.ndarray:
    """Somebody else's engine: NumPy in float32, RoPE as a product of complex numbers."""
    stored = load_file(model / "model.safetensors")
    weights = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
    x = weights["model.embed_tokens.weight"][tokens]
    x /= np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6))
    x *= weights["model.layers.0.input_layernorm.weight"]
    positions = np.arange(len(tokens))[:, None, None]
    turn = np.exp(1j * positions * theta ** (-np.arange(0, 14, 2) / 14)).astype(np.complex64)

    def rotated_heads(name: str) -> np.ndarray:
        prefix = f"model.layers.0.self_attn.{name}_proj"
        heads = x @ weights[f"{prefix}.weight"].T + weights[f"{prefix}.bias"]
        heads = heads.reshape(len(tokens), -1, 14)
        turned = (heads[..., :7] + 1j * heads[..., 7:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    q, k = rotated_heads("q"), np.repeat(rotated_heads("k"), 3, axis=1)
    return np.tril(np.einsum("tnh,snh->nts", q, k)) / np.float32(14**0.5)
