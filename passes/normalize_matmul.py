"""One form of fully connected layer: Gemm with transB = 1, weight [N, K] and a bias [N]."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    const_of,
    data_input,
    dtype_of,
    element_count,
    input_of,
    integer,
    real,
    shape_of,
)
from qcompiler.passes.rewriting import (
    Rewrite,
    is_float,
    is_weight,
    map_weight,
    next_in_chain,
    until_settled,
    weight_dequantize,
)


class NormalizeMatMul(ir.passes.InPlacePass):
    """MatMul by a constant matrix, and its Add of a bias, become Gemm(transB = 1); alpha, beta and transA go away.

    Inputs of more than two dimensions pass through a Reshape each way. The weight may be an initializer or
    DequantizeLinear of one; alpha folds into the former only. The bias is constant or DequantizeLinear of int32.
    A Gemm of two run-time matrices becomes MatMul (and Mul and Add), which is what it is.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(
            model, ("MatMul", "Gemm"), lambda node: _from_matmul(node) if node.op_type == "MatMul" else _from_gemm(node)
        )


def bias_vector(rewrite: Rewrite, value: ir.Value, size: int) -> ir.Value | None:
    """`value`, added to something whose last axis has `size` elements, as a bias [size]; None if it is none.

    It may be a constant or DequantizeLinear of an int32 constant; one element is repeated.
    """
    shape = shape_of(value)
    if any(dim != 1 for dim in shape[:-1]) or (shape and shape[-1] not in (1, size)):
        return None
    array = const_of(value)
    if array is not None:
        vector = np.broadcast_to(array.reshape(-1), (size,)).astype(array.dtype)
        return value if shape == (size,) else rewrite.constant(vector, f"{value.name}_bias")
    dequantize = weight_dequantize(value)
    if dequantize is None or dtype_of(data_input(dequantize)) != np.int32:
        return None
    if shape == (size,):
        return value
    per_tensor = element_count(shape_of(data_input(dequantize, 1))) == 1
    if not per_tensor:
        return None
    return map_weight(rewrite, value, lambda q: np.broadcast_to(q.reshape(-1), (size,)).copy(), lambda _: 0)


def _from_matmul(node: ir.Node) -> bool:
    a, b = data_input(node), data_input(node, 1)
    if not is_weight(b) or len(shape_of(b)) != 2 or is_weight(a) or not shape_of(a) or not is_float(a):
        return False
    inner, size = shape_of(b)
    add = next_in_chain(node.outputs[0], "Add")
    rewrite = Rewrite(add or node)
    weight = map_weight(rewrite, b, np.transpose, lambda axis: 1 - axis)
    if weight is None:
        return rewrite.abandon()
    bias = None
    if add is not None:
        other = data_input(add, 1 if data_input(add) is node.outputs[0] else 0)
        bias = bias_vector(rewrite, other, size) if shape_of(add.outputs[0]) == shape_of(node.outputs[0]) else None
        if bias is None:
            rewrite.abandon()
            add, rewrite = None, Rewrite(node)
            weight = map_weight(rewrite, b, np.transpose, lambda axis: 1 - axis)
            assert weight is not None
    rows = rewrite.reshape(a, (element_count(shape_of(a)[:-1]), inner))
    inputs = [rows, weight] if bias is None else [rows, weight, bias]
    product = rewrite.node("Gemm", inputs, {"transB": 1}, layer=node)
    return rewrite.replace(rewrite.reshape(product, shape_of((add or node).outputs[0])))


def _is_normal(node: ir.Node) -> bool:
    bias = input_of(node, 2)
    size = shape_of(node.outputs[0])[1]
    return (
        integer(node, "transB", 0) == 1
        and integer(node, "transA", 0) == 0
        and real(node, "alpha", 1.0) == 1
        and (bias is None or (real(node, "beta", 1.0) == 1 and is_weight(bias) and shape_of(bias) == (size,)))
    )


def _from_gemm(node: ir.Node) -> bool:
    b = data_input(node, 1)
    if is_weight(b) and _is_normal(node):
        return _absorb_bias(node)
    if not is_float(b):
        return False
    alpha = real(node, "alpha", 1.0)
    rewrite = Rewrite(node)
    a = data_input(node)
    if integer(node, "transA", 0):
        a = rewrite.node("Transpose", [a], {"perm": [1, 0]})
    if not is_weight(b):
        b = rewrite.node("Transpose", [b], {"perm": [1, 0]}) if integer(node, "transB", 0) else b
        product = rewrite.node("MatMul", [a, b], layer=node)
        if alpha != 1:
            product = rewrite.node("Mul", [product, rewrite.scalar(alpha, "alpha")])
        return rewrite.replace(_plus_bias(rewrite, node, product))
    if alpha != 1 and const_of(b) is None:
        return rewrite.abandon()
    turned = integer(node, "transB", 0) == 1
    weight = map_weight(rewrite, b, lambda w: w if turned else w.T, lambda axis: axis if turned else 1 - axis)
    if weight is None:
        return rewrite.abandon()
    array = const_of(weight)
    if array is not None and alpha != 1:
        weight = rewrite.constant((array * np.float64(alpha)).astype(array.dtype), f"{b.name}_scaled")
    bias = _scaled_bias(rewrite, node)
    product = rewrite.node("Gemm", [a, weight] if bias is None else [a, weight, bias], {"transB": 1}, layer=node)
    return rewrite.replace(product if bias is not None else _plus_bias(rewrite, node, product))


def _scaled_bias(rewrite: Rewrite, node: ir.Node) -> ir.Value | None:
    """beta * C as a vector, where C is one."""
    c, beta = input_of(node, 2), real(node, "beta", 1.0)
    array = const_of(c)
    if c is None or (array is None and beta != 1):
        return None
    if array is not None and beta != 1:
        c = rewrite.constant((array * np.float64(beta)).astype(array.dtype), f"{c.name}_scaled")
    return bias_vector(rewrite, c, shape_of(node.outputs[0])[1])


def _plus_bias(rewrite: Rewrite, node: ir.Node, product: ir.Value) -> ir.Value:
    """product + beta * C, spelt out."""
    c, beta = input_of(node, 2), real(node, "beta", 1.0)
    if c is None:
        return product
    if beta != 1:
        c = rewrite.node("Mul", [c, rewrite.scalar(beta, "beta")])
    return rewrite.node("Add", [product, c])


def _absorb_bias(node: ir.Node) -> bool:
    """Gemm without bias, Add(DequantizeLinear of int32 or constant) => Gemm with bias."""
    add = next_in_chain(node.outputs[0], "Add")
    if add is None or input_of(node, 2) is not None or shape_of(add.outputs[0]) != shape_of(node.outputs[0]):
        return False
    other = data_input(add, 1 if data_input(add) is node.outputs[0] else 0)
    rewrite = Rewrite(add)
    bias = bias_vector(rewrite, other, shape_of(node.outputs[0])[1])
    if bias is None:
        return rewrite.abandon()
    product = rewrite.node("Gemm", [data_input(node), data_input(node, 1), bias], {"transB": 1}, layer=node)
    return rewrite.replace(product)
