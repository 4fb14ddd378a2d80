"""`quant/arithmetic.py` as TE expressions, element by element and bit for bit.

Two traps shape this file, both measured. LLVM contracts a float multiply that feeds a float add into one FMA,
and no fence stops it: so no float multiply here feeds a float add; zero points are added as integers, after
rounding. And TVM rewrites a float division by a constant into a multiplication: so scales and multipliers are
loaded from parameters, never constants.
"""

import numpy as np

from qcompiler.backends import te
from qcompiler.backends.te import Expr
from qcompiler.quant import interpolation, tflite_functions
from qcompiler.quant.arithmetic import AddFactors, RequantizeVariant, add_left_shift

DTYPE_RANGES: dict[str, tuple[int, int]] = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-(1 << 15), (1 << 15) - 1),
    "uint16": (0, (1 << 16) - 1),
    "int32": (-(1 << 31), (1 << 31) - 1),
}
_FLOAT_LIMIT = 1 << 30
_WHOLE_FLOATS = 3 << 22
_WHOLE_FLOATS_BITS = int(np.float32(_WHOLE_FLOATS).view(np.int32))


def rescale(acc: Expr, multiplier: Expr, shift: Expr, variant: RequantizeVariant) -> Expr:
    """`arithmetic.rescale` of an int32 (or, where it fits in 32 bits, int64) accumulator.

    multiplier is float32 for ``float32`` and int32 otherwise, shift int32. Returns int32 for ``float32`` and
    int64 otherwise.
    """
    if variant == "float32":
        scaled = acc.astype("float32") * multiplier
        return te.rint(te.clamp(scaled, -float(_FLOAT_LIMIT), float(_FLOAT_LIMIT))).astype("int32")
    left, right = te.maximum(shift, 0), te.maximum(-shift, 0)
    if variant == "tflite":
        # int32 on purpose: `wrap_int32` of the shifted accumulator.
        shifted = te.shift_left(acc.astype("int32"), left).astype("int64")
        # Truncating (product ± nudge) by 2^31 is rounding half up, whatever the sign.
        high = te.shift_right(shifted * multiplier.astype("int64") + _one(30), te.const(31, "int64"))
        return rounding_divide_by_pot(high, right.astype("int64"))
    if variant == "tosa":
        total = (31 - shift).astype("int64")
        rounding = te.shift_left(te.const(1, "int64"), total - 1)
        return te.shift_right(acc.astype("int64") * multiplier.astype("int64") + rounding, total)
    left, right = left.astype("int64"), right.astype("int64")
    rounding = te.shift_right(te.shift_left(te.const(1, "int64"), right), te.const(1, "int64"))
    return te.shift_right(te.shift_left(acc.astype("int64"), left) + rounding, right)


def rescale_wide(acc: Expr, multiplier: Expr, shift: Expr, variant: RequantizeVariant) -> Expr:
    """`arithmetic.rescale_wide` of an int64 accumulator, types as in `rescale`."""
    if variant in ("float32", "shift"):
        return rescale(acc, multiplier, shift, variant)
    total = (15 - shift).astype("int64")
    rounded = te.shift_right(multiplier.astype("int64") + _one(15), te.const(16, "int64"))
    reduced = te.minimum(rounded, te.const(0x7FFF, "int64"))
    rounding = te.shift_left(te.const(1, "int64"), total - 1)
    return te.shift_right(acc * reduced + rounding, total)


def _one(position: int) -> Expr:
    return te.const(1 << position, "int64")


def rounding_divide_by_pot(x: Expr, exponent: Expr) -> Expr:
    """x / 2^exponent to nearest, ties away from zero; int64."""
    half = te.shift_right(te.shift_left(te.const(1, "int64"), exponent), te.const(1, "int64"))
    # Adding a half and flooring rounds ties up; a negative x must round them down: one less, unless exponent is 0.
    negative = te.shift_right(x, te.const(63, "int64"))
    correction = te.bitwise_and(negative, te.minimum(exponent, te.const(1, "int64")))
    return te.shift_right(x + half - correction, exponent)


