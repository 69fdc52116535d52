"""What may go wrong in any stage: buffers, strides, files; and what an error is like, at least.

Most are found from what was dumped; so each has far fewer numbers to choose than there are values
that it has to explain.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from qwenref.metrics import cells_of
from qwenref.mistakes.coarse import multiples, steps
from qwenref.mistakes.mistake import CannotBe, Mistake, Setting, needs
from qwenref.stages import BY_NAME, EMBEDDING, HEAD, LAYER, RESIDUAL, Stage

STAGES = (RESIDUAL, *(stage.name for stage in (*LAYER, *HEAD)))

ENOUGH = 3
"""Values for each number that is fitted: two always fit a factor and an offset."""

NEARLY = 0.2
"""Relative distance of a row or head to the one that it is taken for."""

FEW = 0.02
"""Part of the values that may be wrong each by itself."""

SAME_SHAPE = {
    "attn_norm": (RESIDUAL, "attention", "attn_out"),
    "qkv_matmul": ("qkv_bias",),
    "qkv_bias": ("qkv_matmul",),
    "q_post_rope": ("k_post_rope", "attention"),
    "k_post_rope": ("q_post_rope",),
    "attn_scores": ("attn_softmax",),
    "attn_softmax": ("attn_scores",),
    "attention": (RESIDUAL, "attn_norm", "q_post_rope", "attn_out"),
    "attn_out": (RESIDUAL, "attn_norm", "attention"),
    "post_attn_residual": (RESIDUAL, "attn_out", "attn_norm", "attention"),
    "ffn_norm": (RESIDUAL, "post_attn_residual", "attn_norm", "attn_out"),
    "ffn_gate": ("ffn_up",),
    "ffn_up": ("ffn_gate",),
    "ffn_silu": ("ffn_gate", "ffn_up"),
    "ffn_swigl": ("ffn_gate", "ffn_up", "ffn_silu"),
    "ffn_out": (RESIDUAL, "post_attn_residual", "ffn_norm", "attn_out"),
    "post_ffn_residual": (RESIDUAL, "post_attn_residual", "ffn_norm", "ffn_out"),
    "final_norm": (RESIDUAL,),
}
"""Stages whose values may lie in the place of another's, if sizes are equal."""


def _stage(s: Setting) -> Stage:
    return EMBEDDING if s.stage == RESIDUAL else BY_NAME[s.stage]


def cells(s: Setting, values: np.ndarray) -> np.ndarray:
    """Return a stage as [T, J, W]: tokens, heads (or what is as wide, or one), their values."""
    return cells_of(_stage(s), values, s.sizes["H"])


def _back(s: Setting, of: np.ndarray, like: np.ndarray) -> np.ndarray:
    if _stage(s).masked:
        return of.swapaxes(0, 1)
    return of.reshape(like.shape)


class _Places(NamedTuple):
    """Values that are put somewhere."""

    mask: np.ndarray
    values: np.ndarray | float
    text: str


def _put(s: Setting, places: _Places) -> np.ndarray:
    right = s.right(*s.given)
    needs(places.mask.shape == right.shape)
    return np.where(places.mask, places.values, right)


def _seen(s: Setting, values: np.ndarray) -> np.ndarray:
    """Return which cells are read by somebody."""
    if not _stage(s).masked:
        return np.ones(values.shape, bool)
    seen = np.arange(values.shape[-1]) <= s.positions[:, None]
    return np.broadcast_to(seen, values.shape)


def _all_zeros(s: Setting, dumped: np.ndarray | None) -> Iterator[_Places]:
    if dumped is None:
        return
    zeros = (dumped == 0) & _seen(s, dumped)
    if zeros.all(where=_seen(s, dumped)):
        yield _Places(zeros, 0.0, "nothing but zeros: never filled")
    elif zeros.any():
        part = np.count_nonzero(zeros) / np.count_nonzero(_seen(s, dumped))
        yield _Places(zeros, 0.0, f"{part:.1%} of the values are 0")


def _not_finite(s: Setting, dumped: np.ndarray | None) -> Iterator[_Places]:
    if dumped is None or np.isfinite(dumped).all():
        return
    bad = ~np.isfinite(dumped) & _seen(s, dumped)
    names = [
        f"{np.count_nonzero(test(dumped) & bad)} {name}"
        for name, test in (("NaN", np.isnan), ("infinite", np.isinf))
        if (test(dumped) & bad).any()
    ]
    yield _Places(bad, dumped, f"{' and '.join(names)} of {dumped.size} values, the others right")


