"""Integer pooling, means and resizing: sums and maxima over windows, channels in vector lanes."""

import math
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from qcompiler.backends import te, te_arithmetic
from qcompiler.backends.base import HostCode, Kernel, parameters_of, placeholder
from qcompiler.backends.cpu_elementwise import constant_input, variant
from qcompiler.backends.schedules import conv as schedule
from qcompiler.backends.schedules.loops import schedule_reduction, threads_for, vectorize_rows
from qcompiler.backends.te import Expr
from qcompiler.graph import Shape, data_input, dtype_of, element_count, shape_of
from qcompiler.integer.ops import QAveragePool, QMaxPool, QReduceMean


def max_pool(node: ir.Node, host: HostCode) -> Kernel:
    kernel, shape = max_pool_stages(node), shape_of(node.outputs[0])
    lanes = schedule.depthwise_lanes(shape[3], host.vector_bytes)
    work = element_count(shape) * math.prod(QMaxPool.of(node).kernel_shape)
    threads = threads_for(host, work, host.vector_bytes)
    return replace(kernel, function=schedule.schedule_depthwise(kernel.function, lanes, threads=threads))


def max_pool_stages(node: ir.Node) -> Kernel:
    """Unscheduled: [padded,] accumulator, output."""
    op = QMaxPool.of(node)
    shape, dtype = shape_of(node.outputs[0]), str(dtype_of(node.outputs[0]))
    lowest = te_arithmetic.DTYPE_RANGES[dtype][0]
    x = placeholder(data_input(node))
    window = padded(x, op.kernel_shape, op.strides, op.dilations, op.pads, shape, lowest)
    ky, kx = te.reduce_axis(op.kernel_shape[0], "ky"), te.reduce_axis(op.kernel_shape[1], "kx")
    (sy, sx), (dy, dx) = op.strides, op.dilations
    accumulator = te.compute(
        shape,
        lambda b, i, j, c: te.reduce_max(window[b, i * sy + ky * dy, j * sx + kx * dx, c], axis=[ky, kx]),
        "accumulator",
    )
    output = te.compute(
        shape,
        lambda *index: te.clamp(accumulator[index].astype("int32"), op.clamp_min, op.clamp_max).astype(dtype),
        "output",
    )
    return Kernel(te.prim_func([x, output]), (data_input(node),))


