"""One layer's weights: the exact values, every problem in one error, and the fingerprint."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file, save_file

from qwenref.errors import QwenrefError
from qwenref.model import checkpoint as checkpoint_module
from qwenref.model import weights as weights_module
from qwenref.model.checkpoint import INDEX, SINGLE, Checkpoint
from qwenref.model.random_checkpoint import Shape, config_json, write
from qwenref.model.weights import (
    AttentionWeights,
    HeadMatrix,
    attention_tensors,
    read_attention,
    read_embedding,
)

SHAPE = Shape(84, 6, 2, intermediate_size=16, num_hidden_layers=2, vocab_size=320)
EMBEDDING = "model.embed_tokens.weight"
DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)
NAMES = {
    "norm": "model.layers.0.input_layernorm.weight",
    "q_proj": "model.layers.0.self_attn.q_proj.weight",
    "k_proj": "model.layers.0.self_attn.k_proj.weight",
    "v_proj": "model.layers.0.self_attn.v_proj.weight",
    "o_proj": "model.layers.0.self_attn.o_proj.weight",
    "q_bias": "model.layers.0.self_attn.q_proj.bias",
    "k_bias": "model.layers.0.self_attn.k_proj.bias",
    "v_bias": "model.layers.0.self_attn.v_proj.bias",
}
BIASES = ("q_bias", "k_bias", "v_bias")

Tensors = dict[str, np.ndarray]
Change = Callable[[Tensors], object]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """The tensors of a random bf16 checkpoint."""
    folder = tmp_path_factory.mktemp("original")
    write(folder, SHAPE)
    return load_file(folder / SINGLE)


def stored(folder: Path, tensors: Tensors, shape: Shape = SHAPE) -> Checkpoint:
    """Store tensors as a checkpoint of one file, and open it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(shape)))
    save_file({name: np.ascontiguousarray(v) for name, v in tensors.items()}, folder / SINGLE)
    return Checkpoint(folder)


def exact_everywhere(tensors: Tensors) -> Tensors:
    """Return float32 tensors of the same shapes whose values fit bf16 and f16 alike."""
    rng = np.random.default_rng(3)
    return {
        name: rng.integers(-127, 128, values.shape).astype(np.float32) / 64
        for name, values in tensors.items()
    }


def cast(tensors: Tensors, dtype: type) -> Tensors:
    return {name: values.astype(dtype) for name, values in tensors.items()}


