"""TFLite's fixed-point functions, against scalar C++-like code and the real functions (LiteRT: tests/emit)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.quant import tflite_functions

INT32_MAX = (1 << 31) - 1


def truncated(a: int, b: int) -> int:
    """C++ integer division."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def high_mul(a: int, b: int) -> int:
    product = a * b
    return truncated(product + (1 << 30 if product >= 0 else 1 - (1 << 30)), 1 << 31)


def by_power_of_two(x: int, exponent: int) -> int:
    remainder, threshold = x & ((1 << exponent) - 1), ((1 << exponent) - 1) // 2 + (x < 0)
    return (x >> exponent) + (remainder > threshold)


def scalar_softmax(row: list[int], table: list[int], lowest: int) -> list[int]:
    """`reference_ops::Softmax` of TFLite's softmax.h for one row, its exponentials given."""
    highest = max(row)
    total = sum(by_power_of_two(table[highest - x], 12) for x in row)
    headroom = 32 - total.bit_length()
    # One and one half of GetReciprocal: the fraction after the leading one, then 1 / (1 + it).
    fraction = (total << headroom) - (1 << 31)
    half = truncated(fraction + INT32_MAX + 1, 2)
    x = 1515870810 + high_mul(half, -1010580540)
    for _ in range(3):
        x += high_mul(x, (1 << 29) - high_mul(half, x)) << 2
    scale = min(x << 1, INT32_MAX)
    shift = 12 - headroom + 31 - 8
    return [min(max(by_power_of_two(high_mul(scale, table[highest - x]), shift) + lowest, lowest), lowest + 255)
            for x in row]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.integers(-128, 127), min_size=1, max_size=40),
    scale=st.floats(1e-4, 2.0),
)
def test_softmax_is_the_scalar_code(row, scale):
    table = tflite_functions.softmax_table(scale)
    got = tflite_functions.softmax(np.array([row], np.int8), table, -128, (-128, 127), "int8")
    assert got.dtype == np.int8
    np.testing.assert_array_equal(got[0], scalar_softmax(row, table.tolist(), -128))


@pytest.mark.parametrize("scale", [0.001, 0.037, 0.4, 3.0])
def test_exponentials(scale):
    table = tflite_functions.softmax_table(scale)
    real = np.exp(-np.arange(256) * scale)
    assert table.dtype == np.int32 and table[0] == INT32_MAX
    assert np.abs(table / 2**31 - np.where(table > 0, real, 0)).max() < 1e-6
    assert real[table == 0].max(initial=0) < 2.0**-30


def test_softmax_of_long_equal_rows_and_of_a_single_element():
    table = tflite_functions.softmax_table(0.1)
    ones = tflite_functions.softmax(np.zeros((3, 1), np.uint8), table, 0, (0, 255), "uint8")
    np.testing.assert_array_equal(ones, np.full((3, 1), 255))
    longest = tflite_functions.SOFTMAX_LONGEST_ROW
    np.testing.assert_array_equal(
        tflite_functions.softmax(np.zeros(longest, np.int8), table, -128, (-128, 127), "int8"), np.full(longest, -128)
    )


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize(("scale", "zero_point"), [(0.03, 4), (0.2, 100), (0.002, 0), (1.5, 17)])
def test_logistic_is_within_one(dtype, scale, zero_point):
    lowest = np.iinfo(dtype).min
    got = tflite_functions.logistic_table(scale, zero_point, dtype)
    real = 256 / (1 + np.exp(-(np.arange(256) + lowest - zero_point) * scale))
    assert got.dtype == np.dtype(dtype) and (np.diff(got.astype(int)) >= 0).all()
    assert np.abs(got.astype(int) - lowest - np.clip(real, 0, 255)).max() <= 0.51


@pytest.mark.parametrize("scale", [16.0, 31.9, 1e6])
def test_a_coarse_softmax_gives_all_to_the_largest(scale: float) -> None:
    table = tflite_functions.softmax_table(scale)
    assert table[0] == (1 << 31) - 1 and not table[1:].any()
    x = np.array([[-128, 5, 4, 127], [3, 3, 0, -7]], np.int8)
    probabilities = tflite_functions.softmax(x, table, -128, (-128, 127), np.int8)
    assert probabilities.tolist() == [[-128, -128, -128, 127], [0, 0, -128, -128]]


@pytest.mark.parametrize("scale", [8.0, 1e6])
def test_a_coarse_sigmoid_is_a_step(scale: float) -> None:
    table = tflite_functions.logistic_table(scale, 3, np.int8).astype(int)
    at_zero = 3 + 128
    assert (table[:at_zero] <= -127).all() and (table[at_zero + 1 :] >= 126).all() and table[at_zero] == 0
