"""config.json: which forms are read alike, what is refused by name, and that nothing else happens.

The refusals follow the trap list of the domain notes: a silent default for a field that changes the
numbers would be a wrong answer.
"""

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenref.errors import QwenrefError
from qwenref.model.config import CONFIG_LIMIT, Config, read_config
from qwenref.model.random_checkpoint import FAMILY, config_json

PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
"""config.json of Qwen/Qwen2.5-7B-Instruct."""

MEANT = Config(
    hidden_size=3584,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=18944,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    vocab_size=152064,
    num_hidden_layers=28,
    tie_word_embeddings=False,
    windows=(None,) * 28,
)

REQUIRED = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "rms_norm_eps",
    "vocab_size",
    "num_hidden_layers",
    "rope_theta",
)

ABSENT = object()
"""As the value of a field: leave the field out."""


def text_with(**changes: object) -> str:
    """Return PUBLISHED as text, with fields replaced, added, or (ABSENT) left out."""
    fields = {k: v for k, v in {**PUBLISHED, **changes}.items() if v is not ABSENT}
    return json.dumps(fields)


def text_with_literal(field: str, literal: str) -> str:
    """Return PUBLISHED as text, one field with a value that `json.dumps` would not write."""
    return text_with(**{field: ABSENT})[:-1] + f', "{field}": {literal}}}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def read(path: Path, content: str | bytes) -> Config:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_config(path)


def refusal(path: Path, content: str | bytes) -> str:
    """Return the message with which the content is refused, which must name the file."""
    with pytest.raises(QwenrefError) as error:
        read(path, content)
    message = str(error.value)
    assert message.startswith(f"{path}")
    return message.removeprefix(f"{path}")


# --- forms that mean the same ---------------------------------------------------------------------

SAME = {
    "as transformers 4 writes it": {},
    "rope_scaling null": {"rope_scaling": None},
    "rope_scaling of type default": {"rope_scaling": {"type": "default"}},
    "rope_scaling of rope_type default": {"rope_scaling": {"rope_type": "default"}},
    "rope_parameters alone": {
        "rope_theta": ABSENT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "rope_parameters with the legacy type": {
        "rope_theta": ABSENT,
        "rope_parameters": {"type": "default", "rope_theta": 1000000},
    },
    "rope_parameters with both kinds of type": {
        "rope_theta": ABSENT,
        "rope_parameters": {"type": "default", "rope_type": "default", "rope_theta": 1e6},
    },
    "rope_parameters without a type": {
        "rope_theta": ABSENT,
        "rope_parameters": {"rope_theta": 1e6},
    },
    "rope_theta null, rope_parameters speaks": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "both thetas agree": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "one theta an integer, one a float": {
        "rope_theta": 1000000,
        "rope_parameters": {"rope_theta": 1000000.0},
    },
    "rope_parameters null": {"rope_parameters": None},
    "rope_parameters without theta": {"rope_parameters": {"rope_type": "default"}},
    "theta an integer": {"rope_theta": 1000000},
    "full rotary embedding said aloud": {"partial_rotary_factor": 1.0},
    "full rotary embedding in rope_parameters": {
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}
    },
    "head_dim explicit": {"head_dim": 128},
    "head_dim null": {"head_dim": None},
    "optional fields absent": {
        field: ABSENT for field in PUBLISHED if field not in (*REQUIRED, "model_type")
    },
    "architectures null": {"architectures": None},
    "sliding_window null": {"sliding_window": None},
    "layer_types all full": {"layer_types": ["full_attention"] * 28},
    "layer_types null": {"layer_types": None},
    "layer_types overrule use_sliding_window": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 0,
        "layer_types": ["full_attention"] * 28,
    },
    "max_window_layers beyond the last layer": {
        "use_sliding_window": True,
        "max_window_layers": 70,
    },
    "quantization_config null": {"quantization_config": None},
    "is_causal true": {"is_causal": True},
    "unknown fields": {"dtype": "bfloat16", "something_new": {"a": [1, None]}},
}


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME.keys())
def test_forms_with_the_same_meaning_are_read_alike(path: Path, changes: dict[str, Any]) -> None:
    assert read(path, text_with(**changes)) == MEANT


