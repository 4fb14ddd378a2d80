"""Integer convolutions, transposed convolutions and fully connected layers on the CPU.

Zero points leave the inner loop at compile time. With x' = x + offset (offset 128 makes int8 activations the uint8
operand dot-product instructions want) and w' = int8 weights:

    Σ (x - zx)(w - zw) = Σ x'w' - zx' Σ w' + n zx' zw' - zw' Σ x'

Padding is filled with zx', so every window has n = KH * KW * C terms, and all but the last sum go into
the bias; the last is computed only if zw' is not 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from qcompiler.backends import te_arithmetic
from qcompiler.backends.base import HostCode, Kernel
from qcompiler.backends.cpu_depthwise import depthwise_convolution
from qcompiler.backends.cpu_elementwise import constant_input, variant
from qcompiler.backends.cpu_matrix import matrix_convolution, suits
from qcompiler.backends.cpu_packed import Finish, Geometry, Operands, packed_convolution
from qcompiler.backends.schedules.dot import dot_product
from qcompiler.backends.schedules.matrix import matrix_multiply
from qcompiler.backends.te import Expr
from qcompiler.graph import data_input, dtype_of, shape_of
from qcompiler.integer.ops import QConv, QConvTranspose, QGemm
from qcompiler.integer.weight_groups import Groups, groups_of
from qcompiler.integer.weight_types import stored_bits
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
class Problem(Geometry):
    """An integer convolution; its weights are int2, int4, int8 or uint8."""

    x_dtype: str
    x_zero_point: int
    w_zero_point: int
    epilogue: Epilogue
    groups: Groups | None = None
    """How the weights may be stored, if they share factors in groups."""


def lower(node: ir.Node, host: HostCode, after: Finish | None = None) -> Kernel:
    """QConv, QConvTranspose or QGemm; `after` is computed with the result, while it is in registers."""
    return _lower(problem_of(node), data_input(node), host, after)


def problem_of(node: ir.Node) -> Problem:
    match node.op_type:
        case "QConv":
            return conv_problem(node)
        case "QConvTranspose":
            return conv_transpose_problem(node)
    return gemm_problem(node)


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
        groups=groups_of(data_input(node, 1)),
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
        groups=groups_of(data_input(node, 1)),
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


def _lower(problem: Problem, x: ir.Value, host: HostCode, after: Finish | None) -> Kernel:
    last = finish(problem) if after is None else finish(problem).then(after)
    if problem.is_depthwise:
        return depthwise_convolution(problem, partial(fold_zero_points, problem), problem.x_dtype, last, x, host)
    if (instruction := matrix_multiply(host, problem.x_dtype)) is not None:
        operands = fold_zero_points(problem, problem.x_dtype)
        if suits(problem, operands):
            return matrix_convolution(problem, operands, last, x, host, instruction)
    dot = dot_product(host, problem.x_dtype) if sum_dtype(problem) == "int32" else None
    operands = fold_zero_points(problem, dot.a_dtype if dot else problem.x_dtype)
    return packed_convolution(problem, operands, last, x, host, dot)


def finish(problem: Problem) -> Finish:
    """Requantizing."""
    epilogue, wide = problem.epilogue, problem.x_dtype == "int16"

    def expression(total: Expr, arrays: Sequence[Expr], _: Sequence[Expr]) -> Expr:
        return te_arithmetic.requantize(
            total.astype("int64") if wide else total,
            arrays[0],
            arrays[-1],
            epilogue.variant,
            epilogue.zero_point,
            epilogue.limits,
            epilogue.dtype,
            wide=wide,
        )

    arrays = (epilogue.multiplier,) if epilogue.variant == "float32" else (epilogue.multiplier, epilogue.shift)
    return Finish(epilogue.dtype, arrays, (), expression)


def fold_zero_points(problem: Problem, x_dtype: str) -> Operands:
    """The problem in x' and w' of the module's docstring."""
    x_offset = {("int8", "uint8"): 128, ("uint8", "int8"): -128}.get((problem.x_dtype, x_dtype), 0)
    weights = problem.weights.astype(np.int64) - problem.w_zero_point
    w_zero_point = 0
    if weights.min() < -128 or weights.max() > 127:
        w_offset = 128 if problem.weights.dtype == np.uint8 else 0
        weights, w_zero_point = problem.weights.astype(np.int64) - w_offset, problem.w_zero_point - w_offset
    x_zero_point = problem.x_zero_point + x_offset
    terms = weights[0].size
    bias = problem.epilogue.bias - x_zero_point * weights.sum(axis=(1, 2, 3)) + terms * x_zero_point * w_zero_point
    return Operands(
        x_offset,
        x_dtype,
        x_zero_point,
        weights.astype(np.int8),
        w_zero_point,
        wrap_int32(bias).astype(np.int32),
        # A zero point would take weights of few bits out of their range.
        bits=8 if problem.w_zero_point else stored_bits(problem.weights),
        sums=sum_dtype(problem),
        groups=problem.groups,
    )


def sum_dtype(problem: Problem) -> str:
    """What sums of products fit in: int64 only if 16-bit activations could take some sum beyond int32."""
    if problem.x_dtype != "int16":
        return "int32"
    largest = np.abs(problem.weights.astype(np.int64)).sum(axis=(1, 2, 3)) * (1 << 15)
    return "int32" if (largest + np.abs(problem.epilogue.bias.astype(np.int64))).max() < 1 << 31 else "int64"
