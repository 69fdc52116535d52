"""Write the JSON Schemas of what qwenref writes into contracts/, from the code that checks it.

python scripts/write_schemas.py
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from qwenref.dumps.manifest import Manifest
from qwenref.judge.measurement import Measurement
from qwenref.judge.result import Result, StageDiff
from qwenref.trial.explanation import Explanation, LayersExplanation

TYPES = {
    "manifest-v1": Manifest,
    "diff-v1": Result,
    "stage-diff-v1": StageDiff,
    "measurement-v1": Measurement,
    "explain-v1": Explanation,
    "explain-layers-v1": LayersExplanation,
}
CONTRACTS = Path(__file__).resolve().parents[1] / "contracts"


def schemas() -> dict[str, str]:
    """Return the text of each schema file, by name."""
    return {f"{name}.schema.json": _schema(type_) for name, type_ in TYPES.items()}


def _schema(type_: type) -> str:
    schema: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    schema |= msgspec.json.schema(type_)
    for definition in schema["$defs"].values():
        definition["description"] = definition["description"].splitlines()[0]
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    for name, text in schemas().items():
        (CONTRACTS / name).write_text(text, encoding="utf-8")
