"""Real faults: transformers' own Qwen2ForCausalLM, changed as an engine's developer might err.

Nothing here is computed by qwenref, and nothing is planted in arrays: the live model is patched
from outside and runs on with what the mistake makes, while scripts/capture_hf.py watches it.
Some sizes are those of weights/tiny-qwen2.5: D 84, N 6, K 2, H 14.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import capture_hf
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen2 import modeling_qwen2

from qwenref.stages import ATTENTION as STAGES
from qwenref.stages import EMBEDDING, RESIDUAL


class Change(NamedTuple):
    """An attribute, of a module of torch's or of Python's, that is another for a while."""

    owner: Any
    name: str
    value: object


Changes = Callable[[Any], list[Change]]
"""What a mistake changes in a loaded model."""


class Fault(NamedTuple):
    """One mistake.

    Attributes:
        name: In plain words.
        expected: The stages that do not follow from what the capture has of those before them.
        words: Any of these should be in a correct naming of the cause, in upper or lower case.
        changes: What it changes in a model.
        tokens: What it makes of the prompt.
        shows_in_bfloat16: Whether it is clearly larger than the roundings of bfloat16.
    """

    name: str
    expected: frozenset[str]
    words: tuple[str, ...]
    changes: Changes
    tokens: Callable[[list[int]], list[int]]
    shows_in_bfloat16: bool

    @contextmanager
    def patch(self, model: Any) -> Iterator[None]:
        """Make the mistake within the block."""
        with ExitStack() as stack:
            for change in self.changes(model):
                stack.enter_context(_changed(change))
            yield


def captured(
    fault: Fault, model_dir: Path, tokens: Sequence[int], dtype: str
) -> dict[str, np.ndarray]:
    """Return layer 0's stages, the embedding too, as capture_hf takes them from a faulty model."""
    model = capture_hf.load(model_dir, dtype)
    with fault.patch(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stages = capture_hf.stages_of(model, fault.tokens([*tokens]), [0])[0]
    return {EMBEDDING.name: stages.pop(RESIDUAL), **stages}


@contextmanager
def _changed(change: Change) -> Iterator[None]:
    """Set an attribute; afterwards put the old one back, or let that of the class show again."""
    owner, name, value = change
    before = getattr(owner, name)
    inherited = callable(before) and name not in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _fault(
    name: str,
    expected: frozenset[str],
    words: str,
    changes: Changes = lambda _: [],
    tokens: Callable[[list[int]], list[int]] = list,
    *,
    shows_in_bfloat16: bool = True,
) -> Fault:
    """Return a fault; its words are separated by commas."""
    return Fault(name, expected, tuple(words.split(", ")), changes, tokens, shows_in_bfloat16)


def _all(parts: Iterable[Changes]) -> Changes:
    parts = [*parts]
    return lambda model: [change for changes in parts for change in changes(model)]


ATTENTION, LAYER_NORM = "model.layers.0.self_attn", "model.layers.0.input_layernorm"


def _set(path: str, **values: object) -> Changes:
    """Give a module other attributes."""
    return lambda model: [Change(model.get_submodule(path), *each) for each in values.items()]


def _forward(path: str, forward: Callable[..., Any]) -> Changes:
    """Compute a module otherwise; `forward` gets the right way and what the module gets."""

    def changes(model: Any) -> list[Change]:
        module = model.get_submodule(path)
        right = module.forward
        return [Change(module, "forward", lambda *given: forward(right, *given))]

    return changes


def _parameter(
    path: str, change: Callable[[Tensor], Tensor | None] = lambda value: value, of: str = ""
) -> Changes:
    """Change a parameter, or put the one called `of` in its place."""

    def changes(model: Any) -> list[Change]:
        module, name = path.rsplit(".", 1)
        value = change(model.get_parameter(of or path).detach())
        made = None if value is None else nn.Parameter(value.clone())
        return [Change(model.get_submodule(module), name, made)]

    return changes


def _weight(linear: str, change: Callable[[Tensor], Tensor]) -> Changes:
    return _parameter(f"{ATTENTION}.{linear}.weight", change)


def _bias(linears: str, change: Callable[[Tensor], Tensor | None]) -> Changes:
    """Change the biases of q, k or v, each a letter of `linears`."""
    return _all(_parameter(f"{ATTENTION}.{name}_proj.bias", change) for name in linears)


def _of_layer_1(path: str) -> Changes:
    """Put a parameter of layer 1 in its place in layer 0."""
    return _parameter(f"model.layers.0.{path}", of=f"model.layers.1.{path}")


def _k_and_v_swapped(*names: str) -> Changes:
    return _all(
        _parameter(f"{ATTENTION}.{to}_proj.{name}", of=f"{ATTENTION}.{of}_proj.{name}")
        for name in names
        for to, of in ("kv", "vk")
    )


def _permuted_for_gguf(*names: str) -> Changes:
    """Permute rows of q and k as Llama's, so that RoPE may turn neighbours; Qwen2's are not."""

    def permuted(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, 2, 7)).transpose(1, 2).flatten(0, 2)

    linears = [f"{ATTENTION}.{linear}_proj" for linear in "qk"]
    return _all(_parameter(f"{of}.{name}", permuted) for of in linears for name in names)


