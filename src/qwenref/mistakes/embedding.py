"""Mistakes in what enters the layer: rows of the embedding table."""

from qwenref.mistakes.mistake import Mistake
from qwenref.stages import RESIDUAL

MISTAKES = (
    Mistake(
        "embedding-of-head",
        (RESIDUAL,),
        "rows of lm_head instead of the embedding table, as if the two were tied",
        "lm_head[token]",
        "nothing alike",
        lambda s: s.table("lm_head.weight"),
    ),
)
