"""Data movement as TOSA."""

import numpy as np
import onnx_ir as ir

from qcompiler.emit.tosa_emitter import (
    Emitter,
    offset_of,
    refusal,
)
from qcompiler.emit.tosa_text import Tensor
from qcompiler.graph import (
    const_of,
    data_input,
    element_count,
    input_of,
    integer,
    ints,
    shape_of,
    string,
)


def emit_reshape(emitter: Emitter, node: ir.Node) -> None:
    y = node.outputs[0]
    emitter.store(y, emitter.text.reshape(emitter.of(data_input(node)), shape_of(y)))


def emit_transpose(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.of(data_input(node))
    perm = ints(node, "perm", tuple(reversed(range(len(x.shape)))))
    emitter.store(node.outputs[0], emitter.text.transpose(x, perm))


def emit_concat(emitter: Emitter, node: ir.Node) -> None:
    y = node.outputs[0]
    axis = integer(node, "axis") % len(shape_of(y))
    inputs = [emitter.of(value) for value in node.inputs if value is not None]
    emitter.store(y, emitter.text.op("concat", inputs, shape_of(y), "int8", {"axis": f"{axis} : i32"}))


def emit_slice(emitter: Emitter, node: ir.Node) -> None:
    x = data_input(node)
    starts, axes, steps = (const_of(input_of(node, index)) for index in (1, 3, 4))
    assert starts is not None
    rank = len(shape_of(x))
    chosen = range(rank)[: len(starts)] if axes is None else [int(axis) % rank for axis in axes]
    made = emitter.of(x)
    for position, axis in enumerate(chosen):
        size, start = shape_of(x)[axis], int(starts[position])
        step = 1 if steps is None else int(steps[position])
        if step < 1:
            raise refusal(node, "it slices backwards")
        begin = min(max(start + size if start < 0 else start, 0), size)
        made = _take(emitter, made, axis, begin, step, shape_of(node.outputs[0])[axis])
    emitter.store(node.outputs[0], made)


def emit_split(emitter: Emitter, node: ir.Node) -> None:
    x = emitter.of(data_input(node))
    axis = integer(node, "axis", 0) % len(x.shape)
    first = 0
    for value in node.outputs:
        emitter.store(value, _take(emitter, x, axis, first, 1, shape_of(value)[axis]))
        first += shape_of(value)[axis]


def _take(emitter: Emitter, x: Tensor, axis: int, begin: int, step: int, count: int) -> Tensor:
    """`count` elements of one axis, from `begin` on, `step` apart: TOSA slices without gaps."""
    text, shape = emitter.text, list(x.shape)
    missing = begin + count * step - shape[axis] if step > 1 else 0
    if missing > 0:
        pads = np.zeros((len(shape), 2), np.int64)
        pads[axis, 1] = missing
        x = text.pad(x, pads, 0)
    start = [0] * len(shape)
    start[axis], shape[axis] = begin, count * step
    x = text.slice(x, start, tuple(shape))
    if step == 1:
        return x
    outer, inner = element_count(shape[:axis]), element_count(shape[axis + 1 :])
    split = text.reshape(x, (outer, count, step, inner))
    shape[axis] = count
    return text.reshape(text.slice(split, (0, 0, 0, 0), (outer, count, 1, inner)), tuple(shape))


def emit_pad(emitter: Emitter, node: ir.Node) -> None:
    x = data_input(node)
    pads, fill, axes = (const_of(input_of(node, index)) for index in (1, 2, 3))
    assert pads is not None
    if string(node, "mode", "constant") != "constant" or pads.min() < 0:
        raise refusal(node, "TOSA pads with constants only, and never crops")
    rank = len(shape_of(x))
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    table = np.zeros((rank, 2), np.int64)
    for position, axis in enumerate(chosen):
        table[axis] = pads.reshape(2, -1)[:, position]
    value = (0 if fill is None else int(fill.reshape(()))) - offset_of(x)
    emitter.store(node.outputs[0], emitter.text.pad(emitter.of(x), table, value))
