"""One-dimensional convolutions and pools become two-dimensional ones of height 1."""

import onnx_ir as ir

from qcompiler.graph import data_input, input_of, shape_of
from qcompiler.passes.rewriting import Rewrite, is_weight, map_weight, no_auto_pad, until_settled

_PAIRS = {"strides": 1, "dilations": 1, "kernel_shape": 1, "output_padding": 0}
"""Attributes with one number per spatial axis, and the number for the new axis."""


class NormalizeConv1d(ir.passes.InPlacePass):
    """Conv, ConvTranspose, MaxPool and AveragePool on [N, C, W] => Reshape, the same on [N, C, 1, W], Reshape.

    Weights become [O, I, 1, K], quantized ones included. Run-time weights and auto_pad are left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("Conv", "ConvTranspose", "MaxPool", "AveragePool"), _widen)


def _widen(node: ir.Node) -> bool:
    x = data_input(node)
    if len(shape_of(x)) != 3 or not no_auto_pad(node) or len(node.outputs) > 1 or "output_shape" in node.attributes:
        return False
    rewrite = Rewrite(node)
    inputs: list[ir.Value | None] = [_with_height(rewrite, x)]
    if node.op_type in ("Conv", "ConvTranspose"):
        weight = data_input(node, 1)
        if not is_weight(weight):
            return rewrite.abandon()
        wide = map_weight(rewrite, weight, lambda w: w[:, :, None, :], lambda axis: axis + (axis == 2))
        if wide is None:
            return rewrite.abandon()
        inputs += [wide, input_of(node, 2)] if input_of(node, 2) is not None else [wide]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    for name, number in _PAIRS.items():
        if name in attributes:
            attributes[name] = (number, *attributes[name])
    if "pads" in attributes:
        begin, end = attributes["pads"]
        attributes["pads"] = (0, begin, 0, end)
    wide_output = rewrite.node(node.op_type, inputs, attributes, layer=node)
    return rewrite.replace(rewrite.reshape(wide_output, shape_of(node.outputs[0])))


def _with_height(rewrite: Rewrite, value: ir.Value) -> ir.Value:
    batch, channels, width = shape_of(value)
    return rewrite.reshape(value, (batch, channels, 1, width))
