"""What each layer costs in each format, by the target's own cost model.

Formats are priced with all layers in one format of weights and one width of activations at a time. A layer in float is
priced by itself, since what matters is the hand-over around it; so is what bringing a tensor from one width to the
other takes, where layers that read it may differ. Layers overlap on an accelerator, so sums over layers are close but
not exact: points that are shown to the user are estimated whole, with `exact`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.compile import Placed, Progress, estimate
from qcompiler.graph import const_of
from qcompiler.layer_names import JOINT
from qcompiler.partition_cost import tensor_bytes
from qcompiler.report import Report
from qcompiler.search.forms import FLOAT, UNIFORM, Form, LayerFormat, form_of
from qcompiler.search.layers import Assignment, Junction, Layer, everywhere, stored_forms

Arrange = Callable[[Assignment], Placed]
"""Places the model with these formats."""


@dataclass(frozen=True)
class Cost:
    """Of one inference, or one layer's share of it."""

    latency: float
    """Seconds."""
    energy: float
    """Joules."""
    weights: float
    """Bytes of constants."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.latency + other.latency, self.energy + other.energy, self.weights + other.weights)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.latency - other.latency, self.energy - other.energy, self.weights - other.weights)

    def share(self, count: int) -> "Cost":
        """One of so many equal parts, nothing less than nothing."""
        return Cost(*(max(0.0, part / count) for part in (self.latency, self.energy, self.weights)))


ZERO = Cost(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Prices:
    fixed: Cost
    """Of everything but the layers."""
    by_layer: Mapping[tuple[str, LayerFormat], Cost]
    """By layer name and format."""
    conversions: tuple[Cost, ...]
    """By junction: of bringing the tensor to the other width."""
    macs: int


def exact(placed: Placed) -> Cost:
    """Of the whole model."""
    report, _ = estimate(placed)
    return _total(report)


def price(layers: Sequence[Layer], junctions: Sequence[Junction], arrange: Arrange, progress: Progress) -> Prices:
    """Every layer in every format it admits, and every change of width."""
    progress.stage("price layers")
    admitted = {name for layer in layers for name in layer.formats}
    widths = (False, True) if any(form_of(name).wide for name in admitted) else (False,)
    uniform = [(stored, wide) for wide in widths for stored in stored_forms(layers)]
    floats = [layer for layer in layers if FLOAT in layer.formats]
    meeting = [junction for junction in junctions if junction.may_meet and _wide_reader(junction, layers) is not None]
    steps, done = len(uniform) + len(floats) + len(meeting), 0
    found: dict[tuple[str, LayerFormat], Cost] = {}
    whole, macs = ZERO, 0
    for stored, wide in uniform:
        chosen = everywhere(layers, stored, wide=wide)
        placed = arrange(chosen)
        report, _ = estimate(placed)
        shares = _shares(layers, placed, report)
        found |= {(layer.name, name): shares[layer.name] for layer, name in zip(layers, chosen, strict=True)
                  if (layer.name, name) not in found}  # fmt: skip
        if (stored, wide) == (UNIFORM, False):
            whole, macs = _total(report), report.totals.macs
        done += 1
        progress.advance(done, steps)
    fixed = whole
    for layer in layers:
        fixed = fixed - found[layer.name, UNIFORM]
    for layer in floats:
        in_float = exact(arrange(_alone(layers, layer, FLOAT))) - whole
        found[layer.name, FLOAT] = found[layer.name, UNIFORM] + in_float
        done += 1
        progress.advance(done, steps)
        for name in layer.formats:
            if form_of(name).real not in (None, "float"):
                # The arithmetic is that of float32, and half of the bytes.
                saved = 2.0 * sum(_elements(node) for node in layer.products[:1])
                found[layer.name, name] = found[layer.name, FLOAT] - Cost(0.0, 0.0, saved)
    conversions: list[Cost] = []
    for junction in junctions:
        reader = _wide_reader(junction, layers)
        if not junction.may_meet or reader is None:
            conversions.append(ZERO)
            continue
        layer, name = reader
        apart = exact(arrange(_alone(layers, layer, name))) - whole
        apart = apart - (found[layer.name, name] - found[layer.name, UNIFORM])
        place = layers.index(layer)
        conversions.append(apart.share(sum(place in other.readers for other in meeting)))
        done += 1
        progress.advance(done, steps)
    return Prices(fixed, found, tuple(conversions), macs)


def _alone(layers: Sequence[Layer], layer: Layer, name: LayerFormat) -> Assignment:
    return tuple(name if other is layer else UNIFORM for other in layers)


def _wide_reader(junction: Junction, layers: Sequence[Layer]) -> tuple[Layer, LayerFormat] | None:
    """A layer that reads the tensor and may do so in 16 bits, and the format."""
    for place in junction.readers:
        layer = layers[place]
        name = Form(wide=True).named(weighted=layer.weights is not None)
        if name in layer.formats:
            return layer, name
    return None


def _elements(node: ir.Node) -> int:
    array = const_of(node.inputs[1])
    return 0 if array is None else array.size


def _total(report: Report) -> Cost:
    return Cost(report.totals.latency, report.totals.energy, report.totals.weights)


def _shares(layers: Sequence[Layer], placed: Placed, report: Report) -> dict[str, Cost]:
    """What the rows and constants that belong to each layer add up to."""
    owner = {member: layer.name for layer in layers for member in layer.members}

    def of(names: str) -> str | None:
        return next((owner[part] for part in names.split(JOINT) if part in owner), None)

    shares = {layer.name: ZERO for layer in layers}
    for row in report.layers:
        name = of(row.layer)
        if name is not None:
            shares[name] += Cost(row.seconds, row.energy, 0.0)
    seen: set[ir.Value] = set()
    for node in placed.integer.graph:
        name = of(placed.layers[node.name or ""])
        for value in node.inputs:
            if name is not None and value is not None and value not in seen and const_of(value) is not None:
                seen.add(value)
                shares[name] += Cost(0.0, 0.0, tensor_bytes(value))
    return shares
