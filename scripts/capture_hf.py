"""Capture the stages of the real transformers Qwen2ForCausalLM as a dump directory.

    python scripts/capture_hf.py --model weights/tiny-qwen2.5 --dtype float32 -o dumps/hf

The model is loaded whole and runs whole, on CPU; stages are taken by hooks and through
transformers' attention registry, where its own `eager_attention_forward` is called. Tree and
manifest are those of `qwenref capture`. Needs the extra 'hf'; outside tests, the only file that
imports torch.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, Qwen2ForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward
from transformers.utils import logging

import qwenref
from qwenref.dumps.layout import LAYOUTS
from qwenref.dumps.manifest import Weights, write_manifest
from qwenref.dumps.place import new_dump
from qwenref.dumps.tree import StageWriter
from qwenref.errors import QwenrefError, printable
from qwenref.forward import Plan
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.tokens import DEFAULT_PROMPT, encode, parse_tokens
from qwenref.model.weights import (
    HeadMatrix,
    read_attention,
    read_embedding,
    read_feed_forward,
    read_final_norm,
)
from qwenref.stages import ALL, HEAD, RESIDUAL, parse_layers, parse_stages

DESCRIPTION = "Capture the stages of transformers' Qwen2ForCausalLM as a dump directory."
DTYPES = ("float32", "float64", "bfloat16", "float16")
RECORDED = "qwenref_recorded_eager"

Arrays = dict[str, np.ndarray]
"""By stage name (and "residual"), in the axes of `qwenref.stages`, scores unmasked."""


def load(model_dir: Path, dtype: str, last: int = 0) -> Qwen2ForCausalLM:
    """Load the whole model in `dtype`, with `recorded_attention` as its attention.

    The mask function has to be registered too: without it the mask arrives as None, and an eager
    attention silently looks into the future.

    Raises:
        QwenrefError: Tensors are missing in the layers up to `last` (but all biases may be, which
            are zero then): transformers draws them at random.
    """
    AttentionInterface.register(RECORDED, recorded_attention)
    AttentionMaskInterface.register(RECORDED, eager_mask)
    loaded: Any = Qwen2ForCausalLM.from_pretrained(
        model_dir,
        dtype=getattr(torch, dtype),
        attn_implementation=RECORDED,
        local_files_only=True,
        output_loading_info=True,
    )
    model, found = loaded
    used = ("model.embed_tokens.", *(f"model.layers.{layer}." for layer in range(last + 1)))
    missing = {name for name in found["missing_keys"] if name.startswith(used)}
    biases = {f"{layer}self_attn.{name}_proj.bias" for layer in used[1:] for name in "qkv"}
    if missing and missing != biases:
        raise QwenrefError(f"{model_dir} lacks {', '.join(sorted(missing))}")
    return model.eval()


def stages_of(
    model: Qwen2ForCausalLM, tokens: Sequence[int], layers: Sequence[int], last_logits: int = 1
) -> dict[int | None, Arrays]:
    """Run the model on a prompt and return what each of `layers` computed, and, None, the model.

    bfloat16 and float16 are widened to float32; float64 stays. "residual" is the stream that
    enters the layer. Logits are those of so many of the last tokens, of all if that is 0.
    """
    inv_freq = model.model.rotary_emb.inv_freq
    if inv_freq.dtype != torch.float32:
        raise QwenrefError(f"inv_freq is {inv_freq.dtype}, not float32: the model was cast")
    records: dict[int | None, Arrays] = {layer: {} for layer in layers}
    whole: Arrays = {}
    handles = [
        _recorded(model.model.norm, whole, "final_norm"),
        _recorded(model.lm_head, whole, "lm_head"),
    ]
    try:
        for layer in layers:
            handles += _watch(model.model.layers[layer], records[layer])
        with torch.inference_mode():
            model(torch.tensor([list(tokens)]), use_cache=False, logits_to_keep=last_logits)
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            vars(model.model.layers[layer].self_attn).pop("record", None)
    for record in records.values():
        parts = [record.pop(f"{name}_proj") for name in "qkv"]
        record["qkv_bias"] = np.concatenate(parts, axis=-1)
    return records | {None: whole}


def _recorded(module: nn.Module, record: Arrays, name: str) -> RemovableHandle:
    """Have a module put what it returns into `record`."""

    def returned(_: nn.Module, __: tuple, output: Any) -> None:
        record[name] = _array(output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(returned)


def _entered(module: nn.Module, record: Arrays, name: str) -> RemovableHandle:
    """Have a module put what it is given into `record`."""

    def given(_: nn.Module, args: tuple) -> None:
        record[name] = _array(args[0])

    return module.register_forward_pre_hook(given)


def _watch(layer: Any, record: Arrays) -> list[RemovableHandle]:
    """Have a decoder layer put its arrays into `record`."""
    attention = layer.self_attn
    attention.record = record
    projections = {name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")}

    def normed(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
        record["attn_norm"] = _array(output)
        # from the weights: output minus bias would cancel, 5e-3 in float16 with biases of 8
        products = [functional.linear(output, p.weight) for p in projections.values()]
        record["qkv_matmul"] = _array(torch.cat(products, dim=-1))

    mlp = layer.mlp
    entered = {
        RESIDUAL: layer,
        "attention": attention.o_proj,
        "post_attn_residual": layer.post_attention_layernorm,
        "ffn_swigl": mlp.down_proj,
    }
    returned = projections | {
        "attn_out": attention.o_proj,
        "ffn_norm": layer.post_attention_layernorm,
        "ffn_gate": mlp.gate_proj,
        "ffn_up": mlp.up_proj,
        "ffn_silu": mlp.act_fn,
        "ffn_out": mlp.down_proj,
        "post_ffn_residual": layer,
    }
    return [
        layer.input_layernorm.register_forward_hook(normed),
        *(_entered(module, record, name) for name, module in entered.items()),
        *(_recorded(module, record, name) for name, module in returned.items()),
    ]


def recorded_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call transformers' eager attention; if the layer is watched, record what it computes.

    Args:
        module: The Qwen2Attention.
        query: [1, N, T, H], after RoPE.
        key: [1, K, T, H], after RoPE, before heads are repeated.
        value: [1, K, T, H].
        attention_mask: [1, 1, T, T], 0 or the dtype's minimum.
        options: scaling, dropout and more.
    """
    if not hasattr(module, "record"):
        return eager_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is None:
        raise QwenrefError("transformers passed no attention mask; the dump would be wrong")
    with _softmax_inputs() as scores:
        output, weights = eager_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        eager_attention_forward(module, query, key, value, None, **options)
    masked, unmasked = scores
    if not torch.allclose(masked, unmasked + attention_mask, rtol=0, atol=0, equal_nan=True):
        raise QwenrefError("transformers' masked and unmasked scores disagree")
    module.record["q_post_rope"] = _array(query.transpose(1, 2))
    module.record["k_post_rope"] = _array(key.transpose(1, 2))
    module.record["attn_scores"] = _array(unmasked)
    module.record["attn_softmax"] = _array(weights)
    return output, weights


