"""What the CPU runs beside the integer operators: one table of ONNX operators, and what it cannot run.

Every lowering makes a PrimFunc through TE. Float results agree with onnxruntime to rounding, not bit for bit:
LLVM contracts multiplies and adds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.backends import (
    cpu_dynamic,
    cpu_elementwise,
    float_elementwise,
    float_nn,
    float_recurrent,
    float_reduce,
    movement,
)
from qcompiler.backends.base import HostCode, Lowering
from qcompiler.graph import QCOMPILER_DOMAIN, const_of, input_of, integer, ints, is_op, string
from qcompiler.integer.resize import is_plain_resize

NodeLowering = Callable[[ir.Node, HostCode], Lowering]

LOWERINGS: Mapping[str, NodeLowering] = {
    **float_elementwise.LOWERINGS,
    **float_reduce.LOWERINGS,
    **float_nn.LOWERINGS,
    **float_recurrent.LOWERINGS,
    **movement.LOWERINGS,
    "DequantizeLinear": cpu_elementwise.dequantize_linear,
    "DynamicQuantizeLinear": cpu_dynamic.dynamic_quantize_linear,
    "QuantizeLinear": cpu_elementwise.quantize_linear,
}

_CONSTANT_INPUTS: Mapping[str, tuple[int, ...]] = {
    "BatchNormalization": (1, 2, 3, 4),
    "Clip": (1, 2),
    "CumSum": (1,),
    "OneHot": (1, 2),
    "Pad": (1, 2, 3),
    "QuantizeLinear": (1, 2),
    "Slice": (1, 2, 3, 4),
    "Trilu": (1,),
    **{name: (1,) for name in float_reduce.LOWERINGS if name.startswith("Reduce")},
}
"""Inputs whose values the code is made for."""

_SECOND_OUTPUTS = ("BatchNormalization", "Dropout", "LayerNormalization")
"""Operators of which only the first output is computed."""


@dataclass(frozen=True)
class Unsupported:
    """A node nobody can run."""

    op: str
    node: str
    reason: str


def unsupported(model: ir.Model) -> tuple[Unsupported, ...]:
    """Every node of a model, float or quantized, that no backend can run, in graph order."""
    found: list[Unsupported] = []
    for node in model.graph:
        if node.domain == QCOMPILER_DOMAIN:
            continue
        reason = refusal(node)
        if reason is not None:
            domain = f"{node.domain}." if node.domain not in ("", "ai.onnx") else ""
            found.append(Unsupported(f"{domain}{node.op_type}", node.name or "", reason))
    return tuple(found)


def refusal(node: ir.Node) -> str | None:
    """Why the CPU backend cannot run a standard operator, or None if it can."""
    if not is_op(node, *LOWERINGS):
        return "there is no code for this operator"
    for index in _CONSTANT_INPUTS.get(node.op_type, ()):
        value = input_of(node, index)
        if value is not None and const_of(value) is None:
            return f"its input {index} is not a constant"
    if node.op_type in _SECOND_OUTPUTS and any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return "only its first output is computed"
    return _mode_refusal(node)


def _mode_refusal(node: ir.Node) -> str | None:
    match node.op_type:
        case "LSTM" | "GRU" | "RNN":
            return float_recurrent.refusal(node)
        case "Resize" if not is_plain_resize(node):
            return "only plain resizing of height and width is implemented"
        case "Einsum" if not _plain_equation(string(node, "equation")):
            return "an ellipsis or a repeated letter in its equation is not implemented"
        case "AveragePool" if any(step != 1 for step in ints(node, "dilations", ())):
            return "dilation is not implemented"
        case "Pad" if string(node, "mode", "constant") not in ("constant", "edge", "reflect", "wrap"):
            return "its mode is not implemented"
        case "QuantizeLinear" | "DequantizeLinear" if integer(node, "block_size", 0) and not _is_constant(node):
            return "quantization in blocks is implemented for constants only"
        case "DequantizeLinear" if not cpu_elementwise.is_affine(node):
            return "several scales or zero points computed at run time are not implemented"
    return None


def _is_constant(node: ir.Node) -> bool:
    """A DequantizeLinear of constants: realizing gives it to a product, or computes it."""
    return is_op(node, "DequantizeLinear") and all(const_of(value) is not None for value in node.inputs)


def _plain_equation(equation: str) -> bool:
    inputs, result = float_nn.einsum_letters(equation)
    return "." not in equation and all(len(set(own)) == len(own) for own in [*inputs, result])


def lower_standard(node: ir.Node, host: HostCode) -> Lowering:
    """Lower a node that `refusal` has nothing against."""
    return LOWERINGS[node.op_type](node, host)
