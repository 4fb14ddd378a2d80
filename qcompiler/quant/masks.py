"""Attention masks: large negative numbers, added to scores so that Softmax forgets some of them.

Taken for what it is, the range of a masked tensor leaves eight bits nothing for the scores. But all that Softmax wants
of a masked score is that it lies well below the others. So the sum gets the range of the scores and a margin below it,
and the mask one that takes the highest score to its bottom: both saturate there.
"""

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from qcompiler.graph import const_of, data_input, is_op, users, value_name
from qcompiler.quant.types import Range

MARGIN = 8.0
"""How far below the lowest score a masked one comes to lie: it weighs at most e⁻⁸ of any other."""
MASK = -1000.0
"""A number below this, in a tensor that is added to scores, is a mask: no score is so low."""


def unmasked_ranges(nodes: Iterable[ir.Node], ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Ranges with those of masks and of masked scores put right; all others as they are.

    Args:
        nodes: of the float graph.
        ranges: what calibration saw. A mask that masked nothing there is known by the constant that makes it.
    """
    found = dict(ranges)
    for node in nodes:
        if not is_op(node, "Add") or not _only_softmax_reads(node.outputs[0]):
            continue
        for mask, scores in ((0, 1), (1, 0)):
            seen = ranges.get(value_name(data_input(node, scores)))
            if seen is None or seen.low < MASK or not _is_mask(data_input(node, mask), ranges):
                continue
            bottom = seen.low - MARGIN
            total, name = value_name(node.outputs[0]), value_name(data_input(node, mask))
            found[total] = Range(bottom, seen.high, bottom, seen.high)
            lowest = min(bottom - seen.high, found[name].low if name in found and found[name].low > MASK else 0.0)
            found[name] = Range(lowest, 0.0, lowest, 0.0)
    return found


def is_masked(node: ir.Node, ranges: Mapping[str, Range]) -> bool:
    """Whether a Softmax reads masked scores whose range is still the mask's, so that eight bits cannot hold them."""
    seen = ranges.get(value_name(data_input(node))) if is_op(node, "Softmax") else None
    return seen is not None and seen.low < MASK


def _only_softmax_reads(value: ir.Value) -> bool:
    readers = users(value)
    return bool(readers) and not value.is_graph_output() and all(is_op(reader, "Softmax") for reader in readers)


def _is_mask(value: ir.Value, ranges: Mapping[str, Range]) -> bool:
    seen, constant, maker = ranges.get(value_name(value)), const_of(value), value.producer()
    if constant is not None:
        return bool(constant.min() < MASK)
    if seen is not None and seen.low < MASK:
        return True
    if maker is None or not is_op(maker, "Mul", "Where"):
        return False
    constants = [array for operand in maker.inputs if (array := const_of(operand)) is not None]
    return any(array.size == 1 and float(array.reshape(())) < MASK for array in constants if array.dtype.kind == "f")
