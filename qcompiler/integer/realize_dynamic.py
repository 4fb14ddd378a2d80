"""Convolutions and products of tensors that are quantized at run time.

What is looked for is a Conv, Gemm or MatMul that reads two DequantizeLinear nodes, the first with a scale or zero point
computed at run time, the second with constants. Our own models hold the scales in the DequantizeLinear nodes; what the
importer makes of ConvInteger and MatMulInteger has ones there, and multiplies by the scales and adds the bias
afterwards. Either way all that, and a Relu or Clip behind it, becomes one operator.
"""

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    const_of,
    data_input,
    dtype_of,
    input_of,
    integer,
    ints,
    is_op,
    only_user,
    producer,
    real,
    shape_of,
)
from qcompiler.integer import ops
from qcompiler.integer.builder import (
    EIGHT_BITS,
    Builder,
    four_pads,
    needed_strides,
    real_constant,
    rows_and_columns,
    window_pads,
)
from qcompiler.integer.formats import record
from qcompiler.integer.realize_products import Weights, channels_last, constant_weights

_ACTIVATIONS = ("Relu", "Clip")


@dataclass(frozen=True)
class _Source:
    """A tensor of 8-bit integers, with its scale and zero point; one of them at least is known at run time only."""

    integers: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None


@dataclass(frozen=True)
class _Result:
    """What an accumulator becomes: clip(acc * (x_scale * w_scale) + bias, low, high), which stands for `value`."""

    value: ir.Value
    x_scale: ir.Value
    w_scale: np.ndarray
    """float32 [O]."""
    bias: np.ndarray
    """float32 [O]."""
    low: float = -np.inf
    high: float = np.inf


@dataclass(frozen=True)
class Replacement:
    """A float value of the old graph, and the one to read instead."""

    old: ir.Value
    new: ir.Value


def realize_dynamic(builder: Builder, node: ir.Node, *, known: bool = False) -> Replacement | None:
    """Add the integer operator that stands for `node` and what follows it, or None if `node` is something else.

    Args:
        known: look for scales and zero points that are constants instead: of a tensor quantized as usual, whose product
            goes on in float.
    """
    if not is_op(node, "Conv", "Gemm", "MatMul"):
        return None
    source = _source(builder, data_input(node), known=known)
    if source is None:
        return None
    return _conv(builder, node, source) if is_op(node, "Conv") else _gemm(builder, node, source)


def _source(builder: Builder, value: ir.Value, *, known: bool) -> _Source | None:
    reshape = producer(value, "Reshape")
    if reshape is not None:
        moved = _source(builder, data_input(reshape), known=known)
        if moved is None:
            return None
        name = f"{moved.integers.name}.rows"
        return replace(moved, integers=builder.reshape(moved.integers, shape_of(value), name))
    dequantize = producer(value, "DequantizeLinear")
    if dequantize is None or integer(dequantize, "block_size", 0):
        return None
    integers, scale, zero_point = data_input(dequantize), data_input(dequantize, 1), input_of(dequantize, 2)
    constant = const_of(scale) is not None and (zero_point is None or const_of(zero_point) is not None)
    scalars = all(parameter is None or shape_of(parameter) == () for parameter in (scale, zero_point))
    if constant != known or not scalars or const_of(integers) is not None or integers.dtype not in EIGHT_BITS:
        return None
    return _Source(integers, scale, zero_point) if scale.dtype == ir.DataType.FLOAT else None


def _own(node: ir.Node, source: _Source, weights: Weights) -> _Result | None:
    """The node alone, with the scales and the bias it has itself."""
    is_gemm, bias = is_op(node, "Gemm"), input_of(node, 2)
    scale = weights.scale.astype(np.float32) * np.float32(real(node, "alpha", 1.0) if is_gemm else 1)
    offset = np.zeros(scale.shape, np.float32)
    if bias is not None:
        constant = real_constant(bias)
        if constant is None or constant.size not in (1, scale.size):
            return None
        offset = offset + constant.reshape(-1).astype(np.float32) * np.float32(
            real(node, "beta", 1.0) if is_gemm else 1
        )
    return _Result(node.outputs[0], source.scale, scale, offset)


def _with_tail(node: ir.Node, result: _Result) -> _Result:
    """Take in what follows: a product with scales, a sum with a bias, a clamp; each if nobody else reads before it."""
    reader = only_user(result.value)
    if (
        is_op(reader, "Reshape")
        and reader is not None
        and not is_op(node, "Conv")
        and shape_of(reader.outputs[0])[-1:] == shape_of(result.value)[-1:]
    ):
        # Products of more axes than two were brought to two, between Reshapes.
        result = replace(result, value=reader.outputs[0])
    axis = 1 if is_op(node, "Conv") else len(shape_of(result.value)) - 1
    result = _times_scales(result, axis)
    reader = only_user(result.value)
    if is_op(reader, "Add") and reader is not None and shape_of(reader.outputs[0]) == shape_of(result.value):
        bias = _per_channel(_other(reader, result.value), result, axis)
        if bias is not None:
            result = replace(result, value=reader.outputs[0], bias=result.bias + bias)
    reader = only_user(result.value)
    if is_op(reader, *_ACTIVATIONS) and reader is not None and data_input(reader) is result.value:
        bounds = [const_of(input_of(reader, index)) for index in (1, 2)]
        if all(bound is not None or input_of(reader, 1 + index) is None for index, bound in enumerate(bounds)):
            low, high = (
                default if b is None else float(b) for b, default in zip(bounds, (-np.inf, np.inf), strict=True)
            )
            result = replace(result, value=reader.outputs[0], low=0.0 if is_op(reader, "Relu") else low, high=high)
    return result


