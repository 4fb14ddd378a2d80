"""Spell out padding."""

import onnx_ir as ir

from qcompiler.graph import data_input, ints, shape_of, string
from qcompiler.passes.rewriting import Rewrite, until_settled


class FoldAutoPad(ir.passes.InPlacePass):
    """Conv, ConvTranspose, MaxPool, AveragePool (and LpPool): auto_pad becomes explicit pads and a kernel_shape.

    A ConvTranspose's `output_shape` becomes pads (and output_padding) too.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool"), _spell_out)


def kernel_of(node: ir.Node) -> tuple[int, ...]:
    """The kernel's size; a convolution may leave it to its weight."""
    if node.op_type in ("Conv", "ConvTranspose"):
        return shape_of(data_input(node, 1))[2:]
    return ints(node, "kernel_shape")


def _spell_out(node: ir.Node) -> bool:
    mode = string(node, "auto_pad", "NOTSET")
    transposed = node.op_type == "ConvTranspose"
    if mode == "NOTSET" and not (transposed and "output_shape" in node.attributes):
        return False
    kernel, spatial = kernel_of(node), len(shape_of(data_input(node))) - 2
    sizes, outs = shape_of(data_input(node))[2:], shape_of(node.outputs[0])[2:]
    strides, dilations = ints(node, "strides", (1,) * spatial), ints(node, "dilations", (1,) * spatial)
    begins, ends, extra = [], [], list(ints(node, "output_padding", (0,) * spatial)) if transposed else []
    for axis in range(spatial):
        extent = (kernel[axis] - 1) * dilations[axis] + 1
        if transposed:
            total = strides[axis] * (sizes[axis] - 1) + extra[axis] + extent - outs[axis]
            if total < 0:
                # Asked for more than the kernel reaches: the missing rows are output padding.
                extra[axis], total = extra[axis] - total, 0
        else:
            total = max(0, (outs[axis] - 1) * strides[axis] + extent - sizes[axis]) if mode != "VALID" else 0
        # ONNX: SAME_UPPER puts the odd element at the end; a ConvTranspose without it, at the beginning.
        small = total // 2
        at_end = mode == "SAME_UPPER"
        begins.append(small if at_end else total - small)
        ends.append(total - small if at_end else small)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    for name in ("auto_pad", "output_shape"):
        attributes.pop(name, None)
    attributes |= {"pads": (*begins, *ends), "kernel_shape": kernel}
    if any(extra):
        attributes["output_padding"] = tuple(extra)
    rewrite = Rewrite(node)
    return rewrite.replace(*rewrite.nodes(node.op_type, node.inputs, attributes, outputs=len(node.outputs), layer=node))
