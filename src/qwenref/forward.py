"""A forward pass through some layers, with one of them in memory and the next one being read."""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from qwenref.ahead import ahead
from qwenref.chain import Layer, Piece, head_pieces, layer_pieces
from qwenref.model.attention import Attention
from qwenref.model.checkpoint import Checkpoint
from qwenref.model.feed_forward import FeedForward
from qwenref.model.head import Head
from qwenref.model.precision import Precision
from qwenref.model.weights import (
    AttentionWeights,
    FeedForwardWeights,
    HeadMatrix,
    Tensor,
    embedding_table,
    feed_forward_tensors,
    final_norm,
    head_matrix,
    present_attention_tensors,
    read_attention,
    read_feed_forward,
    read_final_norm,
)
from qwenref.stages import ATTENTION, EMBEDDING, HEAD, LAST_LOGITS, LAYER, LEAVING, Stage

SAMPLED = 4096
"""Entries of the vocabulary that the noise floor of lm_head is computed for, evenly spaced: their
rms is that of all of them to about a hundredth (1/sqrt(2 * 4096)).
"""


class Plan(NamedTuple):
    """What to compute.

    Attributes:
        first: The layer that the residual stream enters.
        layers: Those whose stages are wanted, in order.
        stages: What is wanted of them, and of the whole model.
        depth: How many layers the model has.
        all_logits: Whether lm_head is wanted of all tokens, not of the last one alone.
    """

    first: int
    layers: Sequence[int]
    stages: Collection[Stage]
    depth: int
    all_logits: bool = False

    @property
    def of_model(self) -> list[Stage]:
        """The stages of the whole model that are wanted."""
        final_norm, lm_head = HEAD
        logits = lm_head if self.all_logits else LAST_LOGITS
        wanted = {final_norm: final_norm, lm_head: logits}
        return [of for stage, of in wanted.items() if stage in self.stages]

    @property
    def run(self) -> range:
        """The layers that have to be run."""
        return range(self.first, self.depth if self.of_model else self.layers[-1] + 1)

    def of_layer(self, layer: int) -> list[Stage]:
        """Return the stages that are wanted of a layer."""
        if layer not in self.layers:
            return []
        possible = LAYER if layer else (EMBEDDING, *LAYER)
        return [stage for stage in possible if stage in self.stages]

    def needed(self, layer: int) -> list[Stage]:
        """Return the stages that are wanted of a layer, and what the next one is entered by."""
        wanted = self.of_layer(layer)
        goes_on = self.of_model or layer < self.run[-1]
        return [*wanted, LEAVING] if goes_on and LEAVING not in wanted else wanted

    def needs_feed_forward(self, layer: int) -> bool:
        """Return whether any stage after attn_out is needed of a layer."""
        return any(stage in LAYER and stage not in ATTENTION for stage in self.needed(layer))

    def tensors(self, checkpoint: Checkpoint, *, embedding: bool) -> Iterator[Tensor]:
        """Yield all tensors that it takes."""
        config = checkpoint.config
        for layer in self.run:
            yield from present_attention_tensors(checkpoint, layer).values()
            if self.needs_feed_forward(layer):
                yield from feed_forward_tensors(config, layer).values()
        if embedding:
            yield embedding_table(config)
        if self.of_model:
            yield final_norm(config)
        if HEAD[-1] in self.stages:
            yield head_matrix(config)


class Read(NamedTuple):
    """The weights of a layer, and their fingerprints."""

    number: int
    attention: AttentionWeights
    attention_print: str
    feed_forward: FeedForwardWeights | None = None
    feed_forward_print: str | None = None


class EnteredLayer(NamedTuple):
    """A layer that the stream has come to.

    Attributes:
        read: Its weights.
        stream: What enters it, [T, D].
        pieces: Its stages that are wanted.
    """

    read: Read
    stream: np.ndarray
    pieces: Iterator[Piece]


class EnteredHead(NamedTuple):
    """What follows the last layer.

    Attributes:
        norm: Weight of the final norm, [D].
        norm_print: Its fingerprint.
        matrix: Of lm_head, if that is wanted; read once the pieces are taken.
        pieces: The stages of the whole model that are wanted.
    """

    norm: np.ndarray
    norm_print: str
    matrix: HeadMatrix | None
    pieces: Iterator[Piece]


class Forward:
    """A run of a plan, from a stream that enters its first layer.

    Attributes:
        stream: What left the last layer that was run so far, [T, D].
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, stream: np.ndarray, precision: Precision
    ):
        """Read nothing yet.

        Args:
            checkpoint: Where the weights are.
            plan: What to compute.
            stream: What enters the first layer, [T, D], in a dtype that widens to the precision's.
            precision: What to compute in and what to round.
        """
        self._checkpoint, self._plan, self._precision = checkpoint, plan, precision
        self.stream = stream

    def layers(self) -> Iterator[EnteredLayer]:
        """Run layer after layer; while one is computed, the next one is read."""
        for read in ahead(self._reads()):
            pieces = self._pieces(read, self.stream)
            yield EnteredLayer(read, self.stream, pieces)
            deque(pieces, maxlen=0)  # of a layer of which nothing is wanted, nothing was taken

    def head(self) -> EnteredHead:
        """Read the final norm, once all layers are run."""
        norm, norm_print = read_final_norm(self._checkpoint)
        wants_logits = HEAD[-1] in self._plan.stages
        matrix = HeadMatrix(self._checkpoint, SAMPLED) if wants_logits else None

        def slices(most: int) -> Iterator[tuple[int, np.ndarray]]:
            return iter(()) if matrix is None else ahead(matrix.slices(most))

        head = Head(self._checkpoint.config, norm, self._precision)
        pieces = head_pieces(head, self.stream, self._plan.of_model, slices)
        return EnteredHead(norm, norm_print, matrix, pieces)

    def _reads(self) -> Iterator[Read]:
        """Read layer after layer, each over the last but one: `ahead` has that done with by then.

        So memory is asked for twice, and does not grow with the number of layers.
        """
        done: Read | None = None
        last: Read | None = None
        for layer in self._plan.run:
            read = Read(layer, *read_attention(self._checkpoint, layer, done and done.attention))
            if self._plan.needs_feed_forward(layer):
                over = done and done.feed_forward
                feed_forward, its_print = read_feed_forward(self._checkpoint, layer, over)
                read = read._replace(feed_forward=feed_forward, feed_forward_print=its_print)
            done, last = last, read
            yield read

    def _pieces(self, read: Read, entering: np.ndarray) -> Iterator[Piece]:
        """Compute a layer's stages; keep what leaves it, if it goes anywhere."""
        config, wanted = self._checkpoint.config, self._plan.of_layer(read.number)
        needed = self._plan.needed(read.number)
        attention, feed_forward = Attention(config, read.attention, self._precision), None
        if read.feed_forward is not None:
            feed_forward = FeedForward(config, read.feed_forward, self._precision)
        if LEAVING in needed:
            self.stream = np.empty(entering.shape, self._precision.arithmetic)
        for piece in layer_pieces(Layer(attention, feed_forward), entering, needed):
            if piece.stage == LEAVING:
                self.stream[piece.first : piece.first + len(piece.values)] = piece.values
            if piece.stage in wanted:
                yield piece
