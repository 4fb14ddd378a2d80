"""Schedules of the two convolution templates of `backends/cpu_conv.py`."""

from typing import Any

from tvm import tirx

from qcompiler.backends.schedules.dot import DotProduct
from qcompiler.backends.schedules.loops import open_schedule
from qcompiler.backends.tiles import ConvTile


def conv_tiles(width: int, blocks: int, *, registers: int) -> tuple[ConvTile, ...]:
    """Every tile whose accumulators and operands the registers hold, `blocks` vectors of output channels being there.

    A step loads `blocks` weight vectors and `pixels` broadcasts for pixels * blocks dot products. Four registers
    are left for those operands. First come those that load least per multiply, pixels past the end of a row of `width`
    counted.
    """

    def cost(tile: ConvTile) -> float:
        covered = -(-width // tile.pixels) * tile.pixels
        # What was computed past the end is cut off by a copy.
        return covered * (1 + 1 / tile.pixels + 1 / tile.blocks) * (1.05 if covered > width else 1)

    fitting = (
        ConvTile(pixels, count)
        for count in (1, 2, 3)
        if blocks % count == 0
        for pixels in range(1, min(16, (registers - 4) // count) + 1)
    )
    return tuple(sorted(fitting, key=cost))


def schedule_dot_convolution(
    function: tirx.PrimFunc, dot: DotProduct | None, tile: ConvTile, *, threads: int
) -> tirx.PrimFunc:
    """Rows outermost, then strips of pixels and channel blocks; accumulators stay in registers over the reduction."""
    s = open_schedule(function)
    accumulator, output = s.get_sblock("accumulator"), s.get_sblock("output")
    n, y, x, g, o, v = s.get_loops(output)
    rows = s.fuse(n, y)
    strip, pixel = s.split(x, [None, tile.pixels])
    outer, inner = s.split(o, [None, tile.blocks])
    s.reorder(strip, g, outer, pixel, inner, v)
    shared, outer = _share(s, (rows, strip, g, outer), threads) if threads > 1 else (None, outer)
    s.compute_at(accumulator, outer, preserve_unit_loops=True)
    at_pixel, _, at_block, at_lane, ky, kx, q, r = s.get_loops(accumulator)[-8:]
    s.reorder(ky, kx, q, at_pixel, at_block, at_lane, r)
    if shared is not None:
        # Before decompose_reduction, after which the accumulator is no complete block and `parallel` refuses it.
        s.parallel(shared)
    if dot is None:
        s.vectorize(at_lane)
    init = s.decompose_reduction(accumulator, ky)
    if dot is not None:
        s.tensorize(at_lane, dot.name)
    s.unroll(at_pixel)
    s.unroll(at_block)
    init_loops = s.get_loops(init)
    s.vectorize(init_loops[-1])
    s.vectorize(v)
    if tile.blocks == 1:
        # LLVM would vectorize the epilogue over pixels, with gathers and scatters.
        s.unroll(pixel)
    # The rest stays rolled: unrolled it runs no faster and compiles four times slower.
    return s.mod["main"]


def _share(s: Any, loops: tuple[Any, Any, Any, Any], threads: int) -> tuple[Any, Any]:
    """The loop over a few large parts of the work, equal for all threads if that can be, and the innermost loop left.

    Parts are large because a tile alone in its iteration costs half as much again as one in a loop of many.
    """
    rows, strip, group, outer = loops
    strips = s.fuse(rows, strip)
    count = int(s.get(strips).extent)
    if count % threads == 0:
        parts, _ = s.split(strips, [threads, None])
        return parts, outer
    if count >= 4 * threads:
        return strips, outer
    tiles = s.fuse(strips, group, outer)
    count = int(s.get(tiles).extent)
    if count % threads == 0:
        return s.split(tiles, [threads, None])
    return tiles, tiles


def depthwise_lanes(channels: int, lanes: int) -> int:
    """The widest vector, up to four registers, that divides the channels; 1 if none does."""
    return next((width for width in (4 * lanes, 2 * lanes, lanes, lanes // 2) if channels % width == 0), 1)


def schedule_depthwise(function: tirx.PrimFunc, lanes: int, *, threads: int) -> tirx.PrimFunc:
    """Channels in lanes, the window unrolled if it is small."""
    s = open_schedule(function)
    accumulator, output = s.get_sblock("accumulator"), s.get_sblock("output")
    n, y, _, c = s.get_loops(output)
    rows = s.fuse(n, y)
    outer, v = s.split(c, [None, lanes])
    s.compute_at(accumulator, outer, preserve_unit_loops=True)
    at_lane, ky, kx = s.get_loops(accumulator)[-3:]
    s.reorder(ky, kx, at_lane)
    if threads > 1:
        s.parallel(rows)
    if lanes > 1:
        s.vectorize(at_lane)
        s.vectorize(v)
    init = s.decompose_reduction(accumulator, ky)
    if lanes > 1:
        s.vectorize(s.get_loops(init)[-1])
    return s.mod["main"]
