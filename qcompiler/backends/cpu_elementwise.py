"""Integer operators that work element by element, and the quantizing borders."""

import numpy as np
import onnx_ir as ir

from qcompiler.backends import te, te_arithmetic
from qcompiler.backends.base import HostCode, Kernel, parameters_of, placeholder
from qcompiler.backends.elementwise import Formula, elementwise
from qcompiler.backends.te import Expr
from qcompiler.graph import const_of, data_input, dtype_of, element_count, input_of, integer, shape_of
from qcompiler.integer.ops import TFLITE_SOFTMAX, QAdd, QLookup, QMul, QRequantize, QRoundHalf, QSoftmax
from qcompiler.quant.arithmetic import RequantizeVariant


def constant_input(node: ir.Node, index: int) -> np.ndarray:
    array = const_of(data_input(node, index))
    assert array is not None, f"{node.op_type} {node.name}: input {index} is not constant"
    return array


def add(node: ir.Node, host: HostCode) -> Kernel:
    formula = add_formula(node)
    return elementwise(formula.operands, node.outputs[0], formula.expression, host)


def add_formula(node: ir.Node) -> Formula:
    op = QAdd.of(node)
    dtype, limits = str(dtype_of(node.outputs[0])), (op.clamp_min, op.clamp_max)
    factors = (op.multiplier_a, op.shift_a, op.multiplier_b, op.shift_b, op.multiplier_y, op.shift_y)
    bits = 8 * dtype_of(data_input(node)).itemsize

    def expression(a: Expr, b: Expr) -> Expr:
        left, right = a.astype("int32") - op.a_zero_point, b.astype("int32") - op.b_zero_point
        total = te_arithmetic.add(left, right, factors, variant(op.requantize), subtract=bool(op.subtract), bits=bits)
        return te_arithmetic.saturate(total, op.y_zero_point, limits, dtype)

    return Formula([data_input(node), data_input(node, 1)], expression)


def multiply(node: ir.Node, host: HostCode) -> Kernel:
    formula = multiply_formula(node)
    return elementwise(formula.operands, node.outputs[0], formula.expression, host)


def multiply_formula(node: ir.Node) -> Formula:
    op = QMul.of(node)
    dtype, limits = str(dtype_of(node.outputs[0])), (op.clamp_min, op.clamp_max)

    def expression(a: Expr, b: Expr, multiplier: Expr, shift: Expr) -> Expr:
        product = (a.astype("int32") - op.a_zero_point) * (b.astype("int32") - op.b_zero_point)
        return te_arithmetic.requantize(
            product, multiplier, shift, variant(op.requantize), op.y_zero_point, limits, dtype
        )

    operands = [data_input(node), data_input(node, 1), constant_input(node, 2), constant_input(node, 3)]
    return Formula(operands, expression)


def requantize(node: ir.Node, host: HostCode) -> Kernel:
    formula = requantize_formula(node)
    return elementwise(formula.operands, node.outputs[0], formula.expression, host)


def requantize_formula(node: ir.Node) -> Formula:
    op = QRequantize.of(node)
    dtype, limits = str(dtype_of(node.outputs[0])), (op.clamp_min, op.clamp_max)

    def expression(x: Expr, multiplier: Expr, shift: Expr) -> Expr:
        difference = x.astype("int32") - op.x_zero_point
        return te_arithmetic.requantize(
            difference, multiplier, shift, variant(op.requantize), op.y_zero_point, limits, dtype
        )

    return Formula([data_input(node), constant_input(node, 1), constant_input(node, 2)], expression)


def lookup(node: ir.Node, host: HostCode) -> Kernel:
    QLookup.of(node)
    if dtype_of(data_input(node)) == np.int16:
        return elementwise(
            [data_input(node)],
            node.outputs[0],
            lambda x, table: te_arithmetic.interpolate(x.astype("int32"), table).astype("int16"),
            host,
            tables=[constant_input(node, 1)],
        )
    lowest = -128 if dtype_of(data_input(node)) == np.int8 else 0
    return elementwise(
        [data_input(node)],
        node.outputs[0],
        lambda x, table: table[x.astype("int32") - lowest],
        host,
        tables=[constant_input(node, 1)],
    )


