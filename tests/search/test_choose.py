"""The integer program against all choices there are."""

from itertools import product

import numpy as np
import pytest

from qcompiler.search.budget import Figure, Figures
from qcompiler.search.choose import FIGURES, Problem
from qcompiler.search.forms import LayerFormat
from qcompiler.search.layers import Assignment, Junction

FORMATS: tuple[tuple[LayerFormat, ...], ...] = (
    ("int8", "int4", "float"),
    ("int8", "float"),
    ("int8", "int4", "int2", "float"),
    ("int8",),
    ("int8", "int4", "float"),
)  # fmt: skip


def random_problem(seed: int) -> Problem:
    """Sizes as they occur: noises over four decades, bytes in thousands, seconds in millionths."""
    rng = np.random.default_rng(seed)
    sizes = {"noise": 1e-2, "latency": 1e-6, "energy": 1e-7, "weights": 1e4}
    figures: dict[Figure, tuple[tuple[float, ...], ...]] = {
        figure: tuple(
            tuple(
                float(size) for size in sizes[figure] * 10 ** rng.uniform(-3 if figure == "noise" else -1, 0, len(row))
            )
            for row in FORMATS
        )
        for figure in FIGURES
    }
    fixed: dict[Figure, float] = {figure: sizes[figure] * float(rng.uniform(0, 2)) for figure in FIGURES}
    return Problem(FORMATS, figures, fixed)


MIXED: tuple[tuple[LayerFormat, ...], ...] = (
    ("int8", "int4", "int16*int8", "float"),
    ("int8", "int16"),
    ("int8", "int16*int8", "int16*int4"),
    ("int8", "int16*int8", "float16"),
    ("int8", "int16"),
)  # fmt: skip
JUNCTIONS = (
    Junction((0,), (), made_narrow=False),
    Junction((1, 2), (4,), made_narrow=False),  # a residual connection, also pooled
    Junction((1,), (), made_narrow=True),  # what a table makes
    Junction((3,), (4,), made_narrow=False),
    Junction((4,), (), made_narrow=False),  # the pooled ones, joined
)


def mixed_problem(seed: int) -> Problem:
    """Layers that may read 16 bits, and tensors between them."""
    rng = np.random.default_rng(seed)
    sizes = {"noise": 1e-2, "latency": 1e-6, "energy": 1e-7, "weights": 1e4}
    figures: dict[Figure, tuple[tuple[float, ...], ...]] = {
        figure: tuple(tuple((sizes[figure] * rng.uniform(0.1, 1, len(row))).tolist()) for row in MIXED)
        for figure in FIGURES
    }
    conversions: dict[Figure, tuple[float, ...]] = {
        figure: tuple((sizes[figure] * rng.uniform(0.1, 1, len(JUNCTIONS))).tolist())
        for figure in FIGURES
        if figure != "noise"
    }
    return Problem(MIXED, figures, dict.fromkeys(FIGURES, 0.0), JUNCTIONS, conversions)


def test_where_widths_meet() -> None:
    """By hand: one unit of latency for each tensor that exists in both widths."""
    figures: dict[Figure, tuple[tuple[float, ...], ...]] = {
        figure: tuple((0.0,) * len(row) for row in MIXED) for figure in FIGURES
    }
    table = Problem(MIXED, figures, dict.fromkeys(FIGURES, 0.0), JUNCTIONS, {"latency": (1, 10, 100, 1000, 10000)})

    def converted(*chosen: LayerFormat) -> float:
        return table.add_up(chosen)["latency"]

    assert converted("int8", "int8", "int8", "int8", "int8") == 0
    assert converted("int16*int8", "int8", "int8", "int8", "int8") == 0  # nobody else reads it
    assert converted("float", "int16", "int8", "int8", "int8") == 10 + 100  # layer 2 wants it in 8; the table's in 16
    assert converted("int8", "int16", "int16*int4", "int8", "int8") == 10 + 100  # now only the pool does
    assert converted("int8", "int8", "int8", "int8", "int16") == 10 + 1000  # wide for the pool, narrow for the others
    assert converted("int8", "int16", "int16*int8", "float16", "int16") == 100  # floats read either


