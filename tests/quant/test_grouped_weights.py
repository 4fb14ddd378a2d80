"""Formats of weights in groups: exact sums, whole factors, and less error than one scale a channel."""

import numpy as np
import pytest

from qcompiler.quant import arithmetic
from qcompiler.quant.formats import bias_format, bit_width, dequantize_array, quantize_array, unit_scale, weight_format
from qcompiler.quant.grouped_weights import grouped_format
from qcompiler.quant.types import DTypeName

TYPES: tuple[DTypeName, ...] = ("int4", "int2", "int1")


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_splitting_undoes_scaling(bits: int, axis: int) -> None:
    rng = np.random.default_rng(bits + axis)
    shape, group = (5, 13, 11), 4
    codes = rng.choice([-1, 1], shape) if bits == 1 else rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape)
    counts = list(shape)
    counts[axis] = -(-shape[axis] // group)
    factors = rng.integers(1, arithmetic.GROUP_FACTORS[bits] + 1, counts).astype(np.uint8)
    weights = arithmetic.scaled_codes(codes.astype(np.int8), factors, group, axis)
    spread = np.repeat(factors.astype(int), group, axis=axis).take(np.arange(shape[axis]), axis)
    np.testing.assert_array_equal(weights, codes * spread)  # within int8
    again, least = arithmetic.split_codes(weights, group, axis, bits)
    assert (least <= factors).all() and (again.min(), again.max()) >= (-(1 << (bits - 1)), -1)
    np.testing.assert_array_equal(arithmetic.scaled_codes(again, least, group, axis), weights)


def test_splitting_refuses_what_is_no_product() -> None:
    with pytest.raises(AssertionError, match="no products"):
        arithmetic.split_codes(np.array([[127, 1, 3, 4]], np.int8), 4, 1, 4)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("shape", "axes"), [((7, 37, 3, 2), (1, 0)), ((7, 37), (1, 0)), ((37, 7), (0, 1))])
def test_scales_are_whole_multiples_of_a_unit(dtype: DTypeName, shape: tuple[int, ...], axes: tuple[int, int]) -> None:
    rng = np.random.default_rng(len(shape) + axes[0])
    # Channels of very different sizes within an output, as groups are for.
    weights = (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
    fmt = grouped_format(weights, dtype, axes, 8, narrow=True)
    assert fmt.block == 8 and fmt.axis == axes[0] and fmt.factor is not None
    assert fmt.scale.shape[axes[0]] == 5 and fmt.scale.shape[axes[1]] == 7
    assert 1 <= fmt.factor.min() <= fmt.factor.max() <= arithmetic.GROUP_FACTORS[bit_width(dtype)]
    along = [1] * weights.ndim
    along[axes[1]] = -1
    unit = unit_scale(fmt)
    np.testing.assert_array_equal(fmt.scale, unit.reshape(along) * fmt.factor)  # in float32, without rounding
    assert bias_format(np.float32(0.5) * np.ones(()), fmt).scale.shape == (7,)
    codes = quantize_array(weights, fmt, narrow=True)
    decoded = arithmetic.scaled_codes(codes, fmt.factor, 8, axes[0])
    np.testing.assert_allclose(decoded * unit.reshape(along), dequantize_array(codes, fmt), rtol=1e-6)
    per_channel = weight_format(weights, dtype, axes[1], symmetric=True, narrow=True)
    coarse = dequantize_array(quantize_array(weights, per_channel, narrow=True), per_channel)
    share = 0.95 if dtype == "int1" else 0.8
    assert np.square(dequantize_array(codes, fmt) - weights).sum() < share * np.square(coarse - weights).sum()


def test_units_are_powers_of_two_where_the_target_shifts() -> None:
    weights = np.random.default_rng(3).standard_normal((9, 20)).astype(np.float32)
    fmt = grouped_format(weights, "int4", (1, 0), 8, narrow=True, power_of_two=True)
    assert (np.frexp(unit_scale(fmt))[0] == 0.5).all()


def test_a_large_bias_floors_units() -> None:
    weights = np.random.default_rng(3).standard_normal((9, 20)).astype(np.float32)
    floor = np.linspace(0.5, 1, 9)
    fmt = grouped_format(weights, "int4", (1, 0), 8, narrow=True, floor=floor)
    assert (unit_scale(fmt) >= floor).all()


def test_channels_of_zeros_and_grids_are_kept() -> None:
    weights = np.random.default_rng(3).standard_normal((4, 20)).astype(np.float32)
    weights[2] = 0
    fmt = grouped_format(weights, "int4", (1, 0), 8, narrow=True)
    units = unit_scale(fmt)
    assert units.min() <= units[2] <= units.max()
    grid = np.random.default_rng(4).integers(-7, 8, (4, 20)).astype(np.float32) * np.float32(0.0625)
    exact = grouped_format(grid, "int4", (1, 0), 8, narrow=True)
    np.testing.assert_array_equal(dequantize_array(quantize_array(grid, exact, narrow=True), exact), grid)
