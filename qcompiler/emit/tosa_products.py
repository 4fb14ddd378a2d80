"""Convolutions and matrix products as TOSA."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.emit.tosa_emitter import Emitter, offset_of, refusal, requantized, signed_zero_point
from qcompiler.emit.tosa_text import Tensor, integers
from qcompiler.emit.windows import Window, windows_of
from qcompiler.graph import (
    Shape,
    const_of,
    data_input,
    element_count,
    shape_of,
)
from qcompiler.integer import ops


def emit_conv(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QConv.of(node)
    x, y = data_input(node), node.outputs[0]
    channels = shape_of(x)[3]
    filters, bias = _weights(node)
    depthwise = op.group == channels > 1
    if op.group > 1 and not depthwise:
        raise refusal(node, "TOSA has no grouped convolution")
    if depthwise:
        each = len(filters) // channels
        filters = filters.reshape(channels, each, *op.kernel_shape).transpose(2, 3, 0, 1)
    windows = windows_of(shape_of(x), shape_of(y), op.kernel_shape, op.strides, op.dilations, op.pads)
    source, pads = cropped(emitter, emitter.of(x), windows)
    zero_points = (signed_zero_point(x, op.x_zero_point), signed_zero_point(data_input(node, 1), op.w_zero_point))
    attributes = {"pad": integers(pads), "stride": integers(op.strides), "dilation": integers(op.dilations)}
    name = "depthwise_conv2d" if depthwise else "conv2d"
    total = convolve(emitter, name, source, filters, bias, zero_points, shape_of(y), attributes)
    requantized(emitter, node, total, op, 3)


def emit_conv_transpose(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QConvTranspose.of(node)
    x, y = data_input(node), node.outputs[0]
    if op.group != 1 or op.dilations != (1, 1):
        raise refusal(node, "TOSA's transposed convolution has neither groups nor dilation")
    filters, bias = _weights(node)
    zero_points = (signed_zero_point(x, op.x_zero_point), signed_zero_point(data_input(node, 1), op.w_zero_point))
    out_pads: list[int] = []
    for axis in range(2):
        reached = (shape_of(x)[1 + axis] - 1) * op.strides[axis] + op.kernel_shape[axis]
        out_pads += [-op.pads[axis], shape_of(y)[1 + axis] + op.pads[axis] - reached]
    attributes = {"out_pad": integers(out_pads), "stride": integers(op.strides)}
    total = convolve(emitter, "transpose_conv2d", emitter.of(x), filters, bias, zero_points, shape_of(y), attributes)
    requantized(emitter, node, total, op, 3)


def emit_gemm(emitter: Emitter, node: ir.Node) -> None:
    """A 1×1 convolution over a column of rows; TOSA has no dense layer."""
    op = ops.QGemm.of(node)
    x = data_input(node)
    filters, bias = _weights(node)
    rows, depth = shape_of(x)
    column = emitter.text.reshape(emitter.of(x), (1, rows, 1, depth))
    zero_points = (signed_zero_point(x, op.x_zero_point), signed_zero_point(data_input(node, 1), op.w_zero_point))
    attributes = {"pad": integers((0,) * 4), "stride": integers((1, 1)), "dilation": integers((1, 1))}
    shape = (1, rows, 1, len(filters))
    total = convolve(emitter, "conv2d", column, filters[:, None, None], bias, zero_points, shape, attributes)
    requantized(emitter, node, total, op, 3)


def emit_matmul(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QMatMul.of(node)
    a, b, y = data_input(node), data_input(node, 1), node.outputs[0]
    batch = element_count(shape_of(a)[:-2])
    if element_count(shape_of(b)[:-2]) != batch:
        raise refusal(node, "TOSA's matrix product does not broadcast")
    text = emitter.text
    left, right = (text.reshape(emitter.of(value), (batch, *shape_of(value)[-2:])) for value in (a, b))
    zero_points = (signed_zero_point(a, op.a_zero_point), signed_zero_point(b, op.b_zero_point))
    inputs = [left, right, *(text.number(zero_point, "int8") for zero_point in zero_points)]
    total = text.op("matmul", inputs, (batch, *shape_of(y)[-2:]), "int32")
    requantized(emitter, node, total, op, 2)


def _weights(node: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Signed weights, and the bias."""
    w, bias = const_of(data_input(node, 1)), const_of(data_input(node, 2))
    assert w is not None and bias is not None
    return w.astype(np.int16) - offset_of(data_input(node, 1)), bias


def cropped(emitter: Emitter, x: Tensor, windows: Sequence[Window]) -> tuple[Tensor, tuple[int, ...]]:
    """The input without the rows and columns that no window reads, and its top, bottom, left and right padding.

    TOSA wants the windows to fit the padded input exactly.
    """
    size = [window.size + min(window.pad_after, 0) for window in windows]
    x = emitter.text.slice(x, (0, 0, 0, 0), (x.shape[0], *size, x.shape[3]))
    return x, tuple(pad for window in windows for pad in (window.pad, max(window.pad_after, 0)))


def convolve(
    emitter: Emitter,
    name: str,
    x: Tensor,
    filters: np.ndarray,
    bias: np.ndarray,
    zero_points: tuple[int, int],
    shape: Shape,
    attributes: Mapping[str, str],
) -> Tensor:
    text = emitter.text
    inputs = [x, text.constant(filters, "int8"), text.constant(bias, "int32")]
    inputs += [text.number(zero_point, "int8") for zero_point in zero_points]
    return text.op(name, inputs, shape, "int32", {"acc_type": "i32", **attributes})
