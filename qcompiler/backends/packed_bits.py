"""Weights of 4, 2 or 1 bits on the CPU, several to a byte, unpacked to int8 when the kernel starts; and 16-bit floats.

Runs of `RUN` weights share the bytes of one run, the first in the lowest bits, the next above them and so on, so that
whole vectors unpack by a shift and no element changes its place among its neighbours. One bit stands for -1 or 1.

Weights in groups are such codes, and a factor for each group that they are multiplied by as they are unpacked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from tvm import tirx

from qcompiler.backends import te
from qcompiler.backends.schedules.loops import open_schedule
from qcompiler.backends.te import Expr
from qcompiler.backends.te_arithmetic import from_bfloat16
from qcompiler.graph import Shape, element_count
from qcompiler.integer.weight_groups import Groups
from qcompiler.quant.arithmetic import pack_bits, split_codes, spread_groups

RUN = 64
"""The widest vector register, in bytes."""
_BLOCK = "unpacked"


@dataclass(frozen=True)
class Factors:
    """What codes are multiplied by, [..., quads, lanes..., quad] of them: one for so many quads of each lane."""

    shape: Shape
    """Of the factors: [..., groups, lanes...]."""
    axis: int
    """Of the quads, and of the groups."""
    quads: int
    """That share a factor."""
    bits: int
    """Of a stored factor: 4, which then hold the factor less `_LEAST`, or 8."""

    def read(self, parameter: te.Tensor) -> te.Tensor:
        return unpacked(parameter, self.shape, 4, "factors") if self.bits == 4 else parameter


_LEAST = 9
"""What is taken off factors from 1 to 16, so that they are signed integers of 4 bits."""


@dataclass(frozen=True)
class Stored:
    """Weights as a kernel holds them."""

    arrays: tuple[np.ndarray, ...]
    """The kernel's parameters: the weights, and factors if there are any."""
    shape: Shape
    bits: int
    factors: Factors | None = None

    def read(self, parameters: Sequence[te.Tensor]) -> tuple[te.Tensor, Sequence[te.Tensor]]:
        """The weights behind the first parameters, of their own shape; and the other parameters."""
        own, others = parameters[: len(self.arrays)], parameters[len(self.arrays) :]
        if self.factors is not None:
            codes, factors = own
            return scaled(codes, self.factors.read(factors), self.shape, self.bits, self.factors), others
        (held,) = own
        if self.bits < 8:
            return unpacked(held, self.shape, self.bits), others
        return widened(held) if self.bits == 16 else held, others

    def scheduled(self, function: tirx.PrimFunc, *, threads: int) -> tirx.PrimFunc:
        """The kernel with the unpacking scheduled, if there is any."""
        if self.bits < 8 or self.bits == 16:
            # Along more than the lanes of one quad, factors would not lie side by side.
            vector = RUN if self.factors is None else element_count(self.shape[self.factors.axis + 1 :])
            return schedule_unpacking(function, self.shape, vector, threads=threads)
        return function


def store(weights: np.ndarray, bits: int) -> Stored:
    """Weights of so many bits each. Binary ones take two if padding put zeros among them."""
    if bits == 1 and (weights == 0).any():
        bits = 2
    if weights.dtype == ml_dtypes.bfloat16:
        return Stored((weights.view(np.uint16),), weights.shape, bits)
    return Stored((pack_runs(weights, bits) if bits < 8 else weights,), weights.shape, bits)


def store_packed(
    weights: np.ndarray, bits: int, groups: Groups | None, pack: Callable[[np.ndarray], np.ndarray], axis: int
) -> Stored:
    """Weights laid out by `pack`, as codes and factors where they share factors in groups of their last axis.

    Args:
        weights: [O, KH, KW, depth], int8 if in groups.
        bits: as of `store`, of weights that are not in groups.
        groups: how they share factors, if they do.
        pack: lays weights out as [..., quads, lanes..., quad], a quad being neighbours along the depth, within a group.
        axis: of the quads.
    """
    if groups is None:
        return store(pack(weights), bits)
    codes, factors = split_codes(weights, groups.size, weights.ndim - 1, groups.bits)
    spread = spread_groups(factors, weights.shape[-1], groups.size, -1).astype(np.int8)
    laid_out = pack(codes)
    quads = groups.size // laid_out.shape[-1]
    assert quads * laid_out.shape[-1] == groups.size, f"groups of {groups.size} divide quads of {laid_out.shape[-1]}"
    first = pack(spread)[..., 0].take(np.arange(0, laid_out.shape[axis], quads), axis)
    held = pack_runs(first - _LEAST, 4) if groups.factor_bits == 4 else first
    form = Factors(first.shape, axis, quads, groups.factor_bits)
    stored = store(laid_out, groups.bits)
    return Stored((*stored.arrays, held), stored.shape, stored.bits, form)


def pack_runs(weights: np.ndarray, bits: int) -> np.ndarray:
    """Integers of so many bits, any shape, to uint8 [runs, RUN]; zeros fill up the last runs."""
    per_byte = 8 // bits
    flat = np.zeros(-(-weights.size // (per_byte * RUN)) * per_byte * RUN, np.int8)
    flat[: weights.size] = weights.ravel()
    return pack_bits(flat.reshape(-1, per_byte, RUN).swapaxes(1, 2), bits)[..., 0]


def unpacked(packed: te.Tensor, shape: Sequence[int], bits: int, name: str = _BLOCK) -> te.Tensor:
    """What `pack_runs` packed, as int8 of `shape`; its own stage, which `schedule_unpacking` vectorizes."""
    return te.compute(shape, _code(packed, shape, bits), name)


def scaled(codes: te.Tensor, factors: te.Tensor, shape: Sequence[int], bits: int, form: Factors) -> te.Tensor:
    """Codes that `pack_runs` packed times their factors, as int8 of `shape`."""
    code, least = _code(codes, shape, bits), _LEAST if form.bits == 4 else 0
    # Spread over quads a vector of factors lies like one of codes.
    wide = te.compute((*form.shape, shape[-1]), lambda *index: factors[index[:-1]] + te.const(least, "int8"), "spread")

    def element(*index: Expr) -> Expr:
        before, quad, after = index[: form.axis], index[form.axis], index[form.axis + 1 :]
        return code(*index) * wide[(*before, quad // form.quads, *after)]

    return te.compute(shape, element, _BLOCK)


def _code(packed: te.Tensor, shape: Sequence[int], bits: int) -> Callable[..., Expr]:
    """What `pack_runs` packed, at a place in `shape`."""
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

    return element


def widened(halves: te.Tensor) -> te.Tensor:
    """float16, or bfloat16 as uint16, as float32; its own stage, too."""

    def element(*index: Expr) -> Expr:
        half = halves[index]
        return from_bfloat16(half) if halves.dtype == "uint16" else half.astype("float32")

    return te.compute(te.shape_of(halves), element, _BLOCK)


def schedule_unpacking(function: tirx.PrimFunc, shape: Sequence[int], length: int, *, threads: int) -> tirx.PrimFunc:
    """Vectorize the stage `unpacked` by so many elements, which divide `RUN`, and share it among threads."""
    s = open_schedule(function)
    flat = s.fuse(*s.get_loops(s.get_sblock(_BLOCK)))
    runs, vector = s.split(flat, [None, length]) if element_count(shape) % length == 0 else (flat, None)
    if vector is not None:
        s.vectorize(vector)
    if threads > 1:
        s.parallel(runs)
    return s.mod["main"]