@pytest.mark.parametrize("like", FAMILY)
def test_every_published_shape_is_read(path: Path, like: str) -> None:
    shape = FAMILY[like]
    config = read(path, json.dumps(config_json(shape)))
    N, K, H = shape.num_attention_heads, shape.num_key_value_heads, shape.head_size
    head_size = 64 if like == "0.5b" else 128
    assert head_size == H
    assert config.sizes == {
        "D": shape.hidden_size,
        "N": N,
        "K": K,
        "H": H,
        "E": N * H,
        "F": (N + 2 * K) * H,
        "I": shape.intermediate_size,
        "V": shape.vocab_size,
    }
    assert config.tie_word_embeddings == shape.tie_word_embeddings
    assert config.windows == (None,) * shape.num_hidden_layers
    assert config.vocab_size == shape.vocab_size


def test_an_explicit_head_dim_wins_over_hidden_size_by_heads(path: Path) -> None:
    sizes = read(path, text_with(head_dim=64)).sizes
    assert (sizes["H"], sizes["E"], sizes["F"]) == (64, 28 * 64, 36 * 64)
    assert read(path, text_with(hidden_size=3585, head_dim=128)).hidden_size == 3585


def test_theta_and_eps_are_read_and_not_assumed(path: Path) -> None:
    config = read(path, text_with(rope_theta=1e4, rms_norm_eps=1e-5))
    assert (config.rope_theta, config.rms_norm_eps) == (1e4, 1e-5)
    nested = {"rope_theta": 12345.5, "rope_type": "default"}
    assert read(path, text_with(rope_theta=ABSENT, rope_parameters=nested)).rope_theta == 12345.5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", *["full_attention"] * 3],
        },
    ],
)
def test_what_transformers_writes_is_read_as_transformers_means_it(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    from transformers import Qwen2Config

    theirs = Qwen2Config(
        hidden_size=84,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=4,
        vocab_size=320,
        rms_norm_eps=1e-5,
        **changes,
    )
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path / "config.json")
    assert (ours.hidden_size, ours.num_attention_heads, ours.num_key_value_heads) == (84, 6, 2)
    assert (ours.head_dim, ours.rms_norm_eps, ours.vocab_size) == (14, 1e-5, 320)
    assert ours.rope_theta == theirs.to_dict()["rope_parameters"]["rope_theta"]
    assert theirs.layer_types is not None
    assert ours.windows == tuple(
        theirs.sliding_window if kind == "sliding_attention" else None
        for kind in theirs.layer_types
    )


# --- fields that are missing or impossible --------------------------------------------------------


@pytest.mark.parametrize("field", REQUIRED)
@pytest.mark.parametrize("value", [ABSENT, None], ids=["absent", "null"])
def test_a_missing_required_field_is_named(path: Path, field: str, value: object) -> None:
    assert field in refusal(path, text_with(**{field: value}))


def test_theta_is_never_defaulted_whatever_else_speaks_of_rope(path: Path) -> None:
    nested = {"rope_type": "default"}
    for also in ({}, {"rope_parameters": nested}, {"rope_scaling": nested}):
        assert "rope_theta is missing" in refusal(path, text_with(rope_theta=ABSENT, **also))


COUNTS = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "num_hidden_layers",
    "head_dim",
    "sliding_window",
)
NO_COUNT = ("0", "-1", "1e30", "3.5", "28.0", "true", "false", '"28"', "[28]", "{}", "9" * 5000)
ABSURD = (str(1 << 31), str(1 << 63), str(1 << 64), "9" * 30)


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("literal", [*NO_COUNT, *ABSURD])
def test_a_count_must_be_a_positive_number_of_sane_size(
    path: Path, field: str, literal: str
) -> None:
    assert field in refusal(path, text_with_literal(field, literal))


@pytest.mark.parametrize(
    "literal", ["0", "-1e-6", "1", "2", "1e400", '"1e-6"', "true", "[]", "9" * 5000]
)
def test_eps_must_be_a_small_positive_number(path: Path, literal: str) -> None:
    assert "rms_norm_eps" in refusal(path, text_with_literal("rms_norm_eps", literal))


