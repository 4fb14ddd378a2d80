"""Integer weights without their zero point, where the target multiplies by symmetric weights only."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import add_initializer, const_of, data_input, graph_of, integer, is_op, remove_dead
from qcompiler.passes.legality import admits, facts_for, refused
from qcompiler.passes.rewriting import weight_dequantize
from qcompiler.target import WEIGHTED_OPS, Target

_INT8 = np.iinfo(np.int8)


class CenterWeights(ir.passes.InPlacePass):
    """DQ(w, scale, z) of constant 8-bit weights => DQ(w - z, scale, 0) in int8, where every w - z is an int8: exactly.

    Nothing changes unless an accelerator takes the product then and none does before. Weights that use all 256 codes
    around a zero point other than the middle do not fit, and stay: the sum of inputs that a correction would take is
    nothing our accelerators compute beside a product.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            dequantize = weight_dequantize(node.inputs[1]) if is_op(node, *WEIGHTED_OPS) else None
            if dequantize is not None and self._wants_symmetric(node):
                modified |= _center(dequantize)
        if modified:
            remove_dead(model)
        return ir.passes.PassResult(model, modified=modified)

    def _wants_symmetric(self, node: ir.Node) -> bool:
        """Whether the product is refused as it is, and taken with symmetric weights."""
        return refused(self.target, node) and admits(
            self.target, facts_for(self.target, node), {"symmetric_weights": True}
        )


def _center(dequantize: ir.Node) -> bool:
    """Move the zero point into the weights, if they stay int8."""
    weights, zero_point = (const_of(data_input(dequantize, index)) for index in (0, -1))
    assert weights is not None and zero_point is not None
    blocked = integer(dequantize, "block_size", 0)
    if len(dequantize.inputs) < 3 or weights.dtype.itemsize != 1 or blocked or not zero_point.any():
        return False
    along = [1] * weights.ndim
    if zero_point.size > 1:
        along[integer(dequantize, "axis", 1)] = -1
    centered = weights.astype(np.int16) - zero_point.astype(np.int16).reshape(along)
    if centered.min() < _INT8.min or centered.max() > _INT8.max:
        return False
    graph, name = graph_of(dequantize), dequantize.name
    dequantize.replace_input_with(0, add_initializer(graph, f"{name}_centered", centered.astype(np.int8)))
    dequantize.replace_input_with(2, add_initializer(graph, f"{name}_center", np.zeros(zero_point.shape, np.int8)))
    return True
