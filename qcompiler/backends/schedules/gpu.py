"""Schedules for GPUs: which work item does what, and what a group stages in shared memory."""

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from qcompiler.backends.schedules.loops import open_schedule

GROUP = 256
"""Work items of a group where nothing is shared."""


# --- products ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filled:
    """Sizes of a product rounded up to whole tiles; k in words."""

    m: int
    n: int
    k: int


@dataclass(frozen=True)
class ProductTile:
    """What one group computes, and one work item of it."""

    m: int
    n: int
    k: int
    """Words of the reduction staged at a time."""
    rows: int
    """Pixels of one work item."""
    columns: int
    """Channels of one work item, a multiple of four."""

    def filled(self, m: int, n: int, k: int) -> Filled:
        return Filled(*(-(-size // tile) * tile for size, tile in ((m, self.m), (n, self.n), (k, self.k))))

    @property
    def shared_bytes(self) -> int:
        """Of both operands, rows of the left one apart by up to a cache line more."""
        return 4 * self.k * (_aligned(self.m) + self.n)


def _aligned(rows: int) -> int:
    """The pitch of the left operand, which keeps neighbours along k in different banks."""
    return -(-(rows - 4) // 32) * 32 + 4


_TILES: tuple[ProductTile, ...] = (
    ProductTile(128, 64, 8, 8, 4),
    ProductTile(64, 64, 16, 4, 4),
    ProductTile(32, 64, 16, 2, 4),
    ProductTile(64, 32, 16, 4, 4),
    ProductTile(128, 32, 16, 4, 4),
    ProductTile(128, 16, 16, 4, 4),
    ProductTile(32, 32, 16, 2, 4),
    ProductTile(16, 64, 16, 1, 4),
    ProductTile(8, 64, 32, 1, 4),
    ProductTile(8, 32, 32, 1, 4),
    ProductTile(1, 128, 32, 1, 4),
    ProductTile(1, 64, 32, 1, 4),
)

_BUSY = 96
"""Groups that keep a large GPU busy."""


def product_tile(groups: int, m: int, n: int, k: int, local_memory: int) -> ProductTile:
    """The tile with least work and traffic, what it fills up with zeros counted, and too few groups.

    Of those whose operands fit `local_memory`, in bytes; the smallest always does.
    """

    def cost(tile: ProductTile) -> float:
        filled = tile.filled(m, n, k)
        work = filled.m * filled.n * filled.k
        # Words loaded into shared memory per product, and from there into registers.
        traffic = 8 * (1 / tile.m + 1 / tile.n) + (1 / tile.rows + 1 / tile.columns)
        count = groups * (filled.m // tile.m) * (filled.n // tile.n)
        return work * (1 + traffic) * max(1.0, (_BUSY / count) ** 0.5)

    return min((tile for tile in _TILES if tile.shared_bytes <= local_memory), key=cost, default=_TILES[-1])


def schedule_product(
    function: tirx.PrimFunc, tile: ProductTile, lanes: int, *, groups_first: bool = False
) -> tirx.PrimFunc:
    """Schedule the blocks left, right, accumulator and output of `gpu_conv`.

    The output is [M, groups, N / lanes], or [groups, M, N / lanes] with `groups_first`.
    """
    s = open_schedule(function)
    left, right, accumulator, output = (s.get_sblock(name) for name in ("left", "right", "accumulator", "output"))
    first, second, n = s.get_loops(output)
    g, m = (first, second) if groups_first else (second, first)
    items_m, items_n = tile.m // tile.rows, tile.n // tile.columns
    block_m, item_m, row = s.split(m, [None, items_m, tile.rows])
    block_n, item_n, column = s.split(n, [None, items_n, tile.columns // lanes])
    s.reorder(g, block_m, block_n, item_m, item_n, row, column)
    for loop, axis in ((g, "blockIdx.z"), (block_n, "blockIdx.y"), (block_m, "blockIdx.x")):
        s.bind(loop, axis)
    s.bind(item_m, "threadIdx.y")
    s.bind(item_n, "threadIdx.x")

    s.set_scope(accumulator, 0, "local")
    s.compute_at(accumulator, item_n, preserve_unit_loops=True)
    _, at_row, at_column, k = s.get_loops(accumulator)[-4:]
    step, word = s.split(k, [None, tile.k])
    s.reorder(step, word, at_row, at_column)
    for block in (left, right):
        s.set_scope(block, 0, "shared")
        s.compute_at(block, step, preserve_unit_loops=True)
        _, at_k, at_item = s.get_loops(block)[-3:]
        if block is left:
            # Neighbours in the image are neighbours along k.
            s.reorder(at_item, at_k)
            s.storage_align(left, 0, axis=1, factor=32, offset=4)
        _share(s, s.fuse(*s.get_loops(block)[-2:]), items_m, items_n)
    s.decompose_reduction(accumulator, step)
    for loop in (at_row, at_column, row, column):
        s.unroll(loop)
    _unroll(s, word, tile.rows * tile.columns)
    return s.mod["main"]


def _share(s: Any, loop: Any, items_m: int, items_n: int) -> None:
    """Spread a loop over the work items of a group."""
    _, y, x = s.split(loop, [None, items_m, items_n])
    s.bind(y, "threadIdx.y")
    s.bind(x, "threadIdx.x")


def _unroll(s: Any, loop: Any, body: int) -> None:
    """Unroll by as much as keeps some hundred instructions."""
    times = max(1, 64 // body)
    extent = int(s.get(loop).extent)
    while extent % times:
        times -= 1
    _, inner = s.split(loop, [None, times])
    s.unroll(inner)


# --- everything else ---------------------------------------------------------------------------------------


def schedule_each(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """A work item for each element of the output stage, which makes what other stages hold for it by itself.

    Stages without a reduction are inlined; those with one accumulate in registers.
    """
    s = open_schedule(function)
    *inner, output = _blocks(s)
    # Not one fused loop: TVM takes a reduction's first step apart only where each index comes of one split.
    *outer, last = s.get_loops(output)
    width = min(_power_of_two(int(s.get(last).extent)), _WIDTH if outer else GROUP)
    columns, item = s.split(last, [None, width])
    if outer:
        *rest, rows = outer
        height = min(_power_of_two(int(s.get(rows).extent)), GROUP // width)
        rows, row = s.split(rows, [None, height])
        s.reorder(*rest, rows, columns, row, item)
        # Along x there may be any number of groups, along the others 65535 with CUDA.
        s.bind(s.fuse(*rest, rows) if rest else rows, "blockIdx.x")
        s.bind(columns, "blockIdx.y")
        s.bind(row, "threadIdx.y")
    else:
        s.bind(columns, "blockIdx.x")
    s.bind(item, "threadIdx.x")
    for block in reversed(inner):
        if _reduces(s, block):
            s.set_scope(block, 0, "local")
            s.compute_at(block, item, preserve_unit_loops=True)
            _chain(s, block)
        else:
            s.compute_inline(block)
    return s.mod["main"]


_WIDTH = 32
"""Work items along the last dimension where there are several: what runs in step on most devices."""


def _power_of_two(extent: int) -> int:
    """The least that is not below an extent."""
    return 1 << (extent - 1).bit_length()


def schedule_rows(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """A group for each row of the output [rows, length]; sums and maxima of a row are made by all its work items.

    Other stages are inlined if they are as large as the output; numbers of a row every work item computes itself.
    """
    s = open_schedule(function)
    *inner, output = _blocks(s)
    row, column = s.get_loops(output)
    length = int(s.get(column).extent)
    items = min(GROUP, _power_of_two(length))
    chunk, item = s.split(column, [None, items])
    s.reorder(row, item, chunk)
    s.bind(row, "blockIdx.x")
    s.bind(item, "threadIdx.x")
    for block in reversed(inner):
        loops = s.get_loops(block)
        if _reduces(s, block):
            s.set_scope(block, 0, "shared")
            s.compute_at(block, row, preserve_unit_loops=True)
            _, own = s.split(s.get_loops(block)[-1], [None, items])
            s.bind(own, "threadIdx.x")
        elif len(loops) == 2:
            s.compute_inline(block)
        else:
            s.set_scope(block, 0, "local")
            s.compute_at(block, item, preserve_unit_loops=True)
    return s.mod["main"]


def _chain(s: Any, block: Any) -> None:
    """Reduction outermost, so that what elements share is loaded once; they are unrolled."""
    loops = s.get_loops(block)
    variables = s.get(block).iter_vars
    own = loops[-len(variables) :]
    spatial = [loop for loop, variable in zip(own, variables, strict=True) if variable.iter_type == 0]
    reduced = [loop for loop, variable in zip(own, variables, strict=True) if variable.iter_type != 0]
    s.reorder(*reduced, *spatial)
    s.decompose_reduction(block, reduced[0])
    for loop in spatial:
        s.unroll(loop)


def _reduces(s: Any, block: Any) -> bool:
    return any(variable.iter_type == 2 for variable in s.get(block).iter_vars)


def _blocks(s: Any) -> list[Any]:
    """In the order they run."""
    return list(s.get_child_blocks(s.get_sblock("root")))
