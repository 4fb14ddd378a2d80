"""Layers in 16-bit floats: float16 or bfloat16 weights and tensors, sums in float32.

A layer's weights become numbers that the type represents, which the CPU then stores in two bytes each, and its input
and output are rounded to the type by a Cast there and back. Multiplications and sums are those of float32, as in
onnxruntime, which converts such layers on CPUs the same way.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.errors import QCompilerError
from qcompiler.graph import (
    const_of,
    data_input,
    fresh_name,
    graph_of,
    integer,
    make_node,
    make_value,
    producer,
    shape_of,
    users,
    value_name,
)
from qcompiler.quant.operators import clamp_of, has_weights, named_nodes
from qcompiler.quant.types import HalfType

_TYPES: Mapping[HalfType, ir.DataType] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def to_half(model: ir.Model, layers: Mapping[str, HalfType]) -> tuple[ir.Model, tuple[str, ...]]:
    """A model whose layers of these names, "all" for every one, are in 16-bit floats; the given one is left alone.

    Returns:
        The model, and the names of the layers, which planning must leave in float.

    Raises:
        QCompilerError: no layer with weights has such a name, or its weights are too large for float16.
    """
    result = model.clone()
    nodes = list(result.graph)
    chosen: dict[ir.Node, HalfType] = {}
    for name, half in layers.items():
        named = named_nodes(nodes, [name], f"--{half}")
        found = [node for node in nodes if node in named and has_weights(node)]
        if not found:
            raise QCompilerError(
                f"--{half} {name}: this operator has no constant weights; name a convolution or product."
            )
        chosen |= dict.fromkeys(found, half)
    for node, half in chosen.items():
        _round_weights(node, half)
        _round_tensor(data_input(node), [node], half)
        last = clamp_of(node) or node
        _round_tensor(last.outputs[0], users(last.outputs[0]), half)
    return result, tuple(node.name or "" for node in chosen)


def _round_weights(node: ir.Node, half: HalfType) -> None:
    value = data_input(node, 1)
    array = const_of(value)
    assert array is not None
    with np.errstate(over="ignore"):
        rounded = array.astype(_TYPES[half].numpy()).astype(array.dtype)
    if not np.isfinite(rounded).all():
        raise QCompilerError(f"--{half} {node.name}: its weights go beyond {half}; use bfloat16, which holds them.")
    value.const_value = ir.tensor(rounded, name=value.name)


def _round_tensor(value: ir.Value, readers: Sequence[ir.Node], half: HalfType) -> None:
    """Let `readers` (and the graph's output, if `value` is one that an operator makes) read it rounded."""
    if _is_rounded(value, half):
        return
    graph, name = graph_of(readers[0]) if readers else graph_of(_maker(value)), value_name(value)
    rounding = next((reader for reader in users(value) if _casts_to(reader, _TYPES[half])), None)
    if rounding is None:
        narrow = make_value(graph, f"{name}_{half}", shape_of(value), _TYPES[half])
        wide = make_value(graph, f"{name}_rounded", shape_of(value), ir.DataType.FLOAT)
        casts = [
            make_node("Cast", [value], [narrow], {"to": _TYPES[half].value}),
            make_node("Cast", [narrow], [wide], {"to": ir.DataType.FLOAT.value}),
        ]
        maker = value.producer()
        if maker is not None:
            graph.insert_after(maker, casts)
        else:
            graph.insert_before(graph[0], casts)
        if value.is_graph_output():
            value.name = fresh_name(graph, f"{name}_exact")
            wide.name = name
            for index, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[index] = wide
    else:
        wide = users(rounding.outputs[0])[0].outputs[0]
    for reader in readers:
        for index, read in enumerate(reader.inputs):
            if read is value and not _casts_to(reader, _TYPES[half]):
                reader.replace_input_with(index, wide)


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None, f"{value.name} is neither made nor read"
    return node


def _casts_to(node: ir.Node, dtype: ir.DataType) -> bool:
    return node.op_type == "Cast" and integer(node, "to") == dtype.value


def _is_rounded(value: ir.Value, half: HalfType) -> bool:
    """Whether the tensor comes out of such a rounding already."""
    wide = producer(value, "Cast")
    return wide is not None and data_input(wide).dtype == _TYPES[half]
