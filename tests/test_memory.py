"""Peak memory of a whole `qwenref capture`: weights in compute dtype + outputs + 350 MB.

The noise floor takes the projections in float64 besides, and 100 MB.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench_capture import measure

from qwenref.model.checkpoint import Checkpoint
from qwenref.model.random_checkpoint import FAMILY, Shape, write
from qwenref.model.weights import attention_tensors

BASELINE = 350e6
"""From the issue that asked for it; JAX and flax alone, with one compiled product, take 230 MB."""

NOISE = 100e6
"""Measured: 37 to 72 MB for compiled programs and the arrays of 64 tokens."""

WIDE = Shape(4096, 32, 8, 16, 1, 320)
LONG = replace(FAMILY["0.5b"], num_hidden_layers=1, vocab_size=320)


@pytest.mark.parametrize(
    ("shape", "stored", "computed", "T", "stages"),
    [
        # the embedding table alone is 272 MB: reading it whole would show
        (replace(FAMILY["0.5b"], num_hidden_layers=1), "bfloat16", "float32", 7, "all"),
        # 470 MB of scores and probabilities
        (LONG, "bfloat16", "float64", 2048, "all"),
        # small outputs: holding [T, F] or [T, E] for all tokens would show
        (LONG, "bfloat16", "float32", 6000, "attn_out"),
        (LONG, "bfloat16", "float64", 6000, "k_post_rope"),
        # 168 MB of float32 attention weights: holding them twice would show
        (WIDE, "float32", "float32", 7, "all"),
        (WIDE, "bfloat16", "float64", 7, "all"),
    ],
    ids=[
        "wide embedding",
        "long prompt in float64",
        "one stage of a long prompt",
        "keys of a long prompt",
        "wide layer",
        "wide layer in float64",
    ],
)
def test_only_the_layers_weights_and_what_a_piece_needs_are_held(
    shape: Shape, stored: str, computed: str, T: int, stages: str, tmp_path: Path
) -> None:
    model, output, ids = tmp_path / "model", tmp_path / "dump", tmp_path / "ids"
    write(model, shape, dtype=stored)
    ids.write_text(f"{[9] * T}")
    options = ["capture", "-q", "--model", str(model), "--tokens", f"@{ids}", "--stages", stages]
    options += ["--dtype", computed, "-o", str(output), "--force"]
    peak = measure([*options, "--no-noise"]).bytes
    config = Checkpoint(model).config
    values = sum(math.prod(tensor.shape) for tensor in attention_tensors(config, 0).values())
    outputs = sum(file.stat().st_size for file in output.rglob("*.bin"))
    assert outputs > 0
    promised = values * np.dtype(computed).itemsize + outputs + BASELINE
    assert peak <= promised
    projections = config.sizes["F"] * config.sizes["D"] * 8
    assert measure(options).bytes <= promised + projections + NOISE
