"""Write docs/faults.md: every mistake that `qwenref explain` knows, as the code has it.

python scripts/write_faults.py
"""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from qwenref.mistakes.anywhere import STAGES
from qwenref.mistakes.catalogue import MISTAKES
from qwenref.mistakes.mistake import Mistake
from qwenref.mistakes.seen import SEEN

PAGE = Path(__file__).resolve().parents[1] / "docs" / "faults.md"

SMALLEST = PAGE.parent / "smallest.json"

SMALLEST_HEAD = """## The smallest that is seen

By `python scripts/measure_smallest.py`, planted in the first model of `qwenref selftest`, 84 wide.
Of the first table x is given, in steps of a third of a decade: all that are larger are seen too.
Below 4 floors of the engine's precision nothing is seen but what the matched filter knows, which is
in the second table.
"""

SMALLEST_TAIL = """`seen`: larger than the noise. `hidden`: below it, and proven by the matched
filter. `no`: it cannot be seen with so few tokens, or does less than 4 float32 floors."""

HEAD = """# Mistakes that `qwenref explain` names

Each is one stage computed otherwise, and is executed on what an engine dumped itself: that which
reproduces the stage is the cause. Of a family (`{}` in its text) the value is found too. How it is
decided: [explain.md](explain.md). This page is made by `python scripts/write_faults.py`.
"""


def faults() -> str:
    """Return the page."""
    lines = [HEAD]
    for stages, group in groupby(MISTAKES, key=_where):
        lines += [f"## {stages}", "", "| mistake | what it is | computed instead | how it shows |"]
        lines += ["|---|---|---|---|", *map(_row, group), ""]
    lines += ["## Seen in public", "", "| mistake | reports |", "|---|---|"]
    lines += [
        f"| `{mistake.id}` | {', '.join(map(_link, SEEN[mistake.id]))} |"
        for mistake in MISTAKES
        if mistake.id in SEEN
    ]
    return "\n".join([*lines, "", *_smallest()]) + "\n"


def _smallest() -> Iterator[str]:
    """Yield how small a mistake may be that is seen, as was measured."""
    measured = json.loads(SMALLEST.read_text(encoding="utf-8"))
    tokens = [f"{T} tokens" for T in measured["tokens"]]
    yield SMALLEST_HEAD
    for table in ("smallest", "listed"):
        yield f"| mistake, precision of the engine | {' | '.join(tokens)} |"
        yield "|---" * (len(tokens) + 1) + "|"
        for text, values in measured[table].items():
            yield f"| {text} | {' | '.join(map(_shown, values))} |"
        yield ""
    yield SMALLEST_TAIL


def _shown(value: float | str | None) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else f"{value:.1e}"


def _where(mistake: Mistake) -> str:
    anywhere = mistake.id.startswith("any-")
    return "any stage" if anywhere else ", ".join(mistake.stages)


def _row(mistake: Mistake) -> str:
    text = mistake.text
    where = mistake.stages
    if mistake.id.startswith("any-") and where != STAGES:
        text += f" ({', '.join(where)})"
    cells = (f"`{mistake.id}`", text, f"`{mistake.formula}`", mistake.shows)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _link(url: str) -> str:
    owner, name, _, number = url.removeprefix("https://github.com/").split("/")
    return f"[{owner}/{name}#{number}]({url})"


if __name__ == "__main__":
    PAGE.write_text(faults(), encoding="utf-8")
