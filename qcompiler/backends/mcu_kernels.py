"""The kernels of a chip without an operating system.

Microcontrollers have templates of their own. A CPU whose dot products have lanes, NEON say, runs the CPU backend's.
"""

from collections.abc import Callable, Mapping

import onnx_ir as ir

from qcompiler.backends import cpu, cpu_conv, hvx_conv, hvx_elementwise, hvx_pool, mcu_conv
from qcompiler.backends.base import HostCode, Kernel, Lowering
from qcompiler.backends.schedules.dot import dot_product
from qcompiler.backends.schedules.hvx import has_hvx
from qcompiler.graph import QCOMPILER_DOMAIN, data_input, dtype_of

_PROBLEMS: Mapping[str, Callable[[ir.Node], cpu_conv.Problem]] = {
    "QConv": cpu_conv.conv_problem,
    "QConvTranspose": cpu_conv.conv_transpose_problem,
    "QGemm": cpu_conv.gemm_problem,
}

_HVX: Mapping[str, Callable[[ir.Node], Kernel | None]] = {
    "QAdd": hvx_elementwise.add,
    "QMul": hvx_elementwise.multiply,
    "QRequantize": hvx_elementwise.requantize,
    "QLookup": hvx_elementwise.lookup,
    "QMaxPool": hvx_pool.max_pool,
    "QAveragePool": hvx_pool.average_pool,
}


def lower_node(node: ir.Node, host: HostCode) -> Lowering:
    """Code for one node. As `cpu.lower_node`."""
    if node.domain == QCOMPILER_DOMAIN and node.op_type in _HVX and has_hvx(host):
        kernel = _HVX[node.op_type](node)
        if kernel is not None:
            return kernel
    if node.domain == QCOMPILER_DOMAIN and node.op_type in _PROBLEMS:
        dtype = dtype_of(data_input(node))
        if dtype.itemsize == 1 and dot_product(host, str(dtype)) is None:
            convolution = hvx_conv.convolution if has_hvx(host) else mcu_conv.convolution
            kernel = convolution(_PROBLEMS[node.op_type](node), data_input(node), host)
            if kernel is not None:
                return kernel
    return cpu.lower_node(node, host)