def requantize(
    acc: Expr,
    multiplier: Expr,
    shift: Expr,
    variant: RequantizeVariant,
    zero_point: int,
    limits: tuple[int, int],
    dtype: str,
    *,
    wide: bool = False,
) -> Expr:
    """`arithmetic.requantize`: accumulator, int32 or, if `wide`, int64, to the quantized output."""
    low, high = limits[0] - zero_point, limits[1] - zero_point
    if variant == "float32":
        # The bounds are whole numbers a float32 holds, so clamping before rounding changes nothing and saves a step.
        assert max(-low, high) < 1 << 22, f"{dtype} is too wide for {variant}"
        scaled = acc.astype("float32") * multiplier
        return _rounded(te.clamp(scaled, float(low), float(high)), zero_point).astype(dtype)
    else:
        scaled = (rescale_wide if wide else rescale)(acc, multiplier, shift, variant)
        rounded = te.clamp(scaled, low, high).astype("int32")
    return (rounded + zero_point).astype(dtype)


def _rounded(x: Expr, offset: int) -> Expr:
    """A float32 of magnitude below 2^22 to the nearest whole number, ties to even, plus `offset`, as int32.

    Next to 1.5 * 2^23 floats are whole numbers, so adding that rounds, and the sum's bits count up from those of
    1.5 * 2^23. TVM takes loops with its own `nearbyint` apart instead of vectorizing them.
    """
    shifted = te.reinterpret(x + te.const(float(_WHOLE_FLOATS), "float32"), "int32")
    return shifted + (offset - _WHOLE_FLOATS_BITS)


def add(a: Expr, b: Expr, factors: AddFactors, variant: RequantizeVariant, *, subtract: bool, bits: int = 8) -> Expr:
    """`arithmetic.add` of zero-point-free int32 operands; int32 or int64."""
    ma, sa, mb, sb, my, sy = factors
    if variant == "tflite":
        left = te.const(add_left_shift(bits), "int32")
        scaled_a = rescale(te.shift_left(a, left), *_pair(ma, sa), "tflite")
        scaled_b = rescale(te.shift_left(b, left), *_pair(mb, sb), "tflite")
        return rescale(scaled_a - scaled_b if subtract else scaled_a + scaled_b, *_pair(my, sy), "tflite")
    # `add_factors` keeps two products of 8-bit operands and the rounding term inside 32 bits.
    dtype = "int64" if bits == 16 else "int32"
    product_a, product_b = a.astype(dtype) * te.const(ma, dtype), b.astype(dtype) * te.const(mb, dtype)
    total = product_a - product_b if subtract else product_a + product_b
    return te.shift_right(total + te.const(1 << (sy - 1), dtype), te.const(sy, dtype))


def _pair(multiplier: int, shift: int) -> tuple[Expr, Expr]:
    return te.const(multiplier, "int32"), te.const(shift, "int32")


def saturate(x: Expr, zero_point: int, limits: tuple[int, int], dtype: str) -> Expr:
    """te.clamp(x + zero_point) as `dtype`."""
    return (te.clamp(x, limits[0] - zero_point, limits[1] - zero_point).astype("int32") + zero_point).astype(dtype)


def quantize(x: Expr, scale: Expr, zero_point: Expr, dtype: str) -> Expr:
    """ONNX QuantizeLinear of a float32; `scale` must be loaded from memory, `zero_point` is int32."""
    ratio = te.clamp(x / scale, -float(_FLOAT_LIMIT), float(_FLOAT_LIMIT))
    rounded = te.rint(ratio).astype("int32")
    return te.clamp(rounded + zero_point, *DTYPE_RANGES[dtype]).astype(dtype)


def dequantize(q: Expr, scale: Expr, zero_point: Expr) -> Expr:
    """ONNX DequantizeLinear to float32; `zero_point` is int32."""
    return (q.astype("int32") - zero_point).astype("float32") * scale


def to_bfloat16(x: Expr) -> Expr:
    """A float32 rounded to the nearest bfloat16, ties to even, as a float32."""
    return te.where(te.not_equal(x, x), x, _shortened(x, 16))


_LEAST_NORMAL_HALF, _BEYOND_HALF = 2.0**-14, 65536.0
_HALF_GRID = 0.75
_HALF_GRID_BITS = int(np.float32(_HALF_GRID).view(np.int32))
"""Next to it floats are 2^-24 apart, as the numbers of float16 are below `_LEAST_NORMAL_HALF`; see `_rounded`."""


