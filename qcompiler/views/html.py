"""The report as one HTML page that needs nothing from elsewhere: no scripts, pictures as inline SVG.

Equal reports give equal bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

from jinja2 import Environment, StrictUndefined, Template

from qcompiler.report import (
    LayerReport,
    PlacementReport,
    Report,
    byte_count,
    elsewhere,
    host_memory,
    placement_summary,
    quantity,
)
from qcompiler.simulator.trace import Timeline
from qcompiler.target import Npu, Target
from qcompiler.views.lanes import kind_of, lanes
from qcompiler.views.roofline import Roofline, roofline

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Tile:
    """A figure of the first line."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Row:
    """A line of the table of layers; cells as text."""

    number: int
    layer: str
    op: str
    kind: str
    where: str
    precision: str
    macs: str
    cycles: str
    utilised: str
    utilisation: float | None
    traffic: tuple[str, ...]
    bound: str
    time: str
    elsewhere: str
    """What other backends would take, by the estimates that placed it."""
    share: float
    """Of the latency, in percent."""
    bar: float
    """Time beside that of the longest layer, in percent."""
    energy: str


@dataclass(frozen=True)
class Fallback:
    """Operators the accelerator leaves to the CPU for one reason."""

    op: str
    precision: str
    reason: str
    layers: tuple[str, ...]


def html_report(report: Report, line: Timeline, target: Target) -> str:
    """The page.

    Args:
        report: what was decided and what it costs.
        line: the same on a time axis.
        target: its bandwidths and rates are the roofs.
    """
    memories = tuple(dict.fromkeys(name for layer in report.layers for name in layer.traffic))
    placements = {item.node: item for item in report.placements}
    longest = max((layer.seconds for layer in report.layers), default=0.0)
    return _template().render(
        report=report,
        description=target.description,
        sources=target.sources,
        tiles=_tiles(report),
        memories=memories,
        rows=[
            _row(number, layer, memories, placements, report.totals.latency, longest)
            for number, layer in enumerate(report.layers, start=1)
        ],
        rooflines=_rooflines(report, target),
        lanes=lanes(line),
        fallbacks=_fallbacks(report.placements),
        summary=placement_summary(report.placements),
        time=lambda seconds: quantity(seconds, "s"),
        bytes=byte_count,
        on_cpu=len(report.placements),
        has_npu=bool(target.accelerators),
    )


def _rooflines(report: Report, target: Target) -> list[tuple[str, Roofline]]:
    """Of the accelerators that multiply and take commands, with what the heading adds."""
    found: list[tuple[str, Roofline]] = []
    for name, unit in target.accelerators.items():
        drawn = roofline(unit, report.layers, report.placements, name) if isinstance(unit, Npu) else None
        if drawn is not None:
            found.append((f" of the {name.upper()}" if len(target.accelerators) > 1 else "", drawn))
    return found


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((resources.files("qcompiler.views") / TEMPLATE).read_text("utf-8"))


def _tiles(report: Report) -> list[Tile]:
    totals, memory = report.totals, report.memory
    rate = totals.inferences_per_second
    tiles = [Tile("Latency", quantity(totals.latency, "s"), f"{rate:,.0f} inferences/s" if rate >= 10 else "")]
    share = f"{totals.npu_macs / totals.macs if totals.macs else 0.0:.1%} on the accelerator"
    if totals.accelerators:
        tiles += [
            Tile(unit.name.upper(), quantity(unit.seconds, "s"), f"{unit.operators} operators, hand-overs included")
            for unit in totals.accelerators
        ]
        tiles.append(Tile("MACs", f"{totals.macs:,}", f"{share}s" if len(totals.accelerators) > 1 else share))
    elif totals.sram:
        tiles += [
            Tile("Accelerator", f"{totals.npu_cycles:,.0f}", "cycles"),
            Tile("MACs", f"{totals.macs:,}", share),
            Tile("Peak SRAM", byte_count(totals.peak_sram), f"of {byte_count(totals.sram)}"),
        ]
    else:
        tiles.append(Tile("MACs", f"{totals.macs:,}", "all on the CPU"))
    tiles += [
        Tile("Weights", byte_count(totals.weights), "in the bundle"),
        *([] if memory is None else [Tile("Host memory", byte_count(memory.peak), host_memory(memory))]),
        Tile("Energy", quantity(totals.energy, "J"), "per inference"),
    ]
    if report.self_check is not None:
        known = [output.sqnr for output in report.self_check.outputs if output.sqnr is not None]
        worst = f"{min(known):.1f} dB" if known else "identical"
        tiles.append(Tile("SQNR", worst, f"{report.self_check.samples} samples, worst output"))
    return tiles


def _row(
    number: int,
    layer: LayerReport,
    memories: Sequence[str],
    placements: Mapping[str, PlacementReport],
    latency: float,
    longest: float,
) -> Row:
    placement = placements.get(layer.node)
    return Row(
        number=number,
        layer=layer.layer,
        op=layer.op,
        kind=kind_of(layer.op),
        where=layer.engine
        if layer.engine and layer.backend in ("cpu", "npu")
        else f"{layer.backend} {layer.engine}".strip(),
        precision=placement.formats.replace("*", "×") if placement is not None else "",
        macs=f"{layer.macs:,}" if layer.macs else "",
        cycles=f"{layer.cycles:,.0f}" if layer.cycles else "",
        utilised="" if layer.utilisation is None else f"{layer.utilisation:.0%}",
        utilisation=None if layer.utilisation is None else 100 * min(1.0, layer.utilisation),
        traffic=tuple(byte_count(layer.traffic[name]) if layer.traffic.get(name) else "" for name in memories),
        bound=layer.bound if layer.cycles else "",
        time=quantity(layer.seconds, "s") if layer.seconds else "",
        elsewhere=elsewhere(placement) if placement is not None else "",
        share=100 * layer.seconds / latency if latency else 0.0,
        bar=100 * layer.seconds / longest if longest else 0.0,
        energy=quantity(layer.energy, "J") if layer.energy else "",
    )


def _fallbacks(placements: Sequence[PlacementReport]) -> list[Fallback]:
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for item in placements:
        if item.reason:
            grouped.setdefault((item.op, item.precision, item.reason), []).append(item.layer)
    return [Fallback(*key, tuple(layers)) for key, layers in grouped.items()]
