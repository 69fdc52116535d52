"""The prompt as token ids: from text through the checkpoint's tokenizer, or given as numbers."""

from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as short

import msgspec

from qwenref.errors import QwenrefError
from qwenref.files import read_bounded

DEFAULT_PROMPT = "What is 2+2?"
"""The only prompt that `apr trace` knows."""

LIMIT = 1 << 24
"""Bytes of a file of token ids: a million of them."""

TOKENIZER_LIMIT = 1 << 28
"""Bytes of tokenizer.json; Qwen2.5's has 7 million."""


def encode(prompt: str, directory: Path) -> list[int]:
    """Return the ids of a text: no template, no BOS, nothing added.

    Args:
        prompt: The text. Special tokens that it spells out, like ``<|im_start|>``, become one id.
        directory: Where the checkpoint's tokenizer.json lies.

    Raises:
        QwenrefError: There is no usable tokenizer.json, or the text is not Unicode.
    """
    from tokenizers import Tokenizer  # needs 50 ms, and not for ids given as numbers

    path = directory / "tokenizer.json"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise QwenrefError(f"the prompt {short(prompt)} is not valid Unicode text") from None
    try:
        content = read_bounded(path, TOKENIZER_LIMIT)
    except QwenrefError as error:
        raise QwenrefError(f"{error}; give token ids with --tokens instead") from error
    try:
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_padding()  # what a fine-tune left behind would add and drop tokens
        tokenizer.no_truncation()
        return tokenizer.encode(prompt, add_special_tokens=False).ids
    except BaseException as error:  # a panic in the library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise QwenrefError(f"{path} is not a usable tokenizer: {error}") from error


def parse_tokens(spec: str) -> list[int]:
    """Return the token ids that `--tokens` gives.

    Args:
        spec: Numbers separated by commas or white space, or a JSON list of them; or ``@FILE``,
            a file that holds either.

    Raises:
        QwenrefError: The file cannot be read, there are no ids, or one is no number.
    """
    where = "--tokens"
    if spec.startswith("@"):
        where = spec[1:]
        try:
            spec = read_bounded(Path(where), LIMIT).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise QwenrefError(f"{where} is not a text file of token ids") from error
    try:
        if spec.lstrip().startswith("["):
            tokens = msgspec.json.decode(spec, type=list[int])
        else:
            tokens = [_id(word) for word in spec.replace(",", " ").split()]
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise QwenrefError(f"{where}: no list of token ids: {error}") from error
    if not tokens:
        raise QwenrefError(f"{where} holds no token ids")
    return tokens


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raise `QwenrefError` if there are no tokens, or one is no row of the embedding table."""
    if not len(tokens):
        raise QwenrefError("the prompt is empty: it has no tokens")
    outside = [token for token in tokens if not 0 <= token < vocab_size]
    if outside:
        raise QwenrefError(
            f"token id {short(outside[0])} is out of range: "
            f"this checkpoint has ids 0 to {vocab_size - 1}"
        )


def _id(word: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) <= 10):
        raise ValueError(f"{short(word)} is not a whole number from 0 on")
    return int(word)
