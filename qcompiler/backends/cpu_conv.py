"""Convolutions, transposed convolutions and fully connected layers on the CPU.

Two templates. `_dot_convolution` is everything with a reduction over channels: it computes, for a strip of pixels
and some blocks of output channels, `lanes` channels to a vector register, with a dot-product instruction where the CPU
has one. `_depthwise_convolution` keeps channels in lanes and sums over the window.

Zero points leave the inner loop at compile time. With x' = x + offset (offset 128 makes int8 activations the uint8
operand dot-product instructions want) and w' = int8 weights:

    Σ (x - zx)(w - zw) = Σ x'w' - zx' Σ w' + n zx' zw' - zw' Σ x'

Padding is filled with zx', so every window has n = KH * KW * C terms, and all but the last sum go into
the bias; the last is computed only if zw' is not 0.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.backends import nibbles, te, te_arithmetic
from qcompiler.backends.base import HostCode, Kernel, parameters_of, placeholder
from qcompiler.backends.cpu_elementwise import constant_input, variant
from qcompiler.backends.schedules import conv as schedule
from qcompiler.backends.schedules.dot import QUAD, dot_product
from qcompiler.backends.schedules.loops import threads_for
from qcompiler.backends.te import Expr
from qcompiler.graph import Shape, data_input, dtype_of, shape_of
from qcompiler.integer.ops import QConv, QConvTranspose, QGemm
from qcompiler.quant.arithmetic import RequantizeVariant, wrap_int32


@dataclass(frozen=True)
class Epilogue:
    """How accumulators become outputs; arrays are per output channel."""

    bias: np.ndarray
    multiplier: np.ndarray
    shift: np.ndarray
    variant: RequantizeVariant
    zero_point: int
    limits: tuple[int, int]
    dtype: str


@dataclass(frozen=True)
class Problem:
    """A convolution, a transposed one being a convolution of the input with `dilate - 1` zeros between pixels."""

    x_shape: Shape
    x_dtype: str
    x_zero_point: int
    dilate: tuple[int, int]
    weights: np.ndarray
    """[O, KH, KW, C/group], int4, int8 or uint8."""
    w_zero_point: int
    strides: tuple[int, int]
    dilations: tuple[int, int]
    pad: tuple[int, int]
    """Rows above and columns left of the input; may be negative for transposed convolutions."""
    out_size: tuple[int, int]
    group: int
    epilogue: Epilogue


def conv(node: ir.Node, host: HostCode) -> Kernel:
    return _lower(conv_problem(node), data_input(node), host)


def conv_transpose(node: ir.Node, host: HostCode) -> Kernel:
    return _lower(conv_transpose_problem(node), data_input(node), host)


def gemm(node: ir.Node, host: HostCode) -> Kernel:
    return _lower(gemm_problem(node), data_input(node), host)


def conv_problem(node: ir.Node) -> Problem:
    op = QConv.of(node)
    y = shape_of(node.outputs[0])
    return Problem(
        x_shape=shape_of(data_input(node)),
        x_dtype=str(dtype_of(data_input(node))),
        x_zero_point=op.x_zero_point,
        dilate=(1, 1),
        weights=constant_input(node, 1),
        w_zero_point=op.w_zero_point,
        strides=op.strides,
        dilations=op.dilations,
        pad=(op.pads[0], op.pads[1]),
        out_size=(y[1], y[2]),
        group=op.group,
        epilogue=_epilogue(node, op),
    )


def conv_transpose_problem(node: ir.Node) -> Problem:
    op = QConvTranspose.of(node)
    y = shape_of(node.outputs[0])
    kernel, dilations = op.kernel_shape, op.dilations
    return Problem(
        x_shape=shape_of(data_input(node)),
        x_dtype=str(dtype_of(data_input(node))),
        x_zero_point=op.x_zero_point,
        dilate=op.strides,
        weights=constant_input(node, 1)[:, ::-1, ::-1],
        w_zero_point=op.w_zero_point,
        strides=(1, 1),
        dilations=dilations,
        pad=((kernel[0] - 1) * dilations[0] - op.pads[0], (kernel[1] - 1) * dilations[1] - op.pads[1]),
        out_size=(y[1], y[2]),
        group=op.group,
        epilogue=_epilogue(node, op),
    )


def gemm_problem(node: ir.Node) -> Problem:
    op = QGemm.of(node)
    rows, depth = shape_of(data_input(node))
    weights = constant_input(node, 1)
    return Problem(
        x_shape=(1, 1, rows, depth),
        x_dtype=str(dtype_of(data_input(node))),
        x_zero_point=op.x_zero_point,
        dilate=(1, 1),
        weights=weights.reshape(weights.shape[0], 1, 1, depth),
        w_zero_point=op.w_zero_point,
        strides=(1, 1),
        dilations=(1, 1),
        pad=(0, 0),
        out_size=(1, rows),
        group=1,
        epilogue=_epilogue(node, op),
    )


def _epilogue(node: ir.Node, op: QConv | QConvTranspose | QGemm) -> Epilogue:
    return Epilogue(
        bias=constant_input(node, 2),
        multiplier=constant_input(node, 3),
        shift=constant_input(node, 4),
        variant=variant(op.requantize),
        zero_point=op.y_zero_point,
        limits=(op.clamp_min, op.clamp_max),
        dtype=str(dtype_of(node.outputs[0])),
    )


def _lower(problem: Problem, x: ir.Value, host: HostCode) -> Kernel:
    out_channels, _, _, depth = problem.weights.shape
    if depth == 1 and out_channels == problem.group:
        return _depthwise_convolution(problem, x, host)
    return _dot_convolution(flattened(problem), x, host)


def flattened(problem: Problem) -> Problem:
    """A 1x1 convolution without strides or padding sees its pixels as one row."""
    n, h, w, c = problem.x_shape
    plain = (
        problem.weights.shape[1:3] == (1, 1)
        and problem.strides == (1, 1)
        and problem.dilate == (1, 1)
        and problem.pad == (0, 0)
        and problem.out_size == (h, w)
    )
    return replace(problem, x_shape=(1, 1, n * h * w, c), out_size=(1, n * h * w)) if plain else problem


# --- zero points -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Folded:
    """The problem in x' and w' of the module's docstring."""

    x_offset: int
    x_dtype: str
    x_zero_point: int
    weights: np.ndarray
    """int8 [O, KH, KW, C/group]."""
    w_zero_point: int
    bias: np.ndarray
    four_bits: bool
    """Whether the weights are stored two to a byte."""


