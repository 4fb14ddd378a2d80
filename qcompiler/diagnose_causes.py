"""Why quantizing a layer loses accuracy: tests on its tensors and formats, and the option that helps."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.diagnose_report import Cause
from qcompiler.graph import Shape, const_of, data_input, is_op, value_name
from qcompiler.quant.formats import activation_format, limits, quantize_array, spread, weight_format
from qcompiler.quant.grouped_weights import takes_groups
from qcompiler.quant.operators import MAC_OPS, UNIT_OUTPUTS
from qcompiler.quant.plan import weight_axis
from qcompiler.quant.types import QuantPlan, Ranges, TensorFormat
from qcompiler.target import Target

OUTLIER_RATIO = 4.0
"""Largest value over a high percentile; 1.3 for normal values, 1.7 for exponential ones."""
IMBALANCE_RATIO = 8.0
"""Largest channel over the median one: the median channel has three bits less than the format."""
CLASH_RATIO = 1.5
"""Scale of a shared format over the one the tensor would have by itself."""
WASTED = 0.4
"""Share of codes no value uses."""
KEPT = 1 << 12
"""Values of one sample that reach the percentiles."""
FEW = 50
"""Values too few for a percentile to mean anything."""
ACCUMULATOR = 2**31 - 1


@dataclass(frozen=True)
class Unit:
    """One layer, or an input of the quantized part ("input", no node)."""

    name: str
    op: str
    node: ir.Node | None
    """Its first operator, which has the weights."""
    output: ir.Value
    nodes: tuple[ir.Node, ...]
    weights: tuple[str, ...]
    """Initializers it quantizes."""

    @property
    def channel_axis(self) -> int:
        """Where channels lie: after the batch where there is space behind them, else last."""
        rank = len(self.output.shape or ())
        spatial = self.node is None or not is_op(self.node, "MatMul", "Gemm")
        return 1 if spatial and rank >= 3 else max(0, rank - 1)


@dataclass
class Statistics:
    """Extremes of a tensor by channel over all samples, and a selection of its values."""

    axis: int
    shape: Shape
    low: np.ndarray = field(init=False)
    high: np.ndarray = field(init=False)
    values: list[np.ndarray] = field(default_factory=list)
    """[channels, some] for each sample, zeros included."""

    def __post_init__(self) -> None:
        channels = self.shape[self.axis] if self.shape else 1
        self.low, self.high = np.zeros(channels), np.zeros(channels)

    def add(self, tensor: np.ndarray) -> None:
        by_channel = (
            np.moveaxis(tensor, self.axis, 0).reshape(self.low.size, -1) if self.shape else tensor.reshape(1, 1)
        )
        self.low = np.minimum(self.low, by_channel.min(axis=1))
        self.high = np.maximum(self.high, by_channel.max(axis=1))
        # An odd step does not fall in with the rows of feature maps, whose sizes are mostly even.
        step = -(-by_channel.size // KEPT) | 1 if by_channel.size > KEPT else 1
        self.values.append(by_channel[:, ::step])

    @property
    def extents(self) -> np.ndarray:
        """Largest magnitude by channel."""
        return np.maximum(-self.low, self.high)

    def joined(self) -> np.ndarray:
        return np.concatenate(self.values, axis=1)


@dataclass(frozen=True)
class Measured:
    """A layer, the model's SQNR with only its weights and with only its output quantized, and its float output."""

    unit: Unit
    weights: float | None
    output: float | None
    statistics: Statistics

    @property
    def weights_worse(self) -> bool:
        return self.weights is not None and (self.output is None or self.weights <= self.output)


@dataclass(frozen=True)
class Explanation:
    cause: Cause
    evidence: str
    advice: str