def average_pool(node: ir.Node, host: HostCode) -> Kernel:
    kernel, shape = average_pool_stages(node), shape_of(node.outputs[0])
    lanes = schedule.depthwise_lanes(shape[3], host.vector_bytes // 4)
    work = element_count(shape) * math.prod(QAveragePool.of(node).kernel_shape)
    threads = threads_for(host, work, host.vector_bytes // 4)
    return replace(kernel, function=schedule.schedule_depthwise(kernel.function, lanes, threads=threads))


def average_pool_stages(node: ir.Node) -> Kernel:
    """Unscheduled: [padded,] accumulator, output."""
    op = QAveragePool.of(node)
    (_, h, w, _), shape = shape_of(data_input(node)), shape_of(node.outputs[0])
    (kh, kw), (sy, sx), (top, left, _, _) = op.kernel_shape, op.strides, op.pads
    dtype, limits = str(dtype_of(node.outputs[0])), (op.clamp_min, op.clamp_max)
    arrays = [constant_input(node, 1), constant_input(node, 2)]
    multiplier, shift = parameters_of(arrays)
    x = placeholder(data_input(node))
    # Padding holds the zero point, so that every window has kh * kw terms.
    window = padded(x, op.kernel_shape, op.strides, (1, 1), op.pads, shape, op.x_zero_point)
    ky, kx = te.reduce_axis(kh, "ky"), te.reduce_axis(kw, "kx")
    wide = x.dtype == "int16"
    accumulator = te.compute(
        shape,
        lambda b, i, j, c: te.reduce_sum(
            window[b, i * sy + ky, j * sx + kx, c].astype(_sum_type(x, kh * kw)), axis=[ky, kx]
        ),
        "accumulator",
    )

    def inside(position: Expr, stride: int, pad: int, kernel: int, size: int) -> Expr:
        start = position * stride - pad
        return te.minimum(start + kernel, size) - te.maximum(start, 0)

    def element(b: Expr, i: Expr, j: Expr, c: Expr) -> Expr:
        counted = inside(i, sy, top, kh, h) * inside(j, sx, left, kw, w) - 1
        entry = counted if any(op.pads) and not op.count_include_pad else kh * kw - 1
        total = accumulator[b, i, j, c] - kh * kw * op.x_zero_point
        return te_arithmetic.requantize(
            total.astype("int64") if wide else total, multiplier[entry], shift[entry], variant(op.requantize),
            op.y_zero_point, limits, dtype, wide=wide,
        )  # fmt: skip

    output = te.compute(shape, element, "output")
    return Kernel(te.prim_func([x, multiplier, shift, output]), (data_input(node),), tuple(arrays))


def _sum_type(x: te.Tensor, count: int) -> str:
    """Of so many elements: 2^16 of 16 bits may add up to more than 32."""
    return "int64" if x.dtype == "int16" and count >= 1 << 16 else "int32"


def padded(
    x: te.Tensor,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilations: tuple[int, int],
    pads: Sequence[int],
    out: Shape,
    fill: float,
) -> te.Tensor:
    """x [N,H,W,C] grown to what the windows of an output of shape `out` touch."""
    n, h, w, c = te.shape_of(x)
    rows, columns = (
        (o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(out[1:3], strides, kernel, dilations, strict=True)
    )
    top, left = pads[:2]
    if (top, left) == (0, 0) and rows <= h and columns <= w:
        return x

    def element(b: Expr, i: Expr, j: Expr, k: Expr) -> Expr:
        inside = te.all_of(i >= top, i < h + top, j >= left, j < w + left)
        return te.if_then_else(inside, x[b, i - top, j - left, k], te.const(fill, x.dtype))

    return te.compute((n, rows, columns, c), element, "padded")


def reduce_mean(node: ir.Node, host: HostCode) -> Kernel:
    kernel = reduce_mean_stages(node)
    keeps_last = len(shape_of(data_input(node))) - 1 not in QReduceMean.of(node).axes
    return replace(kernel, function=schedule_reduction(kernel.function, channels_last=keeps_last))


def reduce_mean_stages(node: ir.Node) -> Kernel:
    """Unscheduled: accumulator, output."""
    op = QReduceMean.of(node)
    shape = shape_of(data_input(node))
    kept = [axis for axis in range(len(shape)) if axis not in op.axes]
    arrays = [constant_input(node, 1), constant_input(node, 2)]
    multiplier, shift = parameters_of(arrays)
    x = placeholder(data_input(node))
    reduced = [te.reduce_axis(shape[axis], f"r{axis}") for axis in op.axes]
    wide, sums = x.dtype == "int16", _sum_type(x, element_count(shape[axis] for axis in op.axes))

    def total(*index: Expr) -> Expr:
        position = dict(zip(kept, index, strict=False)) | dict(zip(op.axes, reduced, strict=True))
        element = x[tuple(position[axis] for axis in range(len(shape)))].astype(sums)
        return te.reduce_sum(element - op.x_zero_point, axis=reduced)

    dtype, limits = str(dtype_of(node.outputs[0])), (op.clamp_min, op.clamp_max)
    out = tuple(shape[axis] for axis in kept) or (1,)
    accumulator = te.compute(out, total, "accumulator")
    output = te.compute(
        out,
        lambda *index: te_arithmetic.requantize(
            accumulator[index].astype("int64") if wide else accumulator[index],
            multiplier[0],
            shift[0],
            variant(op.requantize),
            op.y_zero_point,
            limits,
            dtype,
            wide=wide,
        ),
        "output",
    )
    return Kernel(te.prim_func([x, multiplier, shift, output]), (data_input(node),), tuple(arrays))


def resize_nearest(node: ir.Node, host: HostCode) -> Kernel:
    kernel = resize_nearest_stages(node)
    return replace(kernel, function=vectorize_rows(kernel.function, host, element_bytes=1))


def resize_nearest_stages(node: ir.Node) -> Kernel:
    """Unscheduled: output."""
    arrays = [constant_input(node, 1), constant_input(node, 2)]
    rows, columns = parameters_of(arrays)
    x = placeholder(data_input(node))
    output = te.compute(shape_of(node.outputs[0]), lambda b, i, j, c: x[b, rows[i], columns[j], c], "output")
    return Kernel(te.prim_func([x, rows, columns, output]), (data_input(node),), tuple(arrays))


def resize_linear(node: ir.Node, host: HostCode) -> Kernel:
    kernel = resize_linear_stages(node)
    return replace(kernel, function=vectorize_rows(kernel.function, host, element_bytes=4))


def resize_linear_stages(node: ir.Node) -> Kernel:
    """Unscheduled: output."""
    arrays = [constant_input(node, index) for index in range(1, 5)]
    y_index, y_weight, x_index, x_weight = parameters_of(arrays)
    x = placeholder(data_input(node))

    def element(b: Expr, i: Expr, j: Expr, c: Expr) -> Expr:
        # Horizontal first: weights of 11 bits on 8-bit values leave 12 bits for the vertical ones.
        def row(p: int) -> Expr:
            left, right = (x[b, y_index[i, p], x_index[j, q], c].astype("int32") * x_weight[j, q] for q in range(2))
            return left + right

        total = row(0) * y_weight[i, 0] + row(1) * y_weight[i, 1]
        return te.shift_right(total + (1 << 21), te.const(22, "int32")).astype(x.dtype)

    output = te.compute(shape_of(node.outputs[0]), element, "output")
    arguments = [x, y_index, y_weight, x_index, x_weight, output]
    return Kernel(te.prim_func(arguments), (data_input(node),), tuple(arrays))
