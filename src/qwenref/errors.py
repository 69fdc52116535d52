"""The one error that a user can mend."""


def printable(text: str) -> str:
    r"""Return `text` on one line, with control characters escaped (a newline becomes ``\n``).

    Names from files of unknown origin end up in messages; none of them may start a new line or
    steer the terminal.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


class QwenrefError(Exception):
    """What is wrong, what was found, and what to do about it, in one line.

    The command line prints it and exits with status 2; it never shows a traceback for one.
    """

    LIMIT = 2000
    """Characters shown: names from files of unknown origin may be megabytes long."""

    def __str__(self) -> str:
        text = super().__str__()
        return printable(text if len(text) <= self.LIMIT else f"{text[: self.LIMIT]}...")
