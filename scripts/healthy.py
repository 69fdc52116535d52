"""Make healthy dumps of many engines, and count how often `qwenref explain` cries wolf.

    python scripts/healthy.py                 1,000 dumps
    python scripts/healthy.py --only 17       dump number 17 alone, and all that is said of it

All of a dump follows from its number: weights, prompt, how the engine computes, which stages are
written, and how. The engines are those of scripts/honest_engines.py, with what else a right one may
do: round operands of products, each in its own way; make attention in one kernel; obtain qkv_matmul
as output minus bias; round only what it writes.

The verdict must be `agree`; or `incomplete`, if nothing shows the last stages or one is blind.
"""

import argparse
import tempfile
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from honest_engines import NARROW, Array, Habits, HonestEngine, draw_habits, rounded
from safetensors.numpy import load_file, save_file

import qwenref
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.config import Config
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import AttentionWeights, read_attention, read_embedding
from qwenref.stages import ATTENTION, BY_NAME
from qwenref.trial.explanation import Explanation

NAMES = [stage.name for stage in ATTENTION]
VOCABULARY = 320
VERDICTS = ("agree", "incomplete", "false alarm")

MODELS = (
    (Shape(84, 6, 2, 16, 1, VOCABULARY), "bfloat16", True),
    (Shape(84, 6, 2, 16, 1, VOCABULARY), "bfloat16", False),
    (Shape(28, 2, 1, 16, 1, VOCABULARY), "float16", True),
    (Shape(70, 5, 5, 16, 1, VOCABULARY), "float32", False),
    (Shape(97, 5, 1, 16, 1, VOCABULARY, head_dim=26), "float16", True),
    (Shape(130, 10, 2, 16, 1, VOCABULARY, head_dim=22, rope_theta=1e4), "float32", True),
    (Shape(192, 3, 1, 16, 1, VOCABULARY, head_dim=64), "bfloat16", True),
    (Shape(53, 3, 3, 16, 1, VOCABULARY, head_dim=10, rms_norm_eps=1e-5), "float32", True),
)
"""Of checkpoints: shape, what weights are stored in, and whether there are biases."""


SCALES = (
    (1.0, 1.0, (1.0, 3.0, 0.1)),
    (1.0, 1.0, (3.0, 100.0, 0.1)),
    (50.0, 0.5, (100.0, 3.0, 100.0)),
    (1e-3, 3.0, (0.01, 0.01, 0.01)),
)
"""What to multiply the embedding and the projections with; and how large every third bias of q, k
and v gets: Qwen2.5 has K biases of about 100 in some channels.
"""


@cache
def checkpoint_of(folder: Path, number: int, variant: int) -> Checkpoint:
    """Write a checkpoint, once, and open it."""
    (shape, stored, has_biases), (embedding, projections, biases) = MODELS[number], SCALES[variant]
    path = folder / f"model-{number}-{variant}"
    write(path, replace(shape, seed=10 * number + variant), dtype=stored)
    loaded = load_file(path / "model.safetensors").items()
    tensors = {name: x for name, x in loaded if has_biases or not name.endswith(".bias")}
    rng = np.random.default_rng([number, variant])
    for name in [*tensors]:
        values = tensors[name].astype(np.float32)
        if "embed_tokens" in name:
            values *= embedding
        if name.endswith("_proj.weight"):
            values *= projections
        if name.endswith(".bias"):
            large = biases["qkv".index(name.split(".")[-2][0])]
            values[::3] = large * rng.uniform(-1, 1, values[::3].shape)
        tensors[name] = values.astype(tensors[name].dtype)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(path)


@dataclass(frozen=True)
class Style:
    """How an engine computes; formats are those of `in_format`."""

    habits: Habits
    matrices: str = "exact"  # operands of projections; their weights too, if it is floating-point
    table: bool = False  # the embedding as well
    q: str = "exact"  # operands of attention's two products
    k: str = "exact"
    p: str = "exact"
    v: str = "exact"
    flash: int = 0  # attention takes so many keys at a time, and there is no softmax
    running: str = "exact"  # its running sum of values
    difference: str = ""  # qkv_matmul is output minus bias, in this format
    files: str = "exact"  # all files, and nothing else


def one_of(rng: np.random.Generator, *choices: Any) -> Any:
    """Return one of several values, as it is."""
    return choices[rng.integers(len(choices))]