@contextmanager
def _softmax_inputs() -> Iterator[list[torch.Tensor]]:
    """Collect what is passed to torch's softmax within the block."""
    seen: list[torch.Tensor] = []
    original = functional.softmax

    def softmax(values: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(values)
        return original(values, *args, **options)

    functional.softmax = softmax
    try:
        yield seen
    finally:
        functional.softmax = original


def _array(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy without the batch axis, in float32, or float64 if it is that."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return wide[0].numpy().copy()


def main() -> None:
    """Parse the command line, capture, and say what was written."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default=DEFAULT_PROMPT, help="default: %(default)s")
    prompt.add_argument("--tokens", help="token ids: 3838,374,220 or @FILE")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the whole model")
    parser.add_argument("--layers", default="0", help="0, or 0,1 or 0..4 (without 4), or all")
    parser.add_argument("--stages", default="attention", help="as of qwenref capture")
    parser.add_argument("--layout", choices=LAYOUTS, default="apr")
    parser.add_argument("-o", "--output", type=Path, required=True, help="dump directory")
    parser.add_argument("--force", action="store_true", help="replace a dump that is there")
    logging.disable_progress_bar()
    try:
        capture(parser.parse_args())
    except QwenrefError as error:
        print(f"capture_hf: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


def capture(options: argparse.Namespace) -> None:
    """Capture as the command line says."""
    if options.model.is_file():
        raise QwenrefError(f"{options.model} is a file; transformers loads a checkpoint directory")
    checkpoint = Checkpoint(options.model)
    depth = checkpoint.config.num_hidden_layers
    layers = parse_layers(options.layers) or range(depth)
    if layers[-1] >= depth:
        raise QwenrefError(f"layer {layers[-1]} does not exist")
    plan = Plan(0, layers, parse_stages(options.stages) or ALL, depth)
    if options.tokens is not None:
        text, tokens = None, parse_tokens(options.tokens)
    else:
        text, tokens = options.prompt, encode(options.prompt, checkpoint.directory)
    layout = LAYOUTS[options.layout]
    with new_dump(options.output, force=options.force) as folder:
        weights = _fingerprints(checkpoint, plan, tokens)
        model = load(options.model, options.dtype, depth - 1 if plan.of_model else layers[-1])
        records = stages_of(model, tokens, layers)
        if 0 in records:
            records[0]["embedding"] = records[0][RESIDUAL]
        records[None]["lm_head"] = records[None]["lm_head"][-1]
        sizes = checkpoint.config.sizes | {"T": len(tokens), "S": len(tokens)}
        files = []
        for layer, record in records.items():
            for stage in plan.of_model if layer is None else plan.of_layer(layer):
                with StageWriter(folder, layer, stage, sizes, layout) as writer:
                    writer.write(record[stage.name])
                    files.append(writer.finish().file)
        write_manifest(
            folder,
            engine="transformers",
            versions={"qwenref": qwenref.__version__}
            | {package: version(package) for package in ("transformers", "torch", "numpy")},
            device="cpu",
            dtype=options.dtype,
            layout=options.layout,
            model=checkpoint.name,
            prompt=text,
            tokens=tokens,
            input=None,
            config=checkpoint.config,
            weights=weights,
            stages=files,
        )
    print(f"{len(files)} stages of {options.model} in {options.output}")


def _fingerprints(checkpoint: Checkpoint, plan: Plan, tokens: list[int]) -> Weights:
    """Return those of the checkpoint, so that all dtypes have the same."""
    read = [read_attention(checkpoint, layer) for layer in plan.layers]
    feed_forwards = {
        str(layer): read_feed_forward(checkpoint, layer)[1]
        for layer in plan.layers
        if plan.needs_feed_forward(layer)
    }
    norm = read_final_norm(checkpoint)[1] if plan.of_model else None
    matrix = None
    if HEAD[-1] in plan.stages:
        matrix = HeadMatrix(checkpoint, 1)
        for _ in matrix.slices(4096):
            pass
    return Weights(
        layers={str(n): of for n, (_, of) in zip(plan.layers, read, strict=True)},
        embedding=read_embedding(checkpoint, tokens)[1],
        biases=any(weights.q_bias is not None for weights, _ in read),
        feed_forwards=feed_forwards,
        final_norm=norm,
        lm_head=None if matrix is None else matrix.fingerprint,
    )


if __name__ == "__main__":
    main()
