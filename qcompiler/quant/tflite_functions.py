"""The nonlinear functions as TFLite's reference kernels compute them: 32-bit fixed point, no floating point.

Targets of the ``tflite`` requantize variant use these, so that a network emitted as .tflite gives the same integers.
Q5.26 is a signed 32-bit number with 5 integer and 26 fraction bits; Q0.31 covers [-1, 1).

Sources: gemmlowp `fixedpoint/fixedpoint.h` (exponential and Newton-Raphson reciprocal, with these constants), and
TensorFlow Lite `kernels/internal/reference/softmax.h`, `reference/integer_ops/logistic.h` and `tanh.h`,
`kernels/internal/quantization_util.cc`, `kernels/activations.cc`.

As everywhere, what is written here in numpy, `backends.te_arithmetic` and `runtime_stubs/simulator/qarith.h` follow bit
for bit.
"""

import math

import numpy as np
import numpy.typing as npt

from qcompiler.quant.arithmetic import (
    IntArray,
    fixed_point_multiplier,
    leading_zeros,
    rounding_divide_by_pot,
    saturate,
    saturating_rounding_doubling_high_mul,
)

SOFTMAX_OUTPUT_SCALE = LOGISTIC_OUTPUT_SCALE = 1 / 256
SUM_INTEGER_BITS = 12
"""Sums of exponentials are Q12.19."""
SOFTMAX_LONGEST_ROW = (1 << SUM_INTEGER_BITS) - 1
"""A sum of more exponentials might pass int32."""

HALVES_48_17, HALVES_NEG_32_17 = 1515870810, -1010580540
"""48/17 and -32/17 in Q2.29: the first guess of the reciprocal."""
NEWTON_STEPS = 3

_ONE = (1 << 31) - 1
_DIFFERENCE_BITS = 5
_LOGISTIC_BITS = 4
_EXP_MINUS_EIGHTH, _ONE_THIRD = 1895147668, 715827883
_EXP_OF_POWERS = (
    (-2, 1672461947),
    (-1, 1302514674),
    (0, 790015084),
    (1, 290630308),
    (2, 39332535),
    (3, 720401),
    (4, 242),
)
"""exp(-2^k) in Q0.31, by k."""


def softmax_table(scale: float) -> np.ndarray:
    """exp(-d * scale) for d = 0…255, Q0.31 as int32 [256]; 0 where the kernel leaves the term out."""
    real, distance = scale * (1 << (31 - _DIFFERENCE_BITS)), np.arange(256, dtype=np.int64)
    if real >= 1 << 30:
        # One step of so coarse an input is beyond what the kernel's input radius admits: the largest wins alone.
        return np.where(distance == 0, _exp_on_negative(0 * distance, _DIFFERENCE_BITS), 0).astype(np.int32)
    multiplier, left = _greater_than_one(real)
    rescaled = _mul(-np.minimum(distance, _radius(_DIFFERENCE_BITS, left)) << left, multiplier)
    table = _exp_on_negative(rescaled, _DIFFERENCE_BITS)
    return np.where(distance <= _radius(_DIFFERENCE_BITS, left), table, 0).astype(np.int32)


def softmax(
    x: IntArray, table: np.ndarray, zero_point: int, clamp: tuple[int, int], dtype: npt.DTypeLike
) -> np.ndarray:
    """Softmax over the last axis, output scale 1/256.

    `table` is `softmax_table` of the input's scale. Rows hold at most `SOFTMAX_LONGEST_ROW` elements.

    The kernel's result is undefined in C++ for rows whose exponentials add to 512 or more; here it is what the formula
    says.
    """
    assert x.shape[-1] <= SOFTMAX_LONGEST_ROW
    distance = x.max(axis=-1, keepdims=True).astype(np.int64) - x.astype(np.int64)
    exponential = table.astype(np.int64)[distance]
    total = _halved(exponential, SUM_INTEGER_BITS).sum(axis=-1, keepdims=True)
    headroom = leading_zeros(total)
    reciprocal = _one_over_one_plus((total << headroom) - (1 << 31))
    exponent = SUM_INTEGER_BITS - headroom + 31 - 8
    return saturate(rounding_divide_by_pot(_mul(reciprocal, exponential), exponent) + zero_point, *clamp, dtype)


