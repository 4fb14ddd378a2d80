"""Global pools and spatial means become AveragePool and MaxPool with explicit windows."""

import onnx_ir as ir

from qcompiler.graph import const_of, data_input, input_of, integer, ints, shape_of
from qcompiler.passes.rewriting import Rewrite, is_float, until_settled

_POOL_OF = {
    "GlobalAveragePool": "AveragePool",
    "ReduceMean": "AveragePool",
    "GlobalMaxPool": "MaxPool",
    "ReduceMax": "MaxPool",
}


class NormalizePool(ir.passes.InPlacePass):
    """GlobalAveragePool, GlobalMaxPool, and ReduceMean and ReduceMax over axes behind the first two => a pool of the
    full size there, and a Reshape where the axes go away. [N, C, W] counts as [N, C, 1, W]. ceil_mode becomes padding
    at the end, where that is the same.

    Means over the batch or the channels, and of tensors that are no feature maps (rank 3 or 4), stay ReduceMean.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        op_types = (*_POOL_OF, "AveragePool", "MaxPool")
        return until_settled(model, op_types, lambda node: _pool(node) if node.op_type in _POOL_OF else _floor(node))


def _pool(node: ir.Node) -> bool:
    x = data_input(node)
    shape = shape_of(x)
    rank = len(shape)
    axes = tuple(range(2, rank)) if node.op_type.startswith("Global") else _reduced_axes(node, rank)
    if rank not in (3, 4) or not is_float(x) or not axes or min(axes) < 2:
        return False
    window = tuple(shape[axis] if axis in axes else 1 for axis in range(2, rank))
    rewrite = Rewrite(node)
    if rank == 3:
        x, window = rewrite.reshape(x, (*shape[:2], 1, shape[2])), (1, *window)
    pooled = rewrite.node(_POOL_OF[node.op_type], [x], {"kernel_shape": window, "strides": window}, layer=node)
    return rewrite.replace(rewrite.reshape(pooled, shape_of(node.outputs[0])))


def _reduced_axes(node: ir.Node, rank: int) -> tuple[int, ...]:
    """Sorted axes under the reduction; none if they are not known."""
    operand = input_of(node, 1)
    constant = const_of(operand)
    if operand is not None and constant is None:
        return ()
    axes = ints(node, "axes", ()) if constant is None else tuple(int(axis) for axis in constant)
    if not axes:
        return () if integer(node, "noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(axis % rank for axis in axes))


def _floor(node: ir.Node) -> bool:
    """ceil_mode 1 => 0, with the overhang as padding at the end."""
    if not integer(node, "ceil_mode", 0) or len(node.outputs) > 1 or "auto_pad" in node.attributes:
        return False
    spatial = len(shape_of(data_input(node))) - 2
    sizes, outs = shape_of(data_input(node))[2:], shape_of(node.outputs[0])[2:]
    kernel, strides = ints(node, "kernel_shape"), ints(node, "strides", (1,) * spatial)
    dilations, pads = ints(node, "dilations", (1,) * spatial), list(ints(node, "pads", (0,) * 2 * spatial))
    overhang = False
    for axis in range(spatial):
        extent = (kernel[axis] - 1) * dilations[axis] + 1
        missing = (outs[axis] - 1) * strides[axis] + extent - (sizes[axis] + pads[axis] + pads[spatial + axis])
        if missing > 0:
            pads[spatial + axis] += missing
            overhang = True
        if pads[spatial + axis] >= kernel[axis]:
            return False
    # What hangs over is never counted; explicit padding would be.
    if overhang and node.op_type == "AveragePool" and integer(node, "count_include_pad", 0):
        return False
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes |= {"ceil_mode": 0, "pads": tuple(pads)}
    rewrite = Rewrite(node)
    return rewrite.replace(rewrite.node(node.op_type, [data_input(node)], attributes, layer=node))
