"""Transposed convolutions for targets that have only forward ones."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import Shape, data_input, integer, ints, shape_of
from qcompiler.passes.legality import facts_for, refused
from qcompiler.passes.rewriting import Rewrite, is_weight, map_weight, no_auto_pad, until_settled, weight_dequantize
from qcompiler.passes.split_grouped_conv import admits_ungrouped
from qcompiler.target import Target


class LowerConvTranspose(ir.passes.InPlacePass):
    """ConvTranspose, which the target refuses => zeros between the pixels (Pad and Reshape, channels last), then Conv.

    The Conv's kernel is turned by 180 degrees and its padding is (kernel - 1) * dilation - pad. ConvTransposes that
    crop more than their kernel reaches are left alone, as are grouped ones with weights quantized per channel.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("ConvTranspose",), self._lower)

    def _lower(self, node: ir.Node) -> bool:
        x, weight = data_input(node), data_input(node, 1)
        if len(shape_of(x)) != 4 or not no_auto_pad(node) or "output_shape" in node.attributes:
            return False
        if not is_weight(weight) or not refused(self.target, node):
            return False
        sizes = shape_of(x)[2:]
        strides, dilations = ints(node, "strides", (1, 1)), ints(node, "dilations", (1, 1))
        kernel, pads, extra = shape_of(weight)[2:], ints(node, "pads", (0,) * 4), ints(node, "output_padding", (0, 0))
        reach = [(size - 1) * step for size, step in zip(kernel, dilations, strict=True)]
        begins = [reach[axis] - pads[axis] for axis in (0, 1)]
        # The last pixel has its zeros behind it too.
        ends = [reach[axis] - pads[2 + axis] + extra[axis] - (strides[axis] - 1) for axis in (0, 1)]
        wide = [size * step for size, step in zip(sizes, strides, strict=True)]
        changes = {"stride_h": 1, "stride_w": 1, "ifm_h": wide[0], "ifm_w": wide[1], "padded": any((*begins, *ends))}
        if min((*begins, *ends)) < 0 or not admits_ungrouped(self.target, facts_for(self.target, node), changes):
            return False
        group = integer(node, "group", 1)
        if group > 1 and _per_channel(weight):
            return False
        rewrite = Rewrite(node)
        turned = map_weight(
            rewrite, weight, lambda array: _turn(array, group), lambda axis: 1 - axis if axis < 2 else axis
        )
        if turned is None:
            return rewrite.abandon()
        spread = _between_zeros(rewrite, x, strides) if strides != (1, 1) else x
        attributes = {"kernel_shape": kernel, "pads": (*begins, *ends), "dilations": dilations, "group": group}
        result = rewrite.node("Conv", [spread, turned, *node.inputs[2:]], attributes, layer=node)
        return rewrite.replace(result)


def _between_zeros(rewrite: Rewrite, x: ir.Value, strides: Shape) -> ir.Value:
    """[N, C, H, W] to [N, C, H * stride, W * stride], zeros behind every pixel.

    Channels last, the zeros of a row are more channels, and those of the rows are a longer row: no tensor has more than
    four dimensions, and the Transposes cancel when the graph becomes NHWC.
    """
    batch, channels, height, width = shape_of(x)
    pixels = rewrite.node("Transpose", [x], {"perm": (0, 2, 3, 1)})
    if strides[1] > 1:
        pixels = rewrite.node("Pad", [pixels, rewrite.dims((0,) * 7 + ((strides[1] - 1) * channels,))])
    row = width * strides[1] * channels
    rows = rewrite.reshape(pixels, (batch, height, row))
    if strides[0] > 1:
        rows = rewrite.node("Pad", [rows, rewrite.dims((0,) * 5 + ((strides[0] - 1) * row,))])
    wide = rewrite.reshape(rows, (batch, height * strides[0], width * strides[1], channels))
    return rewrite.node("Transpose", [wide], {"perm": (0, 3, 1, 2)})


def _per_channel(weight: ir.Value) -> bool:
    dequantize = weight_dequantize(weight)
    return dequantize is not None and shape_of(data_input(dequantize, 1)) not in ((), (1,))


def _turn(array: np.ndarray, group: int) -> np.ndarray:
    """[in, out / group, KH, KW] to [out, in / group, KH, KW], turned by 180 degrees."""
    inputs, outputs, *kernel = array.shape
    grouped = array[:, :, ::-1, ::-1].reshape(group, inputs // group, outputs, *kernel)
    return grouped.swapaxes(1, 2).reshape(group * outputs, inputs // group, *kernel)
