"""Make the integer graph out of a QDQ graph.

The walk goes over the QuantizeLinear nodes. What stands before each one, back to the DequantizeLinear nodes it reads,
becomes integer operators whose result takes the QuantizeLinear's place and name:

- nothing, or data movement, in the same format: the integers themselves, moved;
- the same in another format: QRequantize;
- elementwise operators on one tensor: QLookup;
- an operator of `_FAMILIES`, then Relu and Clip: that operator, the activations in its clamp.

Before, products of tensors that a DynamicQuantizeLinear quantizes become operators with float results.
Whatever matches nothing keeps its float operators between DequantizeLinear and QuantizeLinear. Spatial
operators get NHWC maps through Transposes, which the layout passes cancel. An integer value keeps the name that
its QuantizeLinear gave it; the NHWC result under it is called NAME.nhwc.
"""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    QCOMPILER_DOMAIN,
    const_of,
    data_input,
    input_of,
    is_op,
    nodes_of,
    producer,
    remove_dead,
    shape_of,
    users,
    value_name,
)
from qcompiler.integer.builder import Builder, Format, Output, format_of, real_constant
from qcompiler.integer.formats import record, record_moved
from qcompiler.integer.ops import DOMAIN_VERSION, QRoundHalf
from qcompiler.integer.realize_dynamic import realize_dynamic
from qcompiler.integer.realize_elementwise import add, lookup, mul
from qcompiler.integer.realize_movement import Forms, arg_max, concat
from qcompiler.integer.realize_pools import average_pool, clamped_max_pool, reduce_mean, resize_linear, softmax
from qcompiler.integer.realize_products import conv, conv_transpose, gemm, matmul, matmul_and_bias
from qcompiler.integer.realize_weight_only import realize_weight_only
from qcompiler.target import Target

_Family = Callable[[Builder, Forms, ir.Node, Output], ir.Value | None]

_FAMILIES: Mapping[str, tuple[_Family, ...]] = {
    "Conv": (conv,),
    "ConvTranspose": (conv_transpose,),
    "Gemm": (gemm,),
    "MatMul": (matmul,),
    "Add": (matmul_and_bias, add),
    "Sub": (add,),
    "Mul": (mul,),
    "Div": (mul,),
    "AveragePool": (average_pool,),
    "GlobalAveragePool": (average_pool,),
    "ReduceMean": (reduce_mean,),
    "Softmax": (softmax,),
    "Resize": (resize_linear,),
    "Concat": (concat,),
}
"""What realizes an operator; the first that does not answer None."""

_ACTIVATIONS = ("Relu", "Clip")


def realize(model: ir.Model, target: Target) -> ir.Model:
    """The integer graph of a QDQ model; the model itself is left alone.

    Args:
        model: QDQ, NCHW, static shapes, as `quantize` makes and the importer accepts.
        target: its requantize variant encodes the rescale factors.

    Raises:
        QCompilerError: a scale that the target's requantize variant cannot represent.
    """
    model = model.clone()
    model.opset_imports[QCOMPILER_DOMAIN] = DOMAIN_VERSION
    quantization = target.quantization
    weights = quantization.weights
    builder = Builder(model.graph, quantization.requantize, weights.dtypes, weights.group_multiple)
    forms = Forms(builder)
    for node in nodes_of(model.graph, "Conv", "Gemm", "MatMul"):
        builder.insert_before(node)
        found = realize_dynamic(builder, node)
        if found is not None:
            _take_place(builder, found.old.producer() or node, found.new)
    for node in nodes_of(model.graph, "QuantizeLinear", "ArgMax"):
        builder.insert_before(node)
        result = _quantize(builder, forms, node) if is_op(node, "QuantizeLinear") else arg_max(builder, forms, node)
        if result is not None:
            fmt = format_of(node) if is_op(node, "QuantizeLinear") else None
            _take_place(builder, node, result)
            if fmt is not None:
                record(result, fmt.scale, fmt.zero_point)
    for node in nodes_of(model.graph, "Gemm"):
        builder.insert_before(node)
        found = realize_dynamic(builder, node, known=True)
        if found is not None:
            _take_place(builder, found.old.producer() or node, found.new)
    realize_weight_only(builder, model)
    for node in nodes_of(model.graph, "Cast"):
        builder.insert_before(node)
        rounded = _round_half(builder, node)
        if rounded is not None:
            _take_place(builder, node, rounded)
    remove_dead(model)
    record_moved(model.graph)
    return model


