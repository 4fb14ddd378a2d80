"""How a Transpose passes a Reshape: axes split and merged under it, or its permutation put into a QGemm's weights."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.graph import QCOMPILER_DOMAIN, Shape, add_initializer, const_of, data_input, is_op, shape_of, users
from qcompiler.passes.rewriting import Rewrite

Perm = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Neighbouring axes before a Reshape that hold the same elements as neighbouring axes after it."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def groups_of(before: Shape, after: Shape) -> list[Group] | None:
    """The finest grouping of the axes of a Reshape; None for empty tensors.

    >>> groups_of((1, 6, 4), (2, 3, 4))
    [Group(before=(0, 1), after=(0, 1)), Group(before=(2,), after=(2,))]
    """
    if 0 in before or 0 in after:
        return None
    groups: list[Group] = []
    i = j = 0
    while i < len(before) or j < len(after):
        first, second = [], []
        left = right = 1
        if i < len(before):
            first, left, i = [i], before[i], i + 1
        if j < len(after):
            second, right, j = [j], after[j], j + 1
        while left != right:
            if left < right:
                first, left, i = [*first, i], left * before[i], i + 1
            else:
                second, right, j = [*second, j], right * after[j], j + 1
        groups.append(Group(tuple(first), tuple(second)))
    return groups


def push_through_reshape(transpose: ir.Node, reshape: ir.Node, perm: Perm) -> bool:
    """Reshape(Transpose(x)) => Transpose(Reshape(x)), or Reshape(x) into a QGemm with permuted weights."""
    return _swap(transpose, reshape, perm) or _into_gemm(transpose, reshape, perm)


def _swap(transpose: ir.Node, reshape: ir.Node, perm: Perm) -> bool:
    source, after = data_input(transpose), shape_of(reshape.outputs[0])
    shape = shape_of(source)
    groups = groups_of(tuple(shape[axis] for axis in perm), after)
    if groups is None:
        return False
    # Axes of size 1 lie anywhere; the others are where the groups are found in the source.
    axes = {group: tuple(perm[axis] for axis in group.before if shape[perm[axis]] != 1) for group in groups}
    units = [group for group in groups if not axes[group]]
    order = sorted((group for group in groups if axes[group]), key=lambda group: min(axes[group]))
    gathered = [axis for group in order for axis in axes[group]]
    rewrite = Rewrite(reshape)
    if gathered != sorted(gathered):
        # Axes to be merged must be brought together by a Transpose of their own, as in a channel shuffle. That pays
        # only if what is left for the Transpose behind the Reshape meets another one there.
        inner = (*(axis for axis in range(len(perm)) if shape[axis] == 1), *gathered)
        readers = users(reshape.outputs[0])
        met = readers and all(is_op(user, "Transpose") for user in readers)
        if inner == perm or not met or reshape.outputs[0].is_graph_output():
            return False
        source = rewrite.node("Transpose", [source], {"perm": inner})
    # Axes of size 1 go first, where a batch belongs.
    sequence = [axis for group in (*units, *order) for axis in group.after]
    moved = rewrite.node("Reshape", [source, rewrite.dims([after[axis] for axis in sequence])])
    back = tuple(sequence.index(axis) for axis in range(len(after)))
    return rewrite.replace(rewrite.node("Transpose", [moved], {"perm": back}, layer=reshape))


def _into_gemm(transpose: ir.Node, reshape: ir.Node, perm: Perm) -> bool:
    """QGemm(Reshape(Transpose(x))) => QGemm(Reshape(x)), the weights' columns in the order x has."""
    flat, source = reshape.outputs[0], data_input(transpose)
    readers = users(flat)
    if flat.is_graph_output() or len(shape_of(flat)) != 2 or not readers:
        return False
    if not all(
        is_op(user, "QGemm", domain=QCOMPILER_DOMAIN) and const_of(data_input(user, 1)) is not None
        and user.inputs[0] is flat
        for user in readers
    ):  # fmt: skip
        return False
    batch, columns = shape_of(flat)
    moved = shape_of(transpose.outputs[0])
    if perm[0] != 0 or moved[0] != batch:
        return False
    # Where each element of x, in its own order, stood in the flattened row.
    positions = np.arange(columns).reshape((1, *moved[1:])).transpose(np.argsort(perm)).reshape(-1)
    for user in readers:
        weights = const_of(data_input(user, 1))
        assert weights is not None and user.graph is not None and isinstance(user.graph, ir.Graph)
        moved = add_initializer(user.graph, f"{user.name}.weights", weights[:, positions])
        # The scales run along the outputs, which stay.
        moved.metadata_props.update(data_input(user, 1).metadata_props)
        user.replace_input_with(1, moved)
    rewrite = Rewrite(reshape)
    return rewrite.replace(rewrite.node("Reshape", [source, rewrite.dims((batch, columns))], layer=reshape))
