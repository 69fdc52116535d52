"""manifest.json: what is written, letter for letter, and everything that is not read."""

import copy
import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwenref.dumps.manifest import (
    LIMIT,
    Manifest,
    Noise,
    StageFile,
    StageNoise,
    UsedConfig,
    Weights,
    read_manifest,
    stage_path,
    write_manifest,
)
from qwenref.errors import QwenrefError
from qwenref.metrics import Errors

PRINT = "blake3:" + "0123456789abcdef" * 4
OF_WEIGHTS = PRINT.replace(":", "-halves:")

FLOORS = {
    "whole": 1.2e-7,
    "blocks": [],
    "heads": [1.3e-7, 1.2e-7, 1.2e-7, 1.2e-7, None, 1.2e-7],
    "tokens": [1.2e-7, 0.5],
    "element": None,
}

VALID: dict[str, Any] = {
    "schema": "qwenref-manifest-v1",
    "engine": "qwenref",
    "versions": {"qwenref": "0.1.0", "jax": "0.10.2"},
    "device": "cpu",
    "dtype": "float32",
    "layout": "hf",
    "model": "tiny",
    "prompt": 'say "é\n\x1b☃"',
    "tokens": [3, 0, 4294967295],
    "input": None,
    "config": {
        "hidden_size": 84,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 14,
        "intermediate_size": 152,
        "vocab_size": 320,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
    "weights": {
        "layers": {"0": OF_WEIGHTS},
        "embedding": OF_WEIGHTS,
        "biases": True,
        "feed_forwards": {},
        "final_norm": None,
        "lm_head": None,
    },
    "stages": [
        {
            "stage": "q_post_rope",
            "layer": 0,
            "file": "layer-0/q_post_rope.bin",
            "shape": [6, 3, 14],
            "axes": "N T H",
            "fingerprint": PRINT,
        },
        {
            "stage": "final_norm",
            "layer": None,
            "file": "final_norm.bin",
            "shape": [3, 84],
            "axes": "T D",
            "fingerprint": PRINT,
        },
    ],
    "noise": {
        "tokens": [0, 2],
        "stages": {
            "layer-0/q_post_rope": {
                "accumulated": {"float32": FLOORS},
                "local": {},
                "inputs": {"float16": FLOORS},
            },
        },
    },
}

TEXT = r"""{
  "schema": "qwenref-manifest-v1",
  "engine": "qwenref",
  "versions": {"qwenref":"0.1.0","jax":"0.10.2"},
  "device": "cpu",
  "dtype": "float32",
  "layout": "hf",
  "model": "tiny",
  "prompt": "say \"é\n\u001b☃\"",
  "tokens": [3,0,4294967295],
  "input": null,
  "config": {"hidden_size":84,"num_attention_heads":6,"num_key_value_heads":2,"head_dim":14,"intermediate_size":152,"vocab_size":320,"rms_norm_eps":1e-6,"rope_theta":1000000.0},
  "weights": {"layers":{"0":"blake3-halves:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"},"embedding":"blake3-halves:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef","biases":true,"feed_forwards":{},"final_norm":null,"lm_head":null},
  "stages": [
    {"stage":"q_post_rope","layer":0,"file":"layer-0/q_post_rope.bin","shape":[6,3,14],"axes":"N T H","fingerprint":"blake3:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"},
    {"stage":"final_norm","layer":null,"file":"final_norm.bin","shape":[3,84],"axes":"T D","fingerprint":"blake3:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}
  ],
  "noise": {"tokens": [0,2], "stages": {
    "layer-0/q_post_rope": {"accumulated":{"float32":{"whole":1.2e-7,"blocks":[],"heads":[1.3e-7,1.2e-7,1.2e-7,1.2e-7,null,1.2e-7],"tokens":[1.2e-7,0.5],"element":null}},"local":{},"inputs":{"float16":{"whole":1.2e-7,"blocks":[],"heads":[1.3e-7,1.2e-7,1.2e-7,1.2e-7,null,1.2e-7],"tokens":[1.2e-7,0.5],"element":null}}}
  }}
}
"""  # noqa: E501 - the lines are as long as the format makes them


def put(directory: Path, content: bytes) -> None:
    (directory / "manifest.json").write_bytes(content)


def refusal(directory: Path) -> str:
    """Return why the manifest is refused; the message names the file and is one line."""
    with pytest.raises(QwenrefError) as caught:
        read_manifest(directory)
    message = str(caught.value)
    assert str(directory / "manifest.json") in message
    return message.replace(str(directory), "")


def without_schema(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "schema"}


def changed(path: str, value: object) -> dict[str, Any]:
    """Return `VALID` with the field at a path like ``stages.0.file`` set, or removed by `...`."""
    result = copy.deepcopy(VALID)
    *folders, last = path.split(".")
    place: Any = result
    for key in folders:
        place = place[int(key) if isinstance(place, list) else key]
    at: Any = int(last) if isinstance(place, list) else last
    if value is ...:
        place.pop(at)
    else:
        place[at] = value
    return result


# Writing


def test_the_text_is_exactly_this(tmp_path: Path) -> None:
    fields = without_schema(VALID)
    made = write_manifest(tmp_path, **fields)
    assert (tmp_path / "manifest.json").read_bytes() == TEXT.encode()
    assert made.to_json() == TEXT


def test_the_text_is_json_of_the_same_fields() -> None:
    assert json.loads(TEXT) == VALID


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    fields = without_schema(VALID)
    made = write_manifest(tmp_path, **fields)
    assert read_manifest(tmp_path) == made


def test_reading_gives_every_field(tmp_path: Path) -> None:
    put(tmp_path, TEXT.encode())
    stages = [
        StageFile("q_post_rope", 0, "layer-0/q_post_rope.bin", [6, 3, 14], "N T H", PRINT),
        StageFile("final_norm", None, "final_norm.bin", [3, 84], "T D", PRINT),
    ]
    heads = [1.3e-7, 1.2e-7, 1.2e-7, 1.2e-7, None, 1.2e-7]
    floors = Errors(1.2e-7, [], heads, [1.2e-7, 0.5], None)
    assert read_manifest(tmp_path) == Manifest(
        schema="qwenref-manifest-v1",
        engine="qwenref",
        versions={"qwenref": "0.1.0", "jax": "0.10.2"},
        device="cpu",
        dtype="float32",
        layout="hf",
        model="tiny",
        prompt='say "é\n\x1b☃"',
        tokens=[3, 0, 4294967295],
        input=None,
        config=UsedConfig(84, 6, 2, 14, 152, 320, 1e-6, 1e6),
        weights=Weights({"0": OF_WEIGHTS}, OF_WEIGHTS, True),
        stages=stages,
        noise=Noise(
            [0, 2],
            {"layer-0/q_post_rope": StageNoise({"float32": floors}, {}, {"float16": floors})},
        ),
    )


def test_other_spacing_and_order_of_fields_is_read_alike(tmp_path: Path) -> None:
    put(tmp_path, TEXT.encode())
    expected = read_manifest(tmp_path)
    put(tmp_path, json.dumps(dict(reversed(VALID.items())), indent=7).encode())
    assert read_manifest(tmp_path) == expected


def test_a_manifest_is_never_overwritten(tmp_path: Path) -> None:
    put(tmp_path, b"mine")
    fields = without_schema(VALID)
    with pytest.raises(FileExistsError):
        write_manifest(tmp_path, **fields)
    assert (tmp_path / "manifest.json").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layout", "llama"),
        ("stages", [VALID["stages"][0]] * 2),
        ("stages", [VALID["stages"][0] | {"file": "layer-1/q_post_rope.bin"}]),
        ("clock", "12:00"),
    ],
)
def test_what_would_not_be_read_is_not_written(tmp_path: Path, field: str, value: object) -> None:
    fields = without_schema(VALID | {field: value})
    with pytest.raises((ValueError, TypeError)):
        write_manifest(tmp_path, **fields)
    assert not (tmp_path / "manifest.json").exists()


