"""Which backend drives which accelerator: by what its spec says it is, never by its name."""

import onnx_ir as ir

from qcompiler.backends import gpu, npu
from qcompiler.target import AcceleratorName, Gpu, Target


def can_run(node: ir.Node, accelerator: AcceleratorName, target: Target) -> str | None:
    """Why the backend of an accelerator cannot run a node that a rule takes, or None if it can."""
    if isinstance(target.accelerators[accelerator], Gpu):
        return gpu.can_run(node, target)
    return npu.can_run(node, target.alone(accelerator))
