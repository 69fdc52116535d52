"""All stages of all layers: beside apr and live transformers, and what a run reads and writes."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from capture_hf import capture as capture_transformers
from comparison import rel_l2
from helpers import ROOT, TINY, Cli, Tensors, change_tensors
from test_against_hf import CASES

import qwenref
from qwenref import chain
from qwenref.capture import capture
from qwenref.dumps.manifest import read_manifest
from qwenref.judge.result import Result
from qwenref.model.random_checkpoint import Shape, write
from qwenref.stages import ALL, HEAD, LAYER

APR = ROOT / "tests" / "data" / "apr-f32"
FEW = ("N*H>D", "tied", "sharded", "no biases", "T=1", "T=65")

AGREE = 1e-5
"""Relative L2 of two float32 engines, from the issue that asked for it; measured: 9.2e-7 beside apr
and 1.2e-6 beside transformers on the bundled checkpoint."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint."""
    return shutil.copytree(TINY, tmp_path / "model")


def values_of(dump: Path) -> dict[str, np.ndarray]:
    """Return what each file holds, by its path in the dump."""
    files = sorted(dump.rglob("*.bin"))
    return {str(f.relative_to(dump)): qwenref.read_aprt(f).values for f in files}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything of the bundled checkpoint, float32."""
    output = tmp_path_factory.mktemp("ours") / "dump"
    capture(TINY, output, layers=None, stages=None)
    return output


def test_all_files_of_apr_agree(ours: Path) -> None:
    theirs, found = values_of(APR), values_of(ours)
    assert theirs.keys() == found.keys()
    assert len(theirs) == 54
    for name, values in theirs.items():
        assert (ours / name).read_bytes()[:12] == (APR / name).read_bytes()[:12]
        assert rel_l2(found[name], values) <= AGREE, name


def transformers(model: Path, tokens: list[int], dtype: str, output: Path) -> None:
    """Capture everything of transformers' own run."""
    capture_transformers(
        Namespace(
            model=model,
            tokens=",".join(map(str, tokens)),
            dtype=dtype,
            layers="all",
            stages="all",
            layout="apr",
            output=output,
            force=False,
        )
    )


@pytest.fixture(params=["bundled", *FEW])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[int]]:
    """A checkpoint and a prompt."""
    if request.param == "bundled":
        return TINY, [87, 104, 97, 116, 32, 105, 115, 32, 50, 43, 50, 63]
    return CASES[request.param].write(tmp_path / "model"), CASES[request.param].prompt()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_stages_agree_with_transformers(
    case: tuple[Path, list[int]], dtype: str, tmp_path: Path
) -> None:
    model, tokens = case
    transformers(model, tokens, dtype, tmp_path / "hf")
    capture(model, tmp_path / "ours", tokens=tokens, layers=None, stages=None, dtype=dtype)
    result = qwenref.diff(tmp_path / "ours", tmp_path / "hf")
    assert (result.verdict, result.exit_status) == ("agree", 0), result.reason
    theirs, found = values_of(tmp_path / "hf"), values_of(tmp_path / "ours")
    assert theirs.keys() == found.keys()
    if dtype == "float32":
        for name, values in theirs.items():
            assert rel_l2(found[name], values) <= AGREE, name
    assert prefers(found["lm_head.bin"], theirs["lm_head.bin"], result)


def prefers(found: np.ndarray, theirs: np.ndarray, result: Result) -> bool:
    """Return whether both prefer the same token, or their two best are nearer than the floor."""
    (head,) = (stage for stage in result.stages if stage.stage == "lm_head")
    assert head.floor is not None
    best, second = np.sort(theirs)[:-3:-1]
    near = best - second <= 4 * head.floor * np.sqrt(np.mean(np.square(theirs)))
    return bool(near or np.argmax(found) == np.argmax(theirs))


# --- what a run reads and writes ------------------------------------------------------------------


def captured(cli: Cli, *options: object) -> dict[str, bytes]:
    done = cli("capture", "-o", "dump", "--force", "-q", "--no-noise", *options)
    assert (done.status, done.err) == (0, "")
    return {str(f.relative_to("dump")): f.read_bytes() for f in Path("dump").rglob("*.bin")}


@pytest.fixture
def everything(ours: Path) -> dict[str, bytes]:
    return {str(f.relative_to(ours)): f.read_bytes() for f in ours.rglob("*.bin")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--layers", "all", "--stages", "all"), None),
        (("--layers", "0..3", "--stages", "all"), None),
        (("--layers", "0,2", "--stages", "mlp"), {"0/ffn_", "2/ffn_"}),
        (("--layers", "1", "--stages", "all"), {"layer-1/"}),
        (("--layers", "2", "--stages", "all"), {"layer-2/", "final_norm", "lm_head"}),
        (("--layers", "all", "--stages", "residual"), {"embedding", "residual"}),
        (("--stages", "lm_head"), {"lm_head"}),
        (("--layers", "1", "--stages", "final_norm,attn_out"), {"1/attn_out", "final_norm"}),
    ],
    ids=lambda case: " ".join(case) if isinstance(case, tuple) else "",
)
def test_what_is_asked_for_is_written_with_the_same_bytes(
    options: tuple[str, ...],
    expected: set[str] | None,
    cli: Cli,
    everything: dict[str, bytes],
) -> None:
    found = captured(cli, *options)
    wanted = {
        name: content
        for name, content in everything.items()
        if expected is None or any(part in name for part in expected)
    }
    assert found == wanted