def test_stage_files_lie_where_apr_trace_puts_them() -> None:
    assert stage_path(0, "attn_scores") == "layer-0/attn_scores.bin"
    assert stage_path(27, "attn_out") == "layer-27/attn_out.bin"
    assert stage_path(None, "final_norm") == "final_norm.bin"


# Reading what is wrong


MALFORMED = [
    ("schema", "qwenref-manifest-v2", "qwenref-manifest-v2"),
    ("schema", None, "schema"),
    ("schema", 1, "schema"),
    ("dtype", "float8", "float8"),
    ("layout", "llama", "llama"),
    ("engine", None, "engine"),
    ("prompt", 7, "prompt"),
    ("prompt", ["x"], "prompt"),
    ("tokens", "1,2", "tokens"),
    ("tokens", [1, -1], "tokens"),
    ("tokens", [2**32], "tokens"),
    ("tokens", [1.5], "tokens"),
    ("tokens", [True], "tokens"),
    ("versions", {"jax": 10}, "versions"),
    ("input", "", "input"),
    ("input", PRINT[:-1], "input"),
    ("config.hidden_size", "84", "config.hidden_size"),
    ("config.hidden_size", True, "config.hidden_size"),
    ("config.rope_theta", None, "config.rope_theta"),
    ("config.rope_theta", ..., "rope_theta"),
    ("config.sliding_window", 5, "sliding_window"),
    ("weights.biases", 1, "weights.biases"),
    ("weights.layers", {"0": "md5:1"}, "weights.layers"),
    ("weights.embedding", "blake3-halves:" + "0" * 63, "weights.embedding"),
    ("weights.embedding", "blake3-halves:" + "0" * 65, "weights.embedding"),
    ("weights.embedding", "blake3-halves:" + "A" * 64, "weights.embedding"),
    ("weights.embedding", "sha256:" + "0" * 64, "weights.embedding"),
    ("weights.embedding", "0" * 64, "weights.embedding"),
    ("weights.embedding", PRINT, "weights.embedding"),  # of earlier versions
    ("weights.embedding", OF_WEIGHTS + "\n", "weights.embedding"),
    ("weights.embedding", "\n" + OF_WEIGHTS, "weights.embedding"),
    ("stages", {}, "stages"),
    ("stages.0", None, "stages[0]"),
    ("stages.1", "final_norm", "stages[1]"),
    ("stages.0.fingerprint", PRINT + "\n", "stages[0].fingerprint"),
    ("stages.0.fingerprint", None, "stages[0].fingerprint"),
    ("stages.0.fingerprint", ..., "fingerprint"),
    ("stages.0.note", "x", "note"),
    ("stages.0.stage", "", "stages[0].stage"),
    ("stages.0.stage", "Attn_Norm", "stages[0].stage"),
    ("stages.0.stage", "../q_post_rope", "stages[0].stage"),
    ("stages.0.stage", "q_post_rope\n", "q_post_rope"),
    ("stages.0.layer", -1, "stages[0].layer"),
    ("stages.0.layer", 2**32 - 1, "stages[0].layer"),
    ("stages.0.layer", "0", "stages[0].layer"),
    ("stages.0.layer", 1, "layer-0/q_post_rope.bin"),
    ("stages.0.layer", None, "layer-0/q_post_rope.bin"),
    ("stages.1.layer", 0, "final_norm.bin"),
    ("stages.0.file", "/etc/passwd", "stages[0].file"),
    ("stages.0.file", "/layer-0/q_post_rope.bin", "stages[0].file"),
    ("stages.0.file", "../q_post_rope.bin", "stages[0].file"),
    ("stages.0.file", "layer-0/../q_post_rope.bin", "stages[0].file"),
    ("stages.0.file", "layer-0//q_post_rope.bin", "stages[0].file"),
    ("stages.0.file", "./layer-0/q_post_rope.bin", "stages[0].file"),
    ("stages.0.file", "layer-0\\q_post_rope.bin", "stages[0].file"),
    ("stages.0.file", "layer-0/q_post_rope.bin\x00", "stages[0].file"),
    ("stages.0.file", "manifest.json", "stages[0].file"),
    ("stages.0.file", "layer-00/q_post_rope.bin", "layer-00/q_post_rope.bin"),
    ("stages.0.file", "layer-0/q_post_rope.bin\n", "q_post_rope"),
    ("stages.0.file", "layer-1/q_post_rope.bin", "layer-1/q_post_rope.bin"),
    ("stages.0.file", "layer-0/k_post_rope.bin", "layer-0/k_post_rope.bin"),
    ("stages.0.file", "q_post_rope.bin", "q_post_rope.bin"),
    ("stages.0.shape", [], "shape []"),
    ("stages.0.shape", [6, 3], "shape [6, 3]"),
    ("stages.0.shape", [6, 3, 14, 1], "shape [6, 3, 14, 1]"),
    ("stages.0.shape", [6, 0, 14], "stages[0].shape"),
    ("stages.0.shape", [6, -3, -14], "stages[0].shape"),
    ("stages.0.shape", [6, 3, 2**32], "stages[0].shape"),
    ("stages.0.shape", [6, 3, 10**30], "stages[0].shape"),
    ("stages.0.shape", [6, 3, 14.5], "stages[0].shape"),
    ("stages.0.shape", [2, 2**15, 2**16], "shape [2, 32768, 65536]"),
    ("stages.0.shape", [2**32 - 1] * 3, "shape [4294967295, 4294967295, 4294967295]"),
    ("stages.0.axes", "", "stages[0].axes"),
    ("stages.0.axes", "N T", "axes N T"),
    ("stages.0.axes", "N T H D", "axes N T H D"),
    ("stages.0.axes", "NTH", "stages[0].axes"),
    ("stages.0.axes", "N  T H", "stages[0].axes"),
    ("stages.0.axes", "n t h", "stages[0].axes"),
    ("stages.0.axes", "N T H\n", "of axes N T H"),
    ("stages.0.axes", "N T H ", "stages[0].axes"),
    ("noise", 1e-7, "noise"),
    ("noise.tokens", [], "noise.tokens"),
    ("noise.tokens", [2, 0], "tokens of noise"),
    ("noise.tokens", [0, 1], "tokens of noise"),
    ("noise.tokens", [1, 2], "tokens of noise"),
    ("noise.tokens", [0, 2, 2], "tokens of noise"),
    ("noise.tokens", [0, 1, 2], "noise of layer-0/q_post_rope in float32"),
    (
        "noise.stages",
        {"layer-0/q_pre_rope": VALID["noise"]["stages"]["layer-0/q_post_rope"]},
        "q_pre_rope",
    ),
    ("noise.stages.layer-0/q_post_rope.local", ..., "local"),
    ("noise.stages.layer-0/q_post_rope.local", {"float16": FLOORS | {"heads": []}}, "in float16"),
    (
        "noise.stages.layer-0/q_post_rope.local",
        {"float16": FLOORS | {"blocks": [1.0]}},
        "in float16",
    ),
    ("noise.stages.layer-0/q_post_rope.local", {"float16": FLOORS | {"whole": -1.0}}, "noise"),
    ("noise.stages.layer-0/q_post_rope.local", {"float16": FLOORS | {"whole": "1"}}, "noise"),
]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    MALFORMED,
    ids=[f"{path}={'absent' if value is ... else ascii(value)}" for path, value, _ in MALFORMED],
)
def test_a_malformed_field_is_refused_and_named(
    tmp_path: Path, path: str, value: object, named: str
) -> None:
    put(tmp_path, json.dumps(changed(path, value)).encode())
    assert named in refusal(tmp_path)


