"""The inputs of LSTM, GRU and RNN are multiplied before the recurrence, all time steps at once."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, data_input, input_of, shape_of
from qcompiler.passes.rewriting import Rewrite, is_weight, map_weight, until_settled
from qcompiler.recurrent import OPS, UnknownCellError, attributes_of, cells_of, hidden_size, is_projected


class ProjectRecurrent(ir.passes.InPlacePass):
    """LSTM(x, W, R, b) => LSTM(Gemm(x, W, b), I, R), likewise GRU and RNN of one direction.

    The Gemm is a layer like any other: it is quantized, and accelerators run it. The operator that is left has the
    identity I [gates * hidden, gates * hidden] for weights, and so is the recurrence alone, in plain ONNX: every
    runtime computes the same as before. Both biases go into the Gemm, but for that part of GRU's recurrent bias which
    `linear_before_reset` multiplies.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, OPS, _project)


def _project(node: ir.Node) -> bool:
    x, weights, bias = data_input(node), data_input(node, 1), input_of(node, 3)
    try:
        cells = cells_of(node)
    except UnknownCellError:
        return False
    constants = is_weight(weights) and (bias is None or const_of(bias) is not None)
    if len(cells) != 1 or not constants or is_projected(node):
        return False
    cell, hidden, (steps, batch, width) = cells[0], hidden_size(node), shape_of(x)
    rows = cell.gates * hidden
    rewrite = Rewrite(node)
    matrix = map_weight(rewrite, weights, lambda array: array[0], lambda axis: axis - 1)
    if matrix is None:  # scales in blocks
        return rewrite.abandon()
    operands, inside = [rewrite.reshape(x, (steps * batch, width)), matrix], None
    if (given := const_of(bias)) is not None:
        before, kept = given[0, :rows] + given[0, rows:], np.zeros_like(given)
        if cell.linear_before_reset:
            before[-hidden:] = given[0, rows - hidden : rows]
            kept[0, -hidden:] = given[0, -hidden:]
            inside = rewrite.constant(kept, f"{node.name}_bias")
        operands.append(rewrite.constant(before, f"{node.name}_input_bias"))
    product = rewrite.node("Gemm", operands, {"transB": 1}, hint="input")
    identity = rewrite.constant(np.eye(rows, dtype=np.float32)[None], f"{node.name}_identity")
    inputs = [rewrite.reshape(product, (steps, batch, rows)), identity, data_input(node, 2), inside, *node.inputs[4:]]
    made = rewrite.nodes(
        node.op_type, inputs, attributes_of(cell, hidden), outputs=len(node.outputs), layer=node, hint="state"
    )
    return rewrite.replace(*made)
