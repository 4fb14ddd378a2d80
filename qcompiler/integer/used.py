"""Which integers a tensor of the integer graph can hold, by the clamp of the operator that makes it.

Activations of four bits are 8-bit tensors of which sixteen neighbouring integers are used (`finetune.four_bits`).
Whoever multiplies numbers of four bits finds them here.
"""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import QCOMPILER_DOMAIN, const_of, data_input, dtype_of, input_of, is_op

_SAME = frozenset({
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose", "Slice", "Split", "Gather", "Expand", "Tile",
    "DepthToSpace", "SpaceToDepth",
})  # fmt: skip
"""Operators whose elements are elements of their first input."""

FOUR_BITS = {"int4": (-8, 7), "uint4": (0, 15)}


def used(value: ir.Value) -> tuple[int, int]:
    """The least and the greatest integer an integer tensor can hold; its dtype's where nothing says more."""
    array = const_of(value)
    if array is not None and array.size:
        return int(array.min()), int(array.max())
    info = np.iinfo(dtype_of(value))
    node = value.producer()
    if node is None:
        return info.min, info.max
    if node.domain == QCOMPILER_DOMAIN:
        return _of_integer_operator(node, info.min, info.max)
    if node.op_type in _SAME:
        return used(data_input(node))
    if is_op(node, "Clip"):
        low, high = used(data_input(node))
        limits = (const_of(input_of(node, index)) for index in (1, 2))
        lower, upper = (None if limit is None else int(limit.item()) for limit in limits)
        return low if lower is None else max(low, lower), high if upper is None else min(high, upper)
    if is_op(node, "Concat"):
        parts = [used(part) for part in node.inputs if part is not None]
        return min(low for low, _ in parts), max(high for _, high in parts)
    return info.min, info.max


def _of_integer_operator(node: ir.Node, smallest: int, largest: int) -> tuple[int, int]:
    if "clamp_min" in node.attributes:
        low, high = (int(node.attributes[name].as_int()) for name in ("clamp_min", "clamp_max"))
        return max(low, smallest), min(high, largest)
    if node.op_type == "QLookup":
        table = const_of(node.inputs[1])
        return (smallest, largest) if table is None else (int(table.min()), int(table.max()))
    if node.op_type in ("QResizeNearest", "QResizeLinear"):
        return used(data_input(node))
    return smallest, largest


def four_bit_type(value: ir.Value) -> str | None:
    """ "int4" or "uint4" if all of a tensor's integers are such numbers, else None."""
    low, high = used(value)
    return next((name for name, (least, most) in FOUR_BITS.items() if least <= low and high <= most), None)
