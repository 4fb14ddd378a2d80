"""The roofline: how fast each layer multiplies, beside what the engines and the memories admit.

Williams, Waterman, Patterson, Roofline: an insightful visual performance model, CACM 2009. A layer is drawn against the
memory that is busy longest for it, so that its point lies under that memory's roof and the engines' one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qcompiler.report import LayerReport, PlacementReport, byte_count, quantity
from qcompiler.target import AcceleratorName, Npu
from qcompiler.views.scales import LogScale

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 20, 18, 46
LABELLED = 6
"""Points that carry their number: those that take most time."""
CROWDED = 16
"""Pixels between points whose texts would overlap."""


@dataclass(frozen=True)
class Roof:
    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    css: str
    """Class: memory-0, memory-1…, or compute."""


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    radius: float
    css: str
    number: str
    """Its row in the table of layers, or "" where it would crowd."""
    tip: str


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Roofline:
    roofs: tuple[Roof, ...]
    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class _Layer:
    number: int
    row: LayerReport
    memory: int
    intensity: float
    rate: float


def roofline(
    npu: Npu, layers: Sequence[LayerReport], placements: Sequence[PlacementReport], backend: AcceleratorName = "npu"
) -> Roofline | None:
    """Place the accelerator's layers; None if none of them multiplies.

    Args:
        npu: its memories' bandwidths and its engines' rates are the roofs.
        layers: the rows of the cost table; a point is numbered by its row, from 1.
        placements: which engine and precision each operator has.
        backend: which accelerator it is.
    """
    memories = list(npu.memories)
    bandwidths = [memory.bandwidth.per_cycle(npu.clock) * npu.clock for memory in npu.memories.values()]
    found: list[_Layer] = []
    for number, row in enumerate(layers, start=1):
        if row.backend != backend or not row.macs or not row.seconds or not any(row.traffic.values()):
            continue
        busy = [row.traffic.get(name, 0) / speed for name, speed in zip(memories, bandwidths, strict=True)]
        slowest = max(range(len(busy)), key=busy.__getitem__)
        found.append(_Layer(number, row, slowest, row.macs / row.traffic[memories[slowest]], row.macs / row.seconds))
    peaks = _peaks(npu, placements, {layer.row.node for layer in found})
    if not found or not peaks:
        return None
    used = sorted({layer.memory for layer in found})
    top = max(peaks.values())
    knees = [top / bandwidths[memory] for memory in used]
    intensities = [layer.intensity for layer in found]
    x = LogScale(min(*intensities, *knees) / 3, max(*intensities, *knees) * 3, LEFT, WIDTH - RIGHT)
    y = LogScale(min(top / 30, *(layer.rate / 3 for layer in found)), top * 2.5, HEIGHT - BOTTOM, TOP)
    roofs = [
        Roof(f"{name} {quantity_of(peak)}MAC/s", x(x.low), y(peak), x(x.high), y(peak), "compute")
        for name, peak in peaks.items()
    ]
    for order, memory in enumerate(used):
        speed = bandwidths[memory]
        low = max(x.low, y.low / speed)
        label = f"{memories[memory]} {quantity_of(speed)}B/s"
        roofs.append(Roof(label, x(low), y(low * speed), x(top / speed), y(top), f"memory-{order % 4}"))
    longest = max(layer.row.seconds for layer in found)
    places = {layer.number: (x(layer.intensity), y(layer.rate)) for layer in found}
    numbers = _numbers(found, places)
    points = tuple(
        Point(
            x(layer.intensity),
            y(layer.rate),
            3.5 + 5 * (layer.row.seconds / longest) ** 0.5,
            f"memory-{used.index(layer.memory) % 4}",
            numbers.get(layer.number, ""),
            _tip(layer, memories[layer.memory]),
        )
        for layer in found
    )
    return Roofline(
        tuple(roofs),
        points,
        tuple(Tick(x(value), f"{value:g}") for value in x.ticks()),
        tuple(Tick(y(value), quantity_of(value)) for value in y.ticks()),
    )


def _numbers(found: Sequence[_Layer], places: Mapping[int, tuple[float, float]]) -> dict[int, str]:
    """What stands beside the points of the longest layers; points that nearly coincide share one text."""
    labels: dict[int, str] = {}
    for layer in sorted(found, key=lambda layer: -layer.row.seconds)[:LABELLED]:
        here = places[layer.number]
        near = next((other for other in labels if math.dist(here, places[other]) < CROWDED), None)
        if near is None:
            labels[layer.number] = str(layer.number)
        else:
            labels[near] += f", {layer.number}"
    return labels


def quantity_of(value: float) -> str:
    """Three digits and a prefix of thousands: 64000000000 is "64 G"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "


def _peaks(npu: Npu, placements: Sequence[PlacementReport], nodes: set[str]) -> dict[str, float]:
    """MAC/s of each engine at the precisions that occur, by label."""
    peaks: dict[str, float] = {}
    for placement in placements:
        engine = npu.engines.get(placement.engine)
        if placement.node in nodes and engine is not None and placement.precision in engine.precisions:
            rate = engine.precisions[placement.precision].rate * npu.clock
            peaks[f"{placement.engine} {placement.precision.replace('*', '×')}"] = rate
    return peaks


def _tip(layer: _Layer, memory: str) -> str:
    row = layer.row
    return (
        f"{layer.number}. {row.layer} ({row.op}): {quantity_of(layer.rate)}MAC/s, {layer.intensity:.3g} MAC per byte "
        f"of {memory} ({byte_count(row.traffic[memory])}), {quantity(row.seconds, 's')}"
    )
