"""From an interval, or from weights, to scale and zero point."""

from typing import Literal

import numpy as np

from qcompiler.quant import arithmetic
from qcompiler.quant.types import DTypeName, TensorFormat

_LIMITS: dict[DTypeName, tuple[int, int]] = {
    "int1": (-1, 1),
    "int2": (-2, 1),
    "int4": (-8, 7),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-(1 << 15), (1 << 15) - 1),
    "int32": (-(1 << 31), (1 << 31) - 1),
}

ZERO_SPAN = 2.0**-40
"""An interval narrower than this holds nothing but zeros."""

BIAS_LIMIT = 1 << 30
"""Biases stay this small in accumulator units, which leaves the sum of products as much room again."""


def limits(dtype: DTypeName) -> tuple[int, int]:
    """Smallest and largest integer of a format."""
    return _LIMITS[dtype]


def bit_width(dtype: DTypeName) -> int:
    low, high = _LIMITS[dtype]
    return ((high - low) // step(dtype)).bit_length()


def step(dtype: DTypeName) -> int:
    """The distance of neighbouring integers of a format: 2 for -1 and 1."""
    return 2 if dtype == "int1" else 1


def weight_limits(dtype: DTypeName, *, narrow: bool) -> tuple[int, int]:
    """Smallest and largest integer of symmetric weights.

    `narrow` leaves out the lowest, whose product with the lowest activation is the one that overflows narrow adders;
    types of less than 4 bits cannot spare it, and are far from there.
    """
    smallest, largest = _LIMITS[dtype]
    return smallest + (narrow and smallest < 0 and bit_width(dtype) > 2), largest


def activation_format(
    low: float, high: float, dtype: DTypeName, *, symmetric: bool, power_of_two: bool = False
) -> TensorFormat:
    """The per-tensor format that spans [low, high], zero included and exactly represented.

    Symmetric formats put the zero point in the middle and leave out the lowest integer. `power_of_two` rounds
    the scale up to a power of two.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    smallest, largest = limits(dtype)
    if high - low < ZERO_SPAN:
        low, high = 0.0, 1.0
    middle = (smallest + largest + 1) // 2
    scale = max(-low, high) / (largest - middle) if symmetric else (high - low) / (largest - smallest)
    scale = _round_scale(np.float64(scale), power_of_two)
    zero_point = middle if symmetric else int(np.clip(np.rint(smallest - low / scale), smallest, largest))
    return TensorFormat(dtype, np.asarray(scale, np.float32), np.array(zero_point, _storage(dtype)))


def weight_format(
    weights: np.ndarray,
    dtype: DTypeName,
    axis: int | None,
    *,
    symmetric: bool,
    narrow: bool,
    power_of_two: bool = False,
    floor: np.ndarray | float = 0.0,
) -> TensorFormat:
    """The format of constant weights, per channel along `axis` or per tensor if it is None.

    Args:
        weights: float32, any shape.
        dtype: symmetric types of 4 and 2 bits span what makes the least squared error; int1's scale, the mean
            magnitude, makes it too (Rastegari et al., XNOR-Net, ECCV 2016, equation 6). Others span all weights.
        narrow: leave out the lowest integer, so that the range is symmetric.
        floor: the smallest scale allowed, scalar or [channels] (see `least_weight_scale`).
    """
    smallest, largest = limits(dtype)
    others = tuple(index for index in range(weights.ndim) if index != axis) if axis is not None else None
    low = np.minimum(weights.min(axis=others), 0).astype(np.float64)
    high = np.maximum(weights.max(axis=others), 0).astype(np.float64)
    middle = (smallest + largest + 1) // 2
    if dtype == "int1":
        scale = np.abs(weights.astype(np.float64)).mean(axis=others)
    elif symmetric:
        extreme = np.maximum(-low, high)
        scale = extreme / (largest - middle)
        # Weights that were quantized before lie on a grid; keeping it makes them exact.
        step = grid_step(weights, largest - smallest + 1)
        on_grid = extreme <= step * (largest - middle + 0.01)
        if dtype in ("int4", "int2") and not np.all(on_grid):
            tried = _CLIPPING if dtype == "int2" else _CLIPPING[:61]
            scale = _least_error_scale(weights, others, scale, weight_limits(dtype, narrow=narrow), tried)
        scale = np.where(on_grid, step, scale)
    else:
        smallest += narrow
        scale = (high - low) / (largest - smallest)
    # A channel of zeros has no scale of its own; the mean keeps its rescale factor in a normal range.
    nonzero = scale[scale > ZERO_SPAN]
    scale = np.where(scale > ZERO_SPAN, scale, nonzero.mean() if nonzero.size else 1.0)
    scale = _round_scale(np.maximum(scale, floor), power_of_two)
    zero_point = (
        np.full(scale.shape, middle)
        if symmetric or dtype == "int1"
        else np.clip(np.rint(smallest - low / scale), smallest, largest)
    )
    return TensorFormat(dtype, scale.astype(np.float32), zero_point.astype(_storage(dtype)), axis)


_CLIPPING = np.linspace(1, 0.1, 91)
"""Fractions of the whole span to try; four bits never want less than 0.4 of it."""


def _least_error_scale(
    weights: np.ndarray,
    others: tuple[int, ...] | None,
    whole: np.ndarray,
    limits: tuple[int, int],
    fractions: np.ndarray,
) -> np.ndarray:
    """The one of `fractions` of each scale with the least squared rounding error.

    `others` are the axes a scale is shared along.

    With few levels, clipping the largest weights costs less than rounding all others coarsely.
    """
    values = weights.astype(np.float64)
    best, least = whole, np.full(whole.shape, np.inf)
    spread = whole if others is None else np.expand_dims(whole, others)
    spread = np.where(spread > ZERO_SPAN, spread, 1.0)
    for fraction in fractions:
        rounded = np.clip(np.rint(values / (spread * fraction)), *limits) * (spread * fraction)
        error = ((values - rounded) ** 2).sum(axis=others)
        best = np.where(error < least, whole * fraction, best)
        least = np.minimum(error, least)
    return best


def grid_step(weights: np.ndarray, levels: int) -> float:
    """The step of the even grid that all weights lie on, at most `levels` of them; 0 if there is none."""
    values = np.unique(weights.astype(np.float64))
    if not 2 <= values.size <= levels:
        return 0.0
    gaps = np.diff(values)
    # The gaps are whole multiples of the step, equal to it only up to float32 rounding: average it out.
    step = float(gaps.min())
    steps = np.rint(np.append(values, gaps) / step)
    span = values[-1] - values[0]
    step = span / np.rint(span / step)
    on_grid = np.allclose(values, np.rint(values / step) * step, rtol=0, atol=step * 0.001)
    return step if on_grid and np.abs(steps).max() < levels else 0.0


def least_weight_scale(bias: np.ndarray, input_scale: float) -> np.ndarray:
    """The smallest weight scales [channels] with which `bias` fits into its int32 format."""
    return np.abs(bias.astype(np.float64)) / (input_scale * BIAS_LIMIT)


def bias_format(input_scale: np.ndarray, weight: TensorFormat) -> TensorFormat:
    """int32 with the scale of the accumulator: input scale times weight scale."""
    scale = (input_scale.astype(np.float32) * unit_scale(weight).astype(np.float32)).astype(np.float32)
    return TensorFormat("int32", scale, np.zeros(scale.shape, np.int32), 0 if scale.ndim else None)


def unit_scale(weight: TensorFormat) -> np.ndarray:
    """The scale of products with a weight, per tensor or [output channels]: of weights in groups, that of factor 1."""
    if weight.factor is None:
        return weight.scale
    # Groups lie along the input channels; the outputs are the other one of the first two axes.
    inputs = 1 if weight.axis == 0 else 0
    first = np.moveaxis(weight.scale / weight.factor, inputs, 0)
    return first.reshape(first.shape[0], -1)[:, 0]


def quantize_array(values: np.ndarray, fmt: TensorFormat, *, narrow: bool = False) -> np.ndarray:
    """Round constants into `fmt`, half to even; types of 4 bits and less come back as int8.

    `narrow` leaves out the lowest integer of a signed format.
    """
    smallest, largest = weight_limits(fmt.dtype, narrow=narrow)
    if fmt.dtype == "int1":
        return np.where(values < 0, -1, 1).astype(np.int8)
    scale, zero_point = (spread(parameter, fmt, values.shape) for parameter in (fmt.scale, fmt.zero_point))
    rounded = np.rint(values.astype(np.float64) / scale.astype(np.float64)) + zero_point
    return np.clip(rounded, smallest, largest).astype(_storage(fmt.dtype))


def dequantize_array(integers: np.ndarray, fmt: TensorFormat) -> np.ndarray:
    """The real numbers behind integers of `fmt`, float32."""
    scale, zero_point = (spread(parameter, fmt, integers.shape) for parameter in (fmt.scale, fmt.zero_point))
    return arithmetic.dequantize(integers, scale, zero_point)


def spread(parameter: np.ndarray, fmt: TensorFormat, shape: tuple[int, ...]) -> np.ndarray:
    """A scale or zero point in a shape that broadcasts against a tensor of `shape`."""
    if fmt.axis is None:
        return parameter
    if fmt.block is not None:
        return arithmetic.spread_groups(parameter, shape[fmt.axis], fmt.block, fmt.axis)
    along = [1] * len(shape)
    along[fmt.axis] = -1
    return parameter.reshape(along)


def _round_scale(scale: np.ndarray | np.float64, power_of_two: bool) -> np.ndarray:
    return np.asarray(np.exp2(np.ceil(np.log2(scale))) if power_of_two else scale)


Storage = Literal["int8", "uint8", "int16", "int32"]


def _storage(dtype: DTypeName) -> Storage:
    """The numpy dtype that holds a format's integers."""
    return "int8" if dtype in ("int1", "int2", "int4") else dtype
