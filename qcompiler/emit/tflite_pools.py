"""Pools, means and interpolation as TFLite."""

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from qcompiler.emit.tflite_emitter import (
    OP,
    OPTIONS,
    Emitter,
    bias_type,
    check_factors,
    depthwise,
    factors_of,
    padding_code,
    refusal,
    require_one_width,
    require_tflite,
)
from qcompiler.emit.tflite_model import Tensor
from qcompiler.emit.windows import Padded, padded, windows_of
from qcompiler.graph import (
    Shape,
    const_of,
    data_input,
    dtype_of,
    element_count,
    shape_of,
)
from qcompiler.integer import ops
from qcompiler.integer.formats import TensorFormat


def emit_max_pool(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QMaxPool.of(node)
    x, y = data_input(node), node.outputs[0]
    if op.dilations != (1, 1):
        raise refusal(node, "TFLite's pools have no dilation")
    padding = padded(*windows_of(shape_of(x), shape_of(y), op.kernel_shape, op.strides, op.dilations, op.pads))
    source = emitter.padded(emitter.of(x), padding, int(np.iinfo(dtype_of(x)).min), str(node.name))

    def make(output: Tensor, activation: int) -> None:
        options = schema.Pool2DOptionsT(
            padding=padding_code(padding),
            strideH=padding.strides[0],
            strideW=padding.strides[1],
            filterHeight=op.kernel_shape[0],
            filterWidth=op.kernel_shape[1],
            fusedActivationFunction=activation,
        )
        emitter.add(OP.MAX_POOL_2D, [source], output, OPTIONS.Pool2DOptions, options)

    emitter.clamped(node, (op.clamp_min, op.clamp_max), make)


def emit_average_pool(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QAveragePool.of(node)
    require_tflite(node, op.requantize)
    x, y = data_input(node), node.outputs[0]
    windows = windows_of(shape_of(x), shape_of(y), op.kernel_shape, op.strides, (1, 1), op.pads)
    if not op.count_include_pad and any(window.pad > 0 or window.pad_after > 0 for window in windows):
        raise refusal(node, "windows at the border average fewer elements, and TFLite rounds those before it rescales")
    padding = padded(*windows)
    source = emitter.padded(emitter.of(x), padding, op.x_zero_point, str(node.name))
    constants = _ones(emitter, node, op.kernel_shape, shape_of(x)[3], element_count(op.kernel_shape))
    emitter.clamped(
        node,
        (op.clamp_min, op.clamp_max),
        lambda output, activation: depthwise(emitter, [source, *constants], output, padding, (1, 1), activation),
    )


def emit_reduce_mean(emitter: Emitter, node: ir.Node) -> None:
    """Neighbouring axes become height and width of a map, those after them its channels."""
    op = ops.QReduceMean.of(node)
    require_tflite(node, op.requantize)
    shape, axes = shape_of(data_input(node)), op.axes
    if axes != tuple(range(axes[0], axes[-1] + 1)):
        raise refusal(node, "it averages axes that are not neighbours")
    outer, inner = element_count(shape[: axes[0]]), element_count(shape[axes[-1] + 1 :])
    kernel = (element_count(shape[axes[0] : axes[-1]]), shape[axes[-1]])
    source = emitter.reshaped(emitter.of(data_input(node)), (outer, *kernel, inner), f"{node.name}.map")
    constants = _ones(emitter, node, kernel, inner, element_count(kernel))
    padding = Padded("valid", (1, 1), (0, 0), (0, 0))
    emitter.clamped(
        node,
        (op.clamp_min, op.clamp_max),
        lambda output, activation: depthwise(emitter, [source, *constants], output, padding, (1, 1), activation),
        shape=(outer, 1, 1, inner),
    )


def _ones(emitter: Emitter, node: ir.Node, kernel: Shape, channels: int, count: int) -> list[Tensor]:
    """Weights and bias of a depthwise convolution that averages `count` elements."""
    x, y = emitter.format(data_input(node), node), emitter.format(node.outputs[0], node)
    share = np.float32(1 / count)
    multiplier, shift = factors_of(node, 1)
    factor = np.atleast_1d(np.float64(x.scale) * np.float64(share) / np.float64(y.scale))
    check_factors(node, factor, multiplier[-1:], shift[-1:])
    require_one_width(node)
    dtype = np.uint8 if dtype_of(data_input(node)) == np.uint8 else np.int8
    weights = TensorFormat((float(share),), 0)
    bias = TensorFormat((float(np.float32(x.scale) * share),), 0)
    return [
        emitter.model.constant(f"{node.name}.ones", np.ones((1, *kernel, channels), dtype), weights, axis=3),
        emitter.model.constant(f"{node.name}.bias", np.zeros(channels, bias_type(data_input(node))), bias),
    ]


def emit_resize_nearest(emitter: Emitter, node: ir.Node) -> None:
    x, y = data_input(node), node.outputs[0]
    rows, columns = const_of(data_input(node, 1)), const_of(data_input(node, 2))
    assert rows is not None and columns is not None
    for align, half in ((False, False), (False, True), (True, False), (True, True)):
        found = [
            _nearest(size, count, align=align, half=half)
            for size, count in zip(shape_of(x)[1:3], shape_of(y)[1:3], strict=True)
        ]
        if np.array_equal(found[0], rows) and np.array_equal(found[1], columns):
            break
    else:
        raise refusal(node, "no coordinate mode of TFLite picks the same pixels")
    options = schema.ResizeNearestNeighborOptionsT(alignCorners=align, halfPixelCenters=half)
    inputs = [emitter.of(x), emitter.numbers(shape_of(y)[1:3], "size")]
    output = emitter.result(y)
    emitter.add(OP.RESIZE_NEAREST_NEIGHBOR, inputs, output, OPTIONS.ResizeNearestNeighborOptions, options)


def _nearest(size: int, count: int, *, align: bool, half: bool) -> np.ndarray:
    """`GetNearestNeighbor` of resize_nearest_neighbor.h, in its float32."""
    whole = align and count > 1
    scale = np.float32(size - 1) / np.float32(count - 1) if whole else np.float32(size) / np.float32(count)
    at = (np.arange(count, dtype=np.float32) + np.float32(0.5 if half else 0)) * scale
    nearest = np.floor(at + np.float32(0.5)) if align else np.floor(at)
    return np.clip(nearest, 0, size - 1).astype(np.int32)
