"""Gather with regular constant indices is a Slice."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, data_input, integer, shape_of
from qcompiler.passes.rewriting import Rewrite, until_settled


class NormalizeGather(ir.passes.InPlacePass):
    """Gather by a constant scalar or a constant arithmetic progression becomes Slice, and Reshape where ranks differ.

    Other indices, and data that is constant itself (an embedding), stay Gather.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("Gather",), _slice)


def _slice(node: ir.Node) -> bool:
    data, indices = data_input(node), const_of(data_input(node, 1))
    if indices is None or indices.size == 0 or const_of(data) is not None:
        return False
    shape = shape_of(data)
    axis = integer(node, "axis", 0) % len(shape)
    # Negative indices count from the end.
    wanted = indices.astype(np.int64).ravel() % shape[axis]
    step = int(wanted[1] - wanted[0]) if wanted.size > 1 else 1
    if step <= 0 or not np.array_equal(wanted, wanted[0] + step * np.arange(wanted.size)):
        return False
    rewrite = Rewrite(node)
    bounds = [rewrite.dims([number]) for number in (wanted[0], wanted[-1] + 1, axis, step)]
    sliced = rewrite.node("Slice", [data, *bounds], layer=node)
    return rewrite.replace(rewrite.reshape(sliced, shape_of(node.outputs[0])))
