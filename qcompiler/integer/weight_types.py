"""How many bits weights are stored in: as few as their values need, among those the target offers.

ONNX has no type of one bit, and of two only since opset 25, so QDQ models hold such weights as INT4. The integer graph
holds them as int2; those that are all -1 or 1 count as int1. Float weights of which every one is a 16-bit float are
stored as such.
"""

from collections.abc import Collection

import ml_dtypes
import numpy as np


def narrowed(weights: np.ndarray, offered: Collection[str]) -> np.ndarray:
    """int4 weights as int2 if they fit and the target has int2, or int1 if they are all -1 or 1; else as they are."""
    if weights.dtype != ml_dtypes.int4 or not weights.size:
        return weights
    values = weights.astype(np.int8)
    fits = "int1" in offered if _is_binary(values) else "int2" in offered and values.min() >= -2 and values.max() <= 1
    return values.astype(ml_dtypes.int2) if fits else weights


def stored_type(weights: np.ndarray) -> str:
    """The type weights are stored as: int1, int2, or numpy's name of their own."""
    return "int1" if weights.dtype == ml_dtypes.int2 and _is_binary(weights.astype(np.int8)) else str(weights.dtype)


def stored_bits(weights: np.ndarray) -> int:
    """Bits of one weight."""
    return {"int1": 1, "int2": 2, "int4": 4}.get(stored_type(weights), 8 * weights.dtype.itemsize)


def as_half(weights: np.ndarray) -> np.ndarray:
    """float32 weights as float16 or bfloat16 if that loses nothing; else as they are."""
    if weights.dtype != np.float32 or not weights.size:
        return weights
    for half in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore"):
            narrow = weights.astype(half)
        if np.array_equal(narrow.astype(np.float32), weights):
            return narrow
    return weights


def _is_binary(values: np.ndarray) -> bool:
    return bool((np.abs(values) == 1).all())
