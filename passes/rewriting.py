"""What every graph pass shares: building shaped nodes, and running a rewrite until nothing changes."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from qcompiler.graph import (
    Attribute,
    const_of,
    data_input,
    graph_of,
    integer,
    is_op,
    make_node,
    nodes_of,
    only_user,
    producer,
    remove_dead,
    replace_node,
    shape_of,
    string,
    users,
    value_name,
)

OPSET = 21
_SMALL = 256
"""Constants up to this many elements are shown to shape inference: shapes, axes, pads are never longer."""


class Rewrite:
    """New nodes that will stand in place of `old`, built one after another with inferred types.

    Nothing reaches the graph before `replace`. A rewrite that gives up must say so with `abandon`, or its nodes would
    go on counting as readers of their inputs. A node made with `layer=n` takes over the name of n, so that reports keep
    naming the user's layer.
    """

    def __init__(self, old: ir.Node) -> None:
        self._old = old
        self._graph = graph_of(old)
        self._nodes: list[ir.Node] = []
        self._constants: list[ir.Value] = []
        self._taken: set[str | None] = set()

    def constant(self, array: np.ndarray, hint: str) -> ir.Value:
        name = self._unused(hint)
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        self._constants.append(ir.Value(name=name, shape=shape, type=kind, const_value=tensor))
        return self._constants[-1]

    def scalar(self, number: float, hint: str) -> ir.Value:
        """A float32 constant of no dimensions."""
        return self.constant(np.array(number, np.float32), f"{self._old.name}_{hint}")

    def dims(self, numbers: Sequence[int]) -> ir.Value:
        """An int64 vector: the shape, axes or pads operand of a node."""
        return self.constant(np.asarray(numbers, np.int64), f"{self._old.name}_dims")

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        outputs: int = 1,
        layer: ir.Node | None = None,
        hint: str | None = None,
    ) -> list[ir.Value]:
        """Add a node of the standard domain, called by `hint` or its type; returns its outputs, typed and shaped."""
        values = [ir.Value(name=self._unused(f"{self._old.name}_{hint or op_type}")) for _ in range(outputs)]
        name = layer.name if layer is not None else values[0].name
        node = make_node(op_type, inputs, values, dict(attributes or {}), name=name)
        infer_types(node)
        self._nodes.append(node)
        return values

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        layer: ir.Node | None = None,
        hint: str | None = None,
    ) -> ir.Value:
        """Add a node of one output and return it."""
        return self.nodes(op_type, inputs, attributes, layer=layer, hint=hint)[0]

    def reshape(self, value: ir.Value, dims: Sequence[int]) -> ir.Value:
        """`value` in another shape, through a Reshape unless it has it already."""
        return value if shape_of(value) == tuple(dims) else self.node("Reshape", [value, self.dims(dims)])

    def replace(self, *outputs: ir.Value) -> bool:
        """Put the nodes where the old one stands; `outputs` take over its first outputs, the others nobody may read.

        Always True, the answer of a rewrite that changed something.
        """
        for new, old in zip(outputs, self._old.outputs, strict=False):
            assert shape_of(new) == shape_of(old), f"{self._old.name}: {shape_of(old)} became {shape_of(new)}"
            assert new.dtype == old.dtype, f"{self._old.name}: {old.dtype} became {new.dtype}"
        assert all(not old.uses() and not old.is_graph_output() for old in self._old.outputs[len(outputs) :])
        for constant in self._constants:
            if constant.uses():
                self._graph.register_initializer(constant)
        # onnx-ir wants a successor for every output, read or not.
        spare = [ir.Value(name=old.name) for old in self._old.outputs[len(outputs) :]]
        replace_node(self._old, self._nodes, [*outputs, *spare])
        return True

    def abandon(self) -> bool:
        """Forget the nodes made. Always False, the answer of a rewrite that changed nothing."""
        for node in self._nodes:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
        self._nodes.clear()
        return False

    def _unused(self, stem: str) -> str:
        """A name no value, constant or node of the graph has: `stem`, else `stem_1`, `stem_2`…"""
        if not self._taken:
            self._taken = {value.name for node in self._graph for value in node.outputs}
            self._taken |= {node.name for node in self._graph} | set(self._graph.initializers)
            self._taken |= {value.name for value in self._graph.inputs}
        name, count = stem, 0
        while name in self._taken:
            count += 1
            name = f"{stem}_{count}"
        self._taken.add(name)
        return name


def infer_types(node: ir.Node) -> None:
    """Set the types and shapes of a standard-domain node's outputs from its inputs (ONNX shape inference)."""
    types: dict[str, onnx.TypeProto] = {}
    constants: dict[str, onnx.TensorProto] = {}
    for value in node.inputs:
        if value is None:
            continue
        assert value.type is not None, f"{value.name} has no type"
        proto = ir.serde.serialize_type(value.type)
        ir.serde.serialize_shape_into(proto, ir.Shape(shape_of(value)))
        types[value_name(value)] = proto
        array = const_of(value)
        if array is not None and array.size <= _SMALL:
            constants[value_name(value)] = onnx.numpy_helper.from_array(array, value_name(value))
    schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
    opset = [onnx.helper.make_opsetid(node.domain, OPSET)]
    inferred = onnx.shape_inference.infer_node_outputs(
        schema, ir.serde.serialize_node(node), types, constants, opset_imports=opset
    )
    for output in node.outputs:
        proto = inferred[value_name(output)]
        output.type = ir.serde.deserialize_type_proto_for_type(proto)
        output.shape = ir.serde.deserialize_type_proto_for_shape(proto)
        shape_of(output)  # fails here, not three passes later, if the shape is not static