@pytest.mark.parametrize("seed", range(4))
def test_the_best_choice_with_changes_of_width(seed: int) -> None:
    table = mixed_problem(seed)
    known = all_choices(table)
    rng = np.random.default_rng(50 + seed)
    for goal in FIGURES:
        other: Figure = "latency" if goal == "noise" else "noise"
        limit = float(np.quantile([sums[other] for sums in known.values()], rng.uniform(0.2, 0.6)))
        allowed = [sums[goal] for sums in known.values() if sums[other] <= limit]
        chosen = table.solve((goal,), {other: limit})
        assert chosen is not None and known[chosen][other] <= limit * (1 + 1e-6)
        assert known[chosen][goal] <= min(allowed) + 1e-5 * table.span(goal)[1]
    limits: Figures = {"latency": 0.3 * table.span("latency")[0], "energy": 0.3 * table.span("energy")[0]}
    nearest = known[table.least_excess(limits)]
    least = min(max(sums[figure] / limit for figure, limit in limits.items()) for sums in known.values())
    assert max(nearest[figure] / limit for figure, limit in limits.items()) == pytest.approx(least, rel=1e-6)


def all_choices(problem: Problem) -> dict[Assignment, dict[Figure, float]]:
    return {chosen: problem.add_up(chosen) for chosen in product(*problem.formats)}


@pytest.mark.parametrize("seed", range(6))
def test_the_best_choice_within_limits(seed: int) -> None:
    problem = random_problem(seed)
    known = all_choices(problem)
    rng = np.random.default_rng(100 + seed)
    for _ in range(4):
        figures = [FIGURES[index] for index in rng.permutation(4)]
        limits: dict[Figure, float] = {
            figure: float(np.quantile([sums[figure] for sums in known.values()], rng.uniform(0.2, 0.9)))
            for figure in figures[: rng.integers(0, 3)]
        }
        (goal,) = figures[3:]
        allowed = [sums for sums in known.values() if all(sums[figure] <= limit for figure, limit in limits.items())]
        chosen = problem.solve((goal,), limits)
        if chosen is None:
            assert not allowed
            continue
        found = known[chosen]
        assert all(found[figure] <= limit * (1 + 1e-6) for figure, limit in limits.items())
        # The other figures may decide between choices that differ by a millionth of the whole.
        assert found[goal] <= min(sums[goal] for sums in allowed) + 1e-5 * problem.span(goal)[1]


def test_nothing_within_the_limits() -> None:
    problem = random_problem(7)
    known = all_choices(problem)
    least = min(sums["weights"] for sums in known.values())
    assert problem.solve(("noise",), {"weights": 0.99 * least}) is None
    assert problem.solve(("noise",), {"weights": 1.0001 * least}) is not None


@pytest.mark.parametrize("seed", range(4))
def test_the_nearest_to_limits_nothing_keeps(seed: int) -> None:
    problem = random_problem(20 + seed)
    known = all_choices(problem)
    limits: Figures = {figure: 0.5 * problem.span(figure)[0] for figure in ("latency", "weights")}

    def excess(sums: Figures) -> float:
        return max(sums[figure] / limit for figure, limit in limits.items())

    nearest = known[problem.least_excess(limits)]
    assert excess(nearest) == pytest.approx(min(map(excess, known.values())), rel=1e-6)


def test_several_goals_count_by_their_shares() -> None:
    """Bytes are counted in thousands and seconds in millionths; neither drowns the other."""
    formats: tuple[tuple[LayerFormat, ...], ...] = (("int8", "int4"), ("int8", "int4"))
    figures: dict[Figure, tuple[tuple[float, ...], ...]] = {
        "noise": ((0.0, 0.0), (0.0, 0.0)), "latency": ((4e-6, 1e-6), (5e-6, 5e-6)),
        "energy": ((0.0, 0.0), (0.0, 0.0)), "weights": ((1e4, 2e4), (9e4, 9e4)),
    }  # fmt: skip
    problem = Problem(formats, figures, dict.fromkeys(FIGURES, 0.0))
    # A third of the latency for a tenth of the bytes.
    chosen = problem.solve(("latency", "weights"), {})
    assert chosen is not None and chosen[0] == "int4"
