"""The prompt as token ids: every way to give them, and everything that is none of these."""

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenref.bundled import tiny_checkpoint
from qwenref.errors import QwenrefError
from qwenref.model.tokens import (
    DEFAULT_PROMPT,
    LIMIT,
    TOKENIZER_LIMIT,
    check_tokens,
    encode,
    parse_tokens,
)

BUNDLED = tiny_checkpoint()

WHAT_IS = [87, 104, 97, 116, 32, 105, 115, 32, 50, 43, 50, 63]
"""The ids of "What is 2+2?" in the bundled checkpoint, whose tokenizer gives a token to a byte."""

TOKENIZER: dict[str, Any] = json.loads((BUNDLED / "tokenizer.json").read_text())


def refusal_of_tokens(spec: str) -> str:
    with pytest.raises(QwenrefError) as error:
        parse_tokens(spec)
    return str(error.value)


def tokenizer_with(folder: Path, **changes: object) -> Path:
    """Write the bundled tokenizer.json with some fields changed, and return its directory."""
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER | changes))
    return folder


def refusal_of_prompt(prompt: str, directory: Path) -> str:
    with pytest.raises(QwenrefError) as error:
        encode(prompt, directory)
    return str(error.value)


# --- ids given as numbers -------------------------------------------------------------------------

FORMS = {
    "commas": "3838,374,220",
    "one blank": "3838 374 220",
    "commas and blanks": "3838, 374 , 220",
    "lines": "3838\n374\n220\n",
    "windows lines": "3838\r\n374\r\n220\r\n",
    "tabs": "\t3838\t374\t220",
    "a trailing comma": "3838,374,220,",
    "a JSON list": "[3838, 374, 220]",
    "a JSON list over lines": " \n[\n  3838,\n  374,\n  220\n]\n",
    "leading zeros": "03838,374,0220",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS.keys())
def test_each_form_gives_the_same_ids_directly_and_from_a_file(tmp_path: Path, text: str) -> None:
    assert parse_tokens(text) == [3838, 374, 220]
    file = tmp_path / "ids with blanks, and commas.txt"
    file.write_bytes(text.encode())
    assert parse_tokens(f"@{file}") == [3838, 374, 220]


def test_one_id_and_id_zero_are_ids() -> None:
    assert parse_tokens("0") == parse_tokens("[0]") == [0]
    assert parse_tokens("7,7,7") == [7, 7, 7]


BAD_WORDS = ("1.5", "1.0", "1e3", "-1", "+1", "--1", "0x10", "1_000", "abc", "null", "true")
BAD_WORDS = (*BAD_WORDS, "\u0661\u0662", "\uff11", "\u00b2", "\u2460", "1;2", "1-2", '"1"', "@1")
BAD_WORDS = (*BAD_WORDS, "<|im_start|>", "\ufeff1", "1\0", "\ud800", "inf", "nan", "9" * 5000)
BAD_WORDS = (*BAD_WORDS, "99999999999", "{}", "(1)")


@pytest.mark.parametrize("word", BAD_WORDS, ids=lambda word: ascii(word[:12]))
def test_a_word_that_is_no_id_is_refused_wherever_it_stands(word: str) -> None:
    for spec in (f"{word} 5", f"5,{word}", f"5 {word},5"):
        if not spec.startswith("@"):
            assert "whole number" in refusal_of_tokens(spec)


def test_the_word_at_fault_is_shown() -> None:
    assert "'3.7'" in refusal_of_tokens("1,3.7,5")
    assert len(refusal_of_tokens("1," + "x" * 100_000)) < 200


BAD_LISTS = ("[1.5]", "[1.0]", "[1e2]", "[true]", "[false]", "[null]", '["1"]', "[[1]]", "[{}]")
BAD_LISTS = (*BAD_LISTS, "[1", "[1,]", "[,1]", "[1 2]", "[1]x", "[1][2]", "[NaN]", "[01]", "[")
BAD_LISTS = (*BAD_LISTS, "[" + "9" * 5000 + "]", "[" * 100_000, "[\ud800]")


@pytest.mark.parametrize("text", BAD_LISTS, ids=lambda text: ascii(text[:12]))
def test_a_list_that_is_no_json_list_of_whole_numbers_is_refused(text: str) -> None:
    assert "--tokens" in refusal_of_tokens(text)


@pytest.mark.parametrize("spec", ["[-1]", "[5, -7]", f"[{1 << 32}]", f"[{10**30}]", "320"])
def test_a_list_may_not_hold_what_no_checkpoint_has(spec: str) -> None:
    with pytest.raises(QwenrefError, match=r"out of range.* 0 to 319"):
        check_tokens(parse_tokens(spec), 320)