def draw_styles(rng: np.random.Generator) -> dict[str, Style]:
    """Return a random engine of each kind."""
    habits = draw_habits(rng, "float32")
    plain, half, narrow = Style(habits), "float16", one_of(rng, *NARROW)
    results = replace(habits, precision=narrow)
    eager = Style(replace(results, points="eager"))
    fused = Style(replace(results, points="fused"))
    matrices, cache, q, k, p, v = (one_of(rng, "exact", *NARROW, "tf32") for _ in range(6))
    stored = replace(plain, matrices=matrices, table=matrices in NARROW and rng.random() < 0.3)
    cached = replace(stored, q=cache, k=cache, p=cache, v=cache)
    blocks, keys = one_of(rng, "q8_0", "q8_K"), one_of(rng, 4, 16, 64)
    return {
        "float32": plain,
        "eager results": eager,
        "fused results": one_of(rng, fused, Style(replace(results, points="flash"))),
        "operands": cached,
        "operands, each its own": replace(stored, q=q, k=k, p=p, v=v),
        "blocks of integers": replace(cached, matrices=blocks, table=False),
        "llama.cpp's flash": replace(stored, q=half, k=half, v=half, flash=1, running=half),
        "float32 flash": replace(stored, flash=keys),
        "16-bit flash": replace(fused, p=narrow, flash=keys),
        "output minus bias": replace(plain, difference="exact"),
        "eager output minus bias": replace(eager, difference=one_of(rng, "exact", narrow)),
        "files rounded": replace(plain, files=narrow, flash=one_of(rng, 0, 0, keys)),
        "operands, files rounded": replace(cached, files=narrow),
    }


