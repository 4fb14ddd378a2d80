"""Schedules for microcontrollers: small temporaries, accumulators in core registers."""

from typing import Any

from tvm import tirx

from qcompiler.backends.base import HostCode
from qcompiler.backends.schedules.loops import open_schedule
from qcompiler.backends.schedules.reducing_dot import ReducingDot

_ACCUMULATORS = 64
"""int32 in half of 32 registers of 128 bits."""

_UNROLLED_TAPS = 9
"""Windows of at most so many taps are unrolled."""


def lane_count(extent: int, host: HostCode, *, most: int) -> int:
    """int32 lanes, at most `most`, that divide a loop; 1 without a vector unit."""
    if not {"mve", "v"} & host.features:
        return 1
    return next((lanes for lanes in (16, 8, 4) if lanes <= most and extent % lanes == 0), 1)


def scalar_multiply_lanes(host: HostCode, out_channels: int) -> int:
    """Output channels to a vector where a widening multiply by a scalar is at hand; 1 where it is not."""
    return lane_count(out_channels, host, most=16) if "v" in host.features else 1


def schedule_dot_convolution(
    function: tirx.PrimFunc,
    dot: ReducingDot,
    tile: tuple[int, int],
    host: HostCode,
    *,
    copied: tuple[int, int] | None,
) -> tirx.PrimFunc:
    """Schedule the blocks [staged,] accumulator, total, output of `mcu_conv`.

    A few pixels get all their channels' sums, a tile of pixels times channels at a time in core registers; then the
    output stage runs over the channels, vectorized.

    Args:
        copied: None without the block staged; else the rows of a gathered window and their bytes, or (1, 0).
    """
    pixels, channels = tile
    s = open_schedule(function)
    accumulator, total, output = (s.get_sblock(name) for name in ("accumulator", "total", "output"))
    n, y, x, o = s.get_loops(output)
    row = s.fuse(n, y)
    strip, pixel = s.split(x, [None, pixels])
    s.reorder(row, strip, pixel, o)
    s.compute_at(total, strip, preserve_unit_loops=True)
    at_pixel, at_channel = s.get_loops(total)[-2:]
    block, channel = s.split(at_channel, [None, channels])
    s.reorder(block, at_pixel, channel)
    s.compute_at(accumulator, block, preserve_unit_loops=True)
    at_pixel, at_channel, ky, step, r = s.get_loops(accumulator)[-5:]
    s.reorder(ky, step, at_pixel, at_channel, r)
    s.unroll(at_pixel)
    s.unroll(at_channel)
    if copied is not None:
        staged = s.get_sblock("staged")
        s.compute_at(staged, row, preserve_unit_loops=True)
        if copied[1]:
            s.split(s.get_loops(staged)[-1], [None, *copied])
    init = s.decompose_reduction(accumulator, ky)
    if dot.name is not None:
        s.tensorize(r, dot.name)
    for loop in (*s.get_loops(init)[-2:], *s.get_loops(total)[-2:]):
        s.unroll(loop)
    _vectorize(s, o, lane_count(int(s.get(o).extent), host, most=4))
    return s.mod["main"]


def schedule_lane_convolution(function: tirx.PrimFunc, lanes: int, host: HostCode, *, staged: bool) -> tirx.PrimFunc:
    """A few pixels times one vector of channels accumulate in registers; the output stage follows at once."""
    s = open_schedule(function)
    accumulator, total, output = (s.get_sblock(name) for name in ("accumulator", "total", "output"))
    n, y, x, o = s.get_loops(output)
    row = s.fuse(n, y)
    width = int(s.get(x).extent)
    pixels = next(size for size in (5, 4, 3, 2, 1) if size * lanes <= _ACCUMULATORS and width % size == 0)
    strip, pixel = s.split(x, [None, pixels])
    block, lane = s.split(o, [None, lanes])
    s.reorder(row, strip, block, pixel, lane)
    s.compute_at(total, block, preserve_unit_loops=True)
    s.compute_at(accumulator, block, preserve_unit_loops=True)
    at_pixel, at_lane, ky, r = s.get_loops(accumulator)[-4:]
    s.reorder(ky, r, at_pixel, at_lane)
    s.unroll(at_pixel)
    s.vectorize(at_lane)
    s.vectorize(lane)
    s.unroll(pixel)
    s.vectorize(s.get_loops(total)[-1])
    s.unroll(s.get_loops(total)[-2])
    if staged:
        s.compute_at(s.get_sblock("staged"), row, preserve_unit_loops=True)
    init = s.decompose_reduction(accumulator, ky)
    s.vectorize(s.get_loops(init)[-1])
    s.unroll(s.get_loops(init)[-2])
    return s.mod["main"]


def schedule_depthwise(function: tirx.PrimFunc, host: HostCode, *, staged: bool) -> tirx.PrimFunc:
    """A vector of channels at a time, or one where there are no vectors; small windows are unrolled."""
    s = open_schedule(function)
    accumulator, total, output = (s.get_sblock(name) for name in ("accumulator", "total", "output"))
    n, y, _, o = s.get_loops(output)
    row = s.fuse(n, y)
    lanes = lane_count(int(s.get(o).extent), host, most=16 if "v" in host.features else 8)
    block, lane = s.split(o, [None, lanes])
    s.compute_at(total, block, preserve_unit_loops=True)
    s.compute_at(accumulator, block, preserve_unit_loops=True)
    at_lane, ky, kx = s.get_loops(accumulator)[-3:]
    s.reorder(ky, kx, at_lane)
    taps = int(s.get(ky).extent) * int(s.get(kx).extent)
    if lanes > 1:
        s.vectorize(at_lane)
        s.vectorize(s.get_loops(total)[-1])
        s.vectorize(lane)
    if staged:
        s.compute_at(s.get_sblock("staged"), row, preserve_unit_loops=True)
    init = s.decompose_reduction(accumulator, ky)
    if lanes > 1:
        s.vectorize(s.get_loops(init)[-1])
    if taps <= _UNROLLED_TAPS:
        s.unroll(ky)
        s.unroll(kx)
    return s.mod["main"]


def _vectorize(s: Any, loop: Any, lanes: int) -> None:
    if lanes > 1:
        _, vector = s.split(loop, [None, lanes])
        s.vectorize(vector)
