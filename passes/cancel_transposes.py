"""Cancel Transposes against each other on the NCHW graph."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import Shape, const_of, data_input, element_count, ints, is_op, producer, shape_of
from qcompiler.passes.normalize_reshape import is_elementwise
from qcompiler.passes.rewriting import Rewrite, bypass, next_in_chain, until_settled

_BINARY = ("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow")


class CancelTransposes(ir.passes.InPlacePass):
    """Transpose of a Transpose becomes one, or none; to that end a Transpose moves down past elementwise operators.

    It moves past unary operators (Q and DQ per tensor included), and past binary ones whose other operand is a constant
    or comes through the same Transpose, and only if another Transpose lies at the end of the way.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("Transpose",), lambda node: _merge(node) or _sink(node))


def perm_of(node: ir.Node) -> Shape:
    return ints(node, "perm", tuple(reversed(range(len(shape_of(data_input(node)))))))


def _merge(node: ir.Node) -> bool:
    first = producer(data_input(node), "Transpose")
    if first is None:
        return False
    perm = tuple(perm_of(first)[axis] for axis in perm_of(node))
    if perm == tuple(range(len(perm))):
        return bypass(node, data_input(first))
    rewrite = Rewrite(node)
    return rewrite.replace(rewrite.node("Transpose", [data_input(first)], {"perm": perm}, layer=node))


def _sink(node: ir.Node) -> bool:
    reader = _movable_past(node.outputs[0], perm_of(node))
    if reader is None or not _ends_in_transpose(reader, perm_of(node)):
        return False
    perm = perm_of(node)
    rewrite = Rewrite(reader)
    operands = [_untransposed(rewrite, reader, index, perm) for index in range(len(reader.inputs))]
    attributes = {name: attribute.value for name, attribute in reader.attributes.items()}
    moved = rewrite.node(reader.op_type, operands, attributes, layer=reader)
    return rewrite.replace(rewrite.node("Transpose", [moved], {"perm": perm}))


def _ends_in_transpose(reader: ir.Node, perm: Shape) -> bool:
    """Whether the way down from `reader` leads past movable operators only to a Transpose."""
    following: ir.Node | None = reader
    while following is not None:
        if next_in_chain(following.outputs[0], "Transpose") is not None:
            return True
        following = _movable_past(following.outputs[0], perm)
    return False


def _movable_past(value: ir.Value, perm: Shape) -> ir.Node | None:
    """The only reader of a transposed value, if the Transpose can move past it."""
    uses = {use.node for use in value.uses()}
    reader = next(iter(uses)) if len(uses) == 1 and not value.is_graph_output() else None
    if reader is None or reader.graph is not value.graph:
        return None
    if is_elementwise(reader):
        return reader if data_input(reader) is value else None
    if not is_op(reader, *_BINARY) or shape_of(value) != shape_of(reader.outputs[0]):
        return None
    for operand in reader.inputs:
        assert operand is not None
        other = producer(operand, "Transpose")
        same = other is not None and perm_of(other) == perm and shape_of(operand) == shape_of(value)
        if operand is not value and const_of(operand) is None and not same:
            return None
    return reader


def _untransposed(rewrite: Rewrite, reader: ir.Node, index: int, perm: Shape) -> ir.Value | None:
    """Operand `index` as it must be in front of the Transpose."""
    operand = reader.inputs[index]
    if operand is None or (index > 0 and is_elementwise(reader)):
        return operand
    array = const_of(operand)
    if array is None:
        transpose = producer(operand, "Transpose")
        assert transpose is not None
        return data_input(transpose)
    if element_count(array.shape) == 1:
        return operand
    full = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
    return rewrite.constant(full.transpose(np.argsort(perm)), f"{operand.name}_transposed")
