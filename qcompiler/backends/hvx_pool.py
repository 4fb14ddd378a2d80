"""Integer pooling on Hexagon's vector unit (HVX): rows of pixels times channels, 128 elements at a time.

Each function returns None where the CPU backend's code must do: windows as large as maps, whose sums are no rows;
divisors that differ along a padded border; rounding that takes 64 bits.
"""

import numpy as np
import onnx_ir as ir

from qcompiler.backends import te, te_arithmetic
from qcompiler.backends.base import Kernel, parameters_of
from qcompiler.backends.cpu_elementwise import constant_input, variant
from qcompiler.backends.hvx_windows import RowWindows, Window, cropped_rows, row_windows
from qcompiler.backends.mcu_stages import high_factors
from qcompiler.backends.schedules import vrmpy
from qcompiler.backends.schedules.hvx import schedule_rows
from qcompiler.backends.te import Expr
from qcompiler.graph import data_input, dtype_of, shape_of
from qcompiler.integer.ops import QAveragePool, QMaxPool

_MOST_TAPS = 25
"""Windows of more are rare, and their unrolled expressions would be long."""


def max_pool(node: ir.Node) -> Kernel | None:
    op = QMaxPool.of(node)
    window = _window(node, op, op.dilations)
    dtype = dtype_of(data_input(node))
    if dtype.itemsize != 1 or window.taps > _MOST_TAPS:
        return None
    lowest, highest = te_arithmetic.DTYPE_RANGES[str(dtype)]
    source = row_windows(data_input(node), window, lowest)

    def output(b: Expr, i: Expr, f: Expr) -> Expr:
        largest, *others = (source.tap(b, i, ky, kx, f) for ky, kx in np.ndindex(*window.kernel))
        for other in others:
            largest = te.maximum(largest, other)
        if (op.clamp_min, op.clamp_max) == (lowest, highest):
            return largest
        low, high = (te.const(limit, str(dtype)) for limit in (op.clamp_min, op.clamp_max))
        return te.maximum(te.minimum(largest, high), low)

    return _kernel(node, source, te.compute(_shape(node, source), output, "output"), ())


def average_pool(node: ir.Node) -> Kernel | None:
    op = QAveragePool.of(node)
    window = _window(node, op, (1, 1))
    multiplier, shift = (constant_input(node, index)[window.taps - 1 : window.taps] for index in (1, 2))
    factors = high_factors(multiplier, shift, variant(op.requantize), 255 * window.taps)
    whole = not any(op.pads) or bool(op.count_include_pad)
    if dtype_of(data_input(node)).itemsize != 1 or window.taps > _MOST_TAPS or not whole or factors is None:
        return None
    # Padding holds the zero point, so that every window has as many terms.
    source = row_windows(data_input(node), window, op.x_zero_point)
    # Of a number repeated all over a vector LLVM does not see that it is a widened one.
    arrays = tuple(np.tile(factor, vrmpy.VECTOR_BYTES) for factor in factors.arrays)
    parameters = parameters_of(arrays)

    def total(b: Expr, i: Expr, f: Expr) -> Expr:
        sums: Expr = te.const(-window.taps * op.x_zero_point, "int32")
        for ky, kx in np.ndindex(*window.kernel):
            sums = sums + source.tap(b, i, ky, kx, f).astype("int32")
        return sums

    totals = te.compute(_shape(node, source), total, "total")
    limits, dtype = (op.clamp_min, op.clamp_max), str(dtype_of(node.outputs[0]))

    def output(b: Expr, i: Expr, f: Expr) -> Expr:
        scaled = factors.rescale(totals[b, i, f], *(parameter[f % vrmpy.VECTOR_BYTES] for parameter in parameters))
        return te_arithmetic.saturate(scaled, op.y_zero_point, limits, dtype)

    rows = te.compute(_shape(node, source), output, "output")
    return _kernel(node, source, rows, arrays, parameters)


def _window(node: ir.Node, op: QMaxPool | QAveragePool, dilations: tuple[int, int]) -> Window:
    _, oh, ow, _ = shape_of(node.outputs[0])
    return Window(op.kernel_shape, op.strides, dilations, (op.pads[0], op.pads[1]), (oh, ow))


def _shape(node: ir.Node, source: RowWindows) -> tuple[int, int, int]:
    n, oh, _, _ = shape_of(node.outputs[0])
    return n, oh, source.wide


def _kernel(
    node: ir.Node,
    source: RowWindows,
    rows: te.Tensor,
    arrays: tuple[np.ndarray, ...],
    parameters: tuple[te.Tensor, ...] = (),
) -> Kernel:
    _, _, ow, c = shape_of(node.outputs[0])
    result, cropped = cropped_rows(rows, ow * c)
    function = te.prim_func([source.x, *parameters, result])
    scheduled = schedule_rows(function, staged=source.staged, cropped=cropped, summed=bool(arrays))
    return Kernel(scheduled, (data_input(node),), arrays)
