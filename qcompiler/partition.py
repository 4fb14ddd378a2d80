"""Decide which operator runs where, and cut the integer graph into regions.

An operator runs on the first accelerator of which a rule takes it (and the backend, asked through `can_run`,
agrees), else on the CPU, with the reason.

An island on the accelerator that costs more to reach than it saves goes back to the CPU, and so does an operator at
the edge of a region that the CPU runs faster, such as the transpose of an NCHW input.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompiler.graph import const_of
from qcompiler.integer.facts import facts_of_integer
from qcompiler.partition_cost import accelerator_seconds, host_seconds, tensor_bytes
from qcompiler.regions import Region, border, cut, predecessors
from qcompiler.simulator.cost import crossing_cost
from qcompiler.target import AcceleratorName, Backend, OpFacts, Refusal, Target, joined_reasons


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
class Partition:
    regions: tuple[Region, ...]
    """In execution order; no cycles between them."""
    placements: tuple[Placement, ...]
    """One per node, in graph order."""


CanRun = Callable[[ir.Node, AcceleratorName], str | None]
"""Why an accelerator's backend cannot run an operator that a rule takes, or None if it can."""

_CPU = "cpu"


def partition(
    model: ir.Model, target: Target, *, can_run: CanRun | None = None, keep_islands: bool = False
) -> Partition:
    """Place every node of an integer graph and cut the graph into regions.

    Args:
        model: the realized graph, after the layout passes.
        target: its rules place operators; its costs judge islands. Without an accelerator there is one CPU region.
        can_run: the refusal of an accelerator's backend, asked after a rule has matched.
        keep_islands: leave islands on the accelerator even where crossing costs more than it saves.
    """
    judged = {node: _judge(node, target, can_run) for node in model.graph}
    if not keep_islands:
        while (island := _worst_island(judged, target)) is not None:
            judged.update({node: _give_back(judged[node], island) for node in island.nodes})
        while (edge := _losing_edge(judged, target)) is not None:
            judged.update(edge)
    placements = tuple(item.placement for item in judged.values())
    return Partition(_cut(judged), placements)


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
    reasons: dict[AcceleratorName, str] = {}
    for name in target.accelerators:
        match = target.match_on(name, facts)
        if isinstance(match, Refusal):
            reasons[name] = match.reason
        elif can_run is not None and (reason := can_run(node, name)) is not None:
            reasons[name] = reason
        else:
            return _Judged(facts, replace(on_cpu, backend=name, engine=match.engine))
    return _Judged(facts, replace(on_cpu, reason=joined_reasons(reasons) if reasons else None))


def _cut(judged: Mapping[ir.Node, _Judged]) -> tuple[Region, ...]:
    return cut({node: item.backend for node, item in judged.items()})


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


def _worst_island(judged: Mapping[ir.Node, _Judged], target: Target) -> _Island | None:
    """The island that loses most, or None if none loses."""
    losing: list[_Island] = []
    for region in _cut(judged):
        if region.backend != "cpu":
            groups = _components(region.nodes)
            losing += [
                island
                for nodes in groups
                if (island := _island(nodes, judged, target, region.backend, alone=len(groups) == 1)).loss > 0
            ]
    return max(losing, key=lambda island: island.loss, default=None)


def _island(
    nodes: tuple[ir.Node, ...],
    judged: Mapping[ir.Node, _Judged],
    target: Target,
    backend: AcceleratorName,
    *,
    alone: bool,
) -> _Island:
    """Price a component; one that shares its region with others shares their synchronization too."""
    unit = target.accelerators[backend]
    inputs, outputs = border(nodes)
    by_others = [
        value for value in inputs if (made_by := value.producer()) is None or judged[made_by].backend != backend
    ]
    to_others = [
        value
        for value in outputs
        if value.is_graph_output() or any(judged[use.node].backend != backend for use in value.uses())
    ]
    crossing = crossing_cost(unit, sum(tensor_bytes(value) for value in (*by_others, *to_others))).seconds
    if not alone:
        crossing -= crossing_cost(unit, 0).seconds
    saving = sum(
        host_seconds(node, judged[node].facts, target)
        - accelerator_seconds(node, judged[node].facts, judged[node].placement.engine, unit)
        for node in nodes
    )
    return _Island(nodes, crossing, saving)


def _losing_edge(judged: Mapping[ir.Node, _Judged], target: Target) -> dict[ir.Node, _Judged] | None:
    """The first operator that the CPU could run before or after its region, faster, with what crosses counted."""
    for node, item in judged.items():
        if item.backend == "cpu":
            continue
        unit = target.accelerators[item.backend]
        before = [value for value in node.inputs if value is not None and const_of(value) is None]
        first = all((made_by := value.producer()) is None or judged[made_by].backend == "cpu" for value in before)
        last = all(judged[use.node].backend == "cpu" for value in node.outputs for use in value.uses())
        if first == last:  # inside its region, or an island of its own, which is judged as such
            continue
        grown = sum(map(tensor_bytes, node.outputs)) - sum(map(tensor_bytes, before))
        crossing = (grown if first else -grown) / unit.crossing.bandwidth.per_cycle(unit.clock) / unit.clock
        there = accelerator_seconds(node, item.facts, item.placement.engine, unit)
        here = host_seconds(node, item.facts, target) + crossing
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
        for made_by in predecessors(node):
            if made_by in leader:
                leader[find(node)] = find(made_by)
    groups: dict[ir.Node, list[ir.Node]] = {}
    for node in nodes:
        groups.setdefault(find(node), []).append(node)
    return [tuple(group) for group in groups.values()]
