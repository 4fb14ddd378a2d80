"""Cut a graph whose nodes are placed into regions: operators that one backend runs without a break.

Regions are found by running the graph: one backend executes all it can reach, then another. So every edge
stays in its region or leads to a later one, which rules out cycles. A backend that could run more if another ran first
waits for it, which keeps regions large and few; with two backends no two regions could be merged without a cycle.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.graph import const_of
from qcompiler.target import Backend

ORDER: tuple[Backend, ...] = ("npu", "dsp", "gpu", "cpu")
"""Who goes first of those who need not wait."""


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


def cut(backends: Mapping[ir.Node, Backend]) -> tuple[Region, ...]:
    """The regions, in execution order.

    Args:
        backends: where each node runs; in graph order.
    """
    nodes = list(backends)
    regions: list[Region] = []
    for number, (backend, members) in enumerate(runs(makers_of(nodes), list(backends.values()))):
        inside = tuple(nodes[index] for index in members)
        regions.append(Region(f"{backend}_{number}", backend, inside, *border(inside)))
    return tuple(regions)


def makers_of(nodes: Sequence[ir.Node]) -> tuple[tuple[int, ...], ...]:
    """Of each node those it reads from, each once, as positions."""
    position = {node: index for index, node in enumerate(nodes)}
    return tuple(tuple(sorted({position[made_by] for made_by in predecessors(node)})) for node in nodes)


def users_of(makers: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Of each node those that read from it, as positions."""
    users: list[list[int]] = [[] for _ in makers]
    for node, read in enumerate(makers):
        for made_by in read:
            users[made_by].append(node)
    return tuple(map(tuple, users))


def runs(
    makers: Sequence[Sequence[int]], backends: Sequence[Backend], users: Sequence[Sequence[int]] | None = None
) -> list[tuple[Backend, list[int]]]:
    """Regions as positions of nodes, each sorted, in execution order.

    Args:
        makers: of each node the earlier ones it reads from, each once.
        backends: where each node runs.
        users: what `users_of` makes of `makers`, if at hand.
    """
    execution = _Execution(makers, backends, users_of(makers) if users is None else users)
    found: list[tuple[Backend, list[int]]] = []
    while backend := execution.next():
        found.append((backend, execution.run(backend)))
    return found


@dataclass(frozen=True)
class _Reach:
    """What a backend can run without waiting for another."""

    nodes: list[int]
    left: dict[int, int]
    """Unmet inputs of the nodes that read from those, by node."""


class _Execution:
    """Nodes run when what they read from has run."""

    def __init__(
        self, makers: Sequence[Sequence[int]], backends: Sequence[Backend], users: Sequence[Sequence[int]]
    ) -> None:
        self.backends, self.users = backends, users
        self.left = [len(read) for read in makers]
        self.ready: dict[Backend, list[int]] = {backend: [] for backend in ORDER}
        for node, count in enumerate(self.left):
            if not count:
                self.ready[backends[node]].append(node)

    def next(self) -> Backend | None:
        """Who runs next; None when everything has run."""
        able: list[Backend] = [backend for backend in ORDER if self.ready[backend]]
        if len(able) < 2:
            return able[0] if able else None
        reach: dict[Backend, _Reach] = {backend: self._reach(backend, {}) for backend in able}
        for backend in able:
            if not any(self._gains(backend, reach[backend], reach[other]) for other in able if other != backend):
                return backend
        # Everyone had better wait for someone.
        return "cpu" if "cpu" in able else able[0]

    def run(self, backend: Backend) -> list[int]:
        """Run all a backend can, and return it in graph order."""
        reach = self._reach(backend, {})
        self.ready[backend] = []
        for node, count in reach.left.items():
            self.left[node] = count
            if not count and self.backends[node] != backend:
                self.ready[self.backends[node]].append(node)
        return sorted(reach.nodes)

    def _reach(self, backend: Backend, left: Mapping[int, int]) -> _Reach:
        """What a backend can run, where `left` holds the unmet inputs once another has run."""
        backends, users, unmet = self.backends, self.users, self.left
        changed = dict(left)
        stack = self.ready[backend] + [node for node, n in left.items() if not n and backends[node] == backend]
        nodes: list[int] = []
        while stack:
            node = stack.pop()
            nodes.append(node)
            for user in users[node]:
                changed[user] = count = changed.get(user, unmet[user]) - 1
                if not count and backends[user] == backend:
                    stack.append(user)
        return _Reach(nodes, changed)

    def _gains(self, backend: Backend, alone: _Reach, other: _Reach) -> bool:
        """Whether the backend could run more once another has run."""
        return len(self._reach(backend, other.left).nodes) > len(alone.nodes)


def border(nodes: Iterable[ir.Node]) -> tuple[tuple[ir.Value, ...], tuple[ir.Value, ...]]:
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


def predecessors(node: ir.Node) -> list[ir.Node]:
    """The nodes that made its inputs."""
    makers = [value.producer() for value in node.inputs if value is not None]
    return [made_by for made_by in makers if made_by is not None]
