"""Mistakes in the three projections, attn_norm @ [W_q; W_k; W_v].T."""

from collections.abc import Callable, Iterator
from itertools import chain, combinations, product

import numpy as np

from qwenref.mistakes.beside import SIDES, side_named
from qwenref.mistakes.mistake import Mistake, Setting, any_of, needs
from qwenref.stages import RESIDUAL

STAGE = ("qkv_matmul",)
BLOCKS = ("q", "k", "v")
SUBSETS = tuple(chain.from_iterable(combinations(BLOCKS, n) for n in (1, 2, 3)))
"""Which blocks may be meant, together."""

TILES = (16, 32, 64, 128, 256)
"""Block sizes of kernels and of quantised formats."""


def named(blocks: tuple[str, ...]) -> str:
    """Return blocks in words."""
    *first, last = blocks
    return f"{', '.join(first)} and {last}" if first else last


def block(s: Setting, name: str) -> slice:
    """Return the columns of q, k or v."""
    E, kv = s.sizes["E"], s.sizes["K"] * s.sizes["H"]
    start, width = {"q": (0, E), "k": (E, kv), "v": (E + kv, kv)}[name]
    return slice(start, start + width)


def swapped(s: Setting, values: np.ndarray, pair: str) -> np.ndarray:
    """Return [.., F] with two blocks of the same width swapped."""
    a, b = (block(s, name) for name in pair)
    needs(a.stop - a.start == b.stop - b.start)
    values = values.copy()
    values[..., a], values[..., b] = values[..., b], values[..., a].copy()
    return values


