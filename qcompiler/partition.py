"""Decide which operator runs where, and cut the integer graph into regions.

An operator can run on every accelerator of which a rule takes it (and the backend, asked through `can_run`, agrees),
and on the CPU. `partition_search` chooses, by what operators and hand-overs are estimated to take. An operator left to
the CPU carries the reason: an accelerator's refusal, or what running it there would cost. What other backends would
take stands beside every choice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.integer.facts import facts_of_integer
from qcompiler.partition_cost import accelerator_seconds, host_seconds, inward_seconds, tensor_bytes
from qcompiler.partition_search import Crossing, Placing, Problem, components, moved, search
from qcompiler.regions import Region, cut
from qcompiler.simulator.cost import crossing_cost
from qcompiler.target import AcceleratorName, Backend, OpFacts, Refusal, Target, joined_reasons


@dataclass(frozen=True)
class Alternative:
    """Another backend for an operator."""

    backend: Backend
    seconds: float | None
    """What it would take there, hand-overs apart; None if it cannot run there."""
    refusal: str | None
    """Why it cannot."""


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
    """Why no accelerator runs it; None where one does, or where there is none."""
    seconds: float = 0.0
    """What it takes by the estimate that placed it."""
    alternatives: tuple[Alternative, ...] = ()
    """All other backends of the target."""


@dataclass(frozen=True)
class RegionCost:
    """What a region takes by the estimates that placed it, its hand-over included."""

    seconds: float
    elsewhere: Mapping[Backend, float]
    """The same with all of it on another backend that can run it whole, where the graph around stays as it is."""


@dataclass(frozen=True)
class Partition:
    regions: tuple[Region, ...]
    """In execution order; no cycles between them."""
    placements: tuple[Placement, ...]
    """One per node, in graph order."""
    costs: tuple[RegionCost, ...] = ()
    """One per region."""


CanRun = Callable[[ir.Node, AcceleratorName], str | None]
"""Why an accelerator's backend cannot run an operator that a rule takes, or None if it can."""


def partition(
    model: ir.Model, target: Target, *, can_run: CanRun | None = None, keep_islands: bool = False
) -> Partition:
    """Place every node of an integer graph and cut the graph into regions.

    Args:
        model: the realized graph, after the layout passes.
        target: its rules say what can run where, its costs what is best. Without an accelerator there is one CPU
            region.
        can_run: the refusal of an accelerator's backend, asked after a rule has matched.
        keep_islands: use the first accelerator that can run an operator, even where that costs more than it saves.
    """
    judged = {node: _judge(node, target, can_run) for node in model.graph}
    items = tuple(judged.values())
    problem = Problem(tuple(judged), tuple(item.seconds for item in items), _crossings(target))
    eager: Placing = tuple(next(iter(item.seconds)) for item in items)
    placing = eager if keep_islands else search(problem, (eager,))
    reasons = _Reasons(problem, placing, items)
    placements = tuple(
        item.placed(backend, reasons.of(index))
        for index, (item, backend) in enumerate(zip(items, placing, strict=True))
    )
    regions = cut(dict(zip(judged, placing, strict=True)))
    return Partition(regions, placements, _region_costs(problem, placing, regions))


def _region_costs(problem: Problem, placing: Placing, regions: Sequence[Region]) -> tuple[RegionCost, ...]:
    position, total = {node: index for index, node in enumerate(problem.nodes)}, problem.total(placing)
    found: list[RegionCost] = []
    for region in regions:
        members = [position[node] for node in region.nodes]
        spent = sum(problem.seconds[node][region.backend] for node in members)
        if region.backend != "cpu":
            moved_bytes = sum(tensor_bytes(value) for value in (*region.inputs, *region.outputs))
            spent += problem.crossings[region.backend].seconds(moved_bytes)
        others: tuple[Backend, ...] = (*problem.crossings, "cpu")
        elsewhere: dict[Backend, float] = {}
        for other in others:
            if other != region.backend and all(other in problem.seconds[node] for node in members):
                elsewhere[other] = max(0.0, spent + problem.total(moved(placing, members, other)) - total)
        found.append(RegionCost(spent, elsewhere))
    return tuple(found)


