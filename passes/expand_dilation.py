"""Dilated convolutions for targets without dilation."""

import math

import numpy as np
import onnx_ir as ir

from qcompiler.graph import data_input, integer, ints, shape_of
from qcompiler.passes.legality import facts_for, refused
from qcompiler.passes.rewriting import Rewrite, is_weight, map_weight, no_auto_pad, until_settled
from qcompiler.passes.split_grouped_conv import admits_ungrouped, zero_is_zero
from qcompiler.target import Target

FEW_ZEROS = 4.0
"""Times the kernel: 3 x 3 with dilation 2 takes 2.8 times the multiplications, which is less than moving maps costs."""
MANY_ZEROS = 16.0
"""Times the kernel: beyond, the CPU is the better place."""


class ExpandDilation(ir.passes.InPlacePass):
    """Conv with dilation, which the target refuses => the same kernel with zeros written out, if that is taken.

    Where zeros would multiply the kernel by more than `FEW_ZEROS`, for stride 1 rather: space to batch (every d-th row
    and column becomes an image of its own), a Conv without dilation, and back, if the target takes that batch. Where it
    does not, up to `MANY_ZEROS`. Else the Conv stays. Quantized weights with zero points other than 0 are left alone.
    Runs before `SplitGroupedConv`, which will see to the groups.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("Conv",), self._expand)

    def _expand(self, node: ir.Node) -> bool:
        weight = data_input(node, 1)
        if len(shape_of(weight)) != 4 or not no_auto_pad(node) or not is_weight(weight):
            return False
        dilations = ints(node, "dilations", (1, 1))
        if dilations == (1, 1) or not refused(self.target, node):
            return False
        facts = facts_for(self.target, node)
        height, width = ((size - 1) * step + 1 for size, step in zip(shape_of(weight)[2:], dilations, strict=True))
        plain = {"dilation_h": 1, "dilation_w": 1}
        written_out = plain | {"kernel_h": height, "kernel_w": width, "kernel_area": height * width}
        growth = height * width / math.prod(shape_of(weight)[2:])
        takes_zeros = zero_is_zero(weight) and admits_ungrouped(self.target, facts, written_out)
        if takes_zeros and growth <= FEW_ZEROS:
            return _write_out(node, dilations)
        batch = {"batch": shape_of(data_input(node))[0] * dilations[0] * dilations[1], "padded": False}
        no_stride = ints(node, "strides", (1, 1)) == (1, 1)
        if no_stride and admits_ungrouped(self.target, facts, plain | batch):
            return _space_to_batch(node, dilations)
        return takes_zeros and growth <= MANY_ZEROS and _write_out(node, dilations)


def _write_out(node: ir.Node, dilations: tuple[int, ...]) -> bool:
    def spread(array: np.ndarray) -> np.ndarray:
        extents = [(size - 1) * step + 1 for size, step in zip(array.shape[2:], dilations, strict=True)]
        wide = np.zeros((*array.shape[:2], *extents), array.dtype)
        wide[:, :, :: dilations[0], :: dilations[1]] = array
        return wide

    rewrite = Rewrite(node)
    weight = map_weight(rewrite, data_input(node, 1), spread, lambda axis: axis)
    if weight is None:
        return rewrite.abandon()
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes |= {"dilations": (1, 1), "kernel_shape": shape_of(weight)[2:]}
    return rewrite.replace(rewrite.node("Conv", [data_input(node), weight, *node.inputs[2:]], attributes, layer=node))


def _space_to_batch(node: ir.Node, dilations: tuple[int, ...]) -> bool:
    x, weight = data_input(node), data_input(node, 1)
    batch, channels, *sizes = shape_of(x)
    top, left, bottom, right = ints(node, "pads", (0, 0, 0, 0))
    (dy, dx), (out_h, out_w) = dilations, shape_of(node.outputs[0])[2:]
    # Padding the end further, to whole multiples of the dilation, adds rows that are cut off again.
    height, width = -(-(sizes[0] + top + bottom) // dy), -(-(sizes[1] + left + right) // dx)
    begins = (0, 0, top, left)
    ends = (0, 0, height * dy - sizes[0] - top, width * dx - sizes[1] - left)
    rewrite = Rewrite(node)
    padded = rewrite.node("Pad", [x, rewrite.dims((*begins, *ends))]) if any((*begins, *ends)) else x
    pixels = rewrite.node("Transpose", [padded], {"perm": (0, 2, 3, 1)})
    # One axis at a time, channels last: no tensor has more than four dimensions.
    rows = rewrite.reshape(pixels, (batch, height, dy, width * dx * channels))
    rows = rewrite.node("Transpose", [rows], {"perm": (2, 0, 1, 3)})
    columns = rewrite.reshape(rows, (dy * batch * height, width, dx, channels))
    columns = rewrite.node("Transpose", [columns], {"perm": (2, 0, 1, 3)})
    images = rewrite.reshape(columns, (dx * dy * batch, height, width, channels))
    images = rewrite.node("Transpose", [images], {"perm": (0, 3, 1, 2)})
    attributes = {"group": integer(node, "group", 1), "kernel_shape": shape_of(weight)[2:]}
    result = rewrite.node("Conv", [images, *node.inputs[1:]], attributes, layer=node)
    outputs, high, wide = shape_of(result)[1:]
    images = rewrite.node("Transpose", [result], {"perm": (0, 2, 3, 1)})
    columns = rewrite.reshape(images, (dx, dy * batch * high, wide, outputs))
    columns = rewrite.node("Transpose", [columns], {"perm": (1, 2, 0, 3)})
    rows = rewrite.reshape(columns, (dy, batch, high, wide * dx * outputs))
    rows = rewrite.node("Transpose", [rows], {"perm": (1, 2, 0, 3)})
    pixels = rewrite.reshape(rows, (batch, high * dy, wide * dx, outputs))
    whole = rewrite.node("Transpose", [pixels], {"perm": (0, 3, 1, 2)})
    if shape_of(whole)[2:] != (out_h, out_w):
        whole = rewrite.node("Slice", [whole, *(rewrite.dims(bound) for bound in ((0, 0), (out_h, out_w), (2, 3)))])
    return rewrite.replace(whole)
