"""One inference from beginning to end: what the host and every unit of the accelerator do when.

Regions run one after the other, as the estimate of the latency has it; within a region the accelerator's own command
log says when each command runs.
"""

from collections.abc import Sequence

from qcompiler.costs import HAND_OVER, Costs
from qcompiler.partition import Partition
from qcompiler.report import LayerReport
from qcompiler.simulator.trace import HostSpan, RegionSpan, Timeline


def timeline(partition: Partition, costs: Costs) -> Timeline:
    """Lay the rows of the cost table and the commands behind them on one axis."""
    rows = iter(costs.layers)
    start = 0.0
    regions: list[RegionSpan] = []
    host: list[HostSpan] = []
    in_cascades = {
        layer.node: f"{number}: {len(cascade.layers)} operators in {cascade.stripes} stripes"
        for number, cascade in enumerate(costs.cascades, start=1)
        for layer in cascade.layers
    }
    several = len({region.backend for region in partition.regions} - {"cpu"}) > 1
    for region in partition.regions:
        if region.name not in costs.regions:  # no commands behind the rows: the CPU, or kernels of a GPU
            for _ in region.nodes:
                row = next(rows)
                if row.seconds:
                    host.append(_span(row, start, region.backend.upper()))
                start += row.seconds
            if region.backend == "cpu":
                continue
        else:
            cost = costs.regions[region.name]
            taken = [next(rows) for _ in cost.layers]
            names = {layer.index: row.layer for layer, row in zip(cost.layers, taken, strict=True)}
            operators = {layer.index: row.op for layer, row in zip(cost.layers, taken, strict=True)}
            owner = region.backend.upper() if several else ""
            cascades = {
                layer.index: in_cascades[row.node]
                for layer, row in zip(cost.layers, taken, strict=True)
                if row.node in in_cascades
            }
            regions.append(RegionSpan(cost, names, operators, start, owner, cascades))
            start += cost.cycles / cost.clock
        row = next(rows)
        assert row.op == HAND_OVER, row
        host.append(_span(row, start))
        start += row.seconds
    assert next(rows, None) is None, "a row of the cost table belongs to no region"
    return Timeline(tuple(regions), tuple(host), start)


def _span(row: LayerReport, start: float, unit: str = "CPU") -> HostSpan:
    return HostSpan(row.layer, row.op, start, start + row.seconds, unit)


def units(line: Timeline) -> Sequence[tuple[str, str, int]]:
    """Engines and DMA channels that do anything, engines first, as (accelerator, unit, channel)."""
    engines, copiers = dict[tuple[str, str, int], None](), dict[tuple[str, str, int], None]()
    for region in line.regions:
        for command in region.cost.commands:
            if command.name == "barrier":
                continue
            key = (region.owner, command.unit, command.channel)
            (copiers if command.name in ("dma", "fill") else engines)[key] = None
    return (*sorted(engines), *sorted(copiers))
