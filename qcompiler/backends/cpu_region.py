"""Lower the nodes of a CPU region together: what follows a product goes into its epilogue, and float maps turn round.

A product (convolution, fully connected layer) takes along the element-by-element operators behind it, as long as
nobody else reads what is between: activations, additions of a map computed before, a QuantizeLinear, a
DequantizeLinear. They are computed while the result is in registers, integers exactly as if each stood alone: what
comes after a DequantizeLinear stays outside, for LLVM would contract its multiplication with an addition.

ONNX's maps are [N, C, H, W], and vectors want channels last. Where a float convolution reads a map, it is
transposed, and what is computed from it stays so until an operator that has no code for that, or somebody
outside the region, reads it. In most networks that leaves one transpose at each end. Maps of integer convolutions
have channels last already; where the graph transposes one for a float operator, that waits for somebody to need it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.backends import cpu, cpu_conv, cpu_elementwise, cpu_float, cpu_packed, float_elementwise, movement
from qcompiler.backends.base import HostCode, Lowering, View
from qcompiler.backends.cpu_packed import Finish
from qcompiler.backends.elementwise import Formula, Operand, elementwise
from qcompiler.backends.te import Expr
from qcompiler.graph import (
    QCOMPILER_DOMAIN,
    Shape,
    const_of,
    data_input,
    dtype_of,
    integer,
    ints,
    is_op,
    shape_of,
    users,
)

_LONGEST = 6
"""Operators that follow one product, at most: the expressions of long chains grow."""


@dataclass(frozen=True)
class Step:
    """What makes `outputs`: one call, or a view."""

    name: str
    lowering: Lowering
    outputs: tuple[ir.Value, ...]


def lower_region(nodes: Sequence[ir.Node], host: HostCode) -> list[Step]:
    """The nodes of a region, in execution order, as steps in execution order."""
    region = _Region(nodes, host)
    for node in nodes:
        if node in region.pending:
            region.lower(node)
    for node in nodes:
        for value in node.outputs:
            if value.is_graph_output() or any(use.node not in region.inside for use in value.uses()):
                region.as_is(value)
    return region.steps


class _Region:
    """The steps so far, and which maps exist with channels last."""

    def __init__(self, nodes: Sequence[ir.Node], host: HostCode) -> None:
        self.steps: list[Step] = []
        self.inside = frozenset(nodes)
        self.pending = dict.fromkeys(nodes)
        self._host = host
        self._turned: dict[ir.Value, ir.Value] = {}
        """The same map with channels last, by map."""
        self._missing: set[ir.Value] = set()
        """Maps that exist with channels last only."""

    def lower(self, node: ir.Node) -> None:
        if _is_product(node):
            self._product(node)
            return
        del self.pending[node]
        if not self._channels_last(node):
            for value in node.inputs:
                if value is not None:
                    self.as_is(value)
            self._emit(node.op_type, cpu.lower_node(node, self._host), tuple(node.outputs))

    def as_is(self, value: ir.Value) -> ir.Value:
        """The value in the graph's own layout."""
        if value in self._missing:
            self._missing.remove(value)
            self._emit("Transpose", movement.permuted(self._turned[value], value, (0, 3, 1, 2)), (value,))
        return value

    def channels_last(self, value: ir.Value) -> ir.Value:
        """A map with channels last."""
        if value not in self._turned:
            turned = _turned_value(value)
            self._emit("Transpose", movement.permuted(value, turned, (0, 2, 3, 1)), (turned,))
            self._turned[value] = turned
        return self._turned[value]

    def _emit(self, name: str, lowering: Lowering, outputs: tuple[ir.Value, ...]) -> None:
        self.steps.append(Step(name, lowering, outputs))

    def _result(self, value: ir.Value) -> ir.Value:
        """Where an operator that computes channels last leaves its result."""
        self._turned[value] = _turned_value(value)
        self._missing.add(value)
        return self._turned[value]

    # --- products ------------------------------------------------------------------------------------------

    def _product(self, node: ir.Node) -> None:
        followers = self._followers(node)
        for member in (node, *followers):
            del self.pending[member]
        members, output = [node, *followers], (followers or [node])[-1].outputs[0]
        after = self._finish(node, followers) if followers else None
        x = self._operand(node, data_input(node))
        if node.domain == QCOMPILER_DOMAIN:
            kernel = cpu_conv.lower(node, self._host, after)
        else:
            kernel = cpu_float.product(node, x, self._host, after or cpu_float.PLAIN)
        result = self._result(output) if _makes_map(node) else output
        self._emit("_".join(member.op_type for member in members), kernel, (result,))

    def _operand(self, head: ir.Node, value: ir.Value) -> ir.Value:
        """What a product and its epilogue read, in the layout of its result."""
        return self.channels_last(value) if _makes_map(head) else self.as_is(value)

    def _followers(self, head: ir.Node) -> list[ir.Node]:
        """The longest run of operators that can go into the epilogue, in execution order."""
        maps = cpu_packed.takes_maps(_geometry(head), self._host)
        group, made, longest = [head], [head.outputs[0]], 1
        while len(group) <= _LONGEST and not is_op(group[-1], "DequantizeLinear"):
            readers = [user for value in made for user in users(value) if user not in group]
            fitting = next((user for user in readers if self._fits(user, head, made, maps=maps)), None)
            if fitting is None:
                break
            group.append(fitting)
            made.append(fitting.outputs[0])
            if not any(
                value.is_graph_output() or any(user not in group for user in users(value)) for value in made[:-1]
            ):
                longest = len(group)
        return group[1:longest]

    def _fits(self, node: ir.Node, head: ir.Node, made: Sequence[ir.Value], *, maps: bool) -> bool:
        """Whether a node computes element by element from what is `made`, constants and maps computed before."""
        formula, shape = _formula(node), shape_of(head.outputs[0])
        if formula is None or node not in self.pending or shape_of(node.outputs[0]) != shape:
            return False
        return all(self._at_hand(operand, head, made, maps=maps) for operand in formula.operands)

    def _at_hand(self, operand: Operand, head: ir.Node, made: Sequence[ir.Value], *, maps: bool) -> bool:
        shape, array = shape_of(head.outputs[0]), _array(operand)
        if array is not None:
            return _per_channel(array, shape, _channel_axis(head)) is not None
        assert isinstance(operand, ir.Value)
        if operand in made:
            return True
        return maps and shape_of(operand) == shape and operand.producer() not in self.pending

    def _finish(self, head: ir.Node, followers: Sequence[ir.Node]) -> Finish:
        """The followers as a function of the product's result."""
        result = head.outputs[0]
        formulas = [(node.outputs[0], _formula_of(node)) for node in followers]
        made = [result, *(output for output, _ in formulas)]
        operands = [operand for _, formula in formulas for operand in formula.operands if operand not in made]
        arrays = [operand for operand in operands if _array(operand) is not None]
        maps = [operand for operand in operands if isinstance(operand, ir.Value) and _array(operand) is None]

        def expression(total: Expr, array_elements: Sequence[Expr], map_elements: Sequence[Expr]) -> Expr:
            known = {id(result): total}
            known |= {id(operand): element for operand, element in zip(arrays, array_elements, strict=True)}
            known |= {id(operand): element for operand, element in zip(maps, map_elements, strict=True)}
            for output, formula in formulas:
                known[id(output)] = formula.expression(*(known[id(operand)] for operand in formula.operands))
            return known[id(made[-1])]

        return Finish(
            str(dtype_of(made[-1])),
            tuple(_channel_array(operand, shape_of(result), _channel_axis(head)) for operand in arrays),
            tuple(self._operand(head, value) for value in maps),
            expression,
        )

    # --- other operators on maps ---------------------------------------------------------------------------

    def _channels_last(self, node: ir.Node) -> bool:
        """Lower an operator that works on maps with channels last, if one of its inputs is there so."""
        if is_op(node, "Transpose") and len(shape_of(node.outputs[0])) == 4:
            return self._transpose(node)
        if not any(value in self._turned for value in node.inputs if value is not None):
            return False
        if cpu_float.is_pool(node):
            kernel = cpu_float.pool(node, self.channels_last(data_input(node)), self._host)
            self._emit(node.op_type, kernel, (self._result(node.outputs[0]),))
            return True
        if is_op(node, "Concat") and integer(node, "axis") % 4 == 1:
            values = [self.channels_last(value) for value in node.inputs if value is not None]
            output = self._result(node.outputs[0])
            self._emit(node.op_type, movement.joined(values, output, 3), (output,))
            return True
        return self._elementwise(node)

    def _transpose(self, node: ir.Node) -> bool:
        """A Transpose from channels last, which can wait, or to them, which may be done."""
        (source, output), perm = (data_input(node), node.outputs[0]), ints(node, "perm")
        if perm == (0, 3, 1, 2):
            self._turned[output] = self.as_is(source)
            self._missing.add(output)
            return True
        if perm == (0, 2, 3, 1) and source in self._turned:
            self._emit(node.op_type, View(self._turned[source]), (output,))
            return True
        return False

    def _elementwise(self, node: ir.Node) -> bool:
        formula = _formula(node)
        if formula is None or len(shape_of(node.outputs[0])) != 4:
            return False
        arrays = [_array(operand) for operand in formula.operands]
        if not all(
            len(operand.shape or ()) == 4 if array is None else array.ndim <= 4
            for operand, array in zip(formula.operands, arrays, strict=True)
        ):
            return False
        turned = [self._operand_last(operand, array) for operand, array in zip(formula.operands, arrays, strict=True)]
        output = self._result(node.outputs[0])
        self._emit(node.op_type, elementwise(turned, output, formula.expression, self._host), (output,))
        return True

    def _operand_last(self, operand: Operand, array: np.ndarray | None) -> Operand:
        if array is not None:
            return array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(0, 2, 3, 1)
        assert isinstance(operand, ir.Value)
        return self.channels_last(operand)


