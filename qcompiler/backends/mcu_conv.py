"""Convolutions and fully connected layers on microcontrollers.

Three templates. `_dot_convolution` reduces by instructions that add several products into one register, where there
are such (`schedules.reducing_dot`): in NHWC a row of a window is one run of kernel width times channels adjacent bytes,
and the template reduces over runs, as many bytes at a time as the instruction takes. `_lane_convolution` is for vector
units that multiply by a scalar: output channels in lanes. `_depthwise_convolution` keeps channels in lanes.

The input, where it is padded or would be read past its end, is copied a window's rows at a time. Zero points are folded
as in `cpu_conv`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.backends import te
from qcompiler.backends.base import HostCode, Kernel, parameters_of, placeholder
from qcompiler.backends.cpu_conv import Problem, fold_zero_points
from qcompiler.backends.cpu_packed import Operands, flattened, round_up
from qcompiler.backends.mcu_stages import Requantizing, requantizing, stage
from qcompiler.backends.schedules import mcu as schedule
from qcompiler.backends.schedules.reducing_dot import ReducingDot, reducing_dot
from qcompiler.backends.te import Expr

_GATHER_GAIN = 2
"""How many times fewer instructions pay for gathering windows."""


def convolution(problem: Problem, x_value: ir.Value, host: HostCode) -> Kernel | None:
    """The kernel, or None where no template here fits and the CPU backend's must do."""
    if problem.x_dtype not in ("int8", "uint8"):
        return None
    out_channels, _, _, depth = problem.weights.shape
    folded = fold_zero_points(problem, "int8")
    if folded.w_zero_point != 0:
        return None
    if depth == 1 and out_channels == problem.group == problem.x_shape[3]:
        return _depthwise_convolution(problem, folded, x_value, host)
    if problem.group > 1 or problem.dilations[1] > 1:
        return None
    lanes = schedule.scalar_multiply_lanes(host, out_channels)
    if lanes > 1:
        return _lane_convolution(flattened(problem), folded, x_value, lanes, host)
    dot = reducing_dot(host)
    # A whole image in one row would be copied whole.
    copied = depth % dot.length != 0 or folded.x_offset != 0
    return _dot_convolution(problem if copied else flattened(problem), folded, x_value, dot, host)


# --- the input ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Input:
    """What a template reads: int8 [N, rows, row bytes], and whether it is a copy."""

    x: te.Tensor
    tensor: te.Tensor
    staged: bool


def _input(problem: Problem, folded: Operands, x_value: ir.Value, run: int) -> _Input:
    """The input for windows whose rows are read `run` bytes at a time."""
    n, h, w, c = problem.x_shape
    (sy, sx), dy = problem.strides, problem.dilations[0]
    rows = (problem.out_size[0] - 1) * sy + (folded.weights.shape[1] - 1) * dy + 1
    row_bytes = (problem.out_size[1] - 1) * sx * c + run
    x = placeholder(x_value, (n, h, w * c))
    plain = folded.x_offset == 0 and problem.pad == (0, 0) and problem.dilate == (1, 1)
    if plain and rows <= h and row_bytes <= w * c:
        return _Input(x, x, staged=False)
    return _Input(x, stage(x, problem, folded, (n, rows, row_bytes)), staged=True)


# --- the output --------------------------------------------------------------------------------------------


def _outputs(accumulator: te.Tensor, finish: Requantizing, parameters: Sequence[te.Tensor]) -> te.Tensor:
    """The blocks `total` and `output` behind sums [N, OH, OW, O]."""
    bias, *rest = parameters
    shape = te.shape_of(accumulator)
    total = te.compute(shape, lambda b, i, j, o: accumulator[b, i, j, o] + bias[o], "total")

    def output(b: Expr, i: Expr, j: Expr, o: Expr) -> Expr:
        return finish.output(total[b, i, j, o], [array[o] for array in rest])

    return te.compute(shape, output, "output")


# --- sums by dot products ----------------------------------------------------------------------------------