def test_an_earlier_dump_has_no_noise(tmp_path: Path) -> None:
    put(tmp_path, json.dumps(changed("noise", ...)).encode())
    assert read_manifest(tmp_path).noise is None


@pytest.mark.parametrize("field", sorted(VALID.keys() - {"noise"}))
def test_every_field_is_required_and_named_when_missing(tmp_path: Path, field: str) -> None:
    put(tmp_path, json.dumps(changed(field, ...)).encode())
    assert f"missing required field `{field}`" in refusal(tmp_path)


@pytest.mark.parametrize("field", ["clock", "Schema", "", "sche\u043ca"])
def test_an_unknown_field_is_refused_and_named(tmp_path: Path, field: str) -> None:
    put(tmp_path, json.dumps(VALID | {field: 1}).encode())
    assert f"unknown field `{field}`" in refusal(tmp_path)


def test_the_largest_countable_shape_is_accepted(tmp_path: Path) -> None:
    largest = VALID["stages"][0] | {"shape": [1, 65535, 65537], "axes": "A B C"}
    put(tmp_path, json.dumps(changed("stages.0", largest)).encode())
    assert math.prod(read_manifest(tmp_path).stages[0].shape) == 2**32 - 1


@pytest.mark.parametrize("layer", [0, 7, None])
def test_a_stage_listed_twice_is_refused(tmp_path: Path, layer: int | None) -> None:
    stage = VALID["stages"][0] | {"layer": layer, "file": stage_path(layer, "q_post_rope")}
    put(tmp_path, json.dumps(changed("stages", [stage, stage | {"fingerprint": PRINT}])).encode())
    assert "listed twice" in refusal(tmp_path)


