"""Explain whole models that honest engines of many kinds ran: none of them may be found wrong.

python scripts/healthy_layers.py --cases 100
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
from healthy import Engine, Style, draw_styles, one_of, particulars
from honest_engines import Array, rounded

from qwenref import explain_layers, write_aprt
from qwenref.dumps.manifest import stage_path
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.random_checkpoint import Shape, write
from qwenref.model.weights import (
    head_matrix,
    read_attention,
    read_embedding,
    read_feed_forward,
    read_final_norm,
)
from qwenref.stages import LAYER
from qwenref.trial.explanation import LayersExplanation
from qwenref.trial.layer_words import layers_report

SHAPES = (
    Shape(84, 6, 2, 152, 3, 320),
    Shape(64, 4, 1, 96, 8, 192, tie_word_embeddings=True),
    Shape(128, 4, 2, 256, 12, 320, head_dim=64),
    Shape(48, 4, 4, 64, 24, 160, tie_word_embeddings=True),
)
Place = tuple[int | None, str]


class Model:
    """A checkpoint that an engine with a style runs, from the embedding to the logits."""

    def __init__(self, folder: Path, style: Style):
        self.checkpoint, self.style = Checkpoint(folder), style
        self.config = self.checkpoint.config

    def dump(self, tokens: list[int]) -> Iterator[tuple[Place, Array]]:
        """Yield the stages as they are dumped."""
        rows, _ = read_embedding(self.checkpoint, tokens)
        stream = rows.astype(np.float32)
        for layer in range(self.config.num_hidden_layers):
            engine = self._engine(layer)
            arrays = engine.dump(stream)
            entering = arrays.pop("embedding")
            if layer == 0:
                yield (0, "embedding"), entering
            arrays |= self._feed_forward(engine, layer, entering, arrays["attn_out"])
            yield from (((layer, name), x) for name, x in arrays.items())
            stream = arrays["post_ffn_residual"]
        engine = self._engine(0)
        engine.norm = engine._stored(read_final_norm(self.checkpoint)[0])
        normed = engine.attn_norm(stream)
        yield (None, "final_norm"), normed
        name, (V, _) = head_matrix(self.config)
        matrix = self.checkpoint.rows_at(name, range(V))
        yield (None, "lm_head"), self._result(self._product(engine, normed[-1:], matrix))[0]

    def _engine(self, layer: int) -> Engine:
        style = self.style if layer == 0 else replace(self.style, table=False)
        return Engine(self.config, read_attention(self.checkpoint, layer)[0], style)

    def _result(self, x: Array) -> Array:
        return rounded(x, self.style.habits.precision)

    def _product(self, engine: Engine, x: Array, matrix: Array) -> Array:
        return engine._projected(x, rounded(engine._stored(matrix), self.style.matrices))

    def _feed_forward(
        self, engine: Engine, layer: int, entering: Array, attn_out: Array
    ) -> dict[str, Array]:
        """Return the stages after attn_out; kernels that fuse two of them round once."""
        weights, _ = read_feed_forward(self.checkpoint, layer)
        fused = self.style.habits.points != "eager"
        total = entering + attn_out
        between = self._result(total)
        second = copy(engine)
        second.norm = engine._stored(weights.norm)
        normed = second.attn_norm(total if fused else between)
        gate, up = (
            self._result(self._product(engine, normed, of))
            for of in (weights.gate_proj, weights.up_proj)
        )
        silu = gate / (1 + np.exp(-gate))
        rounded_silu = self._result(silu)
        mixed = self._result((silu if fused else rounded_silu) * up)
        out = self._result(self._product(engine, mixed, weights.down_proj))
        arrays = (between, normed, gate, up, rounded_silu, mixed, out, self._result(between + out))
        return dict(zip((stage.name for stage in LAYER[9:]), arrays, strict=True))


class HealthyModel:
    """The dump of a whole model, drawn at random."""

    def __init__(self, number: int, folder: Path):
        """Write the model, and the dump, into a folder."""
        rng = np.random.default_rng([number, 9])
        styles = [*draw_styles(rng).items()]
        kind, style = styles[number % len(styles)]
        shape = one_of(rng, *SHAPES)
        dtype = one_of(rng, "bfloat16", "bfloat16", "float32", "float16")
        self._left_out = one_of(rng, 0, 0, 0.1, 0.4)
        self._model, self._dump = folder / "model", folder / "dump"
        write(self._model, shape, dtype=dtype)
        length = one_of(rng, 2, 7, 12, 24)
        self._tokens: list[int] = rng.integers(shape.vocab_size, size=length).tolist()
        for (layer, name), x in Model(self._model, style).dump(self._tokens):
            if rng.random() >= self._left_out:
                path = self._dump / stage_path(layer, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_aprt(path, layer, rounded(x, style.files))
        self.text = (
            f"{number}, {kind}, {shape}, {dtype}, T={length}, left out {self._left_out}\n"
            f"    {particulars(style)} {particulars(style.habits)}"
        )

    def explained(self) -> LayersExplanation:
        """Explain all of it."""
        return explain_layers(self._dump, model=self._model, tokens=self._tokens)

    def alarm(self, found: LayersExplanation) -> str:
        """Return the report if it finds a fault, or does not agree though nothing is left out."""
        wrong = found.origins or (not self._left_out and found.verdict != "agree")
        return layers_report(found) if wrong else ""


def main() -> None:
    """Parse the command line, make the dumps, have them explained, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=100, help="how many models")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for number in range(options.first, options.first + options.cases):
        with tempfile.TemporaryDirectory() as folder:
            one = HealthyModel(number, Path(folder))
            found = one.explained()
        counts[found.verdict] += 1
        parts.update(part.verdict for part in found.parts)
        if alarm := one.alarm(found):
            print(f"{one.text}\n{alarm}", flush=True)
    print(dict(counts), "of their parts", dict(parts))


if __name__ == "__main__":
    main()
