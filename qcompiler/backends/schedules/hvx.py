"""Schedules for Hexagon's vector unit (HVX): accumulators in vector registers, bytes packed 128 at a time."""

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from qcompiler.backends.base import HostCode
from qcompiler.backends.schedules import vrmpy
from qcompiler.backends.schedules.loops import open_schedule

_ACCUMULATORS = 20
"""Of 32 vector registers; the rest hold weights and spread activations."""

_SORTED_RANK = 5
"""Dimensions of a copy whose columns are sorted: its last is a pixel's channels."""
_COPIED = (16, 32, 64, 128)
"""Bytes of which LLVM copies a vector in fewer instructions than it calls memcpy."""


def has_hvx(host: HostCode) -> bool:
    """Whether the CPU has Hexagon's vectors, 128 bytes long."""
    return "hvx-length128b" in host.features


@dataclass(frozen=True)
class Tile:
    """Sums held in registers: neighbouring pixels times vectors of 32 channels or, if `groups` > 1, parts of one."""

    pixels: int
    blocks: int
    """Vectors per pixel."""
    groups: int
    """Parts of a vector that sum different products for the same 32 / groups channels."""

    @property
    def outputs(self) -> int:
        return self.pixels * self.blocks * vrmpy.LANES // self.groups


def lane_groups(out_channels: int) -> int:
    """Parts into which a vector is cut so that few channels fill it."""
    return 1 if out_channels > 16 else 2 if out_channels > 8 else 4


