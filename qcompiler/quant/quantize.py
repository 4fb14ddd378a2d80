"""Turn a float model and a plan into a standard QDQ model."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    Attribute,
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
from qcompiler.quant.dynamic import quantize_input, shift_bias
from qcompiler.quant.formats import dequantize_array, quantize_array
from qcompiler.quant.operators import MAC_OPS, inherits_format
from qcompiler.quant.qdq import Parameters, insert_pair, quantize_readers
from qcompiler.quant.types import QuantPlan, TensorFormat

_DTYPES = {
    "int1": ir.DataType.INT4,  # ONNX has no type of one bit, and one of two only since opset 25
    "int2": ir.DataType.INT4,
    "int4": ir.DataType.INT4,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int16": ir.DataType.INT16,
    "int32": ir.DataType.INT32,
}


def quantize(model: ir.Model, plan: QuantPlan) -> ir.Model:
    """Apply a plan.

    Args:
        model: the float model the plan was made for; left as it is.
        plan: formats by name.

    Returns:
        A copy in which each planned activation goes through QuantizeLinear and DequantizeLinear, weights are stored
        as integers behind a DequantizeLinear, and biases as int32 behind one. What is quantized at run time goes
        through DynamicQuantizeLinear and DequantizeLinear, and its bias stays float. Operators that stay in float read
        the float tensor where one exists. Names of inputs, outputs and activations are kept.
    """
    result = model.clone()
    graph = result.graph
    nodes = list(graph)
    for node in nodes:
        if node.name not in plan.float_nodes:
            _quantize_constants(node, plan)
    for value in [*graph.inputs, *(value for node in nodes for value in node.outputs)]:
        if value.name in plan.activations:
            _insert_pair(graph, value, plan)
    for node in nodes:
        if node.name in plan.dynamic:
            quantize_input(node)
            if (shift := plan.bias_shifts.get(node.name or "")) is not None:
                shift_bias(node, shift)
    remove_dead(result)
    return result


def _quantize_constants(node: ir.Node, plan: QuantPlan) -> None:
    has_weights = is_op(node, *MAC_OPS)
    bias_format = plan.biases.get(node.name or "")
    if bias_format is not None:
        _quantize_bias(node, bias_format, plan.bias_shifts.get(node.name or ""))
    for index, value in enumerate(node.inputs[: 2 if has_weights else None]):
        fmt = plan.weights.get(value.name or "") if value is not None else None
        array = const_of(value)
        if value is not None and array is not None and fmt is not None:
            narrow = has_weights and not fmt.zero_point.any()
            learned = plan.rounded.get(value_name(value)) if has_weights else None
            nearest = quantize_array(array, fmt, narrow=narrow)
            integers = nearest if learned is None else learned.astype(nearest.dtype)
            node.replace_input_with(index, _stored(node, value_name(value), integers, fmt))


def _quantize_bias(node: ir.Node, fmt: TensorFormat, shift: np.ndarray | None) -> None:
    """Store the bias as int32, corrected by `shift`; a node without bias gets one."""
    old = input_of(node, 2)
    given = const_of(old)
    bias = np.zeros(1) if given is None else given.reshape(-1).astype(np.float64)
    corrected = bias if shift is None else bias + shift
    name = value_name(old) if old is not None else f"{node.name}_bias"
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, _stored(node, name, quantize_array(corrected, fmt), fmt))


def _stored(reader: ir.Node, name: str, integers: np.ndarray, fmt: TensorFormat) -> ir.Value:
    """The output of a DequantizeLinear that stands before `reader` and holds a constant's integers."""
    graph = graph_of(reader)
    tensor = _constant(graph, f"{name}_quantized", integers, fmt)
    output = make_value(graph, f"{name}_dequantized", integers.shape, ir.DataType.FLOAT)
    graph.insert_before(reader, _dequantize(tensor, output, fmt, _parameters(graph, name, fmt)))
    return output


def _constant(graph: ir.Graph, hint: str, integers: np.ndarray, fmt: TensorFormat) -> ir.Value:
    return add_initializer(graph, hint, integers.astype(_DTYPES[fmt.dtype].numpy()))


def _parameters(graph: ir.Graph, name: str, fmt: TensorFormat) -> Sequence[ir.Value]:
    """Scale and zero point; int32 has no zero point, as ONNX wants it."""
    scale = add_initializer(graph, f"{name}_scale", fmt.scale.astype(np.float32))
    if fmt.dtype == "int32":
        return (scale,)
    return scale, _constant(graph, f"{name}_zero_point", fmt.zero_point, fmt)


def _dequantize(source: ir.Value, output: ir.Value, fmt: TensorFormat, parameters: Sequence[ir.Value]) -> ir.Node:
    attributes: dict[str, Attribute] = {"axis": fmt.axis} if fmt.axis is not None else {}
    if fmt.block is not None:
        attributes["block_size"] = fmt.block
    return make_node("DequantizeLinear", [source, *parameters], [output], attributes)


def _insert_pair(graph: ir.Graph, value: ir.Value, plan: QuantPlan) -> None:
    """value → QuantizeLinear → DequantizeLinear → readers."""
    fmt = plan.activations[value_name(value)]
    maker = value.producer()
    exists_in_float = maker is None or maker.name in plan.float_nodes
    readers = [node for node in users(value) if not (exists_in_float and node.name in plan.float_nodes)]
    conversion = plan.conversions.get(value_name(value))
    converting = [node for node in readers if conversion is not None and node.name in conversion.readers]
    # Where the value exists in float both formats are rounded from that, else one from the other.
    direct = [node for node in readers if node not in converting or not exists_in_float]
    parameters = _pair_parameters(graph, value_name(value), fmt)
    made = insert_pair(graph, value, parameters, direct, output=not exists_in_float)
    if conversion is not None and converting:
        name = f"{value_name(value)}_{conversion.format.dtype}"
        source = value if exists_in_float else made
        insert_pair(graph, source, _pair_parameters(graph, name, conversion.format), converting)
    # What is moved has been clamped before; padding may bring in more.
    if fmt.used is not None and (maker is None or not inherits_format(maker) or is_op(maker, "Pad")):
        (quantizer,) = quantize_readers(value)
        _clip(graph, quantizer, fmt)


def _pair_parameters(graph: ir.Graph, name: str, fmt: TensorFormat) -> Parameters:
    scale, zero_point = _parameters(graph, name, fmt)
    return Parameters(_DTYPES[fmt.dtype], scale, zero_point)


def _clip(graph: ir.Graph, quantizer: ir.Node, fmt: TensorFormat) -> None:
    """Keep what a QuantizeLinear reads within the integers the format uses."""
    assert fmt.used is not None
    value = data_input(quantizer)
    name = value_name(value)
    bounds = [
        add_initializer(graph, f"{name}_{end}", dequantize_array(np.array(integer), fmt))
        for end, integer in zip(("low", "high"), fmt.used, strict=True)
    ]
    clipped = make_value(graph, f"{name}_clipped", shape_of(value), ir.DataType.FLOAT)
    graph.insert_before(quantizer, make_node("Clip", [value, *bounds], [clipped]))
    quantizer.replace_input_with(0, clipped)
