"""Places for dumps."""

from pathlib import Path

import pytest
from small_dumps import make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def old(out: Path) -> Path:
    """A dump of two stages, one of which no test writes again."""
    make(out, "attn_norm", "attn_out", value=-1)
    return out
