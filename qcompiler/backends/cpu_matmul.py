"""The product of two activations on the CPU."""

import onnx_ir as ir

from qcompiler.backends import te, te_arithmetic
from qcompiler.backends.base import HostCode, Kernel, parameters_of, placeholder
from qcompiler.backends.cpu_elementwise import constant_input, variant
from qcompiler.backends.schedules.loops import schedule_matmul
from qcompiler.backends.te import Expr
from qcompiler.graph import data_input, dtype_of, element_count, shape_of
from qcompiler.integer.ops import QMatMul


def matmul(node: ir.Node, host: HostCode) -> Kernel:
    op = QMatMul.of(node)
    a_value, b_value = data_input(node), data_input(node, 1)
    a_shape, b_shape, out = shape_of(a_value), shape_of(b_value), shape_of(node.outputs[0])
    dtype, limits = str(dtype_of(node.outputs[0])), (op.clamp_min, op.clamp_max)
    arrays = [constant_input(node, 2), constant_input(node, 3)]
    multiplier, shift = parameters_of(arrays)
    a, b = placeholder(a_value), placeholder(b_value)
    k = te.reduce_axis(a_shape[-1], "k")
    batch = out[:-2]

    def product(*index: Expr) -> Expr:
        *outer, row, column = index
        left = a[(*batch_index(outer, a_shape[:-2]), row, k)].astype("int32") - op.a_zero_point
        right = b[(*batch_index(outer, b_shape[:-2]), k, column)].astype("int32") - op.b_zero_point
        return te.reduce_sum(left * right, axis=[k])

    shape = (*batch, a_shape[-2], b_shape[-1])
    assert element_count(shape) == element_count(out)
    accumulator = te.compute(shape, product, "accumulator")
    output = te.compute(
        shape,
        lambda *index: te_arithmetic.requantize(
            accumulator[index], multiplier[0], shift[0], variant(op.requantize), op.y_zero_point, limits, dtype
        ),
        "output",
    )
    function = te.prim_func([a, b, multiplier, shift, output])
    return Kernel(schedule_matmul(function, host), (a_value, b_value), tuple(arrays))


def batch_index(outer: list[Expr], shape: tuple[int, ...]) -> tuple[Expr | int, ...]:
    """Indices into an operand's batch dimensions, broadcast as numpy does."""
    own = outer[len(outer) - len(shape) :]
    return tuple(0 if dim == 1 else position for position, dim in zip(own, shape, strict=True))
