"""How much main memory compiled CPU code takes."""

import math
from typing import Any

import numpy as np
from tvm import tirx

from qcompiler.backends.base import host_code
from qcompiler.backends.mcu_functions import STACK_LIMIT, element_bytes, loops_of
from qcompiler.backends.relax import Lowered
from qcompiler.report import HostMemory
from qcompiler.target import Host


def host_memory(lowered: Lowered, host: Host) -> HostMemory:
    """What one inference needs of the host's memory."""
    module: Any = lowered.module
    functions = {
        str(name.name_hint): function
        for name, function in module.functions.items()
        if isinstance(function, tirx.PrimFunc)
    }
    loops: Any = loops_of(functions, host_code(host).target)
    ports = (*lowered.inputs, *lowered.outputs)
    return HostMemory(
        arena=lowered.arena,
        temporaries=max((_allocated(function.body, host.threads) for function in loops.functions.values()), default=0),
        constants=sum(array.nbytes for array in lowered.parameters),
        ports=sum(math.prod(port.shape) * np.dtype(port.dtype).itemsize for port in ports),
    )


def _allocated(statement: Any, threads: int) -> int:
    """Bytes of a kernel's temporaries that do not lie on the stack; those of a parallel loop once for every thread."""
    kind = type(statement)
    if kind is tirx.AllocBuffer:
        size = math.prod(int(dim) for dim in statement.buffer.shape) * element_bytes(str(statement.buffer.dtype))
        return size if size > STACK_LIMIT else 0
    if kind is tirx.SeqStmt:
        return sum(_allocated(part, threads) for part in statement.seq)
    if kind is tirx.For:
        copies = threads if statement.kind == tirx.ForKind.PARALLEL else 1
        return copies * _allocated(statement.body, threads)
    if kind is tirx.IfThenElse:
        branches = (statement.then_case, statement.else_case)
        return max(0 if branch is None else _allocated(branch, threads) for branch in branches)
    return _allocated(statement.body, threads) if kind is tirx.AttrStmt else 0