BAD_THETAS = ["0", "-10000", "1", "1e31", "1e400", '"1e6"', "true", "[1e6]", "{}", "9" * 5000]


@pytest.mark.parametrize("literal", BAD_THETAS)
def test_theta_must_be_a_number_above_one(path: Path, literal: str) -> None:
    assert "rope_theta" in refusal(path, text_with_literal("rope_theta", literal))


@pytest.mark.parametrize("literal", BAD_THETAS)
def test_a_nested_theta_must_be_a_number_above_one(path: Path, literal: str) -> None:
    text = text_with(rope_theta=ABSENT)[:-1] + f', "rope_parameters": {{"rope_theta": {literal}}}}}'
    assert "rope_parameters" in refusal(path, text)


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps", "hidden_size", "something_new"])
@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "nan", "inf", "1.", "01"])
def test_literals_that_are_no_json_are_refused(path: Path, field: str, literal: str) -> None:
    assert "malformed" in refusal(path, text_with_literal(field, literal))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_sliding_window", "false"),
        ("use_sliding_window", 0),
        ("max_window_layers", -1),
        ("max_window_layers", 1.5),
        ("layer_types", "full_attention"),
        ("layer_types", [1] * 28),
        ("rope_parameters", "default"),
        ("rope_scaling", []),
        ("rope_scaling", False),
        ("partial_rotary_factor", "1"),
        ("architectures", "Qwen2ForCausalLM"),
        ("architectures", [None]),
    ],
)
def test_a_field_of_the_wrong_type_is_named(path: Path, field: str, value: object) -> None:
    assert field in refusal(path, text_with(**{field: value}))


# --- fields that contradict each other ------------------------------------------------------------


def test_query_heads_must_be_a_multiple_of_key_heads(path: Path) -> None:
    message = refusal(path, text_with(num_key_value_heads=5))
    assert "num_attention_heads 28" in message
    assert "num_key_value_heads 5" in message
    assert "num_key_value_heads 56" in refusal(path, text_with(num_key_value_heads=56))


def test_an_odd_head_size_is_refused(path: Path) -> None:
    assert "127 is odd" in refusal(path, text_with(head_dim=127))
    assert "127 is odd" in refusal(path, text_with(hidden_size=127 * 28))


def test_without_head_dim_heads_must_divide_the_hidden_size(path: Path) -> None:
    message = refusal(path, text_with(hidden_size=3585))
    assert "hidden_size 3585" in message
    assert "num_attention_heads 28" in message
    assert "head_dim" in message


def test_thetas_that_disagree_are_both_shown(path: Path) -> None:
    for other in ("rope_parameters", "rope_scaling"):
        message = refusal(path, text_with(**{other: {"rope_type": "default", "rope_theta": 1e4}}))
        assert "disagree" in message
        assert "1000000.0" in message
        assert "10000.0" in message


# --- what would change the numbers ----------------------------------------------------------------


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize(
    "kind", ["yarn", "linear", "dynamic", "mrope", "longrope", "llama3", "su", "Default", ""]
)
def test_every_rope_but_the_plain_one_is_refused_by_name(
    path: Path, where: str, key: str, kind: str
) -> None:
    fields = {key: kind, "factor": 4.0, "original_max_position_embeddings": 32768}
    message = refusal(path, text_with(**{where: fields}))
    assert where in message
    assert repr(kind) in message


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_one_plain_type_does_not_excuse_another(path: Path, where: str) -> None:
    for fields in (
        {"type": "default", "rope_type": "yarn", "factor": 4.0},
        {"type": "yarn", "rope_type": "default", "factor": 4.0},
    ):
        assert "yarn" in refusal(path, text_with(**{where: fields}))


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_a_scaling_without_a_type_is_not_taken_for_plain(path: Path, where: str) -> None:
    assert "factor" in refusal(path, text_with(**{where: {"factor": 4.0}}))
    per_layer = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    assert "full_attention" in refusal(path, text_with(**{where: per_layer}))


@pytest.mark.parametrize("kind", [False, 0, 7, ["yarn"], {"yarn": 1}, "y\x1b[31m\narn"])
def test_a_strange_rope_type_is_refused(path: Path, kind: object) -> None:
    message = refusal(path, text_with(rope_parameters={"rope_type": kind, "rope_theta": 1e6}))
    assert "rope_parameters" in message


