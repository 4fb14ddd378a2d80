"""Fewer forms of arithmetic: constants second, Add and Mul where Sub, Div, Neg, Sum and Pow stood."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import data_input, integer, shape_of, string
from qcompiler.passes.rewriting import Rewrite, constant_operand, is_float, is_quantized, scalar_of, until_settled


class NormalizeArithmetic(ir.passes.InPlacePass):
    """Float operators, outside the quantized part of a QDQ graph:

    x - c => x + (-c); x / c => x * (1/c), not exact in float32 unless c is a power of two (relative error 2^-23);
    -x => x * -1; Sum of n => n - 1 Adds; x ^ 2 => x * x; c + x => x + c; c * x => x * c.
    Everywhere: DepthToSpace and SpaceToDepth => Reshapes and Transposes of at most four dimensions.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("DepthToSpace", "SpaceToDepth", *_ARITHMETIC), _normalize)


_ARITHMETIC = ("Add", "Mul", "Sub", "Div", "Neg", "Sum", "Pow")


def _normalize(node: ir.Node) -> bool:
    if node.op_type == "DepthToSpace":
        return _depth_to_space(node)
    if node.op_type == "SpaceToDepth":
        return _space_to_depth(node)
    if not is_float(node.outputs[0]) or is_quantized(node):
        return False
    match node.op_type:
        case "Neg":
            rewrite = Rewrite(node)
            return rewrite.replace(rewrite.node("Mul", [data_input(node), _like(rewrite, node, -1)], layer=node))
        case "Sum":
            return _sum(node)
        case "Pow":
            x = data_input(node)
            if scalar_of(data_input(node, 1)) != 2 or shape_of(x) != shape_of(node.outputs[0]):
                return False
            rewrite = Rewrite(node)
            return rewrite.replace(rewrite.node("Mul", [x, x], layer=node))
        case _:
            return _binary(node)


def _like(rewrite: Rewrite, node: ir.Node, number: float) -> ir.Value:
    dtype = node.outputs[0].dtype
    assert dtype is not None
    return rewrite.constant(np.array(number, dtype.numpy()), f"{node.name}_constant")


def _binary(node: ir.Node) -> bool:
    operands = constant_operand(node)
    if operands is None:
        return False
    x, constant, index = operands
    if index == 0:
        if node.op_type not in ("Add", "Mul"):
            return False
        rewrite = Rewrite(node)
        return rewrite.replace(rewrite.node(node.op_type, [x, data_input(node)], layer=node))
    if node.op_type == "Sub":
        op_type, other = "Add", -constant
    elif node.op_type == "Div" and bool((constant != 0).all()):
        op_type = "Mul"
        with np.errstate(over="ignore"):  # the reciprocal of a denormal is infinite, and refused below
            other = (1 / constant.astype(np.float64)).astype(constant.dtype)
    else:
        return False
    if not np.isfinite(other).all():
        return False
    rewrite = Rewrite(node)
    return rewrite.replace(rewrite.node(op_type, [x, rewrite.constant(other, f"{node.name}_constant")], layer=node))


def _sum(node: ir.Node) -> bool:
    if len(node.inputs) < 2:
        return False
    rewrite = Rewrite(node)
    total = data_input(node)
    for index in range(1, len(node.inputs)):
        layer = node if index == len(node.inputs) - 1 else None
        total = rewrite.node("Add", [total, data_input(node, index)], layer=layer)
    return rewrite.replace(total)


def _depth_to_space(node: ir.Node) -> bool:
    """Channels last, so that no tensor has more than four dimensions and the outer Transposes cancel in NHWC."""
    batch, channels, height, width = shape_of(data_input(node))
    block = integer(node, "blocksize")
    depth = channels // block**2
    rewrite = Rewrite(node)
    pixels = rewrite.node("Transpose", [data_input(node)], {"perm": (0, 2, 3, 1)})
    if string(node, "mode", "DCR") == "CRD":
        # The block's position runs fastest: bring it to the front, as DCR has it.
        pixels = rewrite.reshape(pixels, (batch * height * width, depth, block * block))
        pixels = rewrite.node("Transpose", [pixels], {"perm": (0, 2, 1)})
    rows = rewrite.reshape(pixels, (batch * height, width, block, block * depth))
    rows = rewrite.node("Transpose", [rows], {"perm": (0, 2, 1, 3)}, layer=node)
    pixels = rewrite.reshape(rows, (batch, height * block, width * block, depth))
    return rewrite.replace(rewrite.node("Transpose", [pixels], {"perm": (0, 3, 1, 2)}))


def _space_to_depth(node: ir.Node) -> bool:
    """As `_depth_to_space`, backwards."""
    batch, channels, height, width = shape_of(data_input(node))
    block = integer(node, "blocksize")
    rewrite = Rewrite(node)
    pixels = rewrite.node("Transpose", [data_input(node)], {"perm": (0, 2, 3, 1)})
    rows = rewrite.reshape(pixels, (batch * height // block, block, width // block, block * channels))
    rows = rewrite.node("Transpose", [rows], {"perm": (0, 2, 1, 3)}, layer=node)
    pixels = rewrite.reshape(rows, (batch, height // block, width // block, block * block * channels))
    return rewrite.replace(rewrite.node("Transpose", [pixels], {"perm": (0, 3, 1, 2)}))