def padded_channels(out_channels: int) -> int:
    """Channels computed per pixel: a part of 128 outputs, or a multiple of as many."""
    if out_channels > vrmpy.VECTOR_BYTES:
        return -(-out_channels // vrmpy.VECTOR_BYTES) * vrmpy.VECTOR_BYTES
    return next(size for size in (8, 16, 32, 64, 128) if size >= out_channels)


def conv_tile(width: int, channels: int) -> Tile:
    """The tile that takes the fewest instructions for rows of `width` pixels, pixels past the end counted.

    A step spreads a quad of each pixel in two instructions, loads `blocks` vectors of weights, and takes a vrmpy for
    each sum. Whole vectors of 128 outputs are requantized, unless the row has fewer.
    """
    groups = lane_groups(channels)
    blocks = max(1, min(channels, vrmpy.VECTOR_BYTES) // vrmpy.LANES)
    candidates = [Tile(pixels, blocks, groups) for pixels in range(1, _ACCUMULATORS // blocks + 1)]
    if width * channels >= vrmpy.VECTOR_BYTES:
        candidates = [tile for tile in candidates if tile.outputs % vrmpy.VECTOR_BYTES == 0]
    else:
        # Sums of as many pixels as a vector has parts are folded at once.
        candidates = [tile for tile in candidates if tile.pixels % groups == 0] if groups > 1 else candidates

    def cost(tile: Tile) -> tuple[float, int]:
        covered = -(-width // tile.pixels) * tile.pixels
        copied = 1.05 if covered > width else 1
        return covered * (2 + tile.blocks + tile.blocks / tile.pixels) * copied, tile.pixels

    return min(candidates, key=cost)


def schedule_dot_convolution(
    function: tirx.PrimFunc, tile: Tile, dot: str, *, staged: bool, cropped: bool, vector: bool
) -> tirx.PrimFunc:
    """Schedule the blocks [staged,] accumulator, total, output[, cropped] of `hvx_conv`.

    Row by row: the window's rows are copied if `staged`, sums of a tile are reduced in registers by the intrinsic
    `dot`, put down as 32-bit numbers, requantized 128 at a time if `vector`, and copied to their places if `cropped`.
    """
    s = open_schedule(function)
    accumulator, total, output = (s.get_sblock(name) for name in ("accumulator", "total", "output"))
    n, y, x, o = s.get_loops(output)
    row = s.fuse(n, y)
    if cropped:
        # All of a padded row is computed, however much of it is wanted.
        s.reverse_compute_at(s.get_sblock("cropped"), row, preserve_unit_loops=True)
    strip, pixel = s.split(x, [None, tile.pixels])
    tile_channels = tile.blocks * vrmpy.LANES // tile.groups
    outer, channel = s.split(o, [None, tile_channels])
    s.reorder(strip, outer, pixel, channel)
    s.compute_at(total, outer, preserve_unit_loops=True)
    if tile.groups > 1:
        s.compute_at(s.get_sblock("folded"), outer, preserve_unit_loops=True)
    s.compute_at(accumulator, outer, preserve_unit_loops=True)
    if staged:
        s.compute_at(s.get_sblock("staged"), row, preserve_unit_loops=True)

    reduction = 4
    spatial = 3
    inner = s.get_loops(accumulator)[-(spatial + reduction) :]
    at_pixel, at_block, at_lane = inner[:spatial]
    ky, tap, step, r = inner[spatial:]
    s.reorder(ky, tap, step, at_pixel, at_block, at_lane, r)
    s.unroll(at_pixel)
    init = s.decompose_reduction(accumulator, ky)
    init_pixel, init_block, init_lane = s.get_loops(init)[-3:]
    s.unroll(init_pixel)
    if tile.groups == 1:
        s.unroll(at_block)
        s.tensorize(at_lane, dot)
        s.unroll(init_block)
        s.vectorize(init_lane)
    else:
        s.tensorize(at_block, dot)
        s.vectorize(s.fuse(init_block, init_lane))
    _schedule_total(s, total, tile)
    # Only now: intrinsics are described with buffers in memory.
    s.set_scope(init, 0, "local")
    if vector:
        _vectorize(s, s.fuse(pixel, channel))
    return s.mod["main"]


def schedule_rows(function: tirx.PrimFunc, *, staged: bool, cropped: bool, summed: bool = True) -> tirx.PrimFunc:
    """Schedule the blocks [staged,] [total if `summed`,] output[, cropped] over rows of `hvx_windows`."""
    s = open_schedule(function)
    output = s.get_sblock("output")
    n, y, f = s.get_loops(output)
    row = s.fuse(n, y)
    if cropped:
        s.reverse_compute_at(s.get_sblock("cropped"), row, preserve_unit_loops=True)
    vectors, lanes = s.split(f, [None, vrmpy.VECTOR_BYTES])
    if summed:
        total = s.get_sblock("total")
        s.compute_at(total, vectors, preserve_unit_loops=True)
        s.vectorize(s.get_loops(total)[-1])
        s.set_scope(total, 0, "local")
    s.vectorize(lanes)
    if staged:
        copy = s.get_sblock("staged")
        s.compute_at(copy, row, preserve_unit_loops=True)
        channels = s.get_loops(copy)[-1]
        if len(s.get(copy).iter_vars) == _SORTED_RANK and int(s.get(channels).extent) in _COPIED:
            s.vectorize(channels)
    return s.mod["main"]


def schedule_elements(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """Vectorize the last loop of the block "output" 128 elements at a time; what is left of it stays scalar."""
    s = open_schedule(function)
    last = s.get_loops(s.get_sblock("output"))[-1]
    extent = int(s.get(last).extent)
    whole = extent - extent % vrmpy.VECTOR_BYTES
    if whole > 0:
        if whole < extent:
            last, _ = s.loop_partition(last, [whole, None])
        _vectorize(s, last)
    return s.mod["main"]


def _schedule_total(s: Any, total: Any, tile: Tile) -> None:
    """Registers to memory, a vector at a time."""
    if tile.groups > 1:
        folded = s.get_sblock("folded")
        part, pixels = s.split(s.get_loops(folded)[-2], [None, tile.groups])
        s.unroll(part)
        folding = s.blockize(pixels)
        s.tensorize(folding, vrmpy.fold(tile.groups))
        s.set_scope(folding, 0, "local")
    vector, lane = s.split(s.fuse(*s.get_loops(total)[-2:]), [None, vrmpy.LANES])
    s.unroll(vector)
    s.vectorize(lane)


def _vectorize(s: Any, loop: Any) -> None:
    _, vector = s.split(loop, [None, vrmpy.VECTOR_BYTES])
    s.vectorize(vector)