@pytest.mark.parametrize("spec", ["", " ", "\n", ",", " , ,\n", "[]", " [ ] "])
def test_no_ids_at_all_are_refused(tmp_path: Path, spec: str) -> None:
    assert "no token ids" in refusal_of_tokens(spec)
    (tmp_path / "ids").write_text(spec)
    message = refusal_of_tokens(f"@{tmp_path / 'ids'}")
    assert "no token ids" in message
    assert f"{tmp_path / 'ids'}" in message


def test_every_id_of_a_vocabulary_is_in_its_range() -> None:
    check_tokens(range(320), 320)
    for outside in (-1, 320, 1 << 40):
        with pytest.raises(QwenrefError, match=f"token id {outside} "):
            check_tokens([0, outside], 320)


# --- ids in a file --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["absent", "a/b", "", "x" * 300, "x/" * 3000, "nul\0"])
def test_a_file_that_does_not_exist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refusal_of_tokens(f"@{name}") != ""


def test_something_that_is_no_file_is_refused_at_once(
    tmp_path: Path, make_fifo: Callable[[Path], None]
) -> None:
    make_fifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "loop"):
        assert f"{path}" in refusal_of_tokens(f"@{path}")


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "ids"
    for content in (b"\xff\xfe1\x00", b"1,2\x80", "1,2".encode("utf-16"), b"\xed\xa0\x80"):
        path.write_bytes(content)
        message = refusal_of_tokens(f"@{path}")
        assert f"{path}" in message
        assert "text" in message


def test_what_is_wrong_in_a_file_is_said_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ids"
    for content in ("[1.5]", "[", "1,x"):
        path.write_text(content)
        assert f"{path}" in refusal_of_tokens(f"@{path}")


def test_a_file_may_not_lead_to_another_file(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("1,2")
    (tmp_path / "other").write_text(f"@{tmp_path / 'ids'}")
    assert "whole number" in refusal_of_tokens(f"@{tmp_path / 'other'}")


def test_a_huge_file_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "ids"
    path.touch()
    os.truncate(path, 1 << 40)
    tracemalloc.start()
    try:
        assert "larger than" in refusal_of_tokens(f"@{path}")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * LIMIT


@settings(max_examples=150)
@given(ids=st.lists(st.integers(0, 151_935), min_size=1), json_list=st.booleans())
def test_ids_written_out_are_read_back(tmp_path: Path, ids: list[int], json_list: bool) -> None:
    text = json.dumps(ids) if json_list else ",".join(map(str, ids))
    assert parse_tokens(text) == ids
    (tmp_path / "ids").write_text(text)
    assert parse_tokens(f"@{tmp_path / 'ids'}") == ids


@settings(max_examples=300)
@given(st.text('0123456789 ,\n[]-.eE"{}:truefalsn\u0661', max_size=12) | st.text(max_size=12))
def test_any_text_gives_ids_or_a_refusal(tmp_path: Path, text: str) -> None:
    (tmp_path / "ids").write_bytes(text.encode("utf-8", "surrogatepass"))
    ids: list[int] = []
    message = ""
    try:
        ids = parse_tokens(f"@{tmp_path / 'ids'}")
    except QwenrefError as error:
        message = str(error)
    assert bool(ids) != bool(message)
    assert all(type(token) is int for token in ids)


# --- text through a tokenizer ---------------------------------------------------------------------


def test_the_bundled_tokenizer_gives_the_published_ids() -> None:
    assert DEFAULT_PROMPT == "What is 2+2?"
    assert encode(DEFAULT_PROMPT, BUNDLED) == WHAT_IS


@pytest.mark.parametrize(
    "prompt",
    [
        "a",
        " ",
        "\n",
        "  two  ",
        "\t\r\n",
        "a\0b",
        "日本語",
        "🎉",
        "naïve",
        "ﬁ",
        "\u202eabc",
        "\x1b[",
    ],
)
def test_text_becomes_its_utf8_bytes_and_nothing_else(prompt: str) -> None:
    assert encode(prompt, BUNDLED) == list(prompt.encode())


def test_text_is_composed_first_as_qwen_does() -> None:
    assert encode("e\u0301", BUNDLED) == encode("\u00e9", BUNDLED) == list("\u00e9".encode())
    assert encode("\u212b", BUNDLED) == list("\u00c5".encode())


def test_a_long_text_keeps_all_of_its_tokens() -> None:
    assert encode("ab " * 50_000, BUNDLED) == list(b"ab ") * 50_000


def test_an_empty_prompt_has_no_tokens_and_is_refused_for_it() -> None:
    assert encode("", BUNDLED) == []
    with pytest.raises(QwenrefError, match="prompt is empty"):
        check_tokens([], 320)


@pytest.mark.parametrize("prompt", ["\ud800", "abc\udcff", "\udfff\ud83c"])
def test_a_prompt_that_is_no_unicode_text_is_refused_and_not_the_tokenizer(prompt: str) -> None:
    message = refusal_of_prompt(prompt, BUNDLED)
    assert "prompt" in message
    assert "Unicode" in message
    assert "tokenizer.json" not in message


def test_a_special_token_that_is_spelled_out_becomes_one_id(tmp_path: Path) -> None:
    vocab = TOKENIZER["model"]["vocab"]
    token = {"id": len(vocab), "content": "<|im_start|>", "special": True}
    token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    directory = tokenizer_with(tmp_path, added_tokens=[token])
    assert encode("a<|im_start|>b", directory) == [97, len(vocab), 98]


def test_a_bos_that_a_template_would_add_is_not_added(tmp_path: Path) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "W", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"W": {"id": "W", "ids": [54], "tokens": ["W"]}},
    }
    assert encode(DEFAULT_PROMPT, tokenizer_with(tmp_path, post_processor=template)) == WHAT_IS