def _dot_convolution(problem: Problem, folded: Operands, x_value: ir.Value, dot: ReducingDot, host: HostCode) -> Kernel:
    out_channels, kh, kw, c = folded.weights.shape
    (sy, sx), dy = problem.strides, problem.dilations[0]
    tile = next(tile for tile in dot.tiles if problem.out_size[1] % tile[0] == 0 and out_channels % tile[1] == 0)
    whole = -(-kh * kw * c // dot.length)
    gathered = problem.dilate == (1, 1) and _GATHER_GAIN * whole <= kh * -(-kw * c // dot.length)
    if gathered:
        # Runs so short that instructions would be mostly padding: lay the rows of every window side by side.
        source, pitch = _windows(problem, folded, x_value, whole * dot.length)
        runs, rows_per_output, row_step, steps = folded.weights.reshape(out_channels, 1, 1, -1), 1, 0, whole
    else:
        steps = -(-kw * c // dot.length)
        source = _input(problem, folded, x_value, steps * dot.length)
        runs, rows_per_output, row_step, pitch = folded.weights, sy, dy, sx * c
    finish = requantizing(folded, problem.epilogue)
    arrays = (_pack_runs(runs, tile[1], dot.length), *finish.arrays)
    weights, *parameters = parameters_of(arrays)
    ky, s, r = (
        te.reduce_axis(extent, name) for extent, name in ((runs.shape[1], "ky"), (steps, "s"), (dot.length, "r"))
    )

    def product(b: Expr, i: Expr, j: Expr, o: Expr) -> Expr:
        row, column = i * rows_per_output + ky * row_step, j * pitch + s * dot.length + r
        pixel = source.tensor[b, row, column].astype("int32")
        return te.reduce_sum(pixel * weights[o // tile[1], ky, s, o % tile[1], r].astype("int32"), axis=[ky, s, r])

    shape = (problem.x_shape[0], *problem.out_size, out_channels)
    output = _outputs(te.compute(shape, product, "accumulator"), finish, parameters)
    function = te.prim_func([source.x, weights, *parameters, output])
    copied = (pitch // (kw * c), kw * c) if gathered else (1, 0) if source.staged else None
    scheduled = schedule.schedule_dot_convolution(function, dot, tile, host, copied=copied)
    return Kernel(scheduled, (x_value,), arrays)


def _windows(problem: Problem, folded: Operands, x_value: ir.Value, length: int) -> tuple[_Input, int]:
    """Every window as one run, and the bytes from one to the next: whole window rows, at least `length`."""
    n, h, w, c = problem.x_shape
    oh, ow = problem.out_size
    _, kh, kw, _ = folded.weights.shape
    (sy, sx), dy, (top, left) = problem.strides, problem.dilations[0], problem.pad
    run = kw * c
    pitch = round_up(length, run)
    x, zero = placeholder(x_value, (n, h, w * c)), te.const(folded.x_zero_point, "int8")

    def element(b: Expr, i: Expr, column: Expr) -> Expr:
        j, ky = column // pitch, column % pitch // run
        y, source = i * sy + ky * dy - top, (j * sx - left) * c + column % run
        load = x[b, y, source]
        if folded.x_offset:
            load = (load.astype("int32") + folded.x_offset).astype("int8")
        inside = te.all_of(ky < kh, y >= 0, y < h, source >= 0, source < w * c)
        return te.if_then_else(inside, load, zero)

    return _Input(x, te.compute((n, oh, ow * pitch), element, "staged"), staged=True), pitch


def _pack_runs(weights: np.ndarray, channels: int, length: int) -> np.ndarray:
    """[O, KH, KW, C] to [O / channels, KH, steps, channels, length], zeros at the ends of runs."""
    out_channels, kh, kw, c = weights.shape
    filled = np.zeros((out_channels, kh, round_up(kw * c, length)), np.int8)
    filled[:, :, : kw * c] = weights.reshape(out_channels, kh, kw * c)
    split = filled.reshape(out_channels // channels, channels, kh, -1, length)
    return np.ascontiguousarray(split.transpose(0, 2, 3, 1, 4))


# --- output channels in lanes ------------------------------------------------------------------------------


def _lane_convolution(problem: Problem, folded: Operands, x_value: ir.Value, lanes: int, host: HostCode) -> Kernel:
    out_channels, kh, kw, c = folded.weights.shape
    (sy, sx), dy = problem.strides, problem.dilations[0]
    source, finish = _input(problem, folded, x_value, kw * c), requantizing(folded, problem.epilogue)
    packed = folded.weights.reshape(out_channels // lanes, lanes, kh, kw * c).transpose(0, 2, 3, 1)
    arrays = (np.ascontiguousarray(packed), *finish.arrays)
    weights, *parameters = parameters_of(arrays)
    ky, r = te.reduce_axis(kh, "ky"), te.reduce_axis(kw * c, "r")

    def product(b: Expr, i: Expr, j: Expr, o: Expr) -> Expr:
        # Two int8 make an int16, a widening multiply; the accumulation widens again.
        pixel = source.tensor[b, i * sy + ky * dy, j * (sx * c) + r].astype("int16")
        term = pixel * weights[o // lanes, ky, r, o % lanes].astype("int16")
        return te.reduce_sum(term.astype("int32"), axis=[ky, r])

    shape = (problem.x_shape[0], *problem.out_size, out_channels)
    output = _outputs(te.compute(shape, product, "accumulator"), finish, parameters)
    function = te.prim_func([source.x, weights, *parameters, output])
    scheduled = schedule.schedule_lane_convolution(function, lanes, host, staged=source.staged)
    return Kernel(scheduled, (x_value,), arrays)


# --- depthwise ---------------------------------------------------------------------------------------------


def _depthwise_convolution(problem: Problem, folded: Operands, x_value: ir.Value, host: HostCode) -> Kernel:
    channels, kh, kw, _ = folded.weights.shape
    (sy, sx), (dy, dx) = problem.strides, problem.dilations
    source = _input(problem, folded, x_value, ((kw - 1) * dx + 1) * channels)
    finish = requantizing(folded, problem.epilogue)
    arrays = (np.ascontiguousarray(folded.weights[..., 0].transpose(1, 2, 0)), *finish.arrays)
    weights, *parameters = parameters_of(arrays)
    ky, kx = te.reduce_axis(kh, "ky"), te.reduce_axis(kw, "kx")

    def product(b: Expr, i: Expr, j: Expr, o: Expr) -> Expr:
        pixel = source.tensor[b, i * sy + ky * dy, (j * sx + kx * dx) * channels + o].astype("int32")
        return te.reduce_sum(pixel * weights[ky, kx, o].astype("int32"), axis=[ky, kx])

    shape = (problem.x_shape[0], *problem.out_size, channels)
    output = _outputs(te.compute(shape, product, "accumulator"), finish, parameters)
    function = te.prim_func([source.x, weights, *parameters, output])
    return Kernel(schedule.schedule_depthwise(function, host, staged=source.staged), (x_value,), arrays)
