"""What one inference costs: the accelerator's command words priced, the host's operators estimated."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.graph import const_of, data_input, dtype_of, element_count, integer, is_op, shape_of
from qcompiler.integer.facts import facts_of_integer
from qcompiler.partition import Partition, Region
from qcompiler.report import LayerReport, Totals
from qcompiler.simulator.cost import RegionCost, Traffic, crossing_cost, host_cost, price
from qcompiler.target import Npu, Target

PICO = 1e-12
HAND_OVER = "hand-over"
"""What the cost table calls giving a region to the accelerator and taking its results back."""

_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
"""Nothing to run: the same bytes under another shape."""


@dataclass(frozen=True)
class Costs:
    """The rows of the cost table, in execution order, and their sum."""

    layers: tuple[LayerReport, ...]
    totals: Totals


def cost(partition: Partition, target: Target, weights: int) -> Costs:
    """Price every region, without running anything.

    Args:
        partition: of the integer graph.
        target: where it runs.
        weights: bytes of constants.
    """
    from qcompiler.backends import npu

    layers: list[LayerReport] = []
    peak = 0
    npu_cycles = 0
    for region in partition.regions:
        if region.backend == "cpu":
            layers += [_host_layer(node, target) for node in region.nodes]
        else:
            assert target.npu is not None
            priced = price(npu.words(region, target), target)
            layers += [*_npu_layers(region, priced, target), _hand_over(region, target.npu)]
            peak, npu_cycles = max(peak, priced.scratchpad_top), npu_cycles + priced.cycles
    return Costs(tuple(layers), _totals(layers, target, npu_cycles, peak, weights))


def macs_of(node: ir.Node) -> int:
    """Multiply-accumulates of one node, integer or float; padding counts as if it were multiplied."""
    op = node.op_type.removeprefix("Q")
    if op == "Conv":
        return element_count(shape_of(node.outputs[0])) * element_count(shape_of(data_input(node, 1))[1:])
    if op == "ConvTranspose":
        x, weights = shape_of(data_input(node, 0)), shape_of(data_input(node, 1))
        channels = x[-1] if node.op_type == "QConvTranspose" else x[1]
        return element_count(x) // channels * element_count(weights)
    if op in ("Gemm", "MatMul"):
        x = shape_of(data_input(node, 0))
        transposed = is_op(node, "Gemm") and integer(node, "transA", 0)
        return element_count(shape_of(node.outputs[0])) * (x[0] if transposed else x[-1])
    return 0


# --- rows -----------------------------------------------------------------------------------------------------


def _host_layer(node: ir.Node, target: Target) -> LayerReport:
    facts, macs = facts_of_integer(node), macs_of(node)
    reads = [value for value in node.inputs if value is not None]
    written = [value for value in node.outputs if value.shape is not None]
    elements = max(_elements(written), _elements(value for value in reads if const_of(value) is None))
    moved = _bytes((*reads, *written))
    if is_op(node, *_VIEWS):
        elements = moved = 0
    priced = host_cost(target.host, precision=facts.precision, macs=macs, elements=elements, transferred=moved)
    cycles = priced.seconds * target.host.clock
    rates = target.host.rates()
    peak = rates.get(facts.precision, rates["float32"]) * target.host.threads
    return LayerReport(
        layer=node.name or "",
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


def _npu_layers(region: Region, priced: RegionCost, target: Target) -> list[LayerReport]:
    rows: list[LayerReport] = []
    for layer in priced.layers:
        node = region.nodes[layer.index] if layer.index >= 0 else None
        rows.append(
            LayerReport(
                layer=node.name or "" if node is not None else region.name,
                op=facts_of_integer(node).op if node is not None else "prologue",
                backend="npu",
                engine=_engine(node, target) if node is not None else "",
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
    moved = _bytes((*region.inputs, *region.outputs))
    priced = crossing_cost(npu, moved)
    return LayerReport(
        layer=region.name,
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


def _engine(node: ir.Node, target: Target) -> str:
    from qcompiler.target import Match

    match = target.match(facts_of_integer(node))
    assert isinstance(match, Match), f"{node.name} is in an accelerator region though no rule takes it"
    return match.engine


def _moved(traffic: Iterable[Traffic]) -> dict[str, int]:
    return {entry.memory: entry.read + entry.written for entry in traffic}


def _elements(values: Iterable[ir.Value]) -> int:
    return sum(element_count(shape_of(value)) for value in values)


def _bytes(values: Iterable[ir.Value]) -> int:
    return sum(element_count(shape_of(value)) * dtype_of(value).itemsize for value in values)
