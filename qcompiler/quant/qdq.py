"""Reading and inserting QuantizeLinear/DequantizeLinear pairs."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, data_input, fresh_name, input_of, make_node, make_value, producer, shape_of, users


@dataclass(frozen=True)
class Parameters:
    """The per-tensor scale and zero point of a pair, as the graph holds them."""

    dtype: ir.DataType
    scale: ir.Value
    zero_point: ir.Value | None

    def same(self, other: "Parameters") -> bool:
        """Whether both describe one format."""
        return self.dtype == other.dtype and self._numbers() == other._numbers()

    def _numbers(self) -> tuple[float, int]:
        scale, zero_point = const_of(self.scale), const_of(self.zero_point)
        assert scale is not None
        return float(scale.reshape(())), 0 if zero_point is None else int(zero_point.reshape(()))


def parameters_of(node: ir.Node) -> Parameters | None:
    """Parameters of a QuantizeLinear or DequantizeLinear; None unless they are constant and per tensor."""
    integers = node.outputs[0] if node.op_type == "QuantizeLinear" else data_input(node)
    scale, zero_point = data_input(node, 1), input_of(node, 2)
    known = const_of(scale)
    if known is None or known.size != 1 or known.dtype != np.float32 or integers.dtype is None:
        return None
    if zero_point is not None and const_of(zero_point) is None:
        return None
    return Parameters(integers.dtype, scale, zero_point)


def activation_dequantize(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear that makes `value` out of integers computed at run time, else None."""
    node = producer(value, "DequantizeLinear")
    return node if node is not None and const_of(data_input(node)) is None else None


def insert_pair(
    graph: ir.Graph, value: ir.Value, parameters: Parameters, readers: Iterable[ir.Node], *, output: bool = False
) -> ir.Value:
    """Add value → QuantizeLinear → DequantizeLinear and let `readers` read the result.

    Args:
        graph: the graph of `value`; the pair goes right behind its producer, or to the front for an input.
        output: also let the pair's result take over the graph output that `value` is, name included.

    Returns:
        The float result of the pair.
    """
    name, shape = value.name or "", shape_of(value)
    integers = make_value(graph, f"{name}_q", shape, parameters.dtype)
    result = make_value(graph, f"{name}_dq", shape, ir.DataType.FLOAT)
    operands = [parameters.scale, *([parameters.zero_point] if parameters.zero_point is not None else [])]
    pair = [
        make_node("QuantizeLinear", [value, *operands], [integers]),
        make_node("DequantizeLinear", [integers, *operands], [result]),
    ]
    for reader in readers:
        for index, read in enumerate(reader.inputs):
            if read is value:
                reader.replace_input_with(index, result)
    maker = value.producer()
    if maker is not None:
        graph.insert_after(maker, pair)
    elif len(graph):
        graph.insert_before(graph[0], pair)
    if output and value.is_graph_output():
        value.name = fresh_name(graph, f"{name}_float")
        result.name = name
        for index, old in enumerate(graph.outputs):
            if old is value:
                graph.outputs[index] = result
    return result


def quantize_readers(value: ir.Value) -> list[ir.Node]:
    """The QuantizeLinear nodes that quantize `value`."""
    return [node for node in users(value) if node.op_type == "QuantizeLinear" and data_input(node) is value]
