"""Which function lowers which operator for the CPU."""

from collections.abc import Callable, Mapping

import onnx_ir as ir

from qcompiler.backends import cpu_conv
from qcompiler.backends.base import HostCode, Lowering

NodeLowering = Callable[[ir.Node, HostCode], Lowering]

_INTEGER: Mapping[str, NodeLowering] = {
    "QConv": cpu_conv.conv,
    "QConvTranspose": cpu_conv.conv_transpose,
    "QGemm": cpu_conv.gemm,
}


def lower_node(node: ir.Node, host: HostCode) -> Lowering:
    return _INTEGER[node.op_type](node, host)
