"""The kernels a microcontroller runs: the CPU backend's, their temporaries kept small."""

import onnx_ir as ir

from qcompiler.backends import cpu
from qcompiler.backends.base import HostCode, Lowering


def lower_node(node: ir.Node, host: HostCode) -> Lowering:
    """Code for one node. As `cpu.lower_node`."""
    lowering = cpu.lower_node(node, host)
    return lowering
