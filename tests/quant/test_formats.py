from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.quant.formats import (
    BIAS_LIMIT,
    activation_format,
    bias_format,
    bit_width,
    dequantize_array,
    grid_step,
    least_weight_scale,
    limits,
    quantize_array,
    weight_format,
)

dtypes = st.sampled_from(["int8", "uint8", "int16"])


@given(st.floats(-1e4, 0), st.floats(0, 1e4), dtypes, st.booleans(), st.booleans())
def test_activation_formats_span_the_interval_and_hold_zero(low, high, dtype, symmetric, power_of_two):
    fmt = activation_format(low, high, dtype, symmetric=symmetric, power_of_two=power_of_two)
    smallest, largest = limits(dtype)
    assert fmt.scale.dtype == np.float32 and fmt.scale.shape == () and smallest <= int(fmt.zero_point) <= largest
    zero = quantize_array(np.zeros(1), fmt)
    assert dequantize_array(zero, fmt)[0] == 0
    scale = float(fmt.scale)
    ends = np.array([low, high])
    error = np.abs(dequantize_array(quantize_array(ends, fmt), fmt) - ends)
    # The zero point is rounded to an integer, which may cost an end up to half a step more.
    assert (error <= scale * (1.001 if not symmetric else 0.501) + 1e-6 * np.abs(ends)).all()
    if power_of_two:
        assert np.log2(scale) == np.rint(np.log2(scale))
    if symmetric:
        assert int(fmt.zero_point) == (128 if dtype == "uint8" else 0)


@pytest.mark.parametrize(("dtype", "zero_point"), [("int8", -128), ("uint8", 0)])
def test_unit_outputs_get_the_scale_of_tflite(dtype, zero_point):
    fmt = activation_format(0, 255 / 256, dtype, symmetric=False)
    assert float(fmt.scale) == 1 / 256 and int(fmt.zero_point) == zero_point
    tanh = activation_format(-1, 127 / 128, "int8", symmetric=False)
    assert float(tanh.scale) == 1 / 128 and int(tanh.zero_point) == 0


def test_an_interval_of_nothing_gets_a_usable_format():
    fmt = activation_format(0.0, 0.0, "int8", symmetric=False)
    assert np.isfinite(fmt.scale) and fmt.scale > 0
    assert dequantize_array(quantize_array(np.zeros(3), fmt), fmt).tolist() == [0, 0, 0]


def test_per_channel_weights_use_their_whole_range():
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal((5, 3, 3, 3)) * [[[[0.1]]], [[[1]]], [[[5]]], [[[0.01]]], [[[2]]]]).astype(
        np.float32
    )
    fmt = weight_format(weights, "int8", 0, symmetric=True, narrow=True)
    q = quantize_array(weights, fmt, narrow=True)
    assert fmt.axis == 0 and fmt.scale.shape == (5,) and not fmt.zero_point.any()
    assert np.abs(q.astype(int)).reshape(5, -1).max(axis=1).tolist() == [127] * 5
    error = np.abs(dequantize_array(q, fmt) - weights).reshape(5, -1).max(axis=1)
    assert (error <= fmt.scale * 0.501).all()


@pytest.mark.parametrize(
    ("dtype", "narrow", "lowest"), [("int8", True, -127), ("int4", True, -7), ("int8", False, -128)]
)
def test_narrow_range_leaves_out_the_lowest_integer(dtype, narrow, lowest):
    weights = np.linspace(-1, 1, 1001, dtype=np.float32).reshape(1, -1)
    fmt = weight_format(weights, dtype, None, symmetric=True, narrow=narrow)
    beyond = quantize_array(np.array([-100.0, 100.0]), fmt, narrow=narrow)
    assert beyond.tolist() == [lowest, limits(dtype)[1]]


def test_asymmetric_weights():
    weights = np.random.default_rng(1).uniform(-0.2, 1.4, (4, 6)).astype(np.float32)
    fmt = weight_format(weights, "uint8", 1, symmetric=False, narrow=False)
    assert fmt.scale.shape == fmt.zero_point.shape == (6,) and fmt.zero_point.dtype == np.uint8
    assert np.abs(dequantize_array(quantize_array(weights, fmt), fmt) - weights).max() <= fmt.scale.max() * 1.01


def test_a_dead_channel_gets_a_scale_of_ordinary_size():
    weights = np.random.default_rng(6).uniform(-1, 1, (3, 40)).astype(np.float32)
    weights[1] = 0
    weights[[0, 2], 0] = 1
    fmt = weight_format(weights, "int8", 0, symmetric=True, narrow=True)
    assert fmt.scale[1] == pytest.approx(1 / 127)
    assert weight_format(np.zeros((2, 2), np.float32), "int8", 0, symmetric=True, narrow=True).scale.tolist() == [1, 1]


