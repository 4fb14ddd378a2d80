"""Asking the target about an operator as it is, and as it could be."""

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from qcompiler.integer.facts import facts_of_float
from qcompiler.target import FactValue, Match, OpFacts, Target


def facts_for(target: Target, node: ir.Node) -> OpFacts:
    """What the target's rules would see of a float or QDQ node."""
    return facts_of_float(node, target.quantization.activations.dtypes[0])


def admits(
    target: Target, facts: OpFacts, changes: Mapping[str, FactValue] | None = None, op: str | None = None
) -> bool:
    """Whether an accelerator takes the operator `facts` describes, with `changes` made to it."""
    changed = replace(facts, op=op or facts.op, facts={**facts.facts, **(changes or {})})
    return isinstance(target.match(changed), Match)


def refused(target: Target, node: ir.Node) -> bool:
    """Whether there are accelerators, and none takes the node as it stands."""
    return bool(target.accelerators) and not admits(target, facts_for(target, node))