def test_a_run_from_a_stream_in_the_middle_goes_on_as_the_whole_run(
    cli: Cli, ours: Path, everything: dict[str, bytes]
) -> None:
    stream = ours / "layer-0" / "post_ffn_residual.bin"
    found = captured(cli, "--layers", "1..3", "--stages", "all", "--input", stream)
    assert found == {name: of for name, of in everything.items() if "layer-0" not in name}


@pytest.mark.parametrize("layer", ["0", "1"])
@pytest.mark.parametrize("stages", ["residual", "residual,mlp", "all,embedding", "all"])
def test_a_run_from_a_stream_leaves_out_the_embedding_of_a_group(
    layer: str, stages: str, cli: Cli, ours: Path, everything: dict[str, bytes]
) -> None:
    stream = {"0": "layer-0/embedding.bin", "1": "layer-0/post_ffn_residual.bin"}[layer]
    options = ("--layers", layer, "--stages", stages)
    whole = captured(cli, *options)
    found = captured(cli, *options, "--input", ours / stream)
    assert found == {name: of for name, of in whole.items() if "embedding" not in name}
    assert found.items() <= everything.items()
    assert f"layer-{layer}/post_ffn_residual.bin" in found


def test_a_stage_of_layer_0_alone_is_no_trouble_beside_an_input_above_it(
    cli: Cli, ours: Path
) -> None:
    stream = ours / "layer-0" / "post_ffn_residual.bin"
    options = ("--layers", "1", "--input", stream, "--stages", "embedding,attn_norm")
    assert [*captured(cli, *options)] == ["layer-1/attn_norm.bin"]


def test_logits_of_all_tokens(cli: Cli, ours: Path) -> None:
    captured(cli, "--stages", "lm_head", "--logits", "all")
    (stage,) = read_manifest(Path("dump")).stages
    assert (stage.layer, stage.axes, stage.shape) == (None, "T V", [12, 320])
    logits = qwenref.read_aprt("dump/lm_head.bin").values.reshape(12, 320)
    last = qwenref.read_aprt(ours / "lm_head.bin").values
    assert rel_l2(logits[-1], last) <= 1e-6
    assert qwenref.diff("dump", ours, stages=["lm_head"]).verdict == "agree"


@pytest.mark.parametrize("most", [84 * 4 * 100, 84 * 4 * 7])
def test_pieces_and_slices_of_the_vocabulary_do_not_change_the_numbers(
    most: int, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "HEAD_BYTES", most)
    monkeypatch.setattr(chain, "PIECE_BYTES", 4480)
    monkeypatch.setattr(chain, "LEAST_TOKENS", 1)
    monkeypatch.setattr(chain, "LEAST_QUERIES", 1)
    capture(TINY, tmp_path / "dump", layers=None, stages=ALL, all_logits=True, noise=False)
    whole, pieces = values_of(ours), values_of(tmp_path / "dump")
    for name, values in whole.items():
        found = pieces[name][-320:] if name == "lm_head.bin" else pieces[name]
        assert rel_l2(found, values) <= AGREE, name


MOVED_FIRST = {
    "model.layers.1.input_layernorm.weight": "layer-1/attn_norm",
    "model.layers.1.self_attn.o_proj.weight": "layer-1/attn_out",
    "model.layers.1.post_attention_layernorm.weight": "layer-1/ffn_norm",
    "model.layers.1.mlp.gate_proj.weight": "layer-1/ffn_gate",
    "model.layers.1.mlp.up_proj.weight": "layer-1/ffn_up",
    "model.layers.1.mlp.down_proj.weight": "layer-1/ffn_out",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
}


@pytest.mark.parametrize("tensor", MOVED_FIRST)
def test_changing_a_weight_tensor_moves_its_stage_first(tensor: str, model: Path, cli: Cli) -> None:
    options = ("--model", model, "--layers", "all", "--stages", "all", "--tokens", "5,6,7")
    before = captured(cli, *options)

    def changed(values: Tensors) -> Tensors:
        new = values[tensor].astype(np.float32) * 1.25 + 0.5
        return values | {tensor: new.astype(values[tensor].dtype)}

    change_tensors(model, changed)
    after = captured(cli, *options)
    order = [f"layer-{layer}/{stage.name}.bin" for layer in range(3) for stage in LAYER]
    order += [f"{stage.name}.bin" for stage in HEAD]
    moved = [name for name in order if name in before and before[name] != after[name]]
    assert moved[0] == f"{MOVED_FIRST[tensor]}.bin"


