"""Formats of weights that share scales in groups along the input channels, beside integer activations.

The scale of a group is a whole number, its factor, times the unit of its output channel, so that weights are 8-bit
integers once decoded (`arithmetic.scaled_codes`). In a convolution a group lies within one place of the kernel.
"""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import data_input, integer, is_op, shape_of
from qcompiler.quant.arithmetic import GROUP_FACTORS, cut_groups
from qcompiler.quant.formats import ZERO_SPAN, bit_width, grid_step, weight_limits
from qcompiler.quant.types import DTypeName, TensorFormat

_SPANS = np.linspace(1.0, 0.3, 36)
"""Fractions of what a group spans to try as its scale."""
_UNITS = np.linspace(1.0, 0.7, 7)
"""Fractions to try of the unit with which the largest factor would serve the widest group."""
_UNIT_BITS = 16
"""Of a unit's significand: times any factor it is a float32 still."""


def group_axes(node: ir.Node) -> tuple[int, int] | None:
    """The axes of a node's weights along which input and output channels lie; None if they have no groups."""
    if is_op(node, "Conv"):
        return 1, 0
    if is_op(node, "Gemm", "MatMul") and len(shape_of(data_input(node, 1))) == 2:
        return (1, 0) if is_op(node, "Gemm") and integer(node, "transB", 0) else (0, 1)
    return None


def takes_groups(node: ir.Node, dtype: DTypeName, group: int) -> bool:
    """Whether weights of a type may share scales in groups of so many: few bits, and more than one group's channels."""
    axes = group_axes(node)
    return axes is not None and bit_width(dtype) in GROUP_FACTORS and shape_of(data_input(node, 1))[axes[0]] > group


def grouped_format(
    weights: np.ndarray,
    dtype: DTypeName,
    axes: tuple[int, int],
    group: int,
    *,
    narrow: bool,
    power_of_two: bool = False,
    floor: np.ndarray | float = 0.0,
) -> TensorFormat:
    """The format with the least squared error, by a search over units and factors.

    Args:
        weights: float32.
        dtype: int4, int2 or int1.
        axes: of input and output channels, as of `group_axes`.
        group: how many neighbours along the input channels share a scale.
        narrow: leave out the lowest integer.
        power_of_two: units are powers of two.
        floor: the smallest unit allowed, scalar or [output channels] (see `formats.least_weight_scale`).
    """
    limits, most = weight_limits(dtype, narrow=narrow), GROUP_FACTORS[bit_width(dtype)]
    blocks, counts = _blocks(weights, axes, group)
    floors = np.broadcast_to(np.maximum(floor, ZERO_SPAN), blocks.shape[:1])
    step = 0.0 if dtype == "int1" else grid_step(weights, limits[1] - limits[0] + 1)
    if step and np.abs(weights).max() <= step * (limits[1] + 0.01):
        unit, factor = np.full(blocks.shape[0], step), np.ones(blocks.shape[:2], np.int64)
        unit = _rounded(np.maximum(unit, floors), power_of_two=power_of_two)
    else:
        unit, factor = _searched(blocks, counts, limits, most, floors, dtype, power_of_two=power_of_two)
    shape = list(np.moveaxis(weights, axes, (-1, 0)).shape)
    shape[-1] = -(-shape[-1] // group)
    factors = np.moveaxis(factor.reshape(shape), (-1, 0), axes).astype(np.uint8)
    units = unit.reshape([-1 if axis == axes[1] else 1 for axis in range(weights.ndim)])
    scale = (units * factors).astype(np.float32)
    return TensorFormat(dtype, scale, np.zeros(scale.shape, np.int8), axes[0], group, factors)


def _blocks(weights: np.ndarray, axes: tuple[int, int], group: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights as float64 [outputs, blocks, group], zeros filling up the last of a place, and how many are real."""
    moved = np.moveaxis(weights.astype(np.float64), axes, (-1, 0))
    depth = moved.shape[-1]
    blocks = cut_groups(moved, group).reshape(moved.shape[0], -1, group)
    parts = -(-depth // group)
    counts = np.full(parts, group)
    counts[-1] = depth - (parts - 1) * group
    return blocks, np.tile(counts, blocks.shape[1] // parts)


def _searched(
    blocks: np.ndarray,
    counts: np.ndarray,
    limits: tuple[int, int],
    most: int,
    floors: np.ndarray,
    dtype: DTypeName,
    *,
    power_of_two: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Units [outputs] and factors [outputs, blocks]."""
    wanted = _free_scales(blocks, counts, limits, dtype)
    widest = np.maximum(wanted.max(axis=1) / most, floors)
    best, least = np.empty(0), np.full(blocks.shape[0], np.inf)
    chosen = np.ones(blocks.shape[:2], np.int64)
    for fraction in _UNITS:
        unit = _rounded(np.maximum(widest * fraction, floors), power_of_two=power_of_two)
        factor, error = np.ones(blocks.shape[:2], np.int64), np.full(blocks.shape[:2], np.inf)
        below = np.floor(wanted / unit[:, None])
        for candidate in (below, below + 1):
            tried = np.clip(candidate, 1, most).astype(np.int64)
            errors = _errors(blocks, tried * unit[:, None], counts, limits, dtype)
            factor, error = np.where(errors < error, tried, factor), np.minimum(errors, error)
        total = error.sum(axis=1)
        better = total < least
        best = unit if not best.size else np.where(better, unit, best)
        chosen = np.where(better[:, None], factor, chosen)
        least = np.minimum(total, least)
    common = np.gcd.reduce(chosen, axis=1)
    if power_of_two:
        common = common & -common
    best, chosen = best * common, chosen // common[:, None]
    # A channel of zeros has no unit of its own; the mean keeps its rescale factor in a normal range.
    empty = ~blocks.any(axis=(1, 2))
    mean = best[~empty].mean() if not empty.all() else 1.0
    return np.where(empty, _rounded(np.maximum(mean, floors), power_of_two=power_of_two), best), chosen


def _free_scales(blocks: np.ndarray, counts: np.ndarray, limits: tuple[int, int], dtype: DTypeName) -> np.ndarray:
    """The scale of each block with the least error, were it free."""
    if dtype == "int1":
        return np.abs(blocks).sum(axis=-1) / counts
    whole = np.maximum(np.abs(blocks).max(axis=-1) / limits[1], ZERO_SPAN)
    best, least = whole, np.full(whole.shape, np.inf)
    for span in _SPANS:
        errors = _errors(blocks, whole * span, counts, limits, dtype)
        best, least = np.where(errors < least, whole * span, best), np.minimum(errors, least)
    return best


def _errors(
    blocks: np.ndarray, scale: np.ndarray, counts: np.ndarray, limits: tuple[int, int], dtype: DTypeName
) -> np.ndarray:
    """Squared error of rounding each block to nearest, [outputs, blocks]."""
    spread = scale[..., None]
    if dtype == "int1":
        # Filling is not rounded: (|0| - s)² of each would count.
        return np.square(np.abs(blocks) - spread).sum(axis=-1) - (blocks.shape[-1] - counts) * np.square(scale)
    rounded = np.clip(np.rint(blocks / spread), *limits) * spread
    return np.square(blocks - rounded).sum(axis=-1)


def _rounded(unit: np.ndarray, *, power_of_two: bool) -> np.ndarray:
    """Up, to a power of two or to a significand of few bits."""
    mantissa, exponent = np.frexp(unit)
    steps = np.where(mantissa == 0.5, 0.5, 1.0) if power_of_two else np.ceil(mantissa * 2**_UNIT_BITS) / 2**_UNIT_BITS
    return np.ldexp(steps, exponent)