def explain_noise(
    measured: Measured,
    float_layers: Sequence[str],
    plan: QuantPlan,
    ranges: Ranges,
    target: Target,
    wide_layers: Sequence[str] = (),
) -> Explanation:
    """The likeliest cause of a layer's noise, looked for where most of it comes from: weights or output.

    Args:
        measured: the layer.
        float_layers: what would have to stay in float to be rid of it.
        plan, ranges, target: what it was quantized by.
        wide_layers: what would have to read 16 bits to be rid of the rounding of its output, if that can be had.
    """
    them = "it" if float_layers == [measured.unit.name] else "what makes and reads its output"
    options = " ".join(f"--float '{name}'" for name in float_layers)
    in_float = keep = f"keep {them} in float ({options})"
    overflow = _overflow(measured.unit, plan, in_float)
    if overflow is not None:
        return overflow  # sums are exact where noise is measured
    if wide_layers and not measured.weights_worse:
        wide = " ".join(f"--layer-activations '{name}=int16'" for name in wide_layers)
        keep = f"16 bits ({wide}), or {keep}"
    weights_worse = measured.weights_worse
    sides = (_weight_cause, _output_cause) if weights_worse else (_output_cause, _weight_cause)
    for explain in sides:
        found = explain(measured.unit, measured.statistics, plan, ranges, target, keep)
        if found is not None:
            return found
        if measured.weights is not None and measured.output is not None and abs(measured.weights - measured.output) > 6:
            break  # the other side makes a quarter of the noise at most
    part = "weights" if weights_worse else "output"
    advice = "--quality balanced or best learns better weights from calibration data" if weights_worse else keep
    return Explanation("rounding", f"nothing is odd about its {part}: this is what the format's steps cost", advice)


# --- the output -----------------------------------------------------------------------------------------------


def _output_cause(
    unit: Unit, seen: Statistics, plan: QuantPlan, ranges: Ranges, target: Target, keep: str
) -> Explanation | None:
    name = value_name(unit.output)
    fmt = plan.activations.get(name)
    bounded = unit.nodes and unit.nodes[-1].op_type in {op for op, _, _ in UNIT_OUTPUTS}
    if fmt is None or bounded or not seen.extents.any():
        return None  # the range of a Softmax is what it is
    values = seen.joined()
    largest = int(seen.extents.argmax())
    # A channel that is almost always zero says nothing by itself.
    usual = _usual(values[largest]) or _usual(values)
    if usual and seen.extents[largest] / usual >= OUTLIER_RATIO:
        method = "--method mse, which clips where that costs less" if ranges.method == "minmax" else ""
        return Explanation(
            "range outlier",
            f"its values reach {seen.extents[largest]:.3g} where all but a few lie within {usual:.3g} "
            f"({seen.extents[largest] / usual:.1f} times as far), so most of the codes serve the few",
            f"{method}; or {keep}" if method else keep,
        )
    clash = _shared_clash(name, fmt, plan, ranges, target)
    if clash is not None:
        return Explanation("shared scale clash", clash, keep)
    typical = float(np.median(seen.extents[seen.extents > 0]))
    if seen.extents.size > 1 and seen.extents[largest] / typical >= IMBALANCE_RATIO:
        return Explanation(
            "channel imbalance",
            f"channel {largest} of its output reaches {seen.extents[largest]:.3g}, the median channel {typical:.3g}, "
            f"but one scale serves all {seen.extents.size}",
            f"equalize the channels in the model (scale this layer's weights down and the next one's up); or {keep}",
        )
    clipped = _clipped_share(values, fmt)
    if clipped > 0.5:
        ends = _ends(fmt)
        return Explanation(
            "clipped range",
            f"{clipped:.0%} of the error of its output is clipping: values lie in "
            f"[{seen.low.min():.3g}, {seen.high.max():.3g}], the format ends at {ends[0]:.3g} and {ends[1]:.3g}",
            f"--method minmax, or more calibration samples; or {keep}",
        )
    used = _used_codes(seen, fmt)
    if used < 1 - WASTED:
        why = "the target's format is symmetric" if target.quantization.activations.symmetric else "its range is wider"
        return Explanation(
            "zero-point clash",
            f"its values use {used:.0%} of the codes: "
            f"they lie in [{seen.low.min():.3g}, {seen.high.max():.3g}] and {why}",
            f"a target with asymmetric activations; or {keep}" if target.quantization.activations.symmetric else keep,
        )
    return None


