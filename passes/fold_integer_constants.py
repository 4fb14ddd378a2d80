"""Compute what an integer graph makes of constants alone."""

import onnx_ir as ir

from qcompiler.graph import add_initializer, const_of, graph_of, remove_dead
from qcompiler.integer.reference import Executor


class FoldIntegerConstants(ir.passes.InPlacePass):
    """Nodes that read constants only become constants, executed by the integer reference.

    Integer operators, data movement and float fallbacks alike; DequantizeLinear of a weight too, since what still reads
    one at this stage computes in float. A node whose result is a graph output stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        executor = Executor(model)
        # In order, so that one walk folds whole chains.
        folded = [_fold(node, executor) for node in list(model.graph)]
        swept = remove_dead(model)
        return ir.passes.PassResult(model, modified=any(folded) or swept)


def _fold(node: ir.Node, executor: Executor) -> bool:
    inputs = [const_of(value) for value in node.inputs]
    known = [array is not None or value is None for array, value in zip(inputs, node.inputs, strict=True)]
    if not node.inputs or not all(known) or any(value.is_graph_output() for value in node.outputs):
        return False
    graph = graph_of(node)
    for output, array in zip(node.outputs, executor.run_node(node, inputs), strict=True):
        constant = add_initializer(graph, f"{output.name}.folded", array)
        constant.metadata_props.update(output.metadata_props)
        ir.convenience.replace_all_uses_with(output, constant)
    graph.remove(node, safe=True)
    return True
