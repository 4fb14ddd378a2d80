"""What one inference costs: the accelerator's command words priced, the host's operators estimated."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompiler.backends.npu import NpuProgram, words
from qcompiler.backends.npu_cascade_loops import Cascade
from qcompiler.graph import const_of, element_count, is_op, shape_of
from qcompiler.integer.facts import facts_of_integer
from qcompiler.partition import Partition, Region
from qcompiler.partition_cost import accelerator_seconds, multiplications, tensor_bytes
from qcompiler.report import AcceleratorTotals, CascadedLayer, CascadeReport, LayerReport, Totals
from qcompiler.simulator.cost import RegionCost, Traffic, crossing_cost, host_cost, host_rate, price
from qcompiler.target import Gpu, Npu, Target

PICO = 1e-12
HAND_OVER = "hand-over"
"""What the cost table calls giving a region to the accelerator and taking its results back."""

GPU_MEMORY = "gpu memory"
"""What the cost table calls the memory of a GPU."""

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
"""Nothing to run: the same bytes under another shape."""


@dataclass(frozen=True)
class Costs:
    """The rows of the cost table, in execution order, and their sum."""

    layers: tuple[LayerReport, ...]
    totals: Totals
    regions: Mapping[str, RegionCost]
    """Of the accelerator, by name: the commands behind the rows."""
    cascades: tuple[CascadeReport, ...] = ()


def region_cost(program: NpuProgram, target: Target) -> RegionCost:
    """The command words of one region of `target.npu`, priced."""
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
    cascades: list[CascadeReport] = []
    peak = npu_cycles = 0
    engines = {placement.node: placement.engine for placement in partition.placements}
    for region in partition.regions:
        if region.backend == "cpu":
            layers += [_host_layer(node, target, names[_name(node)]) for node in region.nodes]
            continue
        unit = target.accelerators[region.backend]
        if isinstance(unit, Gpu):
            layers += [_gpu_layer(node, unit, engines[_name(node)], names[_name(node)]) for node in region.nodes]
        else:
            priced = region_cost(programs[region.name], target.alone(region.backend))
            regions[region.name] = priced
            cascades += [_cascade(region, cascade, names) for cascade in programs[region.name].cascades]
            layers += _npu_layers(region, priced, engines, names)
            peak, npu_cycles = max(peak, priced.peak_scratchpad), npu_cycles + priced.cycles
        layers.append(_hand_over(region, unit))
    totals = _totals(layers, target, npu_cycles, peak, weights)
    if len(target.accelerators) > 1 or target.gpu is not None:
        totals = replace(totals, accelerators=_by_accelerator(partition, layers, regions, target))
    return Costs(tuple(layers), totals, regions, tuple(cascades))


def _by_accelerator(
    partition: Partition, layers: Sequence[LayerReport], priced: Mapping[str, RegionCost], target: Target
) -> tuple[AcceleratorTotals, ...]:
    found: list[AcceleratorTotals] = []
    for name, unit in target.accelerators.items():
        own = [layer for layer in layers if layer.backend == name]
        regions = [region for region in partition.regions if region.backend == name]
        peaks = [priced[region.name].peak_scratchpad for region in regions if region.name in priced]
        found.append(
            AcceleratorTotals(
                name=name,
                operators=sum(len(region.nodes) for region in regions),
                regions=len(regions),
                seconds=sum(layer.seconds for layer in own),
                cycles=sum(layer.cycles for layer in own if layer.op != HAND_OVER),
                macs=sum(layer.macs for layer in own),
                peak_scratchpad=max(peaks, default=0),
                scratchpad=0 if isinstance(unit, Gpu) else unit.scratchpad.size,
            )
        )
    return tuple(found)


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
                backend=region.backend,
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


def _cascade(region: Region, cascade: Cascade, names: Mapping[str, str]) -> CascadeReport:
    plan = cascade.plan
    layers: list[CascadedLayer] = []
    for stage, placed in zip(plan.stages, cascade.works, strict=True):
        name, height = _name(region.nodes[stage.step]), placed.work.ofm[1]
        layers.append(
            CascadedLayer(
                layer=names[name],
                node=name,
                stripe=plan.rows_at_once(stage),
                height=height,
                buffer=min(plan.rolls[stage.ofm].rows, height) if stage.ofm >= 0 else None,
                weights=stage.keep if stage.streams else "",
            )
        )
    return CascadeReport(region.name, plan.stripes, sum(roll.size for roll in plan.rolls), tuple(layers))


def _gpu_layer(node: ir.Node, gpu: Gpu, engine: str, layer: str) -> LayerReport:
    """One kernel, estimated: kernels leave no log to price."""
    facts = facts_of_integer(node)
    macs, seconds = multiplications(node, facts), accelerator_seconds(node, facts, engine, gpu)
    moved = sum(tensor_bytes(value) for value in (*node.inputs, *node.outputs) if value is not None) if seconds else 0
    rates = gpu.engines[engine].precisions
    precision = facts.among(rates)
    rate = None if precision is None else rates[precision]
    picojoules = macs * rate.energy if rate is not None else 0.0
    picojoules += moved * (gpu.memory.energy.read + gpu.memory.energy.write) / 2
    busy = macs / rate.rate / gpu.clock if rate is not None else 0.0
    moving = moved / gpu.memory.bandwidth.per_cycle(gpu.clock) / gpu.clock
    return LayerReport(
        layer=layer,
        node=_name(node),
        op=facts.op,
        backend="gpu",
        engine=engine,
        macs=macs,
        cycles=seconds * gpu.clock,
        seconds=seconds,
        utilisation=busy / seconds if macs else None,
        traffic={GPU_MEMORY: moved},
        bound=GPU_MEMORY if moving >= busy else "compute",
        energy=picojoules * PICO + gpu.idle_power * seconds,
    )


def _hand_over(region: Region, unit: Npu | Gpu) -> LayerReport:
    moved = sum(tensor_bytes(value) for value in (*region.inputs, *region.outputs))
    priced = crossing_cost(unit, moved)
    return LayerReport(
        layer=region.name,
        node=region.name,
        op=HAND_OVER,
        backend=region.backend,
        engine="",
        macs=0,
        cycles=priced.seconds * unit.clock,
        seconds=priced.seconds,
        utilisation=None,
        traffic={GPU_MEMORY if isinstance(unit, Gpu) else unit.memory_name("external"): moved},
        bound="",
        energy=priced.energy * PICO,
    )


def _totals(layers: Sequence[LayerReport], target: Target, npu_cycles: float, peak: int, weights: int) -> Totals:
    latency = sum(layer.seconds for layer in layers)
    traffic: Counter[str] = Counter()
    for layer in layers:
        traffic.update(layer.traffic)
    # An accelerator's rows hold its idle power while it works; it goes on while others work.
    idle = sum(
        unit.idle_power * sum(layer.seconds for layer in layers if layer.backend != name or layer.op == HAND_OVER)
        for name, unit in target.accelerators.items()
    )
    driven = [unit for unit in target.accelerators.values() if isinstance(unit, Npu)]
    return Totals(
        latency=latency,
        npu_cycles=npu_cycles,
        macs=sum(layer.macs for layer in layers),
        npu_macs=sum(layer.macs for layer in layers if layer.backend != "cpu"),
        traffic=dict(traffic),
        peak_sram=peak,
        sram=max((unit.scratchpad.size for unit in driven), default=0),
        weights=weights,
        energy=sum(layer.energy for layer in layers) + idle,
    )


def _moved(traffic: Iterable[Traffic]) -> dict[str, int]:
    return {entry.memory: entry.read + entry.written for entry in traffic}


def _name(node: ir.Node) -> str:
    assert node.name, "every node is named"
    return node.name
