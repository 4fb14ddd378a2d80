"""What a compilation decided and what it will cost: typed, as JSON, and as tables.

A report holds nothing about the machine or the moment of compiling, so that equal inputs give equal reports.
"""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from pydantic import TypeAdapter
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qcompiler.target import AcceleratorName, Backend

TEXT_WIDTH = 160
"""Columns of report.txt."""
NAME_WIDTH = 32
"""Characters of a layer's name in a table; report.json has them all."""
SI_PREFIXES: tuple[tuple[float, str], ...] = ((1, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"), (1e-12, "p"))


@dataclass(frozen=True)
class AlternativeReport:
    """Another backend for an operator."""

    backend: Backend
    seconds: float | None
    """What the operator would take there by itself; None if it cannot run there."""
    refusal: str | None
    """Why it cannot."""


@dataclass(frozen=True)
class PlacementReport:
    """Where one operator runs and why."""

    layer: str
    """Names the operator has in the user's model; several, joined by +, where it stands for several."""
    node: str
    """Its name in model.int.onnx."""
    op: str
    backend: Backend
    engine: str
    precision: str
    reason: str | None
    """Why no accelerator runs it; None where one does, or where there is none."""
    seconds: float = 0.0
    """What it takes by the estimate that placed it; `LayerReport` has what its commands cost."""
    alternatives: tuple[AlternativeReport, ...] = ()
    """All other backends of the target."""
    in_groups: str = ""
    """What weights that share scales in groups are stored as, such as int4/32."""

    @property
    def formats(self) -> str:
        """Types of activations and weights, for people to read."""
        return self.precision + (f" ({self.in_groups})" if self.in_groups else "")


@dataclass(frozen=True)
class RegionReport:
    """Operators that run on one backend without a break, by the estimates that placed them."""

    name: str
    backend: Backend
    operators: int
    seconds: float
    """Its hand-over included."""
    elsewhere: Mapping[Backend, float]
    """The same had another backend all of it; those that can run it."""


@dataclass(frozen=True)
class LayerReport:
    """What one operator, or one hand-over between host and accelerator, costs in one inference."""

    layer: str
    """As in `PlacementReport`."""
    node: str
    """Its name in model.int.onnx; of a hand-over, the region's."""
    op: str
    backend: Backend
    engine: str
    macs: int
    cycles: float
    """Of the accelerator's clock on the accelerator, of the host's clock on the host."""
    seconds: float
    utilisation: float | None
    """MACs done over MACs the engine could have done in these cycles; None where there are no MACs."""
    traffic: Mapping[str, int]
    """Bytes read and written, by memory."""
    bound: str
    """What the layer waits for: "compute", or the name of a memory."""
    energy: float
    """Joules."""


@dataclass(frozen=True)
class CascadedLayer:
    """An operator that runs in stripes with others."""

    layer: str
    """As in `PlacementReport`."""
    node: str
    """Its name in model.int.onnx."""
    stripe: int
    """Most rows it computes at a time."""
    height: int
    """Rows of its output."""
    buffer: int | None
    """Rows of its output that the scratchpad holds, rolling; None where all are there."""
    weights: str
    """In the scratchpad all the time ("kept"), fetched for every stripe ("streamed"), or read "in place"."""


@dataclass(frozen=True)
class CascadeReport:
    """Operators that run together, depth first: stripe by stripe of rows, through rolling buffers."""

    region: str
    stripes: int
    buffers: int
    """Bytes of all its rolling buffers, those of maps from outside included."""
    layers: tuple[CascadedLayer, ...]
    """In execution order."""


@dataclass(frozen=True)
class AcceleratorTotals:
    """What one accelerator does in an inference."""

    name: Backend
    operators: int
    regions: int
    seconds: float
    """Hand-overs included."""
    cycles: float
    """Of its own clock, hand-overs left out."""
    macs: int
    peak_scratchpad: int
    """Bytes; 0 where it has none."""
    scratchpad: int


@dataclass(frozen=True)
class Totals:
    """One inference, from input to output."""

    latency: float
    """Seconds."""
    npu_cycles: float
    """Of all accelerators that take commands."""
    macs: int
    npu_macs: int
    """On any accelerator."""
    traffic: Mapping[str, int]
    """Bytes by memory."""
    peak_sram: int
    """Most bytes of scratchpad reserved at one time."""
    sram: int
    """Size of the scratchpad, bytes; 0 without an accelerator."""
    weights: int
    """Bytes of constants in the bundle."""
    energy: float
    """Joules, idle power of the accelerators included."""
    accelerators: tuple[AcceleratorTotals, ...] = ()
    """By themselves, where there are several, or a GPU."""

    @property
    def inferences_per_second(self) -> float:
        return 1 / self.latency if self.latency else 0.0


@dataclass(frozen=True)
class TuningReport:
    """How much `qcompile tune` had measured of what was compiled."""

    kernels: int
    """CPU kernels that have tiles to choose from."""
    tuned: int
    """Those whose best tile was known."""


@dataclass(frozen=True)
class HostMemory:
    """Main memory that the host's code takes, in bytes; what an accelerator keeps for itself is in `Totals`."""

    arena: int
    """One planned block for all that is computed between inputs and outputs, and the outputs."""
    temporaries: int
    """Most that one kernel takes beside it while it runs."""
    constants: int
    ports: int
    """Inputs and outputs, as the caller holds them."""

    @property
    def peak(self) -> int:
        return self.arena + self.temporaries + self.constants + self.ports


@dataclass(frozen=True)
class OutputCheck:
    """One output of the compiled model beside the float one."""

    output: str
    sqnr: float | None
    """Signal to quantization noise, dB, over all samples; None if the two are identical."""
    top1_agreement: float | None
    """Share of samples whose largest element stands at the same place; None where that says nothing."""


@dataclass(frozen=True)
class SelfCheck:
    """The compiled model run beside the model it was made from."""

    samples: int
    outputs: tuple[OutputCheck, ...]


@dataclass(frozen=True)
class Calibration:
    """Where activation ranges came from."""

    method: str
    samples: int
    synthetic: bool


@dataclass(frozen=True)
class VelaReport:
    """One accelerator region as Arm's Vela compiler sees it, beside our own estimate."""

    region: str
    accelerator: str
    operators: int
    """Of ours in the region."""
    npu_operators: int
    """Of Vela's, after its rewrites."""
    cpu_operators: int
    """What Vela leaves to the CPU, though the target's rules placed it on the accelerator."""
    refusals: tuple[str, ...]
    """Vela's reasons for those."""
    cycles: int
    vela_cycles: int
    scratchpad: int
    """Most bytes of scratchpad in use at one time."""
    vela_scratchpad: int


@dataclass(frozen=True)
class Report:
    model: str
    target: str
    placements: tuple[PlacementReport, ...]
    layers: tuple[LayerReport, ...]
    totals: Totals
    calibration: Calibration | None
    """None if the model arrived quantized."""
    self_check: SelfCheck | None
    """None if nothing was built (`qcompile explain`)."""
    warnings: tuple[str, ...]
    vela: tuple[VelaReport, ...] = ()
    """Empty unless the regions went through Vela (`--emit vela`)."""
    regions: tuple[RegionReport, ...] = ()
    """In execution order."""
    memory: HostMemory | None = None
    """None where no code was generated."""
    tuning: TuningReport | None = None
    """None where nothing was tuned."""
    cascades: tuple[CascadeReport, ...] = ()
    """In execution order."""

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return _ADAPTER.dump_python(self, mode="json")

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "Report":
        """The inverse of `to_dict`. Raises pydantic.ValidationError if it is not a report."""
        return _ADAPTER.validate_python(data)


_ADAPTER: TypeAdapter[Report] = TypeAdapter(Report)


# --- as text ------------------------------------------------------------------------------------------------


def as_text(report: Report, width: int = TEXT_WIDTH) -> str:
    """The report as plain text of fixed width."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(render(report))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n") + "\n"


def render(report: Report) -> RenderableType:
    """The whole report for a terminal."""
    parts: list[RenderableType] = [Text(f"{report.model} for {report.target}", style="bold"), Text()]
    parts += [_heading("Placement"), _placement_table(report.placements), Text(placement_summary(report.placements))]
    if any(region.elsewhere for region in report.regions):
        parts += [Text(), _heading("Regions, by the estimates that placed them"), _region_table(report.regions)]
    parts += [Text(), _heading("Cost of one inference"), _cost_table(report.layers), _totals_table(report.totals)]
    if report.cascades:
        parts += [Text(), _heading("Cascades: operators that run together, in stripes of rows")]
        parts.append(_cascade_table(report.cascades))
    if report.memory is not None:
        parts.append(Text(f"host memory  {byte_count(report.memory.peak)}: {host_memory(report.memory)}"))
    if report.tuning is not None:
        parts.append(Text(f"tiles  {report.tuning.tuned} of {_count(report.tuning.kernels, 'CPU kernel')} tuned"))
    if report.self_check is not None:
        parts += [Text(), _heading(f"Self-check on {_count(report.self_check.samples, 'sample')}")]
        parts.append(_check_table(report.self_check))
    if report.vela:
        parts += [Text(), _heading("Our estimate beside Vela's"), _vela_table(report.vela)]
    if report.calibration is not None:
        parts += [Text(), _calibration(report.calibration)]
    parts += [Text.assemble(("warning: ", "yellow"), warning) for warning in report.warnings]
    return Group(*parts)


def _heading(title: str) -> Text:
    return Text(title, style="bold")


def _table(*columns: tuple[str, bool]) -> Table:
    """A table of (header, is a number) columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for header, number in columns:
        table.add_column(header, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _placement_table(placements: Sequence[PlacementReport]) -> Table:
    costed = any(placement.seconds for placement in placements)
    columns = (("estimate", True), ("elsewhere", False)) if costed else ()
    table = _table(
        ("operator", False), ("layer", False), ("runs on", False), ("precision", False), *columns, ("reason", False)
    )
    for placement in placements:
        where = "cpu" if placement.backend == "cpu" else f"{placement.backend}: {placement.engine}"
        style = "yellow" if placement.reason else ""
        costs = (quantity(placement.seconds, "s"), elsewhere(placement)) if costed else ()
        reason = placement.reason or refusals(placement)
        cells = (placement.op, _shortened(placement.layer), where, placement.formats, *costs, reason)
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def elsewhere(placement: PlacementReport) -> str:
    """What the other backends would take: "dsp 12.3 µs, cpu 80.0 µs"."""
    taken = ((item.backend, item.seconds) for item in placement.alternatives)
    return ", ".join(f"{backend} {quantity(seconds, 's')}" for backend, seconds in taken if seconds is not None)


def refusals(placement: PlacementReport) -> str:
    """Why accelerators refuse an operator that another one runs."""
    return "; ".join(f"{item.backend}: {item.refusal}" for item in placement.alternatives if item.refusal)


def _region_table(regions: Sequence[RegionReport]) -> Table:
    table = _table(("region", False), ("operators", True), ("estimate", True), ("elsewhere", False))
    for region in regions:
        others = ", ".join(f"{backend} {quantity(seconds, 's')}" for backend, seconds in region.elsewhere.items())
        table.add_row(Text(region.name), str(region.operators), quantity(region.seconds, "s"), Text(others))
    return table


def placement_summary(placements: Sequence[PlacementReport]) -> str:
    """How many operators run where, in one line."""
    counts = Counter(placement.backend for placement in placements)
    used = [name for name in get_args(AcceleratorName) if counts[name]]
    everything = _count(len(placements), "operator")
    if len(used) < 2:
        return f"{len(placements) - counts['cpu']} of {everything} on the accelerator, {counts['cpu']} on the CPU"
    return f"{everything}: {', '.join(f'{counts[name]} on the {name.upper()}' for name in (*used, 'cpu'))}"


def _cost_table(layers: Sequence[LayerReport]) -> Table:
    memories = tuple(dict.fromkeys(name for layer in layers for name in layer.traffic))
    table = _table(
        ("layer", False),
        ("operator", False),
        ("on", False),
        ("MACs", True),
        ("cycles", True),
        ("utilised", True),
        *((f"{name} traffic", True) for name in memories),
        ("bound by", False),
        ("time", True),
        ("energy", True),
    )
    for layer in layers:
        table.add_row(
            *(Text(cell) for cell in (_shortened(layer.layer), layer.op, layer.backend)),
            f"{layer.macs:,}" if layer.macs else "",
            f"{layer.cycles:,.0f}",
            "" if layer.utilisation is None else f"{layer.utilisation:.0%}",
            *(byte_count(layer.traffic[name]) if layer.traffic.get(name) else "" for name in memories),
            Text(layer.bound if layer.cycles else ""),
            quantity(layer.seconds, "s"),
            quantity(layer.energy, "J"),
        )
    return table


def _totals_table(totals: Totals) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    shared = totals.macs and (totals.sram or totals.accelerators)
    share = f", {totals.npu_macs / totals.macs:.1%} of them on the accelerator" if shared else ""
    rows = [
        ("latency", f"{quantity(totals.latency, 's')}, {_rate(totals.inferences_per_second)} inferences/s"),
        ("MACs", f"{totals.macs:,}{share}"),
        ("accelerator cycles", f"{totals.npu_cycles:,.0f}"),
        ("traffic", ", ".join(f"{name} {byte_count(size)}" for name, size in totals.traffic.items()) or "none"),
        ("peak SRAM", f"{byte_count(totals.peak_sram)} of {byte_count(totals.sram)}"),
        ("weights", byte_count(totals.weights)),
        ("energy", quantity(totals.energy, "J")),
    ]
    if totals.accelerators:
        rows = [row for row in rows if row[0] not in ("accelerator cycles", "peak SRAM")]
        rows[2:2] = [(unit.name, _accelerator(unit, totals)) for unit in totals.accelerators]
    elif not totals.sram:
        rows = [row for row in rows if row[0] not in ("accelerator cycles", "traffic", "peak SRAM")]
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return Padding(table, (0, 0, 0, 0))


def host_memory(memory: HostMemory) -> str:
    """What the peak is made of."""
    parts = (
        (memory.arena, "arena"),
        (memory.temporaries, "temporaries"),
        (memory.constants, "constants"),
        (memory.ports, "inputs and outputs"),
    )
    return ", ".join(f"{byte_count(size)} {name}" for size, name in parts if size)


def _cascade_table(cascades: Sequence[CascadeReport]) -> Table:
    table = _table(
        ("cascade", False), ("layer", False), ("stripe", True), ("of rows", True), ("buffer", True), ("weights", False)
    )
    for number, cascade in enumerate(cascades, start=1):
        first = f"{number}: {cascade.stripes} stripes, {byte_count(cascade.buffers)}"
        for layer in cascade.layers:
            held = "whole" if layer.buffer is None else str(layer.buffer)
            cells = (_shortened(layer.layer), str(layer.stripe), str(layer.height), held, layer.weights)
            table.add_row(*(Text(cell) for cell in (first, *cells)))
            first = ""
    return table


def _accelerator(unit: AcceleratorTotals, totals: Totals) -> str:
    parts = [
        f"{_count(unit.operators, 'operator')} in {_count(unit.regions, 'region')}",
        f"{quantity(unit.seconds, 's')} ({unit.cycles:,.0f} cycles)",
        f"{unit.macs / totals.macs:.1%} of the MACs" if totals.macs else "",
        f"{byte_count(unit.peak_scratchpad)} of {byte_count(unit.scratchpad)} scratchpad" if unit.scratchpad else "",
    ]
    return ", ".join(part for part in parts if part) if unit.operators else "unused"


def _check_table(check: SelfCheck) -> Table:
    table = _table(("output", False), ("SQNR", True), ("top-1 agreement", True))
    for row in check.outputs:
        table.add_row(
            Text(row.output),
            "identical" if row.sqnr is None else f"{row.sqnr:.1f} dB",
            "" if row.top1_agreement is None else f"{row.top1_agreement:.1%}",
        )
    return table


def _vela_table(regions: Sequence[VelaReport]) -> RenderableType:
    table = _table(
        ("region", False), ("accelerator", False), ("cycles", True), ("Vela's", True), ("SRAM", True),
        ("Vela's", True), ("operators", True), ("Vela: NPU", True), ("Vela: CPU", True),
    )  # fmt: skip
    for item in regions:
        table.add_row(
            item.region,
            item.accelerator,
            f"{item.cycles:,}",
            f"{item.vela_cycles:,}",
            byte_count(item.scratchpad),
            byte_count(item.vela_scratchpad),
            str(item.operators),
            str(item.npu_operators),
            str(item.cpu_operators),
        )
    refusals = [Text(f"Vela leaves to the CPU: {refusal}") for item in regions for refusal in item.refusals]
    return Group(table, *refusals)


def _calibration(calibration: Calibration) -> Text:
    if calibration.synthetic:
        return Text(
            "Activation ranges come from synthetic random inputs, because no --calibration was given: "
            "do not trust the accuracy of this bundle.",
            style="bold red",
        )
    return Text(f"Activation ranges: {calibration.method} over {_count(calibration.samples, 'calibration sample')}.")


def _shortened(name: str) -> str:
    """Exporters write names of 200 characters; their ends tell most."""
    return (
        name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH // 3]}…{name[-(NAME_WIDTH - NAME_WIDTH // 3 - 1) :]}"
    )


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quantity(value: float, unit: str) -> str:
    """A value with three digits and an SI prefix: 0.00123 s is "1.23 ms"."""
    if value == 0:
        return f"0 {unit}"
    factor, prefix = next(((f, p) for f, p in SI_PREFIXES if abs(value) >= f), SI_PREFIXES[-1])
    scaled = value / factor
    digits = max(0, 2 - math.floor(math.log10(abs(scaled))))
    return f"{scaled:,.{digits}f} {prefix}{unit}"


def byte_count(size: int) -> str:
    """Bytes in the largest binary unit that keeps one digit before the point."""
    if size < 1024:
        return f"{size} B"
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    raise AssertionError(size)
