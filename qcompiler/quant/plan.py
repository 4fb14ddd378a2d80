"""Decide which tensors are quantized, to what, and which operators stay in float and why.

An operator is quantized if it has an integer form (`qcompiler.quant.operators`) and does not belong to the
post-processing: what follows the last convolution or matrix product usually decodes boxes or scores, where
eight bits cost accuracy and integers save next to nothing. Of that tail only what the accelerator itself runs
is quantized: activations, pools, softmax, and movement of data between them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import numpy as np
import onnx_ir as ir

from qcompiler.graph import (
    const_of,
    data_input,
    element_count,
    input_of,
    integer,
    is_op,
    shape_of,
    users,
    value_name,
)
from qcompiler.integer.facts import facts_of_float
from qcompiler.quant import operators
from qcompiler.quant.bias_correction import bias_shift
from qcompiler.quant.formats import (
    bias_format,
    dequantize_array,
    least_weight_scale,
    quantize_array,
    weight_format,
)
from qcompiler.quant.grouped_weights import group_axes, grouped_format, takes_groups
from qcompiler.quant.intervals import SHARING_LIMIT, Intervals, span_of
from qcompiler.quant.masks import is_masked, unmasked_ranges
from qcompiler.quant.operators import MAC_OPS, activation_inputs, has_weights, is_activation
from qcompiler.quant.types import Conversion, DTypeName, QuantPlan, Ranges, TensorFormat, WeightRequest
from qcompiler.quant.weight_bits import weight_dtypes, weight_groups
from qcompiler.quant.widths import WIDE, Widths, eight_bits_only
from qcompiler.target import Match, Target

TAIL_REASON = "post-processing after the last convolution stays in float for accuracy"

SUM_REASON = "what reads the sum stays in float, so that rounding it gains nothing"
"""Of residual sums before layer normalization: they hold the outliers of transformers."""

ON_REQUEST = "kept in float on request"


def plan(
    model: ir.Model,
    ranges: Ranges,
    target: Target,
    keep_float: Sequence[str] = (),
    weights: WeightRequest | None = None,
) -> QuantPlan:
    """Choose formats for a simplified float model.

    Args:
        model: the model `ranges` was measured on.
        ranges: from `calibrate`.
        target: its `quantization` says which formats there are and which operators need one scale, its rules
            decide about the tail.
        keep_float: names of nodes to leave in float, with what is fused with them; a layer of several nodes goes by
            their names joined with " + ", as in reports. "all" leaves everything in float.
        weights: what to store weights as; 8 bits if None.

    Returns:
        Formats by value, initializer and node name, and the reason for each node that stays in float.

    Raises:
        QCompilerError: no node has a name in `keep_float` or `weights`, or the target has no weights of that type.
    """
    planner = _Planner(model.graph, ranges, target, weights or WeightRequest())
    return planner.run(operators.named_nodes(list(model.graph), keep_float, "--float"))


class _Planner:
    """The state of one planning: reasons for float first, then groups of tensors, then formats."""

    def __init__(self, graph: ir.Graph, ranges: Ranges, target: Target, weights: WeightRequest) -> None:
        self.graph = graph
        self.weight_request = weights
        self.float_reasons: dict[ir.Node, str] = {}
        self.ranges = unmasked_ranges(graph, ranges.by_name)
        self.channel_means = ranges.channel_means
        self.target = target
        self.spec = target.quantization
        self.nodes = list(graph)
        self.interior = operators.interior_values(self.nodes)
        self.regions = operators.lookup_regions(self.nodes)
        self.widths = Widths(self.nodes, self.regions, target, weights)
        wide = self.ranges if ranges.wide is None else unmasked_ranges(graph, ranges.wide)
        self.intervals: dict[DTypeName, Intervals] = {
            dtype: Intervals(
                wide if dtype == WIDE else self.ranges,
                self.spec,
                self._inherits,
                self.float_reasons.__contains__,
                wide=dtype == WIDE,
            )
            for dtype in self.widths.all
        }
        self.made: dict[ir.Value, DTypeName] = {}
        """The type of each quantized value, in execution order."""
        self.inner = {member for last, region in self.regions.items() for member in region if member is not last}
        self.downstream_of_mac = reach(self.nodes, forward=True)
        self.upstream_of_mac = reach(self.nodes, forward=False)

    def run(self, keep_float: set[ir.Node]) -> QuantPlan:
        for node in self.nodes:
            if node in keep_float:
                self.float_reasons[node] = ON_REQUEST
            elif (reason := self._own_reason(node)) is not None:
                self.float_reasons[node] = reason
        self._spread()
        self._drop_islands()
        self.widths.settle(self.float_reasons)
        activations, conversions = self._formats()
        weights, biases, shifts = self._constants(activations)
        float_nodes = {node.name or "": reason for node, reason in self.float_reasons.items()}
        return QuantPlan(activations, weights, biases, float_nodes, shifts, conversions=conversions)

    # --- which nodes -----------------------------------------------------------------------------------

    def _own_reason(self, node: ir.Node) -> str | None:
        """A reason of the node itself to stay in float."""
        if node in self.inner:
            return None  # judged with the last node of its lookup table
        region = self.regions.get(node, ())
        if not region and (refused := operators.refusal(node)) is not None:
            return refused
        if self.widths.of(node) == WIDE and (reason := eight_bits_only(node)) is not None:
            return reason
        for reason in (self._shift_reason(node), self._infinite_reason(node), self._tail_reason(node, region)):
            if reason is not None:
                return reason
        return None

    def _shift_reason(self, node: ir.Node) -> str | None:
        """Targets that rescale by powers of two cannot divide by other counts."""
        if self.spec.requantize != "shift" or not is_op(node, "AveragePool", "GlobalAveragePool", "ReduceMean"):
            return None
        if is_op(node, "AveragePool"):
            kernel = node.attributes["kernel_shape"].as_ints()
            count, padded = element_count(kernel), any(operators.pads_of(node))
            partial = padded and not integer(node, "count_include_pad", 0)
        else:
            count = element_count(shape_of(data_input(node))) // element_count(shape_of(node.outputs[0]))
            partial = False
        exact = not partial and math.log2(count).is_integer()
        return None if exact else "the target rescales by powers of two, and it averages over another count"

    def _infinite_reason(self, node: ir.Node) -> str | None:
        for value in (*activation_inputs(node), *node.outputs):
            seen = self.ranges.get(value.name or "")
            if seen is not None and not (math.isfinite(seen.low) and math.isfinite(seen.high)):
                return f"the tensor {value.name!r} holds infinities"
        return "it reads scores under a mask that 8 bits cannot tell apart" if is_masked(node, self.ranges) else None

    def _tail_reason(self, node: ir.Node, region: tuple[ir.Node, ...]) -> str | None:
        """Why a node after the last multiply-accumulate stays in float, if it does."""
        if not self._in_tail(node) or operators.is_fused_clamp(node):
            return None
        if operators.inherits_format(node) or is_op(node, "ArgMax"):
            return None
        if is_op(node, "Concat"):
            intervals = self.intervals[self.widths.of(node)]
            spans = [span_of(intervals.range_of(value)) for value in activation_inputs(node)]
            uneven = max(spans) > SHARING_LIMIT * min(spans)
            return "it joins tensors of different ranges after the last convolution" if uneven else None
        if len(region) > 1 and len(activation_inputs(node)) > 1:
            return None  # a gated activation such as x * Sigmoid(x)
        if not is_op(node, *operators.ACTIVATION_OPS, "Softmax", "AveragePool", "GlobalAveragePool", "ReduceMean"):
            return TAIL_REASON
        if not self.target.accelerators and not is_op(node, "Softmax"):
            return None
        match = self.target.match(facts_of_float(node, self.widths.of(node)))
        return None if isinstance(match, Match) else f"after the last convolution, and {match.reason}"

    def _in_tail(self, node: ir.Node) -> bool:
        after = node in self.downstream_of_mac and node not in self.upstream_of_mac
        return after and not is_op(node, *MAC_OPS)

    def _spread(self) -> None:
        """Let reasons reach lookup tables, fused clamps, data movement and what follows a float tail."""
        changed = True
        while changed:
            changed = False
            for node in self.nodes:
                if node in self.float_reasons:
                    changed |= self._spread_inside(node)
                elif (reason := self._neighbour_reason(node)) is not None:
                    self.float_reasons[node] = reason
                    changed = True

    def _spread_inside(self, node: ir.Node) -> bool:
        """The nodes of one integer operator share their fate. True if a node joined."""
        clamp = operators.clamp_of(node)
        together = [*self.regions.get(node, ()), *([clamp] if clamp is not None and clamp not in self.inner else [])]
        fresh = [member for member in together if member not in self.float_reasons]
        self.float_reasons |= dict.fromkeys(fresh, self.float_reasons[node])
        return bool(fresh)

    def _neighbour_reason(self, node: ir.Node) -> str | None:
        """Why a node stays in float because of those around it."""
        if node in self.inner or operators.is_fused_clamp(node):
            return None
        makers = [value.producer() for value in activation_inputs(node)]
        from_float = [maker is None or maker in self.float_reasons for maker in makers]
        readers = [reader for value in node.outputs for reader in users(value)]
        moves = operators.inherits_format(node) or is_op(node, "Concat")
        if moves and all(from_float) and all(reader in self.float_reasons for reader in readers):
            return "it moves data for operators that stay in float"
        if self._in_tail(node) and (any(from_float) if is_op(node, "Concat") else all(from_float)):
            return "it follows operators that stay in float"
        if self._is_read_in_float(node):
            on_cpu = not self.target.accelerators
            if is_op(node, "Add", "Sub") and node not in self.regions and (on_cpu or self._is_normalized(node)):
                return SUM_REASON
            if (
                on_cpu
                and moves
                and all(is_op(maker, "Gemm") for maker in makers)
                and self._is_read_by_sums(node.outputs[0])
            ):
                return "it moves data for operators that stay in float"
        return None

    def _is_read_in_float(self, node: ir.Node) -> bool:
        readers = [reader for value in node.outputs for reader in users(value)]
        return bool(readers) and all(reader in self.float_reasons for reader in readers)

    def _is_normalized(self, node: ir.Node) -> bool:
        """Whether a sum goes into layer normalization, which scales its outliers down."""
        return any(is_op(reader, "LayerNormalization") for value in node.outputs for reader in users(value))

    def _is_read_by_sums(self, value: ir.Value) -> bool:
        """Whether sums that stay in float are all that reads a value, perhaps after data movement."""
        readers = users(value)
        return bool(readers) and all(
            reader in self.float_reasons
            and (is_op(reader, "Add", "Sub") or (is_op(reader, "Reshape") and self._is_read_by_sums(reader.outputs[0])))
            for reader in readers
        )

    def _drop_islands(self) -> None:
        """Quantized operators that no quantized multiply-accumulate is connected to are not worth their borders."""
        if not any(is_op(node, *MAC_OPS) for node in self.nodes):
            return
        islands = [node for node in self.nodes if node not in self.float_reasons]
        connected = {node for node in islands if is_op(node, *MAC_OPS)}
        frontier = list(connected)
        while frontier:
            node = frontier.pop()
            around = {*node.predecessors(), *node.successors()}
            siblings = {reader for value in activation_inputs(node) for reader in users(value)}
            fresh = {other for other in around | siblings if other not in self.float_reasons} - connected
            connected |= fresh
            frontier += fresh
        for node in islands:
            if node not in connected:
                self.float_reasons[node] = "no quantized convolution or matrix product is connected to it"

    # --- which values ----------------------------------------------------------------------------------

    def _values(self) -> Iterable[ir.Value]:
        yield from self.graph.inputs
        for node in self.nodes:
            yield from node.outputs

    def _is_quantized(self, value: ir.Value) -> bool:
        """Made or read by an operator that is quantized."""
        if not is_activation(value) or value in self.interior:
            return False
        maker = value.producer()
        if maker is not None and maker not in self.float_reasons:
            # A product can leave its sums as they are: rounding them would gain nothing.
            return bool(self.target.accelerators) or not (is_op(maker, "Gemm") and self._is_read_by_sums(value))
        return any(reader not in self.float_reasons for reader in users(value))

    def _inherits(self, node: ir.Node | None) -> bool:
        """True if the quantized `node` gives its output the format of its first input."""
        if node is None or node in self.float_reasons:
            return False
        shared = node.op_type in self.spec.shared_scale and len(activation_inputs(node)) == 1
        return operators.inherits_format(node) or (shared and not is_op(node, "Concat"))

    # --- formats -----------------------------------------------------------------------------------------

    def _formats(self) -> tuple[dict[str, TensorFormat], dict[str, Conversion]]:
        """Formats by value name, and those of values that some operators read in another type."""
        activations: dict[str, TensorFormat] = {}
        conversions: dict[str, Conversion] = {}
        for value in self._values():
            if not self._is_quantized(value):
                continue
            for intervals in self.intervals.values():
                intervals.join(value)
            self.made[value] = self.widths.made(value, self.float_reasons)
        for value, dtype in self.made.items():
            name = value_name(value)
            activations[name] = self.intervals[dtype].format(value, dtype)
            readers = [node for node in users(value) if node not in self.float_reasons]
            others = [node for node in readers if self.widths.of(node) != dtype]
            if others:
                other = self.widths.of(others[0])
                names = frozenset(node.name or "" for node in others)
                conversions[name] = Conversion(self.intervals[other].format(value, other), names)
        return activations, conversions

    def _read(self, node: ir.Node) -> TensorFormat:
        """The format a quantized node reads its first input in."""
        dtype = self.widths.of(node)
        return self.intervals[dtype].format(data_input(node), dtype)

    def _constant_format(self, node: ir.Node, value: ir.Value, activations: Mapping[str, TensorFormat]) -> TensorFormat:
        """The format of a constant operand that stands for an activation."""
        if is_op(node, "Concat"):
            return activations[value_name(node.outputs[0])]
        dtype = self.widths.of(node)
        return self.intervals[dtype].constant_format(value, dtype)

    def _constants(
        self, activations: Mapping[str, TensorFormat]
    ) -> tuple[dict[str, TensorFormat], dict[str, TensorFormat], dict[str, np.ndarray]]:
        """Formats of weights by initializer name and of biases by node name, and shifts of biases by node name."""
        spec = self.spec.weights
        weights: dict[str, TensorFormat] = {}
        biases: dict[str, TensorFormat] = {}
        shifts: dict[str, np.ndarray] = {}
        floors: dict[str, list[np.ndarray | float]] = {}
        axes: dict[str, set[int | None]] = {}
        weighted = [node for node in self.nodes if node not in self.float_reasons and has_weights(node)]
        edges = edge_layers(self.nodes, weighted)
        groups = weight_groups(weighted, self.target, self.weight_request)
        dtypes = weight_dtypes(weighted, edges, self.target, self.widths.of, self.weight_request, groups)
        for node in weighted:
            name = value_name(data_input(node, 1))
            bias = const_of(input_of(node, 2))
            scale = float(self._read(node).scale)
            floors.setdefault(name, []).append(0.0 if bias is None else least_weight_scale(bias.reshape(-1), scale))
            axes.setdefault(name, set()).add(weight_axis(node) if spec.per_channel else None)
        for node in weighted:
            value = data_input(node, 1)
            name, array = value_name(value), const_of(value)
            assert array is not None
            # One initializer in two roles gets the format that suits both.
            axis = next(iter(axes[name])) if len(axes[name]) == 1 else None
            floor = reduce(np.maximum, floors[name] if axis is not None else map(np.max, floors[name]))
            sizes = {groups.get(reader, 0) for reader in users(value) if reader in weighted}
            group = max(sizes) if len(sizes) == 1 and axis is not None else 0
            weights[name] = self._weight_format(node, array, dtypes[name], axis, group, floor)
            means = self.channel_means.get(node.name or "")
            if means is not None and not is_op(node, "MatMul"):
                rounded = dequantize_array(
                    quantize_array(array, weights[name], narrow=spec.narrow_range), weights[name]
                )
                shifts[node.name or ""] = bias_shift(node, array, rounded, means)
            if input_of(node, 2) is not None or node.name in shifts:
                biases[node.name or ""] = bias_format(self._read(node).scale, weights[name])
        for node in self.nodes:
            if node in self.float_reasons or has_weights(node) or not is_op(node, *_OPERANDS):
                continue
            if node in self.regions or node in self.inner:
                continue  # its constant becomes part of the table
            for value in node.inputs:
                if operators.is_float(value) and not is_activation(value):
                    assert value is not None
                    weights[value_name(value)] = self._constant_format(node, value, activations)
        return weights, biases, shifts

    def _weight_format(
        self,
        node: ir.Node,
        array: np.ndarray,
        dtype: DTypeName,
        axis: int | None,
        group: int,
        floor: np.ndarray | float,
    ) -> TensorFormat:
        """Of constant weights, in groups of so many if they have few bits and enough input channels."""
        spec, power_of_two = self.spec.weights, self.spec.requantize == "shift"
        axes = group_axes(node)
        if group and axes is not None and takes_groups(node, dtype, group):
            return grouped_format(
                array, dtype, axes, group, narrow=spec.narrow_range, power_of_two=power_of_two, floor=floor
            )
        return weight_format(
            array, dtype, axis,
            symmetric=spec.symmetric, narrow=spec.narrow_range, power_of_two=power_of_two, floor=floor,
        )  # fmt: skip


_OPERANDS = (*operators.BINARY_OPS, "Concat", "MatMul")
"""Operators whose constant operands are quantized like activations."""


def weight_axis(node: ir.Node) -> int | None:
    """The output channel axis of a node's weights; None where channels do not lie along one axis."""
    if is_op(node, "Conv"):
        return 0
    if is_op(node, "ConvTranspose"):
        return 1 if integer(node, "group", 1) == 1 else None
    if is_op(node, "Gemm"):
        return 0 if integer(node, "transB", 0) else 1
    return 1 if len(shape_of(data_input(node, 1))) == 2 else None


def edge_layers(nodes: list[ir.Node], weighted: Sequence[ir.Node]) -> set[ir.Node]:
    """Those of `weighted` with no multiply-accumulate operator before them, or none after."""
    inner = reach(nodes, forward=True) & reach(nodes, forward=False)
    return set(weighted) - inner


def reach(nodes: list[ir.Node], *, forward: bool) -> set[ir.Node]:
    """Nodes strictly after (`forward`) or strictly before some multiply-accumulate operator."""
    reached: set[ir.Node] = set()
    for node in nodes if forward else reversed(nodes):
        if is_op(node, *MAC_OPS) or node in reached:
            reached |= set(node.successors() if forward else node.predecessors())
    return reached
