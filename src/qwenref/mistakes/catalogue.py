"""The one list of mistakes, which the command, the tests and docs/faults.md take."""

from qwenref.mistakes import (
    anywhere,
    bias,
    embedding,
    feed_forward,
    head,
    norm,
    output,
    projections,
    rope,
    scores,
    softmax,
    stream,
    values,
)
from qwenref.mistakes.mistake import Mistake

MISTAKES: tuple[Mistake, ...] = tuple(
    mistake
    for module in (
        *(embedding, norm, projections, bias, rope, scores, softmax, values, output),
        *(stream, feed_forward, head, anywhere),
    )
    for mistake in module.MISTAKES
)