def _round_half(builder: Builder, node: ir.Node) -> ir.Value | None:
    """A Cast to 16-bit floats and this one back, as one operator."""
    narrow = producer(data_input(node), "Cast")
    if narrow is None or {data_input(narrow).dtype, node.outputs[0].dtype} != {ir.DataType.FLOAT}:
        return None
    dtype, value = data_input(node).dtype, node.outputs[0]
    if dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return None
    half = "float16" if dtype == ir.DataType.FLOAT16 else "bfloat16"
    return builder.operator(
        QRoundHalf(half), [data_input(narrow)], shape_of(value), ir.DataType.FLOAT, value_name(value)
    )


def _quantize(builder: Builder, forms: Forms, node: ir.Node) -> ir.Value | None:
    """The integers a QuantizeLinear makes, or None if it must stay."""
    fmt = format_of(node)
    if fmt is None:
        return None
    value, name = data_input(node), value_name(node.outputs[0])
    out = Output(fmt, fmt.limits, shape_of(value), name)
    constant = const_of(value)
    if constant is not None:
        return builder.constant(fmt.quantize(constant), name)
    form = forms.of(value)
    if form is not None:
        return forms.convert(form, out)
    source, clamped = _strip_activations(value, out)
    pool = producer(source, "MaxPool", "GlobalMaxPool")
    if pool is not None and (result := clamped_max_pool(builder, forms, pool, clamped)) is not None:
        return result
    form = forms.of(source)
    if form is not None:
        return forms.convert(form, clamped)
    result = lookup(builder, forms, value, out)
    if result is not None:
        return result
    made_by = source.producer()
    if made_by is None or not is_op(made_by, *_FAMILIES) or not _only_quantized(source):
        return None
    for family in _FAMILIES[made_by.op_type]:
        result = family(builder, forms, made_by, clamped)
        if result is not None:
            return result
    return None


def _strip_activations(value: ir.Value, out: Output) -> tuple[ir.Value, Output]:
    """What the Relu and Clip nodes before `value` read, and `out` with their bounds in its clamp."""
    source, clamp = value, out.clamp
    while (node := producer(source, *_ACTIVATIONS)) is not None:
        bounds = _bounds(node, out.format)
        if bounds is None:
            break
        # Quantizing is monotone, so it commutes with the clamp.
        clamp = (int(np.clip(bounds[0], *clamp)), int(np.clip(bounds[1], *clamp)))
        source = data_input(node)
    return source, Output(out.format, clamp, out.shape, out.name)


def _bounds(node: ir.Node, fmt: Format) -> tuple[int, int] | None:
    """The integers a Relu or Clip keeps its output between."""
    if node.op_type == "Relu":
        return fmt.zero_point, fmt.limits[1]
    found: list[int] = []
    for index, limit in ((1, fmt.limits[0]), (2, fmt.limits[1])):
        value = input_of(node, index)
        real = real_constant(value)
        if value is not None and (real is None or real.size != 1):
            return None
        found.append(limit if real is None else int(fmt.quantize(real.reshape(()))))
    return min(found), found[1]


def _only_quantized(value: ir.Value) -> bool:
    """Whether nobody needs the float result: computing it in integers as well would do the work twice."""
    return not value.is_graph_output() and all(
        is_op(user, "QuantizeLinear") or (is_op(user, *_ACTIVATIONS) and _only_quantized(user.outputs[0]))
        for user in users(value)
    )


def _take_place(builder: Builder, node: ir.Node, result: ir.Value) -> None:
    """Let `result` stand for the node's output, under its name where `result` was made for it."""
    old = node.outputs[0]
    name, is_output = value_name(old), old.is_graph_output()
    shared = result.producer() is None or result.is_graph_output() or bool(result.uses())
    if is_output and shared:
        result = builder.standard("Identity", [result], name)[0]
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    builder.graph.remove(node, safe=True)
    made_by = result.producer()
    if made_by is not None and (is_output or not shared):
        old.name = None
        made_by.name = result.name = name
