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
    makers = {node: predecessors(node) for node in backends}
    waiting = list(backends)
    done: set[ir.Node] = set()
    regions: list[Region] = []
    while waiting:
        reached: dict[Backend, dict[ir.Node, None]] = {}
        for candidate in ORDER:
            if found := _reached(waiting, backends, makers, done, candidate):
                reached[candidate] = found
        prompt: list[Backend] = [name for name in reached if not _gains(name, reached, waiting, backends, makers, done)]
        # Where everyone had better wait for someone, the CPU begins.
        backend = prompt[0] if prompt else sorted(reached)[0]
        nodes = reached[backend]
        inputs, outputs = border(nodes)
        regions.append(Region(f"{backend}_{len(regions)}", backend, tuple(nodes), inputs, outputs))
        done.update(nodes)
        waiting = [node for node in waiting if node not in done]
    return tuple(regions)


def _reached(
    waiting: Sequence[ir.Node],
    backends: Mapping[ir.Node, Backend],
    makers: Mapping[ir.Node, Sequence[ir.Node]],
    done: set[ir.Node],
    backend: Backend,
) -> dict[ir.Node, None]:
    """What a backend can run now without waiting for another, in graph order."""
    found: dict[ir.Node, None] = {}
    for node in waiting:
        if backends[node] == backend and all(made_by in done or made_by in found for made_by in makers[node]):
            found[node] = None
    return found


def _gains(
    backend: Backend,
    reached: Mapping[Backend, Mapping[ir.Node, None]],
    waiting: Sequence[ir.Node],
    backends: Mapping[ir.Node, Backend],
    makers: Mapping[ir.Node, Sequence[ir.Node]],
    done: set[ir.Node],
) -> bool:
    """Whether the backend could run more once another that is ready has run."""
    return any(
        len(_reached(waiting, backends, makers, done | reached[other].keys(), backend)) > len(reached[backend])
        for other in reached
        if other != backend
    )


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
    makers = [value.producer() for value in node.inputs if value is not None]
    return [made_by for made_by in makers if made_by is not None]
