"""Which tensors share one format, and the interval it spans.

Data movement hands on the format of what it moves; a Concat lets inputs take its output's where that costs little.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.graph import const_of, data_input, input_of, is_op, users, value_name
from qcompiler.quant.formats import activation_format
from qcompiler.quant.operators import UNIT_OUTPUTS, UNIT_OUTPUTS_INT16, activation_inputs
from qcompiler.quant.types import DTypeName, Range, TensorFormat
from qcompiler.target import Quantization

SHARING_LIMIT = 2.0
"""How much wider than its own a tensor's range may become by sharing: a factor of two costs one bit."""

Judge = Callable[[ir.Node | None], bool]


@dataclass
class _Group:
    """Tensors that share one format."""

    low: float
    high: float
    tightest: float
    """The smallest span of a member that is read by more than Concat."""

    @property
    def span(self) -> float:
        return self.high - self.low


class Intervals:
    """Groups of tensors with their intervals, for activations of one width."""

    def __init__(
        self, ranges: Mapping[str, Range], spec: Quantization, inherits: Judge, in_float: Judge, *, wide: bool
    ) -> None:
        """Args:
        ranges: by value name.
        inherits: whether a quantized node gives its output the format of its first input.
        in_float: whether a node stays in float.
        wide: whether activations have 16 bits.
        """
        self._wide = wide
        self._ranges, self._spec = ranges, spec
        self._inherits, self._in_float = inherits, in_float
        self._roots: dict[ir.Value, ir.Value] = {}
        """A value whose format is another's, to that other one; follow until a value that is not here."""
        self._groups: dict[ir.Value, _Group] = {}

    def join(self, value: ir.Value) -> None:
        """Put a value into the group of another, or found one for it. Values come in execution order."""
        maker = value.producer()
        if self._inherits(maker):
            assert maker is not None
            root = self._root(data_input(maker))
            self._roots[value] = root
            filled = self.range_of(value)  # a Pad may bring in values of its own
            group = self._groups[root]
            self._groups[root] = _Group(min(group.low, filled.low), max(group.high, filled.high), group.tightest)
            return
        seen = self.range_of(value)
        self._groups[value] = _Group(seen.low, seen.high, math.inf if self._only_concats(value) else span_of(seen))
        if is_op(maker, "Concat") and not self._in_float(maker):
            assert maker is not None
            for part in dict.fromkeys(self._root(part) for part in activation_inputs(maker)):
                self._merge(part, value)

    def format(self, value: ir.Value, dtype: DTypeName) -> TensorFormat:
        """The format of a value that was joined, in any type."""
        group = self._groups[self._root(value)]
        return self._format(group.low, group.high, dtype)

    def constant_format(self, value: ir.Value, dtype: DTypeName) -> TensorFormat:
        """The format of a constant operand that stands for an activation."""
        seen = self.range_of(value)
        return self._format(seen.low, seen.high, dtype)

    def _format(self, low: float, high: float, dtype: DTypeName) -> TensorFormat:
        return activation_format(
            low,
            high,
            dtype,
            symmetric=self._spec.activations.symmetric or dtype == "int16",
            power_of_two=self._spec.requantize == "shift",
        )

    def range_of(self, value: ir.Value) -> Range:
        """The interval of any float tensor; data movement and Concat follow their inputs.

        A sigmoid or tangent that uses less than half of its interval keeps what was observed.
        """
        maker = value.producer()
        seen = self._ranges.get(value_name(value))
        for op_type, low, high in UNIT_OUTPUTS_INT16 if self._wide else UNIT_OUTPUTS:
            if is_op(maker, op_type) and (seen is None or is_op(maker, "Softmax") or 2 * span_of(seen) > high - low):
                return Range(low, high, low, high)
        if seen is not None:
            return seen  # of a constant only if it is a mask, which is not taken for what it holds
        constant = const_of(value)
        if constant is not None:
            low, high = float(min(constant.min(), 0)), float(max(constant.max(), 0))
            return Range(low, high, low, high)
        assert maker is not None, f"no range for {value.name}"
        if is_op(maker, "Concat"):
            parts = [self.range_of(part) for part in maker.inputs if part is not None]
        else:
            parts = [self.range_of(data_input(maker))]
            if is_op(maker, "Pad") and (fill := const_of(input_of(maker, 2))) is not None and fill.size:
                low, high = min(float(fill), 0.0), max(float(fill), 0.0)
                parts.append(Range(low, high, low, high))
        return Range(
            min(part.low for part in parts),
            max(part.high for part in parts),
            min(part.observed_low for part in parts),
            max(part.observed_high for part in parts),
        )

    def _root(self, value: ir.Value) -> ir.Value:
        while value in self._roots:
            value = self._roots[value]
        return value

    def _merge(self, part: ir.Value, whole: ir.Value) -> None:
        """Let a Concat's input take the format of its output, if that costs its other readers little."""
        part, whole = self._root(part), self._root(whole)
        if part is whole:
            return
        a, b = self._groups[part], self._groups[whole]
        union = _Group(min(a.low, b.low), max(a.high, b.high), min(a.tightest, b.tightest))
        if union.span <= SHARING_LIMIT * union.tightest:
            self._roots[part] = whole
            self._groups[whole] = union

    def _only_concats(self, value: ir.Value) -> bool:
        """True if a Concat is all that reads the value, perhaps after data movement."""
        readers = users(value)
        if len(readers) != 1 or value.is_graph_output():
            return False
        (reader,) = readers
        if is_op(reader, "Concat"):
            return not self._in_float(reader)
        return self._inherits(reader) and all(self._only_concats(output) for output in reader.outputs)


def span_of(interval: Range) -> float:
    return interval.high - interval.low
