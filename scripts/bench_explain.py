"""Time and peak memory of `qwenref explain` as a process, beside those of `qwenref capture`.

    python scripts/bench_explain.py MODEL --tokens 7 --repeats 9

Explained are qwenref's own dumps, computed in float32 and in bfloat16; and those with noise of 2 %
in attn_norm, which is what takes longest: no mistake explains it, and the embedding table is
searched for the tokens that would. JAX's compilation cache is warm, unless it is to compile. Runs
alternate, so that a change of the machine's mood hits all of them; the first of each is not
counted. Figures are medians.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from bench_capture import Measured, measure

import qwenref


def main() -> None:
    """Make the dumps, measure, print."""
    parser = argparse.ArgumentParser(description="Time and peak memory of qwenref explain.")
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("--tokens", type=int, default=7, help="length of the prompt")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cold", action="store_true", help="compile every time")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if not asked.cold:
            os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{scratch}/compiled"
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        ids = Path(scratch) / "ids"
        ids.write_text(str([token % 300 for token in range(asked.tokens)]))
        capture = ["capture", "-q", "--force", "--model", asked.model, "--tokens", f"@{ids}", "-o"]
        commands = {
            "capture --no-noise": [*capture, f"{scratch}/other", "--no-noise"],
            "capture": [*capture, f"{scratch}/other"],
        }
        for dtype in ("float32", "bfloat16"):
            measure([*capture, f"{scratch}/{dtype}", "--no-noise", "--dtype", dtype])
            explain = ["explain", "-q", "--model", asked.model, "--tokens", f"@{ids}"]
            commands[f"explain, {dtype}"] = [*explain, f"{scratch}/{dtype}"]
            if dtype == "bfloat16":
                commands["... --quick"] = [*explain, f"{scratch}/{dtype}", "--quick"]
            spoil(Path(scratch) / dtype, Path(scratch) / f"wrong-{dtype}", dtype)
            commands[f"a fault, {dtype}"] = [*explain, f"{scratch}/wrong-{dtype}"]
        runs: dict[str, list[Measured]] = {name: [] for name in commands}
        for _ in range(asked.repeats + 1):
            for name, command in commands.items():
                runs[name].append(measure(command, status=int(name.startswith("a fault"))))
    base = [run.seconds for run in runs["capture --no-noise"][1:]]
    print("                      seconds (min to max)   times (min to max)     peak MB")
    for name, (_, *warm) in runs.items():
        seconds = [run.seconds for run in warm]
        times = [mine / its for mine, its in zip(seconds, base, strict=True)]
        peak = statistics.median(run.bytes for run in warm) / 1e6
        print(f"{name:20}  {spread(seconds):21}  {spread(times):21}  {peak:7.0f}")


def spoil(dump: Path, wrong: Path, dtype: str) -> None:
    """Copy a dump, with noise in one stage."""
    shutil.copytree(dump, wrong)
    (wrong / "manifest.json").unlink()
    file = wrong / "layer-0" / "attn_norm.bin"
    found = qwenref.read_aprt(file)
    noise = 0.02 * np.random.default_rng(0).standard_normal(found.values.shape)
    values = found.values * (1 + noise)
    file.unlink()
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    qwenref.write_aprt(file, found.layer, values.astype(narrow).astype(np.float32))


def spread(values: list[float]) -> str:
    """Return the median, the least and the most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
