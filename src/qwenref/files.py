"""Reading small files of unknown origin."""

import os
from pathlib import Path
from types import GenericAlias
from typing import TypeVar

import msgspec

from qwenref.errors import QwenrefError

Parsed = TypeVar("Parsed")


def require_regular(path: Path) -> None:
    """Raise `QwenrefError` unless `path` is a regular file, or a link to one."""
    if not path.is_file():
        found = "is not a regular file" if path.exists() else "does not exist"
        raise QwenrefError(f"{path} {found}")


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        QwenrefError: The file is missing, not a regular file, unreadable, or larger than `limit`.
    """
    try:
        require_regular(path)
        with path.open("rb") as file:
            content = file.read(min(limit, path.stat().st_size) + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise QwenrefError(f"cannot read {path}: {reason(error)}") from error
    if len(content) > limit:
        raise QwenrefError(f"{path} is larger than {limit} bytes, the most this kind of file needs")
    return content


def parse_json(path: Path, content: bytes, type_: type[Parsed] | GenericAlias) -> Parsed:
    """Return the content of a JSON file as `type_`, which it must match.

    Raises:
        QwenrefError: It is no JSON, or not of that type; the message names the place.
    """
    try:
        return msgspec.json.decode(content, type=type_)
    except msgspec.ValidationError as error:
        raise QwenrefError(f"{path}: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise QwenrefError(f"{path} is not JSON: {error}") from error


def reason(error: Exception) -> str:
    """Return what the operating system says, without the path that the caller already names."""
    return getattr(error, "strerror", None) or str(error)


def write_whole(path: Path, content: bytes) -> None:
    """Write a regular file, or replace it: built aside and renamed, so that it is never half there.

    Raises:
        QwenrefError: It cannot be written; what was there is left.
    """
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise QwenrefError(f"cannot write {path}: it is not a regular file")
        aside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            aside.write_bytes(content)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise QwenrefError(f"cannot write {path}: {reason(error)}") from error
