"""Compute what depends on constants only."""

from functools import partial

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer._constant_folding import FoldConstantsPass

from qcompiler.graph import add_initializer, const_of, data_input, graph_of, integer, is_op, real, remove_dead, shape_of
from qcompiler.passes.rewriting import Rewrite, bypass, map_weight, until_settled, weight_dequantize

INPUT_LIMIT = 64 << 20
"""Elements; above it a constant operand is left to run time."""
OUTPUT_LIMIT = 16 << 20
"""Elements a folded constant may have, unless it is smaller than what it replaces."""

_MOVES = ("Transpose", "Reshape")


class FoldConstants(ir.passes.InPlacePass):
    """Nodes of constants become constants, by the ONNX reference implementation; shapes are static, so Shape folds too.

    DequantizeLinear stays, since a quantized weight must remain one; QuantizeLinear of a float constant becomes the
    integer constant it is; a Transpose of a dequantized constant, or a Reshape of one dequantized per tensor, moves in
    front of the DequantizeLinear, where it folds. So does a BatchNormalization in training mode of a constant, as
    exporters write weight standardization, if nobody reads its statistics.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        fold = FoldConstantsPass(
            shape_inference=False,
            input_size_limit=INPUT_LIMIT,
            output_size_limit=OUTPUT_LIMIT,
            should_fold=_should_fold,
        )
        modified = False
        while fold(model).modified or until_settled(model, ("BatchNormalization",), _standardize).modified:
            modified = True
        moved = until_settled(model, _MOVES, _move_before_dequantize).modified
        swept = remove_dead(model)
        return ir.passes.PassResult(model, modified=modified or moved or swept)


def _should_fold(node: ir.Node) -> bool:
    return len(node.outputs) == 1 and not is_op(node, "DequantizeLinear", "DynamicQuantizeLinear")


def _standardize(norm: ir.Node) -> bool:
    """Batch normalization by the constant's own mean and variance, those of all axes but the second."""
    x, scale, bias = (const_of(value) for value in norm.inputs[:3])
    unread = all(not output.uses() and not output.is_graph_output() for output in norm.outputs[1:])
    if not integer(norm, "training_mode", 0) or x is None or scale is None or bias is None or not unread:
        return False
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    channels = (1, -1, *(1,) * (x.ndim - 2))
    wide = x.astype(np.float64)
    deviation = np.sqrt(wide.var(axes, keepdims=True) + real(norm, "epsilon", 1e-5))
    normal = (wide - wide.mean(axes, keepdims=True)) / deviation * scale.reshape(channels) + bias.reshape(channels)
    return bypass(norm, add_initializer(graph_of(norm), f"{norm.name}_folded", normal.astype(x.dtype)))


def _move_before_dequantize(node: ir.Node) -> bool:
    dequantize = weight_dequantize(data_input(node))
    if dequantize is None:
        return False
    shape = shape_of(node.outputs[0])
    if node.op_type == "Reshape":
        scale = const_of(data_input(dequantize, 1))
        if scale is None or scale.size > 1:
            return False
        rewrite = Rewrite(node)
        moved = map_weight(rewrite, data_input(node), lambda array: array.reshape(shape), lambda axis: axis)
    else:
        perm = node.attributes["perm"].as_ints()
        rewrite = Rewrite(node)
        # A blocked constant moves only by this very function.
        turned = np.transpose if tuple(perm) == tuple(reversed(range(len(perm)))) else partial(np.transpose, axes=perm)
        moved = map_weight(rewrite, data_input(node), turned, list(perm).index)
    return rewrite.replace(moved) if moved is not None else rewrite.abandon()
