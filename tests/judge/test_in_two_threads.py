"""Large arrays are looked at by two threads; what comes out is what one finds."""

import numpy as np
import pytest
from helpers import TINY

import qwenref
from qwenref.judge import distance as module


def arrays(name: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shape = {"attn_scores": (6, 40, 40), "qkv_bias": (40, 140), "unknown": (9_000,)}[name]
    a = rng.standard_normal(shape).astype(np.float32)
    b = a * np.float32(1 + 1e-5)
    return a, b


def equal(a: np.ndarray, b: np.ndarray) -> None:
    """Leave them as they are."""


def ties(a: np.ndarray, b: np.ndarray) -> None:
    a.flat[:] = 1
    b.flat[:] = 1.5


def nonfinite(a: np.ndarray, b: np.ndarray) -> None:
    a.flat[[3, 700, 5500]] = np.nan
    b.flat[[2, 700, 5000]] = np.inf


def narrow(a: np.ndarray, b: np.ndarray) -> None:
    a.flat[:] = a.astype(np.float16).ravel()
    b.flat[:] = a.ravel()
    b.flat[::300] = 1 + np.arange(b.flat[::300].size) / 1024
    b.flat[-1] = 1e-3  # no float16 number


def masks(a: np.ndarray, b: np.ndarray) -> None:
    a.flat[::3] = b.flat[::3] = -1e5
    a.flat[9] = np.nan


@pytest.mark.parametrize("change", [equal, ties, nonfinite, narrow, masks])
@pytest.mark.parametrize("name", ["attn_scores", "qkv_bias", "unknown"])
def test_two_threads_find_what_one_does(
    name: str, change: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(change)
    a, b = arrays(name, np.random.default_rng(0))
    change(a, b)
    found = []
    for many in (10**9, 1):
        monkeypatch.setattr(module, "BLOCK", 512)
        monkeypatch.setattr(module, "MANY", many)
        found.append(qwenref.diff({name: a}, {name: b}, model=TINY).to_json())
    assert found[0] == found[1]


def test_what_fails_in_the_other_thread_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = arrays("unknown", np.random.default_rng(0))
    monkeypatch.setattr(module, "BLOCK", 512)
    monkeypatch.setattr(module, "MANY", 1)
    add, seen = module.Seen.add, []

    def fail(self: object, *args: object) -> None:
        if self not in seen:
            seen.append(self)
        if self is not seen[0]:
            raise MemoryError
        add(self, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module.Seen, "add", fail)
    with pytest.raises(MemoryError):
        qwenref.diff({"unknown": a}, {"unknown": b})
