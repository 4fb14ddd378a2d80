"""uint8 becomes int8 with the zero point 128 lower, where the target has no uint8."""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    add_initializer,
    const_of,
    data_input,
    graph_of,
    input_of,
    is_op,
    make_node,
    make_value,
    remove_dead,
    shape_of,
    users,
    value_name,
)
from qcompiler.target import Target

_OFFSET = 128

_MOVING = (
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather", "Concat", "MaxPool",
    "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Identity",
)  # fmt: skip
"""Operators on uint8 tensors that do the same to int8 ones."""


class LegalizeSignedness(ir.passes.InPlacePass):
    """Q(uint8, z) … DQ(uint8, z)  ⇒  Q(int8, z - 128) … DQ(int8, z - 128), exactly: every integer is 128 lower.

    Activations change if the target's activation formats lack uint8, weights if its weight formats do. Inputs and
    outputs of the model keep uint8: they get a DQ → Q pair, which an integer requantize carries out.
    uint8 tensors that anything but data movement reads as integers are left alone.
    """

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.activations = "uint8" not in target.quantization.activations.dtypes
        self.weights = "uint8" not in target.quantization.weights.dtypes

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified, seen = False, set[ir.Value]()
        for node in list(model.graph):
            for value in _integers(node):
                if value in seen or value.dtype != ir.DataType.UINT8:
                    continue
                web = _web(value)
                seen |= web
                constant = all(const_of(member) is not None for member in web)
                wanted = self.weights if constant else self.activations
                if wanted and _convertible(web) and not _is_boundary(web):
                    _convert(model.graph, web)
                    modified = True
        if modified:
            remove_dead(model)
        return ir.passes.PassResult(model, modified=modified)


def _integers(node: ir.Node) -> list[ir.Value]:
    if is_op(node, "QuantizeLinear"):
        return [node.outputs[0]]
    return [data_input(node)] if is_op(node, "DequantizeLinear") else []


def _web(start: ir.Value) -> set[ir.Value]:
    """All uint8 tensors that data movement connects with `start`."""
    web, pending = set[ir.Value](), [start]
    while pending:
        value = pending.pop()
        if value in web:
            continue
        web.add(value)
        movers = [node for node in (value.producer(), *users(value)) if is_op(node, *_MOVING)]
        pending += [
            other
            for node in movers
            if node is not None
            for other in (*node.inputs, *node.outputs)
            if other is not None and other.dtype == ir.DataType.UINT8
        ]
    return web


def _is_boundary(web: set[ir.Value]) -> bool:
    """Whether this is an input or output of the model that is only requantized to or from int8."""
    if len(web) > 1:
        return False
    (value,) = web
    if value.is_graph_input():
        readers = [reader for node in users(value) for reader in users(node.outputs[0])]
        return all(
            is_op(reader, "QuantizeLinear") and reader.outputs[0].dtype == ir.DataType.INT8 for reader in readers
        )
    maker = value.producer()
    before = data_input(maker).producer() if maker is not None and is_op(maker, "QuantizeLinear") else None
    signed = is_op(before, "DequantizeLinear") and before is not None and data_input(before).dtype == ir.DataType.INT8
    return value.is_graph_output() and not value.uses() and signed


def _convertible(web: Iterable[ir.Value]) -> bool:
    """Whether only Q, DQ and data movement make and read these tensors, and the edges know a per-tensor format."""
    edge = False
    for value in web:
        maker = value.producer()
        if maker is not None and not is_op(maker, "QuantizeLinear", *_MOVING):
            return False
        if not all(is_op(node, "DequantizeLinear", *_MOVING) for node in users(value)):
            return False
        edge = edge or value.is_graph_input() or value.is_graph_output()
    return not edge or _scale(web) is not None


def _scale(web: Iterable[ir.Value]) -> ir.Value | None:
    """A per-tensor scale some Q or DQ gives these tensors."""
    for value in web:
        for node in (value.producer(), *users(value)):
            if is_op(node, "QuantizeLinear", "DequantizeLinear") and node is not None:
                scale = const_of(data_input(node, 1))
                if scale is not None and scale.size == 1:
                    return data_input(node, 1)
    return None


def _convert(graph: ir.Graph, web: set[ir.Value]) -> None:
    scale = _scale(web)
    nodes = dict.fromkeys(node for value in web for node in (value.producer(), *users(value)) if node is not None)
    for node in nodes:
        if is_op(node, "QuantizeLinear", "DequantizeLinear"):
            _lower_zero_point(node)
    for value in web:
        array = const_of(value)
        if array is not None:
            signed = add_initializer(graph, f"{value_name(value)}_int8", _lower(array))
            ir.convenience.replace_all_uses_with(value, signed)
        elif value.is_graph_input():
            assert scale is not None
            _signed_input(graph, value, scale)
        else:
            value.dtype = ir.DataType.INT8
    for index, value in enumerate(graph.outputs):
        if value in web and not value.is_graph_input():
            assert scale is not None
            graph.outputs[index] = _unsigned_output(graph, value, scale)


def _lower(array: np.ndarray) -> np.ndarray:
    return (array.astype(np.int16) - _OFFSET).astype(np.int8)


def _lower_zero_point(node: ir.Node) -> None:
    scale, zero_point = const_of(data_input(node, 1)), const_of(input_of(node, 2))
    assert scale is not None
    given = np.zeros(scale.shape, np.uint8) if zero_point is None else zero_point
    signed = add_initializer(graph_of(node), f"{node.name}_zero_point", _lower(given))
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, signed)
    node.attributes.pop("output_dtype", None)


def _zero_points(graph: ir.Graph, hint: str, scale: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Two zero points 128 apart; with one scale, requantizing between them is exact whatever they are."""
    shape = shape_of(scale)
    return (
        add_initializer(graph, f"{hint}_uint8", np.full(shape, _OFFSET, np.uint8)),
        add_initializer(graph, f"{hint}_int8", np.zeros(shape, np.int8)),
    )


def _signed_input(graph: ir.Graph, value: ir.Value, scale: ir.Value) -> None:
    name, shape, readers = value_name(value), shape_of(value), users(value)
    unsigned, signed = _zero_points(graph, f"{name}_zero_point", scale)
    real = make_value(graph, f"{name}_dq", shape, ir.DataType.FLOAT)
    integers = make_value(graph, f"{name}_q", shape, ir.DataType.INT8)
    for reader in readers:
        for index, read in enumerate(reader.inputs):
            if read is value:
                reader.replace_input_with(index, integers)
    pair = [
        make_node("DequantizeLinear", [value, scale, unsigned], [real]),
        make_node("QuantizeLinear", [real, scale, signed], [integers]),
    ]
    graph.insert_before(graph[0], pair)


def _unsigned_output(graph: ir.Graph, value: ir.Value, scale: ir.Value) -> ir.Value:
    name, shape, maker = value_name(value), shape_of(value), value.producer()
    assert maker is not None, f"{name} has no producer"
    unsigned, signed = _zero_points(graph, f"{name}_zero_point", scale)
    value.name = f"{name}_signed"
    real = make_value(graph, f"{name}_dq", shape, ir.DataType.FLOAT)
    integers = make_value(graph, name, shape, ir.DataType.UINT8)
    pair = [
        make_node("DequantizeLinear", [value, scale, signed], [real]),
        make_node("QuantizeLinear", [real, scale, unsigned], [integers]),
    ]
    graph.insert_after(maker, pair)
    return integers
