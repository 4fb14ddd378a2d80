"""Pools, means, softmax and interpolation."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, data_input, element_count, input_of, integer, ints, shape_of, string
from qcompiler.integer import ops
from qcompiler.integer.builder import (
    Builder,
    Format,
    Output,
    Quantized,
    four_pads,
    needed_strides,
    rows_and_columns,
    window_pads,
)
from qcompiler.integer.realize_movement import Forms, max_pool
from qcompiler.integer.resize import is_plain_resize, linear_tables, spatial_scales
from qcompiler.quant import arithmetic, interpolation, tflite_functions


def average_pool(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """AveragePool and GlobalAveragePool of 1-D and 2-D maps."""
    x = forms.of(data_input(node))
    if x is None or len(x.shape) not in (3, 4):
        return None
    spatial = x.shape[2:]
    ones = (1,) * len(spatial)
    kernel, strides = ints(node, "kernel_shape", spatial), ints(node, "strides", ones)
    pads = window_pads(node, spatial, out.shape[2:], kernel, strides, ones)
    counted = bool(integer(node, "count_include_pad", 0)) and any(pads)
    reach = [(o - 1) * s + k for o, s, k in zip(out.shape[2:], strides, kernel, strict=True)]
    padded = [size + pads[i] + pads[i + len(spatial)] for i, size in enumerate(spatial)]
    # With ceil_mode the last window may hang over; ONNX then counts the padding but not the overhang.
    overhangs = any(r > p for r, p in zip(reach, padded, strict=True))
    if ints(node, "dilations", ones) != ones or (counted and overhangs):
        return None
    op = ops.QAveragePool(
        rows_and_columns(kernel, 1),
        rows_and_columns(needed_strides(strides, out.shape[2:]), 1),
        four_pads(pads),
        int(counted),
        x.format.zero_point,
        out.format.zero_point,
        *out.clamp,
        builder.variant,
    )
    counts = np.arange(1, element_count(kernel) + 1)
    if builder.variant == "shift" and not any(pads) and not overhangs:
        counts[:] = counts[-1]  # no other occurs, and most are no power of two
    real = _mean_factors(builder, x.format, out.format, counts)
    if not builder.has_factors(real):
        return None
    factors = builder.encoded(real, out.name)
    source = builder.feature_map(x.value, f"{out.name}.x")
    return builder.spatial(
        out,
        lambda inner: builder.operator(op, [source, *factors], inner.shape, inner.format.dtype, inner.name),
    )


def reduce_mean(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """ReduceMean over constant axes."""
    x, given = forms.of(data_input(node)), input_of(node, 1)
    if x is None or (given is not None and const_of(given) is None):
        return None
    constant = const_of(given)
    axes = [int(axis) for axis in constant] if constant is not None else list(ints(node, "axes", ()))
    if not axes and integer(node, "noop_with_empty_axes", 0):
        return None
    rank = len(x.shape)
    axes = sorted(axis % rank for axis in axes) or list(range(rank))
    op = ops.QReduceMean(tuple(axes), x.format.zero_point, out.format.zero_point, *out.clamp, builder.variant)
    count = np.array([element_count(x.shape[axis] for axis in axes)])
    real = _mean_factors(builder, x.format, out.format, count)
    if not builder.has_factors(real):
        return None
    factors = builder.encoded(real, out.name)
    return builder.operator(op, [x.value, *factors], out.shape, out.format.dtype, out.name)


def softmax(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """Softmax over any axis, which is brought last."""
    x = forms.of(data_input(node))
    if x is None or x.format.bits != out.format.bits:
        return None
    rank = len(x.shape)
    axis = integer(node, "axis", -1) % rank
    if x.format.bits == 16 and not _has_wide_softmax(x, out, axis):
        return None
    table, inverse_scale = _softmax_tables(builder, x, out, axis)
    op = ops.QSoftmax(inverse_scale, out.format.zero_point, *out.clamp)
    exponentials = builder.constant(table, f"{out.name}.exponentials")
    if axis == rank - 1:
        return builder.operator(op, [x.value, exponentials], out.shape, out.format.dtype, out.name)
    perm = [other for other in range(rank) if other != axis] + [axis]
    moved = builder.transpose(x.value, perm, f"{out.name}.x")
    y = builder.operator(op, [moved, exponentials], shape_of(moved), out.format.dtype, f"{out.name}.last")
    return builder.transpose(y, [perm.index(other) for other in range(rank)], out.name)


def _has_wide_softmax(x: Quantized, out: Output, axis: int) -> bool:
    """Whether the one softmax of 16 bits applies: to its output scale, and where nothing in it passes 32 bits."""
    unit = out.format.scale == np.float32(interpolation.SOFTMAX_OUTPUT_SCALE)
    small = float(x.format.scale) <= interpolation.SOFTMAX_LARGEST_SCALE
    return bool(unit and small and x.shape[axis] <= interpolation.SOFTMAX_LONGEST_ROW)


def _softmax_tables(builder: Builder, x: Quantized, out: Output, axis: int) -> tuple[np.ndarray, int]:
    """TFLite's exponentials on targets of its arithmetic, if the output has the one scale its kernel knows; of 16 bits
    everywhere."""
    if x.format.bits == 16:
        return interpolation.softmax_table(float(x.format.scale)), ops.TFLITE_SOFTMAX
    unit = (np.float32(tflite_functions.SOFTMAX_OUTPUT_SCALE), out.format.limits[0])
    short = x.shape[axis] <= tflite_functions.SOFTMAX_LONGEST_ROW
    if builder.variant == "tflite" and (out.format.scale, out.format.zero_point) == unit and short:
        return tflite_functions.softmax_table(float(x.format.scale)), ops.TFLITE_SOFTMAX
    return arithmetic.softmax_tables(float(x.format.scale), float(out.format.scale))


def clamped_max_pool(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """MaxPool followed by an activation or by another format: the rounding commutes with the maximum."""
    x = forms.of(data_input(node))
    if x is None:
        return None
    if x.format == out.format:
        return max_pool(builder, node, x, out.clamp, out.name)
    pooled = max_pool(builder, node, x, x.format.limits, f"{out.name}.max")
    return forms.convert(Quantized(pooled, x.format), out) if pooled is not None else None


def resize_linear(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """Bilinear Resize of height and width."""
    x = forms.of(data_input(node))
    if x is None or string(node, "mode", "nearest") != "linear" or not is_plain_resize(node):
        return None
    if x.format.bits > 8:  # 22 bits of weights leave no room in 32
        return None
    tables: list[ir.Value] = []
    for size, count, scale in zip(x.shape[2:], out.shape[2:], spatial_scales(node), strict=True):
        index, weight = linear_tables(node, size, count, scale)
        tables += [builder.constant(index, f"{out.name}.index"), builder.constant(weight, f"{out.name}.weight")]
    source = builder.feature_map(x.value, f"{out.name}.x")
    plain = Output(x.format, x.format.limits, out.shape, f"{out.name}.resized")
    same = x.format == out.format and out.clamp == out.format.limits
    resized = builder.spatial(
        out if same else plain,
        lambda inner: builder.operator(
            ops.QResizeLinear(), [source, *tables], inner.shape, inner.format.dtype, inner.name
        ),
    )
    return forms.convert(Quantized(resized, x.format), out)


def _mean_factors(builder: Builder, x: Format, out: Format, counts: np.ndarray) -> np.ndarray:
    share = 1 / counts.astype(np.float64)
    if builder.variant == "tflite":
        # A mean is a depthwise convolution by ones of this scale, and scales are float32.
        share = share.astype(np.float32).astype(np.float64)
    return np.float64(x.scale) * share / np.float64(out.scale)
