"""Time and memory of the commands, beside those of others who do the same work, in one table.

    python scripts/bench.py                        two minutes: a 0.5B shape, files of 256 MB
    python scripts/bench.py --full                 the table of docs/benchmarks.md: 7B, 15 GB
    python scripts/bench.py --only diff --repeats 9 --json

Checkpoints and dumps of random values are made first, in a temporary folder (TMPDIR). Contenders
are whole processes, which take turns, so that a change of the machine's mood hits all of them; the
first round is not counted: it fills caches. Of a line the first contender is what the others are
compared with, run by run: "times" is how many times as long each took. `apr` takes part if it is on
PATH.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
from measured import Measured, forget, measure

import qwenref
from qwenref.dumps.aprt import AprtWriter, read_aprt, write_aprt
from qwenref.model.random_checkpoint import FAMILY, write
from qwenref.stages import ATTENTION

SCRIPTS = Path(__file__).parent
QWENREF = [sys.executable, "-m", "qwenref"]
HF = [sys.executable, str(SCRIPTS / "capture_hf.py")]
HEADER = "| | seconds | times | peak MB | MB read | MB loaded |\n|---|---|---|---|---|---|"
NO_CACHE = {"QWENREF_CACHE": "off"}


@dataclass(frozen=True)
class Contender:
    """A command, its exit status, environment, and files to be loaded from disk each time."""

    command: Sequence[str]
    status: int = 0
    env: dict[str, str] = field(default_factory=dict)
    uncached: Sequence[Path] = ()


@dataclass(frozen=True)
class Work:
    """What several contenders do; the first is what the others are compared with."""

    name: str
    contenders: dict[str, Contender]
    repeats: int | None = None


def python(code: str) -> Contender:
    """Return a contender that runs some Python."""
    return Contender([sys.executable, "-c", code])


class Shape:
    """A random checkpoint of a published shape, and commands on it."""

    def __init__(self, scratch: Path, name: str):
        self.name, self.scratch = name, scratch
        self.model = scratch / name
        if not self.model.exists():
            write(self.model, FAMILY[name])

    def one_layer(self) -> Path:
        """Return the same with one layer only."""
        model = self.scratch / f"{self.name}-one-layer"
        if not model.exists():
            write(model, replace(FAMILY[self.name], num_hidden_layers=1))
        return model

    def ids(self, T: int) -> str:
        """Return tokens for the command line."""
        path = self.scratch / f"ids-{T}"
        path.write_text(str([token % 300 for token in range(T)]))
        return f"@{path}"

    def capture(self, T: int, *options: str, env: dict[str, str] | None = None) -> Contender:
        """Return our capture."""
        output = ["-q", "--force", "-o", str(self.scratch / "ours")]
        given = ["--model", str(self.model), "--tokens", self.ids(T), *output, *options]
        return Contender([*QWENREF, "capture", *given], env=env or {})

    def hf(self, T: int, dtype: str, *options: str, model: Path | None = None) -> Contender:
        """Return that of transformers."""
        given = ["--model", str(model or self.model), "--tokens", self.ids(T), "--dtype", dtype]
        return Contender([*HF, *given, "--force", "-o", str(self.scratch / "theirs"), *options])

    def floor(self, T: int, *, products: bool = False) -> Contender:
        """Return the least that it could take."""
        folder = [str(self.scratch / "floor")] if products else []
        return Contender([sys.executable, f"{SCRIPTS}/floor.py", str(self.model), str(T), *folder])


def captures(scratch: Path, full: bool) -> Iterator[Work]:
    """Short prompts, beside transformers, apr and what importing takes."""
    shape, T = Shape(scratch, "7b" if full else "0.5b"), 7
    contenders = {
        "capture --no-noise": shape.capture(T, "--no-noise"),
        "capture": shape.capture(T),
        "capture --no-noise, compiling": shape.capture(T, "--no-noise", env=NO_CACHE),
        "capture, compiling": shape.capture(T, env=NO_CACHE),
        "import jax, flax.nnx": python("import jax, flax.nnx"),
        "imports, one compilation, weights read": shape.floor(T),
        "transformers, one layer": shape.hf(T, "float16", model=shape.one_layer()),
    }
    if full:
        contenders["transformers, all layers"] = shape.hf(T, "float16")
    yield Work(f"{shape.name} shape, layer 0 of {T} tokens, float32 (others: float16)", contenders)
    if shutil.which("apr"):
        yield from beside_apr(Shape(scratch, "0.5b"))


def beside_apr(shape: Shape) -> Iterator[Work]:
    """`apr trace` of the same layer; apr has one prompt, of 12 tokens."""
    file = shape.scratch / "0.5b.apr"
    given = ["import", str(shape.model), "--arch", "qwen2", "-o", str(file)]
    measure(["apr", *given])
    dump = ["--save-tensor", "all", "--save-tensor-layers", "0..1"]
    trace = Contender(["apr", "trace", str(file), *dump, "--save-tensor-dir", f"{file}-dump"])
    ours = {"capture": shape.capture(12), "capture --no-noise": shape.capture(12, "--no-noise")}
    yield Work("0.5b shape, 12 tokens", {**ours, "apr trace": trace})


def long_prompts(scratch: Path, full: bool) -> Iterator[Work]:
    """Long prompts, of which most is scores and writing them."""
    small, T = Shape(scratch, "0.5b"), 2048 if full else 512
    contenders = {
        "capture --no-noise": small.capture(T, "--no-noise"),
        "capture --no-noise, compiling": small.capture(T, "--no-noise", env=NO_CACHE),
        "NumPy: imports, products, writing": small.floor(T, products=True),
    }
    if full:
        contenders["transformers, all layers"] = small.hf(T, "float32")
    contenders["transformers, one layer"] = small.hf(T, "float32", model=small.one_layer())
    yield Work(f"0.5b shape, nine stages of {T} tokens, float32", contenders)
    if full:
        large, T = Shape(scratch, "7b"), 8192
        alone = large.capture(T, "--no-noise", "--stages", "attn_out")
        whole = large.capture(T, "--no-noise")
        yield Work(f"7b shape, {T} tokens", {"attn_out alone": alone, "nine stages": whole}, 1)


def whole_models(scratch: Path, full: bool) -> Iterator[Work]:
    """Every stage of every layer."""
    small, T, everything = Shape(scratch, "0.5b"), 7, ("--layers", "all", "--stages", "all")
    contenders = {
        "capture --no-noise": small.capture(T, "--no-noise", *everything),
        "capture --no-noise, compiling": small.capture(T, "--no-noise", *everything, env=NO_CACHE),
        "capture": small.capture(T, *everything),
        "transformers": small.hf(T, "float32", *everything),
    }
    yield Work(f"0.5b shape, all stages of {T} tokens, float32", contenders)
    if full:
        large = Shape(scratch, "7b")
        files = tuple(sorted(large.model.glob("*.safetensors")))
        ours = large.capture(T, "--no-noise", *everything, env=NO_CACHE)
        ours = replace(ours, uncached=files)
        contenders = {
            "cat": Contender(["cat", *map(str, files)], uncached=files),
            "capture --no-noise, compiling": ours,
        }
        yield Work(f"7b shape, all stages of {T} tokens, float32, files not cached", contenders)


def diffs(scratch: Path, full: bool) -> Iterator[Work]:
    """Comparing files."""
    for stage in ATTENTION:
        for name, factor in (("a", 1.0), ("b", 2.0)):
            path = scratch / "small" / name / "layer-0" / f"{stage.name}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(0)
            write_aprt(path, 0, rng.standard_normal(10_000, np.float32) * np.float32(factor))
    pair = [str(scratch / "small" / name) for name in "ab"]
    yield Work(
        "nine small files",
        {
            "import typer, numpy": python("import typer, numpy"),
            "diff": Contender([*QWENREF, "diff", "-q", *pair], 1),
            "import typer": python("import typer"),
            "qwenref --help": Contender([*QWENREF, "--help"]),
        },
    )
    size = 2000 if full else 256
    a, b = differing(scratch / "cached", size)
    copy = shutil.copy(a, scratch / "cached" / "copy.bin")
    contenders = {
        "cmp of equal ones": Contender(["cmp", str(a), str(copy)]),
        "diff": Contender([*QWENREF, "diff", "-q", str(a), str(b)], 1),
    }
    yield Work(f"two files of {size} MB that differ everywhere, cached", contenders)
    shutil.rmtree(scratch / "cached")
    size = 15_000 if full else 256
    a, b = differing(scratch / "uncached", size)
    contenders = {
        "cat": Contender(["cat", str(a), str(b)], uncached=(a, b)),
        "diff": Contender([*QWENREF, "diff", "-q", str(a), str(b)], 1, uncached=(a, b)),
    }
    yield Work(f"two files of {size} MB that differ everywhere, not cached", contenders)
    shutil.rmtree(scratch / "uncached")


def differing(folder: Path, megabytes: int) -> tuple[Path, Path]:
    """Write two files of random values that differ everywhere."""
    a, b = (folder / name / "made_up.bin" for name in "ab")
    rng, count, block = np.random.default_rng(0), megabytes * 1_000_000 // 4, 1 << 22
    for path in (a, b):
        path.parent.mkdir(parents=True)
    with AprtWriter(a, 0, count) as first, AprtWriter(b, 0, count) as second:
        for start in range(0, count, block):
            values = rng.standard_normal(min(block, count - start), np.float32)
            first.write(start, values)
            second.write(start, values * np.float32(2))
    return a, b


def explanations(scratch: Path, full: bool) -> Iterator[Work]:
    """Explaining our own dumps, and what takes longest: noise, which no mistake explains."""
    shape, T = Shape(scratch, "7b" if full else "0.5b"), 7
    contenders = {"capture --no-noise": shape.capture(T, "--no-noise")}
    for dtype in ("float32", "bfloat16"):
        dump, wrong = scratch / f"dump-{dtype}", scratch / f"wrong-{dtype}"
        measure([*shape.capture(T, "--no-noise", "--dtype", dtype).command, "-o", str(dump)])
        spoil(dump, wrong, dtype)
        given = [*QWENREF, "explain", "-q", "--model", str(shape.model), "--tokens", shape.ids(T)]
        contenders[f"explain, {dtype}"] = Contender([*given, str(dump)])
        contenders[f"explain --quick, {dtype}"] = Contender([*given, "--quick", str(dump)])
        contenders[f"explain a fault, {dtype}"] = Contender([*given, str(wrong)], 1)
    yield Work(f"{shape.name} shape, {T} tokens, explained", contenders)


def spoil(dump: Path, wrong: Path, dtype: str) -> None:
    """Copy a dump, with noise in one stage."""
    shutil.copytree(dump, wrong)
    (wrong / "manifest.json").unlink()
    file = wrong / "layer-0" / "attn_norm.bin"
    found = read_aprt(file)
    noise = 0.02 * np.random.default_rng(0).standard_normal(found.values.shape)
    narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    file.unlink()
    write_aprt(file, found.layer, (found.values * (1 + noise)).astype(narrow).astype(np.float32))


GROUPS: dict[str, Callable[[Path, bool], Iterator[Work]]] = {
    "capture": captures,
    "long": long_prompts,
    "model": whole_models,
    "diff": diffs,
    "explain": explanations,
}


def runs_of(work: Work, repeats: int) -> dict[str, list[Measured]]:
    """Let the contenders take turns; the first round, which fills caches, is not counted.

    The last of a line begins: transformers takes so much memory that files are cached no more.
    """
    found: dict[str, list[Measured]] = {name: [] for name in work.contenders}
    for turn in range((work.repeats or repeats) + 1):
        for name, of in reversed(work.contenders.items()):
            forget(*of.uncached)
            run = measure(of.command, status=of.status, env=of.env)
            if turn:
                found[name].append(run)
    return found


def table(work: Work, found: dict[str, list[Measured]]) -> str:
    """Return a table in Markdown."""
    base = next(iter(found.values()))
    return "\n".join(["", work.name, "", HEADER, *(line(*of, base) for of in found.items())])


def line(name: str, runs: Sequence[Measured], base: Sequence[Measured]) -> str:
    """Return a line of the table."""
    times = [run.seconds / other.seconds for run, other in zip(runs, base, strict=True)]
    peak, read, loaded = (
        statistics.median(getattr(run, what) for run in runs) / 1e6
        for what in ("peak", "read", "loaded")
    )
    seconds = spread([run.seconds for run in runs])
    return f"| {name} | {seconds} | {spread(times)} | {peak:.0f} | {read:.0f} | {loaded:.0f} |"


def spread(values: Sequence[float]) -> str:
    """Return the median, the least and the most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description="Time and memory of qwenref, beside others.")
    parser.add_argument("--full", action="store_true", help="large shapes: an hour, 55 GB of disk")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=[*GROUPS])
    parser.add_argument("--repeats", type=int, default=0, help="default 2, with --full 5")
    parser.add_argument("--json", action="store_true", help="every run, as JSON")
    asked = parser.parse_args()
    packages = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")
    versions = {"qwenref": qwenref.__version__} | {name: version(name) for name in packages}
    results = []
    if not asked.json:
        print(", ".join(f"{name} {number}" for name, number in versions.items()))
    with tempfile.TemporaryDirectory() as scratch:
        for group in asked.only:
            for work in GROUPS[group](Path(scratch), asked.full):
                found = runs_of(work, asked.repeats or (5 if asked.full else 2))
                runs = {name: [run._asdict() for run in of] for name, of in found.items()}
                results.append({"work": work.name, "runs": runs})
                if not asked.json:
                    print(table(work, found), flush=True)
    if asked.json:
        print(json.dumps({"versions": versions, "results": results}, indent=2))


if __name__ == "__main__":
    main()
