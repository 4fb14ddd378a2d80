"""One way to change a shape: Reshape with the static shape spelt out."""

import onnx_ir as ir

from qcompiler.graph import const_of, data_input, ints, is_op, producer, shape_of
from qcompiler.passes.rewriting import Rewrite, next_in_chain, until_settled

UNARY = (
    "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "Elu", "Selu", "Erf", "Exp",
    "Log", "Sqrt", "Abs", "Neg", "Softplus", "Mish", "Softsign", "Celu", "Reciprocal", "Floor", "Ceil", "Round",
    "Sign", "Not", "Cast", "QuantizeLinear", "DequantizeLinear",
)  # fmt: skip
"""Operators that treat every element alike (Q and DQ only where `is_elementwise` says so)."""

_AFTER = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MaxPool", "AveragePool")


class NormalizeReshape(ir.passes.InPlacePass):
    """Flatten, Squeeze and Unsqueeze become Reshape; a Reshape of a Reshape reads the first one's input.

    A Transpose that only moves axes of size 1 counts as a Reshape where one stands beside it. A Reshape behind a
    convolution or product sinks below the activations that follow, so that those can still fuse; likewise below
    operators that stand between it and another Reshape.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        op_types = ("Flatten", "Squeeze", "Unsqueeze", "Reshape", "Transpose")
        return until_settled(model, op_types, lambda node: _canonical(node) or _merge(node) or _sink(node))


def is_elementwise(node: ir.Node) -> bool:
    """A unary operator that treats every element alike: any shape in, the same shape out."""
    if not is_op(node, *UNARY):
        return False
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return all(value is None or shape_of(value) in ((), (1,)) for value in node.inputs[1:])
    return True


def keeps_order(node: ir.Node) -> bool:
    """Whether a Transpose leaves the elements in memory where they are: only axes of size 1 move."""
    shape = shape_of(data_input(node))
    moved = [axis for axis in ints(node, "perm", tuple(reversed(range(len(shape))))) if shape[axis] != 1]
    return moved == sorted(moved)


def _canonical(node: ir.Node) -> bool:
    shape = shape_of(node.outputs[0])
    if node.op_type == "Transpose" or 0 in shape:
        return False
    if node.op_type == "Reshape":
        wanted = const_of(data_input(node, 1))
        if wanted is not None and tuple(wanted) == shape and "allowzero" not in node.attributes:
            return False
    rewrite = Rewrite(node)
    return rewrite.replace(rewrite.node("Reshape", [data_input(node), rewrite.dims(shape)], layer=node))


def _is_reshape(node: ir.Node | None) -> bool:
    return node is not None and (node.op_type == "Reshape" or keeps_order(node))


def _merge(node: ir.Node) -> bool:
    """Reshape(Reshape(x)) => Reshape(x), where either may be an order-keeping Transpose."""
    first = producer(data_input(node), "Reshape", "Transpose")
    if first is None or not _is_reshape(first) or not _is_reshape(node) or node.op_type == first.op_type == "Transpose":
        return False
    rewrite = Rewrite(node)
    shape = rewrite.dims(shape_of(node.outputs[0]))
    return rewrite.replace(rewrite.node("Reshape", [data_input(first), shape], layer=node))


def _sink(node: ir.Node) -> bool:
    """Reshape, f => f, Reshape, if what made the input can absorb f or another Reshape follows."""
    if node.op_type != "Reshape":
        return False
    reader = next_in_chain(node.outputs[0], *UNARY)
    if reader is None or not is_elementwise(reader) or data_input(reader) is not node.outputs[0]:
        return False
    # Past a DequantizeLinear a Reshape of integers would become one of floats, for nothing.
    gains = reader.op_type != "DequantizeLinear" and _leads_back_to_product(data_input(node))
    if not gains and next_in_chain(reader.outputs[0], "Reshape") is None:
        return False
    rewrite = Rewrite(reader)
    moved = rewrite.node(reader.op_type, [data_input(node), *reader.inputs[1:]], _attributes(reader), layer=reader)
    return rewrite.replace(rewrite.node("Reshape", [moved, rewrite.dims(shape_of(node.outputs[0]))]))


def _leads_back_to_product(value: ir.Value) -> bool:
    """Whether only elementwise operators lie between `value` and a convolution or product."""
    node = value.producer()
    while node is not None and is_elementwise(node):
        value = data_input(node)
        node = value.producer()
    return producer(value, *_AFTER) is not None


def _attributes(node: ir.Node) -> dict[str, int | float | str | tuple[int, ...]]:
    return {name: attribute.value for name, attribute in node.attributes.items()}
