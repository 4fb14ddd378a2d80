"""LSTM, GRU and RNN of one direction, over sequences of full length."""

from itertools import groupby

import numpy as np
import onnx_ir as ir

from qcompiler.graph import Attribute, const_of, data_input, fresh_name, graph_of, input_of, integer, shape_of
from qcompiler.passes.rewriting import Rewrite, infer_types, is_weight, map_weight, until_settled, weight_dequantize
from qcompiler.recurrent import (
    INITIAL_CELL,
    INITIAL_HIDDEN,
    OPS,
    PEEPHOLES,
    SEQUENCE_LENGTHS,
    UnknownCellError,
    attributes_of,
    cells_of,
    hidden_size,
)

_BY_DIRECTION = (1, 2, 3, INITIAL_HIDDEN, INITIAL_CELL, PEEPHOLES)
"""Inputs with an axis of directions, the first."""


class NormalizeRecurrent(ir.passes.InPlacePass):
    """A bidirectional operator becomes one for each direction and a Concat of each output that is read.

    Constant `sequence_lens` go: what stands side by side in the batch and has one length is computed on that part of
    the sequence, and zeros follow it, as ONNX wants. Outputs left out get names, so that every output has a shape.
    Weights of both directions that share scales in blocks, and lengths computed at run time, stay.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, OPS, lambda node: _name_outputs(node) or _cut(node) or _separate(node))


def _name_outputs(node: ir.Node) -> bool:
    nameless = [value for value in node.outputs if not value.name]
    for value in nameless:
        value.name = fresh_name(graph_of(node), f"{node.name}_unread")
    if nameless:
        infer_types(node)
    return bool(nameless)


# --- lengths ------------------------------------------------------------------------------------------------


def _cut(node: ir.Node) -> bool:
    lengths = const_of(input_of(node, SEQUENCE_LENGTHS))
    steps, batch = shape_of(data_input(node))[:2]
    if (
        integer(node, "layout", 0)
        or lengths is None
        or lengths.shape != (batch,)
        or not all(0 <= length <= steps for length in lengths)
    ):
        return False
    if (lengths == steps).all():
        node.replace_input_with(SEQUENCE_LENGTHS, None)
        return True
    rewrite, runs, first = Rewrite(node), [], 0
    for length, run in groupby(int(length) for length in lengths):
        last = first + len(list(run))
        runs.append(_run(rewrite, node, length, first, last))
        first = last
    joined = (
        parts[0] if len(parts) == 1 else rewrite.node("Concat", parts, {"axis": axis})
        for parts, axis in zip(zip(*runs, strict=True), (2, 1, 1), strict=False)
    )
    return rewrite.replace(*joined)


def _run(rewrite: Rewrite, node: ir.Node, length: int, first: int, last: int) -> list[ir.Value]:
    """The outputs for rows `first` to `last` of the batch, all sequences of this length."""
    steps, batch = shape_of(data_input(node))[:2]
    shapes = [list(shape_of(output)) for output in node.outputs]
    for shape, axis in zip(shapes, (2, 1, 1), strict=False):
        shape[axis] = last - first
    if length == 0:
        return [rewrite.constant(np.zeros(shape, np.float32), f"{node.name}_zeros") for shape in shapes]
    inputs = list(node.inputs)
    inputs[0] = _slice(rewrite, data_input(node), {0: (0, length), 1: (first, last)})
    inputs[SEQUENCE_LENGTHS] = None
    for index in (INITIAL_HIDDEN, INITIAL_CELL):
        state = input_of(node, index)
        if state is not None and last - first < batch:
            inputs[index] = _slice(rewrite, state, {1: (first, last)})
    whole = last - first == batch
    made = rewrite.nodes(
        node.op_type, inputs, _attributes(node), outputs=len(shapes), layer=node if whole else None, hint=f"rows{first}"
    )
    if length < steps:
        made[0] = rewrite.node("Pad", [made[0], rewrite.dims([0] * 4 + [steps - length, 0, 0, 0])])
    return made


def _slice(rewrite: Rewrite, value: ir.Value, bounds: dict[int, tuple[int, int]]) -> ir.Value:
    starts, ends = zip(*bounds.values(), strict=True)
    return rewrite.node("Slice", [value, *(rewrite.dims(numbers) for numbers in (starts, ends, list(bounds)))])


def _attributes(node: ir.Node) -> dict[str, Attribute]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


# --- directions ---------------------------------------------------------------------------------------------


def _separate(node: ir.Node) -> bool:
    try:
        cells = cells_of(node)
    except UnknownCellError:
        return False
    if len(cells) == 1 or not all(is_weight(data_input(node, index)) for index in (1, 2)):
        return False
    rewrite = Rewrite(node)
    outputs: list[list[ir.Value]] = []
    for index, cell in enumerate(cells):
        inputs = list(node.inputs)
        for position in _BY_DIRECTION:
            value = input_of(node, position)
            part = None if value is None else _part(rewrite, value, index)
            if value is not None and part is None:
                return rewrite.abandon()
            if value is not None:
                inputs[position] = part
        hint = "reverse" if cell.reverse else "forward"
        attributes = attributes_of(cell, hidden_size(node))
        outputs.append(rewrite.nodes(node.op_type, inputs, attributes, outputs=len(node.outputs), hint=hint))
    joined = [
        rewrite.node("Concat", parts, {"axis": axis})
        for parts, axis in zip(zip(*outputs, strict=True), (1, 0, 0), strict=False)
    ]
    return rewrite.replace(*joined)


def _part(rewrite: Rewrite, value: ir.Value, index: int) -> ir.Value | None:
    """Entry `index` of the first axis, which stays; None for weights that cannot be taken apart."""
    if not is_weight(value):
        return _slice(rewrite, value, {0: (index, index + 1)})

    def taken(array: np.ndarray) -> np.ndarray:
        return array[index : index + 1]

    dequantize = weight_dequantize(value)
    by_direction = dequantize is not None and integer(dequantize, "axis", 1) % len(shape_of(value)) == 0
    return map_weight(rewrite, value, taken, lambda axis: axis, taken if by_direction else lambda array: array)