def test_the_same_stage_of_two_layers_is_no_duplicate(tmp_path: Path) -> None:
    stage = VALID["stages"][0]
    other = stage | {"layer": 1, "file": "layer-1/q_post_rope.bin"}
    put(tmp_path, json.dumps(changed("stages", [stage, other])).encode())
    assert [stage.layer for stage in read_manifest(tmp_path).stages] == [0, 1]


@pytest.mark.parametrize("number", ["NaN", "nan", "Infinity", "-Infinity", "1e999", "0x1", "01"])
def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path, number: str) -> None:
    put(tmp_path, TEXT.replace("1e-6", number).encode())
    message = refusal(tmp_path)
    assert "malformed" in message or "rms_norm_eps" in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "truncated"),
        (TEXT.encode()[:-3], "truncated"),
        (TEXT.encode()[:700], "truncated"),
        (TEXT.encode() + b"{}", "trailing"),
        (TEXT.encode() + b"\x00", "trailing"),
        (b"\xef\xbb\xbf" + TEXT.encode(), "malformed"),
        (TEXT.encode("utf-16"), "malformed"),
        (TEXT.encode("latin-1", "replace"), "utf-8"),
        (TEXT.replace("☃", "\\ud800").encode(), "malformed"),
        (TEXT.replace("\\n", "\n").encode(), "malformed"),
        (TEXT.replace("true", "True").encode(), "malformed"),
        (TEXT.replace("\n  ]", ",\n  ]").encode(), "malformed"),
        (TEXT.replace('"cpu"', "'cpu'").encode(), "malformed"),
        (b"null", "null"),
        (b"[]", "array"),
        (b'"qwenref-manifest-v1"', "str"),
        (b"APRT\x00\x00\x00\x00\x00\x00\x00\x00", "malformed"),
        (b"\x00" * 4096, "malformed"),
    ],
)
def test_what_is_no_json_object_in_utf8_is_refused(
    tmp_path: Path, content: bytes, named: str
) -> None:
    put(tmp_path, content)
    assert named in refusal(tmp_path).lower()


