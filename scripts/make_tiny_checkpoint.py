"""Write a random Qwen2.5 checkpoint: the bundled one, or one of any published shape.

python scripts/make_tiny_checkpoint.py OUT              tiny-qwen2.5, byte for byte
python scripts/make_tiny_checkpoint.py OUT --like 7b    15 GB in four shards, as published
python scripts/make_tiny_checkpoint.py OUT --like 72b --layers-written 1
"""

import argparse
from pathlib import Path

from qwenref.model.random_checkpoint import FAMILY, STORED, TINY, write


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description="Write a random Qwen2.5 checkpoint.")
    parser.add_argument("directory", type=Path, help="where to write")
    parser.add_argument("--like", choices=FAMILY, help="the shape of a published model")
    parser.add_argument("--layers-written", type=int, help="leave out the layers from this one on")
    parser.add_argument("--dtype", choices=STORED, default=STORED[0], help="of the weights")
    options = parser.parse_args()
    if options.directory.exists() and any(options.directory.iterdir()):
        parser.error(f"{options.directory} is not empty")
    write(
        options.directory,
        FAMILY[options.like] if options.like else TINY,
        dtype=options.dtype,
        layers_written=options.layers_written,
    )
    size = sum(file.stat().st_size for file in options.directory.iterdir())
    print(f"{size / 1e6:,.1f} MB in {options.directory}")


if __name__ == "__main__":
    main()
