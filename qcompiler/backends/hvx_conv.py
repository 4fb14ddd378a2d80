"""Convolutions and fully connected layers on Hexagon's vector unit (HVX).

`_dot_convolution` reduces by vrmpy: 32 output channels in lanes, each adding four products of bytes an instruction. In
NHWC a row of a window is one run of kernel width times channels adjacent bytes; a step takes the next four of them,
spread all over a vector. With 16 channels or fewer a vector is cut into parts: each takes four bytes of its own, and
the parts are added up at the end. `_depthwise_convolution` keeps channels in lanes.

Zero points are folded as in `cpu_conv`; activations are multiplied signed or unsigned, as they come.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.backends import te
from qcompiler.backends.base import HostCode, Kernel, parameters_of, placeholder
from qcompiler.backends.cpu_conv import Problem, fold_zero_points
from qcompiler.backends.cpu_packed import Operands, flattened, round_up
from qcompiler.backends.hvx_windows import Window, cropped_rows, row_windows
from qcompiler.backends.mcu_stages import requantizing, stage
from qcompiler.backends.schedules import hvx as schedule
from qcompiler.backends.schedules import vrmpy
from qcompiler.backends.te import Expr

_MOST_TAPS = 49
"""Windows of more are rare, and their unrolled sums would be long."""
_MOST_TAP_BYTES = 64 * 1024
"""Of weights repeated until channels and vectors end together."""


def convolution(problem: Problem, x_value: ir.Value, host: HostCode) -> Kernel | None:
    """The kernel, or None where no template here fits and the CPU backend's must do."""
    if problem.x_dtype not in ("int8", "uint8"):
        return None
    folded = fold_zero_points(problem, problem.x_dtype)
    if folded.w_zero_point != 0:
        return None
    if problem.is_depthwise:
        return _depthwise_convolution(problem, folded, x_value)
    return None if problem.group > 1 else _dot_convolution(problem, folded, x_value)


