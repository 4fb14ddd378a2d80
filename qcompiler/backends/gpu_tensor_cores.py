"""Products on CUDA's tensor cores: which suit them, how their operands lie in memory, and their kernels.

`schedules.gpu_mma` builds the kernels; this module speaks of nodes and values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.backends.base import GpuKernel, Kernel
from qcompiler.backends.cpu_conv import Problem, fold_zero_points
from qcompiler.backends.cpu_packed import Finish, Operands, flattened
from qcompiler.backends.gpu_code import Device
from qcompiler.backends.schedules import gpu_mma as mma
from qcompiler.backends.schedules.gpu import Filled
from qcompiler.graph import dtype_of, element_count, shape_of
from qcompiler.integer.used import FOUR_BITS, four_bit_type


@dataclass(frozen=True)
class Piece:
    """Channels of a wider tensor."""

    whole: ir.Value
    first: int


@dataclass(frozen=True)
class Layout:
    """How tensors lie in memory, where not as they are."""

    packed: frozenset[ir.Value] = frozenset()
    """Tensors of four-bit numbers, two to a byte."""
    pieces: Mapping[ir.Value, Piece] = field(default_factory=dict[ir.Value, Piece])
    """Tensors that are made where they will be joined."""

    def elements(self, value: ir.Value) -> mma.Elements:
        dtype, channels = str(dtype_of(value)), shape_of(value)[-1]
        if value in self.packed:
            return mma.Elements(dtype, 4, four_bit_type(value) == "int4", channels, 0)
        piece = self.pieces.get(value)
        pitch, first = (channels, 0) if piece is None else (shape_of(piece.whole)[-1], piece.first)
        return mma.Elements(dtype, 8, dtype == "int8", pitch, first)


def work_of(problem: Problem, x: ir.Value, device: Device) -> mma.Work | None:
    """A product as tensor cores see it, or None where there are none or they are of no use."""
    out_channels, *window = problem.weights.shape
    n = out_channels // problem.group
    if "mma" not in device.features or problem.is_depthwise or n < mma.FEWEST_COLUMNS:
        return None
    folded = fold_zero_points(problem, problem.x_dtype)
    if folded.w_zero_point != 0:
        return None
    m, k = problem.x_shape[0] * element_count(problem.out_size), element_count(window)
    few = four_bit_type(x) if "mma_s4" in device.features and folded.bits <= 4 else None
    if few is not None and FOUR_BITS[few][0] <= problem.x_zero_point <= FOUR_BITS[few][1]:
        return mma.Work(problem.group, m, n, -(-k // 2), 4, 4, signed=few == "int4")
    weight_bits = 4 if folded.bits <= 4 and _has_room(folded) else 8
    return mma.Work(problem.group, m, n, k, 8, weight_bits, signed=problem.x_dtype == "int8")


def _has_room(folded: Operands) -> bool:
    """Whether sums are the same after sixteen times the weights have been added up."""
    highest = 255 if folded.x_dtype == "uint8" else 128
    sums = np.abs(folded.weights.astype(np.int64)).sum(axis=(1, 2, 3))
    return int(sums.max(initial=0)) * highest * 16 < 1 << 31


def product(
    problem: Problem,
    x: ir.Value,
    work: mma.Work,
    output: ir.Value,
    finish: Finish,
    device: Device,
    layout: Layout,
    tile: mma.MmaTile | None,
) -> Kernel:
    """The product on tensor cores."""
    folded = fold_zero_points(problem, problem.x_dtype)
    packs = any(value in layout.packed for value in (output, *finish.maps))
    if tile is None:
        tile = mma.mma_tile(work, device.units, asynchronous=device.copies_ahead, fewest_columns=8 if packs else 4)
    filled = tile.filled(work.m, work.n, work.k)
    matrix = np.zeros((work.groups, filled.n, filled.k * 8 // work.bits), np.int8)
    rows = folded.weights.reshape(work.groups, work.n, -1)
    matrix[:, : work.n, : rows.shape[-1]] = rows
    weights = np.ascontiguousarray(mma.arranged(matrix, tile, work)).reshape(-1)
    image = _mma_image(flattened(problem), work, layout.elements(x).bits)
    channels = tuple(_by_tile(array, work, filled) for array in (folded.bias, *finish.channels))
    maps = tuple(layout.elements(value) for value in finish.maps)
    ending = mma.Ending(channels, maps, layout.elements(output), finish.expression)
    function = mma.product(work, tile, image, ending)
    scratch = 4 * mma.scratch_words(work, tile)
    return GpuKernel(function, (x, *finish.maps), (weights, image.padding, *channels), scratch=scratch)


def _mma_image(problem: Problem, work: mma.Work, bits: int) -> mma.Image:
    """bits: of an element in memory."""
    (_, height, width, channels), depth = problem.x_shape, problem.weights.shape[-1]
    pixel, group = channels * bits // 8, depth * bits // 8
    window = (
        height, width, pixel, group, *problem.out_size, *problem.weights.shape[1:3], *problem.strides,
        *problem.dilations, *problem.pad, *problem.dilate,
    )  # fmt: skip
    # Eight bytes make a word of four bits each.
    sizes = (16, 8, 4, 1) if bits == work.bits else (8, 1)
    word = next(size for size in sizes if group % size == 0 and pixel % size == 0)
    shape = (element_count(problem.x_shape) * bits // 8,)
    return mma.Image(shape, problem.x_dtype, window, word, bits, problem.x_zero_point)


def _by_tile(array: np.ndarray, work: mma.Work, filled: Filled) -> np.ndarray:
    """Numbers of channels as [groups, N of whole tiles]."""
    whole = np.zeros((work.groups, filled.n), array.dtype)
    whole[:, : work.n] = array.reshape(work.groups, work.n)
    return whole
