"""Time and peak memory of `qwenref capture` as a process, for prompts of several lengths.

    python scripts/bench_capture.py MODEL --tokens 7 3000 --stages attn_out --pieces 2 3 4

Without the noise floor. Runs alternate, so that a change of the machine's mood hits all of them;
figures are medians.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

COMMAND = """
import pathlib, re, sys
from qwenref import chain
from qwenref.cli import main
chain.PIECE_BYTES = int(sys.argv.pop(1)) or chain.PIECE_BYTES
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
"""
"""Prints its own peak: what the system counts for a child includes the parent before exec."""


class Measured(NamedTuple):
    """One process: wall clock and peak resident memory."""

    seconds: float
    bytes: int


def measure(arguments: Sequence[str], piece: int = 0, status: int = 0) -> Measured:
    """Run ``qwenref`` with these arguments; `piece` replaces `PIECE_BYTES`.

    Raises:
        subprocess.CalledProcessError: It ended with another exit status.
    """
    command = [sys.executable, "-c", COMMAND, str(piece), *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != status:
        done.check_returncode()
    return Measured(time.perf_counter() - start, int(done.stdout.split()[-1]) * 1024)


def main() -> None:
    """Measure every combination of what is asked for."""
    parser = argparse.ArgumentParser(description="Time and peak memory of qwenref capture.")
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("--tokens", type=int, nargs="+", default=[7], help="lengths of prompts")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--stages", nargs="+", default=["all"])
    parser.add_argument("--pieces", type=int, nargs="+", default=[0], help="MiB; 0: as released")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    cases = list(itertools.product(asked.tokens, asked.dtype, asked.stages, asked.pieces))
    found: dict[tuple, list[Measured]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "ids"
        for _, case in itertools.product(range(asked.repeats), cases):
            T, dtype, stages, piece = case
            ids.write_text(str([token % 300 for token in range(T)]))
            options = ["capture", "-q", "--model", asked.model, "--tokens", f"@{ids}"]
            options += ["--stages", stages, "--dtype", dtype]
            options += ["-o", f"{scratch}/dump", "--force", "--no-noise"]
            found[case].append(measure(options, piece << 20))
    print("tokens  dtype    stages    MiB  seconds (min to max)   peak MB")
    for (T, dtype, stages, piece), runs in found.items():
        seconds = [run.seconds for run in runs]
        spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        peak = statistics.median(run.bytes for run in runs) / 1e6
        print(f"{T:6}  {dtype:7}  {stages:8}  {piece:3}  {spread:21}  {peak:7.0f}")


if __name__ == "__main__":
    main()
