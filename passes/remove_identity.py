"""Remove operators that hand their input through."""

import onnx_ir as ir

from qcompiler.graph import const_of, data_input, input_of, ints, shape_of
from qcompiler.passes.rewriting import bypass, constant_operand, until_settled

_OP_TYPES = (
    "Identity", "Dropout", "Reshape", "Transpose", "Cast", "Pad", "Slice", "Concat", "Expand", "AveragePool",
    "MaxPool", "Sum", "Mean", "Max", "Min", "Split", "Tile", "Add", "Sub", "Mul", "Div",
)  # fmt: skip


class RemoveIdentity(ir.passes.InPlacePass):
    """Identity, inference-time Dropout, and whatever does nothing here: a Reshape to the same shape, a Transpose in
    order, a Cast to the same type, Pad by nothing, Slice of everything, Concat of one, 1x1 pools, + 0, * 1.

    One stays where the graph would be left with an output that is an input or a constant.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, _OP_TYPES, _remove)


def _remove(node: ir.Node) -> bool:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return False
    source = _source(node)
    return source is not None and bypass(node, source)


def _source(node: ir.Node) -> ir.Value | None:
    """The operand the first output always equals, or None."""
    value, output = data_input(node), node.outputs[0]
    if node.op_type == "Identity":
        return value
    if value.dtype != output.dtype:
        return None
    if node.op_type in ("Add", "Sub", "Mul", "Div"):
        return _neutral(node)
    if shape_of(value) != shape_of(output):
        return None
    rank = len(shape_of(value))
    match node.op_type:
        case "Reshape" | "Cast" | "Expand" | "Tile":
            return value
        case "Dropout":
            training = input_of(node, 2)
            flag = const_of(training)
            return value if training is None or (flag is not None and not flag.any()) else None
        case "Transpose":
            in_order = ints(node, "perm", tuple(reversed(range(rank)))) == tuple(range(rank))
            return value if in_order else None
        case "Pad":
            # Cropping one side and padding the other also keeps the shape.
            pads = const_of(input_of(node, 1))
            return value if pads is not None and not pads.any() else None
        case "Slice":
            # Same shape with all steps 1 is everything; step -1 reverses.
            steps = const_of(input_of(node, 4))
            forward = input_of(node, 4) is None or (steps is not None and bool((steps == 1).all()))
            return value if forward else None
        case "Concat" | "Sum" | "Mean" | "Max" | "Min":
            return value if len(node.inputs) == 1 else None
        case "Split":
            return value if len(node.outputs) == 1 else None
        case _:
            spatial = rank - 2
            alone = (
                set(ints(node, "kernel_shape")) == {1}
                and set(ints(node, "strides", (1,) * spatial)) == {1}
                and not any(ints(node, "pads", (0,) * 2 * spatial))
            )
            return value if alone else None


def _neutral(node: ir.Node) -> ir.Value | None:
    """The operand of x + 0, x - 0, x * 1, x / 1 whose shape the constant does not change."""
    operands = constant_operand(node)
    if operands is None:
        return None
    value, constant, index = operands
    if shape_of(value) != shape_of(node.outputs[0]) or (index == 0 and node.op_type in ("Sub", "Div")):
        return None
    return value if bool((constant == (0 if node.op_type in ("Add", "Sub") else 1)).all()) else None
