"""Attention without a second engine: what must move, what must hold, what must not matter."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import rel_l2
from helpers import TINY, Tensors, attention_of, change_tensors
from safetensors.numpy import load_file

import qwenref
from qwenref import chain
from qwenref.chain import Layer, layer_pieces
from qwenref.dumps.manifest import UsedConfig
from qwenref.model.attention import Attention
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.precision import PRECISIONS
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import EMBEDDING, attention_tensors, read_attention, read_embedding
from qwenref.oracle import Stages, computing
from qwenref.stages import ATTENTION

TOKENS = [87, 104, 97, 116, 32, 105, 115]
T = len(TOKENS)
CONFIG = Checkpoint(TINY).config
SIZES = CONFIG.sizes | {"T": T, "S": T}
NAMES = [stage.name for stage in ATTENTION]


@pytest.fixture(scope="module")
def healthy() -> Stages:
    return qwenref.run(TINY, TOKENS)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled checkpoint, to be changed."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def moved(before: Stages, after: Stages) -> list[str]:
    pairs = zip(before, after, strict=True)
    return [
        name
        for name, (a, b) in zip(NAMES, pairs, strict=True)
        if a.shape != b.shape or not np.array_equal(a, b)
    ]


FIRST_MOVED_BY_TENSOR = {
    "norm": "attn_norm",
    "q_proj": "qkv_matmul",
    "k_proj": "qkv_matmul",
    "v_proj": "qkv_matmul",
    "o_proj": "attn_out",
    "q_bias": "qkv_bias",
    "k_bias": "qkv_bias",
    "v_bias": "qkv_bias",
}


@pytest.mark.parametrize("field", [*FIRST_MOVED_BY_TENSOR, "embedding"])
def test_changing_a_weight_tensor_moves_its_stage_first(
    field: str, model: Path, healthy: Stages
) -> None:
    tensors = attention_tensors(CONFIG, 0)
    name = EMBEDDING if field == "embedding" else tensors[field].name

    def moved_tensor(values: Tensors) -> Tensors:
        new = values[name].astype(np.float32) * 1.25 + 0.5
        return values | {name: new.astype(values[name].dtype)}

    change_tensors(model, moved_tensor)
    first = FIRST_MOVED_BY_TENSOR.get(field, "attn_norm")
    assert moved(healthy, qwenref.run(model, TOKENS))[0] == first
    assert set(tensors) == set(FIRST_MOVED_BY_TENSOR)


CONFIG_CHANGES = {
    "rms_norm_eps": ({"rms_norm_eps": 1e-5}, "attn_norm"),
    "rope_theta": ({"rope_theta": 1e4}, "q_post_rope"),
    # the same 84 + 2*28 rows of q, k and v, cut into heads in another way
    "num_attention_heads, num_key_value_heads, head_dim": (
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 28},
        "q_post_rope",
    ),
}


@pytest.mark.parametrize("fields", CONFIG_CHANGES)
def test_changing_a_config_field_moves_its_stage_first(
    fields: str, model: Path, healthy: Stages
) -> None:
    changes, first = CONFIG_CHANGES[fields]
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    assert moved(healthy, qwenref.run(model, TOKENS))[0] == first


def test_changing_the_hidden_size_moves_the_first_stage(tmp_path: Path, healthy: Stages) -> None:
    write(tmp_path / "model", Shape(42, 6, 2, 16, 1, 320, head_dim=14))
    assert moved(healthy, qwenref.run(tmp_path / "model", TOKENS))[0] == "attn_norm"


def test_every_config_field_that_the_manifest_lists_is_changed_above() -> None:
    changed = {name for fields in CONFIG_CHANGES for name in fields.split(", ")} | {"hidden_size"}
    beyond_attention = {"intermediate_size", "vocab_size"}
    assert changed | beyond_attention == set(UsedConfig.__struct_fields__)


@pytest.fixture(scope="module")
def exact() -> Stages:
    """The stages in float64: what must hold holds to about 1e-15."""
    return qwenref.run(TINY, TOKENS, dtype="float64")


def test_qkv_bias_adds_the_checkpoints_bias_to_every_token(exact: Stages) -> None:
    tensors = load_file(TINY / "model.safetensors")
    fields = attention_tensors(CONFIG, 0)
    biases = [tensors[fields[f"{part}_bias"].name].astype(np.float64) for part in "qkv"]
    added = exact.qkv_bias - exact.qkv_matmul
    np.testing.assert_allclose(added, np.tile(np.concatenate(biases), (T, 1)), atol=1e-13)


def test_norm_leaves_a_mean_square_of_just_below_one(exact: Stages) -> None:
    weights, _ = read_attention(Checkpoint(TINY), 0)
    rows, _ = read_embedding(Checkpoint(TINY), TOKENS)
    ms = np.mean(rows.astype(np.float64) ** 2, axis=-1)
    expected = ms / (ms + CONFIG.rms_norm_eps)
    found = np.mean((exact.attn_norm / weights.norm.astype(np.float64)) ** 2, axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize(("stage", "block"), [("q_post_rope", 0), ("k_post_rope", 1)])
def test_rope_turns_pairs_i_and_i_plus_half_by_the_stated_angle(
    exact: Stages, stage: str, block: int
) -> None:
    N, K, H = SIZES["N"], SIZES["K"], SIZES["H"]
    start, stop = ((0, N), (N, N + K))[block]
    before = exact.qkv_bias.reshape(T, -1, H)[:, start:stop]
    pairs = before[..., : H // 2] + 1j * before[..., H // 2 :]
    angle = np.arange(T)[:, None] * CONFIG.rope_theta ** (-np.arange(0, H, 2) / H)
    turned = pairs * np.exp(1j * angle)[:, None]
    after = getattr(exact, stage)
    np.testing.assert_allclose(
        after, np.concatenate([turned.real, turned.imag], axis=-1), atol=1e-13
    )
    assert np.array_equal(after[0], before[0])


def test_scores_are_scaled_products_with_the_key_head_of_the_group(exact: Stages) -> None:
    G, H = SIZES["N"] // SIZES["K"], SIZES["H"]
    for n in range(SIZES["N"]):
        products = exact.q_post_rope[:, n] @ exact.k_post_rope[:, n // G].T
        np.testing.assert_allclose(exact.attn_scores[n], np.tril(products) / H**0.5, atol=1e-13)


def test_scores_above_the_diagonal_are_positive_zero(healthy: Stages) -> None:
    above = healthy.attn_scores[:, ~np.tri(T, dtype=bool)]
    assert above.size == SIZES["N"] * T * (T - 1) // 2
    assert not above.view(np.uint32).any()


def test_softmax_rows_sum_to_one_and_are_zero_above_the_diagonal(exact: Stages) -> None:
    np.testing.assert_allclose(exact.attn_softmax.sum(axis=-1), 1, rtol=1e-14)
    assert not exact.attn_softmax[:, ~np.tri(T, dtype=bool)].any()
    expected = np.exp(exact.attn_scores) * np.tri(T)
    expected /= expected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(exact.attn_softmax, expected, atol=1e-14)


def test_attention_mixes_the_values_of_the_group_and_token_0_keeps_its_own(exact: Stages) -> None:
    N, K, H = SIZES["N"], SIZES["K"], SIZES["H"]
    v = exact.qkv_bias.reshape(T, -1, H)[:, N + K :]
    mixed = exact.attention.reshape(T, N, H)
    for n in range(N):
        expected = exact.attn_softmax[n] @ v[:, n // (N // K)]
        np.testing.assert_allclose(mixed[:, n], expected, atol=1e-13)
    np.testing.assert_allclose(mixed[0], np.repeat(v[0], N // K, axis=0), atol=1e-14)


def test_without_biases_qkv_bias_is_qkv_matmul(model: Path) -> None:
    change_tensors(
        model, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("_proj.bias")}
    )
    stages = qwenref.run(model, TOKENS)
    assert np.array_equal(stages.qkv_bias, stages.qkv_matmul)


@pytest.fixture(scope="module")
def attention() -> Iterator[Attention]:
    with computing("float32", "cpu"):
        yield attention_of(TINY, PRECISIONS["float32"])


@pytest.fixture(scope="module")
def values(attention: Attention) -> dict[str, np.ndarray]:
    rows, _ = read_embedding(Checkpoint(TINY), TOKENS)
    pieces = list(layer_pieces(Layer(attention), rows, ATTENTION))
    assert len(pieces) == len(ATTENTION)  # one piece each
    return {"residual": rows.astype(np.float32)} | {
        piece.stage.name: piece.values for piece in pieces
    }


def inputs_of(name: str, values: dict[str, np.ndarray]) -> list[np.ndarray]:
    (stage,) = (stage for stage in ATTENTION if stage.name == name)
    return [values[source] for source in stage.computed_from]


# measured: at most 3.8e-7 between two float32 engines on this shape (tests/test_against_apr.py)
ACCUMULATION = 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_eager_equals_compiled_up_to_accumulation_noise(
    name: str, attention: Attention, values: dict[str, np.ndarray]
) -> None:
    with jax.disable_jit():
        eager = getattr(attention, name)(*map(jnp.asarray, inputs_of(name, values)))
    assert rel_l2(np.asarray(eager), values[name]) <= ACCUMULATION


@pytest.mark.parametrize("name", NAMES)
def test_every_product_asks_for_the_highest_precision(
    name: str, attention: Attention, values: dict[str, np.ndarray]
) -> None:
    graph = str(jax.make_jaxpr(getattr(Attention, name))(attention, *inputs_of(name, values)))
    products = {"qkv_matmul": 3, "attn_scores": 1, "attention": 1, "attn_out": 1}.get(name, 0)
    assert graph.count("dot_general[") == products
    assert graph.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_of_the_same_shape_compiles_nothing(
    name: str, attention: Attention, values: dict[str, np.ndarray]
) -> None:
    method: Callable = getattr(attention, name)
    method(*inputs_of(name, values))
    compiled = getattr(Attention, name)._cache_size()
    method(*inputs_of(name, values))
    assert getattr(Attention, name)._cache_size() == compiled


@pytest.mark.parametrize(("first", "last"), [(0, 3), (3, 7), (6, 7)])
def test_a_slice_of_the_queries_gives_the_rows_of_the_whole(
    first: int, last: int, attention: Attention, values: dict[str, np.ndarray]
) -> None:
    qkv = values["qkv_bias"]
    q = attention.q_post_rope(qkv[first:last], first)
    k = attention.k_post_rope(qkv[first:last], first)
    scores = attention.attn_scores(q, values["k_post_rope"])
    p = attention.attn_softmax(scores, first)
    sliced = {
        "q_post_rope": (q, values["q_post_rope"][first:last]),
        "k_post_rope": (k, values["k_post_rope"][first:last]),
        "attn_scores": (scores, values["attn_scores"][:, first:last]),
        "attn_softmax": (p, values["attn_softmax"][:, first:last]),
        "attention": (attention.attention(p, qkv), values["attention"][first:last]),
    }
    for name, (ours, whole) in sliced.items():
        assert rel_l2(np.asarray(ours), whole) <= ACCUMULATION, name


@pytest.mark.parametrize(
    ("piece", "cut"),
    [
        (560, (30, 30)),  # the bytes of one token's q, k, v
        (4480, (4, 8)),  # blocks of 8 tokens in slices of 4; the last block begins at 22
        (9000, (2, 4)),  # blocks of 15 tokens in slices of 8; the last slice of each at 7
    ],
)
def test_a_prompt_in_pieces_gives_what_it_gives_in_one(
    piece: int, cut: tuple[int, int], attention: Attention, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, _ = read_embedding(Checkpoint(TINY), range(30))
    expected = list(layer_pieces(Layer(attention), rows, ATTENTION))
    monkeypatch.setattr(chain, "PIECE_BYTES", piece)
    monkeypatch.setattr(chain, "LEAST_TOKENS", 1)
    monkeypatch.setattr(chain, "LEAST_QUERIES", 1)
    pieces = list(layer_pieces(Layer(attention), rows, ATTENTION))
    for stage, _, whole, _ in expected:
        parts = [piece.values for piece in pieces if piece.stage == stage]
        assert len(parts) == cut[stage.sliced]
        together = np.concatenate(parts, axis=stage.axes.index("T"))
        assert rel_l2(together, whole) <= ACCUMULATION, stage.name


def test_float32_angles_are_off_by_two_milliradians_at_position_32767() -> None:
    H, angles = CONFIG.head_dim, {}
    pair = np.zeros((1, SIZES["F"]))
    pair[0, : H // 2] = 1  # every pair of the first query head is (1, 0): its angle is visible
    for dtype in ("float32", "float64"):
        with computing(dtype, "cpu") as (precision, _):
            turned = attention_of(TINY, precision).q_post_rope(pair.astype(dtype), 32767)
            left, right = np.split(np.asarray(turned, np.float64)[0, 0], 2)
            angles[dtype] = np.arctan2(right, left)
    apart = np.abs(np.angle(np.exp(1j * (angles["float32"] - angles["float64"]))))
    assert 5e-4 < apart.max() < 5e-3


def test_masked_scores_are_never_read(attention: Attention, values: dict[str, np.ndarray]) -> None:
    garbage = np.where(np.tri(T, dtype=bool), values["attn_scores"], np.nan).astype(np.float32)
    assert np.array_equal(attention.attn_softmax(garbage), values["attn_softmax"])


def test_shapes_are_checked_in_tests(attention: Attention) -> None:
    with pytest.raises(Exception, match="q_post_rope"):
        attention.attn_scores(np.zeros((3, 6, 14), np.float32), np.zeros((3, 2, 13), np.float32))


def test_a_sliding_window_shorter_than_the_prompt_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}
    (model / "config.json").write_text(json.dumps(config | window))
    assert qwenref.run(model, TOKENS[:5]).attn_out.shape == (5, 84)
    with pytest.raises(qwenref.QwenrefError, match="sliding window of 5 tokens"):
        qwenref.run(model, TOKENS[:6])
