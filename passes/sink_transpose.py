"""How a Transpose passes an operator: the operator's axes renamed, its constant operands permuted.

With y = Transpose(x, perm), axis k of y is axis perm[k] of x.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    QCOMPILER_DOMAIN,
    add_initializer,
    const_of,
    data_input,
    graph_of,
    input_of,
    integer,
    ints,
    is_op,
    producer,
    shape_of,
)

Perm = tuple[int, ...]


def identity(perm: Sequence[int]) -> bool:
    return tuple(perm) == tuple(range(len(perm)))


def inverse(perm: Sequence[int]) -> Perm:
    return tuple(int(axis) for axis in np.argsort(perm))


def push_through(node: ir.Node, perm: Perm) -> list[Perm] | None:
    """Let `node` read from before the Transposes in front of it.

    Rewires and renames in place, and gives the outputs their new shapes; the caller puts Transposes behind them.

    Args:
        node: reads at least one Transpose with this perm.
        perm: of the Transposes.

    Returns:
        The perm each output needs to be what it was, or None if the node is left alone.
    """
    if node.domain == QCOMPILER_DOMAIN:
        table = _INTEGER_RULES
    else:
        values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype is not None]
        floats = any(value.dtype is not None and value.dtype.is_floating_point() for value in values)
        table = _FLOAT_RULES if floats else _STANDARD_RULES
    rule = table.get(node.op_type)
    return rule(node, perm) if rule is not None else None


# --- rules --------------------------------------------------------------------------------------------------


def _unary(node: ir.Node, perm: Perm) -> list[Perm] | None:
    """The first input is data; the others do not depend on its axes."""
    _rewire(node, 0)
    return _outputs(node, perm)


def _elementwise(node: ir.Node, perm: Perm) -> list[Perm] | None:
    """Operands under the same Transpose, constants, or of a shape on which the Transpose back is a Reshape."""
    sources = [_source(data_input(node, index), perm) for index in (0, 1)]
    if any(source is None for source in sources):
        return None
    for index in (0, 1):
        _replace_operand(node, index, perm)
    return _outputs(node, perm)


def _concat(node: ir.Node, perm: Perm) -> list[Perm] | None:
    values = [value for value in node.inputs if value is not None]
    if not all(_is_transposed(value, perm) or const_of(value) is not None for value in values):
        return None
    for index in range(len(values)):
        _replace_operand(node, index, perm)
    _rename_axis(node, perm)
    return _outputs(node, perm)


def _split(node: ir.Node, perm: Perm) -> list[Perm] | None:
    _rewire(node, 0)
    node.attributes["axis"] = ir.AttrInt64("axis", perm[integer(node, "axis", 0) % len(perm)])
    return _outputs(node, perm)


def _slice(node: ir.Node, perm: Perm) -> list[Perm] | None:
    starts, axes = const_of(input_of(node, 1)), const_of(input_of(node, 3))
    if starts is None or (input_of(node, 3) is not None and axes is None):
        return None
    axes = np.arange(starts.size) if axes is None else axes
    renamed = np.array([perm[int(axis)] for axis in axes], np.int64)
    _rewire(node, 0)
    _set_input(node, 3, renamed)
    return _outputs(node, perm)


def _pad(node: ir.Node, perm: Perm) -> list[Perm] | None:
    pads, axes, rank = const_of(input_of(node, 1)), const_of(input_of(node, 3)), len(perm)
    if pads is None or (input_of(node, 3) is not None and axes is None):
        return None
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    moved = np.zeros((2, rank), np.int64)
    for position, axis in enumerate(chosen):
        moved[:, perm[axis]] = pads.reshape(2, -1)[:, position]
    _rewire(node, 0)
    _set_input(node, 1, moved.reshape(-1))
    if axes is not None:
        node.replace_input_with(3, None)
    return _outputs(node, perm)


def _gather(node: ir.Node, perm: Perm) -> list[Perm] | None:
    """A single index drops the axis, a vector of them keeps it."""
    indices = data_input(node, 1)
    rank_of_indices = len(shape_of(indices))
    if rank_of_indices > 1 or producer(indices, "Transpose") is not None:
        return None
    axis = integer(node, "axis", 0) % len(perm)
    out = perm if rank_of_indices else _without(perm, (axis,))
    _rewire(node, 0)
    node.attributes["axis"] = ir.AttrInt64("axis", perm[axis])
    return _outputs(node, out)


def _arg_max(node: ir.Node, perm: Perm) -> list[Perm] | None:
    axis = integer(node, "axis", 0) % len(perm)
    out = perm if integer(node, "keepdims", 1) else _without(perm, (axis,))
    _rewire(node, 0)
    node.attributes["axis"] = ir.AttrInt64("axis", perm[axis])
    return _outputs(node, out)


def _reduce_mean(node: ir.Node, perm: Perm) -> list[Perm] | None:
    axes = ints(node, "axes")
    kept = len(shape_of(node.outputs[0])) == len(perm)
    out = perm if kept else _without(perm, axes)
    _rewire(node, 0)
    node.attributes["axes"] = ir.AttrInt64s("axes", sorted(perm[axis] for axis in axes))
    return _outputs(node, out)


def _dynamic_quantize(node: ir.Node, perm: Perm) -> list[Perm] | None:
    """The minimum and the maximum do not depend on the order; scale and zero point have no axes."""
    _rewire(node, 0)
    integers = node.outputs[0]
    shape = shape_of(integers)
    integers.shape = ir.Shape([shape[axis] for axis in inverse(perm)])
    return [perm, (), ()]


def _softmax(node: ir.Node, perm: Perm) -> list[Perm] | None:
    return _unary(node, perm) if perm[-1] == len(perm) - 1 else None


_Rule = Callable[[ir.Node, Perm], list[Perm] | None]
_INTEGER_RULES: Mapping[str, _Rule] = {
    "QLookup": _unary,
    "QRoundHalf": _unary,
    "QRequantize": _unary,
    "QAdd": _elementwise,
    "QMul": _elementwise,
    "QReduceMean": _reduce_mean,
    "QSoftmax": _softmax,
}
_STANDARD_RULES: Mapping[str, _Rule] = {
    "Clip": _unary,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Gather": _gather,
    "ArgMax": _arg_max,
}
_FLOAT_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(("Add", "Sub", "Mul"), _elementwise),
    **dict.fromkeys(("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish"), _unary),
    "Concat": _concat,
    "DynamicQuantizeLinear": _dynamic_quantize,
}
"""What stands between layers with float results: their maps stay NHWC too."""


# --- rewiring -----------------------------------------------------------------------------------------------


def _is_transposed(value: ir.Value, perm: Perm) -> bool:
    made_by = producer(value, "Transpose")
    return made_by is not None and ints(made_by, "perm", ()) == perm


def _source(value: ir.Value, perm: Perm) -> ir.Value | None:
    """Anything that `_replace_operand` can handle, else None."""
    if _is_transposed(value, perm) or const_of(value) is not None:
        return value
    shape = shape_of(value)
    if len(shape) > len(perm):
        return None
    full = (1,) * (len(perm) - len(shape)) + shape
    moved = [axis for axis in inverse(perm) if full[axis] != 1]
    return value if moved == sorted(moved) else None


def _replace_operand(node: ir.Node, index: int, perm: Perm) -> None:
    """Bring one operand of a broadcasting operator into the axes before the Transpose."""
    value, graph = data_input(node, index), graph_of(node)
    if _is_transposed(value, perm):
        _rewire(node, index)
        return
    shape = (1,) * (len(perm) - len(shape_of(value))) + shape_of(value)
    back = inverse(perm)
    constant = const_of(value)
    if constant is not None:
        moved = add_initializer(graph, f"{value.name}.moved", constant.reshape(shape).transpose(back))
        moved.metadata_props.update(value.metadata_props)
        node.replace_input_with(index, moved)
        return
    dims = add_initializer(graph, f"{value.name}.dims", np.array([shape[axis] for axis in back], np.int64))
    reshape = ir.node("Reshape", [value, dims])
    out = reshape.outputs[0]
    out.name, out.shape, out.type = f"{dims.name}.of.{node.name}", ir.Shape([shape[axis] for axis in back]), value.type
    reshape.name = out.name
    graph.insert_before(node, reshape)
    node.replace_input_with(index, out)


def _rewire(node: ir.Node, index: int) -> None:
    """Read what the Transpose reads."""
    transpose = producer(data_input(node, index), "Transpose")
    assert transpose is not None and is_op(transpose, "Transpose")
    node.replace_input_with(index, data_input(transpose))


def _rename_axis(node: ir.Node, perm: Perm) -> None:
    node.attributes["axis"] = ir.AttrInt64("axis", perm[integer(node, "axis") % len(perm)])


def _set_input(node: ir.Node, index: int, array: np.ndarray) -> None:
    value = add_initializer(graph_of(node), f"{node.name}.input{index}", array)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _without(perm: Perm, dropped: Sequence[int]) -> Perm:
    """What remains of a perm when axes of its result go away."""
    kept = [perm[axis] for axis in range(len(perm)) if axis not in dropped]
    return tuple(sorted(kept).index(axis) for axis in kept)


def _outputs(node: ir.Node, perm: Perm) -> list[Perm]:
    """Give the outputs their shapes before the Transpose that will follow."""
    back = inverse(perm)
    for output in node.outputs:
        shape = shape_of(output)
        output.shape = ir.Shape([shape[axis] for axis in back])
    return [perm] * len(node.outputs)
