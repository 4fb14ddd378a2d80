"""Float convolutions, matrix products and pools on the CPU, maps in [N, H, W, C] and weights packed.

These are for constant weights and maps of two spatial axes; `float_nn` has code for the rest. Nodes are ONNX's, and so
are the shapes of their values, [N, C, H, W]; the kernels read and write the same maps with channels last.
"""

import math

import numpy as np
import onnx_ir as ir

from qcompiler.backends import cpu_pool, te
from qcompiler.backends.base import HostCode, Kernel, placeholder
from qcompiler.backends.cpu_depthwise import plain_convolution
from qcompiler.backends.cpu_packed import Finish, Geometry, Operands, packed_convolution
from qcompiler.backends.float_nn import averaged_count, has_indices, transposed_pads, window
from qcompiler.backends.schedules import conv as schedule
from qcompiler.backends.schedules.loops import schedule_reduction, threads_for
from qcompiler.backends.te import Expr
from qcompiler.graph import (
    Shape,
    const_of,
    data_input,
    dtype_of,
    element_count,
    input_of,
    integer,
    ints,
    is_op,
    real,
    shape_of,
)
from qcompiler.integer.weight_types import as_half

PLAIN = Finish("float32", (), (), lambda total, _arrays, _elements: total)


def channels_last(shape: Shape) -> Shape:
    """[N, C, H, W] to [N, H, W, C]."""
    n, c, h, w = shape
    return n, h, w, c


# --- sums of products --------------------------------------------------------------------------------------


def is_packable(node: ir.Node) -> bool:
    """Whether `product` has code for it."""
    if not is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul") or dtype_of(node.outputs[0]) != np.float32:
        return False
    weights = const_of(data_input(node, 1))
    if weights is None or weights.size == 0:
        return False
    if is_op(node, "MatMul"):
        return weights.ndim == 2 and len(shape_of(data_input(node))) >= 2
    bias = input_of(node, 2)
    if bias is not None and const_of(bias) is None:
        return False
    if is_op(node, "Gemm"):
        return not integer(node, "transA", 0) and (bias is None or shape_of(bias)[:-1] in ((), (1,)))
    return weights.ndim == 4


def product(node: ir.Node, x: ir.Value, host: HostCode, finish: Finish = PLAIN) -> Kernel:
    """A node that `is_packable`, `x` being its input, with channels last if it is a map."""
    geometry, bias = _geometry(node)
    weights = as_half(geometry.weights) if host.converts_halves else geometry.weights
    operands = Operands(0, "float32", 0, weights, 0, bias, bits=8 * weights.itemsize, sums="float32")
    if geometry.is_depthwise and geometry.group > 1:
        return plain_convolution(geometry, operands, finish, x, host)
    return packed_convolution(geometry, operands, finish, x, host, None)


def geometry_of(node: ir.Node) -> Geometry:
    return _geometry(node)[0]


