"""Convolutions and matrix products."""

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    Shape,
    data_input,
    input_of,
    integer,
    ints,
    only_user,
    producer,
    real,
    shape_of,
    string,
)
from qcompiler.integer import ops
from qcompiler.integer.builder import (
    Builder,
    Output,
    Quantized,
    constant_of,
    four_pads,
    needed_strides,
    real_constant,
    rows_and_columns,
    window_pads,
)
from qcompiler.integer.formats import record
from qcompiler.integer.realize_movement import Forms
from qcompiler.integer.weight_groups import Groups, grouped_weights, record_groups

_INT32 = np.iinfo(np.int32)
_BIAS_TOLERANCE = 1e-5
"""A bias whose scale is input scale times weight scale up to float32 rounding is used as it is."""


@dataclass(frozen=True)
class Weights:
    """8-bit constants with one zero point, and [outputs] scales."""

    array: np.ndarray
    scale: np.ndarray
    zero_point: int
    groups: Groups | None = None
    """How they may be stored, if they share scales in groups along the input channels."""


def conv(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """1-D and 2-D Conv with constant weights."""
    x, weights = forms.of(data_input(node)), _weights(builder, input_of(node, 1), 0)
    if x is None or weights is None or len(x.shape) not in (3, 4) or not _multipliable(x, weights):
        return None
    kernel = weights.array.shape[2:]
    ones = (1,) * len(kernel)
    strides, dilations = ints(node, "strides", ones), ints(node, "dilations", ones)
    bias = _bias(builder, input_of(node, 2), x, weights, out)
    if bias is None:
        return None
    pads = window_pads(node, x.shape[2:], out.shape[2:], kernel, strides, dilations)
    op = ops.QConv(
        *_window(kernel, needed_strides(strides, out.shape[2:]), pads, dilations),
        integer(node, "group", 1),
        x.format.zero_point,
        weights.zero_point,
        out.format.zero_point,
        *out.clamp,
        builder.variant,
    )
    return _spatial_product(builder, op, x, channels_last(weights.array), weights, bias, out)


def conv_transpose(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """1-D and 2-D ConvTranspose with constant weights."""
    group = integer(node, "group", 1)
    x, weights = forms.of(data_input(node)), constant_weights(input_of(node, 1), 1, repeat=group)
    if x is None or weights is None or len(x.shape) not in (3, 4) or not _multipliable(x, weights):
        return None
    channels, outputs, *kernel = weights.array.shape
    ones = (1,) * len(kernel)
    strides, dilations = ints(node, "strides", ones), ints(node, "dilations", ones)
    bias = _bias(builder, input_of(node, 2), x, weights, out)
    if bias is None:
        return None
    pads = _transposed_pads(node, x.shape[2:], out.shape[2:], tuple(kernel), strides, dilations)
    op = ops.QConvTranspose(
        *_window(tuple(kernel), strides, pads, dilations),
        group,
        x.format.zero_point,
        weights.zero_point,
        out.format.zero_point,
        *out.clamp,
        builder.variant,
    )
    # [groups, in, out, kernel…] to [groups, out, in, kernel…].
    split = weights.array.reshape(group, channels // group, outputs, *kernel)
    filters = split.swapaxes(1, 2).reshape(group * outputs, channels // group, *kernel)
    return _spatial_product(builder, op, x, channels_last(filters), weights, bias, out)


def gemm(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """Gemm of an activation by constants."""
    outputs_axis = 0 if integer(node, "transB", 0) else 1
    x, weights = forms.of(data_input(node)), _weights(builder, input_of(node, 1), outputs_axis)
    if x is None or weights is None or len(x.shape) != 2 or real(node, "alpha", 1.0) <= 0:
        return None
    source = x.value
    if integer(node, "transA", 0):
        source = builder.transpose(source, (1, 0), f"{out.name}.x")
    rows = weights.array if outputs_axis == 0 else weights.array.T
    return _gemm(
        builder,
        Quantized(source, x.format),
        replace(weights, array=rows, scale=weights.scale * np.float32(real(node, "alpha", 1.0))),
        input_of(node, 2),
        real(node, "beta", 1.0),
        out,
    )


def matmul(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """MatMul by a constant matrix (a QGemm), or of two activations."""
    return _matmul_plus(builder, forms, node, None, out)


def matmul_and_bias(builder: Builder, forms: Forms, node: ir.Node, out: Output) -> ir.Value | None:
    """Add(MatMul(x, constant matrix), constant vector)."""
    for product, bias in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        inner = producer(product, "MatMul")
        if inner is None or product is None or only_user(product) is not node or real_constant(bias) is None:
            continue
        if _weights(builder, input_of(inner, 1), 1) is None or shape_of(product) != out.shape:
            return None
        return _matmul_plus(builder, forms, inner, bias, out)
    return None


def _matmul_plus(builder: Builder, forms: Forms, node: ir.Node, bias: ir.Value | None, out: Output) -> ir.Value | None:
    a, second = forms.of(data_input(node)), data_input(node, 1)
    if a is None:
        return None
    is_matrix = len(shape_of(second)) == 2
    weights = _weights(builder, second, 1) if is_matrix else None
    if is_matrix and weights is None and constant_of(second) is not None:
        return None
    if weights is not None:
        if len(a.shape) < 2:
            return None
        rows = builder.reshape(a.value, (_leading(a.shape), a.shape[-1]), f"{out.name}.x")
        transposed = replace(weights, array=weights.array.T)
        flat = Output(out.format, out.clamp, (_leading(a.shape), weights.array.shape[1]), f"{out.name}.rows")
        inner = flat if len(a.shape) > 2 else out
        product = _gemm(builder, Quantized(rows, a.format), transposed, bias, 1.0, inner)
        return builder.reshape(product, out.shape, out.name) if product is not None else None
    b = forms.of(second)
    if b is None or bias is not None or min(len(a.shape), len(b.shape)) < 2 or max(a.format.bits, b.format.bits) > 8:
        return None
    op = ops.QMatMul(a.format.zero_point, b.format.zero_point, out.format.zero_point, *out.clamp, builder.variant)
    factors = builder.encoded(builder.factor([a.format.scale, b.format.scale], out.format.scale), out.name)
    return builder.operator(op, [a.value, b.value, *factors], out.shape, out.format.dtype, out.name)


def _gemm(
    builder: Builder, x: Quantized, weights: Weights, bias: ir.Value | None, beta: float, out: Output
) -> ir.Value | None:
    bias_integers = _bias(builder, bias, x, weights, out, beta)
    if bias_integers is None or not _multipliable(x, weights):
        return None
    op = ops.QGemm(x.format.zero_point, weights.zero_point, out.format.zero_point, *out.clamp, builder.variant)
    inputs = [x.value, _constant(builder, weights.array, weights, out), bias_integers]
    factors = _factors(builder, x, weights, out)
    return builder.operator(op, [*inputs, *factors], out.shape, out.format.dtype, out.name)


def _multipliable(x: Quantized, weights: Weights) -> bool:
    """16-bit activations, as in TFLite, go with signed weights of zero point 0."""
    return x.format.bits == 8 or (weights.zero_point == 0 and weights.array.dtype != np.uint8)


def constant_weights(value: ir.Value | None, outputs_axis: int, repeat: int = 1) -> Weights | None:
    """8-bit constants, per tensor or per channel of the axis that counts outputs (`repeat` times over)."""
    constant = constant_of(value)
    if constant is None or constant.array.dtype == np.int32 or constant.array.ndim < 2:
        return None
    if constant.axis not in (None, outputs_axis) or len(np.unique(constant.zero_point)) != 1:
        return None
    outputs = constant.array.shape[outputs_axis]
    scale = np.tile(np.broadcast_to(constant.scale.reshape(-1), (outputs,)), repeat)
    return Weights(constant.array, scale, int(constant.zero_point.reshape(-1)[0]))


def _weights(builder: Builder, value: ir.Value | None, outputs_axis: int) -> Weights | None:
    """`constant_weights`, or weights in groups."""
    shifts = builder.variant == "shift"
    found = grouped_weights(value, outputs_axis, builder.weight_types, power_of_two=shifts)
    return constant_weights(value, outputs_axis) if found is None else Weights(found.array, found.unit, 0, found.groups)


def _constant(builder: Builder, array: np.ndarray, weights: Weights, out: Output) -> ir.Value:
    """`weights` in the layout of `array`, channels last."""
    constant = builder.weights(array, f"{out.name}.weights")
    record(constant, weights.scale, weights.zero_point)
    multiple = builder.group_multiple
    if weights.groups is not None and multiple is not None and weights.groups.size % multiple == 0:
        record_groups(constant, weights.groups)
    return constant


def _bias(
    builder: Builder, value: ir.Value | None, x: Quantized, weights: Weights, out: Output, beta: float = 1.0
) -> ir.Value | None:
    """The bias in accumulator units (input scale times weight scale), int32 [outputs].

    An int32 bias already in these units is used as it is, zeros stand for an absent one, and any other constant is
    rounded to the nearest unit, half to even, saturating. None if it is not constant or not one number per output.
    """
    outputs, name = weights.scale.size, f"{out.name}.bias"
    if value is None:
        return builder.constant(np.zeros(outputs, np.int32), name)
    unit = x.format.scale * weights.scale
    constant, values = constant_of(value), real_constant(value)
    if values is None or values.size not in (1, outputs) or (values.ndim > 1 and values.shape[-1] != values.size):
        return None
    if constant is not None and constant.array.dtype == np.int32 and constant.array.size == outputs and beta == 1:
        same = np.allclose(constant.scale.reshape(-1), unit, rtol=_BIAS_TOLERANCE, atol=0)
        if same and not constant.zero_point.any():
            return builder.constant(constant.array.reshape(outputs), name)
    units = np.broadcast_to(values.reshape(-1).astype(np.float64) * beta, (outputs,)) / unit.astype(np.float64)
    return builder.constant(np.clip(np.rint(units), _INT32.min, _INT32.max).astype(np.int32), name)


def _factors(builder: Builder, x: Quantized, weights: Weights, out: Output) -> list[ir.Value]:
    return builder.encoded(builder.factor([x.format.scale, weights.scale], out.format.scale), out.name)


def _spatial_product(
    builder: Builder,
    op: ops.QConv | ops.QConvTranspose,
    x: Quantized,
    filters: np.ndarray,
    weights: Weights,
    bias: ir.Value,
    out: Output,
) -> ir.Value:
    inputs = [_constant(builder, filters, weights, out), bias, *_factors(builder, x, weights, out)]
    source = builder.feature_map(x.value, f"{out.name}.x")
    return builder.spatial(
        out, lambda inner: builder.operator(op, [source, *inputs], inner.shape, inner.format.dtype, inner.name)
    )


def _window(
    kernel: Shape, strides: Shape, pads: Shape, dilations: Shape
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    return (
        rows_and_columns(kernel, 1),
        rows_and_columns(strides, 1),
        four_pads(pads),
        rows_and_columns(dilations, 1),
    )


def channels_last(array: np.ndarray) -> np.ndarray:
    """[out, in, kernel…] to [out, kernel height, kernel width, in]."""
    moved = np.moveaxis(array, 1, -1)
    return moved if moved.ndim == 4 else moved[:, None]


def _transposed_pads(node: ir.Node, size: Shape, out: Shape, kernel: Shape, strides: Shape, dilations: Shape) -> Shape:
    """Explicit pads of a ConvTranspose. With output_shape or SAME they follow from the sizes, as ONNX defines."""
    mode = string(node, "auto_pad", "NOTSET")
    spatial = len(kernel)
    if "output_shape" not in node.attributes and mode in ("NOTSET", "VALID"):
        return ints(node, "pads", (0,) * (2 * spatial)) if mode == "NOTSET" else (0,) * (2 * spatial)
    extra = ints(node, "output_padding", (0,) * spatial)
    total = [
        max(0, s * (i - 1) + e + (k - 1) * d + 1 - o)
        for s, i, e, k, d, o in zip(strides, size, extra, kernel, dilations, out, strict=True)
    ]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return (*less, *more) if mode == "SAME_UPPER" else (*more, *less)


def _leading(shape: Shape) -> int:
    return int(np.prod(shape[:-1]))