def _single_values(s: Setting, dumped: np.ndarray | None) -> Iterator[_Places]:
    """Yield the few values that are most off, if they are a few."""
    if dumped is None or not np.isfinite(dumped).all():
        return
    off = np.abs(dumped - s.right(*s.given)) * _seen(s, dumped)
    scale = np.sqrt(np.mean(np.square(dumped)))
    order = np.sort(off, axis=None)[::-1]
    for number in dict.fromkeys((1, 2, 4, int(FEW * off.size))):
        if 0 < number <= max(1, FEW * off.size) and order[number - 1] > 1e-4 * scale:
            which = off >= order[number - 1]
            found = np.count_nonzero(which)
            one = "one value is" if found == 1 else f"{found} single values are"
            yield _Places(which, dumped, f"{one} something else")


class _Factors(NamedTuple):
    """What the values of a slice are multiplied with, [T or 1, J or 1, W or 1]."""

    factors: np.ndarray
    text: str


def _times(s: Setting, of: _Factors) -> np.ndarray:
    right = s.right(*s.given)
    split = cells(s, right)
    needs(all(have in (1, size) for have, size in zip(of.factors.shape, split.shape, strict=True)))
    return _back(s, split * of.factors, right)


def _factors(s: Setting, dumped: np.ndarray | None) -> Iterator[_Factors]:
    if dumped is None or not np.isfinite(dumped).all():
        return
    right = s.right(*s.given)
    seen = _seen(s, right)
    a, b = (cells(s, np.where(seen, x, 0.0)) for x in (right, dumped))
    for name, axes in (
        ("all values", (0, 1, 2)),
        ("each head", (0, 2)),
        ("each token", (1, 2)),
        ("each head of each token", (2,)),
        ("each channel", (0,)),
    ):
        squares = np.sum(a * a, axis=axes, keepdims=True)
        number = np.prod(squares.shape)
        if number * ENOUGH > np.count_nonzero(seen) or (number == 1) != (axes == (0, 1, 2)):
            continue
        if axes == (0,) and _different(a) < ENOUGH:
            continue
        factors = np.divide(
            np.sum(a * b, axis=axes, keepdims=True),
            squares,
            out=np.ones_like(squares),
            where=squares > 0,
        )
        if number == 1:
            (only,) = factors.ravel().tolist()
            for digits in (2, 3, 4, 17):
                nice = float(f"{only:.{digits}g}")
                yield _Factors(np.full_like(factors, nice), _of_all(nice))
            continue
        common = float(np.median(factors))
        others = np.abs(factors - common) > 1e-3 * max(abs(common), 1e-3)
        which = np.argwhere(others)
        if 0 < len(which) <= number / 2:
            nice = np.where(others, factors, 1.0 if abs(common - 1) < 1e-2 else common)
            one = factors[others]
            same = np.ptp(one) < 1e-2 * np.abs(one).max()
            value = f"{np.median(one):.3g}" if same else f"{one.min():.3g} to {one.max():.3g}"
            place = name.replace("each ", "")
            yield _Factors(nice, f"{len(which)} {place}{'s' * (len(which) > 1)} times {value}")
        yield _Factors(factors, f"{name} by a factor of its own")


def _different(split: np.ndarray) -> int:
    """Return how many tokens differ: whatever is wrong with one is wrong with its equals."""
    return len(np.unique(split.reshape(len(split), -1).astype(np.float32), axis=0))


def _of_all(factor: float) -> str:
    return "all values negated" if factor == -1 else f"all values times {factor:.4g}"


def _plus(s: Setting, of: _Factors) -> np.ndarray:
    right = s.right(*s.given)
    return _back(s, cells(s, right) + of.factors, right)


def _offsets(s: Setting, dumped: np.ndarray | None) -> Iterator[_Factors]:
    if dumped is None or not np.isfinite(dumped).all():
        return
    right = s.right(*s.given)
    seen = _seen(s, right)
    mean = float((dumped - right)[seen].mean())
    yield _Factors(np.full((1, 1, 1), mean), f"all values plus {mean:.3g}")
    off = cells(s, np.where(seen, dumped - right, 0.0))
    if _different(cells(s, right)) >= ENOUGH:
        yield _Factors(off.mean(axis=0, keepdims=True), "the same offset in every token")


class _Order(NamedTuple):
    """Which token, or head, lies where."""

    axis: int
    order: tuple[int, ...]
    text: str


def _in_order(s: Setting, of: _Order) -> np.ndarray:
    right = s.right(*s.given)
    split = cells(s, right)
    needs(split.shape[of.axis] == len(of.order))
    return _back(s, split.take(of.order, axis=of.axis), right)