def reordered(
    s: Setting, values: np.ndarray, blocks: tuple[str, ...], order: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Return [.., F] with the columns of blocks in another order, of as many as there are."""
    values = values.copy()
    for name in blocks:
        of = block(s, name)
        values[..., of] = values[..., of][..., order(of.stop - of.start)]
    return values


def of_pairs(s: Setting, width: int, *, to: bool) -> np.ndarray:
    """Return the order of rows that GGUF has in each head, 0, H/2, 1, .., or its inverse."""
    H = s.sizes["H"]
    rows = np.arange(width).reshape(-1, *((2, H // 2) if to else (H // 2, 2)))
    return rows.swapaxes(1, 2).ravel()


def _of_other_heads(s: Setting, to: bool) -> np.ndarray:
    """Rows of k permuted as if there were as many heads as of q."""
    N, K, H = (s.sizes[letter] for letter in "NKH")
    needs(N != K and K * H % (2 * N) == 0)
    rows = np.arange(K * H).reshape(N, *((2, -1) if to else (-1, 2))).swapaxes(1, 2).ravel()
    own = of_pairs(s, K * H, to=not to)  # what it was permuted by before, rightly
    return reordered(s, s.right(*s.given), ("k",), lambda _: own[rows])


def _untransposed(s: Setting, blocks: tuple[str, ...]) -> np.ndarray:
    (x,) = s.given
    values = s.right(x).copy()
    for name in blocks:
        values[:, block(s, name)] = s.product(x, f"{name}_proj", as_it_lies=True)
    return values


Beside = tuple[tuple[str, ...], int]
"""Which blocks, and of which layer beside this one."""


def _of_layer(s: Setting, of: Beside) -> np.ndarray:
    (x,), (blocks, side) = s.given, of
    values = s.right(x).copy()
    for name in blocks:
        values[:, block(s, name)] = s.product(x, f"{name}_proj", side)
    return values


def beside_named(of: Beside) -> str:
    """Return ``q and k from the next layer``."""
    return f"{named(of[0])} from {side_named(of[1])}"


def _grouped(s: Setting, to: bool) -> np.ndarray:
    """Q heads, k and v of one group after the other, as fused checkpoints store them."""
    (x,) = s.given
    N, K, G, F = (s.sizes[letter] for letter in "NKGF")
    needs(K > 1)
    heads = np.arange(N + 2 * K)
    order = np.concatenate([[*range(g * G, (g + 1) * G), N + g, N + K + g] for g in range(K)])
    order = order if to else np.argsort(order)
    return s.right(x).reshape(len(x), len(heads), -1)[:, order].reshape(len(x), F)


Shift = tuple[tuple[str, ...], int]
"""Which blocks, and by how many rows."""


def _shifted(s: Setting, by: Shift) -> np.ndarray:
    return shifted(s, s.right(*s.given), by)


def shifted(s: Setting, values: np.ndarray, by: Shift) -> np.ndarray:
    """Return [.., F] with the columns of blocks rolled."""
    blocks, rows = by
    return reordered(s, values, blocks, lambda width: np.roll(np.arange(width), rows))


def shifts(s: Setting, _: np.ndarray | None) -> Iterator[Shift]:
    """Yield likely ones: by a row, or by a head."""
    for rows in (1, s.sizes["H"]):
        for blocks in SUBSETS:
            yield from ((blocks, rows), (blocks, -rows))


def shift_named(by: Shift) -> str:
    """Return a shift in words."""
    return f"{named(by[0])} shifted by {by[1]:+d}"


def _inputs_left_out(s: Setting, which: tuple[str, int]) -> np.ndarray:
    return s.right(without_inputs(s.given[0], *which))


def without_inputs(x: np.ndarray, part: str, tile: int) -> np.ndarray:
    """Return operands without some channels, which a kernel does not reach."""
    width, x = x.shape[1], x.copy()
    if part == "half":
        x[:, width // 2 :] = 0
        return x
    if part == "other half":
        x[:, : width // 2] = 0
        return x
    needs(width % tile != 0 and width > tile)
    x[:, width - width % tile :] = 0
    return x


PARTS = (("half", 0), ("other half", 0), *(("tail", tile) for tile in TILES))
"""Of the inputs of a product, which may be left out."""


def part_named(which: tuple[str, int]) -> str:
    """Return one of `PARTS` in words."""
    part, tile = which
    texts = {"half": "the second half", "other half": "the first half"}
    return texts.get(part, f"those after the last whole {tile}")


MISTAKES = (
    Mistake(
        "projection-untransposed",
        STAGE,
        "weights of {} not transposed: read as [in, out], not as [out, in]",
        "x @ W, W as it lies in memory",
        "nothing alike in those blocks",
        _untransposed,
        any_of(*SUBSETS),
        said=named,
        planted=(("q",), ("q", "k", "v")),
    ),
    Mistake(
        "projection-swapped",
        STAGE,
        "{} swapped",
        "blocks of F exchanged",
        "nothing alike in those blocks",
        lambda s, pair: swapped(s, s.right(*s.given), pair),
        any_of("kv", "qk", "qv"),
        said=" and ".join,
        planted=("kv", "qk"),
    ),
    Mistake(
        "projection-gguf-order",
        STAGE,
        "rows of {} in the order that GGUF stores for interleaved RoPE",
        "rows of a head in the order 0, H/2, 1, H/2+1, ...",
        "channels of every head permuted",
        lambda s, blocks: reordered(
            s, s.right(*s.given), blocks, lambda width: of_pairs(s, width, to=True)
        ),
        any_of(*SUBSETS),
        said=named,
        planted=(("q", "k"),),
    ),
    Mistake(
        "projection-gguf-inverse",
        STAGE,
        "rows of {} permuted from the interleaved order, which they are not in",
        "rows of a head in the order 0, 2, .., 1, 3, ..",
        "channels of every head permuted",
        lambda s, blocks: reordered(
            s, s.right(*s.given), blocks, lambda width: of_pairs(s, width, to=False)
        ),
        any_of(*SUBSETS),
        said=named,
        planted=(("q", "k"),),
    ),
    Mistake(
        "projection-gguf-heads",
        STAGE,
        "rows of k permuted {} GGUF's order as if k had as many heads as q",
        "rows of k in the order of N heads of K*H/N",
        "channels of k permuted",
        _of_other_heads,
        any_of(True, False),
        planted=(True, False),
        said={True: "to", False: "from"}.__getitem__,
    ),
    Mistake(
        "projection-grouped",
        STAGE,
        "q, k and v {} one group of heads after the other",
        "heads in the order of a fused matrix: q of group 0, k 0, v 0, q of group 1, ..",
        "heads swapped",
        _grouped,
        any_of(True, False),
        said={True: "stored", False: "read"}.__getitem__,
        planted=(True,),
    ),
    Mistake(
        "projection-shifted",
        STAGE,
        "rows of the weights of {}",
        "y[c] = x . W[c - n]",
        "nothing alike in those blocks",
        _shifted,
        shifts,
        planted=(((*BLOCKS,), 1), (("q",), -1)),
        said=shift_named,
    ),
    Mistake(
        "projection-of-other-layer",
        STAGE,
        "weights of {}",
        "x @ W'.T, W' of layer + 1 or layer - 1",
        "nothing alike in those blocks",
        _of_layer,
        any_of(*product(SUBSETS, SIDES)),
        said=beside_named,
        planted=((BLOCKS, 1), (("v",), 1)),
    ),
    Mistake(
        "projection-of-stream",
        STAGE,
        "the projections take the stream before the norm",
        "residual @ W.T",
        "nothing alike",
        lambda s: s.right(s.rows(RESIDUAL)),
    ),
    Mistake(
        "projection-without-norm-weight",
        STAGE,
        "the projections take the norm before its weight",
        "(attn_norm / w) @ W.T",
        "everywhere",
        lambda s: s.right(s.given[0] / s.tensor("norm")),
    ),
    Mistake(
        "projection-part-of-inputs",
        STAGE,
        "the sum leaves out some inputs: {}",
        "x[:n] . W[:, :n]",
        "everywhere",
        _inputs_left_out,
        any_of(*PARTS),
        said=part_named,
        planted=(("half", 0), ("tail", 32)),
    ),
)