def _geometry(node: ir.Node) -> tuple[Geometry, np.ndarray]:
    """The node as a convolution, and its bias."""
    weights = const_of(data_input(node, 1))
    assert weights is not None
    if is_op(node, "Gemm", "MatMul"):
        return _matrix_product(node, weights)
    bias = const_of(input_of(node, 2))
    n, c, h, w = shape_of(data_input(node))
    _, outs, *out_size = shape_of(node.outputs[0])
    group, kernel = integer(node, "group", 1), weights.shape[2:]
    strides, dilations, before = window(node, kernel)
    dilate = (1, 1)
    if is_op(node, "ConvTranspose"):
        pads = transposed_pads(node, kernel, strides, dilations)
        before = tuple((k - 1) * d - p for k, d, p in zip(kernel, dilations, pads, strict=True))
        by_group = weights[:, :, ::-1, ::-1].reshape(group, c // group, outs // group, *kernel)
        weights = by_group.transpose(0, 2, 3, 4, 1).reshape(outs, *kernel, c // group)
        dilate, strides = _pair(strides), (1, 1)
    else:
        weights = weights.transpose(0, 2, 3, 1)
    geometry = Geometry(
        x_shape=(n, h, w, c),
        dilate=dilate,
        weights=weights,
        strides=_pair(strides),
        dilations=_pair(dilations),
        pad=_pair(before),
        out_size=_pair(out_size),
        group=group,
    )
    return geometry, np.zeros(outs, np.float32) if bias is None else bias


def _matrix_product(node: ir.Node, weights: np.ndarray) -> tuple[Geometry, np.ndarray]:
    """Rows are the pixels of one image."""
    shape, bias = shape_of(data_input(node)), np.zeros((), np.float32)
    columns = weights if integer(node, "transB", 0) else weights.T
    if is_op(node, "Gemm"):
        columns = columns * np.float32(real(node, "alpha", 1.0))
        addend = const_of(input_of(node, 2))
        bias = bias if addend is None else addend * np.float32(real(node, "beta", 1.0))
    outs, depth = columns.shape
    rows = element_count(shape[:-1])
    geometry = Geometry(
        x_shape=(1, 1, rows, depth),
        dilate=(1, 1),
        weights=columns.reshape(outs, 1, 1, depth),
        strides=(1, 1),
        dilations=(1, 1),
        pad=(0, 0),
        out_size=(1, rows),
        group=1,
    )
    return geometry, np.broadcast_to(bias.reshape(-1), (outs,)).copy()


def _pair(values: Shape | list[int]) -> tuple[int, int]:
    first, second = values
    return first, second


# --- pools -------------------------------------------------------------------------------------------------


def is_pool(node: ir.Node) -> bool:
    """Whether `pool` has code for it."""
    return (
        is_op(node, "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
        and len(shape_of(data_input(node))) == 4
        and dtype_of(data_input(node)) == np.float32
        and not has_indices(node)
    )


def pool(node: ir.Node, x: ir.Value, host: HostCode) -> Kernel:
    """A node that `is_pool`, `x` being its input with channels last."""
    if is_op(node, "GlobalAveragePool", "GlobalMaxPool"):
        return _global_pool(x, host, maximum=is_op(node, "GlobalMaxPool"))
    kernel = _pair(ints(node, "kernel_shape"))
    strides, dilations, before = window(node, kernel)
    (sy, sx), (dy, dx) = _pair(strides), _pair(dilations)
    out = channels_last(shape_of(node.outputs[0]))
    maximum = is_op(node, "MaxPool")
    tensor = placeholder(x)
    fill = float(np.finfo(np.float32).min) if maximum else 0.0
    grown = cpu_pool.padded(tensor, kernel, (sy, sx), (dy, dx), _pair(before), out, fill)
    ky, kx = te.reduce_axis(kernel[0], "ky"), te.reduce_axis(kernel[1], "kx")
    combine = te.reduce_max if maximum else te.reduce_sum
    accumulator = te.compute(
        out,
        lambda b, i, j, c: combine(grown[b, i * sy + ky * dy, j * sx + kx * dx, c], axis=[ky, kx]),
        "accumulator",
    )

    def element(b: Expr, i: Expr, j: Expr, c: Expr) -> Expr:
        total = accumulator[b, i, j, c]
        return total if maximum else total / averaged_count(node, (i, j)).astype("float32")

    output = te.compute(out, element, "output")
    lanes = schedule.depthwise_lanes(out[3], host.vector_bytes // 4)
    threads = threads_for(host, element_count(out) * math.prod(kernel), host.vector_bytes // 4)
    function = schedule.schedule_depthwise(te.prim_func([tensor, output]), lanes, threads=threads)
    return Kernel(function, (x,))


def _global_pool(x: ir.Value, host: HostCode, *, maximum: bool) -> Kernel:
    n, h, w, c = shape_of(x)
    tensor = placeholder(x, (n, h * w, c))
    k = te.reduce_axis(h * w, "k")
    combine = te.reduce_max if maximum else te.reduce_sum
    total = te.compute((n, c), lambda b, channel: combine(tensor[b, k, channel], [k]), "accumulator")
    output = te.compute((n, c), lambda *at: total[at] if maximum else total[at] / float(h * w), "output")
    return Kernel(schedule_reduction(te.prim_func([tensor, output]), channels_last=True), (x,))
