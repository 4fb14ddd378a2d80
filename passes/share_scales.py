"""Give the operators that need it one scale and zero point on all their tensors."""

import onnx_ir as ir

from qcompiler.graph import const_of, data_input, element_count, graph_of, is_op, only_user, shape_of
from qcompiler.passes.rewriting import until_settled
from qcompiler.quant.qdq import Parameters, activation_dequantize, insert_pair, parameters_of, quantize_readers
from qcompiler.target import Target


class ShareScales(ir.passes.InPlacePass):
    """Requantize (DQ → Q) around the target's `shared_scale` operators until their tensors share one format.

    Concat: each input is brought to the format of the output, which changes no result, as joining and rounding commute.
    Others: the operator works in its input's format and what it makes is requantized, or the other way round where
    that is less data. Constants and tensors without per-tensor parameters are left alone.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.op_types = target.quantization.shared_scale

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, self.op_types, lambda node: _join(node) if is_op(node, "Concat") else _align(node))


def _output_parameters(node: ir.Node) -> Parameters | None:
    """The format of what a node makes, if a QuantizeLinear is all that reads it."""
    reader = only_user(node.outputs[0])
    if reader is None or len(node.outputs) != 1 or not quantize_readers(node.outputs[0]):
        return None
    return parameters_of(reader)


def _join(node: ir.Node) -> bool:
    wanted = _output_parameters(node)
    if wanted is None:
        return False
    changed = False
    for value in dict.fromkeys(value for value in node.inputs if value is not None):
        dequantize = activation_dequantize(value)
        given = parameters_of(dequantize) if dequantize is not None else None
        runtime = const_of(value) is None and not is_op(value.producer(), "DequantizeLinear")
        if runtime or (given is not None and not given.same(wanted)):
            insert_pair(graph_of(node), value, wanted, [node])
            changed = True
    return changed


def _align(node: ir.Node) -> bool:
    dequantize = activation_dequantize(data_input(node))
    given = parameters_of(dequantize) if dequantize is not None else None
    wanted = _output_parameters(node)
    if given is None or wanted is None or given.same(wanted):
        return False
    source, made = data_input(node), node.outputs[0]
    if element_count(shape_of(source)) < element_count(shape_of(made)):
        insert_pair(graph_of(node), source, wanted, [node])
    else:
        insert_pair(graph_of(node), made, given, quantize_readers(made))
    return True
