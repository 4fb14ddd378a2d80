"""An Ethos-U-like MAC array: which OFM block it works in, and for how long.

The array computes an OFM block by block. While the MAC stage fills one set of accumulators from the IFM buffer, the
output stage rescales and writes the other, and the next IFM block and the weights are fetched. Block choice and cycles
follow the ethos-u-vela 5.2.0 source distribution (V below): `find_block` is what Arm's compiler programs into the
array (V ethosu/regor/architecture/ethosu55/ethos_u55.cpp, FindBlockConfig), and `cycles` its estimate of the time
(V ethos_u55_performance.cpp). Where a figure is the chip's, it is a field of `MacArray`.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from qcompiler.simulator.workload import Dims, Feed, Port, Shape, Work
from qcompiler.target import MacArray, MicroBlock, MicroBlockOp

Traversal = Literal["depth_first", "part_kernel", "depthwise"]

# Indices of MacArray.output_cycles, MacArray.activation_cycles and MacArray.granules.
_UNARY_INT32, _BINARY_INT32, _MUL_INT32, _MUL, _SIMPLE_ADD, _ADD, _MAX_POOL, _OTHER = range(8)
_LOOKUP, _CLAMP, _NO_ACTIVATION = range(3)
_IFM8, _IFM16, _IFM8_ELEMENTWISE, _IFM16_ELEMENTWISE, _IFM32, _ACC16, _ACC32, _ACC40 = range(8)

_ELEMENTWISE = ("add", "mul")
_POOLS = ("max_pool", "average_pool", "lookup", "requantize", "resize_nearest", "resize_linear")
"""Operations of the pooling unit; those that only rescale or look up run as pools of one element."""
_SPLIT_DEPTH = 16
"""Channels a block's depth is a multiple of unless it holds all of them (V OFMSplitDepth)."""
_IMAGE_DEPTH = 4
"""Shallower feature maps are images, which arrive as the host stores them, without bricks."""
_SOFTMAX_PASSES = {8: (4, 21), 16: (5, 7)}
"""Elementwise passes on int32 of V's softmax, by bits: over the map, and over one value a row."""
_ENCODED_SCALE_BYTES = 10
"""Bias, multiplier and shift of one channel as the array reads them."""

_Array = npt.NDArray[np.int64]
_Size = TypeVar("_Size", int, _Array)


@dataclass(frozen=True, slots=True)
class Block:
    """What the array works on at a time."""

    ofm: Dims
    ifm: Dims
    traversal: Traversal
    """Order of a convolution's products: all channels of one kernel element, or a few channels of several."""


def mac_array(shape: Shape, array: MacArray, feed: Feed) -> Work:
    """Cycles and traffic of one command."""
    if shape.op == "conv" and shape.groups > 1:
        one = mac_array(_one_group(shape), array, feed)
        groups = shape.groups
        return Work(one.cycles * groups, one.ifm_bytes * groups, one.weight_bytes * groups, one.ofm_bytes * groups)
    if shape.op == "softmax":
        return _softmax(shape, array, feed)
    if shape.op in _ELEMENTWISE:
        return _elementwise(shape, array, feed)
    return _blocked(shape, array, feed)


