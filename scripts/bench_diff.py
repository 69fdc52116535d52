"""Time and peak memory of `qwenref diff` as a process, beside `cmp` and the bare interpreter.

    python scripts/bench_diff.py --megabytes 64 1024 --repeats 5

Compares files of random values that differ everywhere, of unknown shape and as scores of 28 heads,
with `cmp` on two equal copies; and nine stages of seven tokens with importing typer and numpy. Runs
alternate; figures are medians, and smallest to largest.
"""

import argparse
import math
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qwenref.dumps.aprt import write_aprt
from qwenref.judge.arrangement import heads_and_width
from qwenref.stages import ATTENTION

PEAK = """
import pathlib, re, sys
try:
    {}
finally:
    status = pathlib.Path("/proc/self/status").read_text()
    print(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1], file=sys.stderr)
"""
"""Prints its own peak: what the system counts for a child includes the parent before exec."""

DIFF = [sys.executable, "-c", PEAK.format("from qwenref.cli import main; main()"), "diff", "-q"]
BARE = [sys.executable, "-c", PEAK.format("import typer, numpy")]
SIZES = {"N": 28, "K": 4, "H": 128, "D": 3584}
FLAGS = ["--heads", "28", "--kv-heads", "4", "--head-dim", "128", "--hidden", "3584"]


class Measured(NamedTuple):
    """One process; memory is 0 if it does not tell."""

    seconds: float
    cpu: float
    megabytes: float


def measure(command: Sequence[str]) -> Measured:
    """Run a command, which may say that files differ."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode > 1:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(seconds, cpu, int(done.stderr or 0) / 1024)


def write(path: Path, count: int, seed: int) -> None:
    """Write random values, a slightly different one each in files of other seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).standard_normal(count, dtype=np.float32)
    write_aprt(path, 0, values * np.float32(1 + 1e-6 * seed))


def commands(folder: Path, megabytes: Sequence[int]) -> dict[str, list[str]]:
    """Return what to measure, having written the files."""
    found = {"import typer, numpy": BARE}
    for stage in ATTENTION:
        count = 7 * math.prod(heads_and_width(stage, SIZES, 7))
        for name, seed in (("a", 0), ("b", 1)):
            write(folder / name / "layer-0" / f"{stage.name}.bin", count, seed)
    found["nine stages, 7 tokens"] = [*DIFF, f"{folder}/a", f"{folder}/b", *FLAGS]
    for size in megabytes:
        T = math.isqrt(size * (1 << 20) // 4 // SIZES["N"])
        of = folder / str(size)
        for name, seed in (("a", 0), ("b", 1)):
            write(of / name / "made_up.bin", size * (1 << 20) // 4 - 3, seed)
            write(of / name / "attn_scores.bin", SIZES["N"] * T * T, seed)
        shutil.copy(of / "a" / "made_up.bin", of / "copy.bin")
        found[f"cmp, {size} MiB"] = ["cmp", f"{of}/a/made_up.bin", f"{of}/copy.bin"]
        pair = [f"{of}/{name}/made_up.bin" for name in "ab"]
        found[f"unknown shape, {size} MiB"] = [*DIFF, *pair]
        pair = [f"{of}/{name}/attn_scores.bin" for name in "ab"]
        found[f"attn_scores, {size} MiB"] = [*DIFF, *pair, *FLAGS]
    return found


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="Time and peak memory of qwenref diff.")
    parser.add_argument("--megabytes", type=int, nargs="*", default=[64, 1024])
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cases = commands(Path(scratch), asked.megabytes)
        runs = {name: [measure(command)] for name, command in cases.items()}  # caches the files
        for _ in range(asked.repeats):
            for name, command in cases.items():
                runs[name].append(measure(command))
    print(f"{'':28}{'seconds':>22}{'CPU':>7}{'MB':>6}")
    for name, (_, *found) in runs.items():
        seconds, cpu, megabytes = zip(*found, strict=True)
        spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        numbers = f"{statistics.median(cpu):7.2f}{statistics.median(megabytes):6.0f}"
        print(f"{name:28}{spread:>22}{numbers}")


if __name__ == "__main__":
    main()
