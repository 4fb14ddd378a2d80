"""Quantizing at run time, and products of what was quantized so.

With a zero point zx that is known at run time only, Σ (x - zx)(w - zw) = Σ x (w - zw) - zx Σ (w - zw): the first sum is
that of a zero point of 0, where padding holds zx, and the second, a number per channel, is multiplied in the Finish.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompiler.backends import te, te_arithmetic
from qcompiler.backends.base import HostCode, Kernel, parameters_of, placeholder
from qcompiler.backends.cpu_conv import Epilogue, Problem, fold_zero_points
from qcompiler.backends.cpu_depthwise import depthwise_convolution
from qcompiler.backends.cpu_elementwise import constant_input
from qcompiler.backends.cpu_packed import Finish, Operands, packed_convolution
from qcompiler.backends.schedules.dot import dot_product
from qcompiler.backends.schedules.loops import schedule_dynamic_quantize
from qcompiler.backends.te import Expr
from qcompiler.graph import data_input, dtype_of, element_count, shape_of
from qcompiler.integer.ops import QConvDynamic, QGemmDynamic

_LEVELS = 255


def conv(node: ir.Node, host: HostCode) -> Kernel:
    op = QConvDynamic.of(node)
    y = shape_of(node.outputs[0])
    problem = Problem(
        x_shape=shape_of(data_input(node)),
        dilate=(1, 1),
        weights=constant_input(node, 3),
        strides=op.strides,
        dilations=op.dilations,
        pad=(op.pads[0], op.pads[1]),
        out_size=(y[1], y[2]),
        group=op.group,
        x_dtype=str(dtype_of(data_input(node))),
        x_zero_point=0,
        w_zero_point=op.w_zero_point,
        epilogue=_no_epilogue(y[3]),
    )
    return _lower(node, problem, (op.clamp_min, op.clamp_max), host)


def gemm(node: ir.Node, host: HostCode) -> Kernel:
    op = QGemmDynamic.of(node)
    rows, depth = shape_of(data_input(node))
    weights = constant_input(node, 3)
    problem = Problem(
        x_shape=(1, 1, rows, depth),
        dilate=(1, 1),
        weights=weights.reshape(weights.shape[0], 1, 1, depth),
        strides=(1, 1),
        dilations=(1, 1),
        pad=(0, 0),
        out_size=(1, rows),
        group=1,
        x_dtype=str(dtype_of(data_input(node))),
        x_zero_point=0,
        w_zero_point=op.w_zero_point,
        epilogue=_no_epilogue(weights.shape[0]),
    )
    return _lower(node, problem, (op.clamp_min, op.clamp_max), host)


def _no_epilogue(outputs: int) -> Epilogue:
    """The sums go to `_dequantize` instead, without a bias."""
    zeros = np.zeros(outputs, np.int32)
    return Epilogue(zeros, zeros, zeros, "float32", 0, (0, 0), "float32")


def _lower(node: ir.Node, problem: Problem, limits: tuple[float, float], host: HostCode) -> Kernel:
    finish, x = _dequantize(node, problem, limits), data_input(node)

    def operands(x_dtype: str) -> Operands:
        return replace(fold_zero_points(problem, x_dtype), zero_scalar=1)

    if problem.is_depthwise:
        return depthwise_convolution(problem, operands, problem.x_dtype, finish, x, host)
    dot = dot_product(host, problem.x_dtype)
    return packed_convolution(problem, operands(dot.a_dtype if dot else problem.x_dtype), finish, x, host, dot)


def _dequantize(node: ir.Node, problem: Problem, limits: tuple[float, float]) -> Finish:
    """clip((total - zx Σ (w - zw)) * (x_scale * w_scale) + bias)."""
    weight_sums = (problem.weights.astype(np.int64) - problem.w_zero_point).sum(axis=(1, 2, 3)).astype(np.int32)

    def expression(total: Expr, arrays: Sequence[Expr], scalars: Sequence[Expr]) -> Expr:
        (sums, w_scale, bias), (x_scale, zero_point) = arrays, scalars
        real = (total - sums * zero_point.astype("int32")).astype("float32") * (x_scale * w_scale) + bias
        low, high = limits
        real = te.maximum(real, te.const(low, "float32")) if np.isfinite(low) else real
        return te.minimum(real, te.const(high, "float32")) if np.isfinite(high) else real

    arrays = (weight_sums, constant_input(node, 4), constant_input(node, 5))
    return Finish("float32", arrays, (), expression, (data_input(node, 1), data_input(node, 2)))


def dynamic_quantize_linear(node: ir.Node, host: HostCode) -> Kernel:
    """DynamicQuantizeLinear: x float32 → y uint8, scale [] float32, zero point [] uint8.

    scale = (max(x, 0) - min(x, 0)) / 255, or 1 where that is 0, as in onnxruntime; zero point = round(-min / scale).
    """
    x_value = data_input(node)
    count = element_count(shape_of(x_value))
    lanes = 4 * host.vector_bytes // 4
    strips = -(-count // lanes)
    levels = np.array([_LEVELS], np.float32)
    x = placeholder(x_value, (count,))
    (divisor,) = parameters_of([levels])  # TVM would turn a division by a constant into a multiplication

    def element(strip: Expr, lane: Expr) -> Expr:
        # Zero lies in every range anyway, so that it may stand past the end.
        at = strip * lanes + lane
        if strips * lanes == count:
            return x[at]
        return te.if_then_else(te.inside(at < count), x[te.minimum(at, count - 1)], te.const(0.0, "float32"))

    low = _extreme("low", te.reduce_min, element, strips, lanes)
    high = _extreme("high", te.reduce_max, element, strips, lanes)
    zero = te.const(0.0, "float32")
    span = te.compute((1,), lambda i: te.maximum(high[i], zero) - te.minimum(low[i], zero), "span")
    scale = te.compute(
        (1,), lambda i: te.where(span[i].equal(0.0), te.const(1.0, "float32"), span[i] / divisor[i]), "scale"
    )
    real_zero = te.compute((1,), lambda i: (zero - te.minimum(low[i], zero)) / scale[i], "real_zero")
    zero_point = te.compute((1,), lambda i: te.clamp(te.rint(real_zero[i]), 0.0, 255.0).astype("uint8"), "zero_point")
    y = te.compute(
        (count,),
        lambda i: te_arithmetic.quantize(x[i], scale[0], zero_point[0].astype("int32"), "uint8"),
        "output",
    )
    function = te.prim_func([x, divisor, y, scale, zero_point])
    return Kernel(schedule_dynamic_quantize(function, host), (x_value,), (levels,))


def _extreme(
    name: str,
    reduce: Callable[[Expr, Sequence[Expr]], Expr],
    element: Callable[[Expr, Expr], Expr],
    strips: int,
    lanes: int,
) -> te.Tensor:
    """[1]: over the strips lane by lane, then over the lanes."""
    strip, lane = te.reduce_axis(strips, f"{name}_strip"), te.reduce_axis(lanes, f"{name}_lane")
    by_lane = te.compute((lanes,), lambda v: reduce(element(strip, v), [strip]), f"{name}_lanes")
    return te.compute((1,), lambda _: reduce(by_lane[lane], [lane]), name)
