"""Rewrite onnxruntime's fused float operators (com.microsoft) as the standard operators they stand for."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompiler import graph as g
from qcompiler.errors import QCompilerError
from qcompiler.passes.rewrite_qlinear import FLOAT, MICROSOFT, QdqBuilder

_CONV = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
_GEMM = ("alpha", "beta", "transA", "transB")

_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
}
"""Standard activations with the names of their parameters, in the order of `activation_params`."""


def _activate(b: QdqBuilder, x: ir.Value, name: str, parameters: tuple[float, ...]) -> ir.Value:
    if name in _ACTIVATIONS:
        return b.emit(name, [x], FLOAT, dict(zip(_ACTIVATIONS[name], parameters, strict=False)))
    if name == "Clip" and len(parameters) == 2:
        low, high = (b.constant(hint, np.array(p, np.float32)) for hint, p in zip("lh", parameters, strict=True))
        return b.emit("Clip", [x, low, high], FLOAT)
    raise QCompilerError(
        f"node {b.node.name!r} ({b.node.op_type}) has the fused activation {name!r}, which is not known; "
        "export the model without onnxruntime's graph optimizations"
    )


def _fused_conv(node: ir.Node) -> None:
    """FusedConv: Conv, then an optional residual Z, then the activation."""
    b = QdqBuilder(node)
    attributes = {name: node.attributes[name].value for name in _CONV if name in node.attributes}
    y = b.emit("Conv", list(node.inputs[:3]), FLOAT, attributes)
    residual = g.input_of(node, 3)
    if residual is not None:
        y = b.emit("Add", [y, residual], FLOAT)
    if "activation" in node.attributes:
        parameters = node.attributes.get("activation_params")
        y = _activate(b, y, g.string(node, "activation"), () if parameters is None else tuple(parameters.as_floats()))
    b.finish(y)


def _fused_gemm(node: ir.Node) -> None:
    b = QdqBuilder(node)
    attributes = {name: node.attributes[name].value for name in _GEMM if name in node.attributes}
    y = b.emit("Gemm", list(node.inputs), FLOAT, attributes)
    if "activation" in node.attributes:
        names = ("activation_alpha", "activation_beta")
        parameters = tuple(g.real(node, name) for name in names if name in node.attributes)
        y = _activate(b, y, g.string(node, "activation"), parameters)
    b.finish(y)


def _gelu(approximate: str) -> Callable[[ir.Node], None]:
    """Gelu, BiasGelu and FastGelu: an optional bias, then Gelu."""

    def rewrite(node: ir.Node) -> None:
        b = QdqBuilder(node)
        x, bias = g.data_input(node), g.input_of(node, 1)
        if bias is not None:
            x = b.emit("Add", [x, bias], FLOAT)
        b.finish(b.emit("Gelu", [x], FLOAT, {"approximate": approximate}))

    return rewrite


def _quick_gelu(node: ir.Node) -> None:
    """x * sigmoid(alpha * x)."""
    b = QdqBuilder(node)
    x = g.data_input(node)
    alpha = b.constant("alpha", np.array(g.real(node, "alpha", 1.702), np.float32))
    b.finish(b.emit("Mul", [x, b.emit("Sigmoid", [b.emit("Mul", [x, alpha], FLOAT)], FLOAT)], FLOAT))


REWRITES: tuple[tuple[str, Callable[[ir.Node], None]], ...] = (
    ("FusedConv", _fused_conv),
    ("FusedGemm", _fused_gemm),
    ("Gelu", _gelu("none")),
    ("BiasGelu", _gelu("none")),
    ("FastGelu", _gelu("tanh")),
    ("QuickGelu", _quick_gelu),
)


class RewriteFusedOps(ir.passes.InPlacePass):
    """com.microsoft FusedConv, FusedGemm and the Gelu family  ⇒  the standard operators of opset 21. Needs no shapes.

    Raises:
        QCompilerError: an unknown fused activation.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        table = dict(REWRITES)
        found = [node for node in model.graph if node.domain == MICROSOFT and node.op_type in table]
        for node in found:
            table[node.op_type](node)
        return ir.passes.PassResult(model, modified=bool(found))
