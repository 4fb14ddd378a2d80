"""Choose a backend for every operator so that one inference is estimated to take least, hand-overs included.

An inference takes the sum of its operators' times, and for every region of an accelerator a synchronization and
what its inputs and outputs take to cross (`regions.runs` says what the regions are). Finding the least is hard in
general, so: `along` keeps the best few placements of every prefix of the graph, for each backend of its last operator.
That is exact on chains. `improved` then moves connected operators and single ones while that helps. Nothing is random,
and the estimate of the result is never above that of what the search starts from.

The CPU is there for what accelerators cannot do, and for what costs more to bring there than it saves. Where
it merely is faster it takes operators at the ends of a region, but cuts none in two: that would cost energy and
scratchpad traffic which these estimates do not see.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from qcompiler.graph import const_of
from qcompiler.partition_cost import tensor_bytes
from qcompiler.regions import makers_of, runs, users_of
from qcompiler.target import AcceleratorName, Backend

Placing = tuple[Backend, ...]
"""A backend for every node, in graph order."""

BEAM = 4
"""Placements of a prefix kept for each backend of its last operator."""
MOST_TRIALS = 2000
"""Moves tried before the search stops, whatever is left to gain."""


@dataclass(frozen=True)
class Crossing:
    """What handing a region over and back costs."""

    sync: float
    """Seconds, once a region."""
    per_byte: float
    """Seconds, for inputs and outputs."""

    def seconds(self, moved: int) -> float:
        """A whole hand-over, of so many bytes."""
        return self.sync + moved * self.per_byte


@dataclass(frozen=True)
class _Tensor:
    size: int
    maker: int
    """-1 for an input of the graph."""
    readers: tuple[int, ...]
    leaves: bool
    """Whether it is an output of the graph."""


@dataclass(frozen=True)
class Problem:
    """A graph and what its operators take where."""

    nodes: tuple[ir.Node, ...]
    seconds: tuple[Mapping[Backend, float], ...]
    """Of each node, by the backends that can run it; the CPU always can."""
    crossings: Mapping[AcceleratorName, Crossing]
    """Of the accelerators."""

    @cached_property
    def makers(self) -> tuple[tuple[int, ...], ...]:
        return makers_of(self.nodes)

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        return users_of(self.makers)

    @cached_property
    def neighbours(self) -> tuple[tuple[int, ...], ...]:
        """Of each node those it reads from and those that read from it."""
        return tuple(tuple(sorted({*read, *by})) for read, by in zip(self.makers, self.users, strict=True))

    @cached_property
    def tensors(self) -> tuple[_Tensor, ...]:
        """What operators compute or take from outside; no constants."""
        position = {node: index for index, node in enumerate(self.nodes)}
        values = dict.fromkeys(
            value
            for node in self.nodes
            for value in (*node.inputs, *node.outputs)
            if value is not None and const_of(value) is None
        )
        return tuple(
            _Tensor(
                tensor_bytes(value),
                -1 if (made_by := value.producer()) is None else position[made_by],
                tuple(sorted({position[use.node] for use in value.uses() if use.node in position})),
                value.is_graph_output(),
            )
            for value in values
        )

    @cached_property
    def read_by(self) -> tuple[tuple[_Tensor, ...], ...]:
        """Of each node the tensors it reads."""
        found: list[list[_Tensor]] = [[] for _ in self.nodes]
        for tensor in self.tensors:
            for reader in tensor.readers:
                found[reader].append(tensor)
        return tuple(map(tuple, found))

    @cached_property
    def leaving(self) -> tuple[int, ...]:
        """Of each node the bytes it computes that are outputs of the graph."""
        found = [0] * len(self.nodes)
        for tensor in self.tensors:
            if tensor.leaves and tensor.maker >= 0:
                found[tensor.maker] += tensor.size
        return tuple(found)

    @cached_property
    def patient(self) -> "Problem":
        """The same, but for the CPU being nowhere faster than the best accelerator."""
        slowed: list[Mapping[Backend, float]] = []
        for seconds in self.seconds:
            others = [taken for backend, taken in seconds.items() if backend != "cpu"]
            slowed.append({**seconds, "cpu": max(seconds["cpu"], min(others, default=0.0))})
        return Problem(self.nodes, tuple(slowed), self.crossings)

    def total(self, placing: Placing) -> float:
        """Seconds of one inference."""
        return self.measured(placing)[0]

    def measured(self, placing: Placing) -> tuple[float, int]:
        """Seconds of one inference, and in how many regions accelerators run it."""
        spent = sum(seconds[backend] for seconds, backend in zip(self.seconds, placing, strict=True))
        region_of = [0] * len(placing)
        regions = runs(self.makers, placing, self.users)
        for number, (_, members) in enumerate(regions):
            for node in members:
                region_of[node] = number
        spent += sum(self.crossings[backend].sync for backend, _ in regions if backend != "cpu")
        per_byte = [0.0 if backend == "cpu" else self.crossings[backend].per_byte for backend, _ in regions]
        for tensor in self.tensors:
            home = region_of[tensor.maker] if tensor.maker >= 0 else -1
            abroad = {region_of[reader] for reader in tensor.readers}
            abroad.discard(home)
            if abroad or tensor.leaves:
                crossed = sum(per_byte[number] for number in abroad) + (per_byte[home] if home >= 0 else 0.0)
                spent += tensor.size * crossed
        return spent, sum(backend != "cpu" for backend, _ in regions)


def search(problem: Problem, starts: Sequence[Placing]) -> Placing:
    """The best placement found from some starts, and from the one `along` the graph; of equals the first."""
    return min((improved(problem, start) for start in (*starts, along(problem.patient))), key=problem.total)


# --- along the graph ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prefix:
    """The first operators placed; a region ends where the backend changes."""

    spent: float
    placing: list[Backend]
    regions: list[int]
    """Of each node, counted from 0."""


def along(problem: Problem) -> Placing:
    """The best placement whose regions lie one after another in graph order, as far as the beam sees."""
    beam = [_Prefix(0.0, [], [])]
    for node, seconds in enumerate(problem.seconds):
        grown: list[_Prefix] = []
        for backend in seconds:
            longer = sorted((_extended(problem, prefix, node, backend) for prefix in beam), key=lambda item: item.spent)
            grown += longer[:BEAM]
        beam = grown
    return tuple(min(beam, key=lambda prefix: prefix.spent).placing)


def _extended(problem: Problem, prefix: _Prefix, node: int, backend: Backend) -> _Prefix:
    spent = prefix.spent + problem.seconds[node][backend]
    joins = bool(prefix.placing) and prefix.placing[-1] == backend
    region = prefix.regions[-1] + (not joins) if prefix.regions else 0
    if backend != "cpu":
        crossing = problem.crossings[backend]
        spent += 0.0 if joins else crossing.sync
        spent += crossing.per_byte * problem.leaving[node]
    for tensor in problem.read_by[node]:
        home = prefix.regions[tensor.maker] if tensor.maker >= 0 else -1
        seen = {prefix.regions[reader] for reader in tensor.readers if reader < node}
        if home == region or region in seen:
            continue
        if backend != "cpu":
            spent += problem.crossings[backend].per_byte * tensor.size
        # What leaves the graph has crossed already; what another region reads too, crosses once.
        if tensor.maker >= 0 and not tensor.leaves and seen <= {home}:
            maker = prefix.placing[tensor.maker]
            spent += problem.crossings[maker].per_byte * tensor.size if maker != "cpu" else 0.0
    return _Prefix(spent, [*prefix.placing, backend], [*prefix.regions, region])


# --- step by step -------------------------------------------------------------------------------------------


def improved(problem: Problem, placing: Placing) -> Placing:
    """Move groups of operators while the estimate falls."""
    (least, regions), trials, settled = problem.measured(placing), 0, False
    while not settled:
        settled = True
        for group, backend in _moves(problem, placing):
            candidate = moved(placing, group, backend)
            spent, cuts = problem.measured(candidate)
            trials += 1
            if spent < least * (1 - 1e-9) and (backend != "cpu" or cuts <= regions):
                placing, least, regions, settled = candidate, spent, cuts, False
                break
            if trials >= MOST_TRIALS:
                return placing
    return placing


def moved(placing: Placing, group: Sequence[int], backend: Backend) -> Placing:
    """The placement with some operators on another backend."""
    changed = list(placing)
    for node in group:
        changed[node] = backend
    return tuple(changed)


def _moves(problem: Problem, placing: Placing) -> Iterator[tuple[Sequence[int], Backend]]:
    """Connected operators to another backend, the largest groups first, then single ones."""
    backends: tuple[Backend, ...] = (*problem.crossings, "cpu")
    for backend in backends:
        movable = {n for n, seconds in enumerate(problem.seconds) if placing[n] != backend and backend in seconds}
        for group in sorted(components(problem, movable, placing), key=lambda group: (-len(group), group)):
            yield group, backend
    for node, seconds in enumerate(problem.seconds):
        for backend in seconds:
            if backend != placing[node]:
                yield (node,), backend


def components(problem: Problem, nodes: set[int], placing: Placing) -> list[tuple[int, ...]]:
    """Connected parts of some nodes, each on one backend."""
    found: list[tuple[int, ...]] = []
    waiting = set(nodes)
    for first in sorted(nodes):
        if first not in waiting:
            continue
        waiting.discard(first)
        group, stack = [first], [first]
        while stack:
            for near in problem.neighbours[stack.pop()]:
                if near in waiting and placing[near] == placing[first]:
                    waiting.discard(near)
                    group.append(near)
                    stack.append(near)
        found.append(tuple(sorted(group)))
    return found
