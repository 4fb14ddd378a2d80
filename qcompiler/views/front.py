"""The Pareto front of a search as one HTML page that needs nothing from elsewhere.

Equal searches give equal bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from jinja2 import Environment, StrictUndefined, Template

from qcompiler.search.budget import GOALS, Goal, shown
from qcompiler.search.chooser import figures_of
from qcompiler.search.results import LayerRow, Point, Search, costs, decibels, mixture, share
from qcompiler.views.roofline import Tick
from qcompiler.views.scales import even_ticks

TEMPLATE = "front.html.j2"
WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 44
STRIP, GAP = 9, 1
"""Pixels of a layer in the strips, and between two of them."""
BEST = 1e-6
"""Noise that is drawn as the least there is: 60 dB."""


@dataclass(frozen=True)
class Mark:
    """A point in a chart: what was predicted and what was measured, one above the other."""

    x: float
    predicted: float
    measured: float
    css: str
    """chosen, front, other."""
    tip: str


@dataclass(frozen=True)
class Chart:
    title: str
    marks: tuple[Mark, ...]
    path: str
    """Through the predictions of the front, from cheap to dear."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class PointRow:
    """A line of the table of points; cells as text."""

    name: str
    css: str
    mixture: str
    strip: tuple[tuple[float, int, str], ...]
    """Of each layer: where it stands, which format it has by number, and what pointing at it says."""
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A layer in a format."""

    noise: str
    latency: str
    weights: str
    chosen: bool


def front_page(search: Search) -> str:
    """The page."""
    formats = list(dict.fromkeys(row.format for layer in search.layers for row in layer.formats))
    chosen = search.point(search.chosen.name)
    labelled = any(point.measured.top1 is not None for point in search.points)
    classes = any(point.measured.agreement is not None for point in search.points)
    headers = ["Predicted", "Measured"]
    headers += ["Agrees", "Expected loss"] if classes else []
    headers += ["Top-1", "Loss"] if labelled else []
    return _template().render(
        search=search,
        charts=[_chart(search, goal) for goal in GOALS],
        formats=formats,
        headers=(*headers, "Latency", "Energy", "Weights"),
        rows=[_point_row(search, point, formats, classes=classes, labelled=labelled) for point in search.points],
        strip_width=len(search.layers) * (STRIP + GAP),
        layers=[
            (layer.layer, layer.op, [_cell(layer, dtype, chosen.formats[index]) for dtype in formats])
            for index, layer in enumerate(search.layers)
        ],
        chosen_mixture=mixture(chosen.formats),
        measured=search.chosen.measured,
        final=costs(search.chosen.cost),
        decibels=decibels,
        share=share,
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((resources.files("qcompiler.views") / TEMPLATE).read_text("utf-8"))


def _css(search: Search, point: Point) -> str:
    if point.name == search.chosen.name:
        return "chosen"
    return "front" if point.on_front else "other"


def _chart(search: Search, goal: Goal) -> Chart:
    """Signal to noise over one kind of cost; both axes are linear, the cost's from zero."""
    points = search.points
    values = [figures_of(0.0, point.cost)[goal] for point in points]
    heights = [level for point in points for level in (_level(point.predicted_noise), _level(point.measured.noise))]
    low, high = math.floor(min(heights) / 5) * 5, math.ceil(max(heights) / 5) * 5
    high = max(high, low + 5)
    end = max(values) * 1.03 or 1.0

    def x(value: float) -> float:
        return LEFT + (WIDTH - RIGHT - LEFT) * value / end

    def y(level: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (level - low) / (high - low)

    marks = tuple(
        Mark(
            x(value), y(_level(point.predicted_noise)), y(_level(point.measured.noise)), _css(search, point),
            f"{point.name}: {mixture(point.formats)}; {', '.join(costs(point.cost))}; predicted "
            f"{decibels(point.predicted_noise)}, measured {decibels(point.measured.noise)}",
        )
        for value, point in zip(values, points, strict=True)
    )  # fmt: skip
    line = sorted((mark.x, mark.predicted) for mark, point in zip(marks, points, strict=True) if point.on_front)
    step = 5 if high - low <= 30 else 10
    unit = 1024 if goal == "weights" else 1
    return Chart(
        goal.capitalize(),
        marks,
        " ".join(f"{'L' if index else 'M'}{at:.1f} {up:.1f}" for index, (at, up) in enumerate(_upper(line))),
        tuple(Tick(x(unit * tick), shown(goal, unit * tick) if tick else "0") for tick in even_ticks(end / unit, 4)),
        tuple(Tick(y(level), f"{level} dB") for level in range(low, high + 1, step)),
    )


def _upper(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no cheaper one is above of; a point may be on the front for another kind of cost."""
    found: list[tuple[float, float]] = []
    for at, up in line:
        if not found or up < found[-1][1]:
            found.append((at, up))
    return found


def _level(noise: float) -> float:
    return -10 * math.log10(max(noise, BEST))


def _point_row(search: Search, point: Point, formats: Sequence[str], *, classes: bool, labelled: bool) -> PointRow:
    seen = point.measured
    cells = [decibels(point.predicted_noise), decibels(seen.noise)]
    cells += [share(seen.agreement), share(seen.expected_drop)] if classes else []
    cells += [share(seen.top1), share(seen.drop)] if labelled else []
    strip = tuple(
        (index * (STRIP + GAP), formats.index(dtype), f"{layer.layer}: {dtype}")
        for index, (layer, dtype) in enumerate(zip(search.layers, point.formats, strict=True))
    )
    return PointRow(point.name, _css(search, point), mixture(point.formats), strip, (*cells, *costs(point.cost)))


def _cell(layer: LayerRow, dtype: str, chosen: str) -> Cell | None:
    row = next((row for row in layer.formats if row.format == dtype), None)
    if row is None:
        return None
    return Cell(decibels(row.noise), shown("latency", row.latency), shown("weights", row.weights), dtype == chosen)
