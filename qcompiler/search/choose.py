"""The choice itself: one format for each layer, by integer linear programming.

minimise    Σ over layers and formats of  objective · figure · x
subject to  Σ of formats of  x = 1  for each layer,  Σ figure · x ≤ limit  for each figure,  x in {0, 1}

The figures of a layer in a format are its noise, latency, energy and bytes of weights. HiGHS solves it to optimality
(scipy.optimize.milp).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from qcompiler.search.budget import Figure, Figures
from qcompiler.search.layers import Assignment, Layer, LayerFormat
from qcompiler.search.pricing import Prices
from qcompiler.search.sensitivity import Sensitivities

FIGURES: tuple[Figure, ...] = ("noise", "latency", "energy", "weights")

NEGLIGIBLE = 0.05
"""Noise of single layers that together is less than this share of what activations cause counts as none: a layer in
float is not worth more than one in 8 bits for it."""
TIE = 1e-6
"""Weight of the other figures in the objective: enough to tell equals apart."""


@dataclass(frozen=True)
class Problem:
    """Figures of every layer in every format, and of what is the same whatever is chosen."""

    formats: tuple[tuple[LayerFormat, ...], ...]
    """By layer."""
    figures: Mapping[Figure, tuple[tuple[float, ...], ...]]
    """By layer and format."""
    fixed: Figures

    def add_up(self, chosen: Assignment) -> dict[Figure, float]:
        """The figures of a whole model."""
        places = [formats.index(dtype) for formats, dtype in zip(self.formats, chosen, strict=True)]
        return {
            figure: self.fixed[figure] + sum(row[at] for row, at in zip(self.figures[figure], places, strict=True))
            for figure in FIGURES
        }

    def solve(self, minimise: Sequence[Figure], limits: Figures) -> Assignment | None:
        """The best choice, or None if nothing stays within the limits.

        Args:
            minimise: one figure, or several whose shares of their largest sum are added.
            limits: of whole models, by figure; those without a limit may be left out.
        """
        flat = {figure: np.array([cell for row in self.figures[figure] for cell in row]) for figure in FIGURES}
        scales = {figure: self._largest(figure) for figure in FIGURES}
        objective = np.zeros(sum(len(row) for row in self.formats))
        for figure in FIGURES:
            objective += (1.0 if figure in minimise else TIE) * flat[figure] / scales[figure]
        constraints = [LinearConstraint(self._one_each(), 1, 1)]
        for figure, limit in limits.items():
            room = (limit - self.fixed[figure]) / scales[figure]
            constraints.append(LinearConstraint(flat[figure][None, :] / scales[figure], -np.inf, room))
        found = milp(
            objective, constraints=constraints, integrality=np.ones(objective.size), bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        if found.x is None:
            return None
        cells, chosen = iter(found.x), list[LayerFormat]()
        for row in self.formats:
            taken = [next(cells) for _ in row]
            chosen.append(row[int(np.argmax(taken))])
        return tuple(chosen)

    def least_excess(self, limits: Figures) -> Assignment:
        """The choice whose worst figure is the smallest multiple of its limit."""
        sizes = [len(row) for row in self.formats]
        count = sum(sizes)
        rows = [np.append([cell for row in self.figures[figure] for cell in row], -limits[figure]) for figure in limits]
        room = [-self.fixed[figure] for figure in limits]
        scale = [self._largest(figure) for figure in limits]
        scaled = np.array(rows) / np.array(scale)[:, None]
        found = milp(
            np.append(np.zeros(count), 1.0),
            constraints=[
                LinearConstraint(np.hstack([self._one_each(), np.zeros((len(sizes), 1))]), 1, 1),
                LinearConstraint(scaled, -np.inf, np.array(room) / np.array(scale)),  # pyright: ignore[reportArgumentType]
            ],
            integrality=np.append(np.ones(count), 0),
            # The annotations of scipy know scalars only.
            bounds=Bounds(0, np.append(np.ones(count), np.inf)),  # pyright: ignore[reportArgumentType]
        )
        assert found.x is not None, "any choice is within limits large enough"
        ends = np.cumsum(sizes)
        return tuple(
            row[int(np.argmax(found.x[end - len(row) : end]))] for row, end in zip(self.formats, ends, strict=True)
        )

    def span(self, figure: Figure) -> tuple[float, float]:
        """The smallest and the largest that a figure of a whole model can be."""
        rows = self.figures[figure]
        return self.fixed[figure] + sum(map(min, rows)), self.fixed[figure] + sum(map(max, rows))

    def _largest(self, figure: Figure) -> float:
        return max(sum(max(map(abs, row)) for row in self.figures[figure]), 1e-30)

    def _one_each(self) -> np.ndarray:
        sizes = [len(row) for row in self.formats]
        return np.repeat(np.eye(len(sizes)), sizes, axis=1)


def problem(layers: Sequence[Layer], felt: Sensitivities, prices: Prices) -> Problem:
    """What is known of each layer in each format, as tables."""
    rows: dict[Figure, list[tuple[float, ...]]] = {figure: [] for figure in FIGURES}
    floor = NEGLIGIBLE * felt.base / len(layers)
    for layer in layers:
        costs = [prices.by_layer[layer.name, dtype] for dtype in layer.formats]
        noises = (felt.by_layer[layer.name, dtype] for dtype in layer.formats)
        rows["noise"].append(tuple(noise if noise > floor else 0.0 for noise in noises))
        rows["latency"].append(tuple(cost.latency for cost in costs))
        rows["energy"].append(tuple(cost.energy for cost in costs))
        rows["weights"].append(tuple(cost.weights for cost in costs))
    fixed: dict[Figure, float] = {
        "noise": felt.base,
        "latency": prices.fixed.latency,
        "energy": prices.fixed.energy,
        "weights": prices.fixed.weights,
    }
    return Problem(tuple(layer.formats for layer in layers), {figure: tuple(rows[figure]) for figure in FIGURES}, fixed)
