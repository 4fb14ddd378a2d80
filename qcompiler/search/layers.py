"""The layers that have a choice of formats, the tensors between them, and plans that mix formats."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import onnx_ir as ir

from qcompiler.diagnose import units_of
from qcompiler.graph import const_of, data_input, input_of, is_op, users, value_name
from qcompiler.host_cpu import HALF_CONVERSIONS
from qcompiler.integer.facts import facts_of_float
from qcompiler.quant import operators
from qcompiler.quant.formats import BIAS_LIMIT, bias_format, bit_width
from qcompiler.quant.grouped_weights import takes_groups
from qcompiler.quant.operators import MAC_OPS
from qcompiler.quant.types import (
    DTypeName,
    HalfType,
    QuantPlan,
    TensorFormat,
    WeightRequest,
    WeightType,
    WideType,
)
from qcompiler.quant.weight_bits import FEW_BITS, activation_dtype
from qcompiler.quant.widths import eight_bits_only, keeps_width
from qcompiler.search.forms import FLOAT, UNIFORM, WIDE, Form, LayerFormat, form_of
from qcompiler.target import Match, OpFacts, Target

GROUP = 32
"""Weights that share a scale, unless the user says how many."""


@dataclass(frozen=True)
class Layer:
    """Operators that share one constant of weights, or one without weights, with the activations fused into them."""

    name: str
    """As in reports; of several operators, the first one's."""
    op: str
    products: tuple[ir.Node, ...]
    """Those that multiply by the weights; the operator itself if there are none."""
    members: frozenset[str]
    """Names of all nodes, fused activations among them."""
    parts: tuple[str, ...]
    """Names as in reports of all operators that read the weights."""
    weights: str | None
    """Name of the initializer, if there is one."""
    formats: tuple[LayerFormat, ...]
    """Admitted ones; `UNIFORM` first."""


Assignment = tuple[LayerFormat, ...]
"""A format for each layer, in their order."""


@dataclass(frozen=True)
class Junction:
    """A quantized tensor, as far as widths concern it.

    It is made in 16 bits if something reads it so, and brought to 8 for what else reads it; where its maker can make 8
    bits only it is the other way round.
    """

    readers: tuple[int, ...]
    """Layers that read it, by their place."""
    moved: tuple[int, ...]
    """Junctions that data movement makes of it and that therefore read it in their own width. They come later."""
    made_narrow: bool
    """Whether its maker makes 8 bits only."""

    @property
    def may_meet(self) -> bool:
        """Whether widths can differ here."""
        return self.made_narrow or len(self.readers) + len(self.moved) > 1


def layers_of(model: ir.Model, plan: QuantPlan, target: Target, wanted: WeightRequest) -> tuple[Layer, ...]:
    """The quantized layers with a choice, in execution order.

    Args:
        model: the float model.
        plan: made for it, with 8-bit weights everywhere.
        target: says which formats there are, and which layers its accelerators take in them.
        wanted: the type of activations, and the size of groups if the user has one in mind.
    """
    found: dict[str, Layer] = {}
    regions = operators.lookup_regions(list(model.graph))
    for unit in units_of(model, plan):
        node = unit.node
        if node is None:
            continue
        members = frozenset(member.name or "" for member in unit.nodes)
        weights = value_name(data_input(node, 1)) if is_op(node, *MAC_OPS) and unit.weights else None
        if weights is None or weights not in plan.weights:
            formats = (UNIFORM, WIDE) if _may_widen(node, regions.get(node, ()), target, wanted) else ()
            if formats:
                found[unit.name] = Layer(unit.name, unit.op, (node,), members, (unit.name,), None, formats)
            continue
        known = found.get(weights)
        formats = admitted(node, target, wanted)
        if known is None:
            found[weights] = Layer(unit.name, unit.op, (node,), members, (unit.name,), weights, formats)
        else:
            found[weights] = replace(
                known,
                products=(*known.products, node),
                members=known.members | members,
                parts=(*known.parts, unit.name),
                formats=tuple(each for each in known.formats if each in formats),
            )
    return tuple(found.values())