class Engine(HonestEngine):
    """An honest engine with a style."""

    def __init__(self, config: Config, weights: AttentionWeights, style: Style):
        super().__init__(config, weights, style.habits)
        self.style, self._scales_first = style, style.habits.scores_scale == "before"
        self.qkv, self.out = (rounded(matrix, style.matrices) for matrix in (self.qkv, self.out))

    def dump(self, residual: Array) -> dict[str, Array]:
        """Return the embedding and the stages that this engine makes."""
        style = self.style
        residual = rounded(residual, style.matrices) if style.table else residual
        arrays = {"embedding": self._stored(residual), **self.chain(residual)}
        if style.flash:
            del arrays["attn_scores"], arrays["attn_softmax"]
            made_of = (arrays[name] for name in ("q_post_rope", "k_post_rope", "qkv_bias"))
            arrays["attention"] = self._at("attention", self._in_one_kernel(*made_of))
            arrays["attn_out"] = self.attn_out(arrays["attention"])
        if style.difference:
            arrays["qkv_matmul"] = rounded(arrays["qkv_bias"] - self.bias, style.difference)
        return arrays

    def attn_scores(self, q_post_rope: Array, k_post_rope: Array) -> Array:
        """Round both operands; queries that are scaled first are rounded after that."""
        q = q_post_rope if self._scales_first else rounded(q_post_rope, self.style.q)
        return super().attn_scores(q, rounded(k_post_rope, self.style.k))

    def _at(self, point: str, x: Array) -> Array:
        x = super()._at(point, x)
        return rounded(x, self.style.q) if point == "products" and self._scales_first else x

    def _mixed(self, weights: Array, qkv: Array) -> Array:
        return super()._mixed(rounded(weights, self.style.p), rounded(qkv, self.style.v))

    def _projected(self, x: Array, weight: Array, start: Array | int = 0) -> Array:
        return super()._projected(in_format(x, self.style.matrices), weight, start)

    def _in_one_kernel(self, q: Array, k: Array, qkv: Array) -> Array:
        """Attend to some keys after the other; sums are rescaled whenever the maximum grows."""
        style, (T, N, H), (S, K, _) = self.style, q.shape, k.shape
        heads = rounded(k, style.k), rounded(qkv, style.v).reshape(S, -1, H)[:, -K:]
        k, v = (x.transpose(1, 0, 2).repeat(N // K, axis=0) for x in heads)
        scores = rounded(q, style.q).transpose(1, 0, 2) @ k.swapaxes(1, 2) * np.float32(H**-0.5)
        scores = np.where(np.tri(T, S, dtype=bool), scores, np.float32(-np.inf))
        top = np.full((N, T, 1), np.float32(-np.inf))
        total, mixed = np.zeros_like(top), np.zeros((N, T, H), np.float32)
        for first in range(0, S, style.flash):
            keys = slice(first, first + style.flash)
            higher = np.maximum(top, scores[:, :, keys].max(axis=-1, keepdims=True))
            kept, weights = np.exp(top - higher), np.exp(scores[:, :, keys] - higher)
            total = total * kept + weights.sum(axis=-1, keepdims=True)
            mixed = rounded(mixed * kept, style.running) + rounded(weights, style.p) @ v[:, keys]
            mixed, top = rounded(mixed, style.running), higher
        return (mixed / total).transpose(1, 0, 2).reshape(T, -1)


def in_format(x: Array, name: str) -> Array:
    """Round to a floating-point format, or to ggml's integers in blocks of a row.

    ``q8_0``: of 32, each with a float16 scale; ``q8_K``: of 256, with a float32 scale.
    """
    lengths = {"q8_0": 32, "q8_K": 256}
    if name not in lengths:
        return rounded(x, name)
    rows = np.pad(x, [(0, 0), (0, -x.shape[1] % lengths[name])]).reshape(len(x), -1, lengths[name])
    largest = np.abs(rows).max(axis=-1, keepdims=True)
    steps = np.divide(127, largest, out=np.zeros_like(largest), where=largest != 0)
    units = rounded(largest / 127, "float16" if name == "q8_0" else "exact")
    return (np.rint(rows * steps) * units).reshape(len(x), -1)[:, : x.shape[1]]


@dataclass(frozen=True)
class Form:
    """What is written, and how it is laid out."""

    stages: tuple[str, ...] = ()
    head_major: bool = False  # q and k
    masked: str = "zeros"  # scores that no softmax reads: as computed, -inf, or a mask is added
    keys: int = 1  # a multiple of which keys are padded to
    padding: str = "zeros"  # of scores: numbers, or any bits
    unscaled: bool = False  # scores before 1/sqrt(H)
    last: bool = False  # the last token alone
    batch: bool = False  # an axis of length 1 in front
    container: str = "arrays"  # of float32, or of what the engine or its files round to; or files


def draw_form(style: Style, rng: np.random.Generator) -> Form:
    """Return a random way to write what an engine makes."""
    missing = one_of(rng, 0, 0, 0.1, 0.3, 0.6)
    made = [name for name in NAMES if not (style.flash and BY_NAME[name].masked)]
    stages = [name for name in made if rng.random() >= missing] or [one_of(rng, *made)]
    # neither where scaled scores were rounded, nor where no softmax shows what is meant
    can = style.habits.precision == "float32" and style.habits.scores_scale != "before"
    return Form(
        tuple((["embedding"] if rng.random() < 0.5 else []) + stages),
        head_major=rng.random() < 0.4,
        masked=one_of(rng, "zeros", "computed", "-inf", "added"),
        keys=one_of(rng, 1, 1, 1, 32, 256),
        padding=one_of(rng, "zeros", "numbers", "bits"),
        unscaled=can and {"attn_scores", "attn_softmax"} <= {*stages} and rng.random() < 0.4,
        last=rng.random() < 0.15,
        batch=rng.random() < 0.4,
        container=one_of(rng, "arrays", "narrow arrays", "files"),
    )


def laid_out(name: str, x: Array, form: Form, precision: str, rng: np.random.Generator) -> Array:
    """Return a stage in a form."""
    if BY_NAME[name].masked:
        x = np.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % form.keys)])
    if name == "attn_scores":
        _, T, S = x.shape
        lowest = ml_dtypes.finfo(NARROW.get(precision, np.float32)).min
        added = rounded(x + np.float32(lowest), precision)
        other = {"zeros": 0 * x, "computed": x, "-inf": np.full_like(x, -np.inf), "added": added}
        x = np.where(np.arange(S) > np.arange(T)[:, None], other[form.masked], x)
        bits = rng.integers(1 << 32, size=x[:, :, T:].shape, dtype=np.uint32)
        padding = {"zeros": 0 * bits, "numbers": np.log(bits + 1.0), "bits": bits.view(np.float32)}
        x[:, :, T:] = padding[form.padding]
    if form.last:
        x = x[:, -1:] if BY_NAME[name].masked else x[-1:]
    if form.head_major and name in ("q_post_rope", "k_post_rope"):
        x = x.transpose(1, 0, 2)
    return np.ascontiguousarray(x[None] if form.batch else x)


