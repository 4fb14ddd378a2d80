"""Weights of 4, 2 or 1 bits on the CPU, several to a byte, unpacked to int8 when the kernel starts; and 16-bit floats.

Runs of `RUN` weights share the bytes of one run, the first in the lowest bits, the next above them and so on, so that
whole vectors unpack by a shift and no element changes its place among its neighbours. One bit stands for -1 or 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from tvm import tirx

from qcompiler.backends import te
from qcompiler.backends.schedules.loops import open_schedule
from qcompiler.backends.te import Expr
from qcompiler.backends.te_arithmetic import from_bfloat16
from qcompiler.graph import Shape, element_count
from qcompiler.quant.arithmetic import pack_bits

RUN = 64
"""The widest vector register, in bytes."""
_BLOCK = "unpacked"


@dataclass(frozen=True)
class Stored:
    """Weights as a kernel holds them."""

    array: np.ndarray
    """The kernel's parameter."""
    shape: Shape
    bits: int

    def read(self, parameter: te.Tensor) -> te.Tensor:
        """The weights behind the parameter, of their own shape."""
        if self.bits < 8:
            return unpacked(parameter, self.shape, self.bits)
        return widened(parameter) if self.bits == 16 else parameter

    def scheduled(self, function: tirx.PrimFunc, *, threads: int) -> tirx.PrimFunc:
        """The kernel with the unpacking scheduled, if there is any."""
        if self.bits < 8 or self.bits == 16:
            return schedule_unpacking(function, self.shape, threads=threads)
        return function


def store(weights: np.ndarray, bits: int) -> Stored:
    """Weights of so many bits each. Binary ones take two if padding put zeros among them."""
    if bits == 1 and (weights == 0).any():
        bits = 2
    if weights.dtype == ml_dtypes.bfloat16:
        return Stored(weights.view(np.uint16), weights.shape, bits)
    return Stored(pack_runs(weights, bits) if bits < 8 else weights, weights.shape, bits)


def pack_runs(weights: np.ndarray, bits: int) -> np.ndarray:
    """Integers of so many bits, any shape, to uint8 [runs, RUN]; zeros fill up the last runs."""
    per_byte = 8 // bits
    flat = np.zeros(-(-weights.size // (per_byte * RUN)) * per_byte * RUN, np.int8)
    flat[: weights.size] = weights.ravel()
    return pack_bits(flat.reshape(-1, per_byte, RUN).swapaxes(1, 2), bits)[..., 0]


def unpacked(packed: te.Tensor, shape: Sequence[int], bits: int) -> te.Tensor:
    """What `pack_runs` packed, as int8 of `shape`; its own stage, which `schedule_unpacking` vectorizes."""
    per_byte = 8 // bits

    def element(*index: Expr) -> Expr:
        flat: Expr | int = 0
        for position, extent in zip(index, shape, strict=True):
            flat = position + flat * extent
        assert not isinstance(flat, int)
        place = flat // RUN % per_byte
        byte = packed[flat // (per_byte * RUN), flat % RUN].astype("int8")
        # Shifting the code to the top of the byte first extends its sign on the way down.
        up = ((per_byte - 1 - place) * bits).astype("int8")
        code = te.shift_right(te.shift_left(byte, up), te.const(8 - bits, "int8"))
        # A single bit comes down as -1 where it is set and 0 where not.
        return code * te.const(-2, "int8") - te.const(1, "int8") if bits == 1 else code

    return te.compute(shape, element, _BLOCK)


def widened(halves: te.Tensor) -> te.Tensor:
    """float16, or bfloat16 as uint16, as float32; its own stage, too."""

    def element(*index: Expr) -> Expr:
        half = halves[index]
        return from_bfloat16(half) if halves.dtype == "uint16" else half.astype("float32")

    return te.compute(te.shape_of(halves), element, _BLOCK)


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
