"""`quant.tflite_functions.softmax` in TOSA operators, step by step in 32-bit integers.

TOSA's TABLE answers 8 bits with 8, so an exponential comes as four tables, one a byte.
"""

import numpy as np

from qcompiler.emit.tosa_text import Tensor, TosaText, power_of_two
from qcompiler.graph import Shape
from qcompiler.quant.tflite_functions import HALVES_48_17, HALVES_NEG_32_17, NEWTON_STEPS, SUM_INTEGER_BITS

_SPARE_BITS = 4
"""Elements are shifted right by up to 34, more than TOSA allows: by these first, which floors, then by the rest."""


def softmax(text: TosaText, x: Tensor, table: np.ndarray, zero_point: int) -> Tensor:
    """Softmax over the last axis of int8 x; `table` is `tflite_functions.softmax_table`."""
    rank, rows = len(x.shape), (*x.shape[:-1], 1)
    highest = _reduce(text, "reduce_max", x)
    distance = _binary(text, "sub", _wide(text, highest), _wide(text, x), x.shape)
    exponential = _exponentials(text, distance, table)
    # RESCALE rounds in 64 bits, where adding a half to 2^31 - 1 does no harm.
    terms = text.rescale(exponential, power_of_two(-SUM_INTEGER_BITS), "int32")
    total = _reduce(text, "reduce_sum", terms)
    headroom = text.op("clz", [total], rows, "int32")
    one = text.number(1, "int32", rank)
    half = _binary(text, "logical_left_shift", total, _binary(text, "sub", headroom, one, rows), rows)
    reciprocal = _reciprocal(text, half, rows)
    product = _high_product(text, reciprocal, exponential, x.shape)
    spare = text.number(_SPARE_BITS, "int32", rank)
    floored = text.op("arithmetic_right_shift", [product, spare], x.shape, "int32", {"round": "false"})
    # 12 - headroom + 31 - 8 bits in all.
    total_shift = text.number(SUM_INTEGER_BITS + 31 - 8 - _SPARE_BITS, "int32", rank)
    shift = _binary(text, "sub", total_shift, headroom, rows)
    rounded = text.op("arithmetic_right_shift", [floored, shift], x.shape, "int32", {"round": "true"})
    return text.rescale(rounded, power_of_two(0), "int8", y_zero_point=zero_point)


def _exponentials(text: TosaText, distance: Tensor, table: np.ndarray) -> Tensor:
    index = text.rescale(distance, power_of_two(0), "int8", y_zero_point=-128)
    entries = table.astype("<i4").view(np.uint8).reshape(256, 4)
    total: Tensor | None = None
    for byte in range(4):
        # As int8 the byte b is b - 128; back in 32 bits the zero point gives b again.
        shifted = text.constant(entries[:, byte].astype(np.int16) - 128, "int8")
        looked_up = text.op("table", [index, shifted], index.shape, "int8")
        part = text.rescale(looked_up, power_of_two(0), "int32", x_zero_point=-128)
        if byte:
            places = text.number(8 * byte, "int32", len(index.shape))
            part = _binary(text, "logical_left_shift", part, places, index.shape)
        total = part if total is None else _binary(text, "add", total, part, index.shape)
    assert total is not None
    return total


def _reciprocal(text: TosaText, half: Tensor, rows: Shape) -> Tensor:
    rank = len(rows)
    first = _high_product(text, half, text.number(HALVES_NEG_32_17, "int32", rank), rows)
    x = _binary(text, "add", first, text.number(HALVES_48_17, "int32", rank), rows)
    unit, four = text.number(1 << 29, "int32", rank), text.number(4, "int32", rank)
    for _ in range(NEWTON_STEPS):
        error = _binary(text, "sub", unit, _high_product(text, half, x, rows), rows)
        step = _product(text, _high_product(text, x, error, rows), four, rows, 0)
        x = _binary(text, "add", x, step, rows)
    # Twice x saturates at 2^31 - 1: where x is 2^30, twice the number below it and one.
    largest = text.number((1 << 30) - 1, "int32", rank)
    below = _binary(text, "minimum", x, largest, rows)
    one = text.number(1, "int32", rank)
    excess = _binary(text, "minimum", _binary(text, "sub", x, below, rows), one, rows)
    return _binary(text, "add", _product(text, below, text.number(2, "int32", rank), rows, 0), excess, rows)


def _wide(text: TosaText, x: Tensor) -> Tensor:
    return text.rescale(x, power_of_two(0), "int32")


def _reduce(text: TosaText, name: str, x: Tensor) -> Tensor:
    attributes = {"axis": f"{len(x.shape) - 1} : i32"}
    if name == "reduce_max":
        attributes["nan_mode"] = "#tosa.nan_mode<PROPAGATE>"
    return text.op(name, [x], (*x.shape[:-1], 1), x.dtype, attributes)


def _binary(text: TosaText, name: str, a: Tensor, b: Tensor, shape: Shape) -> Tensor:
    attributes = {"nan_mode": "#tosa.nan_mode<PROPAGATE>"} if name == "minimum" else None
    return text.op(name, [a, b], shape, "int32", attributes)


def _high_product(text: TosaText, a: Tensor, b: Tensor, shape: Shape) -> Tensor:
    """(2ab + 2^31) >> 32: gemmlowp's SaturatingRoundingDoublingHighMul."""
    return _product(text, a, b, shape, 31)


def _product(text: TosaText, a: Tensor, b: Tensor, shape: Shape, shift: int) -> Tensor:
    return text.op("mul", [a, b, text.number(shift, "int8")], shape, "int32")