def test_partial_rotary_embedding_is_refused(path: Path) -> None:
    message = refusal(path, text_with(partial_rotary_factor=0.5))
    assert "partial_rotary_factor is 0.5" in message
    for where in ("rope_scaling", "rope_parameters"):
        for fields in ({"partial_rotary_factor": 0.25}, {"partial_rotary_factor": "all"}):
            changes = {where: {"rope_type": "default", **fields}}
            assert "partial_rotary_factor" in refusal(path, text_with(**changes))


@pytest.mark.parametrize("found", [{"quant_method": "gptq", "bits": 4}, {}, "awq", False])
def test_a_quantised_checkpoint_is_refused(path: Path, found: object) -> None:
    message = refusal(path, text_with(quantization_config=found))
    assert "quantization_config" in message
    assert "unquantised" in message


@pytest.mark.parametrize(
    "kind",
    [
        *("llama", "qwen", "qwen3", "qwen2_moe", "qwen2_5_vl", "qwen2_vl", "QWEN2", ""),
        *(ABSENT, None, 2, ["qwen2"], {"qwen2": 1}),
    ],
)
def test_another_model_type_is_refused(path: Path, kind: object) -> None:
    message = refusal(path, text_with(model_type=kind))
    assert "model_type" in message
    assert "'qwen2'" in message
    if kind is not ABSENT:
        assert repr(kind) in message


def test_the_model_type_is_judged_before_fields_that_another_model_lacks(path: Path) -> None:
    message = refusal(path, json.dumps({"model_type": "gpt2", "n_embd": 768}))
    assert "gpt2" in message


@pytest.mark.parametrize(
    "architectures",
    [["LlamaForCausalLM"], ["Qwen2Model"], ["Qwen2ForSequenceClassification"], []],
)
def test_other_architectures_are_refused(path: Path, architectures: list[str]) -> None:
    message = refusal(path, text_with(architectures=architectures))
    assert "architectures" in message
    assert "Qwen2ForCausalLM" in message


@pytest.mark.parametrize("found", [False, None, 1, "true"])
def test_two_way_attention_is_refused(path: Path, found: object) -> None:
    assert "is_causal" in refusal(path, text_with(is_causal=found))


# --- sliding windows ------------------------------------------------------------------------------


def test_a_window_number_that_is_not_in_use_is_no_window(path: Path) -> None:
    config = read(path, text_with(sliding_window=2, max_window_layers=0))
    assert config.windows == (None,) * 28
    config.refuse_window(0, 1 << 20)


def test_a_window_is_in_force_from_max_window_layers_on(path: Path) -> None:
    config = read(path, text_with(use_sliding_window=True, sliding_window=8, max_window_layers=26))
    assert config.windows == (*[None] * 26, 8, 8)
    config.refuse_window(25, 1 << 20)
    config.refuse_window(26, 8)
    with pytest.raises(QwenrefError, match=r"layer 26 .*window of 8 tokens.* 9"):
        config.refuse_window(26, 9)


def test_layer_types_decide_where_they_are_given(path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 14
    config = read(
        path,
        text_with(
            use_sliding_window=True, sliding_window=8, max_window_layers=0, layer_types=kinds
        ),
    )
    assert config.windows == (None, 8) * 14
    with pytest.raises(QwenrefError, match="layer 1 "):
        config.refuse_window(1, 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"] * 27},
        {"layer_types": ["full_attention"] * 29},
        {"layer_types": []},
        {"layer_types": ["linear_attention"] * 28},
        {"layer_types": ["sliding_attention"] * 28, "sliding_window": None},
        {"use_sliding_window": True, "max_window_layers": ABSENT},
        {"use_sliding_window": True, "max_window_layers": None},
    ],
)
def test_windows_that_cannot_be_decided_are_refused(path: Path, changes: dict[str, Any]) -> None:
    message = refusal(path, text_with(**changes))
    assert "layer_types" in message or "max_window_layers" in message