# --- what nodes and values are -----------------------------------------------------------------------------


_INTEGER_PRODUCTS = ("QConv", "QConvTranspose", "QGemm")
_INTEGER_FORMULAS: Mapping[str, Callable[[ir.Node], Formula]] = {
    "QAdd": cpu_elementwise.add_formula,
    "QMul": cpu_elementwise.multiply_formula,
    "QRequantize": cpu_elementwise.requantize_formula,
}
_FORMULAS: Mapping[str, Callable[[ir.Node], Formula]] = float_elementwise.FORMULAS


def _is_product(node: ir.Node) -> bool:
    return is_op(node, *_INTEGER_PRODUCTS, domain=QCOMPILER_DOMAIN) or cpu_float.is_packable(node)


def _geometry(node: ir.Node) -> cpu_packed.Geometry:
    return cpu_conv.problem_of(node) if node.domain == QCOMPILER_DOMAIN else cpu_float.geometry_of(node)


def _formula(node: ir.Node) -> Formula | None:
    """The node as a formula of what lies in its inputs at one place, or None."""
    if node.domain == QCOMPILER_DOMAIN:
        make = _INTEGER_FORMULAS.get(node.op_type)
        return make(node) if make is not None else None
    if is_op(node, "DequantizeLinear"):
        return cpu_elementwise.dequantize_formula(node)
    if is_op(node, "QuantizeLinear"):
        return cpu_elementwise.quantize_formula(node)
    if not is_op(node, *_FORMULAS) or dtype_of(node.outputs[0]) != np.float32:
        return None
    formula = _FORMULAS[node.op_type](node)
    return formula if all(_dtype(operand) == np.float32 for operand in formula.operands) else None


