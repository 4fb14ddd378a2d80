"""Functions of 16-bit tensors: tables of 513 entries, a straight line between neighbours.

A table's entry i stands for the integer 128 i - 32768, and the last one for the end of the range. Between two of them
the result is ``base + ((next - base) * rest + 64 >> 7)``: TFLite's `LUTLookup` (kernels/internal/common.h), TOSA's
TABLE of int16, and what Ethos-U's lookup unit computes.

`softmax` is TFLite's for 16 bits (kernels/internal/reference/softmax.h, SoftmaxInt16): its exponentials and its
reciprocal are such tables, filled as `LUTPopulate` fills them.

As everywhere, `backends.te_arithmetic` and `runtime_stubs/simulator/qarith.h` follow bit for bit.
"""

from collections.abc import Callable

import numpy as np

from qcompiler.quant.arithmetic import IntArray, fixed_point_multiplier, leading_zeros, rescale

ENTRIES = 513
STEP_BITS = 7
SOFTMAX_OUTPUT_SCALE = 1 / 32768
EXPONENTIALS, RECIPROCALS, MULTIPLIER, SHIFT = 0, ENTRIES, 2 * ENTRIES, 2 * ENTRIES + 1
"""Where the parts of `softmax_table` begin."""
SOFTMAX_ENTRIES = 2 * ENTRIES + 2
SOFTMAX_LONGEST_ROW = (1 << 16) - 1
"""A sum of more exponentials might pass 32 bits."""
SOFTMAX_LARGEST_SCALE = 4.0
"""Differences of a coarser input might, too."""

_LOWEST, _HIGHEST = -(1 << 15), (1 << 15) - 1
_LEAST_EXPONENT = -10.0
"""Differences below count as this."""

Function = Callable[[np.ndarray], np.ndarray]


def points() -> np.ndarray:
    """The integers that entries stand for, and those halfway between them: float64 [1025], ascending."""
    return np.arange(_LOWEST, 1 - _LOWEST, 1 << (STEP_BITS - 1), dtype=np.float64)


def table_of(values: np.ndarray, clamp: tuple[int, int]) -> np.ndarray:
    """The table of a function with these results at `points`, in output steps: int16 [513].

    An entry gives way by half of the error that the straight line from it has halfway, so that errors are spread.
    """
    exact = values.astype(np.float64)
    entries = np.rint(exact[::2])
    halfway = (exact[:-2:2] + exact[2::2]) / 2 - exact[1::2]
    entries[:-1] -= np.rint(halfway / 2)
    return np.clip(entries, *clamp).astype(np.int16)


def interpolate(x: IntArray, table: IntArray) -> np.ndarray:
    """int16 x by an int16 table [513]: int16."""
    index = (x.astype(np.int32) >> STEP_BITS) + (1 << 8)
    rest = x.astype(np.int32) & ((1 << STEP_BITS) - 1)
    base = table.astype(np.int32)[index]
    slope = table.astype(np.int32)[index + 1] - base
    return (base + ((slope * rest + (1 << (STEP_BITS - 1))) >> STEP_BITS)).astype(np.int16)


def softmax_table(scale: float) -> np.ndarray:
    """What `softmax` needs for an input scale: exponentials, reciprocals, multiplier, shift; int32 [1028]."""
    # The exponentials' domain of -10 to 0 is all 65535 steps.
    multiplier, shift = fixed_point_multiplier(scale / (-_LEAST_EXPONENT / 65535.0))
    exponentials = _populate(-_LEAST_EXPONENT / 65535.0, _HIGHEST, np.exp)
    reciprocals = _populate(1 / 65535.0, _LOWEST, lambda x: 1 / (1 + x))
    return np.concatenate([exponentials, reciprocals, [multiplier, shift]]).astype(np.int32)


def softmax(x: IntArray, table: IntArray) -> np.ndarray:
    """Softmax over the last axis of int16 x, output scale 1/32768: int16, not negative."""
    exponentials, reciprocals = table[:RECIPROCALS], table[RECIPROCALS:MULTIPLIER]
    difference = x.astype(np.int64) - x.max(axis=-1, keepdims=True).astype(np.int64)
    scaled = rescale(difference, table[MULTIPLIER], table[SHIFT], "tflite") + _HIGHEST
    exponential = interpolate(np.clip(scaled, _LOWEST, _HIGHEST), exponentials).astype(np.int64)
    total = exponential.sum(axis=-1, keepdims=True)
    headroom = leading_zeros(total)
    # 1 to 2, less one, in the 16 bits that the table of 1 / (1 + x) takes.
    fraction = ((total << (headroom - 1)) + (1 << 13) >> 14) - ((1 << 15) + (1 << 16))
    reciprocal = interpolate(np.clip(fraction, _LOWEST, _HIGHEST), reciprocals).astype(np.int64)
    right = 31 - headroom
    result = (exponential * reciprocal + (np.int64(1) << (right - 1))) >> right
    return np.clip(result, 0, _HIGHEST).astype(np.int16)


def _populate(scale: float, zero_point: int, function: Function) -> np.ndarray:
    """TFLite's `LUTPopulate` of int16 for an output scale of 2/65535, in float64 (activations.cc, SoftmaxPrepare)."""
    output = 2.0 / 65535.0
    low, high = scale * (_LOWEST - zero_point), scale * (_HIGHEST - zero_point)
    step, inverse = (high - low) / (ENTRIES - 1), 65536 / (output * _HIGHEST - output * _LOWEST)
    at = np.arange(ENTRIES - 1, dtype=np.float64)
    following = function(low + (at + 1) * step)
    sample = _rounded(function(low + at * step) * inverse)
    interpolated = _rounded((following * inverse + sample) / 2)
    error = interpolated - _rounded(function(low + at * step + step / 2) * inverse)
    entries = sample - _rounded(error / 2)
    last = _rounded(function(np.array([high])) * inverse)
    return np.clip(np.concatenate([entries, last]), _LOWEST, _HIGHEST).astype(np.int32)


def _rounded(x: np.ndarray) -> np.ndarray:
    """To nearest, halves away from zero."""
    return np.sign(x) * np.floor(np.abs(x) + 0.5)
