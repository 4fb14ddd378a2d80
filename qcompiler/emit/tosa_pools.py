"""Pools and means as TOSA."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.emit.tosa_emitter import Emitter, factors_of, refusal, scale_of, signed_zero_point
from qcompiler.emit.tosa_products import convolve, cropped
from qcompiler.emit.tosa_text import Tensor, integers
from qcompiler.emit.windows import Window, windows_of
from qcompiler.graph import (
    Shape,
    data_input,
    element_count,
    shape_of,
)
from qcompiler.integer import ops


def emit_max_pool(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QMaxPool.of(node)
    x, y = data_input(node), node.outputs[0]
    if op.dilations != (1, 1):
        raise refusal(node, "TOSA's pools have no dilation")
    windows = windows_of(shape_of(x), shape_of(y), op.kernel_shape, op.strides, op.dilations, op.pads)
    source, pads = cropped(emitter, emitter.of(x), windows)
    attributes = {
        "kernel": integers(op.kernel_shape),
        "stride": integers(op.strides),
        "pad": integers(pads),
        "nan_mode": "#tosa.nan_mode<PROPAGATE>",
    }
    pooled = emitter.text.op("max_pool2d", [source], shape_of(y), "int8", attributes)
    emitter.finish(node, pooled, (op.clamp_min, op.clamp_max))


def emit_average_pool(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QAveragePool.of(node)
    text, x, y = emitter.text, data_input(node), node.outputs[0]
    shape = shape_of(y)
    windows = windows_of(shape_of(x), shape, op.kernel_shape, op.strides, (1, 1), op.pads)
    zero_point = signed_zero_point(x, op.x_zero_point)
    total = _sums(emitter, emitter.of(x), zero_point, windows, op.kernel_shape, shape)
    multiplier, shift = factors_of(node, 1)
    counts = np.full(shape[1:3], element_count(op.kernel_shape))
    if not op.count_include_pad:
        counts = np.outer(*(_elements_inside(window) for window in windows))
    scale = scale_of(node, multiplier[counts.reshape(-1) - 1], shift[counts.reshape(-1) - 1], op.requantize)
    out = signed_zero_point(y, op.y_zero_point)
    if scale.multiplier.size == 1:
        scaled = text.rescale(total, scale, "int8", y_zero_point=out)
    else:
        # RESCALE has one factor per element of the last axis, so the windows go there.
        n, h, w, c = shape
        moved = text.transpose(text.reshape(total, (n, h * w, c)), (0, 2, 1))
        scaled = text.transpose(text.rescale(moved, scale, "int8", y_zero_point=out), (0, 2, 1))
    emitter.finish(node, text.reshape(scaled, shape), (op.clamp_min, op.clamp_max))


def emit_reduce_mean(emitter: Emitter, node: ir.Node) -> None:
    """Neighbouring axes become height and width of a map, those after them its channels."""
    op = ops.QReduceMean.of(node)
    x, y = data_input(node), node.outputs[0]
    shape, axes = shape_of(x), op.axes
    if axes != tuple(range(axes[0], axes[-1] + 1)):
        raise refusal(node, "it averages axes that are not neighbours")
    outer, inner = element_count(shape[: axes[0]]), element_count(shape[axes[-1] + 1 :])
    kernel = (element_count(shape[axes[0] : axes[-1]]), shape[axes[-1]])
    windows = [Window(size, 1, size, 1, 1, 0) for size in kernel]
    source = emitter.text.reshape(emitter.of(x), (outer, *kernel, inner))
    zero_point = signed_zero_point(x, op.x_zero_point)
    total = _sums(emitter, source, zero_point, windows, kernel, (outer, 1, 1, inner))
    scale = scale_of(node, *factors_of(node, 1), op.requantize)
    scaled = emitter.text.rescale(total, scale, "int8", y_zero_point=signed_zero_point(y, op.y_zero_point))
    emitter.finish(node, scaled, (op.clamp_min, op.clamp_max))


def _sums(
    emitter: Emitter, x: Tensor, zero_point: int, windows: Sequence[Window], kernel: Shape, shape: Shape
) -> Tensor:
    """Sums over windows, int32: a depthwise convolution by ones."""
    source, pads = cropped(emitter, x, windows)
    channels = x.shape[3]
    attributes = {
        "pad": integers(pads),
        "stride": integers([window.stride for window in windows]),
        "dilation": integers((1, 1)),
    }
    ones = np.ones((*kernel, channels, 1), np.int8)
    bias = np.zeros(channels, np.int32)
    return convolve(emitter, "depthwise_conv2d", source, ones, bias, (zero_point, 0), shape, attributes)


def _elements_inside(window: Window) -> np.ndarray:
    """How many elements of the input each window covers."""
    first = np.arange(window.count) * window.stride - window.pad
    return np.minimum(first + window.kernel, window.size) - np.maximum(first, 0)
