"""Reshapes, Transposes and Slices that together only pick a regular part of a tensor become one Slice."""

import math

import numpy as np
import onnx_ir as ir

from qcompiler.graph import Shape, const_of, data_input, ints, producer, shape_of
from qcompiler.passes.rewriting import Rewrite, until_settled

_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_MOVES = (*_RESHAPES, "Transpose", "Slice")
_MIXED = ({"Transpose", "Slice"}, {"Transpose", "Reshape"}, {"Transpose", "Slice", "Reshape"})
_LIMIT = 1 << 22
"""Elements of the largest tensor whose indices are traced."""


class MergeMovement(ir.passes.InPlacePass):
    """A chain of Reshape, Transpose and Slice with the effect of one Slice, then one Reshape, becomes those.

    The channel shuffle of ShuffleNet (Reshape, Transpose, Reshape, Slice) so becomes a Slice of every other channel.
    The chain is followed by its effect on the numbers of the elements, so its exact form does not matter.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, _MOVES, _merge)


def _merge(node: ir.Node) -> bool:
    chain = [node]
    while (before := producer(data_input(chain[-1]), *_MOVES)) is not None and before.graph is node.graph:
        chain.append(before)
    # The longest chain first: it may end in a regular part where a shorter one does not.
    return any(_merge_chain(chain[:length]) for length in range(len(chain), 1, -1))


def _merge_chain(chain: list[ir.Node]) -> bool:
    """`chain` runs from the last node to the first."""
    kinds = ["Reshape" if node.op_type in _RESHAPES else node.op_type for node in chain]
    # Transposes among themselves, and Reshapes, have passes of their own.
    if kinds.count("Slice") < 2 and set(kinds) not in _MIXED:
        return False
    source, last = data_input(chain[-1]), chain[0]
    shape, wanted = shape_of(source), shape_of(last.outputs[0])
    if const_of(source) is not None or math.prod(shape) > _LIMIT or 0 in wanted:
        return False
    numbers = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    for node in reversed(chain):
        moved = _move(node, numbers)
        if moved is None:
            return False
        numbers = moved
    part = _regular_part(numbers.ravel(), shape)
    if part is None:
        return False
    rewrite = Rewrite(last)
    value = source
    axes = [axis for axis, piece in enumerate(part) if piece != slice(0, shape[axis], 1)]
    if axes:
        starts, ends, steps = zip(*[(part[axis].start, part[axis].stop, part[axis].step) for axis in axes], strict=True)
        value = rewrite.node("Slice", [value, *[rewrite.dims(bound) for bound in (starts, ends, axes, steps)]])
        if shape_of(value) == wanted:
            return rewrite.replace(value)
    return rewrite.replace(rewrite.node("Reshape", [value, rewrite.dims(wanted)], layer=last))


def _move(node: ir.Node, numbers: np.ndarray) -> np.ndarray | None:
    if node.op_type in _RESHAPES:
        return numbers.reshape(shape_of(node.outputs[0]))
    if node.op_type == "Transpose":
        return numbers.transpose(ints(node, "perm", tuple(reversed(range(numbers.ndim)))))
    operands = [const_of(value) for value in node.inputs[1:]]
    if any(operand is None and value is not None for operand, value in zip(operands, node.inputs[1:], strict=True)):
        return None
    starts, ends, axes, steps = [*operands, None, None][:4]
    assert starts is not None and ends is not None
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    pieces = [slice(None)] * numbers.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            return None
        pieces[int(axis)] = slice(int(start), int(end), int(step))
    return numbers[tuple(pieces)]


def _regular_part(numbers: np.ndarray, shape: Shape) -> list[slice] | None:
    """The slices of a tensor of `shape` that hold exactly the elements `numbers`, in order, or None."""
    pieces: list[slice] = []
    for coordinates, size in zip(np.unravel_index(numbers, shape), shape, strict=True):
        used = np.unique(coordinates)
        step = int(used[1] - used[0]) if used.size > 1 else 1
        first, last = int(used[0]), int(used[-1])
        if not np.array_equal(used, np.arange(first, last + 1, step)):
            return None
        pieces.append(slice(0, size, 1) if used.size == size else slice(first, last + 1, step))
    everything = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    return pieces if np.array_equal(everything[tuple(pieces)].ravel(), numbers) else None