@dataclass(frozen=True)
class _Window:
    """How the row of a window is read: `taps` runs of `run` adjacent bytes, in steps of `step` bytes."""

    taps: int
    run: int
    step: int

    @property
    def steps(self) -> int:
        return -(-self.run // self.step)


def _dot_convolution(problem: Problem, folded: Operands, x_value: ir.Value) -> Kernel:
    out_channels, kh, kw, c = folded.weights.shape
    channels = schedule.padded_channels(out_channels)
    groups = schedule.lane_groups(channels)
    # Quads of bytes are loaded as words, or else with a whole vector behind them, which must not lie past the input.
    words = groups == 1 and c % vrmpy.QUAD == 0
    one_row = flattened(problem)
    if words and one_row.out_size[1] % schedule.conv_tile(one_row.out_size[1], channels).pixels == 0:
        # Otherwise a copy would be of the whole image.
        problem = one_row
    (oh, ow), (sy, sx), (dy, dx) = problem.out_size, problem.strides, problem.dilations
    tile = schedule.conv_tile(ow, channels)
    wide = round_up(ow, tile.pixels)
    adjacent = dx == 1
    window = _Window(1 if adjacent else kw, kw * c if adjacent else c, vrmpy.QUAD * groups)

    n, h, w, _ = problem.x_shape
    rows = (oh - 1) * sy + (kh - 1) * dy + 1
    row_bytes = (wide - 1) * sx * c + (window.taps - 1) * dx * c + window.steps * window.step
    x = placeholder(x_value, (n, h, w * c))
    plain = words and problem.pad == (0, 0) and problem.dilate == (1, 1) and rows <= h and row_bytes <= w * c
    source = x if plain else stage(x, problem, folded, (n, rows, row_bytes))

    finish = requantizing(folded, problem.epilogue)
    arrays = (
        _pack(folded.weights, window, channels, groups),
        *(_per_output(array, channels) for array in finish.arrays),
    )
    weights, *parameters = parameters_of(arrays)
    ky, tap = te.reduce_axis(kh, "ky"), te.reduce_axis(window.taps, "tap")
    step, r = te.reduce_axis(window.steps, "step"), te.reduce_axis(vrmpy.QUAD, "r")
    reduced, lanes = [ky, tap, step, r], vrmpy.LANES // groups

    def product(b: Expr, i: Expr, j: Expr, block: Expr, lane: Expr) -> Expr:
        quad = step if groups == 1 else step * groups + block
        pixel = source[b, i * sy + ky * dy, (j * sx + tap * dx) * c + quad * vrmpy.QUAD + r]
        weight = weights[block, ky, tap, step, lane, r] if groups == 1 else weights[ky, tap, step, block, lane, r]
        return te.reduce_sum(pixel.astype("int32") * weight.astype("int32"), axis=reduced)

    parts = channels // vrmpy.LANES if groups == 1 else groups
    accumulator = te.compute((n, oh, wide, parts, lanes), product, "accumulator")

    period = max(channels, vrmpy.VECTOR_BYTES)
    bias, *factors = parameters

    def folded_parts(b: Expr, i: Expr, j: Expr, o: Expr) -> Expr:
        first, *others = (accumulator[b, i, j, group, o] for group in range(groups))
        return sum(others, first)

    sums = te.compute((n, oh, wide, channels), folded_parts, "folded") if groups > 1 else accumulator

    def total(b: Expr, i: Expr, j: Expr, o: Expr) -> Expr:
        # A stage of its own: TVM would add in 64 bits what is multiplied in 64, and LLVM find no high multiply.
        value = sums[b, i, j, o] if groups > 1 else sums[b, i, j, o // vrmpy.LANES, o % vrmpy.LANES]
        return value + bias[(j * channels + o) % period]

    totals = te.compute((n, oh, wide, channels), total, "total")

    def output(b: Expr, i: Expr, j: Expr, o: Expr) -> Expr:
        return finish.output(totals[b, i, j, o], [array[(j * channels + o) % period] for array in factors])

    result = te.compute((n, oh, wide, channels), output, "output")
    cropped = (wide, channels) != (ow, out_channels)
    if cropped:
        padded = result
        result = te.compute((n, oh, ow, out_channels), lambda *index: padded[index], "cropped")
    function = te.prim_func([x, weights, *parameters, result])
    dot = vrmpy.spreading_dot(problem.x_dtype, groups) if groups > 1 else vrmpy.broadcasting_dot(problem.x_dtype, words)
    vector = finish.high is not None and tile.outputs % vrmpy.VECTOR_BYTES == 0
    scheduled = schedule.schedule_dot_convolution(function, tile, dot, staged=not plain, cropped=cropped, vector=vector)
    return Kernel(scheduled, (x_value,), arrays)


# --- depthwise ---------------------------------------------------------------------------------------------


def _depthwise_convolution(problem: Problem, folded: Operands, x_value: ir.Value) -> Kernel | None:
    channels, kh, kw, _ = folded.weights.shape
    finish = requantizing(folded, problem.epilogue)
    period = math.lcm(channels, vrmpy.VECTOR_BYTES)
    if finish.high is None or kh * kw > _MOST_TAPS or kh * kw * period > _MOST_TAP_BYTES or problem.dilate != (1, 1):
        return None
    window = Window((kh, kw), problem.strides, problem.dilations, problem.pad, problem.out_size)
    source = row_windows(x_value, window, folded.x_zero_point)
    taps = np.ascontiguousarray(folded.weights[..., 0].transpose(1, 2, 0))
    arrays = tuple(np.ascontiguousarray(np.tile(array, period // channels)) for array in (taps, *finish.arrays))
    weights, bias, *factors = parameters_of(arrays)

    def total(b: Expr, i: Expr, f: Expr) -> Expr:
        sums = bias[f % period]
        for ky, kx in np.ndindex(kh, kw):
            # Two bytes make 16 bits, a widening multiply; the sum widens again.
            product = source.tap(b, i, ky, kx, f).astype("int16") * weights[ky, kx, f % period].astype("int16")
            sums = sums + product.astype("int32")
        return sums

    shape = (problem.x_shape[0], problem.out_size[0], source.wide)
    totals = te.compute(shape, total, "total")
    rows = te.compute(
        shape, lambda b, i, f: finish.output(totals[b, i, f], [array[f % period] for array in factors]), "output"
    )
    result, cropped = cropped_rows(rows, problem.out_size[1] * channels)
    function = te.prim_func([source.x, weights, bias, *factors, result])
    scheduled = schedule.schedule_rows(function, staged=source.staged, cropped=cropped)
    return Kernel(scheduled, (x_value,), arrays)


def _pack(weights: np.ndarray, window: _Window, channels: int, groups: int) -> np.ndarray:
    """[O, KH, KW, C] to [channels / 32, KH, taps, steps, 32, 4], or to [KH, taps, steps, groups, channels, 4]."""
    out_channels, kh = weights.shape[:2]
    filled = np.zeros((channels, kh, window.taps, window.steps * window.step), np.int8)
    filled[:out_channels, :, :, : window.run] = weights.reshape(out_channels, kh, window.taps, window.run)
    quads = filled.reshape(channels, kh, window.taps, window.steps, groups, vrmpy.QUAD)
    if groups > 1:
        return np.ascontiguousarray(quads.transpose(1, 2, 3, 4, 0, 5))
    blocks = quads.reshape(-1, vrmpy.LANES, *quads.shape[1:4], vrmpy.QUAD)
    return np.ascontiguousarray(blocks.transpose(0, 2, 3, 4, 1, 5))


def _per_output(array: np.ndarray, channels: int) -> np.ndarray:
    """[O] as every output of a pixel, and of its neighbours up to 128 outputs, wants it."""
    filled = np.zeros(channels, array.dtype)
    filled[: array.size] = array
    return np.tile(filled, max(1, vrmpy.VECTOR_BYTES // channels))
