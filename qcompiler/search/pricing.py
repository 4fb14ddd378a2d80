"""What each layer costs in each format, by the target's own cost model.

Formats of weights are priced with all layers in one format at a time. A layer in float is priced by itself, since what
matters is the hand-over around it. Layers overlap on an accelerator, so sums over layers are close but not exact:
points that are shown to the user are estimated whole, with `exact`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.compile import Placed, Progress, estimate
from qcompiler.graph import const_of
from qcompiler.layer_names import JOINT
from qcompiler.partition_cost import tensor_bytes
from qcompiler.report import Report
from qcompiler.search.layers import FLOAT, UNIFORM, Assignment, Layer, LayerFormat, everywhere, weight_types

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


ZERO = Cost(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Prices:
    fixed: Cost
    """Of everything but the layers."""
    by_layer: Mapping[tuple[str, LayerFormat], Cost]
    """By layer name and format."""
    macs: int


def exact(placed: Placed) -> Cost:
    """Of the whole model."""
    report, _ = estimate(placed)
    return _total(report)


def price(layers: Sequence[Layer], arrange: Arrange, progress: Progress) -> Prices:
    """Every layer in every format it admits."""
    progress.stage("price layers")
    formats = weight_types(layers)
    steps, done = len(formats) + len(layers), 0
    found: dict[tuple[str, LayerFormat], Cost] = {}
    whole, macs = ZERO, 0
    for dtype in formats:
        placed = arrange(everywhere(layers, dtype))
        report, _ = estimate(placed)
        shares = _shares(layers, placed, report)
        found |= {(layer.name, dtype): shares[layer.name] for layer in layers if dtype in layer.formats}
        if dtype == UNIFORM:
            whole, macs = _total(report), report.totals.macs
        done += 1
        progress.advance(done, steps)
    fixed = whole
    for layer in layers:
        alone: Assignment = tuple(FLOAT if other is layer else UNIFORM for other in layers)
        found[layer.name, FLOAT] = found[layer.name, UNIFORM] + exact(arrange(alone)) - whole
        fixed = fixed - found[layer.name, UNIFORM]
        done += 1
        progress.advance(done, steps)
    return Prices(fixed, found, macs)


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