def test_padding_that_a_fine_tune_left_behind_adds_nothing(tmp_path: Path) -> None:
    padding = {
        "strategy": {"Fixed": 20},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    assert encode(DEFAULT_PROMPT, tokenizer_with(tmp_path, padding=padding)) == WHAT_IS


def test_truncation_that_a_fine_tune_left_behind_drops_nothing(tmp_path: Path) -> None:
    truncation = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    assert encode(DEFAULT_PROMPT, tokenizer_with(tmp_path, truncation=truncation)) == WHAT_IS


# --- tokenizers that are none ---------------------------------------------------------------------


def test_without_a_tokenizer_the_way_out_is_named(tmp_path: Path) -> None:
    message = refusal_of_prompt("a", tmp_path)
    assert f"{tmp_path / 'tokenizer.json'}" in message
    assert "--tokens" in message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"not json",
        b"\xff\xfe\0",
        b'{"a":' * 100_000,
        (BUNDLED / "tokenizer.json").read_bytes()[:-1],
        (BUNDLED / "tokenizer.json").read_bytes()[:2000],
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    message = refusal_of_prompt("a", tmp_path)
    assert f"{path}" in message
    assert "tokenizer" in message


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BROKEN: dict[str, dict[str, Any]] = {
    "unknown version": {"version": "9"},
    "no model": {"model": None},
    "model of an unknown type": {"model": {"type": "Magic"}},
    "a merge of words unknown": {"model": TOKENIZER["model"] | {"vocab": {}}},
    "a negative id": {"model": TOKENIZER["model"] | {"vocab": {"a": -1}, "merges": []}},
    "a fractional id": {"model": TOKENIZER["model"] | {"vocab": {"a": 0.5}, "merges": []}},
    "merges of another kind": {"model": TOKENIZER["model"] | {"merges": ["a", "b"]}},
    "an expression that does not parse": {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "((("}}},
    "an unknown normalizer": {"normalizer": {"type": "NFX"}},
    "words without an unknown word": {
        "model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "none"}
    },
    "a charsmap that is no charsmap": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    },
    "an expression that gives up": {"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(a+)+$"}}},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_tokenizer_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = tokenizer_with(tmp_path, **changes)
    prompt = "a" * 28 + "b"
    assert f"{tmp_path / 'tokenizer.json'}" in refusal_of_prompt(prompt, directory)


def test_a_tokenizer_that_knows_nothing_of_the_prompt_gives_no_tokens(tmp_path: Path) -> None:
    nothing = TOKENIZER["model"] | {"vocab": {}, "merges": []}
    assert encode("a", tokenizer_with(tmp_path, model=nothing)) == []


def test_ids_of_a_tokenizer_for_another_checkpoint_are_out_of_range(tmp_path: Path) -> None:
    vocab = {word: number + 1_000_000 for word, number in TOKENIZER["model"]["vocab"].items()}
    ids = encode("a", tokenizer_with(tmp_path, model=TOKENIZER["model"] | {"vocab": vocab}))
    with pytest.raises(QwenrefError, match="token id 1000097 is out of range"):
        check_tokens(ids, 320)


def test_something_in_place_of_a_tokenizer_is_refused_at_once(
    tmp_path: Path, make_fifo: Callable[[Path], None]
) -> None:
    path = tmp_path / "tokenizer.json"
    make_fifo(path)
    assert f"{path}" in refusal_of_prompt("a", tmp_path)
    path.unlink()
    path.mkdir()
    assert f"{path}" in refusal_of_prompt("a", tmp_path)
    path.rmdir()
    path.symlink_to("nowhere")
    assert f"{path}" in refusal_of_prompt("a", tmp_path)


def test_a_tokenizer_behind_a_link_is_read(tmp_path: Path) -> None:
    shutil.copyfile(BUNDLED / "tokenizer.json", tmp_path / "0a1b2c")
    (tmp_path / "tokenizer.json").symlink_to("0a1b2c")
    assert encode(DEFAULT_PROMPT, tmp_path) == WHAT_IS


def test_a_huge_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.touch()
    os.truncate(path, TOKENIZER_LIMIT + 1)
    assert "larger than" in refusal_of_prompt("a", tmp_path)