def _orders(s: Setting, dumped: np.ndarray | None) -> Iterator[_Order]:
    """Yield what tokens, heads and channels of a head are those of which others."""
    if dumped is None or not np.isfinite(dumped).all():
        return
    masked = _stage(s).masked
    seen = _seen(s, dumped)
    a, b = (cells(s, np.where(seen, x, 0.0)) for x in (s.right(*s.given), dumped))
    for axis, name in enumerate(("token", "head", "channel")):
        if a.shape[axis] < 2 or (masked and axis != 1) or (axis == 2 and a.shape[1] == 1):
            continue
        of, found = (np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (a, b))
        if found.shape[1] < ENOUGH:
            continue
        distance = (
            np.sum(np.square(found), axis=1)[:, None]
            + np.sum(np.square(of), axis=1)
            - 2 * found @ of.T
        )
        order = np.argmin(distance, axis=1)
        if np.array_equal(order, np.arange(len(order))):
            continue
        near = distance[np.arange(len(order)), order] <= (NEARLY**2) * np.sum(np.square(found), 1)
        order = np.where(near | (order == np.arange(len(order))), order, np.arange(len(order)))
        yield _Order(axis, tuple(order.tolist()), _of_order(name, order.tolist()))


def _of_order(name: str, order: list[int]) -> str:
    size = len(order)
    by = {(at - of) % size for at, of in enumerate(order)}
    if len(by) == 1:
        (shift,) = by
        return f"{name}s shifted by {shift if 2 * shift <= size else shift - size:+d}"
    if order == [*range(size)][::-1]:
        return f"{name}s in reverse order"
    late = [at for at, of in enumerate(order) if of != at]
    if len(late) == 2 and order[late[0]] == late[1] and order[late[1]] == late[0]:
        return f"{name}s {late[0]} and {late[1]} swapped"
    if len(late) == 1:
        return f"{name} {late[0]} has the values of {name} {order[late[0]]}"
    shown = ", ".join(map(str, order[:12]))
    return f"{name}s are those of {name}s {shown}{', ..' if size > 12 else ''}"


def _of_stage(s: Setting, name: str) -> np.ndarray:
    needs(name in SAME_SHAPE[s.stage])
    values = s.rows(name)
    needs(bool(values[np.isfinite(values)].any()))  # nothing but 0 and NaN is not that stage's own
    like = s.right(*s.given)
    needs(
        values.size == like.size and not (values.shape != like.shape and values.ndim == like.ndim)
    )
    return values.reshape(like.shape)


def _transposed(s: Setting) -> np.ndarray:
    right = s.right(*s.given)
    needs(len(s.positions) == s.sizes["T"] > 1 and s.stage not in ("attn_scores", "attn_softmax"))
    flat = right.reshape(len(right), -1)
    return flat.T.reshape(right.shape)


def _clipped(s: Setting, at: tuple[float, float]) -> np.ndarray:
    return np.clip(s.right(*s.given), *at)


def _limits(s: Setting, dumped: np.ndarray | None) -> Iterator[tuple[float, float]]:
    if dumped is None or not np.isfinite(dumped).all():
        return
    right = s.right(*s.given)
    low, high = float(dumped.min()), float(dumped.max())
    if np.count_nonzero(dumped == high) > 1 and high < right.max():
        symmetric = low == -high
        yield (low if symmetric else -np.inf, high)
    if np.count_nonzero(dumped == low) > 1 and low > right.min():
        yield (low, np.inf)


def _nearest_stage(s: Setting, _: np.ndarray | None) -> Iterator[str]:
    for name in SAME_SHAPE.get(s.stage, ()):
        try:
            _of_stage(s, name)
        except CannotBe:
            continue
        yield name


def _some_zeros(which: str) -> Callable[[Setting], _Places]:
    """Return what puts zeros to the last token, to a head, to a tail of channels, everywhere."""

    def places(s: Setting) -> _Places:
        right = s.right(*s.given)
        mask = np.zeros(cells(s, right).shape, bool)
        at = {"token": (-1,), "head": (slice(None), 0), "tail": (..., slice(-3, None)), "all": ()}
        mask[at[which]] = True
        return _Places(_back(s, mask, right), 0.0, "")

    return places


def _one_value(value: float) -> Callable[[Setting], _Places]:
    def places(s: Setting) -> _Places:
        right = s.right(*s.given)
        mask = np.zeros(right.shape, bool)
        mask[(-1, -1, 0) if right.ndim == 3 else (-1, 1)] = True
        return _Places(mask, value, "")

    return places