def fold_zero_points(problem: Problem, x_dtype: str) -> Folded:
    x_offset = {("int8", "uint8"): 128, ("uint8", "int8"): -128}.get((problem.x_dtype, x_dtype), 0)
    weights = problem.weights.astype(np.int64) - problem.w_zero_point
    w_zero_point = 0
    if weights.min() < -128 or weights.max() > 127:
        w_offset = 128 if problem.weights.dtype == np.uint8 else 0
        weights, w_zero_point = problem.weights.astype(np.int64) - w_offset, problem.w_zero_point - w_offset
    x_zero_point = problem.x_zero_point + x_offset
    terms = weights[0].size
    bias = problem.epilogue.bias - x_zero_point * weights.sum(axis=(1, 2, 3)) + terms * x_zero_point * w_zero_point
    return Folded(
        x_offset,
        x_dtype,
        x_zero_point,
        weights.astype(np.int8),
        w_zero_point,
        wrap_int32(bias).astype(np.int32),
        # A zero point would take 4-bit weights out of their range.
        four_bits=problem.weights.dtype == ml_dtypes.int4 and problem.w_zero_point == 0,
    )


def sum_dtype(problem: Problem) -> str:
    """What sums of products fit in: int64 only if 16-bit activations could take some sum beyond int32."""
    if problem.x_dtype != "int16":
        return "int32"
    largest = np.abs(problem.weights.astype(np.int64)).sum(axis=(1, 2, 3)) * (1 << 15)
    return "int32" if (largest + np.abs(problem.epilogue.bias.astype(np.int64))).max() < 1 << 31 else "int64"