def _may_widen(node: ir.Node, region: Sequence[ir.Node], target: Target, wanted: WeightRequest) -> bool:
    """Whether an operator without weights may read 16 bits where others read 8."""
    if not _has_wide(target, wanted) or eight_bits_only(node) is not None or keeps_width(node, region):
        return False
    if operators.inherits_format(node) or is_op(node, "Concat"):
        return False
    facts = facts_of_float(node, WIDE)
    return _taken(target, facts) or not _taken(target, facts_of_float(node, activation_dtype(target, WeightRequest())))


def _has_wide(target: Target, wanted: WeightRequest) -> bool:
    return wanted.activations == "int8" and WIDE in target.quantization.activations.dtypes


def _taken(target: Target, facts: OpFacts) -> bool:
    return not target.accelerators or isinstance(target.match(facts), Match)


def admitted(node: ir.Node, target: Target, wanted: WeightRequest) -> tuple[LayerFormat, ...]:
    """What the target has, without formats that would send a layer from an accelerator to the CPU; floats go there."""
    spec = target.quantization.weights
    eight: DTypeName | None = next((dtype for dtype in spec.dtypes if bit_width(dtype) == 8), None)
    usual = activation_dtype(target, wanted)
    multiple = spec.group_multiple
    size = wanted.group or GROUP
    found: list[LayerFormat] = []
    for wide in (False, True) if _has_wide(target, wanted) else (False,):
        activation: DTypeName = "int16" if wide else usual
        facts = facts_of_float(node, activation)

        def taken(stored: DTypeName, activation: str = activation, facts: OpFacts = facts) -> bool:
            return _taken(target, replace(facts, precision=f"{activation}*{stored}"))

        narrow = replace(facts_of_float(node, usual), precision=f"{usual}*{eight}")
        if wide and eight is not None and not taken(eight) and _taken(target, narrow):
            continue
        for kind in get_args(WeightType):
            stored = eight if kind == UNIFORM else FEW_BITS.get(kind)
            if stored is None or stored not in spec.dtypes:
                continue
            if kind == UNIFORM or taken(stored) or (eight is not None and not taken(eight)):
                found.append(Form(kind, 0, wide).named(weighted=True))
            decoded = multiple is not None and size % multiple == 0 and kind != UNIFORM and eight is not None
            if decoded and takes_groups(node, stored, size):
                found.append(Form(kind, size, wide).named(weighted=True))
    return (*sorted(found, key=lambda name: name != UNIFORM), half_of(node, target), FLOAT)


def half_of(node: ir.Node, target: Target) -> HalfType:
    """The 16-bit float that suits a layer: float16 if the CPU converts it and it holds the weights."""
    weights = const_of(data_input(node, 1))
    converts = bool(HALF_CONVERSIONS & target.host.features())
    fits = weights is None or float(np.abs(weights).max(initial=0)) < float(np.finfo(np.float16).max)
    return "float16" if converts and fits else "bfloat16"


def junctions_of(model: ir.Model, plan: QuantPlan, layers: Sequence[Layer]) -> tuple[Junction, ...]:
    """The tensors that layers read, and those that become them by data movement; each before what is made of it."""
    nodes = list(model.graph)
    regions = operators.lookup_regions(nodes)
    place = {name: index for index, layer in enumerate(layers) for name in layer.members}
    values = [value for value in (*model.graph.inputs, *(v for node in nodes for v in node.outputs))
              if value.name in plan.activations]  # fmt: skip
    number = {value: index for index, value in enumerate(values)}
    found: list[Junction] = []
    for value in values:
        readers: dict[int, None] = {}
        moved: dict[int, None] = {}
        for node in users(value):
            if node.name in plan.float_nodes:
                continue
            if operators.inherits_format(node) or is_op(node, "Concat"):
                moved |= {number[output]: None for output in node.outputs if output in number}
            elif (node.name or "") in place:
                readers[place[node.name or ""]] = None
        maker = value.producer()
        narrow = (
            maker is not None
            and maker.name not in plan.float_nodes
            and not operators.inherits_format(maker)
            and keeps_width(maker, regions.get(maker, ()))
        )
        found.append(Junction(tuple(readers), tuple(moved), narrow))
    return tuple(found)


def stored_forms(layers: Sequence[Layer]) -> list[LayerFormat]:
    """The formats of weights that some layer admits, `UNIFORM` first."""
    found: dict[LayerFormat, None] = {}
    for layer in layers:
        if layer.weights is not None:
            forms = (form_of(name) for name in layer.formats)
            found |= {form.stored: None for form in forms if form.real is None}
    return list(found) or [UNIFORM]