def to_float16(x: Expr) -> Expr:
    """A float32 rounded to the nearest float16, ties to even, as a float32; written out, for C has no such type."""
    count = te.reinterpret(x + te.const(_HALF_GRID, "float32"), "int32") - _HALF_GRID_BITS
    small = count.astype("float32") * te.const(2.0**-24, "float32")
    rounded = te.where(te.maximum(x, -x) < _LEAST_NORMAL_HALF, small, _shortened(x, 13))
    # The sign with all bits of an infinity: C has no literal for one.
    sign = te.bitwise_and(te.reinterpret(x, "uint32"), te.const(0x80000000, "uint32"))
    infinite = te.reinterpret(sign + te.const(0x7F800000, "uint32"), "float32")
    bounded = te.where(te.maximum(rounded, -rounded) >= _BEYOND_HALF, infinite, rounded)
    return te.where(te.not_equal(x, x), x, bounded)


def _shortened(x: Expr, cut: int) -> Expr:
    """A float32 without the lowest bits of its fraction, rounded. NaNs may come out as something else."""
    bits, one = te.reinterpret(x, "uint32"), te.const(1, "uint32")
    # Half of what is cut off, less one where the result would be even already.
    nudge = te.bitwise_and(te.shift_right(bits, te.const(cut, "uint32")), one)
    nudge = nudge + te.const((1 << (cut - 1)) - 1, "uint32")
    return te.reinterpret(te.bitwise_and(bits + nudge, te.const((1 << 32) - (1 << cut), "uint32")), "float32")


def from_bfloat16(bits: Expr) -> Expr:
    """The float32 of a bfloat16, given as uint16."""
    return te.reinterpret(te.shift_left(bits.astype("uint32"), te.const(16, "uint32")), "float32")


def softmax(
    x: te.Tensor, table: te.Tensor, inverse_scale: int, zero_point: int, limits: tuple[int, int], dtype: str
) -> te.Tensor:
    """`arithmetic.softmax` over the last axis of x [rows, length]; table int32 [256]."""
    rows, length = te.shape_of(x)
    i = te.reduce_axis(length, "i")
    j = te.reduce_axis(length, "j")
    highest = te.compute((rows,), lambda r: te.reduce_max(x[r, i].astype("int32"), axis=[i]), "highest")
    exponential = te.compute((rows, length), lambda r, c: table[highest[r] - x[r, c].astype("int32")], "exponential")
    total = te.compute((rows,), lambda r: te.reduce_sum(exponential[r, j].astype("int64"), axis=[j]), "total")

    def quotient(r: Expr, c: Expr) -> Expr:
        eight = te.const(8, "int64")
        denominator = te.shift_left(total[r], eight)
        numerator = exponential[r, c].astype("int64") * te.const(2 * inverse_scale, "int64") + denominator
        # Both are positive, so truncation is the floor.
        return saturate(te.truncated_divide(numerator, denominator * 2), zero_point, limits, dtype)

    return te.compute((rows, length), quotient, "softmax")


def leading_zeros(positive: Expr, most: int = 31) -> Expr:
    """`arithmetic.leading_zeros` of an int64, of which there are so many at most."""
    counted: Expr = te.const(0, "int64")
    for bit in range(32 - most, 32):
        counted = counted + (positive < _one(bit)).astype("int64")
    return counted


def interpolate(x: Expr, table: te.Tensor, first: int = 0) -> Expr:
    """`interpolation.interpolate` of int32 x in a table that begins at entry `first`, as int32."""
    bits = interpolation.STEP_BITS
    index = te.shift_right(x, te.const(bits, "int32")) + ((1 << 8) + first)
    rest = te.bitwise_and(x, te.const((1 << bits) - 1, "int32"))
    base = table[index].astype("int32")
    slope = table[index + 1].astype("int32") - base
    return base + te.shift_right(slope * rest + (1 << (bits - 1)), te.const(bits, "int32"))


