"""Random checkpoints of Qwen2.5's shapes: the bundled one, and any that tests and planting need.

Recipe: one numpy.random.default_rng(seed); each tensor in the order of `recipe` is
standard_normal * scale + mean in float32, cast to the stored dtype. Biases are large (K about 3),
so that a forgotten one shows.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qwenref.bundled import tiny_checkpoint

STORED = ("bfloat16", "float16", "float32")
SHARD_BYTES = 4_000_000_000
"""Gives the published number of shards: 3B 2, 7B 4, 14B 8, 32B 17, 72B 37 (huggingface.co/Qwen)."""


@dataclass(frozen=True)
class Shape:
    """The config fields that decide which tensors there are, and how they are drawn."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    tie_word_embeddings: bool = False
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    seed: int = 25

    @property
    def head_size(self) -> int:
        """H."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


TINY = Shape(84, 6, 2, 152, 3, 320)

FAMILY = {
    "0.5b": Shape(896, 14, 2, 4864, 24, 151936, tie_word_embeddings=True),
    "1.5b": Shape(1536, 12, 2, 8960, 28, 151936, tie_word_embeddings=True),
    "3b": Shape(2048, 16, 2, 11008, 36, 151936, tie_word_embeddings=True),
    "7b": Shape(3584, 28, 4, 18944, 28, 152064),
    "14b": Shape(5120, 40, 8, 13824, 48, 152064),
    "32b": Shape(5120, 40, 8, 27648, 64, 152064),
    "72b": Shape(8192, 64, 8, 29568, 80, 152064),
}
"""Qwen2.5 as published (config.json of Qwen/Qwen2.5-*-Instruct)."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of the recipe."""

    name: str
    shape: tuple[int, ...]
    scale: float
    mean: float = 0.0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return its values in float32."""
        values = rng.standard_normal(self.shape, dtype=np.float32)
        values *= np.float32(self.scale)
        values += np.float32(self.mean)
        return values


def recipe(shape: Shape) -> Iterator[Tensor]:
    """Yield the tensors of a checkpoint in the order in which they are drawn and stored."""
    D, inner, V = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    E = shape.num_attention_heads * shape.head_size
    kv = shape.num_key_value_heads * shape.head_size
    fan_in = D**-0.5
    yield Tensor("model.embed_tokens.weight", (V, D), 0.02)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        yield Tensor(f"{prefix}.input_layernorm.weight", (D,), 0.3, mean=1.0)
        for name, width, bias in (("q", E, 1.0), ("k", kv, 3.0), ("v", kv, 0.1)):
            yield Tensor(f"{attention}.{name}_proj.weight", (width, D), fan_in)
            yield Tensor(f"{attention}.{name}_proj.bias", (width,), bias)
        yield Tensor(f"{attention}.o_proj.weight", (D, E), fan_in)
        yield Tensor(f"{prefix}.post_attention_layernorm.weight", (D,), 0.3, mean=1.0)
        yield Tensor(f"{mlp}.gate_proj.weight", (inner, D), fan_in)
        yield Tensor(f"{mlp}.up_proj.weight", (inner, D), fan_in)
        yield Tensor(f"{mlp}.down_proj.weight", (D, inner), inner**-0.5)
    yield Tensor("model.norm.weight", (D,), 0.3, mean=1.0)
    if not shape.tie_word_embeddings:
        yield Tensor("lm_head.weight", (V, D), fan_in)


def config_json(shape: Shape, dtype: str = "bfloat16") -> dict[str, object]:
    """Return config.json as Qwen2.5 publishes it, with the sizes of `shape`."""
    explicit = {} if shape.head_dim is None else {"head_dim": shape.head_dim}
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        **explicit,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "max_position_embeddings": 32768,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "max_window_layers": shape.num_hidden_layers,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "torch_dtype": dtype,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def shards(tensors: list[Tensor], itemsize: int, limit: int) -> list[list[Tensor]]:
    """Distribute tensors over files of at most `limit` bytes, in order, as transformers does."""
    plan: list[list[Tensor]] = [[]]
    room = limit
    for tensor in tensors:
        size = int(np.prod(tensor.shape)) * itemsize
        if size > room and plan[-1]:
            plan.append([])
            room = limit
        plan[-1].append(tensor)
        room -= size
    return plan


def write(
    directory: Path,
    shape: Shape,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    layers_written: int | None = None,
) -> None:
    """Write config.json, tokenizer.json and the weights of a random checkpoint.

    Args:
        directory: Where to; made if absent.
        shape: Its sizes and seed.
        dtype: What the weights are stored in: bfloat16, float16 or float32.
        shard_bytes: Most bytes of tensors in one file; more files than one get an index.
        layers_written: If given, layers from this one on are left out, files and index alike.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config_json(shape, dtype), indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(tiny_checkpoint() / "tokenizer.json", directory / "tokenizer.json")
    stored = np.dtype(getattr(ml_dtypes, dtype, dtype))
    plan = shards(list(recipe(shape)), stored.itemsize, shard_bytes)
    rng = np.random.default_rng(shape.seed)
    index = {}
    for number, tensors in enumerate(plan, start=1):
        name = f"model-{number:05}-of-{len(plan):05}.safetensors"
        name = "model.safetensors" if len(plan) == 1 else name
        values = {
            tensor.name: tensor.draw(rng).astype(stored)
            for tensor in tensors
            if layers_written is None or layer_of(tensor.name) < layers_written
        }
        if values:
            save_file(values, directory / name, metadata={"format": "pt"})
            index.update(dict.fromkeys(values, name))
    if len(plan) > 1:
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index}, indent=2) + "\n", encoding="utf-8"
        )


def layer_of(tensor_name: str) -> int:
    """Return the layer of a tensor, -1 for the embedding, the final norm and the head."""
    words = tensor_name.split(".")
    return int(words[2]) if words[1] == "layers" else -1