def everywhere(layers: Sequence[Layer], stored: LayerFormat, *, wide: bool = False) -> Assignment:
    """One format of weights, and one width, in every layer that admits it."""
    chosen: list[LayerFormat] = []
    for layer in layers:
        form = replace(form_of(stored), wide=wide)
        candidates = (form, replace(form_of(UNIFORM), wide=wide), form_of(stored))
        names = (each.named(weighted=layer.weights is not None) for each in candidates)
        chosen.append(next((name for name in names if name in layer.formats), UNIFORM))
    return tuple(chosen)


@dataclass(frozen=True)
class Request:
    """What `plan` must be asked for."""

    formats: WeightRequest
    floats: tuple[str, ...]
    """Names of layers to keep in float."""
    halves: Mapping[str, HalfType]
    """Layers in 16-bit floats."""


def request(layers: Sequence[Layer], chosen: Assignment, base: WeightRequest) -> Request:
    """Formats by layer as options have them."""
    weights: dict[str, WeightType] = {}
    groups: dict[str, int] = {}
    reads: dict[str, WideType] = {}
    floats: list[str] = []
    halves: dict[str, HalfType] = {}
    for layer, name in zip(layers, chosen, strict=True):
        form = form_of(name)
        if form.real == "float":
            floats += layer.parts
        elif form.real is not None:
            halves |= dict.fromkeys(layer.parts, form.real)
        else:
            if form.weights != UNIFORM:
                weights |= dict.fromkeys(layer.parts, form.weights)
            if form.group:
                groups |= dict.fromkeys(layer.parts, form.group)
            if form.wide:
                reads |= dict.fromkeys(layer.parts, "int16")
    formats = replace(base, default="int8", by_layer=weights, group=None, groups=groups, activations_by_layer=reads)
    return Request(formats, tuple(floats), halves)


def compose(
    graph: ir.Model,
    base: QuantPlan,
    layers: Sequence[Layer],
    chosen: Assignment,
    plans: Mapping[LayerFormat, QuantPlan],
    otherwise: Callable[[], QuantPlan],
) -> QuantPlan:
    """`base`, with each layer's weights, and what makes up for their rounding, from the plan of its format.

    Args:
        graph: the model `base` was made for.
        base: any plan in which just the layers chosen for floats stay in float, and which reads what is chosen.
        plans: by format of weights, each with that format in every layer that admits it, for inputs of the usual type.
        otherwise: a plan of the very choice, for layers whose bias needs other weights as their input is finer.
    """
    nodes = {node.name: node for node in graph.graph}
    for layer, name in zip(layers, chosen, strict=True):
        form = form_of(name)
        if form.real is not None or layer.weights is None:
            continue
        source = plans[form.stored]
        products = [nodes[node.name] for node in layer.products]
        if not all(_bias_fits(node, base, source) for node in products):
            source = otherwise()
        base = _with_weights(base, source, layer.weights, products)
    return base


def _bias_fits(node: ir.Node, base: QuantPlan, source: QuantPlan) -> bool:
    bias = const_of(input_of(node, 2))
    if bias is None or (node.name or "") not in source.biases:
        return True
    unit = _bias_format(node, base, source).scale.astype(np.float64)
    return bool((np.abs(bias.reshape(-1)) <= 1.001 * BIAS_LIMIT * unit).all())


def _bias_format(node: ir.Node, base: QuantPlan, source: QuantPlan) -> TensorFormat:
    read = base.read(value_name(data_input(node)), node.name or "")
    return bias_format(read.scale, source.weights[value_name(data_input(node, 1))])


def _with_weights(base: QuantPlan, source: QuantPlan, weights: str, products: Sequence[ir.Node]) -> QuantPlan:
    formats, rounded = {**base.weights, weights: source.weights[weights]}, dict(base.rounded)
    biases, shifts = dict(base.biases), dict(base.bias_shifts)
    rounded.pop(weights, None)
    if weights in source.rounded:
        rounded[weights] = source.rounded[weights]
    for node in products:
        name = node.name or ""
        shifts.pop(name, None)
        if name in source.bias_shifts:
            shifts[name] = source.bias_shifts[name]
        if name in source.biases:
            biases[name] = _bias_format(node, base, source)
    return replace(base, weights=formats, rounded=rounded, biases=biases, bias_shifts=shifts)