def softmax(node: ir.Node, host: HostCode) -> Kernel:
    op = QSoftmax.of(node)
    shape, table = shape_of(data_input(node)), constant_input(node, 1)
    x = placeholder(data_input(node), (element_count(shape[:-1]), shape[-1]))
    (entries,) = parameters_of([table])
    limits, dtype = (op.clamp_min, op.clamp_max), str(dtype_of(node.outputs[0]))
    if dtype_of(data_input(node)) == np.int16:
        y = te_arithmetic.softmax_int16(x, entries, limits)
    elif op.inverse_scale == TFLITE_SOFTMAX:
        y = te_arithmetic.tflite_softmax(x, entries, op.y_zero_point, limits, dtype)
    else:
        y = te_arithmetic.softmax(x, entries, op.inverse_scale, op.y_zero_point, limits, dtype)
    return Kernel(te.prim_func([x, entries, y]), (data_input(node),), (table,))


def round_half(node: ir.Node, host: HostCode) -> Kernel:
    half = QRoundHalf.of(node).half
    return elementwise(
        [data_input(node)],
        node.outputs[0],
        te_arithmetic.to_float16 if half == "float16" else te_arithmetic.to_bfloat16,
        host,
    )


def quantize_linear(node: ir.Node, host: HostCode) -> Kernel:
    formula = quantize_formula(node)
    return elementwise(formula.operands, node.outputs[0], formula.expression, host)


def quantize_formula(node: ir.Node) -> Formula:
    scale, zero_point = _affine(node)
    dtype = str(dtype_of(node.outputs[0]))
    return Formula(
        [data_input(node), scale, zero_point],
        lambda x, s, z: te_arithmetic.quantize(x.astype("float32"), s, z, dtype),
    )


def dequantize_linear(node: ir.Node, host: HostCode) -> Kernel:
    formula = dequantize_formula(node)
    return elementwise(formula.operands, node.outputs[0], formula.expression, host)


def dequantize_formula(node: ir.Node) -> Formula:
    dtype = str(dtype_of(node.outputs[0]))
    scale, zero_point = data_input(node, 1), input_of(node, 2)
    if const_of(scale) is None or (zero_point is not None and const_of(zero_point) is None):
        absent = np.zeros((), dtype_of(data_input(node)))
        parameters: tuple[ir.Value | np.ndarray, ...] = (scale, absent if zero_point is None else zero_point)
    else:
        parameters = _affine(node)
    return Formula(
        [data_input(node), *parameters],
        lambda q, s, z: te_arithmetic.dequantize(q, s, z.astype("int32")).astype(dtype),
    )


def is_affine(node: ir.Node) -> bool:
    """Whether scale and zero point of a DequantizeLinear are constants, or single numbers."""
    parameters = (data_input(node, 1), input_of(node, 2))
    return all(value is None or const_of(value) is not None for value in parameters) or all(
        value is None or element_count(shape_of(value)) == 1 for value in parameters
    )


def _affine(node: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero point (int32) of a Q or DQ node, shaped to broadcast along its axis."""
    assert integer(node, "block_size", 0) == 0, f"{node.name}: blocked quantization"
    rank, axis = len(shape_of(data_input(node))), integer(node, "axis", 1)
    scale = constant_input(node, 1).astype(np.float32)
    zero_point = const_of(input_of(node, 2))
    zero_point = np.zeros(scale.shape, np.int32) if zero_point is None else zero_point.astype(np.int32)
    if scale.size == 1:
        return scale.reshape(1), zero_point.reshape(1)
    along = [1] * rank
    along[axis] = scale.size
    return scale.reshape(along), zero_point.reshape(along)


def variant(name: str) -> RequantizeVariant:
    """The requantize attribute of an integer operator, typed."""
    match name:
        case "float32" | "tflite" | "tosa" | "shift":
            return name
    raise AssertionError(f"{name} is no requantize variant")
