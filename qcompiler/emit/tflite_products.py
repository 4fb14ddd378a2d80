"""Convolutions and matrix products as TFLite."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from qcompiler.emit.tflite_emitter import (
    ACTIVATION,
    OP,
    OPTIONS,
    Emitter,
    bias_type,
    check_factors,
    dense,
    depthwise,
    factors_of,
    refusal,
    require_one_width,
    require_tflite,
)
from qcompiler.emit.tflite_model import Tensor
from qcompiler.emit.tflite_movement import strided_slice
from qcompiler.emit.windows import Padded, padded, windows_of
from qcompiler.graph import (
    const_of,
    data_input,
    dtype_of,
    shape_of,
    value_name,
)
from qcompiler.integer import ops
from qcompiler.integer.formats import TensorFormat


def _product_constants(
    emitter: Emitter, node: ir.Node, filters: np.ndarray, axis: int, w_zero_point: int
) -> list[Tensor]:
    """Weights (outputs along `axis`) and bias, after a check of types and rescale factors."""
    x, w, y = data_input(node), data_input(node, 1), node.outputs[0]
    require_one_width(node)
    if filters.dtype in (ml_dtypes.int4, ml_dtypes.int2):
        filters = filters.astype(np.int8)  # Vela's code for weights takes no more room for it
    weights, x_scale = emitter.format(w, node), emitter.format(x, node).scale
    scales = np.array(weights.scales, np.float64)
    multiplier, shift = factors_of(node, 3)
    factors = np.float64(x_scale) * scales / np.float64(emitter.format(y, node).scale)
    check_factors(node, np.broadcast_to(factors, multiplier.shape), multiplier, shift)
    if w_zero_point and filters.dtype == np.int8:
        raise refusal(node, "TFLite's int8 weights are symmetric")
    if len(set(weights.scales)) == 1:
        weights = TensorFormat(weights.scales[:1], weights.zero_point)
    elif filters.dtype != np.int8:
        raise refusal(node, "TFLite's uint8 weights have one scale")
    if filters.dtype != (np.int8 if dtype_of(x) == np.int16 else dtype_of(x)):
        raise refusal(node, f"TFLite has no {dtype_of(x)} by {filters.dtype} product")
    bias = const_of(data_input(node, 2))
    assert bias is not None
    products = tuple(float(np.float32(x_scale) * np.float32(scale)) for scale in weights.scales)
    return [
        emitter.model.constant(value_name(w), filters, weights, axis=axis),
        emitter.model.constant(f"{node.name}.bias", bias.astype(bias_type(x)), TensorFormat(products, 0)),
    ]


def emit_conv(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QConv.of(node)
    require_tflite(node, op.requantize)
    x, w = data_input(node), const_of(data_input(node, 1))
    assert w is not None
    padding = padded(
        *windows_of(shape_of(x), shape_of(node.outputs[0]), op.kernel_shape, op.strides, op.dilations, op.pads)
    )
    source = emitter.padded(emitter.of(x), padding, op.x_zero_point, str(node.name))
    channels = shape_of(x)[3]
    by_channel = op.group == channels > 1
    # [outputs, height, width, 1] to [1, height, width, outputs].
    filters = w.transpose(3, 1, 2, 0) if by_channel else w
    constants = _product_constants(emitter, node, filters, 3 if by_channel else 0, op.w_zero_point)
    convolve = depthwise if by_channel else dense
    emitter.clamped(
        node,
        (op.clamp_min, op.clamp_max),
        lambda output, activation: convolve(emitter, [source, *constants], output, padding, op.dilations, activation),
    )


def emit_conv_transpose(emitter: Emitter, node: ir.Node) -> None:
    """The whole plane that the kernel reaches, then the part that ONNX keeps."""
    op = ops.QConvTranspose.of(node)
    require_tflite(node, op.requantize)
    if op.group != 1 or op.dilations != (1, 1):
        raise refusal(node, "TFLite's transposed convolution has neither groups nor dilation")
    x, y, w = data_input(node), node.outputs[0], const_of(data_input(node, 1))
    assert w is not None
    constants = _product_constants(emitter, node, w, 0, op.w_zero_point)
    (n, *size, _), (*_, outputs) = shape_of(x), shape_of(y)
    wanted = shape_of(y)[1:3]
    reached = [
        (count - 1) * stride + kernel for count, stride, kernel in zip(size, op.strides, op.kernel_shape, strict=True)
    ]
    plane = tuple(max(a, p + b) for a, b, p in zip(reached, wanted, op.pads[:2], strict=True))
    options = schema.TransposeConvOptionsT(
        padding=schema.Padding.VALID,
        strideH=op.strides[0],
        strideW=op.strides[1],
        fusedActivationFunction=ACTIVATION.NONE,
    )

    def make(output: Tensor, activation: int) -> None:
        options.fusedActivationFunction = activation
        full = output
        if plane != wanted:
            full = emitter.temporary(output, (n, *plane, outputs), f"{node.name}.plane")
        dims = emitter.numbers(full.shape, "shape")
        inputs = [dims, constants[0], emitter.of(x), constants[1]]
        emitter.add(OP.TRANSPOSE_CONV, inputs, full, OPTIONS.TransposeConvOptions, options)
        if full is not output:
            starts = (0, op.pads[0], op.pads[1], 0)
            strided_slice(emitter, full, starts, (1, 1, 1, 1), output)

    emitter.clamped(node, (op.clamp_min, op.clamp_max), make)


def emit_gemm(emitter: Emitter, node: ir.Node) -> None:
    """A 1×1 convolution over a column of rows: LiteRT's FULLY_CONNECTED rounds once, all its other kernels twice."""
    op = ops.QGemm.of(node)
    require_tflite(node, op.requantize)
    w = const_of(data_input(node, 1))
    assert w is not None
    constants = _product_constants(emitter, node, w[:, None, None, :], 0, op.w_zero_point)
    rows, depth = shape_of(data_input(node))
    source = emitter.reshaped(emitter.of(data_input(node)), (1, rows, 1, depth), f"{node.name}.column")
    padding = Padded("valid", (1, 1), (0, 0), (0, 0))
    emitter.clamped(
        node,
        (op.clamp_min, op.clamp_max),
        lambda output, activation: dense(emitter, [source, *constants], output, padding, (1, 1), activation),
        shape=(1, rows, 1, len(w)),
    )


def emit_matmul(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QMatMul.of(node)
    require_tflite(node, op.requantize)
    a, b = data_input(node), data_input(node, 1)
    scales = [np.float64(emitter.format(value, node).scale) for value in (a, b, node.outputs[0])]
    check_factors(node, np.atleast_1d(scales[0] * scales[1] / scales[2]), *factors_of(node, 2))

    def make(output: Tensor, activation: int) -> None:
        made = output
        if activation != ACTIVATION.NONE:
            raise refusal(node, "TFLite's batched product has no activation")
        options = schema.BatchMatMulOptionsT(adjX=False, adjY=False)
        inputs = [emitter.of(a), emitter.of(b)]
        emitter.add(OP.BATCH_MATMUL, inputs, made, OPTIONS.BatchMatMulOptions, options)

    emitter.clamped(node, (op.clamp_min, op.clamp_max), make)
