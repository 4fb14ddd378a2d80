"""Integer operators that work element by element on Hexagon's vector unit (HVX), 128 elements at a time.

Each function returns None where the CPU backend's code must do: other formats, or rounding that takes 64 bits.
"""

# pyright: reportInvalidTypeForm=false
# TVMScript annotates buffers with calls.

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm.script import tirx as T  # noqa: N812 (TVMScript is read as text, by these names)

from qcompiler.backends import te, te_arithmetic
from qcompiler.backends.base import Kernel, parameters_of, placeholder
from qcompiler.backends.cpu_elementwise import add_formula, constant_input, variant
from qcompiler.backends.elementwise import broadcast_index, collapse, elementwise_stage
from qcompiler.backends.mcu_stages import high_factors
from qcompiler.backends.schedules.hvx import schedule_elements
from qcompiler.backends.schedules.vrmpy import VECTOR_BYTES
from qcompiler.backends.te import Expr
from qcompiler.graph import data_input, dtype_of, element_count, shape_of
from qcompiler.integer.ops import QAdd, QLookup, QMul, QRequantize

_MOST = 255
"""The largest difference of a byte and a zero point."""


def add(node: ir.Node) -> Kernel | None:
    values = [data_input(node), data_input(node, 1)]
    # The tflite variant multiplies 64 bits wide.
    if QAdd.of(node).requantize == "tflite" or not _bytes(node, values):
        return None
    formula = add_formula(node)
    stage = elementwise_stage(formula.operands, node.outputs[0], formula.expression)
    return Kernel(schedule_elements(stage.function), stage.inputs, stage.parameters)


def multiply(node: ir.Node) -> Kernel | None:
    op = QMul.of(node)

    def value(a: Expr, b: Expr) -> Expr:
        return (a.astype("int32") - op.a_zero_point) * (b.astype("int32") - op.b_zero_point)

    return _rescaled(node, op, [data_input(node), data_input(node, 1)], value, _MOST * _MOST)


def requantize(node: ir.Node) -> Kernel | None:
    op = QRequantize.of(node)
    return _rescaled(node, op, [data_input(node)], lambda x: x.astype("int32") - op.x_zero_point, _MOST)


def _rescaled(
    node: ir.Node, op: QMul | QRequantize, values: list[ir.Value], value: Callable[..., Expr], largest: int
) -> Kernel | None:
    multiplier, shift = (constant_input(node, len(values) + index) for index in range(2))
    factors = high_factors(multiplier, shift, variant(op.requantize), largest)
    if factors is None or not _bytes(node, values):
        return None
    shapes, shape = collapse([shape_of(item) for item in values], shape_of(node.outputs[0]))
    arrays = tuple(np.tile(factor, VECTOR_BYTES) for factor in factors.arrays)
    inputs = [placeholder(item, own) for item, own in zip(values, shapes, strict=True)]
    parameters = parameters_of(arrays)

    def output(*index: Expr) -> Expr:
        loads = [tensor[broadcast_index(index, own)] for tensor, own in zip(inputs, shapes, strict=True)]
        # By way of another type: TVM would take the difference in 64 bits, and LLVM find no high multiply.
        acc = te.reinterpret(te.reinterpret(value(*loads), "uint32"), "int32")
        scaled = factors.rescale(acc, *(parameter[index[-1] % VECTOR_BYTES] for parameter in parameters))
        return te_arithmetic.saturate(
            scaled, op.y_zero_point, (op.clamp_min, op.clamp_max), str(dtype_of(node.outputs[0]))
        )

    function = te.prim_func([*inputs, *parameters, te.compute(shape, output, "output")])
    return Kernel(schedule_elements(function), tuple(values), arrays)


def _bytes(node: ir.Node, values: Sequence[ir.Value]) -> bool:
    return all(dtype_of(value).itemsize == 1 for value in (*values, node.outputs[0]))


def lookup(node: ir.Node) -> Kernel | None:
    """Eight vlut32 look up every 32 of a table's 256 entries, each for the elements whose upper bits are its number."""
    QLookup.of(node)
    x, y, entries = data_input(node), node.outputs[0], constant_input(node, 1)
    if entries.dtype.itemsize != 1:
        return None
    # Signed elements are numbers of entries too, the negative ones of the upper half.
    table = np.roll(entries, 128) if dtype_of(x) == np.int8 else entries
    # vlut32 takes the upper half of 128 entries from the odd bytes.
    stored = np.ascontiguousarray(table.reshape(2, 2, 64).transpose(0, 2, 1)).reshape(-1)
    function = _lookup(element_count(shape_of(y)), str(dtype_of(x)), str(dtype_of(y)))
    return Kernel(function, (x,), (stored,))


def _lookup(elements: int, x_dtype: str, y_dtype: str):
    vectors, rest = divmod(elements, VECTOR_BYTES)
    whole = elements - rest

    @T.prim_func(s_tir=True)
    def function(
        x: T.Buffer((elements,), x_dtype), table: T.Buffer((256,), y_dtype), y: T.Buffer((elements,), y_dtype)
    ) -> None:
        for i in T.serial(vectors):
            y[T.ramp(i * 128, 1, 128)] = T.reinterpret(
                _looked_up(
                    T.reinterpret(x.vload([i * 128], x_dtype + "x128"), dtype="int32x32"),
                    T.reinterpret(table.vload([0], y_dtype + "x128"), dtype="int32x32"),
                    T.reinterpret(table.vload([128], y_dtype + "x128"), dtype="int32x32"),
                ),
                dtype=y_dtype + "x128",
            )
        for j in T.serial(rest):
            y[whole + j] = table[_stored_at(T.cast(T.reinterpret(x[whole + j], dtype="uint8"), "int32"))]

    return function


def _looked_up(elements: Any, lower: Any, upper: Any) -> Any:
    found = None
    for group in range(8):
        half = lower if group < 4 else upper
        name, so_far = ("vlutvvb", []) if found is None else ("vlutvvb.oracc", [found])
        instruction = T.llvm_lookup_intrinsic_id(f"llvm.hexagon.V6.{name}.128B")
        found = T.call_llvm_pure_intrin(instruction, *so_far, elements, half, T.int32(group), dtype="int32x32")
    return found


def _stored_at(entry: Any) -> Any:
    """Where an entry lies: 128 to a half, 64 of those in even bytes."""
    place = T.shift_left(T.bitwise_and(entry, 63), 1)
    odd = T.bitwise_and(T.shift_right(entry, 6), 1)
    return T.bitwise_or(T.bitwise_or(T.bitwise_and(entry, 128), place), odd)
