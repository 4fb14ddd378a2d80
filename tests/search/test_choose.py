"""The integer program against all choices there are."""

from itertools import product

import numpy as np
import pytest

from qcompiler.search.budget import Figure, Figures
from qcompiler.search.choose import FIGURES, Problem
from qcompiler.search.layers import Assignment, LayerFormat

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
