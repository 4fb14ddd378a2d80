"""Cancel the Transposes that realizing put around NHWC operators."""

from collections.abc import Sequence

import onnx_ir as ir

from qcompiler.graph import data_input, graph_of, ints, is_op, make_node, producer, shape_of, users
from qcompiler.passes.rewriting import Rewrite, bypass, until_settled
from qcompiler.passes.sink_transpose import identity, push_through
from qcompiler.passes.transpose_reshape import push_through_reshape

_LAYOUT_SUFFIX = ".moved"


class CancelLayoutTransposes(ir.passes.InPlacePass):
    """Push every Transpose of integers, or of floats between layers, towards the outputs, until it meets its inverse or
    an operator bound to axes.

    - Two Transposes in a row become one; an identity goes; one that moves only axes of size 1 becomes a Reshape.
    - A Transpose passes elementwise operators, Concat, Split, Slice, Pad, Gather, means, ArgMax and Softmax by
      renaming their axes and permuting constant operands, and Reshape where the elements stay in order.
    - Two Reshapes in a row become one; a Reshape to the same shape goes.

    Transposes whose reader wants the axes where they are stay, and so do those of floats that anything but elementwise
    operators, Concat and DynamicQuantizeLinear reads.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("Transpose", "Reshape"), _step)


def _step(node: ir.Node) -> bool:
    if node.op_type == "Reshape":
        return _merge_reshapes(node)
    return _canonical(node) or _merge_transposes(node) or any([_pass(node, reader) for reader in _readers(node)])


def perm_of(node: ir.Node) -> tuple[int, ...]:
    rank = len(shape_of(data_input(node)))
    return ints(node, "perm", tuple(reversed(range(rank))))


def _readers(node: ir.Node) -> tuple[ir.Node, ...]:
    return tuple(user for user in users(node.outputs[0]) if user.graph is node.graph)


def _canonical(node: ir.Node) -> bool:
    """Drop an identity; write a Transpose that leaves the elements in memory where they are as a Reshape."""
    perm, shape = perm_of(node), shape_of(data_input(node))
    if identity(perm):
        return bypass(node, data_input(node))
    moved = [axis for axis in perm if shape[axis] != 1]
    if moved != sorted(moved):
        return False
    rewrite = Rewrite(node)
    dims = rewrite.dims(shape_of(node.outputs[0]))
    return rewrite.replace(rewrite.node("Reshape", [data_input(node), dims], layer=node))


def _merge_transposes(node: ir.Node) -> bool:
    first = producer(data_input(node), "Transpose")
    if first is None:
        return False
    inner = perm_of(first)
    rewrite = Rewrite(node)
    perm = tuple(inner[axis] for axis in perm_of(node))
    return rewrite.replace(rewrite.node("Transpose", [data_input(first)], {"perm": perm}, layer=node))


def _merge_reshapes(node: ir.Node) -> bool:
    source, shape = data_input(node), shape_of(node.outputs[0])
    if shape_of(source) == shape:
        return bypass(node, source)
    first = producer(source, "Reshape")
    if first is None:
        return False
    rewrite = Rewrite(node)
    return rewrite.replace(rewrite.node("Reshape", [data_input(first), rewrite.dims(shape)], layer=node))


def _pass(transpose: ir.Node, reader: ir.Node) -> bool:
    """Move a Transpose below one of its readers."""
    if transpose.graph is None or reader.graph is None:
        return False
    perm = perm_of(transpose)
    if is_op(reader, "Reshape"):
        return push_through_reshape(transpose, reader, perm)
    out_perms = push_through(reader, perm)
    if out_perms is None:
        return False
    for output, out_perm in zip(reader.outputs, out_perms, strict=True):
        if not identity(out_perm):
            _append_transpose(reader, output, out_perm)
    return True


def _append_transpose(node: ir.Node, output: ir.Value, perm: Sequence[int]) -> None:
    """Put a Transpose after `output`, whose readers and name it takes over."""
    graph = graph_of(node)
    before = shape_of(output)
    moved = ir.Value(name=output.name, shape=ir.Shape([before[axis] for axis in perm]), type=output.type)
    moved.metadata_props.update(output.metadata_props)
    assert output.name
    ir.convenience.replace_all_uses_with(output, moved, replace_graph_outputs=True)
    output.name = _free_name(output.name, {value.name for other in graph for value in other.outputs})
    name = _free_name(output.name, {other.name for other in graph})
    graph.insert_after(node, make_node("Transpose", [output], [moved], {"perm": tuple(perm)}, name=name))


def _free_name(name: str, taken: set[str | None]) -> str:
    while name in taken:
        name += _LAYOUT_SUFFIX
    return name
