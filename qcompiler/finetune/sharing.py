"""Which tensors have one format between them, so that learning a scale keeps them equal."""

from collections.abc import Mapping

import onnx_ir as ir

from qcompiler.graph import is_op, value_name
from qcompiler.quant.operators import MAC_OPS, activation_inputs, inherits_format
from qcompiler.quant.types import QuantPlan, TensorFormat


def shared_formats(graph: ir.Graph, plan: QuantPlan) -> dict[str, str]:
    """The planned activations, by name, to the first of those they share a format with.

    What an operator only moves has the format of what it read; so has a Concat's output where the plan says so.
    """
    first = {name: name for name in plan.activations}

    def root(name: str) -> str:
        while first[name] != name:
            name = first[name]
        return name

    for node in graph:
        if node.name in plan.float_nodes:
            continue
        for source in activation_inputs(node):
            for output in node.outputs:
                names = (source.name or "", output.name or "")
                if all(name in first for name in names) and _share(node, names, plan.activations):
                    first[root(names[1])] = root(names[0])
    return {name: root(name) for name in first}


def _share(node: ir.Node, names: tuple[str, str], formats: Mapping[str, TensorFormat]) -> bool:
    before, after = (formats[name] for name in names)
    # Some targets want pools and the like to keep the scale of what they read.
    keeps = len(activation_inputs(node)) == 1 and not is_op(node, *MAC_OPS)
    moves = inherits_format(node) or is_op(node, "Concat") or keeps
    same = before.dtype == after.dtype and before.scale == after.scale and before.zero_point == after.zero_point
    return moves and bool(same)


def members(shared: Mapping[str, str]) -> dict[str, list[str]]:
    """The names of each group, by its first."""
    found: dict[str, list[str]] = {}
    for name, first in shared.items():
        found.setdefault(first, []).append(name)
    return found


def constants_like_outputs(graph: ir.Graph, plan: QuantPlan) -> dict[str, str]:
    """Constants that a quantized Concat joins, by name, to its output, whose format they have."""
    return {
        value_name(value): value_name(node.outputs[0])
        for node in graph
        if is_op(node, "Concat") and node.name not in plan.float_nodes
        for value in node.inputs
        if value is not None and value.name in plan.weights
    }
