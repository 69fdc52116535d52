"""Write the JSON Schemas of what qwenref writes into contracts/, from the code that checks it.

python scripts/write_schemas.py
"""

import json
from pathlib import Path
from typing import Any

import msgspec

from qwenref.dumps.manifest import Manifest

CONTRACTS = Path(__file__).resolve().parents[1] / "contracts"


def schemas() -> dict[str, str]:
    """Return the text of each schema file, by name."""
    schema: dict[str, Any] = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    schema |= msgspec.json.schema(Manifest)
    for definition in schema["$defs"].values():
        definition["description"] = definition["description"].splitlines()[0]
    return {"manifest-v1.schema.json": json.dumps(schema, indent=2) + "\n"}


if __name__ == "__main__":
    for name, text in schemas().items():
        (CONTRACTS / name).write_text(text, encoding="utf-8")
