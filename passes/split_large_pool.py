"""Pools larger than the target's limit, as chains of smaller ones."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompiler.graph import Shape, data_input, integer, ints, shape_of
from qcompiler.passes.legality import admits, facts_for, refused
from qcompiler.passes.rewriting import Rewrite, is_quantized, no_auto_pad, until_settled
from qcompiler.target import FactValue, OpFacts, Target


class SplitLargePool(ir.passes.InPlacePass):
    """AveragePool or MaxPool without padding, which the target refuses => a chain of pools with the same result.

    A window of a * b splits into windows of a, side by side, and then b; the pool's stride must be a multiple of a, or
    there be one window only. Of the chains whose every pool the target takes, the one with the largest windows first is
    chosen; if there is none, the pool stays. An AveragePool in a QDQ graph stays: the mean of rounded means is another
    number.
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
        pool = _Pool(window, strides, shape_of(x)[2:], shape_of(node.outputs[0])[2:])
        chain = self._chain(facts_for(self.target, node), pool)
        if chain is None:
            return False
        rewrite = Rewrite(node)
        for index, part in enumerate(chain):
            attributes = {"kernel_shape": part.window, "strides": part.strides}
            x = rewrite.node(node.op_type, [x], attributes, layer=node if index == len(chain) - 1 else None)
        return rewrite.replace(x)

    def _chain(self, facts: OpFacts, pool: "_Pool") -> list["_Pool"] | None:
        """Pools the target takes that together are `pool`, or None."""
        if admits(self.target, facts, pool.facts()):
            return [pool]
        for first, rest in _cuts(pool):
            if admits(self.target, facts, first.facts()):
                behind = self._chain(facts, rest)
                if behind is not None:
                    return [first, *behind]
        return None


@dataclass(frozen=True)
class _Pool:
    """Height and width of its parts."""

    window: Shape
    strides: Shape
    ifm: Shape
    ofm: Shape

    def facts(self) -> dict[str, FactValue]:
        area = self.window[0] * self.window[1]
        facts: dict[str, FactValue] = {"kernel_area": area}
        for name, pair in (("kernel", self.window), ("stride", self.strides), ("ifm", self.ifm), ("ofm", self.ofm)):
            facts |= {f"{name}_h": pair[0], f"{name}_w": pair[1]}
        return facts


def _cuts(pool: _Pool) -> Iterator[tuple[_Pool, _Pool]]:
    """The ways to make two pools of one, those with the largest first window first."""
    parts = [
        [part for part in range(1, size + 1) if size % part == 0 and (out == 1 or stride % part == 0)]
        for size, stride, out in zip(pool.window, pool.strides, pool.ofm, strict=True)
    ]
    windows = [(high, wide) for high in parts[0] for wide in parts[1] if (high, wide) not in ((1, 1), pool.window)]
    for window in sorted(windows, key=lambda pair: -pair[0] * pair[1]):
        # Rows behind the last window are read by nobody; dividing drops them.
        between = _divide(pool.ifm, window)
        strides = tuple(
            1 if out == 1 else stride // part for out, stride, part in zip(pool.ofm, pool.strides, window, strict=True)
        )
        rest = replace(pool, window=_divide(pool.window, window), strides=strides, ifm=between)
        yield _Pool(window, window, pool.ifm, between), rest


def _divide(pair: Shape, window: Shape) -> Shape:
    return tuple(size // part for size, part in zip(pair, window, strict=True))
