"""Padding counted in an average, for targets that cannot count it."""

import onnx_ir as ir

from qcompiler.graph import data_input, integer, ints, shape_of
from qcompiler.passes.legality import admits, facts_for, refused
from qcompiler.passes.rewriting import Rewrite, no_auto_pad, until_settled
from qcompiler.target import Target


class UnfoldPoolPad(ir.passes.InPlacePass):
    """AveragePool with padding in its count, which the target refuses => Pad by 0, AveragePool without padding.

    The reverse of what `FoldPad` does for every target. Nothing changes unless the target takes the pool then.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("AveragePool",), self._unfold)

    def _unfold(self, node: ir.Node) -> bool:
        x = data_input(node)
        spatial = len(shape_of(x)) - 2
        pads = ints(node, "pads", (0,) * 2 * spatial)
        counted = integer(node, "count_include_pad", 0) and not integer(node, "ceil_mode", 0) and no_auto_pad(node)
        if not any(pads) or not counted or not refused(self.target, node):
            return False
        padded = (
            *shape_of(x)[:2],
            *(size + pads[axis] + pads[spatial + axis] for axis, size in enumerate(shape_of(x)[2:])),
        )
        changes = {"padded": False, "pad_counted": False, "ifm_h": padded[-2], "ifm_w": padded[-1]}
        if spatial != 2 or not admits(self.target, facts_for(self.target, node), changes):
            return False
        rewrite = Rewrite(node)
        wide = rewrite.node("Pad", [x, rewrite.dims((0, 0, *pads[:2], 0, 0, *pads[2:]))])
        attributes = {name: attribute.value for name, attribute in node.attributes.items() if name != "pads"}
        attributes.pop("count_include_pad")
        return rewrite.replace(rewrite.node("AveragePool", [wide], attributes, layer=node))