def same_bits(a: np.ndarray | None, b: np.ndarray) -> bool:
    return a is not None and (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def refusal(checkpoint: Checkpoint, layer: int = 0) -> str:
    with pytest.raises(QwenrefError) as error:
        read_attention(checkpoint, layer)
    return str(error.value)


# --- which tensors, and their values --------------------------------------------------------------


def test_the_tensors_are_those_of_qwen2_with_the_shapes_that_the_config_implies(
    tmp_path: Path, original: Tensors
) -> None:
    found = attention_tensors(stored(tmp_path, original).config, 0)
    assert {field: name for field, (name, _) in found.items()} == NAMES
    assert {field: shape for field, (_, shape) in found.items()} == {
        field: original[name].shape for field, name in NAMES.items()
    }
    assert tuple(found) == AttentionWeights._fields


def test_an_explicit_head_size_decides_the_shapes(tmp_path: Path) -> None:
    shape = Shape(84, 6, 2, 16, 1, 320, head_dim=10)
    write(tmp_path, shape)
    weights, _ = read_attention(Checkpoint(tmp_path), 0)
    assert weights.q_proj.shape == (60, 84)
    assert weights.k_proj.shape == weights.v_proj.shape == (20, 84)
    assert weights.o_proj.shape == (84, 60)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_are_those_that_safetensors_reads_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    write(tmp_path, SHAPE, dtype=dtype, shard_bytes=100_000)
    expected: Tensors = {}
    for shard in sorted(tmp_path.glob("*.safetensors")):
        expected |= load_file(shard)
    for layer in (0, 1):
        weights, _ = read_attention(Checkpoint(tmp_path), layer)
        for field, name in NAMES.items():
            name = name.replace("layers.0", f"layers.{layer}")
            assert same_bits(getattr(weights, field), expected[name])
    rows, _ = read_embedding(Checkpoint(tmp_path), range(320))
    assert same_bits(rows, expected[EMBEDDING])


def test_every_finite_bit_pattern_of_the_narrow_types_survives(
    tmp_path: Path, original: Tensors
) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = patterns.view(dtype)
        finite = values[np.isfinite(values.astype(np.float32))]
        assert np.count_nonzero(finite == 0) == 2
        for start in range(0, len(finite), 84 * 84):
            part = np.resize(finite[start : start + 84 * 84], (84, 84))
            tensors = original | {NAMES["q_proj"]: part}
            weights, narrow = read_attention(stored(tmp_path, tensors), 0)
            assert same_bits(weights.q_proj, part)
            tensors[NAMES["q_proj"]] = part.astype(np.float32)
            assert np.array_equal(
                tensors[NAMES["q_proj"]].astype(dtype).view("u2"), part.view("u2")
            )
            _, wide = read_attention(stored(tmp_path, tensors), 0)
            assert narrow == wide


def test_mixed_dtypes_in_one_file_are_kept_as_they_are(tmp_path: Path, original: Tensors) -> None:
    tensors = dict(original)
    for number, name in enumerate([*NAMES.values(), EMBEDDING]):
        tensors[name] = original[name].astype(DTYPES[number % 3])
    checkpoint = stored(tmp_path, tensors)
    weights, _ = read_attention(checkpoint, 0)
    for field, name in NAMES.items():
        assert same_bits(getattr(weights, field), tensors[name])
    rows, _ = read_embedding(checkpoint, [5])
    assert same_bits(rows, tensors[EMBEDDING][5:6])
    assert {value.dtype for value in weights if value is not None} == {*map(np.dtype, DTYPES)}


# --- problems -------------------------------------------------------------------------------------


def test_all_problems_are_in_one_error(tmp_path: Path, original: Tensors) -> None:
    tensors = dict(original)
    del tensors[NAMES["q_proj"]], tensors[NAMES["k_bias"]]
    tensors[NAMES["norm"]] = original[NAMES["norm"]][:-1]
    tensors[NAMES["o_proj"]] = np.zeros((84, 84), np.int8)
    tensors[NAMES["v_proj"]] = np.zeros((84, 28), np.float64)
    message = refusal(stored(tmp_path / "spoiled", tensors))
    assert message.startswith("spoiled: ")
    assert f"{NAMES['q_proj']} is missing" in message
    assert f"{NAMES['k_bias']} is missing" in message
    assert re.search(rf"{re.escape(NAMES['norm'])} has shape \[83\].* \[84\]", message)
    assert re.search(rf"{re.escape(NAMES['o_proj'])} is stored as I8\b", message)
    assert re.search(rf"{re.escape(NAMES['v_proj'])} has shape \[84, 28\].* \[28, 84\]", message)
    assert re.search(rf"{re.escape(NAMES['v_proj'])} is stored as F64\b", message)
    for innocent in ("k_proj", "q_bias", "v_bias"):
        assert f"{NAMES[innocent]} " not in message


@pytest.mark.parametrize("field", NAMES)
def test_each_tensor_is_needed_under_its_exact_name(
    tmp_path: Path, original: Tensors, field: str
) -> None:
    tensors = dict(original)
    values = tensors.pop(NAMES[field])
    for other in (NAMES[field].removeprefix("model."), f"{NAMES[field]}_scale", field):
        tensors[other] = values
    assert f"{NAMES[field]} is missing" in refusal(stored(tmp_path, tensors))


@pytest.mark.parametrize("field", NAMES)
@pytest.mark.parametrize("change", ["transposed", "wider", "flat", "with a leading 1"])
def test_each_tensor_must_have_its_exact_shape(
    tmp_path: Path, original: Tensors, field: str, change: str
) -> None:
    values = original[NAMES[field]]
    other = {
        "transposed": np.concatenate([values, values]).T,
        "wider": np.concatenate([values, values], axis=-1),
        "flat": np.resize(values, values.size + 1),
        "with a leading 1": values[None],
    }[change]
    message = refusal(stored(tmp_path, original | {NAMES[field]: other}))
    assert f"{NAMES[field]} has shape {list(other.shape)}" in message
    assert f"{list(values.shape)}" in message


def test_the_layer_that_is_asked_for_is_the_one_that_is_read(
    tmp_path: Path, original: Tensors
) -> None:
    tensors = {name: v for name, v in original.items() if "layers.1" not in name}
    checkpoint = stored(tmp_path, tensors)
    assert same_bits(read_attention(checkpoint, 0)[0].norm, original[NAMES["norm"]])
    assert "model.layers.1.input_layernorm.weight is missing" in refusal(checkpoint, layer=1)


def test_three_absent_biases_are_no_problem(tmp_path: Path, original: Tensors) -> None:
    tensors = dict(original)
    for bias in BIASES:
        del tensors[NAMES[bias]]
    weights, without = read_attention(stored(tmp_path, tensors), 0)
    assert (weights.q_bias, weights.k_bias, weights.v_bias) == (None, None, None)
    assert same_bits(weights.q_proj, original[NAMES["q_proj"]])
    for bias in BIASES:
        tensors[NAMES[bias]] = np.zeros_like(original[NAMES[bias]])
    assert read_attention(stored(tmp_path, tensors), 0)[1] != without


@pytest.mark.parametrize(
    "absent", [BIASES[:1], BIASES[1:2], BIASES[2:], BIASES[:2], BIASES[1:], BIASES[::2]]
)
def test_a_bias_may_be_absent_only_with_the_other_two(
    tmp_path: Path, original: Tensors, absent: tuple[str, ...]
) -> None:
    tensors = dict(original)
    for bias in absent:
        del tensors[NAMES[bias]]
    message = refusal(stored(tmp_path, tensors))
    for bias in BIASES:
        assert (f"{NAMES[bias]} is missing" in message) == (bias in absent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("field", NAMES)
def test_nan_and_infinity_are_refused_with_tensor_and_count(
    tmp_path: Path, original: Tensors, field: str, dtype: type
) -> None:
    for bad in ([np.nan], [np.inf], [-np.inf], [np.nan, np.inf, -np.inf]):
        values = original[NAMES[field]].astype(dtype)
        values.reshape(-1)[-len(bad) :] = bad
        message = refusal(stored(tmp_path, original | {NAMES[field]: values}))
        assert f"{NAMES[field]} holds {len(bad)} NaN or infinite" in message
        assert len(re.findall("holds", message)) == 1


def test_nan_is_counted_over_all_the_pieces_in_which_a_tensor_is_read(
    tmp_path: Path, original: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "CHUNK", 10 * 84 * 2)
    values = original[NAMES["o_proj"]].copy()
    values[[0, 9, 10, 55], 7] = np.nan
    message = refusal(stored(tmp_path, original | {NAMES["o_proj"]: values}))
    assert f"{NAMES['o_proj']} holds 4 " in message


def test_all_tensors_that_hold_nan_are_named(tmp_path: Path, original: Tensors) -> None:
    tensors = dict(original)
    for count, field in enumerate(("norm", "k_proj", "v_bias"), start=1):
        tensors[NAMES[field]] = original[NAMES[field]].copy()
        tensors[NAMES[field]].reshape(-1)[3 : 3 + count] = np.nan
    message = refusal(stored(tmp_path, tensors))
    for count, field in enumerate(("norm", "k_proj", "v_bias"), start=1):
        assert f"{NAMES[field]} holds {count} " in message


def test_the_largest_finite_numbers_are_no_infinities(tmp_path: Path, original: Tensors) -> None:
    tensors = dict(original)
    for field, dtype in zip(("q_proj", "k_proj", "v_proj"), DTYPES, strict=True):
        largest = ml_dtypes.finfo(dtype).max
        tensors[NAMES[field]] = np.full(original[NAMES[field]].shape, largest, dtype)
    weights, _ = read_attention(stored(tmp_path, tensors), 0)
    assert float(weights.q_proj[0, 0]) > 3e38


# --- the embedding --------------------------------------------------------------------------------


def test_rows_come_in_the_order_of_the_prompt_with_repeats(
    tmp_path: Path, original: Tensors
) -> None:
    prompt = [3, 319, 0, 3, 3, 1]
    rows, _ = read_embedding(stored(tmp_path, original), prompt)
    assert same_bits(rows, original[EMBEDDING][prompt])


@pytest.mark.parametrize("token", [320, -1, 1 << 31, 1 << 64])
def test_a_row_that_the_table_lacks_is_refused(
    tmp_path: Path, original: Tensors, token: int
) -> None:
    with pytest.raises(QwenrefError, match=rf"token id {token} is out of range.* 319"):
        read_embedding(stored(tmp_path, original), [0, token])


def test_a_table_that_is_missing_or_of_another_size_or_dtype_is_refused(
    tmp_path: Path, original: Tensors
) -> None:
    table = original[EMBEDDING]
    without = {name: v for name, v in original.items() if name != EMBEDDING}
    for tensors, expected in (
        (without, "is missing"),
        (original | {EMBEDDING: table[:-1]}, r"has shape \[319, 84\].* \[320, 84\]"),
        (original | {EMBEDDING: table.T}, r"has shape \[84, 320\].* \[320, 84\]"),
        (original | {EMBEDDING: table.astype(np.int32)}, "is stored as I32"),
    ):
        with pytest.raises(QwenrefError, match=f"{re.escape(EMBEDDING)} {expected}"):
            read_embedding(stored(tmp_path, tensors), [0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_row_matters_only_if_the_prompt_uses_it(
    tmp_path: Path, original: Tensors, dtype: type
) -> None:
    table = original[EMBEDDING].astype(dtype)
    table[7, :2] = np.nan
    table[9, 83] = -np.inf
    checkpoint = stored(tmp_path, original | {EMBEDDING: table})
    rows, _ = read_embedding(checkpoint, [6, 8, 10])
    assert same_bits(rows, table[[6, 8, 10]])
    for prompt, count in (([7], 2), ([1, 9], 1), ([9, 7, 8], 3)):
        with pytest.raises(QwenrefError, match=f"{re.escape(EMBEDDING)} holds {count} NaN"):
            read_embedding(checkpoint, prompt)


# --- fingerprints ---------------------------------------------------------------------------------


def prints(checkpoint: Checkpoint) -> tuple[str, str]:
    """Return the fingerprints of layer 0 and of two embedding rows."""
    return read_attention(checkpoint, 0)[1], read_embedding(checkpoint, [3, 4])[1]


def test_copies_of_the_same_numbers_have_one_fingerprint(tmp_path: Path, original: Tensors) -> None:
    exact = exact_everywhere(original)
    mixed = {n: v.astype(DTYPES[number % 3]) for number, (n, v) in enumerate(exact.items())}
    copies = [cast(exact, dtype) for dtype in DTYPES] + [mixed]
    found = {prints(stored(tmp_path, tensors)) for tensors in copies}
    assert len(found) == 1
    for fingerprint in found.pop():
        assert re.fullmatch("blake3-halves:[0-9a-f]{64}", fingerprint)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_so_have_copies_that_do_not_fit_16_bits(
    tmp_path: Path, original: Tensors, dtype: type
) -> None:
    name = NAMES["k_proj"]
    values = original[name].astype(np.float16)
    values.reshape(-1)[-1] = np.float16(1 + 2**-10)  # of bfloat16 the steps are 2**-7
    expected = prints(stored(tmp_path, original | {name: values.astype(np.float32)}))
    assert prints(stored(tmp_path, original | {name: values.astype(dtype)})) == expected
    values.reshape(-1)[-1] = 1
    assert prints(stored(tmp_path, original | {name: values.astype(dtype)})) != expected


@pytest.mark.parametrize("block", [1000, weights_module.BLOCK])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fingerprint_is_over_names_shapes_and_both_halves_of_float32(
    tmp_path: Path, original: Tensors, dtype: type, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "BLOCK", block)
    fine = np.random.default_rng(1).standard_normal((84, 84)).astype(dtype)
    tensors = original | {NAMES["q_proj"]: fine, NAMES["o_proj"]: fine}
    hashed = blake3()
    for field, name in NAMES.items():
        bits = tensors[name].astype("<f4").view("<u4")
        lower = (bits & 0xFFFF).astype("<u2")
        assert lower.any() == (field in ("q_proj", "o_proj") and dtype != ml_dtypes.bfloat16)
        hashed.update(f"{name}{list(tensors[name].shape)}\n".encode())
        hashed.update((bits >> 16).astype("<u2").tobytes())
        if lower.any():
            hashed.update(b"lower\n" + blake3(lower.tobytes()).digest())
    assert prints(stored(tmp_path, tensors))[0] == f"blake3-halves:{hashed.hexdigest()}"


def test_slices_of_the_head_hold_until_the_one_after_the_next_is_asked_for(
    tmp_path: Path, original: Tensors
) -> None:
    expected = original["lm_head.weight"]
    slices = HeadMatrix(stored(tmp_path, original), 7).slices(90)
    held = [next(slices), next(slices)]
    for first, rows in held:
        assert same_bits(rows, expected[first : first + 80])
    held.append(next(slices))
    assert np.shares_memory(held[0][1], held[2][1])
    assert not np.shares_memory(held[1][1], held[2][1])
    for first, rows in held[1:]:
        assert same_bits(rows, expected[first : first + 80])


def test_shards_and_one_file_have_one_fingerprint(tmp_path: Path) -> None:
    write(tmp_path / "one", SHAPE)
    write(tmp_path / "many", SHAPE, shard_bytes=10_000)
    assert (tmp_path / "many" / INDEX).exists()
    assert prints(Checkpoint(tmp_path / "one")) == prints(Checkpoint(tmp_path / "many"))


@pytest.mark.parametrize("chunk", [1, 100, 168, 1000, 14_112])
def test_the_size_of_the_pieces_read_does_not_matter(
    tmp_path: Path, original: Tensors, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    checkpoint = stored(tmp_path, original)
    weights, expected = read_attention(checkpoint, 0)
    monkeypatch.setattr(checkpoint_module, "CHUNK", chunk)
    again, found = read_attention(checkpoint, 0)
    assert found == expected
    for field, name in NAMES.items():
        assert same_bits(getattr(again, field), original[name])
        assert same_bits(getattr(weights, field), original[name])


def test_weights_that_attention_does_not_use_do_not_matter(
    tmp_path: Path, original: Tensors
) -> None:
    tensors = {
        name: values if name in NAMES.values() or name == EMBEDDING else values + 1
        for name, values in original.items()
    }
    tensors[EMBEDDING] = original[EMBEDDING].copy()
    tensors[EMBEDDING][5] = 0
    assert prints(stored(tmp_path, tensors)) == prints(stored(tmp_path, original))


def swap(tensors: Tensors, a: str, b: str) -> None:
    tensors[NAMES[a]], tensors[NAMES[b]] = tensors[NAMES[b]], tensors[NAMES[a]]


def transpose(tensors: Tensors, field: str) -> None:
    tensors[NAMES[field]] = tensors[NAMES[field]].T


def move_one_value(tensors: Tensors) -> None:
    """Exchange the last value of the norm with the first one of q, its neighbour in the hash."""
    norm, q = tensors[NAMES["norm"]].copy(), tensors[NAMES["q_proj"]].copy()
    norm[-1], q[0, 0] = q[0, 0], norm[-1]
    tensors.update({NAMES["norm"]: norm, NAMES["q_proj"]: q})


def reorder_rows(tensors: Tensors) -> None:
    tensors[NAMES["k_proj"]] = tensors[NAMES["k_proj"]][::-1]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: swap(tensors, "k_proj", "v_proj"),
        lambda tensors: swap(tensors, "q_proj", "o_proj"),
        lambda tensors: swap(tensors, "k_bias", "v_bias"),
        lambda tensors: transpose(tensors, "q_proj"),
        lambda tensors: transpose(tensors, "o_proj"),
        move_one_value,
        reorder_rows,
    ],
    ids=["k v", "q o", "k v bias", "q transposed", "o transposed", "one value moved", "k reversed"],
)
def test_the_same_values_elsewhere_have_another_fingerprint(
    tmp_path: Path, original: Tensors, change: Change
) -> None:
    tensors = exact_everywhere(original)
    expected, _ = prints(stored(tmp_path, tensors))
    change(tensors)
    assert prints(stored(tmp_path, tensors))[0] != expected


@pytest.mark.parametrize("field", NAMES)
def test_one_changed_value_changes_the_fingerprint_of_the_layer_alone(
    tmp_path: Path, original: Tensors, field: str
) -> None:
    expected = prints(stored(tmp_path, original))
    for position in (0, -1):
        values = original[NAMES[field]].copy()
        values.reshape(-1).view(np.uint16)[position] ^= 1
        found = prints(stored(tmp_path, original | {NAMES[field]: values}))
        assert found[0] != expected[0]
        assert found[1] == expected[1]


def test_another_layer_has_another_fingerprint_even_with_the_same_values(
    tmp_path: Path, original: Tensors
) -> None:
    tensors = dict(original)
    for name in NAMES.values():
        tensors[name.replace("layers.0", "layers.1")] = original[name]
    checkpoint = stored(tmp_path, tensors)
    assert read_attention(checkpoint, 0)[1] != read_attention(checkpoint, 1)[1]


def test_the_fingerprint_of_the_embedding_depends_on_the_rows_of_the_prompt_alone(
    tmp_path: Path, original: Tensors
) -> None:
    checkpoint = stored(tmp_path, original)
    expected = read_embedding(checkpoint, [3, 4])[1]
    for prompt in ([4, 3], [3], [3, 3, 4], [3, 4, 4], [3, 5]):
        assert read_embedding(checkpoint, prompt)[1] != expected
    other = dict(original)
    other[EMBEDDING] = original[EMBEDDING][::-1].copy()
    other[EMBEDDING][[3, 4]] = original[EMBEDDING][[3, 4]]
    for name in NAMES.values():
        other[name] = original[name] * 2
    assert read_embedding(stored(tmp_path, other), [3, 4])[1] == expected
    other[EMBEDDING][4, 83] += 1
    assert read_embedding(stored(tmp_path, other), [3, 4])[1] != expected