def test_tied_embeddings_win_over_a_matrix_of_their_own(tmp_path: Path, cli: Cli) -> None:
    write(tmp_path / "model", Shape(84, 6, 2, 16, 1, 320, tie_word_embeddings=True))
    options = ("--model", tmp_path / "model", "--stages", "lm_head", "--tokens", "5,6,7")
    before = captured(cli, *options)
    change_tensors(
        tmp_path / "model",
        lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2},
    )
    assert captured(cli, *options) == before


def test_a_checkpoint_without_mlp_gives_attention_and_no_more(tmp_path: Path, cli: Cli) -> None:
    write(tmp_path / "model", Shape(84, 6, 2, 16, 2, 320))
    change_tensors(
        tmp_path / "model",
        lambda tensors: {name: of for name, of in tensors.items() if "mlp" not in name},
    )
    assert len(captured(cli, "--model", tmp_path / "model", "--tokens", "5")) == 9
    for options in (("--layers", "1"), ("--stages", "ffn_norm"), ("--stages", "lm_head")):
        done = cli("capture", "--model", tmp_path / "model", "--tokens", "5", *options)
        assert (done.status, done.out) == (2, "")
        assert "model.layers.0.mlp.gate_proj.weight is missing" in done.err


@pytest.mark.parametrize("tensor", ["model.layers.2.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_no_numbers_leave_nothing_behind(
    tensor: str, tmp_path: Path, cli: Cli
) -> None:
    write(tmp_path / "model", Shape(84, 6, 2, 16, 3, 320))

    def broken(tensors: Tensors) -> Tensors:
        tensors[tensor].reshape(-1)[70] = np.nan
        return tensors

    change_tensors(tmp_path / "model", broken)
    done = cli("capture", "--model", tmp_path / "model", "--tokens", "5", "--stages", "lm_head")
    assert (done.status, done.out) == (2, "")
    assert f"{tensor} holds 1 NaN or infinite values" in done.err
    assert [path.name for path in Path().iterdir()] == []


def test_the_table_has_a_line_for_each_stage_of_all_layers(cli: Cli) -> None:
    done = cli("capture", "--layers", "all", "--stages", "all")
    lines = done.out.splitlines()
    assert "layers 0 to 2, 12 tokens of 'What is 2+2?'" in lines[0]
    assert [line.split()[0] for line in lines[2:-1]] == [stage.name for stage in ALL]
    assert lines[3].split()[-1] == "layer-*/attn_norm.bin"
    assert lines[-2].split()[-1] == "lm_head.bin"


def test_floors_grow_with_depth_and_hold_the_real_error(ours: Path, tmp_path: Path) -> None:
    capture(TINY, tmp_path / "exact", layers=None, stages=None, dtype="float64", noise=False)
    noise = read_manifest(ours).noise
    assert noise is not None
    exact, found = values_of(tmp_path / "exact"), values_of(ours)
    ratios = {}
    for name, floor in noise.stages.items():
        normal = floor.accumulated["float32"].whole
        assert normal is not None
        ratios[name] = rel_l2(found[f"{name}.bin"], exact[f"{name}.bin"]) / normal
    assert len(ratios) == 53  # all but the embedding, which is exact
    assert max(ratios.values()) <= 1  # measured: 0.73
    assert min(ratios.values()) >= 0.1  # measured: 0.25
    first, last = (noise.stages[f"layer-{n}/attn_norm"].accumulated for n in (0, 2))
    for dtype in ("float32", "float16", "bfloat16"):
        assert (last[dtype].whole or 0) > 3 * (first[dtype].whole or 1)


def test_the_manifest_names_all_weights_that_were_read(ours: Path) -> None:
    weights = read_manifest(ours).weights
    assert list(weights.layers) == list(weights.feed_forwards) == ["0", "1", "2"]
    assert weights.final_norm is not None
    assert weights.lm_head is not None
    found = json.loads((ours / "manifest.json").read_text())["config"]
    assert (found["intermediate_size"], found["vocab_size"]) == (152, 320)


def test_other_mlp_weights_are_incomparable(model: Path, cli: Cli, ours: Path) -> None:
    change_tensors(
        model,
        lambda tensors: (
            tensors
            | {
                "model.layers.2.mlp.up_proj.weight": tensors["model.layers.2.mlp.up_proj.weight"]
                * np.array(2, "bfloat16")
            }
        ),
    )
    captured(cli, "--model", model, "--layers", "all", "--stages", "all")
    result = qwenref.diff(ours, "dump")
    assert result.verdict == "incomparable"
    assert "different MLP weights in layer 2" in result.reason
