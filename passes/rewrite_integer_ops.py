"""Rewrite ConvInteger and MatMulInteger as a float operator between DequantizeLinear with scale 1."""

import numpy as np
import onnx_ir as ir

from qcompiler import graph as g
from qcompiler.errors import QCompilerError
from qcompiler.passes.rewrite_qlinear import FLOAT, QdqBuilder

_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def _centred(b: QdqBuilder, index: int, zero_point: int, axis: int) -> ir.Value:
    """float32(input - zero point). The zero point may come from a DynamicQuantizeLinear; then it is a scalar."""
    value, zero = g.data_input(b.node, index), g.input_of(b.node, zero_point)
    constant = g.const_of(zero)
    if zero is None or constant is not None:
        shape = () if constant is None or constant.size == 1 else constant.shape
        if len(shape) > 1:
            raise QCompilerError(
                f"node {b.node.name!r} ({b.node.op_type}) has zero points of shape {shape} for {value.name!r}; "
                "only one, or one per row or column, can be compiled"
            )
        zero_array = None if constant is None else constant.reshape(shape)
        return b.dequantize_value(value, np.ones(shape, np.float32), zero_array, axis)
    # Shapes may not be inferred yet; DynamicQuantizeLinear, where such zero points come from, makes scalars.
    if zero.shape is not None and len(zero.shape) > 0:
        raise QCompilerError(
            f"node {b.node.name!r} ({b.node.op_type}) computes several zero points {zero.name!r} at run time; "
            "only a single one can be compiled"
        )
    return b.emit("DequantizeLinear", [value, b.constant("one", np.ones((), np.float32)), zero], FLOAT)


def _rewrite(node: ir.Node) -> None:
    b = QdqBuilder(node)
    if node.op_type == "ConvInteger":
        attributes = {name: node.attributes[name].value for name in _CONV if name in node.attributes}
        y = b.emit("Conv", [_centred(b, 0, 2, 1), _centred(b, 1, 3, 0)], FLOAT, attributes)
    else:
        y = b.emit("MatMul", [_centred(b, 0, 2, -2), _centred(b, 1, 3, -1)], FLOAT)
    result = node.outputs[0]
    readers = g.users(result)
    floats = [
        reader for reader in readers if g.is_op(reader, "Cast") and g.integer(reader, "to") == ir.DataType.FLOAT.value
    ]
    # Dynamic quantization follows with Cast to float and Mul by the scales: keep that chain in float.
    whole = len(floats) < len(readers) or result.is_graph_output()
    integer = b.emit("Cast", [y], ir.DataType.INT32, {"to": ir.DataType.INT32.value}) if whole else y
    b.finish(integer)
    y.type = ir.TensorType(FLOAT)  # also where y took over the int32 result's place
    for cast in floats:
        if not any(out.is_graph_output() for out in cast.outputs):
            ir.convenience.replace_all_uses_with(cast.outputs[0], y)
            g.graph_of(cast).remove(cast, safe=True)


class RewriteIntegerOps(ir.passes.InPlacePass):
    """ConvInteger, MatMulInteger  ⇒  DequantizeLinear(scale 1) → Conv, MatMul → Cast to int32.

    The Cast goes where only Casts to float read the result, as in dynamically quantized models. Exact while
    sums stay below 2^24 in magnitude, which 8-bit operands cannot leave within 258 products of at most 65025;
    beyond that a float32 sum may be off in its last bit.

    Raises:
        QCompilerError: zero points that are neither constant nor a run-time scalar.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = g.nodes_of(model.graph, "ConvInteger", "MatMulInteger")
        for node in nodes:
            _rewrite(node)
        if nodes:
            g.remove_dead(model)
        return ir.passes.PassResult(model, modified=bool(nodes))