# --- files that are no config ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b" ",
        b"\0",
        b"{",
        b"not json",
        b"null",
        b"3",
        b'"qwen2"',
        b"[]",
        b"[{}]",
        text_with().encode() + b"x",
        text_with().encode() + text_with().encode(),
        text_with().encode()[:-1],
        text_with().encode("utf-16"),
        b"\xef\xbb\xbf" + text_with().encode(),
        text_with(model_type="qw\xffen").encode("latin-1") + b"\xff",
        text_with().replace("qwen2", "\xff").encode("latin-1"),
        b'{"model_type": "\\ud800"}',
    ],
)
def test_text_that_is_no_json_object_is_refused(path: Path, content: bytes) -> None:
    assert refusal(path, content) != ""


@pytest.mark.parametrize("field", ["something_new", "model_type", "rope_scaling", "layer_types"])
@pytest.mark.parametrize("bracket", ["[]", '{"a":}'])
def test_deep_nesting_is_refused(path: Path, field: str, bracket: str) -> None:
    deep = bracket[:-1] * 100_000 + "1" + bracket[-1] * 100_000
    assert refusal(path, text_with_literal(field, deep)) != ""


def test_a_missing_config_is_named(path: Path) -> None:
    with pytest.raises(QwenrefError, match="does not exist") as error:
        read_config(path)
    assert f"{path}" in str(error.value)


def test_a_directory_in_place_of_the_config_is_refused(path: Path) -> None:
    path.mkdir()
    with pytest.raises(QwenrefError, match="not a regular file"):
        read_config(path)


def test_a_config_is_read_up_to_the_limit_and_not_beyond(path: Path) -> None:
    text = text_with()
    assert read(path, text + " " * (CONFIG_LIMIT - len(text))) == MEANT
    assert "larger than" in refusal(path, text + " " * (CONFIG_LIMIT - len(text) + 1))


def test_a_huge_config_is_refused_without_being_read(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(QwenrefError, match="larger than"):
            read_config(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * CONFIG_LIMIT


# --- anything at all ------------------------------------------------------------------------------

FIELDS = (*PUBLISHED, "head_dim", "rope_scaling", "rope_parameters", "layer_types", "is_causal")
FIELDS = (*FIELDS, "partial_rotary_factor", "quantization_config")
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 64)
    | st.sampled_from([1 << 14, 1 << 20, 1 << 24, 1 << 31, 1 << 63, 1 << 64, 10**400])
    | st.floats()
    | st.sampled_from(["default", "yarn", "full_attention", "sliding_attention", "qwen2"])
    | st.text(max_size=8)
)
KEYS = st.sampled_from(["rope_theta", "rope_type", "type", "factor"]) | st.text(max_size=4)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
CHANGES = st.dictionaries(st.sampled_from(FIELDS), st.just(ABSENT) | VALUES, max_size=3)
FLIPS = st.lists(st.tuples(st.integers(0, 660), st.integers(0, 255)), min_size=1, max_size=3)


@settings(max_examples=200)
@given(changes=CHANGES)
def test_any_values_of_the_fields_give_a_config_or_a_refusal(
    path: Path, changes: dict[str, Any]
) -> None:
    check_config_or_refusal(path, text_with(**changes).encode())


@settings(max_examples=200)
@given(flips=FLIPS, cut=st.none() | st.integers(0, 660))
def test_any_damage_to_the_bytes_gives_a_config_or_a_refusal(
    path: Path, flips: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(text_with().encode())
    for position, byte in flips:
        content[position : position + 1] = bytes([byte])
    check_config_or_refusal(path, bytes(content[:cut]))


def check_config_or_refusal(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    tracemalloc.start()
    try:
        config, message = None, ""
        try:
            config = read_config(path)
        except QwenrefError as error:
            message = str(error)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < (1 << 19) + 64 * len(content)  # windows of the most layers there can be: 1 << 18
    if config is None:
        assert message.startswith(f"{path}")
    else:
        assert config.num_attention_heads % config.num_key_value_heads == 0
        assert config.head_dim % 2 == 0
        assert min(config.sizes.values()) > 0
        assert 1 < config.rope_theta < float("inf")
        assert 0 < config.rms_norm_eps < 1
        assert len(config.windows) == config.num_hidden_layers
