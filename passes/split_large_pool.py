"""Pools larger than the target's limit, as chains of smaller ones."""

import onnx_ir as ir

from qcompiler.graph import Shape, data_input, integer, ints, shape_of
from qcompiler.passes.legality import admits, facts_for, refused
from qcompiler.passes.rewriting import Rewrite, is_quantized, no_auto_pad, until_settled
from qcompiler.target import Target


class SplitLargePool(ir.passes.InPlacePass):
    """AveragePool or MaxPool without padding, which the target refuses => two pools with the same result.

    A window of a * b splits into windows of a, side by side, and then b; the pool's stride must be a multiple of a, or
    there be one window only. Either pool may be split again. The first must be taken by the target, and smaller windows
    are tried until it is. An AveragePool in a QDQ graph stays: the mean of rounded means is another number.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return until_settled(model, ("AveragePool", "MaxPool"), self._split)

    def _split(self, node: ir.Node) -> bool:
        x = data_input(node)
        if len(shape_of(x)) != 4 or len(node.outputs) > 1 or not no_auto_pad(node) or not refused(self.target, node):
            return False
        plain = not any(ints(node, "pads", (0,) * 4)) and set(ints(node, "dilations", (1, 1))) == {1}
        if not plain or integer(node, "ceil_mode", 0) or (node.op_type == "AveragePool" and is_quantized(node)):
            return False
        window, strides = ints(node, "kernel_shape"), ints(node, "strides", (1, 1))
        batch, channels, *sizes = shape_of(x)
        outs = shape_of(node.outputs[0])[2:]
        facts = facts_for(self.target, node)
        for first in _first_windows(window, strides, outs):
            rest = _divide(window, first)
            steps = [1 if out == 1 else stride // part for out, stride, part in zip(outs, strides, first, strict=True)]
            # Rows beyond the last window are read by nobody; the first pool leaves its remainder out alike.
            between = tuple(size // part for size, part in zip(sizes, first, strict=True))
            small = _window_facts(first, first, tuple(sizes), between)
            second = _window_facts(rest, tuple(steps), between, outs)
            if not admits(self.target, facts, {**small, "elements": batch * channels * between[0] * between[1]}):
                continue
            if not admits(self.target, facts, second) and not _smaller_exists(rest):
                continue
            rewrite = Rewrite(node)
            pooled = rewrite.node(node.op_type, [x], {"kernel_shape": first, "strides": first})
            result = rewrite.node(node.op_type, [pooled], {"kernel_shape": rest, "strides": steps}, layer=node)
            return rewrite.replace(result)
        return False


def _divide(window: Shape, first: Shape) -> Shape:
    return tuple(size // part for size, part in zip(window, first, strict=True))


def _smaller_exists(window: Shape) -> bool:
    """Whether a window can be split again."""
    return any(size % part == 0 for size in window for part in range(2, size))


def _first_windows(window: Shape, strides: Shape, outs: Shape) -> list[Shape]:
    """Admissible first windows, the largest first, without 1x1 and the whole."""
    parts = [
        [part for part in range(1, size + 1) if size % part == 0 and (out == 1 or stride % part == 0)]
        for size, stride, out in zip(window, strides, outs, strict=True)
    ]
    found = [(high, wide) for high in parts[0] for wide in parts[1] if (high, wide) not in ((1, 1), tuple(window))]
    return sorted(found, key=lambda first: -first[0] * first[1])


def _window_facts(window: Shape, strides: Shape, ifm: Shape, ofm: Shape) -> dict[str, int | bool | str]:
    return {
        "kernel_h": window[0],
        "kernel_w": window[1],
        "kernel_area": window[0] * window[1],
        "stride_h": strides[0],
        "stride_w": strides[1],
        "ifm_h": ifm[0],
        "ifm_w": ifm[1],
        "ofm_h": ofm[0],
        "ofm_w": ofm[1],
    }
