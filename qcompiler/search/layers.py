"""The layers whose weights have a choice of formats, and plans that mix them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import onnx_ir as ir

from qcompiler.diagnose import units_of
from qcompiler.graph import data_input, value_name
from qcompiler.integer.facts import facts_of_float
from qcompiler.quant.formats import bias_format, bit_width
from qcompiler.quant.operators import MAC_OPS
from qcompiler.quant.types import DTypeName, QuantPlan, WeightRequest, WeightType
from qcompiler.quant.weight_bits import FEW_BITS
from qcompiler.target import Match, Target

LayerFormat = WeightType | Literal["float"]
"""What a layer's weights are stored as; float leaves the layer to the CPU."""
FLOAT: LayerFormat = "float"
UNIFORM: WeightType = "int8"
"""What every layer has unless something else is chosen."""


@dataclass(frozen=True)
class Layer:
    """Operators that share one constant of weights, with the activations fused into them."""

    name: str
    """As in reports; of several operators, the first one's."""
    op: str
    products: tuple[ir.Node, ...]
    """Those that multiply by the weights."""
    members: frozenset[str]
    """Names of all nodes, fused activations among them."""
    parts: tuple[str, ...]
    """Names as in reports of all operators that read the weights."""
    weights: str
    """Name of the initializer."""
    formats: tuple[LayerFormat, ...]
    """Admitted ones; `UNIFORM` first."""


Assignment = tuple[LayerFormat, ...]
"""A format for each layer, in their order."""


def layers_of(model: ir.Model, plan: QuantPlan, target: Target, activation: DTypeName) -> tuple[Layer, ...]:
    """The quantized layers with constant weights, in execution order.

    Args:
        model: the float model.
        plan: made for it.
        target: says which types of weights there are, and which layers its accelerators take with them.
        activation: the type of activations.
    """
    found: dict[str, Layer] = {}
    for unit in units_of(model, plan):
        node = unit.node
        if node is None or node.op_type not in MAC_OPS or not unit.weights:
            continue
        weights = value_name(data_input(node, 1))
        if weights not in plan.weights:
            continue
        members = frozenset(member.name or "" for member in unit.nodes)
        known = found.get(weights)
        if known is None:
            formats = admitted(node, target, activation)
            found[weights] = Layer(unit.name, unit.op, (node,), members, (unit.name,), weights, formats)
        else:
            formats = tuple(each for each in known.formats if each in admitted(node, target, activation))
            found[weights] = replace(
                known,
                products=(*known.products, node),
                members=known.members | members,
                parts=(*known.parts, unit.name),
                formats=formats,
            )
    return tuple(found.values())


def admitted(node: ir.Node, target: Target, activation: DTypeName) -> tuple[LayerFormat, ...]:
    """What the target has, without formats that would send a layer from an accelerator to the CPU; float goes there."""
    offered: tuple[DTypeName, ...] = target.quantization.weights.dtypes
    eight: DTypeName | None = next((dtype for dtype in offered if bit_width(dtype) == 8), None)
    facts = facts_of_float(node, activation)

    def taken(stored: DTypeName) -> bool:
        return isinstance(target.match(replace(facts, precision=f"{activation}*{stored}")), Match)

    known: tuple[WeightType, ...] = get_args(WeightType)
    found: list[LayerFormat] = []
    for wanted in known:
        stored = eight if wanted == UNIFORM else FEW_BITS.get(wanted)
        if stored is None or stored not in offered:
            continue
        if not target.accelerators or wanted == UNIFORM or taken(stored) or (eight is not None and not taken(eight)):
            found.append(wanted)
    return (*sorted(found, key=lambda wanted: wanted != UNIFORM), FLOAT)


def weight_types(layers: Sequence[Layer]) -> list[WeightType]:
    """The formats of weights that some layer admits."""
    found: dict[WeightType, None] = {}
    for layer in layers:
        found |= {dtype: None for dtype in layer.formats if dtype != "float"}
    return list(found)


def everywhere(layers: Sequence[Layer], dtype: WeightType) -> Assignment:
    """One format in every layer that admits it."""
    return tuple(dtype if dtype in layer.formats else UNIFORM for layer in layers)


def request(layers: Sequence[Layer], chosen: Assignment, base: WeightRequest) -> tuple[WeightRequest, tuple[str, ...]]:
    """What `plan` must be asked for: formats by layer, and names of layers to keep in float."""
    by_layer: dict[str, WeightType] = {}
    floats: list[str] = []
    for layer, dtype in zip(layers, chosen, strict=True):
        if dtype == "float":
            floats += layer.parts
        elif dtype != UNIFORM:
            by_layer |= dict.fromkeys(layer.parts, dtype)
    return replace(base, default=UNIFORM, by_layer=by_layer), tuple(floats)


def compose(
    base: QuantPlan, layers: Sequence[Layer], chosen: Assignment, plans: Mapping[WeightType, QuantPlan]
) -> QuantPlan:
    """`base`, with each layer's weights, and what makes up for their rounding, from the plan of its format.

    Args:
        base: any plan in which just the layers chosen for float stay in float.
        plans: by format, each with that format in every layer that admits it.
    """
    weights, rounded = dict(base.weights), dict(base.rounded)
    biases, shifts = dict(base.biases), dict(base.bias_shifts)
    for layer, dtype in zip(layers, chosen, strict=True):
        if dtype == "float":
            continue
        source = plans[dtype]
        weights[layer.weights] = source.weights[layer.weights]
        rounded.pop(layer.weights, None)
        if layer.weights in source.rounded:
            rounded[layer.weights] = source.rounded[layer.weights]
        for node in layer.products:
            name = node.name or ""
            shifts.pop(name, None)
            if name in source.bias_shifts:
                shifts[name] = source.bias_shifts[name]
            if name in source.biases:
                scale = base.activations[value_name(data_input(node))].scale
                biases[name] = bias_format(scale, weights[layer.weights])
    return replace(base, weights=weights, rounded=rounded, biases=biases, bias_shifts=shifts)