def particulars(part: Any) -> str:
    """Return the fields of a dataclass that are not as by default."""
    values = {of.name: getattr(part, of.name) for of in fields(part) if of.name != "habits"}
    return str({name: values[name] for name in values if values[name] != getattr(type(part), name)})


class Healthy:
    """One healthy dump."""

    def __init__(self, number: int, folder: Path):
        rng = np.random.default_rng(number)
        styles = [*draw_styles(rng).items()]
        self.kind, self.style = styles[number % len(styles)]
        self.form = draw_form(self.style, rng)
        style, form = self.style, self.form
        model, variant = int(rng.integers(len(MODELS))), int(rng.integers(len(SCALES)))
        ids = rng.integers(VOCABULARY, size=one_of(rng, 1, 3, VOCABULARY, VOCABULARY))
        self.tokens = [int(token) for token in rng.choice(ids, one_of(rng, 1, 2, 7, 12, 33, 40))]
        self.checkpoint = checkpoint_of(folder, model, variant)
        weights, _ = read_attention(self.checkpoint, 0)
        rows, _ = read_embedding(self.checkpoint, self.tokens)
        engine = Engine(self.checkpoint.config, weights, style)
        self.arrays = engine.dump(rows.astype(np.float32))
        narrow = style.habits.precision if style.files == "exact" else style.files
        self.written = {}
        for name in form.stages:
            unscaled = name == "attn_scores" and form.unscaled
            x = self.arrays[name] * np.float32(engine.config.head_dim**0.5 if unscaled else 1)
            x = rounded(laid_out(name, x, form, style.habits.precision, rng), style.files)
            if form.container == "narrow arrays":
                x = rounded(x, narrow).astype(NARROW.get(narrow, np.float32))
            self.written[name] = x
        about = f"model {model}, {SCALES[variant]}, T={len(self.tokens)}, {len({*self.tokens})} ids"
        parts = (particulars(part) for part in (style, style.habits, form))
        self.text = "\n    ".join([f"{number}, {self.kind}: {about}", *parts])

    def explained(self) -> Explanation:
        """Ask `qwenref explain`."""
        source: Any = self.written
        with tempfile.TemporaryDirectory() as folder:
            for name, x in self.written.items() if self.form.container == "files" else ():
                qwenref.write_aprt(Path(folder, f"layer_0_{name}.aprt"), 0, x)
                source = folder
            return qwenref.explain(source, model=self.checkpoint.directory, tokens=self.tokens)

    def alarm(self, found: Explanation) -> str | None:
        """Return what is wrong about an explanation, None if nothing is."""
        seen = {*self.written}
        for stage in reversed(ATTENTION):  # what is written shows what it was computed from
            seen |= {*stage.computed_from} if stage.name in seen else set()
        blind = any(stage.status == "blind" for stage in found.stages)
        expected = "agree" if seen.issuperset(NAMES) and not blind else "incomplete"
        if found.verdict == expected and not found.origins:
            return None
        return f"{found.verdict}, not {expected}: {found.origins} {found.reason}"


def main() -> None:
    """Parse the command line, make the dumps, have them explained, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=1000, help="how many dumps")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--only", type=int, help="number of the only one")
    options = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        if options.only is not None:
            one = Healthy(options.only, Path(folder))
            print(one.text, one.explained().to_json(), sep="\n")
            return
        for number in range(options.first, options.first + options.cases):
            one = Healthy(number, Path(folder))
            try:
                found = one.explained()
                verdict, alarm = found.verdict, one.alarm(found)
            except Exception as error:  # a crash is a false alarm too, and not the last one
                verdict, alarm = "", repr(error)
            counts[one.kind, "false alarm" if alarm else verdict] += 1
            if alarm:
                print(f"{one.text}\n    {alarm}", flush=True)
    kinds = dict.fromkeys(kind for kind, _ in counts)
    print(f"{'engine':26}" + "".join(f"{verdict:>14}" for verdict in VERDICTS))
    for row in (*kinds, "all"):
        of = [sum(counts[kind, v] for kind in kinds if row in (kind, "all")) for v in VERDICTS]
        print(f"{row:26}" + "".join(f"{count:14}" for count in of))


if __name__ == "__main__":
    main()
