"""Drop the rows and columns of a convolution's kernel that only ever see padding."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.graph import data_input, ints, shape_of
from qcompiler.passes.rewriting import Rewrite, is_weight, map_weight, no_auto_pad, until_settled


class CropKernel(ir.passes.InPlacePass):
    """Conv some of whose outermost taps lie outside the input for every output => the same without them.

    Happens where a dilation reaches beyond a small map: such convolutions degenerate to 1 x 1 (Chen et al., DeepLabv3,
    2017, section 3.3). At least one tap stays; pads never become negative; weights in groups of scales stay.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("Conv",), _crop)


@dataclass(frozen=True)
class _Axis:
    """Taps to drop at both ends of one axis, and what is left."""

    lead: int
    trail: int
    taps: int
    pads: tuple[int, int]


def _crop(node: ir.Node) -> bool:
    weight = data_input(node, 1)
    spatial = len(shape_of(weight)) - 2
    if not no_auto_pad(node) or not is_weight(weight):
        return False
    pads, ones = ints(node, "pads", (0,) * (2 * spatial)), (1,) * spatial
    strides, dilations = ints(node, "strides", ones), ints(node, "dilations", ones)
    axes = [
        _cropped(
            shape_of(data_input(node))[2 + axis], shape_of(node.outputs[0])[2 + axis], shape_of(weight)[2 + axis],
            strides[axis], dilations[axis], (pads[axis], pads[axis + spatial]),
        )
        for axis in range(spatial)
    ]  # fmt: skip
    if not any(axis.lead or axis.trail for axis in axes):
        return False

    def crop(array: np.ndarray) -> np.ndarray:
        return array[(..., *(slice(axis.lead, axis.lead + axis.taps) for axis in axes))]

    rewrite = Rewrite(node)
    cropped = map_weight(rewrite, weight, crop, lambda axis: axis)
    if cropped is None:
        return rewrite.abandon()
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    attributes |= {
        "kernel_shape": tuple(axis.taps for axis in axes),
        "pads": (*(axis.pads[0] for axis in axes), *(axis.pads[1] for axis in axes)),
        "dilations": tuple(1 if axis.taps == 1 else step for axis, step in zip(axes, dilations, strict=True)),
    }
    inputs = [data_input(node), cropped, *node.inputs[2:]]
    return rewrite.replace(rewrite.node("Conv", inputs, attributes, layer=node))


def _cropped(size: int, outputs: int, taps: int, stride: int, dilation: int, pads: tuple[int, int]) -> _Axis:
    """Output o reads position o * stride - pads[0] + tap * dilation."""
    before, after = pads
    furthest = (outputs - 1) * stride - before
    lead = trail = 0
    while lead < taps - 1 and furthest + lead * dilation < 0 and before >= (lead + 1) * dilation:
        lead += 1
    while (
        trail < taps - 1 - lead and (taps - 1 - trail) * dilation - before >= size and after >= (trail + 1) * dilation
    ):
        trail += 1
    return _Axis(lead, trail, taps - lead - trail, (before - lead * dilation, after - trail * dilation))
