"""The table of floors for dumps without a manifest stands for prompts that it was not made of."""

from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from measure_generic_floor import LENGTHS, SCORES_RMS, scores_rms

import qwenref
from qwenref.dumps.manifest import Noise
from qwenref.files import parse_json
from qwenref.judge.floors import BLIND, GENERIC_FILE, PRECISIONS, Floors, Generic, generic_floors
from qwenref.metrics import MARGIN, Errors, for_all_tokens
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import read_attention, read_embedding
from qwenref.noise import noise_floor
from qwenref.stages import ATTENTION, Stage

SHAPES = {
    "D=96": Shape(96, 4, 2, 16, 1, 320, seed=101),
    "D=640, theta 1e4": Shape(640, 10, 2, 16, 1, 320, rope_theta=1e4, seed=102),
    "K=1": Shape(60, 3, 1, 16, 1, 320, head_dim=22, seed=103),
}


def measured(directory: Path, T: int, k_bias: float) -> tuple[Noise, dict[str, int], float]:
    """Return the floor of a random prompt, sizes, and the rms of its scores."""
    checkpoint = Checkpoint(directory)
    weights, _ = read_attention(checkpoint, 0)
    np.asarray(weights.k_bias)[::5] *= k_bias
    tokens = np.random.default_rng(T).integers(0, 320, T).tolist()
    rows, _ = read_embedding(checkpoint, tokens)
    noise = noise_floor(checkpoint.config, weights, rows, ATTENTION)
    return noise, checkpoint.config.sizes, scores_rms(checkpoint, weights, rows[:64])


def slices(errors: Errors) -> list[float]:
    parts = (np.ravel(part) for part in msgspec.structs.astuple(errors))
    return [np.inf if floor is None else float(floor) for part in parts for floor in part]


@pytest.mark.parametrize(("T", "k_bias"), [(5, 1), (40, 1), (40, 20), (300, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_floor_of_a_prompt_is_within_half_the_margin_of_the_generic_one(
    shape: str, T: int, k_bias: float, tmp_path: Path
) -> None:
    write(tmp_path / "model", SHAPES[shape])
    noise, sizes, rms = measured(tmp_path / "model", T, k_bias)
    for stage in ATTENTION:
        generic = generic_floors(0, stage.name, sizes, T, rms)
        for name in PRECISIONS:
            own = for_all_tokens(noise.stages[stage.name].accumulated[name], noise.tokens, T)
            pairs = zip(slices(own), slices(generic[name]), strict=True)
            judged = [floor / known for floor, known in pairs if known * MARGIN < BLIND]
            assert judged or name != "float32"
            assert max(judged, default=0) <= MARGIN / 2, (stage.name, name)


def whole(floors: Floors, precision: str) -> float:
    return floors[precision].whole or np.inf


@pytest.mark.parametrize("stage", ATTENTION, ids=lambda stage: stage.name)
def test_floors_grow_with_the_precision_the_prompt_and_the_depth(stage: Stage) -> None:
    def at(layer: int = 0, T: int = 12, rms: float | None = None) -> Floors:
        return generic_floors(layer, stage.name, None, T, rms)

    by_precision = [whole(at(), name) for name in PRECISIONS]
    assert by_precision == sorted(by_precision)
    by_length = [whole(at(T=T), "float32") for T in LENGTHS]
    assert all(b >= 0.9 * a for a, b in pairwise(by_length))
    assert whole(at(layer=3), "float32") > whole(at(), "float32")
    assert (whole(at(rms=40.0), "float32") > whole(at(), "float32")) == (
        stage.name in ("attn_softmax", "attention", "attn_out")
    )


def test_floors_of_the_head_are_those_of_as_many_layers_as_there_are() -> None:
    def of_logits(deepest: int) -> float:
        values = np.random.default_rng(0).standard_normal(64)
        dump = {f"layer-{deepest}/attn_norm": values, "lm_head": values}
        return qwenref.diff(dump, dump).stages[-1].floor or np.inf

    assert of_logits(79) == whole(generic_floors(None, "lm_head", None, 4, None, 80), "float32")
    assert of_logits(0) == of_logits(27) < of_logits(28)  # one layer may be one of many
    assert of_logits(0) == whole(generic_floors(None, "lm_head", None, 4, None), "float32")


def test_an_unknown_stage_has_the_largest_floors_of_all() -> None:
    known = [generic_floors(0, stage.name, None, 12, None) for stage in ATTENTION]
    unknown = generic_floors(0, "made_up", None, 12, None)
    for name in PRECISIONS:
        assert whole(unknown, name) == max(whole(floors, name) for floors in known)


def test_the_table_is_that_of_the_script() -> None:
    table = parse_json(GENERIC_FILE, GENERIC_FILE.read_bytes(), Generic)
    assert table.scores_rms == SCORES_RMS
    assert [up_to.tokens for up_to in table.lengths] == [*LENGTHS]
    for up_to in table.lengths:
        assert [*up_to.stages] == [stage.name for stage in ATTENTION]
        assert all([*floors] == [*PRECISIONS] for floors in up_to.stages.values())
