"""Activations of four bits: 8-bit tensors of which sixteen neighbouring integers are used.

No target here stores four bits of an activation, but all clamp what an operator makes. So the format is a container
of eight bits and a clamp, which the quantized model says with a Clip in front of QuantizeLinear: standard ONNX that
every runtime computes alike, and that compiles into the operator's own output clamp.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qcompiler.finetune.sharing import constants_like_outputs, members, shared_formats
from qcompiler.graph import is_op
from qcompiler.quant.formats import limits
from qcompiler.quant.operators import own_producer
from qcompiler.quant.plan import reach
from qcompiler.quant.types import QuantPlan, Range, TensorFormat
from qcompiler.target import Target

LEVELS = 16


def with_four_bits(
    graph: ir.Graph, eight: QuantPlan, four: QuantPlan, ranges: Mapping[str, Range], target: Target, *, edges: bool
) -> QuantPlan:
    """The plan with sixteen levels for each tensor that a convolution or matrix product comes after.

    The network's inputs keep 256 levels unless `edges`; its outputs always do, and so do probabilities of a Softmax.

    Args:
        graph: the float model.
        eight: its plan in 8 bits.
        four: a plan made of `ranges`.
        ranges: by value name, chosen for four bits.
        target: says whether scales are powers of two and zero points in the middle.
    """
    before = reach(list(graph), forward=False)
    values = {value.name or "": value for value in (*graph.inputs, *(out for node in graph for out in node.outputs))}

    def is_narrow(name: str) -> bool:
        value = values[name]
        if name not in four.activations or eight.activations[name].dtype not in ("int8", "uint8"):
            return False
        maker = value.producer()
        if maker is None:
            return edges
        return maker in before and not is_op(own_producer(value), "Softmax")

    activations = dict(eight.activations)
    for group in members(shared_formats(graph, eight)).values():
        if all(is_narrow(name) for name in group):
            known = [ranges[name] for name in group if name in ranges]
            positive = bool(known) and all(interval.low >= 0 for interval in known)
            fmt = _four_bit_format(four.activations[group[0]], target, positive=positive)
            activations |= dict.fromkeys(group, fmt)
    constants = constants_like_outputs(graph, eight)
    weights = {name: activations.get(constants.get(name, ""), fmt) for name, fmt in eight.weights.items()}
    return replace(eight, activations=activations, weights=weights)


def _four_bit_format(fmt: TensorFormat, target: Target, *, positive: bool) -> TensorFormat:
    """Sixteen levels over the interval of an 8-bit format, in its container. positive: nothing is below zero."""
    smallest, largest = limits(fmt.dtype)
    scale, zero_point = float(fmt.scale), int(fmt.zero_point)
    low, high = (smallest - zero_point) * scale, (largest - zero_point) * scale
    middle = (smallest + largest + 1) // 2
    symmetric = target.quantization.activations.symmetric
    if symmetric and positive:
        first, step = middle, high / (LEVELS - 1)
    elif symmetric:
        first, step = middle - LEVELS // 2, high / (LEVELS // 2 - 1)
    else:
        first, step = max(smallest, -LEVELS // 2), (high - low) / (LEVELS - 1)
    if target.quantization.requantize == "shift":
        step = 2.0 ** np.ceil(np.log2(step))
    last = first + LEVELS - 1
    zero = middle if symmetric else int(np.clip(np.rint(first - low / step), first, last))
    return replace(
        fmt, scale=np.asarray(step, np.float32), zero_point=np.array(zero, fmt.zero_point.dtype), used=(first, last)
    )
