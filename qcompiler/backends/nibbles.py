"""4-bit weights on the CPU: stored two to a byte, unpacked to int8 when the kernel starts.

Runs of `RUN` weights share the bytes of one run, the first in the low nibbles and the second in the high ones, so that
whole vectors unpack by a shift and no element changes its place among its neighbours.
"""

from collections.abc import Sequence

import numpy as np
from tvm import tirx

from qcompiler.backends import te
from qcompiler.backends.schedules.loops import open_schedule
from qcompiler.backends.te import Expr
from qcompiler.graph import element_count
from qcompiler.quant.arithmetic import pack_int4

RUN = 64
"""The widest vector register, in bytes."""
_BLOCK = "unpacked"


def pack_runs(weights: np.ndarray) -> np.ndarray:
    """int8 in [-8, 7], any shape, to uint8 [runs, RUN]; zeros fill up the last two runs."""
    flat = np.zeros(-(-weights.size // (2 * RUN)) * 2 * RUN, np.int8)
    flat[: weights.size] = weights.ravel()
    return pack_int4(flat.reshape(-1, 2, RUN).swapaxes(1, 2))[..., 0]


def unpacked(packed: te.Tensor, shape: Sequence[int]) -> te.Tensor:
    """What `pack_runs` packed, as int8 of `shape`; its own stage, which `schedule_unpacking` vectorizes."""

    def element(*index: Expr) -> Expr:
        flat: Expr | int = 0
        for position, extent in zip(index, shape, strict=True):
            flat = position + flat * extent
        assert not isinstance(flat, int)
        in_high_nibble = flat // RUN % 2
        byte = packed[flat // (2 * RUN), flat % RUN].astype("int8")
        # Shifting the low nibble up first extends its sign on the way down.
        return te.shift_right(te.shift_left(byte, ((1 - in_high_nibble) * 4).astype("int8")), te.const(4, "int8"))

    return te.compute(shape, element, _BLOCK)


def schedule_unpacking(function: tirx.PrimFunc, shape: Sequence[int], *, threads: int) -> tirx.PrimFunc:
    """Vectorize the stage `unpacked`, and share it among threads."""
    s = open_schedule(function)
    flat = s.fuse(*s.get_loops(s.get_sblock(_BLOCK)))
    runs, vector = s.split(flat, [None, RUN]) if element_count(shape) % RUN == 0 else (flat, None)
    if vector is not None:
        s.vectorize(vector)
    if threads > 1:
        s.parallel(runs)
    return s.mod["main"]
