"""Decide which operator runs where, and cut the integer graph into regions.

An operator runs on the accelerator if a rule of the target takes it (and the backend, asked through `can_run`,
agrees), else on the CPU, with the reason. Regions come from levels: an operator's level is that of its
inputs, or the next one where the backend changes. So every edge stays in its region or leads to a later
one, which rules out cycles; and every region reads from the one before it, so that merging two of one backend would
make a cycle with what lies between.

An island on the accelerator that costs more to reach than it saves goes back to the CPU, and so does an operator at
the edge of a region that the CPU runs faster, such as the transpose of an NCHW input.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from qcompiler.graph import const_of
from qcompiler.integer.facts import facts_of_integer
from qcompiler.partition_cost import host_seconds, npu_seconds, tensor_bytes
from qcompiler.simulator.cost import crossing_cost
from qcompiler.target import Npu, OpFacts, Refusal, Target

Backend = Literal["cpu", "npu"]


@dataclass(frozen=True)
class Placement:
    """Where one operator runs and why."""

    node: str
    op: str
    """The ONNX name a rule knows it by."""
    backend: Backend
    engine: str
    precision: str
    reason: str | None
    """Why the accelerator does not run it; None where it does, or where there is none."""


@dataclass(frozen=True)
class Region:
    """Operators one backend runs without a break."""

    name: str
    backend: Backend
    nodes: tuple[ir.Node, ...]
    """In execution order."""
    inputs: tuple[ir.Value, ...]
    """Values from outside that are not constants."""
    outputs: tuple[ir.Value, ...]
    """Values read outside, graph outputs included."""


@dataclass(frozen=True)
class Partition:
    regions: tuple[Region, ...]
    """In execution order; no cycles between them."""
    placements: tuple[Placement, ...]
    """One per node, in graph order."""


CanRun = Callable[[ir.Node], str | None]
"""Why a backend cannot run an operator that a rule takes, or None if it can."""

_CPU = "cpu"


def partition(
    model: ir.Model, target: Target, *, can_run: CanRun | None = None, keep_islands: bool = False
) -> Partition:
    """Place every node of an integer graph and cut the graph into regions.

    Args:
        model: the realized graph, after the layout passes.
        target: its rules place operators; its costs judge islands. Without an accelerator there is one CPU region.
        can_run: the accelerator backend's own refusal, asked after a rule has matched.
        keep_islands: leave islands on the accelerator even where crossing costs more than it saves.
    """
    judged = {node: _judge(node, target, can_run) for node in model.graph}
    if target.npu is not None and not keep_islands:
        while (island := _worst_island(judged, target, target.npu)) is not None:
            judged.update({node: _give_back(judged[node], island) for node in island.nodes})
        while (edge := _losing_edge(judged, target, target.npu)) is not None:
            judged.update(edge)
    placements = tuple(item.placement for item in judged.values())
    return Partition(_regions(judged), placements)


# --- placing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judged:
    facts: OpFacts
    placement: Placement

    @property
    def backend(self) -> Backend:
        return self.placement.backend


def _judge(node: ir.Node, target: Target, can_run: CanRun | None) -> _Judged:
    facts = facts_of_integer(node)
    assert node.name, "every node is named"
    on_cpu = Placement(node.name, facts.op, "cpu", _CPU, facts.precision, None)
    if target.npu is None:
        return _Judged(facts, on_cpu)
    match = target.match(facts)
    if isinstance(match, Refusal):
        return _Judged(facts, replace(on_cpu, reason=match.reason))
    reason = can_run(node) if can_run is not None else None
    if reason is not None:
        return _Judged(facts, replace(on_cpu, reason=reason))
    return _Judged(facts, replace(on_cpu, backend="npu", engine=match.engine))


# --- regions ------------------------------------------------------------------------------------------------


def _levels(judged: Mapping[ir.Node, _Judged]) -> dict[ir.Node, int]:
    """Even levels are the CPU's, odd ones the accelerator's. Each level but the first reads from the one before."""
    levels: dict[ir.Node, int] = {}
    for node, item in judged.items():
        own = 0 if item.backend == "cpu" else 1
        before = [levels[made_by] for made_by in _predecessors(node)]
        latest = max(before, default=own)
        levels[node] = latest if latest % 2 == own else latest + 1
    if not any(levels[node] == 1 and levels[made_by] == 0 for node in levels for made_by in _predecessors(node)):
        # CPU operators that the first accelerator region does not wait for run after it, with those that follow it.
        return {node: level or 2 for node, level in levels.items()}
    return levels


def _regions(judged: Mapping[ir.Node, _Judged]) -> tuple[Region, ...]:
    levels = _levels(judged)
    by_level: dict[int, list[ir.Node]] = {}
    for node, level in levels.items():
        by_level.setdefault(level, []).append(node)
    regions: list[Region] = []
    for level in sorted(by_level):
        backend: Backend = "npu" if level % 2 else "cpu"
        inputs, outputs = _border(by_level[level])
        regions.append(Region(f"{backend}_{len(regions)}", backend, tuple(by_level[level]), inputs, outputs))
    return tuple(regions)


def _border(nodes: Iterable[ir.Node]) -> tuple[tuple[ir.Value, ...], tuple[ir.Value, ...]]:
    """Values that come in (constants aside) and go out, each once, in order."""
    inside = dict.fromkeys(nodes)
    inputs = [
        value
        for node in inside
        for value in node.inputs
        if value is not None and const_of(value) is None and value.producer() not in inside
    ]
    outputs = [
        value
        for node in inside
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in inside for use in value.uses())
    ]
    return tuple(dict.fromkeys(inputs)), tuple(dict.fromkeys(outputs))


def _predecessors(node: ir.Node) -> list[ir.Node]:
    makers = [value.producer() for value in node.inputs if value is not None]
    return [made_by for made_by in makers if made_by is not None]


# --- islands ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Island:
    """Connected accelerator operators of one region."""

    nodes: tuple[ir.Node, ...]
    crossing: float
    """Seconds to hand it over and back."""
    saving: float
    """Seconds the accelerator is faster."""

    @property
    def loss(self) -> float:
        return self.crossing - self.saving


def _give_back(item: _Judged, island: _Island) -> _Judged:
    crossing, saving = (f"{seconds * 1e6:.1f} µs" for seconds in (island.crossing, max(island.saving, 0.0)))
    reason = f"supported, but crossing costs {crossing} and saves {saving}"
    return replace(item, placement=replace(item.placement, backend="cpu", engine=_CPU, reason=reason))


def _worst_island(judged: Mapping[ir.Node, _Judged], target: Target, npu: Npu) -> _Island | None:
    """The island that loses most, or None if none loses."""
    losing: list[_Island] = []
    for region in _regions(judged):
        if region.backend == "npu":
            groups = _components(region.nodes)
            losing += [
                island
                for nodes in groups
                if (island := _island(nodes, judged, target, npu, alone=len(groups) == 1)).loss > 0
            ]
    return max(losing, key=lambda island: island.loss, default=None)


def _island(
    nodes: tuple[ir.Node, ...], judged: Mapping[ir.Node, _Judged], target: Target, npu: Npu, *, alone: bool
) -> _Island:
    """Price a component; one that shares its region with others shares their synchronization too."""
    inputs, outputs = _border(nodes)
    by_host = [value for value in inputs if (made_by := value.producer()) is None or judged[made_by].backend == "cpu"]
    to_host = [
        value
        for value in outputs
        if value.is_graph_output() or any(judged[use.node].backend == "cpu" for use in value.uses())
    ]
    crossing = crossing_cost(npu, sum(tensor_bytes(value) for value in (*by_host, *to_host))).seconds
    if not alone:
        crossing -= crossing_cost(npu, 0).seconds
    saving = sum(
        host_seconds(node, judged[node].facts, target, npu)
        - npu_seconds(node, judged[node].facts, judged[node].placement.engine, npu)
        for node in nodes
    )
    return _Island(nodes, crossing, saving)


def _losing_edge(judged: Mapping[ir.Node, _Judged], target: Target, npu: Npu) -> dict[ir.Node, _Judged] | None:
    """The first operator that the CPU could run before or after its region, faster, with what crosses counted."""
    for node, item in judged.items():
        if item.backend == "cpu":
            continue
        before = [value for value in node.inputs if value is not None and const_of(value) is None]
        first = all((made_by := value.producer()) is None or judged[made_by].backend == "cpu" for value in before)
        last = all(judged[use.node].backend == "cpu" for value in node.outputs for use in value.uses())
        if first == last:  # inside its region, or an island of its own, which is judged as such
            continue
        grown = sum(map(tensor_bytes, node.outputs)) - sum(map(tensor_bytes, before))
        crossing = (grown if first else -grown) / npu.crossing.bandwidth.per_cycle(npu.clock) / npu.clock
        there = npu_seconds(node, item.facts, item.placement.engine, npu)
        here = host_seconds(node, item.facts, target, npu) + crossing
        if here < there:
            reason = f"supported, but takes {there * 1e6:.1f} µs there and {here * 1e6:.1f} µs on the CPU beside it"
            placement = replace(item.placement, backend="cpu", engine=_CPU, reason=reason)
            return {node: replace(item, placement=placement)}
    return None


def _components(nodes: tuple[ir.Node, ...]) -> list[tuple[ir.Node, ...]]:
    """Connected parts, each in execution order."""
    leader = {node: node for node in nodes}

    def find(node: ir.Node) -> ir.Node:
        while leader[node] is not node:
            leader[node] = leader[leader[node]]
            node = leader[node]
        return node

    for node in nodes:
        for made_by in _predecessors(node):
            if made_by in leader:
                leader[find(node)] = find(made_by)
    groups: dict[ir.Node, list[ir.Node]] = {}
    for node in nodes:
        groups.setdefault(find(node), []).append(node)
    return [tuple(group) for group in groups.values()]
