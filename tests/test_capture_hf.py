"""scripts/capture_hf.py as a command: the same tree and manifest as `qwenref capture`."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from capture_hf import load
from comparison import NOISE, rel_l2
from helpers import ROOT, TINY, Cli, change_tensors

import qwenref
from qwenref.dumps.manifest import Manifest, read_manifest
from qwenref.errors import QwenrefError

SCRIPT = ROOT / "scripts" / "capture_hf.py"


def capture_hf(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def same_but_for_the_engine(a: Manifest, b: Manifest) -> bool:
    fields = ("layout", "model", "prompt", "tokens", "input", "config", "weights")
    entries = [[(s.stage, s.layer, s.file, s.shape, s.axes) for s in m.stages] for m in (a, b)]
    return entries[0] == entries[1] and all(getattr(a, f) == getattr(b, f) for f in fields)


@pytest.mark.parametrize("layout", ["apr", "hf"])
def test_the_dumps_of_both_engines_line_up(layout: str, cli: Cli, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "hf", tmp_path / "ours"
    options = ("--model", TINY, "--tokens", "3,1,4,1,5", "--layout", layout)
    done = capture_hf(*options, "-o", theirs)
    assert (done.returncode, done.stderr) == (0, "")
    assert cli("capture", *options, "-o", ours).status == 0
    made, expected = read_manifest(theirs), read_manifest(ours)
    assert made.engine == "transformers"
    assert same_but_for_the_engine(made, expected)
    for stage in made.stages:
        a, b = (qwenref.read_aprt(root / stage.file) for root in (ours, theirs))
        assert a.layer == b.layer
        assert rel_l2(a.values, b.values) <= NOISE


def test_a_bfloat16_model_has_the_fingerprints_of_its_checkpoint(cli: Cli, tmp_path: Path) -> None:
    done = capture_hf(
        "--model", TINY, "--dtype", "bfloat16", "--layers", "0..2", "-o", tmp_path / "hf"
    )
    assert done.returncode == 0
    assert cli("capture", "-o", tmp_path / "ours").status == 0
    made, ours = read_manifest(tmp_path / "hf"), read_manifest(tmp_path / "ours")
    assert made.dtype == "bfloat16"
    assert made.weights.layers["0"] == ours.weights.layers["0"]
    assert made.weights.embedding == ours.weights.embedding
    assert {stage.layer for stage in made.stages} == {0, 1}
    norm = qwenref.read_aprt(tmp_path / "hf" / "layer-1" / "attn_norm.bin").values
    assert not (norm.view(np.uint32) & 0xFFFF).any()  # every value is a bfloat16


def test_trouble_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    done = capture_hf("--model", TINY, "--tokens", "3,999", "-o", tmp_path / "hf")
    assert done.returncode == 2
    assert done.stderr == (
        "capture_hf: error: token id 999 is out of range: this checkpoint has ids 0 to 319\n"
    )
    assert not (tmp_path / "hf").exists()


def test_a_single_file_is_refused(tmp_path: Path) -> None:
    done = capture_hf("--model", TINY / "model.safetensors", "-o", tmp_path / "hf")
    assert done.returncode == 2
    assert "model.safetensors is a file; transformers loads a checkpoint directory" in done.stderr


def without(kept: Callable[[str], bool], directory: Path) -> Path:
    """Return a copy of the bundled checkpoint with only some of its tensors."""
    shutil.copytree(TINY, directory)
    change_tensors(directory, lambda tensors: {n: t for n, t in tensors.items() if kept(n)})
    return directory


def test_tensors_that_transformers_would_draw_at_random_are_refused(tmp_path: Path) -> None:
    lost = "model.layers.0.mlp.up_proj.weight"
    model = without(lambda name: name != lost, tmp_path / "lost")
    with pytest.raises(QwenrefError, match=f"lacks {lost}$"):
        load(model, "float32", 1)
    load(without(lambda name: "layers.2." not in name, tmp_path / "above"), "float32", 1)


def test_a_checkpoint_without_biases_has_none_in_transformers(tmp_path: Path) -> None:
    model = load(without(lambda name: "_proj.bias" not in name, tmp_path / "none"), "float32")
    biases = [values for name, values in model.named_parameters() if name.endswith("_proj.bias")]
    assert len(biases) == 9
    assert not any(values.any() for values in biases)
    partly = without(lambda name: "0.self_attn.q_proj.bias" not in name, tmp_path / "partly")
    with pytest.raises(QwenrefError, match=r"lacks model.layers.0.self_attn.q_proj.bias$"):
        load(partly, "float32")
