"""`qcompiler.quant.arithmetic` against scalar models in Python integers, written from the sources named."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.errors import QCompilerError
from qcompiler.quant import arithmetic

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
EXTREMES = [INT32_MIN, INT32_MIN + 1, -(2**30), -3, -2, -1, 0, 1, 2, 3, 2**30 - 1, 2**30, INT32_MAX - 1, INT32_MAX]
int32s = st.one_of(st.sampled_from(EXTREMES), st.integers(INT32_MIN, INT32_MAX))
int8s = st.integers(-255, 255)
mantissas = st.one_of(st.sampled_from([2**30, 2**31 - 1]), st.integers(2**30, 2**31 - 1))


# --- scalar models ------------------------------------------------------------------------------------------


def half_away(x: Fraction) -> int:
    return math.floor(abs(x) + Fraction(1, 2)) * (1 if x >= 0 else -1)


def wrap32(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def srdhm(a: int, b: int) -> int:
    """gemmlowp fixedpoint.h SaturatingRoundingDoublingHighMul: int64 division that truncates toward zero."""
    if a == b == INT32_MIN:
        return INT32_MAX
    total = a * b + (2**30 if a * b >= 0 else 1 - 2**30)
    return abs(total) // 2**31 * (1 if total >= 0 else -1)


def divide_by_pot(x: int, exponent: int) -> int:
    """gemmlowp RoundingDivideByPOT is rounding half away from zero."""
    return half_away(Fraction(x, 2**exponent))


def tflite(acc: int, multiplier: int, shift: int) -> int:
    """tensorflow/lite/kernels/internal/common.h MultiplyByQuantizedMultiplier, double rounding."""
    shifted = wrap32(acc << max(shift, 0))
    return divide_by_pot(srdhm(shifted, multiplier), max(-shift, 0))


def tosa(acc: int, multiplier: int, shift: int) -> int:
    """TOSA 1.0 apply_scale_32 without double_round; its shift is 31 - ours. Rounds half up."""
    return math.floor(Fraction(acc * multiplier, 2 ** (31 - shift)) + Fraction(1, 2))


def shift_only(acc: int, shift: int) -> int:
    return acc << shift if shift >= 0 else math.floor(Fraction(acc, 2**-shift) + Fraction(1, 2))


def one(function, *arguments: int) -> int:
    return int(function(*(np.array(argument, np.int64) for argument in arguments)))


# --- primitives ---------------------------------------------------------------------------------------------


@given(int32s, int32s)
def test_saturating_rounding_doubling_high_mul(a, b):
    assert one(arithmetic.saturating_rounding_doubling_high_mul, a, b) == srdhm(a, b)


@given(int32s, st.integers(0, 31))
def test_rounding_divide_by_pot(x, exponent):
    assert one(arithmetic.rounding_divide_by_pot, x, exponent) == divide_by_pot(x, exponent)


@given(st.integers(-(2**62), 2**62))
def test_wrap_int32(x):
    assert one(arithmetic.wrap_int32, x) == wrap32(x)


@pytest.mark.parametrize("x", [-3, -1, 1, 3])
def test_ties_go_away_from_zero_in_tflite_and_up_in_tosa_and_shift(x):
    # x / 2 is a tie: as a multiplier 2^30 with shift 0, and as a right shift by one.
    away = half_away(Fraction(x, 2))
    up = math.floor(Fraction(x, 2) + Fraction(1, 2))
    assert one(lambda a: arithmetic.rounding_divide_by_pot(a, np.array(1)), x) == away
    assert int(arithmetic.rescale(np.array(x), 2**30, 0, "tosa")) == up
    assert int(arithmetic.rescale(np.array(x), 1, -1, "shift")) == up
    assert int(arithmetic.rescale(np.array(x), np.float32(0.5), 0, "float32")) == round(x / 2)


# --- multipliers --------------------------------------------------------------------------------------------


@given(st.floats(2.0**-31, 2.0**29))
def test_fixed_point_multiplier_is_the_nearest(factor):
    multiplier, shift = arithmetic.fixed_point_multiplier(factor)
    assert 2**30 <= multiplier < 2**31
    step = Fraction(2) ** (shift - 31)
    assert abs(multiplier * step - Fraction(factor)) <= step / 2


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (0.0, (0, 0)),
        (2.0**-40, (0, 0)),
        (0.5, (2**30, 0)),
        (1.0, (2**30, 1)),
        (math.nextafter(1.0, 0.0), (2**30, 1)),  # the mantissa rounds up to 2^31
        (0.75, (3 * 2**29, 0)),
    ],
)
def test_fixed_point_multiplier_edges(factor, expected):
    assert arithmetic.fixed_point_multiplier(factor) == expected


def test_a_factor_no_target_represents_is_refused():
    with pytest.raises(QCompilerError, match=r"2\^30"):
        arithmetic.fixed_point_multiplier(2.0**31)


def test_shift_targets_refuse_other_factors():
    multiplier, shift = arithmetic.multipliers([0.25, 1.0, 8.0], "shift")
    assert multiplier.tolist() == [1, 1, 1] and shift.tolist() == [-2, 0, 3]
    with pytest.raises(QCompilerError, match="powers of two"):
        arithmetic.multipliers([0.25, 0.3], "shift")


# --- rescale ------------------------------------------------------------------------------------------------


@given(int32s, mantissas, st.integers(-31, 10))
def test_rescale_tflite(acc, multiplier, shift):
    assert int(arithmetic.rescale(np.array(acc), multiplier, shift, "tflite")) == tflite(acc, multiplier, shift)


@given(int32s, mantissas, st.integers(-31, 20))
def test_rescale_tosa(acc, multiplier, shift):
    assert int(arithmetic.rescale(np.array(acc), multiplier, shift, "tosa")) == tosa(acc, multiplier, shift)


@given(int32s, st.integers(-31, 20))
def test_rescale_shift(acc, shift):
    assert int(arithmetic.rescale(np.array(acc), 1, shift, "shift")) == shift_only(acc, shift)


@given(int32s, st.floats(2.0**-30, 1.0, width=32))
def test_rescale_float32(acc, multiplier):
    # Python's round is half to even on the exact product of two float32 numbers, once that is a float32 itself.
    product = float(np.float32(float(np.float32(acc)) * multiplier))
    assert int(arithmetic.rescale(np.array(acc), np.float32(multiplier), 0, "float32")) == max(
        -(2**30), min(2**30, round(product))
    )


def test_rescale_per_channel():
    rng = np.random.default_rng(3)
    acc = rng.integers(-(2**24), 2**24, (3, 5, 7))
    multiplier, shift = rng.integers(2**30, 2**31, 7), rng.integers(-20, 3, 7)
    models: tuple[tuple[arithmetic.RequantizeVariant, Callable[[int, int, int], int]], ...]
    models = (("tflite", tflite), ("tosa", tosa))
    for variant, model in models:
        expected = [
            [[model(int(acc[i, j, c]), int(multiplier[c]), int(shift[c])) for c in range(7)] for j in range(5)]
            for i in range(3)
        ]
        np.testing.assert_array_equal(arithmetic.rescale(acc, multiplier, shift, variant), expected)


@given(int32s, mantissas, st.integers(-20, 0), st.integers(-128, 127), st.integers(-128, 127), st.integers(-128, 127))
def test_requantize_adds_the_zero_point_and_clamps(acc, multiplier, shift, zero_point, a, b):
    low, high = min(a, b), max(a, b)
    got = arithmetic.requantize(
        np.array(acc), np.array(multiplier), np.array(shift), "tosa", zero_point, (low, high), "int8"
    )
    assert got.dtype == np.int8
    assert int(got) == max(low, min(high, tosa(acc, multiplier, shift) + zero_point))


# --- addition -----------------------------------------------------------------------------------------------

scales = st.floats(2.0**-12, 2.0**4)


@settings(max_examples=200)
@given(int8s, int8s, scales, scales, scales, st.booleans())
def test_add_is_near_the_real_sum_and_exact_to_its_integers(a, b, scale_a, scale_b, scale_y, subtract):
    ratio = max(scale_a, scale_b) / scale_y
    real = (a * scale_a + (-b if subtract else b) * scale_b) / scale_y
    for variant in arithmetic.REQUANTIZE_VARIANTS:
        factors = arithmetic.add_factors(scale_a, scale_b, scale_y, variant)
        got = int(arithmetic.add(np.array(a), np.array(b), factors, variant, subtract=subtract))
        ma, sa, mb, sb, my, sy = factors
        sign = -1 if subtract else 1
        if variant == "tflite":
            # add.h AddElementwise
            total = tflite(a << 20, ma, sa) + sign * tflite(b << 20, mb, sb)
            assert got == tflite(total, my, sy)
        else:
            total = a * ma + sign * b * mb
            assert INT32_MIN <= total + 2 ** (sy - 1) <= INT32_MAX
            assert got == math.floor(Fraction(total, 2**sy) + Fraction(1, 2))
        assert abs(got - real) <= 0.5 + 1e-4 * max(1.0, ratio * 256)


def test_add_refuses_scales_too_far_apart():
    with pytest.raises(QCompilerError, match="addition"):
        arithmetic.add_factors(1.0, 2.0**-30, 2.0**-30, "tosa")


# --- quantize, dequantize ------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6, width=32), st.floats(2.0**-10, 2.0**3, width=32), st.integers(-128, 127))
def test_quantize_rounds_half_to_even_and_saturates(x, scale, zero_point):
    ratio = float(np.float32(x) / np.float32(scale))
    expected = max(-128, min(127, round(ratio) + zero_point))
    assert int(arithmetic.quantize(np.array(x, np.float32), np.float32(scale), zero_point, "int8")) == expected


@pytest.mark.parametrize(
    ("x", "q"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (np.inf, 127), (-np.inf, -128)]
)
def test_quantize_ties_and_infinities(x, q):
    assert int(arithmetic.quantize(np.array(x, np.float32), 1.0, 0, "int8")) == q


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_dequantize_inverts_quantize(dtype):
    info = np.iinfo(dtype)
    q = np.arange(info.min, info.max + 1, 97 if dtype == "int16" else 1).astype(dtype)
    zero_point = (info.max + info.min) // 3
    real = arithmetic.dequantize(q, np.float32(0.037), zero_point)
    assert real.dtype == np.float32
    np.testing.assert_array_equal(arithmetic.quantize(real, np.float32(0.037), zero_point, dtype), q)


# --- softmax ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-128, 127), min_size=1, max_size=12), st.sampled_from([0.01, 0.05, 0.3, 1.0]))
def test_softmax(x, scale):
    table, inverse = arithmetic.softmax_tables(scale, 1 / 256)
    got = arithmetic.softmax(np.array(x, np.int8), table, inverse, -128, (-128, 127), "int8")
    assert inverse == 65536 and table[0] == 2**22 and table.dtype == np.int32
    terms = [int(table[max(x) - value]) for value in x]
    for value, term in zip(got.tolist(), terms, strict=True):
        # y = zero_point + round half up(e * inverse / (256 * sum))
        exact = Fraction(term * inverse, 256 * sum(terms))
        assert value == max(-128, min(127, math.floor(exact + Fraction(1, 2)) - 128))
    real = np.exp((np.array(x) - max(x)) * scale)
    np.testing.assert_allclose((got.astype(np.int32) + 128) / 256, real / real.sum(), atol=1 / 256 + 1e-6)


def test_softmax_runs_along_the_last_axis_and_takes_uint8():
    rng = np.random.default_rng(5)
    x = rng.integers(0, 256, (2, 3, 9)).astype(np.uint8)
    table, inverse = arithmetic.softmax_tables(0.04, 1 / 256)
    got = arithmetic.softmax(x, table, inverse, 0, (0, 255), "uint8")
    row = arithmetic.softmax(x[1, 2], table, inverse, 0, (0, 255), "uint8")
    np.testing.assert_array_equal(got[1, 2], row)
    assert got.dtype == np.uint8 and (got.astype(int).sum(axis=-1) > 240).all()


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_four_bit_packing(count: int) -> None:
    values = np.random.default_rng(count).integers(-8, 8, (3, 5, count)).astype(np.int8)
    packed = arithmetic.pack_int4(values)
    assert packed.dtype == np.uint8 and packed.shape == (3, 5, -(-count // 2))
    np.testing.assert_array_equal(arithmetic.unpack_int4(packed, count), values)


def test_four_bit_packing_is_onnx_packing() -> None:
    """Two's complement, the first number in the low nibble."""
    values = np.arange(-8, 8)
    onnx = ir.tensor(values.astype(np.int8), dtype=ir.DataType.INT4)
    assert arithmetic.pack_int4(values).tobytes() == onnx.tobytes()


@given(st.integers(0, 40), st.sampled_from((1, 2, 4)), st.integers(0, 1000))
def test_packed_bits_come_back(count: int, bits: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (3, count))
    values = (2 * codes - 1 if bits == 1 else codes - (1 << (bits - 1))).astype(np.int8)
    packed = arithmetic.pack_bits(values, bits)
    assert packed.shape == (3, -(-count * bits // 8)) and packed.dtype == np.uint8
    np.testing.assert_array_equal(arithmetic.unpack_bits(packed, count, bits), values)


def test_the_first_number_lies_in_the_lowest_bits() -> None:
    assert arithmetic.pack_bits(np.array([1, -2, 0, -1]), 2).tolist() == [0b11_00_10_01]
    assert arithmetic.pack_bits(np.array([1, -1, -1, -1, -1, -1, -1, 1, 1]), 1).tolist() == [0b1000_0001, 1]


def test_leading_zeros():
    numbers = np.array([1, 2, 3, (1 << 15) - 1, 1 << 15, (1 << 31) - 1], np.int64)
    np.testing.assert_array_equal(
        arithmetic.leading_zeros(numbers), [32 - int(n).bit_length() for n in numbers.tolist()]
    )