def _split_by_groups(model: Any) -> list[Change]:
    """Take the rows of q, k and v as if each KV head's came together: its queries, k, v."""
    linears = [model.get_submodule(f"{ATTENTION}.{name}_proj") for name in "qkv"]
    rows = torch.cat([linear.weight.detach() for linear in linears]).unflatten(0, (2, -1))
    parts = [part.flatten(0, 1) for part in rows.split((42, 14, 14), dim=1)]
    return [Change(of, "weight", nn.Parameter(x)) for of, x in zip(linears, parts, strict=True)]


def _mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def _norm(
    given: Callable[[Tensor], Tensor] = lambda x: x,
    square: Callable[[Tensor], Tensor] = _mean_square,
) -> Changes:
    """Have the norm take something else, or divide by another root."""

    def forward(right: Any, x: Tensor) -> Tensor:
        norm, wide = right.__self__, given(x.float())
        return norm.weight * (wide * (square(wide) + norm.variance_epsilon).rsqrt()).to(x.dtype)

    return _forward(LAYER_NORM, forward)


def _norm_weight(change: Callable[[Tensor], Tensor]) -> Changes:
    return _parameter(f"{LAYER_NORM}.weight", change)


Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""RoPE, of [1, heads, T, H] by cos and sin as [1, 1, T, H]."""


def _frequencies(change: Callable[[Tensor], Tensor]) -> Changes:
    """Change how far each pair turns from token to token."""
    return lambda m: [Change(m.model.rotary_emb, "inv_freq", change(m.model.rotary_emb.inv_freq))]


def _theta(theta: float) -> Changes:
    return _frequencies(lambda f: 1 / theta ** (torch.arange(len(f)).float() / len(f)))


def _positions(change: Callable[[Tensor], Tensor]) -> Changes:
    return _forward("model.rotary_emb", lambda right, x, at: right(x, change(at)))


def _rope(q: Turn, k: Turn | None = None) -> Changes:
    """Turn queries and keys otherwise, keys as queries unless `k` is given."""

    def apply(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return q(query, cos, sin), (k or q)(key, cos, sin)

    return lambda _: [Change(modeling_qwen2, "apply_rotary_pos_emb", apply)]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn as transformers does."""
    return x * cos + modeling_qwen2.rotate_half(x) * sin


