"""HardSigmoid and HardSwish for targets without lookup tables."""

import onnx_ir as ir

from qcompiler.graph import data_input, real
from qcompiler.passes.legality import admits, facts_for, refused
from qcompiler.passes.rewriting import Rewrite, is_quantized, until_settled
from qcompiler.target import Target


class ExpandHardSigmoid(ir.passes.InPlacePass):
    """HardSigmoid, HardSwish, which the target refuses => clip(x * alpha + beta, 0, 1), and times x.

    Nothing changes unless the target takes Mul, Add and Clip. In a QDQ graph the operators stay, since the steps
    between would have no scales.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("HardSigmoid", "HardSwish"), self._expand)

    def _expand(self, node: ir.Node) -> bool:
        if is_quantized(node) or not refused(self.target, node):
            return False
        facts = facts_for(self.target, node)
        if not all(admits(self.target, facts, {"broadcast": True}, op=op) for op in ("Mul", "Add", "Clip")):
            return False
        x, swish = data_input(node), node.op_type == "HardSwish"
        alpha, beta = (1 / 6, 0.5) if swish else (real(node, "alpha", 0.2), real(node, "beta", 0.5))
        rewrite = Rewrite(node)
        line = rewrite.node(
            "Add", [rewrite.node("Mul", [x, rewrite.scalar(alpha, "alpha")]), rewrite.scalar(beta, "beta")]
        )
        clip = [line, rewrite.scalar(0, "min"), rewrite.scalar(1, "max")]
        if not swish:
            return rewrite.replace(rewrite.node("Clip", clip, layer=node))
        return rewrite.replace(rewrite.node("Mul", [x, rewrite.node("Clip", clip)], layer=node))
