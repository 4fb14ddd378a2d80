"""Element by element with numpy broadcasting, on as few dimensions as the broadcast needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompiler.backends import te
from qcompiler.backends.base import HostCode, Kernel, parameters_of, placeholder
from qcompiler.backends.schedules.loops import vectorize_rows
from qcompiler.backends.te import Expr
from qcompiler.graph import Shape, dtype_of, shape_of

Operand = ir.Value | np.ndarray


@dataclass(frozen=True)
class Formula:
    """``output[i] = expression(operand[i]…)``, each operand broadcast to the output's shape."""

    operands: Sequence[Operand]
    expression: Callable[..., Expr]


def elementwise(
    operands: Sequence[Operand],
    output: ir.Value,
    expression: Callable[..., Expr],
    host: HostCode,
    *,
    tables: Sequence[np.ndarray] = (),
) -> Kernel:
    """``output[i] = expression(operand[i]…, table…)``.

    Args:
        operands: values, and constant arrays passed as parameters; each broadcasts to the output's shape.
        output: says shape and dtype; the expression must have that dtype.
        expression: maps one element of each operand, then the tables as TE tensors, to one element.
        host: the CPU.
        tables: arrays the expression indexes freely.
    """
    kernel = elementwise_stage(operands, output, expression, tables=tables)
    if tables:
        # A vectorized table lookup would be taken apart into scalar loads.
        return kernel
    widest = max(dtype_of(value).itemsize for value in [*kernel.inputs, output])
    return replace(kernel, function=vectorize_rows(kernel.function, host, element_bytes=max(widest, 4)))


def elementwise_stage(
    operands: Sequence[Operand],
    output: ir.Value,
    expression: Callable[..., Expr],
    *,
    tables: Sequence[np.ndarray] = (),
) -> Kernel:
    """As `elementwise`, unscheduled: the block "output"."""
    shapes, shape = collapse([_shape(operand) for operand in operands], shape_of(output))
    values = [operand for operand in operands if isinstance(operand, ir.Value)]
    arrays = [np.asarray(a).reshape(s) for a, s in zip(operands, shapes, strict=True) if not isinstance(a, ir.Value)]
    value_shapes = [s for operand, s in zip(operands, shapes, strict=True) if isinstance(operand, ir.Value)]
    inputs = [placeholder(value, s) for value, s in zip(values, value_shapes, strict=True)]
    parameters = parameters_of([*arrays, *tables])
    remaining, constants = iter(inputs), iter(parameters)
    tensors = [next(remaining if isinstance(operand, ir.Value) else constants) for operand in operands]

    def element(*index: Expr) -> Expr:
        loads = [tensor[broadcast_index(index, s)] for tensor, s in zip(tensors, shapes, strict=True)]
        return expression(*loads, *parameters[len(arrays) :])

    result = te.compute(shape, element, "output")
    return Kernel(te.prim_func([*inputs, *parameters, result]), tuple(values), (*arrays, *tables))


def _shape(operand: Operand) -> Shape:
    return operand.shape if isinstance(operand, np.ndarray) else shape_of(operand)


def broadcast_index(index: Sequence[Expr], shape: Shape) -> tuple[Expr | int, ...]:
    return tuple(0 if dim == 1 else position for position, dim in zip(index, shape, strict=True))


def collapse(shapes: Sequence[Shape], out: Shape) -> tuple[list[Shape], Shape]:
    """Merge neighbouring dimensions that every operand either has in full or broadcasts.

    Returns the operands' shapes, of the output's new rank, and the output's. ``[2,3,4], [4] → [2,3,4]`` becomes
    ``[6,4], [1,4] → [6,4]``.
    """
    ranked = [(1,) * (len(out) - len(shape)) + tuple(shape) for shape in shapes]
    merged: list[tuple[int, tuple[bool, ...]]] = []
    for axis, dim in enumerate(out):
        if dim == 1:
            continue
        full = tuple(shape[axis] == dim for shape in ranked)
        if merged and merged[-1][1] == full:
            merged[-1] = (merged[-1][0] * dim, full)
        else:
            merged.append((dim, full))
    merged = merged or [(1, (True,) * len(shapes))]
    collapsed = [tuple(dim if full[i] else 1 for dim, full in merged) for i in range(len(shapes))]
    return collapsed, tuple(dim for dim, _ in merged)