def _shifted(x: Expr, offset: int, dtype: str) -> Expr:
    return x if offset == 0 else (x.astype("int32") + offset).astype(dtype)


# --- the template with a dot product -----------------------------------------------------------------------


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _dot_convolution(problem: Problem, x_value: ir.Value, host: HostCode) -> Kernel:
    dot = dot_product(host) if problem.x_dtype != "int16" else None
    quad = QUAD if dot else 1
    lanes = dot.lanes if dot else host.vector_bytes // 4
    x_dtype = problem.x_dtype if dot is None else "uint8" if dot.unsigned else "int8"
    folded = fold_zero_points(problem, x_dtype)
    n, h, w, c = problem.x_shape
    (oh, ow), group = problem.out_size, problem.group
    out_channels, kh, kw, depth = folded.weights.shape
    (sy, sx), (dy, dx) = problem.strides, problem.dilations

    # A window row of adjacent pixels is one run of bytes: if the depth does not fill quads, reduce over the run.
    run = depth % quad != 0 and dx == 1 and group == 1
    padded_depth = depth if run else round_up(depth, quad)
    pitch = group * padded_depth
    taps, run_length = (1, kw * depth) if run else (kw, padded_depth)
    quads = -(-run_length // quad)
    blocks = -(-(out_channels // group) // lanes)
    tile = schedule.conv_tile(ow, blocks, registers=32 if host.vector_bytes == 64 else 16)
    wide = round_up(ow, tile.pixels)

    rows = (oh - 1) * sy + (kh - 1) * dy + 1
    row_bytes = max((wide - 1) * sx * pitch + (taps - 1) * dx * pitch + (group - 1) * padded_depth + quads * quad, 1)
    as_is = (
        folded.x_offset == 0
        and problem.pad == (0, 0)
        and problem.dilate == (1, 1)
        and pitch == c
        and rows <= h
        and row_bytes <= w * c
    )
    x = placeholder(x_value, (n, h, w * c))
    staged = x if as_is else stage(x, problem, folded, (rows, row_bytes), (pitch, padded_depth, depth))

    packed = _pack(folded.weights, group, blocks, lanes, quads, quad, run=run)
    arrays = [
        nibbles.pack_runs(packed) if folded.four_bits else packed,
        *_per_lane([folded.bias, problem.epilogue.multiplier, problem.epilogue.shift], group, blocks, lanes),
    ]
    stored, bias, multiplier, shift = parameters_of(arrays)
    weights = nibbles.unpacked(stored, packed.shape) if folded.four_bits else stored

    ky, kx = te.reduce_axis(kh, "ky"), te.reduce_axis(taps, "kx")
    q, r = te.reduce_axis(quads, "q"), te.reduce_axis(quad, "r")

    sums = sum_dtype(problem)

    def product(b: Expr, i: Expr, j: Expr, g: Expr, o: Expr, v: Expr) -> Expr:
        column = (j * sx + kx * dx) * pitch + g * padded_depth + q * quad + r
        pixel = staged[b, i * sy + ky * dy, column].astype(sums)
        return te.reduce_sum(pixel * weights[g, o, ky, kx, q, v, r].astype(sums), axis=[ky, kx, q, r])

    accumulator = te.compute((n, oh, wide, group, blocks, lanes), product, "accumulator")
    window_sum = _window_sum(staged, problem, folded, (wide, pitch, padded_depth)) if folded.w_zero_point else None

    epilogue, wide_sums = problem.epilogue, problem.x_dtype == "int16"

    def finish(b: Expr, i: Expr, j: Expr, g: Expr, o: Expr, v: Expr) -> Expr:
        total = accumulator[b, i, j, g, o, v] + bias[g, o, v].astype(sums)
        if window_sum is not None:
            total = total - window_sum[b, i, j, g] * folded.w_zero_point
        return te_arithmetic.requantize(
            total.astype("int64") if wide_sums else total,
            multiplier[g, o, v],
            shift[g, o, v],
            epilogue.variant,
            epilogue.zero_point,
            epilogue.limits,
            epilogue.dtype,
            wide=wide_sums,
        )

    output = te.compute(te.shape_of(accumulator), finish, "output")
    per_group = out_channels // group
    if wide != ow or blocks * lanes != per_group:

        def crop(b: Expr, i: Expr, j: Expr, o: Expr) -> Expr:
            inside = o % per_group
            return output[b, i, j, o // per_group, inside // lanes, inside % lanes]

        result = te.compute((n, oh, ow, out_channels), crop, "cropped")
    else:
        result = output
    arguments = [x, stored, bias, multiplier, *([] if epilogue.variant == "float32" else [shift]), result]
    function = te.prim_func(arguments)
    threads = threads_for(host, n * oh * ow * folded.weights.size, quad * lanes)
    scheduled = schedule.schedule_dot_convolution(function, dot, tile, threads=threads)
    if folded.four_bits:
        scheduled = nibbles.schedule_unpacking(scheduled, packed.shape, threads=threads)
    return Kernel(scheduled, (x_value,), tuple(arrays[:3] if epilogue.variant == "float32" else arrays))


def stage(
    x: te.Tensor, problem: Problem, folded: Folded, size: tuple[int, int], layout: tuple[int, int, int]
) -> te.Tensor:
    """The input as x' with padding, dilation and every group's depth filled up; [N, rows, row bytes]."""
    n, h, w, c = problem.x_shape
    (top, left), (up_y, up_x) = problem.pad, problem.dilate
    pitch, padded_depth, depth = layout
    zero = te.const(folded.x_zero_point, folded.x_dtype)

    def element(b: Expr, i: Expr, column: Expr) -> Expr:
        y = i - top
        if pitch == c and up_x == 1:
            source = column - left * c
            inside = [source >= 0, source < w * c]
        else:
            pixel, channel = column // pitch - left, column % pitch
            inside = [pixel >= 0, pixel < (w - 1) * up_x + 1, pixel % up_x == 0, channel % padded_depth < depth]
            source = pixel // up_x * c + channel // padded_depth * depth + channel % padded_depth
        rows = [y >= 0, y < (h - 1) * up_y + 1, y % up_y == 0]
        load = _shifted(x[b, y // up_y, source], folded.x_offset, folded.x_dtype)
        return te.if_then_else(te.all_of(*rows, *inside), load, zero)

    return te.compute((n, *size), element, "staged")


def _window_sum(staged: te.Tensor, problem: Problem, folded: Folded, layout: tuple[int, int, int]) -> te.Tensor:
    """Σ x' under each window and group, for weights whose zero point is not 0."""
    wide, pitch, padded_depth = layout
    _, kh, kw, depth = folded.weights.shape
    (sy, sx), (dy, dx) = problem.strides, problem.dilations
    ky, kx, k = te.reduce_axis(kh, "ky"), te.reduce_axis(kw, "kx"), te.reduce_axis(depth, "k")
    return te.compute(
        (problem.x_shape[0], problem.out_size[0], wide, problem.group),
        lambda b, i, j, g: te.reduce_sum(
            staged[b, i * sy + ky * dy, (j * sx + kx * dx) * pitch + g * padded_depth + k].astype("int32"),
            axis=[ky, kx, k],
        ),
        "window_sum",
    )


def _pack(weights: np.ndarray, group: int, blocks: int, lanes: int, quads: int, quad: int, *, run: bool) -> np.ndarray:
    """[O, KH, KW, C/group] to [group, blocks, KH, KW, quads, lanes, quad], zeros where a dimension is filled up."""
    out_channels, kh, kw, depth = weights.shape
    if run:
        weights, kw, depth = weights.reshape(out_channels, kh, 1, kw * depth), 1, kw * depth
    per_group = out_channels // group
    filled = np.zeros((group, blocks * lanes, kh, kw, quads * quad), np.int8)
    filled[:, :per_group, :, :, :depth] = weights.reshape(group, per_group, kh, kw, depth)
    split = filled.reshape(group, blocks, lanes, kh, kw, quads, quad)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 5, 2, 6))


def _per_lane(arrays: list[np.ndarray], group: int, blocks: int, lanes: int) -> list[np.ndarray]:
    """Per-channel arrays [O] as [group, blocks, lanes], filled up with zeros."""
    packed: list[np.ndarray] = []
    for array in arrays:
        per_group = array.reshape(group, -1)
        filled = np.zeros((group, blocks * lanes), array.dtype)
        filled[:, : per_group.shape[1]] = per_group
        packed.append(filled.reshape(group, blocks, lanes))
    return packed


# --- depthwise ---------------------------------------------------------------------------------------------


def _depthwise_convolution(problem: Problem, x_value: ir.Value, host: HostCode) -> Kernel:
    folded = fold_zero_points(problem, problem.x_dtype)
    n, h, w, c = problem.x_shape
    oh, ow = problem.out_size
    _, kh, kw, _ = folded.weights.shape
    (sy, sx), (dy, dx) = problem.strides, problem.dilations
    rows, columns = (oh - 1) * sy + (kh - 1) * dy + 1, (ow - 1) * sx + (kw - 1) * dx + 1

    x = placeholder(x_value, (n, h, w * c))
    as_is = problem.pad == (0, 0) and problem.dilate == (1, 1) and rows <= h and columns <= w
    staged = x if as_is else stage(x, problem, folded, (rows, columns * c), (c, 1, 1))

    epilogue = problem.epilogue
    taps = np.ascontiguousarray(folded.weights[..., 0].transpose(1, 2, 0))
    arrays = [
        nibbles.pack_runs(taps) if folded.four_bits else taps,
        folded.bias,
        epilogue.multiplier,
        *([] if epilogue.variant == "float32" else [epilogue.shift]),
    ]
    placeholders = parameters_of(arrays)
    stored, bias, multiplier, shift = (*placeholders, placeholders[-1])[:4]
    weights = nibbles.unpacked(stored, taps.shape) if folded.four_bits else stored
    ky, kx = te.reduce_axis(kh, "ky"), te.reduce_axis(kw, "kx")

    sums, wide_sums = sum_dtype(problem), problem.x_dtype == "int16"

    def pixel(b: Expr, i: Expr, j: Expr, k: Expr, tap_y: Expr | int, tap_x: Expr | int) -> Expr:
        return staged[b, i * sy + tap_y * dy, (j * sx + tap_x * dx) * c + k].astype(sums)

    def product(b: Expr, i: Expr, j: Expr, k: Expr) -> Expr:
        total = pixel(b, i, j, k, ky, kx) * (weights[ky, kx, k].astype(sums) - folded.w_zero_point)
        return te.reduce_sum(total, axis=[ky, kx])

    accumulator = te.compute((n, oh, ow, c), product, "accumulator")
    output = te.compute(
        (n, oh, ow, c),
        lambda b, i, j, k: te_arithmetic.requantize(
            (accumulator[b, i, j, k] + bias[k].astype(sums)).astype("int64" if wide_sums else "int32"),
            multiplier[k],
            shift[k],
            epilogue.variant,
            epilogue.zero_point,
            epilogue.limits,
            epilogue.dtype,
            wide=wide_sums,
        ),
        "output",
    )
    function = te.prim_func([x, *placeholders, output])
    lanes = schedule.depthwise_lanes(c, host.vector_bytes // 4)
    threads = threads_for(host, n * oh * ow * folded.weights.size, host.vector_bytes // 4)
    scheduled = schedule.schedule_depthwise(function, lanes, threads=threads)
    if folded.four_bits:
        scheduled = nibbles.schedule_unpacking(scheduled, taps.shape, threads=threads)
    return Kernel(scheduled, (x_value,), tuple(arrays))