def _formula_of(node: ir.Node) -> Formula:
    formula = _formula(node)
    assert formula is not None, f"{node.op_type} {node.name} is not computed element by element"
    return formula


def _dtype(operand: Operand) -> np.dtype:
    return dtype_of(operand) if isinstance(operand, ir.Value) else operand.dtype


def _array(operand: Operand) -> np.ndarray | None:
    """A constant operand."""
    return operand if isinstance(operand, np.ndarray) else const_of(operand)


def _makes_map(head: ir.Node) -> bool:
    """Whether a product makes a float map; the rows of matrices stay as they are, whatever their rank."""
    return is_op(head, "Conv", "ConvTranspose")


def _channel_axis(head: ir.Node) -> int:
    return 1 if _makes_map(head) else len(shape_of(head.outputs[0])) - 1


def _per_channel(array: np.ndarray, shape: Shape, axis: int) -> np.ndarray | None:
    """A constant as one number for each channel of a result, or None if it differs along other axes too."""
    if array.ndim > len(shape):
        return None
    ranked = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    if any(dim != 1 for other, dim in enumerate(ranked.shape) if other != axis):
        return None
    return np.broadcast_to(ranked.reshape(-1), (shape[axis],)).copy()


def _channel_array(operand: Operand, shape: Shape, axis: int) -> np.ndarray:
    array = _array(operand)
    per_channel = None if array is None else _per_channel(array, shape, axis)
    assert per_channel is not None
    return per_channel


def _turned_value(value: ir.Value) -> ir.Value:
    shape = cpu_float.channels_last(shape_of(value))
    assert value.dtype is not None
    return ir.Value(name=f"{value.name}.nhwc", shape=ir.Shape(shape), type=ir.TensorType(value.dtype))
