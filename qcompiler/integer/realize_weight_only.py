"""Fully connected layers with float activations whose weights alone are quantized."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    const_of,
    data_input,
    dtype_of,
    element_count,
    input_of,
    integer,
    is_op,
    nodes_of,
    producer,
    shape_of,
    value_name,
)
from qcompiler.integer import ops
from qcompiler.integer.builder import Builder, real_constant
from qcompiler.quant.arithmetic import WEIGHT_ONLY_COMPUTES, WeightOnlyCompute

COMPUTE_KEY = "qcompiler.weight_only"
"""Metadata of a model: what products with weights in groups multiply, one of `arithmetic.WeightOnlyCompute`."""

WORD = 8
"""Kernels read codes of four bits by the word, so groups are multiples of this."""


@dataclass(frozen=True)
class GroupedWeights:
    """Constants behind a DequantizeLinear, [N, K], and their parameters [N, groups]."""

    array: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    group: int


def compute_of(model: ir.Model) -> WeightOnlyCompute:
    """What the model's products with weights in groups multiply: float32 unless it says int8."""
    noted = model.metadata_props.get(COMPUTE_KEY)
    for compute in WEIGHT_ONLY_COMPUTES:
        if compute == noted:
            return compute
    return "float32"


def realize_weight_only(builder: Builder, model: ir.Model) -> None:
    """Every Gemm (transB = 1) of a float32 matrix by dequantized constants becomes a WeightOnlyGemm.

    What is dequantized by the group for anything else becomes a float constant.
    """
    compute = compute_of(model)
    for node in nodes_of(model.graph, "Gemm"):
        builder.insert_before(node)
        result = _product(builder, node, compute)
        if result is not None:
            _take_place(builder, node, result)
    for node in nodes_of(model.graph, "DequantizeLinear"):
        if integer(node, "block_size", 0) and node.outputs[0].uses() and (array := _dequantized(node)) is not None:
            constant = builder.constant(array, f"{node.outputs[0].name}.real")
            ir.convenience.replace_all_uses_with(node.outputs[0], constant)


def _product(builder: Builder, node: ir.Node, compute: WeightOnlyCompute) -> ir.Value | None:
    x, weights = data_input(node), grouped_weights(input_of(node, 1))
    plain = integer(node, "transB", 0) == 1 and not integer(node, "transA", 0)
    scaled = any(name in node.attributes and node.attributes[name].as_float() != 1 for name in ("alpha", "beta"))
    if weights is None or not plain or scaled or x.dtype != ir.DataType.FLOAT or const_of(x) is not None:
        return None
    outputs, bias = weights.array.shape[0], np.zeros(weights.array.shape[0], np.float32)
    if (given := input_of(node, 2)) is not None:
        found = real_constant(given)
        if found is None or element_count(found.shape) not in (1, outputs):
            return None
        bias = np.broadcast_to(found.reshape(-1), (outputs,)).astype(np.float32)
    name = value_name(node.outputs[0])
    operands = [
        builder.constant(array, f"{name}.{hint}")
        for array, hint in (
            (weights.array, "weights"), (weights.scale, "scales"), (weights.zero_point, "zero_points"), (bias, "bias"),
        )
    ]  # fmt: skip
    op = ops.WeightOnlyGemm(weights.group, compute)
    return builder.operator(op, [x, *operands], shape_of(node.outputs[0]), ir.DataType.FLOAT, f"{name}.product")


def grouped_weights(value: ir.Value | None) -> GroupedWeights | None:
    """The constants [N, K] that `value` dequantizes, with a scale for every so many of a row; None if they are not so.

    One scale per row, or for all, counts as one group. Groups must be whole words, see `WORD`.
    """
    node = producer(value, "DequantizeLinear")
    if node is None or len(shape_of(node.outputs[0])) != 2:
        return None
    array, scale, zero_point = (const_of(input_of(node, index)) for index in range(3))
    given = input_of(node, 2)
    if array is None or scale is None or scale.dtype != np.float32 or (given is not None and zero_point is None):
        return None
    if array.dtype not in (ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8):
        return None
    (outputs, depth), axis = array.shape, integer(node, "axis", 1) % 2
    group = integer(node, "block_size", 0)
    if group:
        if axis != 1 or (group % WORD and group < depth):
            return None
    elif scale.size not in (1, outputs) or (scale.size > 1 and axis != 0):
        return None
    group = min(group or depth, -(-depth // WORD) * WORD)
    scales = np.broadcast_to(scale.reshape(-1, 1) if scale.ndim < 2 else scale, (outputs, -(-depth // group)))
    zeros = np.zeros(scale.shape, np.int8) if zero_point is None else zero_point.astype(np.int16)
    zeros = np.broadcast_to(zeros.reshape(-1, 1) if zeros.ndim < 2 else zeros, scales.shape)
    return GroupedWeights(array, np.ascontiguousarray(scales), zeros.astype(array.dtype), group)


def _dequantized(node: ir.Node) -> np.ndarray | None:
    """The real numbers of constants that are dequantized by the group."""
    array, scale, zero_point = (const_of(input_of(node, index)) for index in range(3))
    if array is None or scale is None or (input_of(node, 2) is not None and zero_point is None):
        return None
    axis, group = integer(node, "axis", 1), integer(node, "block_size")
    places = np.arange(array.shape[axis]) // group
    zeros = np.zeros(scale.shape, np.int32) if zero_point is None else zero_point.astype(np.int32)
    difference = (array.astype(np.int32) - zeros.take(places, axis)).astype(np.float32)
    return (difference * scale.take(places, axis).astype(np.float32)).astype(dtype_of(node.outputs[0]))


def _take_place(builder: Builder, node: ir.Node, result: ir.Value) -> None:
    """Let `result` stand for the node's output, name included."""
    old = node.outputs[0]
    assert is_op(node, "Gemm")
    name, maker = value_name(old), result.producer()
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    builder.graph.remove(node, safe=True)
    assert maker is not None
    old.name = None
    maker.name, result.name = node.name, name