def _times_scales(result: _Result, axis: int) -> _Result:
    """Mul by a run-time scalar, or by that times constants: the scales of a dynamically quantized model."""
    reader = only_user(result.value)
    one = const_of(result.x_scale)
    # A scale found here would apply to a bias of the node's own too.
    if not is_op(reader, "Mul") or reader is None or one is None or result.bias.any():
        return result
    factor = _other(reader, result.value)
    combined = producer(factor, "Mul")
    scales = [data_input(combined), data_input(combined, 1)] if combined is not None else [factor]
    run_time = [scale for scale in scales if const_of(scale) is None]
    constants = [_per_channel(scale, result, axis) for scale in scales if const_of(scale) is not None]
    if len(run_time) != 1 or shape_of(run_time[0]) != () or any(constant is None for constant in constants):
        return result
    if shape_of(reader.outputs[0]) != shape_of(result.value):
        return result
    w_scale = result.w_scale * one.astype(np.float32)
    for constant in constants:
        assert constant is not None
        w_scale = w_scale * constant
    return replace(result, value=reader.outputs[0], x_scale=run_time[0], w_scale=w_scale)


def _other(node: ir.Node, value: ir.Value) -> ir.Value:
    return data_input(node, 1) if data_input(node) is value else data_input(node)


def _per_channel(value: ir.Value, result: _Result, axis: int) -> np.ndarray | None:
    """Constants that vary along the channel axis at most, float32 [O]; None if they are anything else."""
    array, shape = const_of(value), shape_of(result.value)
    if array is None or array.ndim > len(shape):
        return None
    full = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    if any(dim != 1 for index, dim in enumerate(full.shape) if index != axis):
        return None
    return np.broadcast_to(full.reshape(-1), result.w_scale.shape).astype(np.float32)


# --- the operators -------------------------------------------------------------------------------------------


def _conv(builder: Builder, node: ir.Node, source: _Source) -> Replacement | None:
    weights, shape = constant_weights(input_of(node, 1), 0), shape_of(node.outputs[0])
    if weights is None or len(shape) not in (3, 4):
        return None
    own = _own(node, source, weights)
    if own is None:
        return None
    result = _with_tail(node, own)
    kernel, ones = weights.array.shape[2:], (1,) * (len(shape) - 2)
    strides, dilations = ints(node, "strides", ones), ints(node, "dilations", ones)
    pads = window_pads(node, shape_of(source.integers)[2:], shape[2:], kernel, strides, dilations)
    op = ops.QConvDynamic(
        rows_and_columns(kernel, 1),
        rows_and_columns(needed_strides(strides, shape[2:]), 1),
        four_pads(pads),
        rows_and_columns(dilations, 1),
        integer(node, "group", 1),
        weights.zero_point,
        result.low,
        result.high,
    )
    name = result.value.name or ""
    x = builder.feature_map(source.integers, f"{source.integers.name}.x")
    batch, channels, *size = shape
    height, width = size if len(size) == 2 else (1, size[0])
    inputs = [x, *_operands(builder, source, result, channels_last(weights.array), weights.zero_point, name)]
    y = builder.operator(op, inputs, (batch, height, width, channels), ir.DataType.FLOAT, f"{name}.nhwc")
    return Replacement(result.value, builder.to_channels_first(y, shape, name))


def _gemm(builder: Builder, node: ir.Node, source: _Source) -> Replacement | None:
    transposed = is_op(node, "Gemm") and integer(node, "transB", 0) == 1
    second = data_input(node, 1)
    if len(shape_of(second)) != 2 or integer(node, "transA", 0) or real(node, "alpha", 1.0) <= 0:
        return None
    weights, shape = constant_weights(second, 0 if transposed else 1), shape_of(node.outputs[0])
    if weights is None or len(shape) < 2:
        return None
    own = _own(node, source, weights)
    if own is None:
        return None
    result = _with_tail(node, own)
    op = ops.QGemmDynamic(weights.zero_point, result.low, result.high)
    name, depth = result.value.name or "", shape_of(source.integers)[-1]
    rows = int(np.prod(shape[:-1]))
    x = builder.reshape(source.integers, (rows, depth), f"{source.integers.name}.x")
    array = weights.array if transposed else weights.array.T
    inputs = [x, *_operands(builder, source, result, np.ascontiguousarray(array), weights.zero_point, name)]
    y = builder.operator(op, inputs, (rows, shape[-1]), ir.DataType.FLOAT, f"{name}.rows")
    return Replacement(result.value, builder.reshape(y, shape_of(result.value), name))


def _operands(
    builder: Builder, source: _Source, result: _Result, filters: np.ndarray, zero_point: int, name: str
) -> list[ir.Value]:
    constant = builder.weights(filters, f"{name}.weights")
    record(constant, result.w_scale, zero_point)
    zero = source.zero_point
    if zero is None:
        zero = builder.constant(np.zeros((), dtype_of(source.integers)), f"{name}.zero_point")
    scales = builder.constant(result.w_scale, f"{name}.scales")
    return [result.x_scale, zero, constant, scales, builder.constant(result.bias, f"{name}.bias")]
