"""What a search found: typed, as JSON, as CSV and as tables."""

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qcompiler.report import byte_count, quantity
from qcompiler.search.budget import Budget
from qcompiler.search.forms import LayerFormat
from qcompiler.search.measure import Measured
from qcompiler.search.pricing import Cost


@dataclass(frozen=True)
class FormatRow:
    """One layer in one format."""

    format: LayerFormat
    noise: float
    """Power of the outputs' error over that of the outputs, with only this layer in this format."""
    latency: float
    energy: float
    weights: float


@dataclass(frozen=True)
class LayerRow:
    layer: str
    op: str
    formats: tuple[FormatRow, ...]


@dataclass(frozen=True)
class Point:
    """One choice of formats."""

    name: str
    formats: tuple[LayerFormat, ...]
    """By layer, in the order of `Search.layers`."""
    predicted_noise: float
    predicted: Cost
    """Sums over layers, as the choice was made by."""
    cost: Cost
    """Of the whole model, by the target's cost model."""
    measured: Measured
    """On evaluation data if there are any."""
    on_front: bool
    """No other point is as good in noise, latency, energy and weights and better in one of them."""


@dataclass(frozen=True)
class Chosen:
    """The point that was chosen, quantized as it will be compiled, with all the repair that was asked for."""

    name: str
    """Of the point."""
    formats: Mapping[str, LayerFormat]
    """Layers that are not int8."""
    cost: Cost
    measured: Measured
    """On evaluation data if there are any."""


@dataclass(frozen=True)
class Correlation:
    """How well predicted noise ranks points by something measured: Spearman's rho, 1 for the same order."""

    measure: str
    spearman: float
    points: int


@dataclass(frozen=True)
class Search:
    model: str
    target: str
    budget: Budget
    activations: str
    quality: str
    sensitivity_samples: int
    evaluated: bool
    """Whether there were evaluation data; else figures are of the calibration data that points were chosen by."""
    base_noise: float
    """With activations quantized and weights exact."""
    layers: tuple[LayerRow, ...]
    points: tuple[Point, ...]
    """By latency, the slowest first; the one called int8 has 8 bits everywhere."""
    correlations: tuple[Correlation, ...]
    chosen: Chosen

    def point(self, name: str) -> Point:
        return next(point for point in self.points if point.name == name)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return _ADAPTER.dump_python(self, mode="json")


_ADAPTER: TypeAdapter[Search] = TypeAdapter(Search)

CSV_HEADER = (
    "point", "front", "chosen", "predicted_noise", "latency_s", "energy_j", "weights_bytes", "samples", "noise",
    "agreement", "expected_drop", "top1", "drop",
)  # fmt: skip


def as_csv(search: Search) -> str:
    """A line for each point; a column for each layer's format behind the figures."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow((*CSV_HEADER, *(layer.layer for layer in search.layers)))
    for point in search.points:
        seen = point.measured
        writer.writerow((
            point.name, int(point.on_front), int(point.name == search.chosen.name), f"{point.predicted_noise:.6g}",
            f"{point.cost.latency:.6g}", f"{point.cost.energy:.6g}", round(point.cost.weights), seen.samples,
            f"{seen.noise:.6g}", *("" if value is None else f"{value:.6g}"
                                   for value in (seen.agreement, seen.expected_drop, seen.top1, seen.drop)),
            *point.formats,
        ))  # fmt: skip
    return stream.getvalue()


def mixture(formats: Sequence[LayerFormat]) -> str:
    """How many layers have which format: "12 int8, 16 int4"."""
    return ", ".join(f"{count} {dtype}" for dtype, count in Counter(formats).most_common())


def render(search: Search) -> RenderableType:
    """For a terminal."""
    labelled = any(point.measured.top1 is not None for point in search.points)
    classes = any(point.measured.agreement is not None for point in search.points)
    columns = ["point", "layers", "predicted", "measured"]
    columns += ["agrees", "expected loss"] if classes else []
    columns += ["top-1", "loss"] if labelled else []
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in (*columns, "latency", "energy", "weights"):
        table.add_column(column, justify="left" if column in ("point", "layers") else "right", no_wrap=True)
    for point in search.points:
        mark = " ◀" if point.name == search.chosen.name else ("" if point.on_front else " (not on the front)")
        seen = point.measured
        cells = [point.name + mark, mixture(point.formats), decibels(point.predicted_noise), decibels(seen.noise)]
        cells += [share(seen.agreement), share(seen.expected_drop)] if classes else []
        cells += [share(seen.top1), share(seen.drop)] if labelled else []
        table.add_row(*map(Text, (*cells, *costs(point.cost))), style="bold" if "◀" in mark else "")
    chosen, eight = search.chosen, search.point("int8")
    seen = chosen.measured
    parts = [f"SQNR {decibels(seen.noise)}"]
    parts += [f"agrees {share(seen.agreement)}", f"expected loss {share(seen.expected_drop)}"] if classes else []
    parts += [f"top-1 {share(seen.top1)}, loss {share(seen.drop)}"] if labelled else []
    against = ", ".join(
        f"{name} {text} ({ours / theirs:.2f}× int8)" if theirs else f"{name} {text}"
        for name, text, ours, theirs in zip(
            ("latency", "energy", "weights"), costs(chosen.cost),
            (chosen.cost.latency, chosen.cost.energy, chosen.cost.weights),
            (eight.cost.latency, eight.cost.energy, eight.cost.weights), strict=True,
        )
    )  # fmt: skip
    ranks = "; ".join(f"{item.measure} {item.spearman:.2f}" for item in search.correlations)
    return Group(
        Text(f"{search.model} for {search.target}: {len(search.layers)} layers, {search.budget}", style="bold"),
        table,
        Text(f"Figures are of {search.points[0].measured.samples} "
             f"{'evaluation' if search.evaluated else 'calibration'} samples."),
        Text(f"Spearman of predicted noise and what was measured, {len(search.points)} points: {ranks}"
             if ranks else "Too few points to say how well the prediction ranks them."),
        Text(),
        Text(f"Chosen: {chosen.name}, {mixture(search.point(chosen.name).formats)}", style="bold"),
        Text(f"With quality {search.quality}, on {seen.samples} samples: {', '.join(parts)}"),
        Text(against),
    )  # fmt: skip


def decibels(noise: float) -> str:
    return f"{-10 * math.log10(noise):.1f} dB" if noise > 0 else "exact"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def costs(cost: Cost) -> tuple[str, str, str]:
    """Latency, energy, weights as text."""
    return quantity(cost.latency, "s"), quantity(cost.energy, "J"), byte_count(round(cost.weights))
