"""What tests of judging share: dumps of many engines, of the same prompt and weights."""

import pytest
from engines import DATA, Dumps, captured_from_hf
from helpers import TINY

from qwenref.capture import capture
from qwenref.judge.floors import PRECISIONS


@pytest.fixture(scope="session")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Dumps:
    """Ours, those of transformers in three dtypes and two layouts, and all of tests/data."""
    folder = tmp_path_factory.mktemp("engines")
    capture(TINY, folder / "ours")
    for dtype in PRECISIONS:
        for layout in ("apr", "hf"):
            captured_from_hf(folder / f"hf-{dtype}-{layout}", dtype=dtype, layout=layout)
    return {path.name: path for path in (*folder.iterdir(), *DATA.iterdir())}