@pytest.mark.parametrize("depth", [2_000, 1_000_000])
@pytest.mark.parametrize("field", ["prompt", "tokens", "stages", "versions", "deep"])
@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_refused_without_a_crash(
    tmp_path: Path, depth: int, field: str, begin: str, end: str
) -> None:
    nested = begin * depth + "1" + end * depth
    put(tmp_path, json.dumps(VALID | {field: "HERE"}).replace('"HERE"', nested).encode())
    assert field in refusal(tmp_path)
    put(tmp_path, nested.encode())
    refusal(tmp_path)


# Reading what is no file


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def alarm(*_: object) -> None:
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "absent")


def test_a_directory_a_pipe_and_a_device_are_refused_without_waiting(tmp_path: Path) -> None:
    for name in ("directory", "pipe", "device"):
        (tmp_path / name).mkdir()
    (tmp_path / "directory" / "manifest.json").mkdir()
    os.mkfifo(tmp_path / "pipe" / "manifest.json")
    (tmp_path / "device" / "manifest.json").symlink_to(os.devnull)
    with at_most(5):
        for name in ("directory", "pipe", "device"):
            assert "not a regular file" in refusal(tmp_path / name)


def test_a_sparse_file_beyond_the_limit_is_refused_and_the_limit_named(tmp_path: Path) -> None:
    put(tmp_path, TEXT.encode())
    os.truncate(tmp_path / "manifest.json", 1 << 40)
    with at_most(10):
        message = refusal(tmp_path)
    assert f"larger than {LIMIT} bytes" in message


