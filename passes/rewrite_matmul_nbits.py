"""Rewrite onnxruntime's MatMulNBits as a product with weights that are dequantized in blocks, and the other way."""

import numpy as np
import onnx_ir as ir

from qcompiler import graph as g
from qcompiler.errors import QCompilerError
from qcompiler.integer.realize_weight_only import COMPUTE_KEY, compute_of, grouped_weights
from qcompiler.passes.rewrite_qlinear import FLOAT, MICROSOFT, QdqBuilder
from qcompiler.passes.rewriting import until_settled

OP_TYPE = "MatMulNBits"
INT8_LEVEL, FLOAT_LEVEL = 4, 1
"""Accuracy levels: the least precise form that activations may take inside."""
_STORED = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
_LEAST_BLOCK = 16
"""onnxruntime takes powers of two from here on."""


class RewriteMatMulNBits(ir.passes.InPlacePass):
    """com.microsoft MatMulNBits  ⇒  DequantizeLinear(block_size) → MatMul (→ Add). Needs no shapes.

    Products then round activations to int8 where every MatMulNBits of the model allows that (accuracy level 4), which
    the model's metadata notes.

    Raises:
        QCompilerError: weights that are computed at run time, permuted (g_idx), or of other than 4 or 8 bits; zero
            points that are not whole numbers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [node for node in model.graph if node.domain == MICROSOFT and node.op_type == OP_TYPE]
        if found:
            levels = [g.integer(node, "accuracy_level", 0) for node in found]
            model.metadata_props[COMPUTE_KEY] = "int8" if min(levels) >= INT8_LEVEL else "float32"
        for node in found:
            _import(node)
        return ir.passes.PassResult(model, modified=bool(found))


def _import(node: ir.Node) -> None:
    def refuse(reason: str) -> QCompilerError:
        return QCompilerError(f"node {node.name!r} (MatMulNBits) {reason}")

    b = QdqBuilder(node)
    depth, outputs = g.integer(node, "K"), g.integer(node, "N")
    bits, block = g.integer(node, "bits", 4), g.integer(node, "block_size")
    if bits not in _STORED:
        raise refuse(f"has weights of {bits} bits; 4 and 8 can be compiled, so quantize the model to one of these")
    if g.input_of(node, 4) is not None:
        raise refuse(
            "takes its inputs in another order (g_idx), which would gather activations in every run; quantize the "
            "model without activation reordering"
        )
    packed, scale = g.const_of(g.data_input(node, 1)), g.const_of(g.data_input(node, 2))
    zeros_given = g.input_of(node, 3)
    zeros = g.const_of(zeros_given)
    if packed is None or scale is None or (zeros_given is not None and zeros is None):
        raise refuse("computes its weights at run time; only constant ones can be compiled")
    groups = -(-depth // block)
    codes = _unpack(packed.reshape(outputs, -1), bits)[:, :depth]
    if zeros is None:
        zero_points = np.full((outputs, groups), 1 << (bits - 1), np.uint8)
    elif zeros.dtype == np.uint8:
        zero_points = _unpack(zeros.reshape(outputs, -1), bits)[:, :groups]
    elif (zeros == np.rint(zeros)).all() and zeros.min() >= 0 and zeros.max() < 1 << bits:
        zero_points = zeros.reshape(outputs, groups).astype(np.uint8)
    else:
        raise refuse("has zero points that are not whole numbers; quantize the model with integer zero points")
    dtype = _STORED[bits].numpy()
    weights = b.constant("weights", np.ascontiguousarray(codes.T).astype(dtype))
    scales = b.constant("scales", np.ascontiguousarray(scale.reshape(outputs, groups).T.astype(np.float32)))
    zero_value = b.constant("zero_points", np.ascontiguousarray(zero_points.T).astype(dtype))
    parameters: list[ir.Value | None] = [weights, scales, zero_value]
    real = b.emit("DequantizeLinear", parameters, FLOAT, {"axis": 0, "block_size": block})
    product = b.emit("MatMul", [g.data_input(node), real], FLOAT)
    bias = g.input_of(node, 5)
    b.finish(product if bias is None else b.emit("Add", [product, bias], FLOAT))


class ExportMatMulNBits(ir.passes.InPlacePass):
    """Gemm (transB = 1) by DequantizeLinear(block_size) of constants  ⇒  com.microsoft MatMulNBits.

    Left alone: blocks that onnxruntime does not take (powers of two from 16), and activations that are dequantized
    themselves, whose product onnxruntime fuses another way.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        level = INT8_LEVEL if compute_of(model) == "int8" else FLOAT_LEVEL
        result = until_settled(model, ("Gemm",), lambda node: _export(node, level))
        if result.modified:
            model.graph.opset_imports[MICROSOFT] = 1
        return result


def _export(node: ir.Node, level: int) -> bool:
    maker = g.producer(g.data_input(node, 1), "DequantizeLinear")
    weights = grouped_weights(g.input_of(node, 1))
    if maker is None or weights is None or not g.integer(maker, "block_size", 0) or not g.integer(node, "transB", 0):
        return False
    block, (outputs, depth) = g.integer(maker, "block_size"), weights.array.shape
    if block < _LEAST_BLOCK or block & (block - 1) or g.producer(g.data_input(node), "DequantizeLinear") is not None:
        return False
    graph, name = g.graph_of(node), node.name or node.outputs[0].name or OP_TYPE
    bits = 4 if weights.array.dtype.itemsize == 1 and str(weights.array.dtype).endswith("int4") else 8
    middle = 0 if str(weights.array.dtype).startswith("u") else 1 << (bits - 1)
    codes = np.full((outputs, -(-depth // block) * block), 1 << (bits - 1), np.uint8)
    codes[:, :depth] = weights.array.astype(np.int16) + middle
    zeros = (weights.zero_point.astype(np.int16) + middle).astype(np.uint8)
    inputs: list[ir.Value | None] = [
        g.data_input(node),
        g.add_initializer(graph, f"{name}_codes", _pack(codes, bits).reshape(outputs, weights.scale.shape[1], -1)),
        g.add_initializer(graph, f"{name}_scales", weights.scale),
    ]
    bias = g.input_of(node, 2)
    if (zeros != 1 << (bits - 1)).any() or bias is not None:
        inputs.append(g.add_initializer(graph, f"{name}_zero_points", _pack(zeros, bits)))
    if bias is not None:
        inputs += [None, bias]
    attributes: dict[str, g.Attribute] = {
        "K": depth, "N": outputs, "bits": bits, "block_size": block, "accuracy_level": level,
    }  # fmt: skip
    old = node.outputs[0]
    output = g.make_value(graph, f"{name}_product", g.shape_of(old), ir.DataType.FLOAT)
    g.replace_node(node, [g.make_node(OP_TYPE, inputs, [output], attributes, domain=MICROSOFT, name=name)], [output])
    return True


def _unpack(rows: np.ndarray, bits: int) -> np.ndarray:
    """Codes of uint8 rows, for 4 bits the low nibble of a byte first."""
    return rows if bits == 8 else np.stack([rows & 15, rows >> 4], axis=-1).reshape(len(rows), -1)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_unpack`; a row of odd length ends in a zero nibble."""
    if bits == 8:
        return codes
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return even[:, ::2] | even[:, 1::2] << 4