def test_weights_on_a_grid_stay_exact():
    """As in a model dequantized from 8 bits: channels whose integers fit keep the grid's own step."""
    rng = np.random.default_rng(2)
    integers = rng.integers(-127, 128, (6, 50))
    integers[3] = rng.integers(-40, 41, 50)
    integers[:, 0] += integers[:, 0] % 2 == 0  # some odd number, so that the step is not 2
    weights = (integers * np.float32(0.0173)).astype(np.float32)
    fmt = weight_format(weights, "int8", 0, symmetric=True, narrow=True)
    np.testing.assert_allclose(fmt.scale, 0.0173, rtol=1e-5)
    np.testing.assert_array_equal(quantize_array(weights, fmt, narrow=True), integers)


def test_a_grid_too_wide_for_a_channel_is_given_up_there():
    integers = np.arange(-100, 156).reshape(1, 256)  # uint8 weights with zero point 100
    weights = np.concatenate([integers, integers // 3]).astype(np.float32) * np.float32(0.01)
    fmt = weight_format(weights, "int8", 0, symmetric=True, narrow=True)
    assert fmt.scale.tolist() == pytest.approx([1.55 / 127, 0.01])


def test_random_weights_lie_on_no_grid():
    assert grid_step(np.random.default_rng(3).standard_normal((8, 9)).astype(np.float32), 256) == 0.0
    assert grid_step(np.full(4, 0.5, np.float32), 256) == 0.0


def test_the_bias_fits_however_small_the_weights():
    weights = np.random.default_rng(7).uniform(-1, 1, (2, 40)).astype(np.float32) * [[1e-9], [0.5]]
    weights, bias = weights.astype(np.float32), np.array([3.0, 3.0], np.float32)
    floor = least_weight_scale(bias, 0.01)
    fmt = weight_format(weights, "int8", 0, symmetric=True, narrow=True, floor=floor)
    stored = bias_format(np.array(0.01, np.float32), fmt)
    q = quantize_array(bias, stored)
    assert q.dtype == np.int32 and np.abs(q.astype(np.int64)).max() <= BIAS_LIMIT * 1.001
    np.testing.assert_allclose(dequantize_array(q, stored), bias, rtol=1e-3)
    assert fmt.scale[1] == pytest.approx(np.abs(weights[1]).max() / 127)


def test_four_bit_weights_span_what_makes_the_least_squared_error():
    weights = np.random.default_rng(3).standard_t(3, (6, 50)).astype(np.float32)
    weights[2] = 0
    fmt = weight_format(weights, "int4", 0, symmetric=True, narrow=True)

    def errors(scale):
        rounded = np.clip(np.rint(weights / scale), -7, 7) * scale
        return ((weights - rounded) ** 2).sum(axis=1)

    whole = np.abs(weights).max(axis=1) / 7
    whole[2] = 1
    chosen = errors(fmt.scale[:, None])
    assert (chosen <= errors(whole[:, None]) + 1e-9).all() and chosen.sum() < 0.95 * errors(whole[:, None]).sum()
    tried = np.min([errors(whole[:, None] * fraction) for fraction in np.linspace(0.3, 1, 200)], axis=0)
    assert (chosen <= 1.02 * tried + 1e-9).all()


def test_weights_already_on_a_four_bit_grid_are_exact():
    weights = np.random.default_rng(4).integers(-7, 8, (5, 40)).astype(np.float32) * np.float32(0.03)
    fmt = weight_format(weights, "int4", 0, symmetric=True, narrow=True)
    np.testing.assert_allclose(dequantize_array(quantize_array(weights, fmt, narrow=True), fmt), weights, atol=1e-6)


def test_two_bits_use_all_four_integers_at_the_least_error():
    rng = np.random.default_rng(4)
    weights = rng.standard_normal((6, 200)).astype(np.float32)
    fmt = weight_format(weights, "int2", 0, symmetric=True, narrow=True)
    integers = quantize_array(weights, fmt, narrow=True)
    assert integers.dtype == np.int8 and set(np.unique(integers)) == {-2, -1, 0, 1}
    error = np.square(weights - dequantize_array(integers, fmt)).sum()
    for factor in (0.8, 0.9, 1.1, 1.2):
        other = replace(fmt, scale=fmt.scale * np.float32(factor))
        assert np.square(weights - dequantize_array(quantize_array(weights, other), other)).sum() > error


def test_binary_weights_are_their_signs_times_the_mean_magnitude():
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((4, 3, 5)).astype(np.float32)
    weights[1] = 0
    fmt = weight_format(weights, "int1", 0, symmetric=True, narrow=True)
    integers = quantize_array(weights, fmt)
    np.testing.assert_array_equal(integers, np.where(weights < 0, -1, 1))
    np.testing.assert_allclose(fmt.scale[[0, 2, 3]], np.abs(weights[[0, 2, 3]]).mean(axis=(1, 2)), rtol=1e-6)
    assert fmt.zero_point.dtype == np.int8 and not fmt.zero_point.any() and bit_width("int1") == 1
    # Weights that are binary already stay what they are.
    real = dequantize_array(integers, fmt)
    again = weight_format(real, "int1", 0, symmetric=True, narrow=True)
    np.testing.assert_allclose(dequantize_array(quantize_array(real, again), again), real, rtol=1e-6)