def _factor(value: float, which: str) -> Callable[[Setting], _Factors]:
    def factors(s: Setting) -> _Factors:
        shape = cells(s, s.right(*s.given)).shape
        axis = ("all", "token", "head").index(which)
        if axis:
            needs(shape[axis - 1] > 1)
            found = np.ones([size if of == axis - 1 else 1 for of, size in enumerate(shape)])
            found.ravel()[-1] = value
            return _Factors(found, "")
        return _Factors(np.full((1, 1, 1), value), "")

    return factors


def _offset(value: float) -> Callable[[Setting], _Factors]:
    return lambda s: _Factors(
        np.full((1, 1, 1), value * np.sqrt(np.mean(np.square(s.right(*s.given))))), ""
    )


def _order(axis: int, how: str) -> Callable[[Setting], _Order]:
    def order(s: Setting) -> _Order:
        number = cells(s, s.right(*s.given)).shape[axis]
        masked = _stage(s).masked
        needs(number > 1 and not (masked and axis == 0))
        found = np.arange(number)
        found = {
            "late": np.maximum(found - 1, 0),
            "backwards": found[::-1],
            "two": np.where(found < 2, 1 - found, found),
        }[how]
        return _Order(axis, tuple(found.tolist()), "")

    return order


def _rms(part: float) -> Callable[[Setting], float]:
    return lambda s: part * float(np.sqrt(np.mean(np.square(s.right(*s.given)))))


def _clip(part: float) -> Callable[[Setting], tuple[float, float]]:
    def limits(s: Setting) -> tuple[float, float]:
        at = part * float(np.sqrt(np.mean(np.square(s.right(*s.given)))))
        return -at, at

    return limits


def _text(of: Any) -> str:
    return of.text


def _anywhere(
    name: str, text: str, formula: str, run: Callable[..., np.ndarray], **more: Any
) -> Mistake:
    stages = more.pop("stages", STAGES)
    return Mistake(f"any-{name}", stages, text, formula, "as it says", run, **more)


MISTAKES = (
    _anywhere(
        "of-stage",
        "the values of {}",
        "another stage",
        _of_stage,
        stages=tuple(SAME_SHAPE),
        values=_nearest_stage,
        planted=(
            *("qkv_matmul", "qkv_bias", RESIDUAL, "attn_norm", "attn_scores", "attn_softmax"),
            *("post_attn_residual", "ffn_norm", "ffn_gate", "ffn_up"),
        ),
        in_file=True,
    ),
    _anywhere(
        "zeros",
        "{}",
        "0 in some places",
        _put,
        values=_all_zeros,
        planted=tuple(map(_some_zeros, ("token", "head", "tail", "all"))),
        said=_text,
        general=True,
    ),
    _anywhere(
        "not-finite",
        "{}",
        "NaN or infinity in some places",
        _put,
        values=_not_finite,
        planted=(_one_value(np.nan), _one_value(np.inf)),
        said=_text,
        general=True,
    ),
    _anywhere(
        "order",
        "{}",
        "y[m(i)]",
        _in_order,
        values=_orders,
        planted=(_order(0, "late"), _order(0, "two"), _order(1, "backwards")),
        said=_text,
        general=True,
    ),
    _anywhere(
        "factor",
        "{}",
        "c * y",
        _times,
        values=_factors,
        planted=(
            _factor(1.03, "all"),
            _factor(-1.0, "all"),
            _factor(1.5, "token"),
            _factor(0.5, "head"),
        ),
        said=_text,
        general=True,
    ),
    _anywhere(
        "offset",
        "{}",
        "y + c",
        _plus,
        values=_offsets,
        planted=(_offset(0.1),),
        said=_text,
        general=True,
    ),
    _anywhere(
        "transposed",
        "transposed in memory: [C, T] as if it were [T, C]",
        "y.T",
        _transposed,
        stages=(RESIDUAL, "attn_norm", "qkv_matmul", "attention", "ffn_gate", "ffn_out"),
        general=True,
    ),
    _anywhere(
        "clipped",
        "saturated: values end at {}",
        "clip(y, a, b)",
        _clipped,
        values=_limits,
        planted=(_clip(1.0),),
        said=lambda at: f"{at[0]:.4g} and {at[1]:.4g}",
        general=True,
    ),
    _anywhere(
        "step",
        "whole multiples of {:.4g}: quantised",
        "round(y / c) * c",
        multiples,
        values=steps,
        stages=STAGES[1:],
        planted=(_rms(0.05),),
        general=True,
        rounds=True,
    ),
    _anywhere(
        "single-values",
        "{}",
        "other values in a few places",
        _put,
        values=_single_values,
        planted=(_one_value(3.0),),
        said=_text,
        general=True,
    ),
)
