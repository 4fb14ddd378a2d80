"""Data movement as TFLite."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from ai_edge_litert import schema_py_generated as schema

from qcompiler.emit.tflite_emitter import (
    ACTIVATION,
    OP,
    OPTIONS,
    Emitter,
    dense,
    refusal,
)
from qcompiler.emit.tflite_model import Tensor
from qcompiler.emit.windows import Padded
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
from qcompiler.integer.formats import TensorFormat


def emit_reshape(emitter: Emitter, node: ir.Node) -> None:
    emitter.reshape(emitter.of(data_input(node)), emitter.result(node.outputs[0]))


def emit_transpose(emitter: Emitter, node: ir.Node) -> None:
    x = data_input(node)
    perm = ints(node, "perm", tuple(reversed(range(len(shape_of(x))))))
    inputs = [emitter.of(x), emitter.numbers(perm, "perm")]
    output = emitter.result(node.outputs[0])
    emitter.add(OP.TRANSPOSE, inputs, output, OPTIONS.TransposeOptions, schema.TransposeOptionsT())


def emit_concat(emitter: Emitter, node: ir.Node) -> None:
    inputs = [emitter.of(value) for value in node.inputs if value is not None]
    axis = integer(node, "axis") % len(inputs[0].shape)
    options = schema.ConcatenationOptionsT(axis=axis, fusedActivationFunction=ACTIVATION.NONE)
    output = emitter.result(node.outputs[0])
    emitter.add(OP.CONCATENATION, inputs, output, OPTIONS.ConcatenationOptions, options)


def emit_slice(emitter: Emitter, node: ir.Node) -> None:
    x = data_input(node)
    starts, axes, steps = (const_of(input_of(node, index)) for index in (1, 3, 4))
    assert starts is not None
    rank = len(shape_of(x))
    chosen = range(len(starts)) if axes is None else [int(axis) % rank for axis in axes]
    begin, strides = [0] * rank, [1] * rank
    for position, axis in enumerate(chosen):
        size, start = shape_of(x)[axis], int(starts[position])
        begin[axis] = min(max(start + size if start < 0 else start, 0), size)
        strides[axis] = 1 if steps is None else int(steps[position])
    if min(strides) < 1:
        raise refusal(node, "it slices backwards")
    strided_slice(emitter, emitter.of(x), begin, strides, emitter.result(node.outputs[0]))


def emit_split(emitter: Emitter, node: ir.Node) -> None:
    x = data_input(node)
    axis = integer(node, "axis", 0) % len(shape_of(x))
    first = 0
    for value in node.outputs:
        begin = [first if other == axis else 0 for other in range(len(shape_of(x)))]
        strided_slice(emitter, emitter.of(x), begin, [1] * len(begin), emitter.result(value))
        first += shape_of(value)[axis]


def emit_pad(emitter: Emitter, node: ir.Node) -> None:
    x = data_input(node)
    pads, fill, axes = (const_of(input_of(node, index)) for index in (1, 2, 3))
    assert pads is not None
    if string(node, "mode", "constant") != "constant" or pads.min() < 0:
        raise refusal(node, "TFLite pads with constants only, and never crops")
    rank = len(shape_of(x))
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes]
    table = np.zeros((rank, 2), np.int64)
    for position, axis in enumerate(chosen):
        table[axis] = pads.reshape(2, -1)[:, position]
    value = 0 if fill is None else int(fill.reshape(()))
    emitter.format(x, node)
    emitter.pad(emitter.of(x), table, value, emitter.result(node.outputs[0]))


def strided_slice(
    emitter: Emitter, tensor: Tensor, begin: Sequence[int], strides: Sequence[int], output: Tensor
) -> None:
    """The elements from `begin` on, `strides` apart, as many as the output holds.

    Along height and width of a map in one go; Vela takes strides along no other axis, so channels are picked by a
    convolution and other axes brought to the width.
    """
    strided = [axis for axis, stride in enumerate(strides) if stride > 1]
    if len(tensor.shape) != 4 or not set(strided) <= {1, 2}:
        for axis in strided:
            tensor, begin, strides = _take_every(emitter, tensor, axis, begin, strides, output.shape[axis])
    if tensor.shape == output.shape:
        emitter.reshape(tensor, output)
        return
    end = [first + (count - 1) * step + 1 for first, count, step in zip(begin, output.shape, strides, strict=True)]
    inputs = [tensor, emitter.numbers(begin, "begin"), emitter.numbers(end, "end"), emitter.numbers(strides, "strides")]
    emitter.add(OP.STRIDED_SLICE, inputs, output, OPTIONS.StridedSliceOptions, schema.StridedSliceOptionsT())


def _take_every(
    emitter: Emitter, tensor: Tensor, axis: int, begin: Sequence[int], strides: Sequence[int], count: int
) -> tuple[Tensor, list[int], list[int]]:
    """Slice one axis as the width of a map; what remains to slice comes back with the result."""
    shape = tensor.shape
    if len(shape) == 4 and axis == 3:
        result = _pick_channels(emitter, tensor, range(begin[3], shape[3], strides[3])[:count])
        return result, [*begin[:3], 0], [*strides[:3], 1]
    as_map = (1, element_count(shape[:axis]), shape[axis], element_count(shape[axis + 1 :]))
    source = emitter.reshaped(tensor, as_map, "strided.map")
    taken = emitter.temporary(tensor, (*as_map[:2], count, as_map[3]), "strided.taken")
    strided_slice(emitter, source, (0, 0, begin[axis], 0), (1, 1, strides[axis], 1), taken)
    result = emitter.reshaped(taken, (*shape[:axis], count, *shape[axis + 1 :]), "strided")
    rest = [(0, 1) if other == axis else (begin[other], strides[other]) for other in range(len(shape))]
    return result, [first for first, _ in rest], [step for _, step in rest]


def _pick_channels(emitter: Emitter, tensor: Tensor, channels: Sequence[int]) -> Tensor:
    """A 1×1 convolution whose filters have a single one: elements a byte apart are slow to copy, quick to multiply."""
    assert tensor.format is not None
    wide = tensor.dtype == "int16"
    filters = np.zeros((len(channels), 1, 1, tensor.shape[3]), np.int8 if wide else tensor.dtype)
    filters[np.arange(len(channels)), 0, 0, list(channels)] = 1
    bias = np.zeros(len(channels), np.int64 if wide else np.int32)
    inputs = [
        tensor,
        emitter.model.constant("pick", filters, TensorFormat((1.0,), 0)),
        emitter.model.constant("pick.bias", bias, TensorFormat((tensor.format.scale,), 0)),
    ]
    output = emitter.temporary(tensor, (*tensor.shape[:3], len(channels)), "picked")
    dense(emitter, inputs, output, Padded("valid", (1, 1), (0, 0), (0, 0)), (1, 1), ACTIVATION.NONE)
    return output
