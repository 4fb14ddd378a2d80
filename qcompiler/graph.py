"""Small helpers on onnx-ir, the one graph IR from import to lowering.

Everything here assumes what the importer guarantees: static shapes, one graph, inferred types, and every
node named. Constants are initializers (the importer turns Constant nodes into initializers).
"""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

QCOMPILER_DOMAIN = "qcompiler"

Shape = tuple[int, ...]


def value_name(value: ir.Value) -> str:
    assert value.name, "the importer names every value"
    return value.name


def shape_of(value: ir.Value) -> Shape:
    """The static shape of a value."""
    assert value.shape is not None, f"{value.name} has no shape"
    dims = tuple(dim for dim in value.shape if isinstance(dim, int))
    assert len(dims) == len(value.shape), f"{value.name} has a symbolic shape {value.shape}"
    return dims


def dtype_of(value: ir.Value) -> np.dtype:
    assert value.dtype is not None, f"{value.name} has no type"
    return np.dtype(value.dtype.numpy())


def const_of(value: ir.Value | None) -> np.ndarray | None:
    """The constant behind a value, or None if it is computed at run time or absent."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def input_of(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index`, or None where the optional input is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def data_input(node: ir.Node, index: int = 0) -> ir.Value:
    """Input `index`, which the operator requires."""
    value = input_of(node, index)
    assert value is not None, f"{node.op_type} {node.name} lacks input {index}"
    return value


def ints(node: ir.Node, name: str, default: Sequence[int] | None = None) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    if attribute is None:
        assert default is not None, f"{node.op_type} {node.name} lacks attribute {name}"
        return tuple(default)
    return tuple(attribute.as_ints())


def integer(node: ir.Node, name: str, default: int | None = None) -> int:
    attribute = node.attributes.get(name)
    if attribute is None:
        assert default is not None, f"{node.op_type} {node.name} lacks attribute {name}"
        return default
    return attribute.as_int()


def real(node: ir.Node, name: str, default: float | None = None) -> float:
    attribute = node.attributes.get(name)
    if attribute is None:
        assert default is not None, f"{node.op_type} {node.name} lacks attribute {name}"
        return default
    return attribute.as_float()


def string(node: ir.Node, name: str, default: str | None = None) -> str:
    attribute = node.attributes.get(name)
    if attribute is None:
        assert default is not None, f"{node.op_type} {node.name} lacks attribute {name}"
        return default
    return attribute.as_string()


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
    return (
        node is not None and node.domain in (domain, "ai.onnx" if domain == "" else domain) and node.op_type in op_types
    )


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard-domain node of one of `op_types` that makes `value`, else None."""
    if value is None:
        return None
    node = value.producer()
    return node if node is not None and is_op(node, *op_types) else None


def users(value: ir.Value) -> tuple[ir.Node, ...]:
    """The distinct nodes that read a value, in no particular order of use."""
    return tuple(dict.fromkeys(use.node for use in value.uses()))


def only_user(value: ir.Value) -> ir.Node | None:
    """The single node that reads `value`, or None if there are several, none, or it is a graph output."""
    readers = users(value)
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def graph_of(node: ir.Node) -> ir.Graph:
    graph = node.graph
    assert isinstance(graph, ir.Graph), f"{node.name} is not in a graph"
    return graph


def fresh_name(graph: ir.Graph, hint: str) -> str:
    """A value name not yet used in the graph: `hint`, else `hint_1`, `hint_2`…"""
    taken = {value.name for node in graph for value in node.outputs}
    taken |= set(graph.initializers) | {value.name for value in graph.inputs}
    if hint not in taken:
        return hint
    suffix = 1
    while f"{hint}_{suffix}" in taken:
        suffix += 1
    return f"{hint}_{suffix}"


def add_initializer(graph: ir.Graph, hint: str, array: np.ndarray) -> ir.Value:
    """Add a constant to the graph under a fresh name and return its value."""
    name = fresh_name(graph, hint)
    # Not ascontiguousarray, which turns scalars into vectors of one.
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def make_value(graph: ir.Graph, hint: str, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=fresh_name(graph, hint), shape=ir.Shape(shape), type=ir.TensorType(dtype))


Attribute = int | float | str | Sequence[int] | Sequence[float] | Sequence[str]


def make_node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[ir.Value],
    attributes: dict[str, Attribute] | None = None,
    *,
    domain: str = "",
    name: str | None = None,
) -> ir.Node:
    """A node not yet in a graph. `outputs` are fresh values, or values whose old producer is going away."""
    return ir.node(
        op_type,
        inputs,
        attributes=attributes or {},
        domain=domain,
        outputs=outputs,
        name=name or outputs[0].name,
    )


def replace_node(old: ir.Node, new: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> None:
    """Put `new` where `old` stands; `outputs` (of the new nodes) take over the uses and names of the old ones."""
    graph = graph_of(old)
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, old.outputs, outputs)


def nodes_of(graph: ir.Graph, *op_types: str, domain: str = "") -> list[ir.Node]:
    """A snapshot of the nodes of these types, in order; safe to rewrite while walking it."""
    return [node for node in graph if is_op(node, *op_types, domain=domain)]


def remove_dead(model: ir.Model) -> bool:
    """Drop nodes, initializers and opset imports nobody reads. True if anything went."""
    graph, removed = model.graph, False
    for node in reversed(list(graph)):
        if not any(out.uses() or out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)
            removed = True
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]
            removed = True
    return removed


def element_count(shape: Iterable[int]) -> int:
    total = 1
    for dim in shape:
        total *= dim
    return total
