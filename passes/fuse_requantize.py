"""Merge clamps, rescalings and tables that follow one another."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    QCOMPILER_DOMAIN,
    add_initializer,
    const_of,
    data_input,
    dtype_of,
    graph_of,
    is_op,
    make_value,
    only_user,
    remove_dead,
    replace_node,
    shape_of,
)
from qcompiler.integer import ops
from qcompiler.integer.reference import INTEGER_FUNCTIONS, Form
from qcompiler.passes.rewriting import bypass, until_settled

_UNARY = ("QLookup", "QRequantize")


class FuseRequantize(ir.passes.InPlacePass):
    """Exact merges of operators on one 8-bit tensor.

    - Clip after an operator with a clamp: the clamp narrows.
    - QLookup after or before QRequantize, Clip or QLookup: one QLookup, its table run through the other.

    The first operator must have no other reader. Two QRequantize stay two: their roundings cannot become one,
    and a table might be something the target lacks.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        clips = until_settled(model, ("Clip",), _into_clamp).modified
        tables = False
        while any([_compose(node) for node in list(model.graph) if node.graph is model.graph and _is_unary(node)]):
            tables = True
        if tables:
            remove_dead(model)
        return ir.passes.PassResult(model, modified=clips or tables)


def _into_clamp(clip: ir.Node) -> bool:
    """Clip(op(…)) => op(…) with the narrower of the clamps, if they overlap."""
    first, bounds = data_input(clip).producer(), _bounds(clip)
    if first is None or bounds is None or first.domain != QCOMPILER_DOMAIN or only_user(first.outputs[0]) is not clip:
        return False
    if "clamp_min" not in first.attributes:
        return False
    low, high = (int(np.clip(first.attributes[name].as_int(), *bounds)) for name in ("clamp_min", "clamp_max"))
    if not bypass(clip, first.outputs[0]):
        return False
    first.attributes["clamp_min"] = ir.AttrInt64("clamp_min", low)
    first.attributes["clamp_max"] = ir.AttrInt64("clamp_max", high)
    return True


def _compose(second: ir.Node) -> bool:
    """f(g(x)) => table(x), if f or g is a table already."""
    first = data_input(second).producer()
    if first is None or not _is_unary(first) or only_user(first.outputs[0]) is not second:
        return False
    tables = [node for node in (first, second) if is_op(node, "QLookup", domain=QCOMPILER_DOMAIN)]
    ends = (data_input(first), second.outputs[0])
    if not tables or any(dtype_of(value).itemsize > 1 for value in ends):
        return False
    info = np.iinfo(dtype_of(data_input(first)))
    codes = np.arange(info.min, info.max + 1).astype(info.dtype)
    table = add_initializer(graph_of(second), f"{second.name}.composed", _apply(second, _apply(first, codes)))
    output = second.outputs[0]
    assert output.dtype is not None
    fused = make_value(graph_of(second), f"{output.name}.fused", shape_of(output), output.dtype)
    fused.metadata_props.update(output.metadata_props)
    function = "+".join(ops.QLookup.of(node).function for node in tables)
    node = ops.QLookup(function).node([data_input(first), table], fused, second.name or output.name or "")
    replace_node(second, [node], [fused])
    graph_of(first).remove(first, safe=True)
    return True


def _is_unary(node: ir.Node) -> bool:
    """A function of one 8-bit tensor and constants."""
    if is_op(node, "Clip"):
        return _bounds(node) is not None
    narrow = dtype_of(data_input(node)).itemsize == dtype_of(node.outputs[0]).itemsize == 1
    return narrow and is_op(node, *_UNARY, domain=QCOMPILER_DOMAIN)


def _bounds(clip: ir.Node) -> tuple[int, int] | None:
    """The constant bounds of a Clip of 8-bit integers."""
    dtype = dtype_of(data_input(clip))
    if dtype not in (np.int8, np.uint8):
        return None
    found = [int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)]
    for index, value in enumerate(clip.inputs[1:]):
        bound = const_of(value)
        if value is not None and bound is None:
            return None
        found[index] = found[index] if bound is None else int(bound.reshape(()))
    return (found[0], found[1]) if found[0] <= found[1] else None


def _apply(node: ir.Node, x: np.ndarray) -> np.ndarray:
    """What the node makes of each of `x`."""
    bounds = _bounds(node) if is_op(node, "Clip") else None
    if bounds is not None:
        return np.clip(x, *bounds).astype(x.dtype)
    constants = [const_of(value) for value in node.inputs[1:]]
    return INTEGER_FUNCTIONS[node.op_type](node, Form(x.shape, dtype_of(node.outputs[0])), x, *constants)
