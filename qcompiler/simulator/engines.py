"""How long one command keeps a compute engine busy, and what it moves: closed forms per kind of engine.

`mac_array` follows the Ethos-U performance figures of the ethos-u-vela 5.2.0 source distribution
(ethosu/regor/architecture/ethosu55/ethos_u55_performance.cpp and ethos_u55.cpp). `systolic` holds the closed forms
of SCALE-Sim 3. All cycles are of the accelerator's clock.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

from qcompiler.target import Engine, MacArray, Simd, Systolic

OpClass = Literal["conv", "depthwise", "max_pool", "average_pool", "add", "mul", "requantize", "lookup", "softmax",
                  "resize_nearest", "resize_linear"]  # fmt: skip

SCALE_RECORD_BYTES = 12
"""Bias, multiplier and shift of one channel, as `isa.SCALES` reads them."""

_ACCUMULATOR_BYTES = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """One command's geometry. Feature maps are height, width, depth; bits are those of one element."""

    op: OpClass
    ofm: tuple[int, int, int]
    ifm: tuple[int, int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    """Convolutions only: independent convolutions over ifm[2] / groups and ofm[2] / groups channels."""
    ifm_bits: int
    ofm_bits: int
    weight_bits: int
    upsampling: int
    """Output positions per input position of a transposed convolution, else 1."""

    @property
    def ofm_elements(self) -> int:
        return self.ofm[0] * self.ofm[1] * self.ofm[2]

    @property
    def ifm_elements(self) -> int:
        return self.ifm[0] * self.ifm[1] * self.ifm[2]

    @property
    def window(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def has_weights(self) -> bool:
        return self.op in ("conv", "depthwise")

    @property
    def weight_elements(self) -> int:
        return self.window * self.ofm[2] * (self.ifm[2] // self.groups) if self.has_weights else 0

    @property
    def macs(self) -> int:
        """Multiplications with an input element, padding included (as everyone counts)."""
        if not self.has_weights:
            return 0
        return ceil(self.ofm_elements * self.window * (self.ifm[2] // self.groups) / self.upsampling)


@dataclass(frozen=True, slots=True)
class Work:
    """What one command asks of its engine."""

    cycles: float
    ifm_bytes: float
    """Read from the input feature map's memory, repeated reads included."""
    weight_bytes: float
    ofm_bytes: float


@dataclass(frozen=True, slots=True)
class Feed:
    """The memories an engine works from."""

    bandwidth: float
    """Of the memory that holds the input, bytes a cycle."""
    scale_latency: float
    """Read latency of the memory that holds the scales, cycles."""


def work(shape: Shape, engine: Engine, precision: str, feed: Feed) -> Work:
    """Cycles and traffic of one command on an engine.

    `precision` is the pair ("int8*int8") of a command with weights, and unused without.
    """
    match engine.geometry:
        case MacArray():
            return mac_array(shape, engine.geometry, feed)
        case Systolic():
            return systolic(shape, engine.geometry, engine.precisions[precision].rate)
        case Simd():
            return simd(shape, engine.geometry, engine.precisions[precision].rate if shape.has_weights else None)


# --- systolic arrays and vector units ------------------------------------------------------------------------


def weight_stationary_cycles(m: int, k: int, n: int, rows: int, cols: int) -> int:
    """[m,k] x [k,n] with weights held in the array: ⌈K/R⌉⌈N/C⌉(M + 2R + C - 2) - 1 (SCALE-Sim 3)."""
    return ceil(k / rows) * ceil(n / cols) * (m + 2 * rows + cols - 2) - 1


def output_stationary_cycles(m: int, k: int, n: int, rows: int, cols: int) -> int:
    """[m,k] x [k,n] with sums held in the array: ⌈M/R⌉⌈N/C⌉(K + R + C - 2) - 1 (SCALE-Sim 3)."""
    return ceil(m / rows) * ceil(n / cols) * (k + rows + cols - 2) - 1


def systolic(shape: Shape, array: Systolic, rate: float) -> Work:
    """A convolution as a matrix product of output pixels, window and output channels, group after group.

    A rate other than rows * cols scales the closed form: two int4 products a cell and cycle halve it.
    """
    assert shape.has_weights, f"a systolic array does not run {shape.op}"
    m, k, n = shape.ofm[0] * shape.ofm[1], shape.window * (shape.ifm[2] // shape.groups), shape.ofm[2] // shape.groups
    stationary = array.dataflow == "weight_stationary"
    closed_form = weight_stationary_cycles if stationary else output_stationary_cycles
    cycles = shape.groups * closed_form(m, k, n, array.rows, array.cols) * array.rows * array.cols / rate
    passes = ceil(n / array.cols)
    weight_passes = 1 if stationary else ceil(m / array.rows)
    return Work(
        cycles,
        ifm_bytes=shape.groups * m * k * passes * shape.ifm_bits / 8,
        weight_bytes=shape.weight_elements * weight_passes * shape.weight_bits / 8,
        ofm_bytes=shape.ofm_elements * shape.ofm_bits / 8,
    )


_SIMD_CLASS: dict[str, str] = {
    "add": "elementwise",
    "mul": "elementwise",
    "requantize": "elementwise",
    "max_pool": "pool",
    "average_pool": "pool",
    "lookup": "lookup",
    "softmax": "softmax",
    "resize_nearest": "resize",
    "resize_linear": "resize",
}


def simd(shape: Shape, unit: Simd, mac_rate: float | None) -> Work:
    """Elements, window elements for pools or MACs, at the unit's rate; a class without a rate runs one lane each."""
    if shape.has_weights:
        assert mac_rate is not None
        amount, rate = shape.macs, mac_rate
    else:
        kind = _SIMD_CLASS[shape.op]
        amount = shape.ofm_elements * (shape.window if kind == "pool" else 1)
        rate = unit.element_rate.get(kind, unit.lanes)
    read = shape.ofm_elements * shape.window if shape.op in ("max_pool", "average_pool") else shape.ifm_elements
    if shape.has_weights:
        read = shape.macs * (1 if shape.op == "depthwise" else 1 / max(1, min(unit.lanes, shape.ofm[2])))
    return Work(
        amount / rate,
        ifm_bytes=read * shape.ifm_bits / 8,
        weight_bytes=shape.weight_elements * shape.weight_bits / 8,
        ofm_bytes=shape.ofm_elements * shape.ofm_bits / 8,
    )


# --- Ethos-U -------------------------------------------------------------------------------------------------

# Indices of MacArray.output_cycles and activation_cycles.
_UNARY_INT32, _BINARY_INT32, _MUL_INT32, _MUL, _SIMPLE_ADD, _ADD, _MAX_POOL, _OTHER = range(8)
_LOOKUP, _CLAMP, _NO_ACTIVATION = range(3)
# Indices of MacArray.granules.
_IFM8, _IFM16, _ACC32 = 0, 1, 6


def mac_array(shape: Shape, array: MacArray, feed: Feed) -> Work:
    """OFM blocks of whole micro-blocks through a MAC stage and an output stage, whichever is slower."""
    match shape.op:
        case "conv" if shape.groups > 1:
            one = mac_array(_one_group(shape), array, feed)
            return Work(
                one.cycles * shape.groups,
                one.ifm_bytes * shape.groups,
                one.weight_bytes * shape.groups,
                one.ofm_bytes * shape.groups,
            )
        case "conv" | "depthwise" | "max_pool" | "average_pool" | "resize_linear":
            return _blocked(shape, array, feed)
        case _:
            return _elementwise(shape, array)


def _one_group(shape: Shape) -> Shape:
    (height, width, depth), (ifm_height, ifm_width, ifm_depth) = shape.ofm, shape.ifm
    return Shape(
        "conv", (height, width, depth // shape.groups), (ifm_height, ifm_width, ifm_depth // shape.groups),
        shape.kernel, shape.stride, shape.dilation, 1, shape.ifm_bits, shape.ofm_bits, shape.weight_bits,
        shape.upsampling,
    )  # fmt: skip


def _elementwise(shape: Shape, array: MacArray) -> Work:
    """Output stage only: cycles per element. Softmax is the six full-size passes Vela decomposes it into."""
    out, activation = array.output_cycles, array.activation_cycles
    match shape.op:
        case "add":
            per_element = out[_ADD]
        case "mul":
            per_element = out[_MUL]
        case "lookup":
            per_element = max(out[_OTHER], activation[_LOOKUP])
        case "softmax":
            # Maximum, subtraction with the exponential's table, shift, sum, multiplication, shift.
            per_element = out[_MAX_POOL] + 3 * out[_BINARY_INT32] + out[_OTHER] + out[_MUL_INT32]
        case _:
            per_element = out[_OTHER]
    passes = 6 if shape.op == "softmax" else 1
    return Work(
        ceil(per_element * shape.ofm_elements),
        ifm_bytes=shape.ifm_elements * shape.ifm_bits / 8 * passes,
        weight_bytes=0,
        ofm_bytes=shape.ofm_elements * shape.ofm_bits / 8 * passes,
    )


def _blocked(shape: Shape, array: MacArray, feed: Feed) -> Work:
    """The best OFM block that fits the buffers: least time, memory included, then least traffic.

    All candidate blocks are priced at once: the arrays below have one axis for block height, width and depth.
    """
    ublock = _micro_block(shape, array)
    limits = tuple(min(size, limit) for size, limit in zip(shape.ofm, array.block_max, strict=True))
    height = _sizes(limits[0], ublock[0])[:, None, None]
    width = _sizes(limits[1], ublock[1])[None, :, None]
    depth = _sizes(limits[2], ublock[2] if shape.ofm[2] <= 16 else 16)[None, None, :]

    kernel = (4, 1) if shape.op == "resize_linear" else shape.kernel
    subkernels = _subkernels(kernel, array.subkernel_max)
    part_kernel = shape.op == "conv" and _prefers_part_kernel(shape, kernel)
    ifm_block_depth = _ifm_block_depth(shape, array, part_kernel)

    # Buffers: two IFM blocks and two blocks of accumulators, in banks.
    ifm_height = _ifm_extent(height, shape, kernel, array, 0)
    ifm_width = _ifm_extent(width, shape, kernel, array, 1)
    per_pixel = _round_up(depth if shape.op != "conv" else np.array(ifm_block_depth), 8) * (shape.ifm_bits // 8)
    ifm_banks = _round_up(
        2 * _divide_up(ifm_height * ifm_width * per_pixel, array.bank_size),
        array.granules[_IFM8 if shape.ifm_bits == 8 else _IFM16],
    )
    accumulators = height * width * _round_up(depth, 8) * _ACCUMULATOR_BYTES
    accumulator_banks = _round_up(2 * _divide_up(accumulators, array.bank_size), array.granules[_ACC32])
    room = array.accumulator_banks - array.reserved_banks - array.reserved_end_banks
    fits = ifm_banks + accumulator_banks <= room
    fits[0, 0, 0] = True  # the smallest block always runs, whatever a hand-written spec says of its banks

    # Stage times of one block, clipped to the feature map.
    block_height, block_width, block_depth = (
        np.minimum(size, limit) for size, limit in zip((height, width, depth), shape.ofm, strict=True)
    )
    area = _divide_up(block_height, ublock[0]) * _divide_up(block_width, ublock[1])
    deep = _divide_up(block_depth, ublock[2])
    mac = _mac_cycles(shape, array, ublock, area, deep, subkernels, part_kernel, ifm_block_depth) / array.cores
    out = np.ceil(_output_cycles(shape, array) * block_height * block_width * block_depth)
    if shape.has_weights:
        out = np.maximum(out, 10 * block_depth * feed.scale_latency / 256)  # ten bytes of scale and bias a channel
    whole = ceil(shape.ofm[0] / ublock[0]) * ceil(shape.ofm[1] / ublock[1]) * ceil(shape.ofm[2] / ublock[2])
    blocks = whole / (area * deep)
    cycles = np.where(mac > out, mac * blocks + out, out * blocks + mac)

    # Traffic: every block reads its IFM; weights are read again for every block of the plane.
    planes = _divide_up(shape.ofm[0], block_height) * _divide_up(shape.ofm[1], block_width)
    slices = _divide_up(shape.ofm[2], block_depth) if shape.op == "conv" else 1
    seen = np.minimum(ifm_height, shape.ifm[0]) * np.minimum(ifm_width, shape.ifm[1])
    ifm_bytes = seen * shape.ifm[2] * len(subkernels) * planes * slices * (shape.ifm_bits / 8)
    weight_bytes = shape.weight_elements * (shape.weight_bits / 8) * planes

    traffic = np.broadcast_to(ifm_bytes + weight_bytes, cycles.shape)
    time = np.maximum(cycles, traffic / feed.bandwidth)
    best = np.unravel_index(np.lexsort((traffic.ravel(), time.ravel(), ~fits.ravel()))[0], cycles.shape)
    return Work(
        float(cycles[best]),
        float(np.broadcast_to(ifm_bytes, cycles.shape)[best]),
        float(np.broadcast_to(weight_bytes, cycles.shape)[best]),
        shape.ofm_elements * shape.ofm_bits / 8,
    )


def _micro_block(shape: Shape, array: MacArray) -> tuple[int, int, int]:
    """A 2-high micro-block turns into a 4-wide one for single rows of even width and flat kernels."""
    height, width, depth = array.ublock
    if height == 2 and shape.op == "conv" and shape.ofm[0] == 1 and shape.ofm[1] % 2 == 0 and shape.kernel[0] == 1:
        return 1, width * 2, depth
    return height, width, depth


def _sizes(limit: int, step: int) -> np.ndarray:
    """Block sizes to try: step, 2 step, 4 step… and the whole."""
    whole = ceil(limit / step) * step
    sizes = [step]
    while sizes[-1] * 2 < whole:
        sizes.append(sizes[-1] * 2)
    if whole > step:
        sizes.append(whole)
    return np.array(sizes, np.int64)


def _subkernels(kernel: tuple[int, int], limit: tuple[int, int]) -> list[int]:
    """Element counts of the pieces a large kernel is run in."""
    heights = [min(limit[0], kernel[0] - start) for start in range(0, kernel[0], limit[0])]
    widths = [min(limit[1], kernel[1] - start) for start in range(0, kernel[1], limit[1])]
    return [height * width for height in heights for width in widths]


def _prefers_part_kernel(shape: Shape, kernel: tuple[int, int]) -> bool:
    """Whether four kernel elements times eight channels fill the array better than thirty-two channels."""
    depth, window = shape.ifm[2], kernel[0] * kernel[1]
    by_depth = depth / (ceil(depth / 32) * 32)
    by_kernel = depth / (ceil(depth / 8) * 8) * window / (ceil(window / 4) * 4)
    return depth <= 8 or by_kernel > by_depth


def _ifm_block_depth(shape: Shape, array: MacArray, part_kernel: bool) -> int:
    step = array.ifm_ublock[2]
    if shape.ifm_bits == 16:
        return ceil(min(shape.ifm[2], 16) / 4) * 4
    return ceil(min(shape.ifm[2], 16 if part_kernel else 32) / step) * step


def _ifm_extent(size: np.ndarray, shape: Shape, kernel: tuple[int, int], array: MacArray, axis: int) -> np.ndarray:
    """Input rows or columns under a block, in whole input micro-blocks."""
    reach = (min(kernel[axis], array.subkernel_max[axis]) - 1) * shape.dilation[axis] + 1
    return _round_up((size - 1) * shape.stride[axis] + reach, array.ifm_ublock[axis])


def _mac_cycles(
    shape: Shape,
    array: MacArray,
    ublock: tuple[int, int, int],
    area: np.ndarray,
    deep: np.ndarray,
    subkernels: list[int],
    part_kernel: bool,
    ifm_block_depth: int,
) -> np.ndarray:
    """MAC stage cycles of one block: four cycles a micro-block and step, or what the weight stream allows."""
    weights = 4 * ublock[2]
    if shape.op in ("max_pool", "average_pool", "resize_linear"):
        steps, per_step = len(subkernels), np.zeros_like(area)
        cycles = sum(max(4, elements) for elements in subkernels) * area * deep * array.pool_cycles
        cycles = cycles * (shape.ifm_bits / 8)
        repeats = 1
    elif shape.op == "depthwise":
        steps = sum(ceil(elements / 4) for elements in subkernels)
        per_step = np.maximum(weights, 4 * area * (shape.ifm_bits // 8))
        cycles, repeats = per_step * steps * deep, 1
    else:
        together = 1 if not part_kernel else 2 if shape.ifm_bits == 16 else 4
        steps = sum(ceil(elements / together) for elements in subkernels)
        per_step = np.maximum(weights, 4 * area)
        cycles = per_step * steps * deep
        repeats = ceil(shape.ifm[2] / ifm_block_depth)
        if part_kernel:
            repeats *= ceil(min(shape.ifm[2], ifm_block_depth) / 8)
    # A block one micro-block wide cannot hide the accumulators' pipeline.
    delay = np.where(deep == 1, array.pipeline_delay * steps, array.pipeline_delay * max(0, steps - 1) * deep)
    return (cycles + np.where(area == 1, delay, 0)) * repeats


def _output_cycles(shape: Shape, array: MacArray) -> float:
    if shape.op == "max_pool":
        return array.output_cycles[_MAX_POOL]
    return array.output_cycles[_MUL if shape.ifm_bits == 16 else _OTHER]


def _divide_up(value: np.ndarray | int, divisor: np.ndarray | int) -> np.ndarray:
    return -(-np.asarray(value) // divisor)


def _round_up(value: np.ndarray, step: int) -> np.ndarray:
    return _divide_up(value, step) * step