def softmax_int16(x: te.Tensor, table: te.Tensor, limits: tuple[int, int]) -> te.Tensor:
    """`interpolation.softmax` over the last axis of int16 x [rows, length]; table int32 [1028]."""
    rows, length = te.shape_of(x)
    lowest, highest = -(1 << 15), (1 << 15) - 1
    i = te.reduce_axis(length, "i")
    j = te.reduce_axis(length, "j")
    top = te.compute((rows,), lambda r: te.reduce_max(x[r, i].astype("int32"), axis=[i]), "highest")

    def exponent(r: Expr, c: Expr) -> Expr:
        difference = x[r, c].astype("int32") - top[r]
        scaled = rescale(difference, table[interpolation.MULTIPLIER], table[interpolation.SHIFT], "tflite")
        return te.clamp(scaled + highest, lowest, highest).astype("int32")

    exponents = te.compute((rows, length), exponent, "exponents")
    exponential = te.compute(
        (rows, length), lambda r, c: interpolate(exponents[r, c], table, interpolation.EXPONENTIALS), "exponential"
    )
    total = te.compute((rows,), lambda r: te.reduce_sum(exponential[r, j].astype("int64"), axis=[j]), "total")

    headroom = te.compute((rows,), lambda r: leading_zeros(total[r]), "headroom")

    def denominator(r: Expr) -> Expr:
        shifted = te.shift_left(total[r], headroom[r] - 1) + _one(13)
        fraction = te.shift_right(shifted, _shift(14)) - ((1 << 15) + (1 << 16))
        return te.clamp(fraction, lowest, highest).astype("int32")

    fractions = te.compute((rows,), denominator, "fractions")
    reciprocal = te.compute(
        (rows,), lambda r: interpolate(fractions[r], table, interpolation.RECIPROCALS), "reciprocal"
    )

    def quotient(r: Expr, c: Expr) -> Expr:
        right = te.const(31, "int64") - headroom[r]
        product = exponential[r, c].astype("int64") * reciprocal[r].astype("int64")
        rounded = te.shift_right(product + te.shift_left(_one(0), right - 1), right)
        return te.clamp(rounded, max(limits[0], 0), min(limits[1], highest)).astype("int16")

    return te.compute((rows, length), quotient, "softmax")


def tflite_softmax(x: te.Tensor, table: te.Tensor, zero_point: int, limits: tuple[int, int], dtype: str) -> te.Tensor:
    """`tflite_functions.softmax` over the last axis of x [rows, length]; table int32 [256]."""
    rows, length = te.shape_of(x)
    sum_bits = tflite_functions.SUM_INTEGER_BITS
    i = te.reduce_axis(length, "i")
    j = te.reduce_axis(length, "j")
    highest = te.compute((rows,), lambda r: te.reduce_max(x[r, i].astype("int32"), axis=[i]), "highest")
    exponential = te.compute((rows, length), lambda r, c: table[highest[r] - x[r, c].astype("int32")], "exponential")

    def term(r: Expr, c: Expr) -> Expr:
        # Exponentials are not negative, so a half and a shift round them; in 64 bits, for the largest is 2^31 - 1.
        return te.shift_right(exponential[r, c].astype("int64") + _one(sum_bits - 1), _shift(sum_bits))

    total = te.compute((rows,), lambda r: te.reduce_sum(term(r, j), axis=[j]), "total")

    # A sum is at least one, which has `sum_bits` of them.
    headroom = te.compute((rows,), lambda r: leading_zeros(total[r], sum_bits), "headroom")
    # Half of the denominator, and then 2 / denominator in Q2.29: each Newton step is a stage of its own, for an
    # expression would name the step before it three times.
    half = te.compute((rows,), lambda r: te.shift_right(te.shift_left(total[r], headroom[r]), _shift(1)), "half")
    guess = te.compute((rows,), lambda r: _first_guess(half[r]), "guess")
    for step in range(tflite_functions.NEWTON_STEPS):
        guess = _newton(half, guess, f"newton_{step}")

    def quotient(r: Expr, c: Expr) -> Expr:
        reciprocal = te.minimum(te.shift_left(guess[r], _shift(1)), te.const((1 << 31) - 1, "int64"))
        product = _high_mul(reciprocal, exponential[r, c].astype("int64"))
        exponent = te.const(sum_bits + 31 - 8, "int64") - headroom[r]
        return saturate(rounding_divide_by_pot(product, exponent), zero_point, limits, dtype)

    return te.compute((rows, length), quotient, "softmax")


def _first_guess(half: Expr) -> Expr:
    slope = te.const(tflite_functions.HALVES_NEG_32_17, "int64")
    return _high_mul(half, slope) + te.const(tflite_functions.HALVES_48_17, "int64")


def _newton(half: te.Tensor, guess: te.Tensor, name: str) -> te.Tensor:
    def step(r: Expr) -> Expr:
        error = _one(29) - _high_mul(half[r], guess[r])
        return guess[r] + te.shift_left(_high_mul(guess[r], error), _shift(2))

    return te.compute(te.shape_of(guess), step, name)


def _high_mul(a: Expr, b: Expr) -> Expr:
    """SaturatingRoundingDoublingHighMul of int64 operands that hold int32 values, not both the lowest."""
    return te.shift_right(a * b + _one(30), _shift(31))


def _shift(count: int) -> Expr:
    return te.const(count, "int64")
