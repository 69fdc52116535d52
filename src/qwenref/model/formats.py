"""Numbers as engines store them: floating-point formats, and ggml's blocks of whole numbers."""

import numpy as np

from qwenref.model.precision import FORMATS, nearest


def in_format(values: np.ndarray, name: str) -> np.ndarray:
    """Round float64 values to a format, a floating-point one or blocks of whole numbers."""
    if name == "exact":
        return values
    if name == "q8_0":
        return _q8_0(values)
    if name == "q8_K":
        return _q8_k(values)
    return nearest(values, FORMATS[name])


def fits(values: np.ndarray, name: str) -> bool:
    """Return whether rounding to a format changes no value; NaN and infinities are left out."""
    values = values[np.isfinite(values)]
    return np.array_equal(nearest(values, FORMATS[name]), values)


def spacing(values: np.ndarray, narrow: str) -> np.ndarray:
    """Return the distance of neighbours in a format, at each value; 0 at 0."""
    _, exponents = np.frexp(values)
    _, least = np.frexp(FORMATS[narrow].smallest or np.finfo(values.dtype).tiny)
    steps = np.ldexp(1.0, np.maximum(exponents, least) - 1 - FORMATS[narrow].mantissa)
    return np.where(values == 0, 0.0, steps)


def _q8_0(values: np.ndarray) -> np.ndarray:
    """Blocks of 32, a float16 scale of the largest / 127 each (quantize_row_q8_0, ggml)."""
    blocks, shape = _blocks(values, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    scale = (largest / np.float32(127)).astype(np.float32)
    steps = np.divide(127, largest, out=np.zeros_like(largest), where=largest > 0)
    whole = np.rint((blocks * steps.astype(np.float32)).astype(np.float32))
    return _joined(whole * scale.astype(np.float16).astype(np.float64), shape)


def _q8_k(values: np.ndarray) -> np.ndarray:
    """Blocks of 256, a float32 scale of minus the largest / 127 each (quantize_row_q8_K, ggml)."""
    blocks, shape = _blocks(values, 256)
    at = np.abs(blocks).argmax(axis=-1, keepdims=True)
    largest = np.take_along_axis(blocks, at, axis=-1)
    steps = np.divide(-127, largest, out=np.zeros_like(largest), where=largest != 0)
    steps = steps.astype(np.float32)
    whole = np.minimum(np.rint((blocks * steps).astype(np.float32)), 127)
    scale = np.divide(1, steps, out=np.zeros_like(steps), where=steps != 0)
    return _joined(whole * scale.astype(np.float64), shape)


def _blocks(values: np.ndarray, length: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Cut rows into blocks, the last one filled up with zeros."""
    missing = -values.shape[-1] % length
    padded = np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, missing)])
    return padded.reshape(*values.shape[:-1], -1, length), values.shape


def _joined(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return blocks.reshape(*shape[:-1], -1)[..., : shape[-1]]