def until_settled(model: ir.Model, op_types: Sequence[str], rewrite: Callable[[ir.Node], bool]) -> ir.passes.PassResult:
    """Offer every node of these types to `rewrite` (True: it changed the graph) until all decline; then drop dead code.

    Nodes inside subgraphs are not offered.
    """
    modified = False
    while True:
        changed = False
        for node in nodes_of(model.graph, *op_types):
            # An earlier rewrite of this round may have removed it.
            if node.graph is model.graph and rewrite(node):
                changed = True
        # Dead nodes count as readers, so sweeping may allow more; both must run.
        swept = remove_dead(model)
        if not changed and not swept:
            return ir.passes.PassResult(model, modified=modified)
        modified = True


def bypass(node: ir.Node, value: ir.Value) -> bool:
    """Let the readers of a node's first output read `value` instead, and remove the node. False where it must stay.

    It must stay if its output is a graph output and `value` cannot take that name, being an input, a constant or an
    output itself.
    """
    graph, output = graph_of(node), node.outputs[0]
    if output.is_graph_output() and (
        value.producer() is None or value.is_graph_output() or graph_of(_producer(value)) is not graph
    ):
        return False
    name, is_output = output.name, output.is_graph_output()
    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if is_output:
        value.name = name
    return True


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def next_in_chain(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The only reader of `value`, if it is of one of `op_types` and in the same graph, else None."""
    node = only_user(value)
    source = value.producer()
    if node is None or not is_op(node, *op_types):
        return None
    return node if source is None or node.graph is source.graph else None


def constant_operand(node: ir.Node) -> tuple[ir.Value, np.ndarray, int] | None:
    """(other operand, constant, index of the constant) of a binary node with exactly one constant operand."""
    left, right = data_input(node, 0), data_input(node, 1)
    a, b = const_of(left), const_of(right)
    if (a is None) == (b is None):
        return None
    return (left, b, 1) if b is not None else (right, a, 0) if a is not None else None


def scalar_of(value: ir.Value | None) -> float | None:
    """The value of a constant of one element, else None."""
    array = const_of(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def is_quantized(node: ir.Node) -> bool:
    """Whether the node is in the quantized part of a QDQ graph: reads a DequantizeLinear or feeds a QuantizeLinear."""
    reads = any(producer(value, "DequantizeLinear") is not None for value in node.inputs)
    return reads or any(reader.op_type == "QuantizeLinear" for output in node.outputs for reader in users(output))


def no_auto_pad(node: ir.Node) -> bool:
    return string(node, "auto_pad", "NOTSET") == "NOTSET"


# --- weights: an initializer, or DequantizeLinear of one --------------------------------------------------


def weight_dequantize(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of constants behind a weight, or None."""
    node = producer(value, "DequantizeLinear")
    return node if node is not None and all(const_of(operand) is not None for operand in node.inputs) else None


def is_weight(value: ir.Value | None) -> bool:
    """Known at compile time: an initializer, or DequantizeLinear of initializers."""
    return const_of(value) is not None or weight_dequantize(value) is not None


def map_weight(
    rewrite: Rewrite,
    value: ir.Value,
    change: Callable[[np.ndarray], np.ndarray],
    new_axis: Callable[[int], int],
    per_channel: Callable[[np.ndarray], np.ndarray] = lambda parameters: parameters,
) -> ir.Value | None:
    """A weight with its elements moved, in the same precision.

    Args:
        value: an initializer, or DequantizeLinear of initializers.
        change: moves the elements (the quantized ones, where there are any); it must not compute with them, save for
            inserting zeros where all zero points are 0.
        new_axis: where the axis of a per-channel DequantizeLinear goes.
        per_channel: what happens to the [channels] scales and zero points.

    Returns None for a blocked DequantizeLinear, unless `change` is numpy's transpose, which its parameters follow.
    """
    array = const_of(value)
    if array is not None:
        return rewrite.constant(change(array), f"{value.name}_moved")
    dequantize = weight_dequantize(value)
    assert dequantize is not None, f"{value.name} is not a weight"
    block = integer(dequantize, "block_size", 0)
    if block and change is not np.transpose:
        return None
    quantized, *parameters = [const_of(operand) for operand in dequantize.inputs]
    assert quantized is not None
    axis = integer(dequantize, "axis", 1) % max(quantized.ndim, 1)
    per_axis = parameters[0] is not None and parameters[0].ndim == 1 and parameters[0].size > 1
    operands = [rewrite.constant(change(quantized), f"{dequantize.inputs[0].name}_moved")]  # type: ignore[union-attr]
    for old, parameter in zip(dequantize.inputs[1:], parameters, strict=True):
        assert old is not None and parameter is not None
        if block:
            operands.append(rewrite.constant(np.transpose(parameter), f"{old.name}_moved"))
        elif per_axis:
            operands.append(rewrite.constant(per_channel(parameter), f"{old.name}_moved"))
        else:
            operands.append(old)
    if block:
        attributes: dict[str, Attribute] = {"axis": quantized.ndim - 1 - axis, "block_size": block}
        return rewrite.node("DequantizeLinear", operands, attributes)
    return rewrite.node("DequantizeLinear", operands, {"axis": new_axis(axis)} if per_axis else None)