def _crossings(target: Target) -> dict[AcceleratorName, Crossing]:
    found: dict[AcceleratorName, Crossing] = {}
    for name, unit in target.accelerators.items():
        sync = crossing_cost(unit, 0).seconds
        found[name] = Crossing(sync, crossing_cost(unit, 1).seconds - sync + inward_seconds(unit))
    return found


# --- what can run where -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judged:
    node: str
    facts: OpFacts
    engines: Mapping[Backend, str]
    """By the backends that can run it, accelerators first."""
    precisions: Mapping[Backend, str]
    """In which it is computed there."""
    seconds: Mapping[Backend, float]
    """What it takes there."""
    refusals: Mapping[AcceleratorName, str]

    def placed(self, backend: Backend, reason: str | None) -> Placement:
        others = [Alternative(name, seconds, None) for name, seconds in self.seconds.items() if name != backend]
        others += [Alternative(name, None, refusal) for name, refusal in self.refusals.items()]
        return Placement(
            self.node, self.facts.op, backend, self.engines[backend], self.precisions[backend], reason,
            self.seconds[backend], tuple(others),
        )  # fmt: skip


def _judge(node: ir.Node, target: Target, can_run: CanRun | None) -> _Judged:
    facts = facts_of_integer(node)
    assert node.name, "every node is named"
    engines: dict[Backend, str] = {}
    precisions: dict[Backend, str] = {"cpu": facts.precision}
    seconds: dict[Backend, float] = {}
    refusals: dict[AcceleratorName, str] = {}
    for name, unit in target.accelerators.items():
        match = target.match_on(name, facts)
        if isinstance(match, Refusal):
            refusals[name] = match.reason
        elif can_run is not None and (reason := can_run(node, name)) is not None:
            refusals[name] = reason
        else:
            engines[name] = match.engine
            precisions[name] = facts.among(match.rule.precisions) or facts.precision
            seconds[name] = accelerator_seconds(node, facts, match.engine, unit)
    engines["cpu"], seconds["cpu"] = "cpu", host_seconds(node, facts, target)
    return _Judged(node.name, facts, engines, precisions, seconds, refusals)


# --- reasons ------------------------------------------------------------------------------------------------


class _Reasons:
    """Why operators are on the CPU."""

    def __init__(self, problem: Problem, placing: Placing, items: Sequence[_Judged]) -> None:
        self.problem, self.placing, self.items = problem, placing, items
        self.total = problem.total(placing)
        self.islands: dict[tuple[int, AcceleratorName], tuple[int, ...]] = {}
        """The operators on the CPU that an accelerator could run together with one of them."""
        for name in problem.crossings:
            able = {node for node, seconds in enumerate(problem.seconds) if placing[node] == "cpu" and name in seconds}
            for group in components(problem, able, placing):
                self.islands |= {(node, name): group for node in group}

    def of(self, node: int) -> str | None:
        if self.placing[node] != "cpu":
            return None
        item = self.items[node]
        reasons: dict[AcceleratorName, str] = {
            name: item.refusals[name] if name in item.refusals else self._cost(node, name)
            for name in self.problem.crossings
        }
        return joined_reasons(reasons) if reasons else None

    def _cost(self, node: int, name: AcceleratorName) -> str:
        there, here = self.items[node].seconds[name], self.items[node].seconds["cpu"]
        if there >= here:
            return f"supported, but takes {_micro(there)} there and {_micro(here)} on the CPU beside it"
        for group in (self.islands[node, name], (node,)):
            saving = sum(self.items[member].seconds["cpu"] - self.items[member].seconds[name] for member in group)
            if saving > 0:
                break
        crossing = self.problem.total(moved(self.placing, group, name)) - self.total + saving
        return f"supported, but crossing costs {_micro(crossing)} and saves {_micro(saving)}"


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} µs"
