"""Dynamic quantization: weights are quantized ahead of time, activations where they are multiplied, at run time.

Each Conv, Gemm and MatMul with constant weights gets its first input through a DynamicQuantizeLinear: uint8, with scale
and zero point from the tensor's own minimum and maximum in this very run. Results are float, as is everything between,
so that no calibration data is needed and nothing saturates; what it costs is finding ranges, and tensors of 32 bits.
"""

from collections.abc import Sequence

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
    shape_of,
    users,
    value_name,
)
from qcompiler.quant import operators
from qcompiler.quant.formats import weight_format
from qcompiler.quant.operators import has_weights, named_nodes
from qcompiler.quant.plan import ON_REQUEST, edge_layers, weight_axis
from qcompiler.quant.types import QuantPlan, TensorFormat, WeightRequest
from qcompiler.quant.weight_bits import weight_dtypes
from qcompiler.target import Target

ACTIVATION = "uint8"
"""What DynamicQuantizeLinear makes."""
NOT_MULTIPLIED = "only convolutions and products by constants are quantized at run time"


def plan_dynamic(
    model: ir.Model, target: Target, keep_float: Sequence[str] = (), weights: WeightRequest | None = None
) -> QuantPlan:
    """Choose the layers to quantize at run time and the formats of their weights.

    Args and errors as of `qcompiler.quant.plan.plan`, but for ranges, of which there are none.
    """
    wanted, nodes = weights or WeightRequest(activations="dynamic"), list(model.graph)
    requested = named_nodes(nodes, keep_float, "--float")
    reasons = {node: reason for node in nodes if (reason := _reason(node, requested)) is not None}
    weighted = [node for node in nodes if node not in reasons]
    dtypes = weight_dtypes(weighted, edge_layers(nodes, weighted), target, lambda _: ACTIVATION, wanted, {})
    spec = target.quantization.weights
    formats: dict[str, TensorFormat] = {}
    for node in weighted:
        value = data_input(node, 1)
        array, name = const_of(value), value_name(value)
        assert array is not None
        axis = weight_axis(node) if spec.per_channel else None
        shared = name in formats and formats[name].axis != axis
        formats[name] = weight_format(
            array, dtypes[name], None if shared else axis, symmetric=spec.symmetric, narrow=spec.narrow_range
        )
    return QuantPlan(
        activations={},
        weights=formats,
        biases={},
        float_nodes={node.name or "": reason for node, reason in reasons.items()},
        dynamic=frozenset(node.name or "" for node in weighted),
    )


def _reason(node: ir.Node, requested: set[ir.Node]) -> str | None:
    """Why a node stays in float."""
    if node in requested:
        return ON_REQUEST
    if not is_op(node, "Conv", "Gemm", "MatMul") or not has_weights(node):
        return NOT_MULTIPLIED
    if is_op(node, "MatMul") and len(shape_of(data_input(node, 1))) != 2:
        return "its weights are no matrix"
    return operators.refusal(node)


def quantize_input(node: ir.Node) -> None:
    """Let a node read its first input through DynamicQuantizeLinear and DequantizeLinear, one pair for all readers."""
    value, graph = data_input(node), graph_of(node)
    name, shape = value_name(value), shape_of(value)
    pair = next((reader for reader in users(value) if is_op(reader, "DynamicQuantizeLinear")), None)
    if pair is None:
        integers = make_value(graph, f"{name}_quantized", shape, ir.DataType.UINT8)
        scale = make_value(graph, f"{name}_scale", (), ir.DataType.FLOAT)
        zero_point = make_value(graph, f"{name}_zero_point", (), ir.DataType.UINT8)
        pair = make_node("DynamicQuantizeLinear", [value], [integers, scale, zero_point])
        real = make_value(graph, f"{name}_dequantized", shape, ir.DataType.FLOAT)
        nodes = [pair, make_node("DequantizeLinear", [integers, scale, zero_point], [real])]
        maker = value.producer()
        if maker is not None:
            graph.insert_after(maker, nodes)
        else:
            graph.insert_before(graph[0], nodes)
    dequantize = next(reader for reader in users(pair.outputs[0]) if is_op(reader, "DequantizeLinear"))
    node.replace_input_with(0, dequantize.outputs[0])


def shift_bias(node: ir.Node, shift: np.ndarray) -> None:
    """Add to a float bias, [output channels]; a Conv or Gemm without one gets one."""
    old = const_of(input_of(node, 2))
    bias = shift if old is None else old.reshape(-1) + shift
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    name = f"{node.name}_bias"
    node.replace_input_with(2, add_initializer(graph_of(node), name, bias.astype(np.float32)))
