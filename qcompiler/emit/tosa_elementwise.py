"""Elementwise operators, tables and softmax as TOSA."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.emit.tosa_emitter import (
    Emitter,
    factors_of,
    offset_of,
    refusal,
    requantized,
    scale_of,
    signed_zero_point,
)
from qcompiler.emit.tosa_softmax import softmax
from qcompiler.emit.tosa_text import Tensor, power_of_two
from qcompiler.graph import (
    const_of,
    data_input,
    dtype_of,
    input_of,
    shape_of,
)
from qcompiler.integer import ops
from qcompiler.quant.arithmetic import TFLITE_ADD_LEFT_SHIFT


def emit_add(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QAdd.of(node)
    text, y = emitter.text, node.outputs[0]
    name, shape = "sub" if op.subtract else "add", shape_of(y)
    zero_points = (op.a_zero_point, op.b_zero_point)
    zero_point = signed_zero_point(y, op.y_zero_point)
    if op.requantize == "tflite":
        encoded = ((op.multiplier_a, op.shift_a), (op.multiplier_b, op.shift_b), (op.multiplier_y, op.shift_y))
        scales = [scale_of(node, np.array([m]), np.array([s]), "tflite") for m, s in encoded]
        shifted = _operands(emitter, node, zero_points, TFLITE_ADD_LEFT_SHIFT)
        a, b = (text.rescale(operand, scale, "int32") for operand, scale in zip(shifted, scales[:2], strict=True))
        total = text.op(name, [a, b], shape, "int32")
        result = text.rescale(total, scales[2], "int8", y_zero_point=zero_point)
    else:
        # (a * multiplier_a ± b * multiplier_b + 2^(shift - 1)) >> shift
        rank = len(shape)
        products = [
            text.op("mul", [operand, text.number(m, "int32", rank), text.number(0, "int8")], operand.shape, "int32")
            for operand, m in zip(
                _operands(emitter, node, zero_points, 0), (op.multiplier_a, op.multiplier_b), strict=True
            )
        ]
        total = text.op(name, products, shape, "int32")
        result = text.rescale(total, power_of_two(-op.shift_y), "int8", y_zero_point=zero_point)
    emitter.finish(node, result, (op.clamp_min, op.clamp_max))


def emit_mul(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QMul.of(node)
    a, b = _operands(emitter, node, (op.a_zero_point, op.b_zero_point), 0)
    product = emitter.text.op("mul", [a, b, emitter.text.number(0, "int8")], shape_of(node.outputs[0]), "int32")
    requantized(emitter, node, product, op, 2)


def _operands(emitter: Emitter, node: ir.Node, zero_points: Sequence[int], exponent: int) -> list[Tensor]:
    """Both inputs of a binary operator without zero points, times 2^exponent, int32, in the output's rank."""
    rank = len(shape_of(node.outputs[0]))
    made: list[Tensor] = []
    for index, zero_point in enumerate(zero_points):
        value = data_input(node, index)
        shape = shape_of(value)
        source = emitter.text.reshape(emitter.of(value), ((1,) * (rank - len(shape)) + shape))
        signed = signed_zero_point(value, zero_point)
        made.append(emitter.text.rescale(source, power_of_two(exponent), "int32", x_zero_point=signed))
    return made


def emit_requantize(emitter: Emitter, node: ir.Node) -> None:
    op = ops.QRequantize.of(node)
    x, y = data_input(node), node.outputs[0]
    scale = scale_of(node, *factors_of(node, 1), op.requantize)
    scaled = emitter.text.rescale(
        emitter.of(x),
        scale,
        "int8",
        x_zero_point=signed_zero_point(x, op.x_zero_point),
        y_zero_point=signed_zero_point(y, op.y_zero_point),
    )
    emitter.finish(node, scaled, (op.clamp_min, op.clamp_max))


def emit_clip(emitter: Emitter, node: ir.Node) -> None:
    limits = np.iinfo(dtype_of(node.outputs[0]))
    low, high = const_of(input_of(node, 1)), const_of(input_of(node, 2))
    clamp = (int(limits.min) if low is None else int(low), int(limits.max) if high is None else int(high))
    emitter.finish(node, emitter.of(data_input(node)), (min(clamp), clamp[1]))


def emit_lookup(emitter: Emitter, node: ir.Node) -> None:
    table, y = const_of(data_input(node, 1)), node.outputs[0]
    assert table is not None
    entries = emitter.text.constant(table.astype(np.int16) - offset_of(y), "int8")
    emitter.store(y, emitter.text.op("table", [emitter.of(data_input(node)), entries], shape_of(y), "int8"))


def emit_softmax(emitter: Emitter, node: ir.Node) -> None:
    op, table = ops.QSoftmax.of(node), const_of(data_input(node, 1))
    assert table is not None
    if op.inverse_scale != ops.TFLITE_SOFTMAX:
        raise refusal(node, "it divides 64-bit integers")
    zero_point = signed_zero_point(node.outputs[0], op.y_zero_point)
    made = softmax(emitter.text, emitter.of(data_input(node)), table, zero_point)
    emitter.finish(node, made, (op.clamp_min, op.clamp_max))
