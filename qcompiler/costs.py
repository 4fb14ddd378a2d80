"""What one inference costs: the accelerator's command words priced, the host's operators estimated."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.backends.npu import NpuProgram, words
from qcompiler.graph import const_of, element_count, is_op, shape_of
from qcompiler.integer.facts import facts_of_integer
from qcompiler.partition import Partition, Region
from qcompiler.partition_cost import multiplications, tensor_bytes
from qcompiler.report import LayerReport, Totals
from qcompiler.simulator.cost import RegionCost, Traffic, crossing_cost, host_cost, host_rate, price
from qcompiler.target import Npu, Target

PICO = 1e-12
HAND_OVER = "hand-over"
"""What the cost table calls giving a region to the accelerator and taking its results back."""

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
"""Nothing to run: the same bytes under another shape."""


@dataclass(frozen=True)
class Costs:
    """The rows of the cost table, in execution order, and their sum."""

    layers: tuple[LayerReport, ...]
    totals: Totals
    regions: Mapping[str, RegionCost]
    """Of the accelerator, by name: the commands behind the rows."""


def region_cost(program: NpuProgram, target: Target) -> RegionCost:
    """The command words of one accelerator region, priced."""
    assert target.npu is not None
    blob = program.bases.blob
    return price(words(program), target, {blob: target.npu.weight_memory}, {blob: program.encoded})


def cost(
    partition: Partition, programs: Mapping[str, NpuProgram], target: Target, weights: int, names: Mapping[str, str]
) -> Costs:
    """Price every region, without running anything.

    Args:
        partition: of the integer graph.
        programs: of the accelerator's regions, by region name.
        target: where it runs.
        weights: bytes of constants.
        names: of layers in the user's model, by node name.
    """
    layers: list[LayerReport] = []
    regions: dict[str, RegionCost] = {}
    peak = npu_cycles = 0
    engines = {placement.node: placement.engine for placement in partition.placements}
    for region in partition.regions:
        if region.backend == "cpu":
            layers += [_host_layer(node, target, names[_name(node)]) for node in region.nodes]
        else:
            assert target.npu is not None
            priced = regions[region.name] = region_cost(programs[region.name], target)
            layers += [*_npu_layers(region, priced, engines, names), _hand_over(region, target.npu)]
            peak, npu_cycles = max(peak, priced.peak_scratchpad), npu_cycles + priced.cycles
    return Costs(tuple(layers), _totals(layers, target, npu_cycles, peak, weights), regions)


# --- rows -----------------------------------------------------------------------------------------------------


def _host_layer(node: ir.Node, target: Target, layer: str) -> LayerReport:
    facts = facts_of_integer(node)
    macs = multiplications(node, facts)
    reads = [value for value in node.inputs if value is not None]
    computed = [value for value in reads if const_of(value) is None]
    elements = max(element_count(shape_of(value)) for value in (*computed, *node.outputs))
    moved = sum(tensor_bytes(value) for value in (*reads, *node.outputs))
    if is_op(node, *VIEWS):
        elements = moved = 0
    priced = host_cost(target.host, precision=facts.precision, macs=macs, elements=elements, transferred=moved)
    cycles = priced.seconds * target.host.clock
    peak = host_rate(target.host, facts.precision) * target.host.threads
    return LayerReport(
        layer=layer,
        node=_name(node),
        op=facts.op,
        backend="cpu",
        engine="cpu",
        macs=macs,
        cycles=cycles,
        seconds=priced.seconds,
        utilisation=macs / (cycles * peak) if macs else None,
        traffic={},
        bound="compute",
        energy=priced.energy * PICO,
    )


def _npu_layers(
    region: Region, priced: RegionCost, engines: Mapping[str, str], names: Mapping[str, str]
) -> list[LayerReport]:
    rows: list[LayerReport] = []
    for layer in priced.layers:
        node = region.nodes[layer.index] if layer.index >= 0 else None
        rows.append(
            LayerReport(
                layer=names[_name(node)] if node is not None else region.name,
                node=_name(node) if node is not None else region.name,
                op=facts_of_integer(node).op if node is not None else "prologue",
                backend="npu",
                engine=engines[_name(node)] if node is not None else "",
                macs=layer.macs,
                cycles=layer.cycles,
                seconds=layer.cycles / priced.clock,
                utilisation=layer.utilisation if layer.macs else None,
                traffic=_moved(layer.traffic),
                bound=layer.bound_by,
                energy=layer.energy.total * PICO,
            )
        )
    return rows


def _hand_over(region: Region, npu: Npu) -> LayerReport:
    moved = sum(tensor_bytes(value) for value in (*region.inputs, *region.outputs))
    priced = crossing_cost(npu, moved)
    return LayerReport(
        layer=region.name,
        node=region.name,
        op=HAND_OVER,
        backend="npu",
        engine="",
        macs=0,
        cycles=priced.seconds * npu.clock,
        seconds=priced.seconds,
        utilisation=None,
        traffic={npu.memory_name("external"): moved},
        bound="",
        energy=priced.energy * PICO,
    )


def _totals(layers: Sequence[LayerReport], target: Target, npu_cycles: float, peak: int, weights: int) -> Totals:
    latency = sum(layer.seconds for layer in layers)
    traffic: Counter[str] = Counter()
    for layer in layers:
        traffic.update(layer.traffic)
    # The rows of the accelerator hold its idle power while it works; it goes on while the host works.
    waiting = sum(layer.seconds for layer in layers if layer.backend == "cpu" or layer.op == HAND_OVER)
    idle = waiting * target.npu.idle_power if target.npu is not None else 0.0
    return Totals(
        latency=latency,
        npu_cycles=npu_cycles,
        macs=sum(layer.macs for layer in layers),
        npu_macs=sum(layer.macs for layer in layers if layer.backend == "npu"),
        traffic=dict(traffic),
        peak_sram=peak,
        sram=target.npu.scratchpad.size if target.npu is not None else 0,
        weights=weights,
        energy=sum(layer.energy for layer in layers) + idle,
    )


def _moved(traffic: Iterable[Traffic]) -> dict[str, int]:
    return {entry.memory: entry.read + entry.written for entry in traffic}


def _name(node: ir.Node) -> str:
    assert node.name, "every node is named"
    return node.name