def _turned_in_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i + 1)."""
    half = x.shape[-1] // 2
    cos, sin, even, odd = cos[..., :half], sin[..., :half], x[..., ::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _turned_in_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn only about half the channels, by the first frequencies."""
    pairs = x.shape[-1] // 4
    cos, sin = (torch.cat((of[..., :pairs],) * 2, dim=-1) for of in (cos, sin))
    return torch.cat((_turned(x[..., : 2 * pairs], cos, sin), x[..., 2 * pairs :]), dim=-1)


def _turned_behind(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn by the position of the token before."""
    at = (torch.arange(x.shape[2]) - 1).clamp(min=0)
    return _turned(x, cos[:, :, at], sin[:, :, at])


def _normed_and_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalise each head first, as Qwen3 does."""
    return _turned(functional.rms_norm(x, x.shape[-1:], eps=1e-6), cos, sin)


def _k_bias_after_rope(model: Any) -> list[Change]:
    bias = model.get_parameter(f"{ATTENTION}.k_proj.bias").detach().view(2, 1, 14)
    rope = _rope(_turned, lambda x, cos, sin: _turned(x, cos, sin) + bias)
    return _all([_bias("k", lambda _: None), rope])(model)


def _mask(sees: Callable[[Tensor, Tensor], Tensor], hidden: float | None = None) -> Changes:
    """Let a query see other keys; what it does not see gets `hidden`, else the dtype's minimum."""

    def mask(inputs_embeds: Tensor, **_: Any) -> Tensor:
        at = torch.arange(inputs_embeds.shape[1])
        seen = sees(at[:, None], at[None])
        least = torch.finfo(inputs_embeds.dtype).min if hidden is None else hidden
        none = torch.zeros(seen.shape, dtype=inputs_embeds.dtype)
        return none.masked_fill(~seen, least)[None, None]

    return lambda _: [Change(modeling_qwen2, "create_causal_mask", mask)]


def _softmax(change: Callable[[Any, Tensor], Tensor]) -> Changes:
    """Take the softmax otherwise; `change` gets the right one, over the keys, and the scores."""

    def changes(_: Any) -> list[Change]:
        right = functional.softmax

        def softmax(scores: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
            return change(lambda x, dim=dim: right(x, dim=dim, dtype=dtype), scores)

        return [Change(functional, "softmax", softmax)]

    return changes


def _attention(
    given: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda k, v: (k, v),
    result: Callable[[Tensor], Tensor] = lambda output: output,
) -> Changes:
    """Have attention read other keys and values, [1, K, T, H], or return another [1, T, N, H]."""

    def changes(_: Any) -> list[Change]:
        right = capture_hf.eager_attention_forward

        def attend(module: Any, query: Tensor, k: Tensor, v: Tensor, *a: Any, **o: Any) -> Any:
            output, probabilities = right(module, query, *given(k, v), *a, **o)
            return result(output), probabilities

        return [Change(capture_hf, "eager_attention_forward", attend)]

    return changes


def _heads(result: Callable[[Tensor], Tensor]) -> Changes:
    return _attention(result=result)


Repeat = Callable[[Tensor, int], Tensor]
_repeated: Repeat = modeling_qwen2.repeat_kv


def _repeat_kv(keys: Repeat, values: Repeat) -> Changes:
    """Repeat heads otherwise; transformers asks for keys and for values in turn."""

    def changes(_: Any) -> list[Change]:
        turns = cycle((keys, values))
        return [Change(modeling_qwen2, "repeat_kv", lambda x, groups: next(turns)(x, groups))]

    return changes


def _tiled(x: Tensor, groups: int) -> Tensor:
    """Give query head n the KV head n % K, not n // G."""
    return x.repeat(1, groups, 1, 1)


def _first(x: Tensor, groups: int) -> Tensor:
    """Give all query heads the first KV head."""
    return x[:, :1].repeat(1, x.shape[1] * groups, 1, 1)


TABLE, NORM, MATMUL, BIAS, Q, K, SCORES, SOFTMAX, HEADS, OUT = (
    frozenset({stage.name}) for stage in (EMBEDDING, *STAGES)
)

MISSING = "missing, left out, leaves out, forg, dropped, not added, not applied, without, skip"
NOT_TURNED = f"{MISSING}, not turned, not rotated, unrotated, no rope, position 0, all 0"
LAYER_1 = "layer 1, another layer, other layer, next layer, wrong layer"
SWAPPED = "swap, exchang, k and v, k_proj and v_proj"
ORDER = "head, roll, order, row, column, permut, shift"
GGUF = "permut, gguf, interleav, row"
SCALED = "scale, scaling, sqrt, factor, times"
BACKWARDS = "backward, sign, direction, opposite, negat, other way"
POSITION = "position, shift, offset, restart, start again, reset"
GQA = "n % k, tile, repeat, kv head, key/value head, group"
FUTURE = "mask, causal, future"
AXES = "transpos, reshape, layout, axes, order, interleav"
LATE = "token, shift, roll, off by one"

HEALTHY = _fault("nothing", frozenset(), "nothing")
"""No mistake at all, to compare with."""

FAULTS = [
    # Tokens, embedding
    _fault("tokens shifted by one", TABLE, "token", tokens=lambda t: [*t[1:], t[0]]),
    _fault("a BOS in front, the last lost", TABLE, "token", tokens=lambda t: [0, *t[:-1]]),
    _fault("one token is another", TABLE, "token", tokens=lambda t: [*t[:3], t[3] ^ 1, *t[4:]]),
    _fault(
        "embedding times sqrt(D)",
        TABLE,
        SCALED,
        _forward("model.embed_tokens", lambda right, t: right(t) * 84**0.5),
    ),
    _fault(
        "lm_head for embedding",
        TABLE,
        "lm_head, tied",
        _parameter("model.embed_tokens.weight", of="lm_head.weight"),
    ),
    # Norm
    _fault("norm eps 1e-5", NORM, "eps", _set(LAYER_NORM, variance_epsilon=1e-5)),
    _fault("norm eps 1e-3", NORM, "eps", _set(LAYER_NORM, variance_epsilon=1e-3)),
    _fault(
        "norm eps 0", NORM, "eps", _set(LAYER_NORM, variance_epsilon=0.0), shows_in_bfloat16=False
    ),
    _fault("norm weight forgotten", NORM, "weight", _norm_weight(torch.ones_like)),
    _fault("norm weight plus one", NORM, "1 +, + 1, plus one", _norm_weight(lambda w: 1 + w)),
    _fault("norm weight of layer 1", NORM, LAYER_1, _of_layer_1("input_layernorm.weight")),
    _fault(
        "weight of the norm after attention",
        NORM,
        "post_attention, post-attention",
        _parameter(f"{LAYER_NORM}.weight", of="model.layers.0.post_attention_layernorm.weight"),
    ),
    _fault("norm minus the mean", NORM, "mean, layernorm", _norm(lambda x: x - x.mean(-1, True))),
    _fault("norm by the sum", NORM, "sum, mean", _norm(square=lambda x: 84 * _mean_square(x))),
    _fault("norm of all tokens", NORM, "prompt, token", _norm(square=lambda x: x.pow(2).mean())),
    _fault("norm left out", NORM, f"{MISSING}, no norm", _forward(LAYER_NORM, lambda _, x: x)),
    # Projections
    _fault("q_proj rolled by a head", MATMUL, ORDER, _weight("q_proj", lambda w: w.roll(14, 0))),
    _fault("q_proj transposed", MATMUL, "transpos", _weight("q_proj", lambda w: w.T)),
    _fault("q_proj of layer 1", MATMUL, LAYER_1, _of_layer_1("self_attn.q_proj.weight")),
    _fault("k and v weights swapped", MATMUL, SWAPPED, _k_and_v_swapped("weight")),
    _fault("k and v swapped", MATMUL | BIAS, SWAPPED, _k_and_v_swapped("weight", "bias")),
    _fault("weights permuted for GGUF", MATMUL, GGUF, _permuted_for_gguf("weight")),
    _fault("all permuted for GGUF", MATMUL | BIAS, GGUF, _permuted_for_gguf("weight", "bias")),
    _fault("q, k and v split by groups", MATMUL, f"{ORDER}, group, fused, split", _split_by_groups),
    # Biases
    _fault("q bias dropped", BIAS, MISSING, _bias("q", lambda _: None)),
    _fault("k bias dropped", BIAS, MISSING, _bias("k", lambda _: None)),
    _fault("v bias dropped", BIAS, MISSING, _bias("v", lambda _: None)),
    _fault("all biases dropped", BIAS, MISSING, _bias("qkv", lambda _: None)),
    _fault("biases added twice", BIAS, "twice, doubl, two times", _bias("qkv", lambda b: 2 * b)),
    _fault("biases subtracted", BIAS, "subtract, sign, negat", _bias("qkv", lambda bias: -bias)),
    _fault("biases of k and v swapped", BIAS, SWAPPED, _k_and_v_swapped("bias")),
    _fault("q bias rolled by a head", BIAS, ORDER, _bias("q", lambda bias: bias.roll(14))),
    _fault("q bias of layer 1", BIAS, LAYER_1, _of_layer_1("self_attn.q_proj.bias")),
    _fault("k bias added after RoPE", BIAS | K, f"after, {MISSING}", _k_bias_after_rope),
    # RoPE
    _fault("theta 10000", Q | K, "theta", _theta(1e4)),
    _fault("theta 1.01e6", Q | K, "theta", _theta(1.01e6), shows_in_bfloat16=False),
    _fault("exponent i/H", Q | K, "theta, exponent, frequenc", _frequencies(Tensor.sqrt)),
    _fault(
        "frequencies in bfloat16",
        Q | K,
        "bfloat16, round, frequenc",
        _frequencies(lambda f: f.bfloat16().float()),
        shows_in_bfloat16=False,
    ),
    _fault("positions halved", Q | K, f"{SCALED}, position", _frequencies(lambda f: f / 2)),
    _fault(
        "neighbours turned", Q | K, "interleav, neighbo, adjacent", _rope(_turned_in_neighbours)
    ),
    _fault("turned backwards", Q | K, BACKWARDS, _rope(lambda x, cos, sin: _turned(x, cos, -sin))),
    _fault("cos and sin swapped", Q | K, SWAPPED, _rope(lambda x, cos, sin: _turned(x, sin, cos))),
    _fault("half the channels turned", Q | K, "part, half, channels", _rope(_turned_in_part)),
    _fault("k not turned", K, NOT_TURNED, _rope(_turned, lambda x, *_: x)),
    _fault("q not turned", Q, NOT_TURNED, _rope(lambda x, *_: x, _turned)),
    _fault("positions all 0", Q | K, NOT_TURNED, _positions(torch.zeros_like)),
    _fault("positions from 1", Q | K, POSITION, _positions(lambda at: at + 1)),
    _fault("positions start again", Q | K, POSITION, _positions(lambda at: at % 6)),
    _fault("k a position behind", K, POSITION, _rope(_turned, _turned_behind)),
    _fault("YaRN's factor", Q | K, SCALED, _set("model.rotary_emb", attention_scaling=1.14)),
    _fault("q and k normalised, as Qwen3", Q | K, "norm, qwen3", _rope(_normed_and_turned)),
    # Scores
    _fault("scores over H", SCORES, f"{SCALED}, 1/h, / h", _set(ATTENTION, scaling=1 / 14)),
    _fault("scores not scaled", SCORES, SCALED, _set(ATTENTION, scaling=1.0)),
    _fault(
        "keys a slot late",
        SCORES,
        LATE,
        _attention(lambda k, v: (functional.pad(k, (0, 0, 1, -1)), v)),
    ),
    _fault("keys tiled", SCORES, GQA, _repeat_kv(_tiled, _repeated)),
    _fault("keys and values tiled", SCORES | HEADS, GQA, _repeat_kv(_tiled, _tiled)),
    _fault("only one KV head", SCORES | HEADS, f"{GQA}, first", _repeat_kv(_first, _first)),
    # Mask, softmax
    _fault("no causal mask", SOFTMAX, FUTURE, _mask(lambda q, k: k >= 0)),
    _fault("sees the next token", SOFTMAX, f"{FUTURE}, next", _mask(lambda q, k: k <= q + 1)),
    _fault("does not see itself", SOFTMAX, "mask, itself, own", _mask(lambda q, k: k < q)),
    _fault("mask transposed", SOFTMAX, f"{FUTURE}, transpos", _mask(lambda q, k: k >= q)),
    _fault("window of 4", SOFTMAX, "window, sliding", _mask(lambda q, k: (k <= q) & (k > q - 4))),
    _fault(
        "chunks apart",
        SOFTMAX,
        "mask, chunk, block",
        _mask(lambda q, k: (k <= q) & (k // 6 == q // 6)),
    ),
    _fault("first masked", SOFTMAX, "mask, first, token 0", _mask(lambda q, k: (k <= q) & (k > 0))),
    _fault("mask of only -5", SOFTMAX, FUTURE, _mask(lambda q, k: k <= q, hidden=-5.0)),
    _fault(
        "masked scores 0",
        SOFTMAX,
        f"{FUTURE}, zero",
        _softmax(lambda soft, x: soft(x.masked_fill(x < -1e30, 0))),
    ),
    _fault("temperature 0.7", SOFTMAX, f"{SCALED}, temp", _softmax(lambda soft, x: soft(x / 0.7))),
    _fault(
        "softmax of queries",
        SOFTMAX,
        "quer, axis, column",
        _softmax(lambda soft, x: soft(x, dim=-2)),
    ),
    _fault(
        "one more in the denominator",
        SOFTMAX,
        "sink, denominator, 1 +, sum",
        _softmax(lambda soft, x: soft(functional.pad(x, (0, 1)))[..., :-1]),
    ),
    _fault(
        "dropout left on",
        SOFTMAX,
        "dropout, random",
        _set(ATTENTION, training=True, attention_dropout=0.1),
    ),
    # Values, heads
    _fault("values tiled", HEADS, GQA, _repeat_kv(_repeated, _tiled)),
    _fault("values of the token before", HEADS, LATE, _attention(lambda k, v: (k, v.roll(1, 2)))),
    _fault("keys used as values", HEADS, "k as v, keys", _attention(lambda k, v: (k, k))),
    _fault("heads left first", HEADS, AXES, _heads(lambda o: o.transpose(1, 2).reshape(o.shape))),
    _fault("channels before heads", HEADS, AXES, _heads(lambda o: o.mT.reshape(o.shape))),
    _fault("heads rolled by one", HEADS, ORDER, _heads(lambda o: o.roll(1, 2))),
    # Output
    _fault("o_proj transposed", OUT, "transpos", _weight("o_proj", lambda w: w.T)),
    _fault("o_proj rolled by a head", OUT, ORDER, _weight("o_proj", lambda w: w.roll(14, 1))),
    _fault("o_proj of layer 1", OUT, LAYER_1, _of_layer_1("self_attn.o_proj.weight")),
    _fault(
        "o_proj has a bias",
        OUT,
        "bias",
        _parameter(f"{ATTENTION}.o_proj.bias", of=f"{ATTENTION}.q_proj.bias"),
    ),
    _fault(
        "o_proj left out",
        OUT,
        f"{MISSING}, identity",
        _forward(f"{ATTENTION}.o_proj", lambda _, x: x),
    ),
]