def logistic_table(scale: float, zero_point: int, dtype: npt.DTypeLike) -> np.ndarray:
    """1 / (1 + exp(-x)) for the 256 integers x of an 8-bit type, lowest first; output scale 1/256, from the lowest."""
    magnitude, negative, beyond = _logistic_input(scale, zero_point, dtype, integer_bits=_LOGISTIC_BITS)
    result = _one_over_one_plus(_exp_on_negative(-magnitude, _LOGISTIC_BITS))
    result = np.where(negative, _ONE - result, result)
    # At zero the kernel's Q0.31 value is exactly a half.
    result = np.where(magnitude == 0, 1 << 30, result)
    eight_bits = np.minimum(_halved(result, 23), 255)
    eight_bits = np.where(beyond, np.where(negative, 0, 255), eight_bits)
    return (eight_bits + np.iinfo(dtype).min).astype(dtype)


def _logistic_input(
    scale: float, zero_point: int, dtype: npt.DTypeLike, *, integer_bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """|x| in fixed point, whether x is negative, whether it lies beyond what the kernel computes; each [256]."""
    info = np.iinfo(dtype)
    centred = np.arange(info.min, info.max + 1, dtype=np.int64) - zero_point
    # From 2^30 on every input but zero lies beyond, whatever the scale.
    multiplier, left = fixed_point_multiplier(min(scale * (1 << (31 - integer_bits)), float((1 << 30) - 1)))
    radius = _radius(integer_bits, left)
    inside = np.clip(centred, -radius, radius)
    return np.abs(_mul(inside << left, multiplier)), centred < 0, np.abs(centred) >= radius


def _greater_than_one(real: float) -> tuple[int, int]:
    multiplier, left = fixed_point_multiplier(real)
    assert left >= 0
    return multiplier, left


def _radius(integer_bits: int, left_shift: int) -> int:
    """`CalculateInputRadius`: the largest integer whose rescaled value fits the fixed-point type."""
    return math.floor(((1 << integer_bits) - 1) * (1 << (31 - integer_bits)) / (1 << left_shift))


def _mul(a: IntArray, b: IntArray | int) -> np.ndarray:
    return saturating_rounding_doubling_high_mul(a, np.asarray(b, np.int64))


def _halved(x: IntArray, times: int) -> np.ndarray:
    return rounding_divide_by_pot(x, np.asarray(times, np.int64))


def _exp_on_negative(a: IntArray, integer_bits: int) -> np.ndarray:
    """exp(a) in Q0.31 of a <= 0 with `integer_bits` integer bits (gemmlowp `exp_on_negative_values`)."""
    fraction_bits = 31 - integer_bits
    quarter = 1 << (fraction_bits - 2)
    low = (a & (quarter - 1)) - quarter
    result = _exp_on_quarter(low << integer_bits)
    remainder = low - a
    for exponent, multiplier in _EXP_OF_POWERS:
        if integer_bits > exponent:
            chosen = remainder & (1 << (fraction_bits + exponent))
            result = np.where(chosen != 0, _mul(result, multiplier), result)
    return np.where(a == 0, _ONE, result)


def _exp_on_quarter(a: IntArray) -> np.ndarray:
    """exp(a) of Q0.31 a in [-1/4, 0): four terms of the Taylor series around -1/8."""
    x = a + (1 << 28)
    x2 = _mul(x, x)
    x3, x4 = _mul(x2, x), _mul(x2, x2)
    quarter = _halved(x4, 2)
    series = _halved(_mul(quarter + x3, _ONE_THIRD) + x2, 1)
    return _EXP_MINUS_EIGHTH + _mul(x + series, _EXP_MINUS_EIGHTH)


def _one_over_one_plus(a: IntArray) -> np.ndarray:
    """1 / (1 + a) in Q0.31 of Q0.31 a in [0, 1), by Newton and Raphson on half the denominator."""
    half = (a + _ONE + 1) >> 1
    x = HALVES_48_17 + _mul(half, HALVES_NEG_32_17)
    for _ in range(NEWTON_STEPS):
        x = x + (_mul(x, (1 << 29) - _mul(half, x)) << 2)
    return np.minimum(x << 1, _ONE)
