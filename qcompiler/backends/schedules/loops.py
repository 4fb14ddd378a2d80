"""Schedules of loops without reuse: vectorize the innermost, and spread the outermost over threads."""

import math
from typing import Any

from tvm import tirx
from tvm.s_tir import Schedule

from qcompiler.backends.base import HostCode


def open_schedule(function: tirx.PrimFunc) -> Any:
    """A TVM Schedule, untyped: its annotations take variadic loops for lists."""
    return Schedule(function)


MIN_PARALLEL = 20_000
"""Vector instructions below which waking other threads, some microseconds, gains nothing."""


def threads_for(host: HostCode, operations: float, lanes: int) -> int:
    """Threads for a kernel of so many operations, `lanes` to an instruction."""
    return host.threads if operations / lanes >= MIN_PARALLEL else 1


def vector_length(extent: int, host: HostCode, element_bytes: int) -> int:
    """The longest vector, up to four registers of elements, that divides a loop; 1 if none of 4 or more does."""
    lanes = host.vector_bytes // element_bytes
    return next(
        (width for width in (4 * lanes, 2 * lanes, lanes, lanes // 2, 4) if width >= 4 and extent % width == 0), 1
    )


def vectorize_rows(function: tirx.PrimFunc, host: HostCode, *, element_bytes: int) -> tirx.PrimFunc:
    """Schedule the block "output", whose last loop walks contiguous memory or a broadcast."""
    s = open_schedule(function)
    loops = s.get_loops(s.get_sblock("output"))
    extents = [int(s.get(loop).extent) for loop in loops]
    # Some ten instructions an element: load, rescale, store.
    threads = threads_for(host, 10 * math.prod(extents), host.vector_bytes // element_bytes)
    length = vector_length(extents[-1], host, element_bytes)
    if length > 1:
        *outer, last = loops
        split, vector = s.split(last, [None, length])
        s.vectorize(vector)
        loops = [*outer, split]
    if threads > 1:
        s.parallel(s.fuse(*loops[:-1]) if len(loops) > 1 else loops[0])
    return s.mod["main"]


def schedule_reduction(function: tirx.PrimFunc, *, channels_last: bool) -> tirx.PrimFunc:
    """Schedule the block "accumulator", a reduction over any axes.

    If the input's last axis is kept it becomes the innermost loop, which LLVM vectorizes; otherwise the default order
    already reads contiguous memory.
    """
    s = open_schedule(function)
    accumulator = s.get_sblock("accumulator")
    loops = s.get_loops(accumulator)
    kept = [loop for loop, var in zip(loops, s.get(accumulator).iter_vars, strict=True) if var.iter_type == 0]
    reduced = loops[len(kept) :]
    if channels_last and reduced:
        s.reorder(*reduced, kept[-1])
        s.decompose_reduction(accumulator, reduced[0])
    return s.mod["main"]


def _operations(s: Any) -> int:
    """Steps of the reduction before it is scheduled."""
    return math.prod(int(s.get(loop).extent) for loop in s.get_loops(s.get_sblock("accumulator")))


def schedule_matmul(function: tirx.PrimFunc, host: HostCode) -> tirx.PrimFunc:
    """Rows times columns: a block of rows and one vector of columns accumulate in registers over the reduction."""
    s = open_schedule(function)
    accumulator, output = s.get_sblock("accumulator"), s.get_sblock("output")
    *batch, row, column = s.get_loops(output)
    rows, columns = int(s.get(row).extent), int(s.get(column).extent)
    threads = threads_for(host, _operations(s), host.vector_bytes // 4)
    length = vector_length(columns, host, 4)
    height = next(size for size in (8, 7, 6, 5, 4, 3, 2, 1) if rows % size == 0)
    strip, inner_row = s.split(row, [None, height])
    block, vector = s.split(column, [None, length])
    s.reorder(strip, block, inner_row, vector)
    s.compute_at(accumulator, block, preserve_unit_loops=True)
    at_row, at_lane, k = s.get_loops(accumulator)[-3:]
    s.reorder(k, at_row, at_lane)
    if length > 1:
        s.vectorize(at_lane)
        s.vectorize(vector)
    s.unroll(at_row)
    # Before the reduction is taken apart: of the two blocks that makes, TVM does not see that strips are independent.
    if threads > 1:
        s.parallel(s.fuse(*batch, strip))
    s.decompose_reduction(accumulator, k)
    return s.mod["main"]


def schedule_float_conv(function: tirx.PrimFunc, host: HostCode, *, rank: int) -> tirx.PrimFunc:
    """[N,O,…,W]: a few channels times a vector of neighbours in a row accumulate in registers over the reduction."""
    s = open_schedule(function)
    accumulator, output = s.get_sblock("accumulator"), s.get_sblock("output")
    batch, channel, *rows, last = s.get_loops(output)
    threads = threads_for(host, _operations(s), host.vector_bytes // 4)
    length = vector_length(int(s.get(last).extent), host, 4)
    height = next(size for size in (8, 6, 5, 4, 3, 2, 1) if int(s.get(channel).extent) % size == 0)
    channels, inner_channel = s.split(channel, [None, height])
    columns, vector = s.split(last, [None, length])
    s.reorder(batch, channels, *rows, columns, inner_channel, vector)
    s.compute_at(accumulator, columns, preserve_unit_loops=True)
    inner = s.get_loops(accumulator)[-(rank + rank - 1) :]
    at_channel, at_lane, reduced = inner[1], inner[rank - 1], inner[rank:]
    s.reorder(*reduced, at_channel, at_lane)
    if length > 1:
        s.vectorize(at_lane)
        s.vectorize(vector)
    s.unroll(at_channel)
    if threads > 1:  # before the reduction is taken apart, as above
        s.parallel(s.fuse(batch, channels))
    s.decompose_reduction(accumulator, reduced[0])
    return s.mod["main"]


def schedule_dynamic_quantize(function: tirx.PrimFunc, host: HostCode) -> tirx.PrimFunc:
    """Extremes per lane over strips, "low_lanes" and "high_lanes", and then the block "output" element by element."""
    s = open_schedule(function)
    for name in ("low_lanes", "high_lanes"):
        block = s.get_sblock(name)
        lane, strip = s.get_loops(block)
        s.reorder(strip, lane)
        s.vectorize(lane)
        s.vectorize(s.get_loops(s.decompose_reduction(block, strip))[-1])
    return vectorize_rows(s.mod["main"], host, element_bytes=4)
