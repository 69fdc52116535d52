"""Every stage against the real Qwen2ForCausalLM of transformers, run live."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_hf import load, stages_of
from comparison import NOISE, worst
from helpers import TINY, Tensors, attention_of, change_tensors, replay
from torch.nn import functional
from transformers.models.qwen2 import modeling_qwen2

import qwenref
from qwenref import chain
from qwenref.chain import Layer, layer_pieces
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import read_embedding
from qwenref.oracle import computing
from qwenref.stages import ATTENTION

BASE = Shape(84, 6, 2, 16, 2, 320, seed=1)


@dataclass(frozen=True)
class Case:
    """A random checkpoint, what is special about it, and how many tokens it is given."""

    shape: Shape = BASE
    tokens: int = 7
    dtype: str = "bfloat16"
    shard_bytes: int = 1 << 30
    edit: Callable[[Path], None] = lambda directory: None

    def write(self, directory: Path) -> Path:
        write(directory, self.shape, dtype=self.dtype, shard_bytes=self.shard_bytes)
        self.edit(directory)
        return directory

    def prompt(self) -> list[int]:
        rng = np.random.default_rng(self.tokens)
        return rng.integers(0, self.shape.vocab_size, self.tokens).tolist()


def edit_tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    return lambda directory: change_tensors(directory, change)


def is_bias(name: str) -> bool:
    return name.endswith("_proj.bias")


def zero_biases(tensors: Tensors) -> Tensors:
    return {name: t * t.dtype.type(not is_bias(name)) for name, t in tensors.items()}


def no_biases(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if not is_bias(name)}


def mixed_dtypes(tensors: Tensors) -> Tensors:
    def stored(name: str, t: np.ndarray) -> np.ndarray:
        if "q_proj" in name:
            return t.astype(np.float32)
        return t.astype(np.float16) if "norm" in name or "k_proj.bias" in name else t

    return {name: stored(name, t) for name, t in tensors.items()}


def nested_theta(directory: Path) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    theta = config.pop("rope_theta")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    file.write_text(json.dumps(config))


CASES = {
    "plain": Case(),
    "K=N": Case(replace(BASE, hidden_size=60, num_attention_heads=5, num_key_value_heads=5)),
    "K=1": Case(replace(BASE, num_key_value_heads=1)),
    "G=5": Case(replace(BASE, hidden_size=60, num_attention_heads=10)),
    "N*H>D": Case(replace(BASE, head_dim=22)),
    "N*H<D": Case(replace(BASE, head_dim=6)),
    "zero biases": Case(edit=edit_tensors(zero_biases)),
    "no biases": Case(edit=edit_tensors(no_biases)),
    "tied": Case(replace(BASE, tie_word_embeddings=True)),
    "theta 1e4": Case(replace(BASE, rope_theta=1e4)),
    "theta in rope_parameters": Case(replace(BASE, rope_theta=5e5), edit=nested_theta),
    "eps 1e-5": Case(replace(BASE, rms_norm_eps=1e-5)),
    "T=1": Case(tokens=1),
    "T=2": Case(tokens=2),
    "T=65": Case(tokens=65),
    "sharded": Case(shard_bytes=20_000),
    "float16 weights": Case(dtype="float16"),
    "float32 weights": Case(dtype="float32"),
    "mixed dtypes": Case(edit=edit_tensors(mixed_dtypes)),
}


@pytest.fixture(params=["bundled", *CASES])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[int]]:
    """A checkpoint and a prompt."""
    if request.param == "bundled":
        return TINY, [87, 104, 97, 116, 32, 105, 115, 32, 50, 43, 50, 63]
    drawn = CASES[request.param]
    return drawn.write(tmp_path / "model"), drawn.prompt()


def assert_float32_stages_agree(directory: Path, tokens: list[int]) -> None:
    theirs = stages_of(load(directory, "float32"), tokens, [0])[0]
    parts: dict[str, list[np.ndarray]] = {stage.name: [] for stage in ATTENTION}
    with computing("float32", "cpu") as (precision, _):
        attention = attention_of(directory, precision)
        rows, _ = read_embedding(Checkpoint(directory), tokens)
        for stage, _, values, _ in layer_pieces(Layer(attention), rows, ATTENTION):
            parts[stage.name].append(values)
    for stage in ATTENTION:
        ours = np.concatenate(parts[stage.name], axis=stage.axes.index("T"))
        error, where = worst(stage, ours, theirs[stage.name], attention.config.sizes)
        assert error <= NOISE, where


def test_float32_stages_agree_with_transformers(case: tuple[Path, list[int]]) -> None:
    assert_float32_stages_agree(*case)


def test_a_prompt_in_many_pieces_agrees_with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "PIECE_BYTES", 9000)  # blocks of 13 tokens, slices of 5 queries
    monkeypatch.setattr(chain, "LEAST_TOKENS", 1)
    monkeypatch.setattr(chain, "LEAST_QUERIES", 1)
    assert_float32_stages_agree(TINY, list(range(65)))


FLOAT32_IN_FLOAT64 = {"attn_norm", "q_post_rope", "k_post_rope", "attn_softmax"}
"""Stages that transformers computes in float32 even in a float64 model."""


def replay_errors(directory: Path, tokens: list[int]) -> dict[str, float]:
    """Return each stage's error when our float64 method is given transformers' own inputs."""
    theirs = stages_of(load(directory, "float64"), tokens, [0])[0]
    assert {array.dtype for array in theirs.values()} == {np.dtype(np.float64)}
    with computing("float64", "cpu") as (precision, _):
        attention = attention_of(directory, precision)
        ours = {stage: replay(attention, stage, theirs) for stage in ATTENTION}
    sizes = attention.config.sizes
    return {stage.name: worst(stage, ours[stage], theirs[stage.name], sizes)[0] for stage in ours}


def test_float64_stages_replay_from_transformers_inputs(case: tuple[Path, list[int]]) -> None:
    for stage, error in replay_errors(*case).items():
        assert error <= (1e-6 if stage in FLOAT32_IN_FLOAT64 else 1e-12), stage


@pytest.fixture
def float64_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make transformers compute norm, angles and softmax in float64 too."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean_square + self.variance_epsilon))

    def angles(self: Any, _: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        H = 2 * len(self.inv_freq)
        theta = self.config.rope_parameters["rope_theta"]
        inv_freq = 1.0 / theta ** (torch.arange(0, H, 2, dtype=torch.float64) / H)
        half = position_ids[..., None].double() * inv_freq
        both = torch.cat((half, half), dim=-1)
        return both.cos(), both.sin()

    original = functional.softmax

    def softmax(values: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
        assert dtype == torch.float32
        return original(values, dim=dim, dtype=torch.float64)

    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen2.Qwen2RotaryEmbedding, "forward", angles)
    monkeypatch.setattr(functional, "softmax", softmax)


@pytest.mark.usefixtures("float64_everywhere")
def test_float64_stages_replay_exactly_once_transformers_is_float64_throughout(
    case: tuple[Path, list[int]],
) -> None:
    for stage, error in replay_errors(*case).items():
        assert error <= 1e-12, stage


def test_a_model_cast_after_loading_is_refused() -> None:
    model = load(TINY, "float32").half()
    with pytest.raises(qwenref.QwenrefError, match="inv_freq is torch"):
        stages_of(model, [1, 2], [0])
