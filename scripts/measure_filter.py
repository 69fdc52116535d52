"""Count how often `qwenref explain` convicts healthy engines of mistakes below the noise.

    python scripts/measure_filter.py --cases 30000
    python scripts/measure_filter.py --only 17          dump number 17 alone, and what is suspected

All of a dump follows from its number: it is one stage, and what that is computed from. The engines
are those of scripts/healthy.py that round results, for others have no such noise; a tenth of them
cut off instead, and a tenth have weights of 8 bits. Shapes are few, and tokens 31 to 48, all
distinct: with fewer little is sought. Printed are the convictions, the largest z of mistakes that
alpha would convict, and the 95 % bound of the rate: 3 / n if there was none (the rule of three).
"""

import argparse
import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from healthy import NARROW, VOCABULARY, Array, Engine, Style, checkpoint_of, one_of
from honest_engines import draw_habits

from qwenref.dumps.naming import names_from
from qwenref.dumps.reading import read_dump
from qwenref.model.config import Config
from qwenref.model.weights import AttentionWeights, read_attention, read_embedding
from qwenref.oracle import computing
from qwenref.stages import ATTENTION
from qwenref.trial.case import Case, ways_of
from qwenref.trial.laying_out import lay_out
from qwenref.trial.matched_filter import Look, judged, look_below
from qwenref.trial.part import LayerPart
from qwenref.trial.precision import account_of
from qwenref.trial.replay import NOTHING, Replay
from qwenref.trial.tensors import Tensors

MODELS = (0, 1, 2, 6)
"""Of those of scripts/healthy.py."""

LENGTHS = (31, 40, 48)


class Cutting(Engine):
    """It rounds results towards zero, if to bfloat16."""

    def _at(self, point: str, x: Array) -> Array:
        near = super()._at(point, x)
        if near is x or self.habits.precision != "bfloat16":
            return near
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return (bits & np.uint32(0xFFFF0000)).view(np.float32)


class Quantised(Engine):
    """Its matrices have 8 bits, with a scale for each row."""

    def __init__(self, config: Config, weights: AttentionWeights, style: Style):
        super().__init__(config, weights, style)
        steps = [np.abs(matrix).max(axis=1, keepdims=True) / 127 for matrix in (self.qkv, self.out)]
        self.qkv, self.out = (
            np.rint(matrix / step) * step
            for matrix, step in zip((self.qkv, self.out), steps, strict=True)
        )


@cache
def weights_of(folder: Path, model: int, variant: int) -> AttentionWeights:
    """Read them once."""
    return read_attention(checkpoint_of(folder, model, variant), 0)[0]


def look_at(number: int, folder: Path) -> tuple[str, dict[str, Look]]:
    """Return what a healthy engine is, and what is below the noise of one of its stages."""
    rng = np.random.default_rng([number, 7])
    habits = draw_habits(rng, one_of(rng, *NARROW))
    style = Style(replace(habits, points=one_of(rng, "eager", "fused", "flash")))
    if rng.random() < 0.2:
        style = replace(style, p=habits.precision, flash=one_of(rng, 4, 16, 64))
    model, variant = one_of(rng, *MODELS), int(rng.integers(4))
    checkpoint = checkpoint_of(folder, model, variant)
    weights = weights_of(folder, model, variant)
    tokens = rng.choice(VOCABULARY, one_of(rng, *LENGTHS), replace=False).tolist()
    rows, _ = read_embedding(checkpoint, tokens)
    kind = one_of(rng, *[Engine] * 8, Cutting, Quantised)
    arrays = kind(checkpoint.config, weights, style).dump(rows.astype(np.float32))
    wanted = one_of(rng, *(stage for stage in ATTENTION if stage.name in arrays))
    names = [of for of in (*wanted.computed_from, wanted.name) if of in arrays]
    shown: Any = {of: arrays[of] for of in names}
    about = f"{kind.__name__}, {wanted.name}, model {model}, variant {variant}"
    with computing("float64", "cpu"), np.errstate(over="ignore", invalid="ignore"):
        replay = Replay(LayerPart(checkpoint.config, 0, weights), len(tokens), rows)
        dump = read_dump(shown, names_from(None))
        case = Case(dump, checkpoint, checkpoint.config, tokens, "given")
        ways = ways_of(case, 0, replay.chain, replay.sizes)
        for of in names:
            lay_out(replay, of, ways[of])
        account = account_of(replay, wanted.name)
        tensors = Tensors(checkpoint.config, weights._asdict(), checkpoint, 0, tokens)
        look = look_below(replay, tensors, wanted.name, NOTHING, account)
    text = f"{number}: {about}, {len(tokens)} tokens, {style}"
    return text, {wanted.name: look} if look is not None and account.agrees else {}


def main() -> None:
    """Parse the command line, make the dumps, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=1000, help="how many dumps")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--only", type=int, help="number of the only one")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.cases)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
    convicted, noisy, sought, largest, began = 0, 0, 0, 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            text, looks = look_at(number, Path(folder))
            noisy += len(looks)
            sought += sum(look.tested for look in looks.values())
            wrong = any(of.hidden for of in judged(looks).values())
            convicted += wrong
            if wrong or options.only is not None:
                print(text)
            for one in (one for look in looks.values() for one in look.suspicions):
                largest = max(largest, one.z)
                if wrong or options.only is not None:
                    print(f"    {one.found.text}: {one.alpha:.2f} times, z {one.z:.1f}", flush=True)
    bound = "" if convicted else f", at most {3 / len(numbers):.1e} of all are (95 %)"
    print(
        f"{convicted} of {len(numbers)} dumps convicted{bound}; {noisy} have noise, in which "
        f"{sought} mistakes were sought; largest z {largest:.1f}; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
