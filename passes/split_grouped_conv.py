"""Grouped convolutions for targets that have only plain ones."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, data_input, input_of, integer, shape_of
from qcompiler.passes.legality import admits, facts_for, refused
from qcompiler.passes.rewriting import Rewrite, is_weight, map_weight, until_settled, weight_dequantize
from qcompiler.target import FactValue, OpFacts, Target

MOST_PIECES = 16
"""More convolutions than this cost more in commands than zeros cost in multiplications."""


class SplitGroupedConv(ir.passes.InPlacePass):
    """Conv of several groups, which the target refuses => Split, one Conv a group, Concat; or one dense Conv.

    The dense form fills the weight with zeros between groups. It is taken where it needs no more multiplications than
    the pieces, whose channels the accelerator rounds up (`channel_alignment`), or where the pieces are too many.
    Nothing changes unless the target takes the result. Quantized weights are cut with their scales.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("Conv",), self._split)

    def _split(self, node: ir.Node) -> bool:
        group = integer(node, "group", 1)
        weight, bias = data_input(node, 1), input_of(node, 2)
        if group == 1 or not is_weight(weight) or (bias is not None and not is_weight(bias)):
            return False
        if len(shape_of(weight)) != 4 or not refused(self.target, node):
            return False
        facts = facts_for(self.target, node)
        channels, outputs = shape_of(data_input(node))[1], shape_of(weight)[0]
        pieces, dense = ungrouped(facts)
        take_pieces = group <= MOST_PIECES and admits(self.target, facts, pieces)
        take_dense = admits(self.target, facts, dense)
        if take_dense and not (take_pieces and self._pieces_are_cheaper(channels, outputs, group)):
            return _densify(node, group)
        return take_pieces and _cut(node, group)

    def _pieces_are_cheaper(self, channels: int, outputs: int, group: int) -> bool:
        unit = max(accelerator.channel_alignment for accelerator in self.target.accelerators.values())
        piece = -(-channels // group // unit) * -(-outputs // group // unit) * unit**2
        return group * piece < channels * outputs


def ungrouped(facts: OpFacts) -> tuple[dict[str, FactValue], dict[str, FactValue]]:
    """What changes in the facts of a grouped convolution: in each of the pieces, and in the dense form."""
    group, channels, outputs = (facts.facts[name] for name in ("group", "ifm_channels", "ofm_channels"))
    assert isinstance(group, int) and isinstance(channels, int) and isinstance(outputs, int)
    dense: dict[str, FactValue] = {"group": 1, "depthwise": False}
    return dense | {"ifm_channels": channels // group, "ofm_channels": outputs // group}, dense


def admits_ungrouped(target: Target, facts: OpFacts, changes: Mapping[str, FactValue], op: str = "Conv") -> bool:
    """Whether the target takes a convolution with `changes`, as it is or once `SplitGroupedConv` has been at it."""
    forms = ({}, *ungrouped(facts))
    return any(admits(target, facts, {**changes, **form}, op) for form in forms)


def _cut(node: ir.Node, group: int) -> bool:
    weight, bias = data_input(node, 1), input_of(node, 2)
    size = shape_of(weight)[0] // group
    attributes = {name: attribute.value for name, attribute in node.attributes.items()} | {"group": 1}
    rewrite = Rewrite(node)
    slices = rewrite.nodes("Split", [data_input(node)], {"axis": 1, "num_outputs": group}, outputs=group)
    results = []
    for index, piece in enumerate(slices):
        cut = _cutter(index * size, (index + 1) * size)
        parts = [
            map_weight(rewrite, value, cut, lambda axis: axis, cut) for value in (weight, bias) if value is not None
        ]
        if any(part is None for part in parts) or _scales_run_along_inputs(weight):
            return rewrite.abandon()
        results.append(rewrite.node("Conv", [piece, *parts], attributes))
    return rewrite.replace(rewrite.node("Concat", results, {"axis": 1}, layer=node))


def _cutter(start: int, end: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda array: array[start:end]


def _scales_run_along_inputs(weight: ir.Value) -> bool:
    dequantize = weight_dequantize(weight)
    if dequantize is None or shape_of(data_input(dequantize, 1)) in ((), (1,)):
        return False
    return integer(dequantize, "axis", 1) % 4 != 0


def _densify(node: ir.Node, group: int) -> bool:
    weight = data_input(node, 1)
    if not zero_is_zero(weight) or _scales_run_along_inputs(weight):
        return False

    def spread(array: np.ndarray) -> np.ndarray:
        outputs, inputs, *kernel = array.shape
        dense = np.zeros((group, outputs // group, group, inputs, *kernel), array.dtype)
        for index in range(group):
            dense[index, :, index] = array.reshape(group, outputs // group, inputs, *kernel)[index]
        return dense.reshape(outputs, group * inputs, *kernel)

    rewrite = Rewrite(node)
    dense = map_weight(rewrite, weight, spread, lambda axis: axis)
    if dense is None:
        return rewrite.abandon()
    attributes = {name: attribute.value for name, attribute in node.attributes.items()} | {"group": 1}
    inputs = [data_input(node), dense, *node.inputs[2:]]
    return rewrite.replace(rewrite.node("Conv", inputs, attributes, layer=node))


def zero_is_zero(weight: ir.Value) -> bool:
    """Whether a stored 0 stands for 0.0: a float weight, or one quantized with zero points 0."""
    dequantize = weight_dequantize(weight)
    zero_point = const_of(input_of(dequantize, 2)) if dequantize is not None else None
    return zero_point is None or not zero_point.any()
