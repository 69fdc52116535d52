"""Reading small files of unknown origin."""

from pathlib import Path

from qwenref.errors import QwenrefError


def read_bounded(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        QwenrefError: The file is missing, not a regular file, unreadable, or larger than `limit`.
    """
    try:
        if not path.is_file():
            found = "is not a regular file" if path.exists() else "does not exist"
            raise QwenrefError(f"{path} {found}")
        with path.open("rb") as file:
            content = file.read(min(limit, path.stat().st_size) + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise QwenrefError(f"cannot read {path}: {reason(error)}") from error
    if len(content) > limit:
        raise QwenrefError(f"{path} is larger than {limit} bytes, the most this kind of file needs")
    return content


def reason(error: Exception) -> str:
    """Return what the operating system says, without the path that the caller already names."""
    return getattr(error, "strerror", None) or str(error)
