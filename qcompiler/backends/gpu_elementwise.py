"""Operators that work element by element on a GPU, a word of four elements to a work item where rows allow."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.backends import te
from qcompiler.backends.base import Kernel
from qcompiler.backends.elementwise import Operand, collapse
from qcompiler.backends.gpu_words import WORD, byte_of, packed
from qcompiler.backends.schedules.gpu import schedule_each
from qcompiler.backends.te import Expr
from qcompiler.graph import Shape, dtype_of, shape_of


def elementwise(
    operands: Sequence[Operand],
    output: ir.Value,
    expression: Callable[..., Expr],
    *,
    tables: Sequence[np.ndarray] = (),
) -> Kernel:
    """``output[i] = expression(operand[i]…, table…)``, as `backends.elementwise.elementwise` on the CPU."""
    shapes, shape = collapse([_shape(operand) for operand in operands], shape_of(output))
    values = [operand for operand in operands if isinstance(operand, ir.Value)]
    in_words = shape[-1] % WORD == 0 and all(dtype_of(value).itemsize == 1 for value in (*values, output))
    inputs: list[te.Tensor] = []
    constants: list[te.Tensor] = []
    arrays: list[np.ndarray] = []
    loads: list[Callable[[Sequence[Expr], int], Expr]] = []
    for operand, own in zip(operands, shapes, strict=True):
        if isinstance(operand, ir.Value):
            words = in_words and own[-1] != 1
            stored, dtype = ((*own[:-1], own[-1] // WORD), "int32") if words else (own, str(dtype_of(operand)))
            tensor = te.placeholder(stored, dtype, f"x{len(inputs)}")
            inputs.append(tensor)
            loads.append(_word_load(tensor, own, str(dtype_of(operand))) if words else _load(tensor, own, in_words))
        else:
            tensor = te.placeholder(own, str(operand.dtype), f"c{len(constants)}")
            constants.append(tensor)
            arrays.append(operand.reshape(own))
            loads.append(_load(tensor, own, in_words))
    parameters = [te.placeholder(t.shape, str(t.dtype), f"table{i}") for i, t in enumerate(tables)]

    def element(*index: Expr) -> Expr:
        lanes = [
            expression(*(load(index, lane) for load in loads), *parameters) for lane in range(WORD if in_words else 1)
        ]
        return packed(lanes) if in_words else lanes[0]

    result = te.compute((*shape[:-1], shape[-1] // WORD) if in_words else shape, element, "output")
    function = te.prim_func([*inputs, *constants, *parameters, result])
    return Kernel(schedule_each(function), tuple(values), (*arrays, *tables))


def _shape(operand: Operand) -> Shape:
    return operand.shape if isinstance(operand, np.ndarray) else shape_of(operand)


def _word_load(tensor: te.Tensor, shape: Shape, dtype: str) -> Callable[[Sequence[Expr], int], Expr]:
    def load(index: Sequence[Expr], lane: int) -> Expr:
        return byte_of(tensor[_broadcast(index, shape)], lane, dtype).astype(dtype)

    return load


def _load(tensor: te.Tensor, shape: Shape, in_words: bool) -> Callable[[Sequence[Expr], int], Expr]:
    """One element at a time; the last index counts words if `in_words`."""

    def load(index: Sequence[Expr], lane: int) -> Expr:
        last = index[-1] * WORD + lane if in_words else index[-1]
        return tensor[_broadcast((*index[:-1], last), shape)]

    return load


def _broadcast(index: Sequence[Expr], shape: Shape) -> tuple[Expr | int, ...]:
    return tuple(0 if dim == 1 else position for position, dim in zip(index, shape, strict=True))
