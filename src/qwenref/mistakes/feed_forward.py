"""Mistakes in the MLP: (silu(x @ W_gate.T) * (x @ W_up.T)) @ W_down.T."""

import math
from collections.abc import Iterator

import numpy as np

from qwenref.mistakes.beside import of_layer_beside
from qwenref.mistakes.mistake import Mistake, Setting, any_of
from qwenref.mistakes.products import MATRIX, of_beside, of_products
from qwenref.stages import BETWEEN

INTO = ("ffn_gate", "ffn_up")
SILU, PRODUCT, OUT = ("ffn_silu",), ("ffn_swigl",), ("ffn_out",)
OTHER = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}


def _shifts(s: Setting, _: np.ndarray | None) -> Iterator[tuple[str, int]]:
    for what in ("rows", "columns"):
        yield from ((what, 1), (what, -1))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _silu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))) / 2


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


ACTIVATIONS = {
    "GELU": _gelu,
    "GELU by tanh": _gelu_tanh,
    "x * sigmoid(1.702 x)": lambda x: x * _sigmoid(1.702 * x),
    "no activation": lambda x: x,
    "ReLU": lambda x: np.maximum(x, 0),
    "squared ReLU": lambda x: np.square(np.maximum(x, 0)),
    "sigmoid alone": _sigmoid,
    "tanh": np.tanh,
    "SiLU twice": lambda x: _silu(_silu(x)),
    "x * sigmoid(-x)": lambda x: x * _sigmoid(-x),
}
"""Instead of SiLU; GELU by tanh is that of GPT-2, the one with 1.702 that of CLIP."""


def _swapped(s: Setting) -> np.ndarray:
    return s.product(s.given[0], MATRIX[OTHER[s.stage]])


def _fused(s: Setting, interleaved: bool) -> np.ndarray:
    """Rows of one matrix of both: stored alternately and read as halves, or the reverse."""
    (x,) = s.given
    own = s.right(x)
    other = s.product(x, MATRIX[OTHER[s.stage]])
    both = (own, other) if s.stage == "ffn_gate" else (other, own)
    second = s.stage == "ffn_up"
    if interleaved:
        rows = np.stack(both, axis=-1).reshape(len(x), -1)
        return rows[:, own.shape[1] * second :][:, : own.shape[1]]
    return np.concatenate(both, axis=1)[:, second::2]


MISTAKES = (
    *of_products("mlp", INTO, _shifts),
    of_layer_beside("mlp", INTO, of_beside),
    Mistake(
        "mlp-swapped",
        INTO,
        "gate and up swapped",
        "x @ W_up.T for gate, x @ W_gate.T for up",
        "nothing alike",
        _swapped,
    ),
    Mistake(
        "mlp-fused",
        INTO,
        "gate and up in one matrix, {}",
        "other rows of [W_gate; W_up]",
        "nothing alike",
        _fused,
        any_of(True, False),
        planted=(True, False),
        said={
            True: "stored alternately and read as halves",
            False: "stored as halves and read alternately",
        }.__getitem__,
    ),
    Mistake(
        "mlp-of-stream",
        INTO,
        "the MLP takes the stream before the norm",
        "post_attn_residual @ W.T",
        "nothing alike",
        lambda s: s.right(s.rows(BETWEEN.name)),
    ),
    Mistake(
        "mlp-of-first-norm",
        INTO,
        "the MLP takes attn_norm, not ffn_norm",
        "attn_norm @ W.T",
        "nothing alike",
        lambda s: s.right(s.rows("attn_norm")),
    ),
    Mistake(
        "mlp-without-norm-weight",
        INTO,
        "the MLP takes the norm before its weight",
        "(ffn_norm / w) @ W.T",
        "everywhere",
        lambda s: s.right(s.given[0] / s.tensor("ffn_norm")),
    ),
    Mistake(
        "silu-other",
        SILU,
        "another activation: {}",
        "f(gate)",
        "everywhere, most where values are large",
        lambda s, name: ACTIVATIONS[name](s.given[0]),
        any_of(*ACTIVATIONS),
        planted=tuple(ACTIVATIONS),
    ),
    Mistake(
        "silu-of-up",
        SILU,
        "the activation on up, not on gate",
        "silu(up)",
        "nothing alike",
        lambda s: s.right(s.rows("ffn_up")),
    ),
    Mistake(
        "product-of-gate",
        PRODUCT,
        "multiplied with gate, not with up",
        "silu(gate) * gate",
        "nothing alike",
        lambda s: s.given[0] * s.rows("ffn_gate"),
    ),
    Mistake(
        "product-unactivated",
        PRODUCT,
        "gate without its activation times up",
        "gate * up",
        "everywhere",
        lambda s: s.rows("ffn_gate") * s.given[1],
    ),
    Mistake(
        "product-activated-up",
        PRODUCT,
        "the activation on up: {}",
        "silu(up) in the product",
        "everywhere",
        lambda s, gate: (s.rows("ffn_gate") if gate else s.given[0]) * _silu(s.given[1]),
        any_of(True, False),
        planted=(True, False),
        said={True: "gate * silu(up)", False: "silu(gate) * silu(up)"}.__getitem__,
    ),
    Mistake(
        "product-sum",
        PRODUCT,
        "silu(gate) and up added, not multiplied",
        "silu(gate) + up",
        "nothing alike",
        lambda s: s.given[0] + s.given[1],
    ),
    Mistake(
        "product-plus-one",
        PRODUCT,
        "up + 1 instead of up",
        "silu(gate) * (up + 1)",
        "off by silu(gate)",
        lambda s: s.given[0] * (s.given[1] + 1),
    ),
    *of_products("down", OUT, _shifts),
    of_layer_beside("down", OUT, of_beside),
    Mistake(
        "down-of-other",
        OUT,
        "the projection takes {}, not ffn_swigl",
        "x @ W_down.T",
        "nothing alike",
        lambda s, name: s.right(s.rows(name)),
        any_of("ffn_silu", "ffn_up", "ffn_gate"),
        planted=("ffn_silu", "ffn_up"),
    ),
    Mistake(
        "down-plus-residual",
        OUT,
        "the residual stream is added already",
        "ffn_swigl @ W_down.T + post_attn_residual",
        "everywhere, by the stream",
        lambda s: s.right(*s.given) + s.rows(BETWEEN.name),
    ),
    Mistake(
        "down-plus-norm",
        OUT,
        "the normalised stream is added instead of the residual",
        "ffn_swigl @ W_down.T + ffn_norm",
        "everywhere, by ffn_norm",
        lambda s: s.right(*s.given) + s.rows("ffn_norm"),
    ),
)