def _usual(values: np.ndarray) -> float:
    """A percentile of the magnitudes that leaves out a thousandth, or of few values the largest ten; 0 of very few."""
    magnitudes = np.abs(values[values != 0])
    if magnitudes.size < FEW:
        return 0.0
    return float(np.quantile(magnitudes, 1 - max(0.001, 10 / magnitudes.size)))


def _shared_clash(name: str, fmt: TensorFormat, plan: QuantPlan, ranges: Ranges, target: Target) -> str | None:
    own = ranges.by_name.get(name)
    if own is None:
        return None
    spec = target.quantization
    natural = activation_format(
        own.low, own.high, fmt.dtype, symmetric=spec.activations.symmetric, power_of_two=spec.requantize == "shift"
    )
    ratio = float(fmt.scale) / float(natural.scale)
    partners = [
        other
        for other, theirs in plan.activations.items()
        if other != name and theirs.scale == fmt.scale and theirs.zero_point == fmt.zero_point
    ]
    if ratio < CLASH_RATIO or not partners:
        return None
    listed = ", ".join(repr(other) for other in partners[:3]) + (" and more" if len(partners) > 3 else "")
    return f"it shares one scale with {listed}, which makes its steps {ratio:.1f} times as large as its own range needs"


def _clipped_share(values: np.ndarray, fmt: TensorFormat) -> float:
    """Which part of the squared rounding error comes from values outside the format."""
    low, high = _ends(fmt)
    exact = values.astype(np.float64)
    scale, zero = float(fmt.scale), float(fmt.zero_point)
    error = ((quantize_array(values, fmt).astype(np.float64) - zero) * scale - exact) ** 2
    outside = (exact < low - scale / 2) | (exact > high + scale / 2)
    return float(error[outside].sum() / error.sum()) if error.sum() else 0.0


def _ends(fmt: TensorFormat) -> tuple[float, float]:
    smallest, largest = limits(fmt.dtype)
    return ((smallest - float(fmt.zero_point)) * float(fmt.scale), (largest - float(fmt.zero_point)) * float(fmt.scale))


def _used_codes(seen: Statistics, fmt: TensorFormat) -> float:
    smallest, largest = limits(fmt.dtype)
    ends = quantize_array(np.array([seen.low.min(), seen.high.max()]), fmt).astype(np.int64)
    return float(ends[1] - ends[0] + 1) / (largest - smallest + 1)


# --- the weights ----------------------------------------------------------------------------------------------


def _weight_cause(
    unit: Unit, seen: Statistics, plan: QuantPlan, ranges: Ranges, target: Target, keep: str
) -> Explanation | None:
    node = unit.node
    if node is None or not is_op(node, *MAC_OPS):
        return None
    value = data_input(node, 1)
    array, fmt = const_of(value), plan.weights.get(value.name or "")
    if array is None or fmt is None:
        return None
    found = _coarse_steps(node, array, fmt, target, keep)
    if found is not None:
        return found
    axis = weight_axis(node)
    extents = (
        np.abs(np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)).max(axis=1)
        if axis is not None
        else np.zeros(0)
    )
    if not fmt.per_channel and extents.any():
        typical = float(np.median(extents[extents > 0]))
        if extents.max() / typical >= IMBALANCE_RATIO:
            remedy = (
                "" if target.quantization.weights.per_channel else "--quality balanced, which equalizes layers; or "
            )
            return Explanation(
                "channel imbalance",
                f"the weights of output channel {int(extents.argmax())} reach {extents.max():.3g}, those of the median "
                f"channel {typical:.3g}, but one scale serves all {extents.size}",
                f"{remedy}{keep}",
            )
    steps = np.abs(array / np.maximum(spread(fmt.scale.astype(np.float64), fmt, array.shape), 1e-30))
    usual, reach = _usual(steps.reshape(-1)), float(steps.max())
    if fmt.dtype in ("int4", "int2", "int1"):
        bits = {"int4": "four bits", "int2": "two bits", "int1": "one bit"}[fmt.dtype]
        grouped = _in_groups(node, fmt, target, unit)
        return Explanation(
            "few bits",
            f"its weights have {bits}",
            f"{grouped}eight (--layer-weights '{unit.name}=int8'), or --quality best; or {keep}",
        )
    if usual and reach / usual >= OUTLIER_RATIO:
        return Explanation(
            "range outlier",
            f"its largest weight is {reach / usual:.1f} times as large, in steps, as all but a thousandth of them",
            f"--quality balanced chooses scales that clip it; or {keep}",
        )
    return None


