"""Which function lowers which operator for the CPU."""

from collections.abc import Mapping

import onnx_ir as ir

from qcompiler.backends import cpu_conv, cpu_dynamic, cpu_elementwise, cpu_matmul, cpu_pool, cpu_weight_only
from qcompiler.backends.base import HostCode, Lowering
from qcompiler.backends.float_ops import NodeLowering, lower_standard
from qcompiler.graph import QCOMPILER_DOMAIN

_INTEGER: Mapping[str, NodeLowering] = {
    "QConv": cpu_conv.lower,
    "QConvTranspose": cpu_conv.lower,
    "QGemm": cpu_conv.lower,
    "QMatMul": cpu_matmul.matmul,
    "QAdd": cpu_elementwise.add,
    "QMul": cpu_elementwise.multiply,
    "QRequantize": cpu_elementwise.requantize,
    "QLookup": cpu_elementwise.lookup,
    "QSoftmax": cpu_elementwise.softmax,
    "QMaxPool": cpu_pool.max_pool,
    "QAveragePool": cpu_pool.average_pool,
    "QReduceMean": cpu_pool.reduce_mean,
    "QResizeNearest": cpu_pool.resize_nearest,
    "QResizeLinear": cpu_pool.resize_linear,
    "QRoundHalf": cpu_elementwise.round_half,
    "QConvDynamic": cpu_dynamic.conv,
    "QGemmDynamic": cpu_dynamic.gemm,
    "WeightOnlyGemm": cpu_weight_only.weight_only_gemm,
}


def lower_node(node: ir.Node, host: HostCode) -> Lowering:
    """Code for one node; `float_ops.refusal` must have nothing against a standard one."""
    if node.domain == QCOMPILER_DOMAIN:
        return _INTEGER[node.op_type](node, host)
    return lower_standard(node, host)