def _one_group(shape: Shape) -> Shape:
    (height, width, depth), (ifm_height, ifm_width, ifm_depth) = shape.ofm, shape.ifm
    return Shape(
        "conv", (height, width, depth // shape.groups), (ifm_height, ifm_width, ifm_depth // shape.groups),
        shape.kernel, shape.stride, shape.dilation, 1, shape.ifm_bits, shape.ofm_bits, shape.weight_bits,
        shape.upsampling,
    )  # fmt: skip


# --- block choice --------------------------------------------------------------------------------------------------


def find_block(shape: Shape, array: MacArray) -> Block:
    """The block that reads least per output: IFM blocks overlap, and weights are read again for each one of a plane.

    Blocks are whole micro-blocks whose double-buffered IFM and accumulators fit the banks. Of equal blocks the first
    in order of depth, height and width wins, but for small ones that cover more of the IFM. Float32 as V, so that ties
    fall the same way.
    """
    ublock, (rows, cols, channels) = _search_step(shape, array), shape.ofm
    limits = [
        _round_up(min(size, most), step) for size, most, step in zip(shape.ofm, array.block_max, ublock, strict=True)
    ]
    depth = np.array(_depths(channels, limits[2], ublock[2]), np.int64)[:, None, None]
    height = np.arange(ublock[0], limits[0] + 1, ublock[0], dtype=np.int64)[None, :, None]
    width = np.arange(ublock[1], limits[1] + 1, ublock[1], dtype=np.int64)[None, None, :]

    elementwise, depthwise = shape.op in _ELEMENTWISE, shape.op == "depthwise"
    keeps_depth = elementwise or depthwise or shape.op in _POOLS
    ifm = max(shape.ifm, shape.second or shape.ifm, key=lambda dims: dims[0] * dims[1] * dims[2])
    traversal = _traversal(shape, array)
    unit = array.ublock if keeps_depth else _ifm_unit(shape, array, traversal)
    ifm_height, ifm_width = (
        _ifm_extent(size, shape, array, axis, unit[axis]) for axis, size in enumerate((height, width))
    )
    ifm_depth = depth if keeps_depth else np.array(_ifm_block_depth(shape, array, traversal), np.int64)

    # A single row on a two-row array: the block holds one row only.
    flat = rows == 1 and shape.kernel[0] == 1 and ublock[0] == 2
    held = np.minimum(height, 1) if flat else height
    fits = _fits(shape, array, held * width, depth, ifm_height * ifm_width, ifm_depth)
    if not fits.any():
        fits[0, 0, 0] = True  # the smallest block always runs, whatever a hand-written spec says of its banks

    if elementwise:
        cost = np.float32(shape.ofm_elements) / (height * width * depth).astype(np.float32)
    else:
        planes = -(-rows // held) * -(-cols // width)
        area = shape.window if shape.has_weights else 0
        weights = (area * ifm[2] * planes).astype(np.float32)
        if not depthwise:
            weights = weights * (np.float32(channels) / depth.astype(np.float32) * depth.astype(np.float32))
        fetched = (ifm_height * ifm_width * (ifm[2] * _repeats(shape, array))).astype(np.float32)
        fetched = fetched * (np.float32(cols) / width.astype(np.float32))
        fetched = fetched * (np.float32(rows) / held.astype(np.float32))
        if not keeps_depth:
            fetched = fetched * (-(-channels // depth)).astype(np.float32)
        cost = (fetched + weights) / np.float32(shape.ofm_elements)
    # Both buffers together hold the whole IFM: nothing is ever read twice.
    whole = ifm[0] * ifm[1] * ifm[2] < 2 * ifm_height * ifm_width * ifm_depth
    cost = np.where(fits, np.where(whole, cost / np.float32(2), cost), np.float32(np.inf))

    chosen = _first_best(cost, height, width, ifm, ifm_height, ifm_width)
    d, h, w = np.unravel_index(chosen, cost.shape)
    block_depth = int(depth[d, 0, 0])
    return Block(
        (int(height[0, h, 0]), int(width[0, 0, w]), block_depth),
        (int(ifm_height[0, h, 0]), int(ifm_width[0, 0, w]), block_depth if keeps_depth else int(ifm_depth)),
        traversal,
    )


def _depths(channels: int, limit: int, step: int) -> list[int]:
    """Block depths in the order they are tried."""
    depth = max(step, min(limit, _SPLIT_DEPTH))
    depths: list[int] = []
    while True:
        depth = _round_up(depth, _SPLIT_DEPTH) if depth < channels else depth
        if depth > limit:
            return depths or [limit]
        depths.append(depth)
        depth += step


def _first_best(
    cost: npt.NDArray[np.float32], height: _Array, width: _Array, ifm: Dims, ifm_height: _Array, ifm_width: _Array
) -> int:
    """The first of the cheapest blocks, or a later one of at most 4 by 4 that covers no less of the IFM."""
    flat = cost.ravel()
    chosen = int(flat.argmin())
    small = np.broadcast_to((height <= 4) & (width <= 4), cost.shape).ravel()
    rivals = np.flatnonzero((flat == flat[chosen]) & small)
    if rivals.size and rivals[-1] > chosen:
        seen = np.minimum(ifm_height, ifm[0]) * np.minimum(ifm_width, ifm[1])
        coverage = ifm[0] * ifm[1] / np.maximum(np.broadcast_to(seen, cost.shape).ravel(), 1)
        best = np.inf
        for rival in rivals[rivals > chosen]:
            if coverage[rival] <= best:
                best, chosen = coverage[rival], int(rival)
    return chosen


def _search_step(shape: Shape, array: MacArray) -> Dims:
    return _micro_block(shape, array) if array.micro_blocks else array.ublock


def _traversal(shape: Shape, array: MacArray) -> Traversal:
    """Part-kernel where a few kernel elements times eight channels fill the array better than many channels."""
    if shape.op == "depthwise":
        return "depthwise"
    if shape.op != "conv":
        return "depth_first"
    if (rule := array.kernel_first) is not None:
        steps, rest = divmod(shape.window, rule.elements)
        counted = steps * rule.elements + max(rest, rule.least)
        by_kernel = shape.ifm[2] / _round_up(shape.ifm[2], rule.depth) * (shape.window / counted)
        return "part_kernel" if by_kernel >= shape.ifm[2] / _round_up(shape.ifm[2], rule.deep) else "depth_first"
    wide, together = (32, 4) if shape.ifm_bits == 8 else (16, 2)
    depth = shape.ifm[2]
    by_depth = depth / _round_up(depth, wide)
    by_kernel = depth / _round_up(depth, 8) * (shape.window / _round_up(shape.window, together))
    return "part_kernel" if depth <= 8 or by_kernel >= by_depth else "depth_first"


def _ifm_block_depth(shape: Shape, array: MacArray, traversal: Traversal) -> int:
    deepest = _deepest(shape, array, traversal)
    return _round_up(min(shape.ifm[2], deepest), _ifm_unit(shape, array, traversal)[2])


def _ifm_unit(shape: Shape, array: MacArray, traversal: Traversal) -> Dims:
    """Rows, columns and channels that the IFM block of a convolution is a multiple of."""
    block = _chosen(shape, array)
    if block is None or not block.ifm_units:
        return array.ublock[0], array.ublock[1], array.ifm_ublock[2] // (2 if shape.ifm_bits == 16 else 1)
    row = _deepest(shape, array, traversal) * shape.ifm_bits // 128
    height, width, groups = block.ifm_units[0 if row <= 1 else 1 if row <= 2 else 2]
    return height, width, groups * 128 // shape.ifm_bits


def _deepest(shape: Shape, array: MacArray, traversal: Traversal) -> int:
    """Most input channels of a block."""
    wide = shape.ifm_bits == 16
    deepest = array.wide.ifm_block_depth if wide else array.ifm_block_depth
    if traversal == "part_kernel":
        deepest = 16
    elif (block := _chosen(shape, array)) is not None and block.ifm_block_depth is not None:
        deepest = block.ifm_block_depth
    return deepest


def _ifm_extent(size: _Array, shape: Shape, array: MacArray, axis: int, unit: int) -> _Array:
    """Input rows or columns under a block, in whole units."""
    reach = min((shape.kernel[axis] - 1) * shape.dilation[axis] + 1, array.subkernel_max[axis])
    return _round_up((size - 1) * shape.stride[axis] + reach, unit)


def _repeats(shape: Shape, array: MacArray) -> int:
    """How often a large kernel goes over the same IFM block."""
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(shape.kernel, shape.dilation, strict=True)]
    return ceil(reach[0] / array.subkernel_max[0]) * ceil(reach[1] / array.subkernel_max[1])


def _fits(
    shape: Shape, array: MacArray, ofm_area: _Array, depth: _Array, ifm_area: _Array, ifm_depth: _Array
) -> npt.NDArray[np.bool_]:
    """Whether two IFM blocks and two sets of accumulators, or two IFM blocks of each operand, fit the banks."""
    elementwise = shape.op in _ELEMENTWISE
    table_banks = 2 if shape.op == "lookup" else 0
    room = array.accumulator_banks - array.reserved_banks - max(table_banks, array.reserved_end_banks)
    wide = {8: (_IFM8, _IFM8_ELEMENTWISE), 16: (_IFM16, _IFM16_ELEMENTWISE)}.get(shape.ifm_bits, (_IFM32, _IFM32))
    ifm_bytes = ifm_area * _round_up(ifm_depth * (shape.ifm_bits // 8), 8)
    ifm_banks = _round_up(-(-ifm_bytes // array.bank_size) * 2, array.granules[wide[elementwise]])
    if elementwise:
        scalar = shape.second is not None and shape.second == (1, 1, 1) and shape.ifm_bits <= 16
        return np.asarray(ifm_banks * (1 if scalar else 2) <= room)
    bits, granule = (array.wide.accumulator_bits, _ACC40) if _wide_accumulators(shape) else (32, _ACC32)
    accumulator_bytes = ofm_area * _round_up(depth, array.accumulator_depth) * bits // 8
    accumulator_banks = _round_up(-(-accumulator_bytes // array.bank_size) * 2, array.granules[granule])
    if own := array.own_accumulator_banks:
        return np.asarray((ifm_banks <= room - own) & (accumulator_banks <= own))
    return np.asarray(ifm_banks + accumulator_banks <= room)


def _wide_accumulators(shape: Shape) -> bool:
    return shape.ifm_bits == 16 and shape.has_weights


# --- cycles ----------------------------------------------------------------------------------------------------------


def _blocked(shape: Shape, array: MacArray, feed: Feed) -> Work:
    """A MAC stage and an output stage side by side: the slower one's time, and once the other's."""
    block = find_block(shape, array)
    ublock = _micro_block(shape, array)
    clipped = _smaller(block.ofm, shape.ofm)
    ublocks = [ceil(size / step) for size, step in zip(clipped, ublock, strict=True)]
    whole = [ceil(size / step) for size, step in zip(shape.ofm, ublock, strict=True)]
    blocks = whole[0] * whole[1] * whole[2] / (ublocks[0] * ublocks[1] * ublocks[2])

    mac = _mac_cycles(shape, array, block, ublock, ublocks)
    out = ceil(_output_cycles(shape, array) * clipped[0] * clipped[1] * clipped[2])
    if shape.has_weights:
        out = max(out, _ENCODED_SCALE_BYTES * clipped[2] * feed.scales.latency / 256)
    fetch, store = _fetch_cycles(shape.ifm, block.ifm, shape, array, feed), _store_cycles(shape, block.ofm, array, feed)
    # A block is issued once the one before has left the front of the pipeline.
    issue = ((abs(store - fetch) if blocks > 1 else 0) + mac + out) / 4
    mac, out = max(mac, issue), max(out, issue)
    cycles = (mac * blocks + out if mac > out else out * blocks + mac) + fetch + store

    planes = ceil(shape.ofm[0] / clipped[0]) * ceil(shape.ofm[1] / clipped[1])
    if shape.op == "conv" and array.scale_rate:
        # Depthwise blocks are shallow and wide: their records are read about once.
        cycles = max(cycles, _ENCODED_SCALE_BYTES * shape.ofm[2] * planes / array.scale_rate)
    slices = ceil(shape.ofm[2] / clipped[2]) if shape.op == "conv" else 1
    seen = _smaller(block.ifm, shape.ifm)
    ifm = seen[0] * seen[1] * _stored_depth(shape.ifm, array) * len(_subkernels(shape, array)) * planes * slices
    return Work(
        cycles,
        ifm_bytes=_bytes_read(ifm, shape.ifm, block.ifm, shape.ifm_bits, array, feed.ifm),
        weight_bytes=shape.weight_elements * shape.weight_bits / 8 * planes,
        ofm_bytes=_bytes_written(shape, block.ofm, array, feed.ofm),
    )


def _mac_cycles(shape: Shape, array: MacArray, block: Block, ublock: Dims, ublocks: list[int]) -> float:
    """One block's time in the MAC stage: four cycles a micro-block and step, or what the weight stream allows."""
    area, deep = ublocks[0] * ublocks[1], ublocks[2]
    weights = 4 * ublock[2] // array.weight_decoders
    ifm_depth = min(block.ifm[2], shape.ifm[2])
    total = 0
    for elements in _subkernels(shape, array):
        if shape.op in _POOLS:
            steps, repeats = 1, 1
            cycles = max(4, elements) * area * deep * array.pool_cycles
            # The smallest array pools any element in the same time (pool_cycles 1).
            cycles *= shape.ifm_bits / 8 if array.pool_cycles > 1 else 1
        elif block.traversal == "part_kernel":
            steps, repeats = ceil(elements / (2 if shape.ifm_bits == 16 else 4)), ceil(ifm_depth / 8)
            cycles = max(weights, 4 * area) * steps * deep / shape.sparse_speedup
        elif block.traversal == "depthwise":
            steps, repeats = ceil(elements / 4), 1
            cycles = max(weights, 4 * area * shape.ifm_bits // 8) * steps * deep
        else:
            steps, repeats = elements, 1
            cycles = max(weights, _round_up(ifm_depth, array.ifm_depth_step) // 8 * area) * steps * deep
            cycles *= (array.wide.step_cycles if shape.ifm_bits == 16 else 1) / shape.sparse_speedup
        total += (cycles + _delay(shape, array, ublocks, steps)) * repeats
    if shape.op == "conv":
        total *= ceil(shape.ifm[2] / ifm_depth)
    return total // array.cores


def _delay(shape: Shape, array: MacArray, ublocks: list[int], steps: int) -> int:
    """A block one micro-block wide waits for its own sums."""
    wide = _wide_accumulators(shape)
    delay = array.wide.pipeline_delay if wide else array.pipeline_delay
    height, width, deep = ublocks
    rows = delay * deep if wide and array.wide.delays_rows and deep > 1 and min(height, width) == 1 else 0
    if height * width > 1:
        return rows
    return delay * (steps if deep == 1 else (steps - 1) * deep) + rows


def _elementwise(shape: Shape, array: MacArray, feed: Feed) -> Work:
    """The output stage alone, or the memory traffic of blocks issued four at a time."""
    block = find_block(shape, array)
    elements = shape.ofm[0] * shape.ofm[1] * _stored_depth(shape.ofm, array)
    per_element = _output_cycles(shape, array)
    operands = [dims for dims in (shape.ifm, shape.second) if dims is not None]
    fetch = max(_fetch_cycles(dims, block.ifm, shape, array, feed) for dims in operands)
    moved = max(_store_cycles(shape, block.ofm, array, feed), fetch)
    issue = (moved / (block.ofm[0] * block.ofm[1] * block.ofm[2]) + per_element) / 4
    return Work(
        max(ceil(issue * elements), ceil(per_element * elements)),
        ifm_bytes=_bytes_read(elements, shape.ifm, block.ifm, shape.ifm_bits, array, feed.ifm),
        weight_bytes=0,
        ofm_bytes=_bytes_written(shape, block.ofm, array, feed.ofm),
    )


def _softmax(shape: Shape, array: MacArray, feed: Feed) -> Work:
    """Softmax as V decomposes it (V ethosu/regor/compiler/softmax.cpp): passes over the map and over one value a row.

    Over the map: maximum, difference with the exponential's table, shift, sum, product, a copy of the shift, shift.
    Over the rows' sums: their leading zeros, and three Newton-Raphson steps towards the reciprocal. Of 16 bits: the
    difference apart from its scale, and of the sums a table of the reciprocal; tables come with the pass before.
    """
    (height, width, depth), unit = shape.ofm, (1, 1)
    rows = height * width
    brick = (height, width, max(1, array.brick_depth))  # a value a row fills a brick

    def binary(dims: Dims, bits: int) -> Work:
        return _elementwise(Shape("add", dims, dims, unit, unit, unit, 1, bits, 32, 0, 1, dims), array, feed)

    bits = shape.ifm_bits
    maximum = Shape("max_pool", (rows, 1, 1), (rows, depth, 1), (1, depth), unit, unit, 1, bits, bits, 0, 1)
    total = Shape("conv", (height, width, 1), (height, width, depth), unit, unit, unit, 1, 32, 32, 0, 1)
    over_map, over_rows = _SOFTMAX_PASSES[bits]
    passes = [
        _blocked(maximum, array, feed),
        binary(shape.ofm, bits),
        _blocked(total, array, feed),
        *[binary(shape.ofm, 32)] * over_map,
        *[binary(brick, 32)] * over_rows,
    ]
    return Work(
        sum(one.cycles for one in passes),
        ifm_bytes=sum(one.ifm_bytes for one in passes),
        weight_bytes=0,
        ofm_bytes=sum(one.ofm_bytes for one in passes),
    )


def _output_cycles(shape: Shape, array: MacArray) -> float:
    """Of one element in the output stage."""
    if shape.ofm_bits == 16 and array.wide.output_cycles is not None:
        return array.wide.output_cycles
    if shape.ifm_bits == 32 and shape.op in _ELEMENTWISE:
        return array.output_cycles[_BINARY_INT32]
    match shape.op:
        case "add":
            return array.output_cycles[_ADD]
        case "mul":
            return array.output_cycles[_MUL]
        case "max_pool":
            return array.output_cycles[_MAX_POOL]
        case "lookup":
            return max(array.output_cycles[_OTHER], array.activation_cycles[_LOOKUP])
        case _:
            return array.output_cycles[_MUL if _wide_accumulators(shape) else _OTHER]


def _micro_block(shape: Shape, array: MacArray) -> Dims:
    """The one that exceeds the OFM least; a single 2-high one turns 4 wide for rows of even width and flat kernels."""
    if array.micro_blocks:
        chosen = _chosen(shape, array)
        return array.ublock if chosen is None else chosen.shape
    height, width, depth = array.ublock
    if height == 2 and shape.op == "conv" and shape.ofm[0] == 1 and shape.ofm[1] % 2 == 0 and shape.kernel[0] == 1:
        return 1, width * 2, depth
    return height, width, depth


def _chosen(shape: Shape, array: MacArray) -> MicroBlock | None:
    """Of an array's several micro-blocks."""
    ops: list[MicroBlockOp] = ["depthwise" if shape.op == "depthwise" else "conv" if shape.op == "conv" else "pool"]
    if shape.op == "conv" and shape.kernel == (1, 1) and _traversal(shape, array) == "depth_first":
        ops.append("pointwise")
    wide = shape.ifm_bits == 16
    fitting = [b for b in array.micro_blocks if any(op in ((wide and b.wide_ops) or b.ops) for op in ops)]
    return min(fitting, key=lambda block: _covered(shape.ofm, block.shape), default=None)


def _covered(ofm: Dims, block: Dims) -> int:
    """Elements of an OFM rounded up to whole micro-blocks."""
    height, width, depth = (_round_up(size, step) for size, step in zip(ofm, block, strict=True))
    return height * width * depth


def _subkernels(shape: Shape, array: MacArray) -> list[int]:
    """Element counts of the pieces a large kernel is run in."""
    kernel, limit = shape.kernel, array.subkernel_max
    heights = [min(limit[0], kernel[0] - start) for start in range(0, kernel[0], limit[0])]
    widths = [min(limit[1], kernel[1] - start) for start in range(0, kernel[1], limit[1])]
    return [height * width for height in heights for width in widths]


# --- memory ----------------------------------------------------------------------------------------------------------


def _fetch_cycles(dims: Dims, block: Dims, shape: Shape, array: MacArray, feed: Feed) -> int:
    """Until the first IFM block is in its buffer."""
    size = _elements(_smaller(block, dims))
    return int(feed.ifm.latency) + int(
        _bytes_read(size, dims, block, shape.ifm_bits, array, feed.ifm) / feed.ifm.bandwidth
    )


def _store_cycles(shape: Shape, block: Dims, array: MacArray, feed: Feed) -> int:
    """Until the last OFM block is written."""
    run = _write_run(shape, block, array)
    size = _elements(_smaller(block, shape.ofm)) * shape.ofm_bits // 8
    return int(feed.ofm.latency) + int(_on_bus(size, run, feed.ofm) / feed.ofm.bandwidth)


def _bytes_read(elements: int, dims: Dims, block: Dims, bits: int, array: MacArray, port: Port) -> int:
    """Whole bursts of reading elements of a feature map in blocks."""
    if _is_bricked(dims, array):
        run = array.brick_depth * block[1] * bits // 8
    else:
        run = (block[1] if dims[2] * bits // 8 == block[2] else 1) * block[2] * bits // 8
    return _on_bus(elements * bits // 8, run, port)


def _bytes_written(shape: Shape, block: Dims, array: MacArray, port: Port) -> int:
    elements = shape.ofm[0] * shape.ofm[1] * _stored_depth(shape.ofm, array)
    return _on_bus(elements * shape.ofm_bits // 8, _write_run(shape, block, array), port)


def _write_run(shape: Shape, block: Dims, array: MacArray) -> int:
    element = shape.ofm_bits // 8
    if _is_bricked(shape.ofm, array):
        return array.brick_depth * block[1] * element * array.cores
    if block[2] <= _SPLIT_DEPTH and shape.ofm[2] * element == block[2]:
        return block[1] * block[2] * element
    return min(64, 16 * element * array.cores, block[2] * element)


def _on_bus(size: int, run: int, port: Port) -> int:
    return size * port.burst // min(port.burst, run)


def _is_bricked(dims: Dims, array: MacArray) -> bool:
    return array.brick_depth > 0 and dims[2] >= _IMAGE_DEPTH


def _stored_depth(dims: Dims, array: MacArray) -> int:
    return _round_up(dims[2], array.brick_depth) if _is_bricked(dims, array) else dims[2]


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _smaller(first: Dims, second: Dims) -> Dims:
    return min(first[0], second[0]), min(first[1], second[1]), min(first[2], second[2])


def _elements(dims: Dims) -> int:
    return dims[0] * dims[1] * dims[2]


def _round_up(value: _Size, step: int) -> _Size:
    return -(-value // step) * step
