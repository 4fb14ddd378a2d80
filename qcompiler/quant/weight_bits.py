"""Which weights are stored in four bits or less, and which activations computed in sixteen."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import TypeVar

import onnx_ir as ir

from qcompiler.errors import QCompilerError
from qcompiler.graph import data_input, value_name
from qcompiler.integer.facts import facts_of_float
from qcompiler.layer_names import JOINT
from qcompiler.quant.grouped_weights import takes_groups
from qcompiler.quant.types import DTypeName, WeightRequest, WeightType
from qcompiler.target import ActivationType, Match, Target


def weight_dtypes(
    weighted: Sequence[ir.Node],
    edges: Collection[ir.Node],
    target: Target,
    activation: Callable[[ir.Node], DTypeName],
    wanted: WeightRequest,
    groups: Mapping[ir.Node, int],
) -> dict[str, DTypeName]:
    """The type of every weight initializer, by name.

    Where `wanted` says so few for all, the layers next to inputs and outputs keep eight bits (unless it says `edges`),
    and so do layers that the accelerator takes with 8-bit weights only. An initializer of several layers has few bits
    if all of them want it.

    Args:
        weighted: the operators with constant weights that will be quantized.
        edges: those of them with no other before, or none after.
        target: its spec lists the types of weights there are.
        activation: the type of activations that an operator reads.
        wanted: what the user asks for.
        groups: from `weight_groups`; weights in groups are multiplied as 8-bit ones.

    Raises:
        QCompilerError: the target has no weights of a type asked for, or no layer has a name asked for.
    """
    offered = target.quantization.weights.dtypes
    eight: DTypeName | None = next((dtype for dtype in offered if dtype in ("int8", "uint8")), None)
    explicit: set[WeightType] = {*wanted.by_layer.values(), *([wanted.default] if wanted.default != "int8" else [])}
    for asked in sorted(explicit):
        if (eight is None) if asked == "int8" else (FEW_BITS[asked] not in offered):
            raise QCompilerError(
                f"{target.name} has no {asked} weights: its spec lists {', '.join(offered)} under "
                "quantization.weights.dtypes. Choose another target, or other --weights."
            )
    by_layer = _by_node(weighted, wanted.by_layer)
    widest: DTypeName = eight or offered[0]
    few = FEW_BITS.get(wanted.default)
    chosen: dict[str, DTypeName] = {}
    for node in weighted:
        inner = wanted.edges or node not in edges
        stored = widest
        if few is not None and inner:
            decoded = node in groups and takes_groups(node, few, groups[node])
            stored = few if decoded or _no_worse(node, target, activation(node), eight, few) else widest
        if node in by_layer:
            stored = FEW_BITS.get(by_layer[node], widest)
        name = value_name(data_input(node, 1))
        chosen[name] = stored if chosen.get(name, stored) == stored else widest
    return chosen


FEW_BITS: Mapping[WeightType, DTypeName] = {"int4": "int4", "int2": "int2", "binary": "int1"}
"""What weights of less than 8 bits are stored as."""


def weight_groups(weighted: Sequence[ir.Node], target: Target, wanted: WeightRequest) -> dict[ir.Node, int]:
    """How many weights share a scale in each layer where some do.

    Args:
        weighted: the operators with constant weights that will be quantized.
        target: its spec says whether there are groups.
        wanted: what the user asks for.

    Raises:
        QCompilerError: the target has no groups, or none of this size; no weights that could be in groups are asked
            for; or no layer has a name asked for.
    """
    asked = {size for size in (wanted.group, *wanted.groups.values()) if size}
    if not asked:
        return {}
    multiple = target.quantization.weights.group_multiple
    if multiple is None:
        raise QCompilerError(
            f"{target.name} has no weights in groups beside integer activations: its spec gives no "
            "quantization.weights.group_multiple. Leave out --group-size, or add --activations float or dynamic."
        )
    if unfit := sorted(size for size in asked if size % multiple):
        raise QCompilerError(f"--group-size {unfit[0]}: groups of {target.name} are multiples of {multiple}.")
    few = wanted.default != "int8" or any(dtype != "int8" for dtype in wanted.by_layer.values())
    if not few:
        raise QCompilerError(
            "--group-size is for weights of less than 8 bits: times the factor of its group a weight must fit the 8 "
            "it is multiplied in. Add --weights int4, or leave it out."
        )
    own = _by_node(weighted, wanted.groups)
    sizes = {node: own.get(node, wanted.group or 0) for node in weighted}
    return {node: size for node, size in sizes.items() if size}


def activation_dtype(target: Target, wanted: WeightRequest) -> ActivationType:
    """The type of activations.

    Raises:
        QCompilerError: 16 bits are asked for and the target's spec does not list them.
    """
    offered = target.quantization.activations.dtypes
    if wanted.activations == "int16" and "int16" not in offered:
        raise QCompilerError(
            f"{target.name} has no int16 activations: its spec lists {', '.join(offered)} under "
            "quantization.activations.dtypes. Choose another target, or --activations int8."
        )
    return "int16" if wanted.activations == "int16" else offered[0]


def _no_worse(node: ir.Node, target: Target, activation: DTypeName, eight: DTypeName | None, few: DTypeName) -> bool:
    """Whether fewer bits do not send the layer from the accelerator to the CPU."""
    facts = facts_of_float(node, activation)

    def taken(weights: DTypeName) -> bool:
        return isinstance(target.match(replace(facts, precision=f"{activation}*{weights}")), Match)

    return not target.accelerators or eight is None or taken(few) or not taken(eight)


_Asked = TypeVar("_Asked")


def _by_node(weighted: Sequence[ir.Node], by_layer: Mapping[str, _Asked]) -> dict[ir.Node, _Asked]:
    """A layer of several operators goes by their names joined, as in reports; one of them has the weights."""
    by_name = {node.name or "": node for node in weighted}
    found: dict[ir.Node, _Asked] = {}
    for layer, dtype in by_layer.items():
        node = by_name.get(layer) or next((by_name[part] for part in layer.split(JOINT) if part in by_name), None)
        if node is None:
            near = get_close_matches(layer, list(by_name), n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else "`qcompile explain` lists them."
            raise QCompilerError(f"no quantized layer with weights is called {layer!r}; {hint}")
        found[node] = dtype
    return found