def test_a_file_of_exactly_the_limit_is_still_read(tmp_path: Path) -> None:
    put(tmp_path, TEXT.encode().ljust(LIMIT))
    assert read_manifest(tmp_path).model == "tiny"
    put(tmp_path, TEXT.encode().ljust(LIMIT + 1))
    assert f"larger than {LIMIT} bytes" in refusal(tmp_path)


def test_an_unreadable_manifest_says_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    put(tmp_path, TEXT.encode())
    monkeypatch.setattr(Path, "open", denied)  # permission bits do not stop root
    assert refusal(tmp_path).endswith("Permission denied")


# Fuzzing

Edits = list[tuple[int, int, bytes]]


@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(TEXT)),
            st.integers(0, 12),
            st.binary(max_size=6)
            | st.sampled_from([b'"', b"\\", b"{", b"[", b"null", b"-1", b"1e400", b",", b"\xff"]),
        ),
        min_size=1,
        max_size=4,
    )
)
@example(edits=[(0, len(TEXT), b"")])
def test_mutated_bytes_are_a_manifest_or_an_error_of_ours(tmp_path: Path, edits: Edits) -> None:
    content = bytearray(TEXT.encode())
    for start, length, new in edits:
        content[start : start + length] = new
    put(tmp_path, bytes(content))
    read_or_refused(tmp_path)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**32 - 1, 2**32, 2**64, 10**30])
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from([PRINT, "layer-0/q_post_rope.bin", "final_norm.bin", "T D", "../x.bin"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def paths_of(value: object, here: tuple[str, ...] = ()) -> Iterator[str]:
    if here:
        yield ".".join(here)
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    for key, inner in pairs:
        yield from paths_of(inner, (*here, str(key)))


@given(path=st.sampled_from(sorted(paths_of(VALID))), value=VALUES | st.just(...))
def test_any_value_in_any_field_is_a_manifest_or_an_error_of_ours(
    tmp_path: Path, path: str, value: object
) -> None:
    put(tmp_path, json.dumps(changed(path, value)).encode())
    read_or_refused(tmp_path)


@given(content=st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_any_other_content_is_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, content)
    refusal(tmp_path)


def read_or_refused(directory: Path) -> None:
    """Read a manifest; hold one that is accepted to what its readers rely on."""
    try:
        found = read_manifest(directory)
    except QwenrefError as error:
        assert str(directory / "manifest.json") in str(error)  # noqa: PT017 - either is right
        return
    assert found.schema == VALID["schema"]
    for stage in found.stages:
        place = f"layer-{stage.layer}/" if stage.layer is not None else ""
        assert stage.file == f"{place}{stage.stage}.bin"
        assert stage.file.isascii()
        assert stage.file.isprintable()
        assert ".." not in stage.file
        assert len(stage.shape) == len(stage.axes.split(" "))
        assert 1 <= math.prod(stage.shape) < 2**32
        assert stage.fingerprint.removeprefix("blake3:").isalnum()
    assert len({stage.file for stage in found.stages}) == len(found.stages)
    put(directory, found.to_json().encode())
    assert read_manifest(directory) == found
    assert msgspec.json.decode(found.to_json()) == json.loads(found.to_json())
