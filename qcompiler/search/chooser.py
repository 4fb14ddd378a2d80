"""The point of a budget, and the points of the front."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.errors import QCompilerError
from qcompiler.search.budget import GOALS, Budget, Figure, Figures, shown
from qcompiler.search.choose import Problem
from qcompiler.search.forms import UNIFORM
from qcompiler.search.layers import Assignment
from qcompiler.search.pricing import Cost
from qcompiler.search.workshop import Workshop

LEVELS = 8
"""Limits tried for each kind of cost, between the least there is and that of 8 bits everywhere."""
DEARER = (1.25, math.inf)
"""Multiples of the cost of 8 bits everywhere that are tried too: layers in float buy accuracy."""
WORTH = 0.9
"""They must have at most this share of its noise."""
STEPS = 6
"""Bisections for the noise that a loss of accuracy stands for."""
TRIES = 6
"""Times a limit is tightened because the whole model costs more than its layers together."""


def front(problem: Problem) -> list[Assignment]:
    """Choices of least noise for limits on each kind of cost, from the least cost to that of 8 bits and beyond."""
    eight: Assignment = tuple(UNIFORM for _ in problem.formats)
    whole = problem.add_up(eight)
    # Rounding must not make impossible what is just possible.
    room: dict[Figure, float] = {goal: 1e-9 * whole[goal] for goal in GOALS}
    found: dict[Assignment, None] = {eight: None}
    for goal in GOALS:
        least = problem.span(goal)[0]
        for limit in np.linspace(least, whole[goal], LEVELS):
            # No kind of cost may pay for another: what is dearer than 8 bits must be worth it, below.
            limits: dict[Figure, float] = {other: whole[other] + room[other] for other in GOALS}
            limits[goal] = float(limit) + room[goal]
            chosen = problem.solve(("noise",), limits)
            if chosen is not None:
                found[chosen] = None
        for factor in DEARER:
            chosen = problem.solve(("noise",), {goal: factor * whole[goal]} if factor < math.inf else {})
            if chosen is not None and problem.add_up(chosen)["noise"] <= WORTH * whole["noise"]:
                found[chosen] = None
    return list(found)


def dominated(figures: Figures, others: Sequence[Figures]) -> bool:
    """Whether one of the others is as good in all figures and better in one."""
    return any(
        all(other[figure] <= figures[figure] for figure in figures)
        and any(other[figure] < figures[figure] for figure in figures)
        for other in others
    )


def figures_of(noise: float, cost: Cost) -> dict[Figure, float]:
    return {"noise": noise, "latency": cost.latency, "energy": cost.energy, "weights": cost.weights}


@dataclass(frozen=True)
class Chooser:
    """Finds the choice a budget asks for. Losses are those on calibration data, costs those of whole models."""

    problem: Problem
    workshop: Workshop
    budget: Budget

    def can_keep(self) -> bool:
        """Whether some choice within the costs keeps the loss of accuracy."""
        drop = self.budget.drop
        return drop is None or self._loss(self._within(("noise",), {}, self.budget.limits)) <= drop

    def choose(self) -> Assignment:
        """Raises QCompilerError if the budget cannot be kept, saying what can."""
        limits = self.budget.limits
        most_accurate = self._within(("noise",), {}, limits)
        drop = self.budget.drop
        if drop is None:
            return most_accurate
        if self.budget.minimise is not None:
            minimise: tuple[Figure, ...] = (self.budget.minimise,)
        else:
            minimise = GOALS
            # Where all costs count, none may pay for another if 8 bits everywhere would do without.
            modest = self._no_dearer(limits)
            careful = self._try_within(("noise",), {}, modest)
            if careful is not None and self._loss(careful) <= drop:
                return self._cheapest(minimise, drop, careful, modest)
        if self._loss(most_accurate) > drop:
            raise QCompilerError(self._out_of_reach(most_accurate, drop, minimise))
        return self._cheapest(minimise, drop, most_accurate, limits)

    def _no_dearer(self, limits: Figures) -> dict[Figure, float]:
        """The limits, and the costs of 8 bits everywhere where those are lower."""
        eight = figures_of(0.0, self.workshop.cost(tuple(UNIFORM for _ in self.problem.formats)))
        return {goal: min(eight[goal], limits.get(goal, math.inf)) for goal in GOALS}

    def _cheapest(
        self, minimise: tuple[Figure, ...], drop: float, most_accurate: Assignment, limits: Figures
    ) -> Assignment:
        """The least cost whose loss is within the limit: bisects for the noise that this loss stands for."""
        best = self._within(minimise, {}, limits)
        if self._loss(best) <= drop:
            return best
        low, high = (self.problem.add_up(chosen)["noise"] for chosen in (most_accurate, best))
        best = most_accurate
        for _ in range(STEPS):
            middle = math.sqrt(max(low, 1e-12) * max(high, 1e-12))
            chosen = self._try_within(minimise, {"noise": middle}, limits)
            if chosen is None:
                low = middle
            elif self._loss(chosen) <= drop:
                best, low = chosen, middle
            else:
                high = middle
        return best

    def _loss(self, chosen: Assignment) -> float:
        return self.workshop.judged(chosen).loss

    def _within(self, minimise: tuple[Figure, ...], noise: Figures, limits: Figures) -> Assignment:
        """The best choice whose whole cost keeps the limits.

        Raises:
            QCompilerError: there is none.
        """
        chosen = self._try_within(minimise, noise, limits)
        if chosen is None:
            raise QCompilerError(self._too_tight(limits))
        return chosen

    def _try_within(self, minimise: tuple[Figure, ...], noise: Figures, limits: Figures) -> Assignment | None:
        tightened: dict[Figure, float] = {**limits, **noise}
        for _ in range(TRIES):
            chosen = self.problem.solve(minimise, tightened)
            if chosen is None:
                return None
            cost = figures_of(0.0, self.workshop.cost(chosen))
            over: list[Figure] = [goal for goal, limit in limits.items() if cost[goal] > limit]
            if not over:
                return chosen
            for goal in over:
                # Aim lower by what the sum of layers is short of the whole.
                tightened[goal] -= cost[goal] - limits[goal] + 1e-6 * limits[goal]
        return None

    # --- what can be had instead --------------------------------------------------------------------------

    def _too_tight(self, limits: Figures) -> str:
        asked = ", ".join(f"{goal} at most {shown(goal, limit)}" for goal, limit in limits.items())
        nearest = self.workshop.cost(self.problem.least_excess(limits))
        had = figures_of(0.0, nearest)
        reached = ", ".join(f"{goal} {shown(goal, had[goal])}" for goal in limits)
        return (
            f"no choice of formats keeps {asked}. The nearest has {reached}; allow so much, or choose another target "
            "or model."
        )

    def _out_of_reach(self, most_accurate: Assignment, drop: float, minimise: tuple[Figure, ...]) -> str:
        reached = f"{self._loss(most_accurate):.2%}"
        if not self.budget.limits:
            return (
                f"no choice of formats keeps the loss within {drop:.2%}: the best loses {reached} on the calibration "
                "data (with its standard error). Allow that much, try --quality balanced or more samples, or ask "
                "`qcompile debug` which layer hurts."
            )
        asked = ", ".join(f"{goal} at most {shown(goal, limit)}" for goal, limit in self.budget.limits.items())
        free = self._within(("noise",), {}, {})
        message = f"with {asked}, the best choice of formats loses {reached} on calibration data, more than {drop:.2%}."
        if self._loss(free) > drop:
            return f"{message} Without limits on cost the best loses {self._loss(free):.2%}; allow so much."
        cost = figures_of(0.0, self.workshop.cost(self._cheapest(minimise, drop, free, {})))
        needed = ", ".join(f"{goal} {shown(goal, cost[goal])}" for goal in self.budget.limits)
        return f"{message} Within that loss the nearest has {needed}; allow so much of either."
