"""Tables of 16 bits, against scalar C++-like code and the real functions (LiteRT: tests/emit)."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.quant import interpolation

LIMITS = (-(1 << 15), (1 << 15) - 1)
EVERY = np.arange(LIMITS[0], LIMITS[1] + 1).astype(np.int16)
FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "square": lambda x: x * x / 128,
}


def scalar_lookup(x: int, table: list[int]) -> int:
    """`LUTLookup` of TFLite's common.h."""
    index = 256 + (x >> 7)
    offset, base = x & 0x7F, table[index]
    return base + (((table[index + 1] - base) * offset + 64) >> 7)


def scalar_softmax(row: list[int], table: list[int]) -> list[int]:
    """`SoftmaxInt16` of TFLite's softmax.h for one row, its tables given."""
    exponentials, reciprocals, multiplier, shift = table[:513], table[513:1026], table[1026], table[1027]
    terms: list[int] = []
    for x in row:
        # MultiplyByQuantizedMultiplier with double rounding.
        product = ((x - max(row)) << max(shift, 0)) * multiplier
        rounded = -((-product + (1 << 30) - 1) >> 31) if product < 0 else (product + (1 << 30)) >> 31
        if (right := max(-shift, 0)) > 0:
            remainder, threshold = rounded & ((1 << right) - 1), ((1 << right) - 1) // 2 + (rounded < 0)
            rounded = (rounded >> right) + (remainder > threshold)
        terms.append(scalar_lookup(min(max(rounded + LIMITS[1], LIMITS[0]), LIMITS[1]), exponentials))
    total = sum(terms)
    headroom = 32 - total.bit_length()
    fraction = ((total << (headroom - 1)) + (1 << 13) >> 14) - (1 << 15) - (1 << 16)
    reciprocal = scalar_lookup(min(max(fraction, LIMITS[0]), LIMITS[1]), reciprocals)
    right = 31 - headroom
    return [min(max((term * reciprocal + (1 << (right - 1))) >> right, 0), LIMITS[1]) for term in terms]


@pytest.mark.parametrize("seed", range(3))
def test_lookup_is_the_scalar_code(seed):
    table = np.random.default_rng(seed).integers(*LIMITS, interpolation.ENTRIES, endpoint=True).astype(np.int16)
    got = interpolation.interpolate(EVERY, table)
    assert got.dtype == np.int16
    np.testing.assert_array_equal(got, [scalar_lookup(int(x), table.tolist()) for x in EVERY])
    np.testing.assert_array_equal(got[::128], table[:-1])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("scale", [1e-5, 1e-4, 3e-4])
def test_tables_follow_the_function(name, scale):
    """Within a few of 65536 steps where the function turns slowly."""

    def steps(q: np.ndarray) -> np.ndarray:
        return FUNCTIONS[name](q * scale) * (1 << 15)

    table = interpolation.table_of(steps(interpolation.points()), LIMITS)
    assert table.shape == (interpolation.ENTRIES,) and table.dtype == np.int16
    off = interpolation.interpolate(EVERY, table) - np.clip(steps(EVERY.astype(np.float64)), *LIMITS)
    assert np.abs(off).max() < 3.5


def test_tables_are_clamped():
    values = np.linspace(-70000, 70000, 1025)
    table = interpolation.table_of(values, (0, 20000))
    assert (table.min(), table.max()) == (0, 20000)
    made = interpolation.interpolate(EVERY, table)
    assert (made.min(), made.max()) == (0, 20000)


@settings(max_examples=80, deadline=None)
@given(
    row=st.lists(st.integers(*LIMITS), min_size=1, max_size=40),
    scale=st.floats(1e-7, interpolation.SOFTMAX_LARGEST_SCALE),
)
def test_softmax_is_the_scalar_code(row, scale):
    table = interpolation.softmax_table(scale)
    got = interpolation.softmax(np.array([row], np.int16), table)
    assert got.dtype == np.int16
    np.testing.assert_array_equal(got[0], scalar_softmax(row, table.tolist()))


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-3, 0.1])
def test_softmax_is_near_the_real_one(scale):
    x = np.random.default_rng(1).integers(*LIMITS, (100, 12), endpoint=True).astype(np.int16)
    real = np.exp((x - x.max(axis=1, keepdims=True).astype(np.float64)) * scale)
    real /= real.sum(axis=1, keepdims=True)
    off = interpolation.softmax(x, interpolation.softmax_table(scale)) * interpolation.SOFTMAX_OUTPUT_SCALE - real
    # The exponential of -10 and less is 2 steps.
    assert np.abs(off).max() < 25 / 32768


def test_the_longest_row_of_equals_stays_within_32_bits():
    x = np.zeros((1, interpolation.SOFTMAX_LONGEST_ROW), np.int16)
    table = interpolation.softmax_table(1e-4)
    assert int(table[: interpolation.ENTRIES].max()) * interpolation.SOFTMAX_LONGEST_ROW < 1 << 31
    np.testing.assert_array_equal(interpolation.softmax(x, table), 0)  # 1/65535 is half a step
    assert (interpolation.softmax(x[:, :1000], table) == 33).all()