def _in_groups(node: ir.Node, fmt: TensorFormat, target: Target, unit: Unit) -> str:
    """The advice to let fewer weights share a scale, if that can be had."""
    multiple = target.quantization.weights.group_multiple
    size = next((size for size in (32, 16, 8) if multiple is not None and size % multiple == 0
                 and takes_groups(node, fmt.dtype, size)), None)  # fmt: skip
    if size is None or (fmt.block is not None and fmt.block <= size):
        return ""
    kind = "binary" if fmt.dtype == "int1" else fmt.dtype
    return f"groups that share a scale (--layer-weights '{unit.name}={kind}/{size}'), "


def _overflow(unit: Unit, plan: QuantPlan, keep: str) -> Explanation | None:
    """Sums that may leave int32."""
    node = unit.node
    if node is None or not is_op(node, *MAC_OPS):
        return None
    name, weights = value_name(data_input(node)), data_input(node, 1)
    array, fmt = const_of(weights), plan.weights.get(weights.name or "")
    if name not in plan.activations or array is None or fmt is None:
        return None
    source = plan.read(name, node.name or "")
    smallest, largest = limits(source.dtype)
    zero = int(source.zero_point)
    reach = max(largest - zero, zero - smallest)
    axis = weight_axis(node)
    integers = np.abs(quantize_array(array, fmt).astype(np.int64))
    if fmt.factor is not None:
        integers = integers * spread(fmt.factor.astype(np.int64), fmt, array.shape)
    sums = (
        np.moveaxis(integers, axis, 0).reshape(array.shape[axis], -1).sum(axis=1)
        if axis is not None
        else integers.sum()
    )
    bias = plan.biases.get(node.name or "")
    given = const_of(node.inputs[2]) if len(node.inputs) > 2 else None
    offset = np.abs(given.reshape(-1) / bias.scale) if bias is not None and given is not None else np.zeros(1)
    worst = float(np.max(sums * reach + offset))
    if worst > ACCUMULATOR:
        return Explanation(
            "saturating accumulator",
            f"in the worst case its sums reach {worst:.3g}, {worst / ACCUMULATOR:.1f} times what 32 bits hold",
            keep,
        )
    return None


def _coarse_steps(node: ir.Node, array: np.ndarray, fmt: TensorFormat, target: Target, keep: str) -> Explanation | None:
    """Weights that were given coarser steps so that a large bias fits the accumulator."""
    given = const_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if fmt.factor is not None:
        return None
    spec = target.quantization
    natural = weight_format(
        array, fmt.dtype, fmt.axis, symmetric=spec.weights.symmetric, narrow=spec.weights.narrow_range,
        power_of_two=spec.requantize == "shift",
    )  # fmt: skip
    ratio = np.max(fmt.scale.astype(np.float64) / natural.scale)
    if ratio >= CLASH_RATIO and given is not None:
        channel = int(np.argmax(fmt.scale / natural.scale))
        return Explanation(
            "saturating accumulator",
            f"the bias {given.reshape(-1)[channel % given.size]:.3g} of channel {channel} would not fit into the "
            f"accumulator, so its weights have steps {ratio:.3g} times as large as they need",
            f"a smaller bias (fold it into what follows), or {keep}",
        )
    return None
