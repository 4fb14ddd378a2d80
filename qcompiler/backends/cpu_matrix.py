"""Convolutions and fully connected layers by matrix multiply instructions (Arm's i8mm).

An instruction takes eight channels of two neighbouring pixels and of two filters, twice the products of a dot product.
It wants channels in eights and rows of at least two pixels; `cpu_packed` has the other shapes.
"""

from functools import partial

import numpy as np
import onnx_ir as ir

from qcompiler.backends import packed_bits, te
from qcompiler.backends.base import HostCode, Kernel, parameters_of, placeholder
from qcompiler.backends.cpu_packed import Finish, Geometry, Operands, flattened, round_up, staged_element, workload
from qcompiler.backends.schedules import matrix as schedule
from qcompiler.backends.schedules.loops import threads_for
from qcompiler.backends.schedules.matrix import DEPTH, LANES
from qcompiler.backends.te import Expr
from qcompiler.backends.tiles import Tiling
from qcompiler.graph import dtype_of


def suits(geometry: Geometry, operands: Operands) -> bool:
    """Whether `matrix_convolution` takes a convolution, the CPU having the instruction."""
    width = flattened(geometry).out_size[1]
    return geometry.group == 1 and operands.w_zero_point == 0 and operands.weights.shape[3] % DEPTH == 0 and width > 1


def matrix_convolution(
    geometry: Geometry, operands: Operands, finish: Finish, x_value: ir.Value, host: HostCode, instruction: str
) -> Kernel:
    """A convolution that `suits`; `instruction` takes its operands."""
    geometry = flattened(geometry)
    n, h, w, c = geometry.x_shape
    oh, ow = geometry.out_size
    out_channels, kh, kw, _ = operands.weights.shape
    (sy, sx), (dy, dx) = geometry.strides, geometry.dilations
    blocks = -(-out_channels // LANES)
    threads = threads_for(host, geometry.macs, 4 * DEPTH)
    tiles = schedule.matrix_tiles(ow, blocks, registers=host.vector_registers)
    tiling = Tiling(workload("matrix", geometry, operands, finish, threads), tiles)
    tile = host.tiles(tiling)
    wide = round_up(ow, tile.pixels)

    # Pixels of one stride make an element of the map's third axis: neighbours in the output are neighbours there.
    rows, columns = (oh - 1) * sy + (kh - 1) * dy + 1, round_up((wide - 1) * sx + (kw - 1) * dx + 1, sx)
    as_is = (
        operands.x_dtype == str(dtype_of(x_value))
        and geometry.pad == (0, 0)
        and geometry.dilate == (1, 1)
        and rows <= h
        and columns <= w
        and w % sx == 0
    )
    if as_is:
        x = staged = placeholder(x_value, (n, h, w // sx, sx * c))
    else:
        x = placeholder(x_value, (n, h, w * c))
        zero = te.const(operands.x_zero_point, operands.x_dtype)
        element = staged_element(x, geometry, operands, (c, c, c), zero)
        staged = te.compute(
            (n, rows, columns // sx, sx * c), lambda b, i, p, k: element(b, i, p * (sx * c) + k), "staged"
        )

    pack = partial(_pack, blocks=blocks)
    stored = packed_bits.store_packed(operands.weights, operands.bits, operands.groups, pack, _QUADS)
    arrays = [*stored.arrays, *(_per_lane(array, blocks) for array in (operands.bias, *finish.channels))]
    parameters = parameters_of(arrays)
    weights, (bias, *channels) = stored.read(parameters)
    maps = [placeholder(value, (n, oh, ow, blocks, LANES)) for value in finish.maps]
    scalars = [placeholder(value, (1,)) for value in finish.scalars]

    ky, kx = te.reduce_axis(kh, "ky"), te.reduce_axis(kw, "kx")
    q, r = te.reduce_axis(c // DEPTH, "q"), te.reduce_axis(DEPTH, "r")

    def product(b: Expr, i: Expr, pair: Expr, o: Expr, half: Expr, row: Expr, column: Expr) -> Expr:
        place, within = pair * 2 + row + kx * dx // sx, kx * dx % sx * c + q * DEPTH + r
        pixel = staged[b, i * sy + ky * dy, place, within].astype("int32")
        return te.reduce_sum(pixel * weights[o, ky, kx, q, half, column, r].astype("int32"), axis=[ky, kx, q, r])

    accumulator = te.compute((n, oh, wide // 2, blocks, LANES // 2, 2, 2), product, "accumulator")

    def finished(b: Expr, i: Expr, j: Expr, o: Expr, v: Expr) -> Expr:
        total = accumulator[b, i, j // 2, o, v // 2, j % 2, v % 2] + bias[o, v]
        # Pixels past the row's end are cut off below; what they read must only exist.
        column = te.minimum(j, ow - 1) if wide != ow else j
        elements = [*(tensor[b, i, column, o, v] for tensor in maps), *(scalar[0] for scalar in scalars)]
        return finish.expression(total, [array[o, v] for array in channels], elements)

    output = result = te.compute((n, oh, wide, blocks, LANES), finished, "output")
    if wide != ow or blocks * LANES != out_channels:
        result = te.compute(
            (n, oh, ow, out_channels), lambda b, i, j, o: output[b, i, j, o // LANES, o % LANES], "cropped"
        )
    function = te.prim_func([x, *maps, *scalars, *parameters, result])
    scheduled = schedule.schedule_matrix_convolution(function, instruction, tile, threads=threads)
    scheduled = stored.scheduled(scheduled, threads=threads)
    return Kernel(scheduled, (x_value, *finish.maps, *finish.scalars), tuple(arrays), tiling)


_QUADS = 3
"""The axis of the quads, eights here, in what `_pack` returns."""


def _pack(weights: np.ndarray, blocks: int) -> np.ndarray:
    """[O, KH, KW, C] to [blocks, KH, KW, C / 8, 2, 2, 8], ones where channels are filled up."""
    out_channels, kh, kw, c = weights.shape
    filled = np.ones((blocks * LANES, kh, kw, c), weights.dtype)
    filled[:out_channels] = weights
    split = filled.reshape(blocks, LANES // 2, 2, kh, kw, c // DEPTH, DEPTH)
    return np.ascontiguousarray(split.transpose(0, 3, 4, 5, 1, 2, 6))


def _per_lane(array: np.ndarray, blocks: int) -> np.ndarray:
    """[O] as [blocks, lanes], filled up with zeros."""
    filled = np.zeros(blocks * LANES, array.dtype)
    filled[: array.size] = array
    return filled.reshape(blocks, LANES)
