"""The search for the cheapest placement against all placements of small graphs."""

from itertools import product

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph import make_node
from qcompiler.partition_cost import tensor_bytes
from qcompiler.partition_search import Crossing, Placing, Problem, search
from qcompiler.regions import cut
from qcompiler.target import AcceleratorName, Backend

CROSSINGS: dict[AcceleratorName, Crossing] = {
    "npu": Crossing(2e-6, 1e-9), "dsp": Crossing(5e-6, 3e-10), "gpu": Crossing(10e-6, 2e-10),
}  # fmt: skip


def random_problem(seed: int, count: int, *, chain: bool, fast_cpu: bool) -> Problem:
    """Operators that some of three accelerators can run, reading one or two earlier ones; or a chain."""
    rng = np.random.default_rng(seed)

    def value(name: str) -> ir.Value:
        shape = (1, int(rng.integers(1, 20000)))
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT8))

    values, nodes, seconds = [value("x")], [], []
    for index in range(count):
        reads = [values[-1]]
        if not chain:
            picks = rng.integers(0, len(values), rng.integers(1, 3))
            reads = [values[pick] for pick in dict.fromkeys(map(int, picks))]
        nodes.append(make_node("Max", reads, [value(f"v{index}")], name=f"n{index}"))
        values.append(nodes[-1].outputs[0])
        costs: dict[Backend, float] = {name: float(rng.uniform(1e-6, 3e-5)) for name in CROSSINGS if rng.random() < 0.6}
        slowest = max(costs.values(), default=0.0)
        costs["cpu"] = float(rng.uniform(1e-6, 3e-5)) if fast_cpu else slowest + float(rng.uniform(0, 4e-5))
        seconds.append(costs)
    outputs = [node.outputs[0] for node in nodes if not node.outputs[0].uses()]
    ir.Graph([values[0]], outputs, nodes=nodes, opset_imports={"": 21}, name="random")
    return Problem(tuple(nodes), tuple(seconds), CROSSINGS)


def every_placing(problem: Problem) -> list[Placing]:
    return list(product(*(tuple(seconds) for seconds in problem.seconds)))


def eager(problem: Problem) -> Placing:
    return tuple(next(iter(seconds)) for seconds in problem.seconds)


@pytest.mark.parametrize("seed", range(12))
def test_it_finds_the_least_on_chains(seed: int) -> None:
    problem = random_problem(seed, 6, chain=True, fast_cpu=False)
    least = min(map(problem.total, every_placing(problem)))
    assert problem.total(search(problem, (eager(problem),))) == pytest.approx(least, rel=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_near_the_least_on_branching_graphs(seed: int) -> None:
    problem = random_problem(seed, 7, chain=False, fast_cpu=False)
    least = min(map(problem.total, every_placing(problem)))
    assert problem.total(search(problem, (eager(problem),))) <= 1.1 * least


@pytest.mark.parametrize("seed", range(8))
def test_it_is_never_worse_than_its_starts_and_always_the_same(seed: int) -> None:
    problem = random_problem(seed, 20, chain=False, fast_cpu=True)
    on_cpu: Placing = ("cpu",) * len(problem.nodes)
    starts = (eager(problem), on_cpu)
    found = search(problem, starts)
    assert problem.total(found) <= min(map(problem.total, starts))
    assert search(problem, starts) == found
    assert all(backend in seconds for backend, seconds in zip(found, problem.seconds, strict=True))


@pytest.mark.parametrize("seed", range(10))
def test_the_total_is_the_sum_over_operators_and_regions(seed: int) -> None:
    problem = random_problem(seed, 15, chain=False, fast_cpu=True)
    rng = np.random.default_rng(seed)
    placing: Placing = tuple(list(seconds)[rng.integers(0, len(seconds))] for seconds in problem.seconds)
    spent = sum(seconds[backend] for seconds, backend in zip(problem.seconds, placing, strict=True))
    for region in cut(dict(zip(problem.nodes, placing, strict=True))):
        if region.backend != "cpu":
            moved = sum(tensor_bytes(value) for value in (*region.inputs, *region.outputs))
            spent += CROSSINGS[region.backend].sync + moved * CROSSINGS[region.backend].per_byte
    assert problem.total(placing) == pytest.approx(spent, rel=1e-12)


def test_the_cpu_takes_the_end_of_a_region_but_cuts_none() -> None:
    problem = random_problem(0, 5, chain=True, fast_cpu=False)
    slow: dict[Backend, float] = {"npu": 5e-5, "cpu": 9e-5}
    fast: dict[Backend, float] = {"npu": 5e-5, "cpu": 1e-6}
    whole: Placing = ("npu",) * 5
    crossings: dict[AcceleratorName, Crossing] = {"npu": Crossing(1e-6, 0.0)}
    for place, wanted in ((2, whole), (4, (*whole[:4], "cpu"))):
        seconds = tuple(fast if index == place else slow for index in range(5))
        assert search(Problem(problem.nodes, seconds, crossings), (whole,)) == wanted
