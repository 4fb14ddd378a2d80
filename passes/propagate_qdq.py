"""Let data movement run on integers: Q/DQ pairs spread through Reshape, Transpose, MaxPool and their like."""

import onnx_ir as ir

from qcompiler.graph import const_of, data_input, graph_of, input_of, is_op, only_user, string, users
from qcompiler.passes.rewriting import until_settled
from qcompiler.quant.operators import MOVEMENT_OPS, inherits_format
from qcompiler.quant.qdq import activation_dequantize, insert_pair, parameters_of, quantize_readers


class PropagateQdq(ir.passes.InPlacePass):
    """DQ → Transpose → …  ⇒  DQ → Transpose → Q → DQ → …,  and  Conv → Transpose → Q  ⇒  Conv → Q → DQ → Transpose → Q.

    Every pair added has the parameters of its neighbour, and the operator only picks among values that are
    quantized already (or, backwards, will be: quantizing is monotone and maps each element by itself), so no result
    changes. Interpolation and padding with anything but zero are left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, MOVEMENT_OPS, lambda node: _forward(node) or _backward(node))


def _only_moves(node: ir.Node) -> bool:
    if not inherits_format(node):
        return False
    if is_op(node, "Resize"):
        return string(node, "mode", "nearest") == "nearest"
    if is_op(node, "Pad") and string(node, "mode", "constant") == "constant":
        fill = const_of(input_of(node, 2))
        return fill is None or not fill.any()
    return True


def _forward(node: ir.Node) -> bool:
    """Quantize what a dequantized tensor was moved into."""
    before = activation_dequantize(data_input(node))
    parameters = parameters_of(before) if before is not None else None
    if parameters is None or not _only_moves(node):
        return False
    changed = False
    for value in node.outputs:
        read = bool(users(value)) or value.is_graph_output()
        if read and not quantize_readers(value) and value.dtype == ir.DataType.FLOAT:
            insert_pair(graph_of(node), value, parameters, users(value), output=True)
            changed = True
    return changed


def _backward(node: ir.Node) -> bool:
    """Quantize before moving what is quantized right after."""
    source = data_input(node)
    after = only_user(node.outputs[0])
    if after is None or len(node.outputs) != 1 or not quantize_readers(node.outputs[0]) or not _only_moves(node):
        return False
    if activation_dequantize(source) is not None or only_user(source) is not node:
        return False
    parameters = parameters_of(after)
    if parameters is None:
        return False
    insert_pair(graph_of(node), source, parameters, [node])
    return True
