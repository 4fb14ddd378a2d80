"""The choice itself: one format for each layer, by integer linear programming.

minimise    Σ over layers and formats of  objective · figure · x  +  Σ over junctions of  objective · figure · y
subject to  Σ of formats of  x = 1  for each layer,  Σ figure · x + Σ figure · y ≤ limit  for each figure,
            x in {0, 1},  0 ≤ y, z ≤ 1

The figures of a layer in a format are its noise, latency, energy and bytes of weights. A junction is a tensor: z says
whether it is made in 16 bits, which is so if a layer reads it in 16, z ≥ Σ wide x of that layer, or movement hands it
to one, z ≥ z' of what is made of it, and only then, z ≤ the sum of these; y says whether it is brought to 8 bits too,
which is so if some layer reads 8, y ≥ z - Σ (x of formats that read 16 or floats), or movement does, y ≥ z - z'. Where
the maker makes 8 bits only, what is wide must be brought there: y ≥ Σ wide x, y ≥ z'. With x whole, so are the least y
and z. HiGHS solves it to optimality (scipy.optimize.milp).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from qcompiler.search.budget import Figure, Figures
from qcompiler.search.forms import LayerFormat, form_of
from qcompiler.search.layers import Assignment, Junction, Layer
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
    junctions: tuple[Junction, ...] = ()
    conversions: Mapping[Figure, tuple[float, ...]] = field(default_factory=dict)
    """By junction: what bringing it to the other width takes; nothing where a figure is missing."""

    def add_up(self, chosen: Assignment) -> dict[Figure, float]:
        """The figures of a whole model."""
        places = [formats.index(dtype) for formats, dtype in zip(self.formats, chosen, strict=True)]
        converted = self._converted(chosen)
        return {
            figure: self.fixed[figure]
            + sum(row[at] for row, at in zip(self.figures[figure], places, strict=True))
            + sum(cost for cost, is_needed in zip(self._conversions(figure), converted, strict=True) if is_needed)
            for figure in FIGURES
        }

    def _conversions(self, figure: Figure) -> tuple[float, ...]:
        return self.conversions.get(figure) or (0.0,) * len(self.junctions)

    def _converted(self, chosen: Assignment) -> list[bool]:
        """Which junctions exist in both widths."""
        forms = [form_of(name) for name in chosen]
        wide, converted = [False] * len(self.junctions), [False] * len(self.junctions)
        for index in reversed(range(len(self.junctions))):
            junction = self.junctions[index]
            reads = [forms[place].wide for place in junction.readers] + [wide[place] for place in junction.moved]
            in_float = [forms[place].real is not None for place in junction.readers] + [False] * len(junction.moved)
            wide[index] = any(reads)
            narrow = any(not read and not real for read, real in zip(reads, in_float, strict=True))
            converted[index] = wide[index] and (narrow or junction.made_narrow)
        return converted

    def solve(self, minimise: Sequence[Figure], limits: Figures) -> Assignment | None:
        """The best choice, or None if nothing stays within the limits.

        Args:
            minimise: one figure, or several whose shares of their largest sum are added.
            limits: of whole models, by figure; those without a limit may be left out.
        """
        flat = {figure: self._flat(figure) for figure in FIGURES}
        scales = {figure: self._largest(figure) for figure in FIGURES}
        objective = np.zeros(self._columns)
        for figure in FIGURES:
            objective += (1.0 if figure in minimise else TIE) * flat[figure] / scales[figure]
        constraints = self._constraints(0)
        for figure, limit in limits.items():
            room = (limit - self.fixed[figure]) / scales[figure]
            constraints.append(LinearConstraint(flat[figure][None, :] / scales[figure], -np.inf, room))
        found = milp(
            objective, constraints=constraints, integrality=self._integrality(0), bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )  # fmt: skip
        return None if found.x is None else self._assignment(found.x)

    def least_excess(self, limits: Figures) -> Assignment:
        """The choice whose worst figure is the smallest multiple of its limit."""
        count = self._columns
        rows = [np.append(self._flat(figure), -limits[figure]) for figure in limits]
        room = [-self.fixed[figure] for figure in limits]
        scale = [self._largest(figure) for figure in limits]
        scaled = np.array(rows) / np.array(scale)[:, None]
        found = milp(
            np.append(np.zeros(count), 1.0),
            constraints=[
                *self._constraints(1),
                LinearConstraint(scaled, -np.inf, np.array(room) / np.array(scale)),  # pyright: ignore[reportArgumentType]
            ],
            integrality=self._integrality(1),
            # The annotations of scipy know scalars only.
            bounds=Bounds(0, np.append(np.ones(count), np.inf)),  # pyright: ignore[reportArgumentType]
        )
        assert found.x is not None, "any choice is within limits large enough"
        return self._assignment(found.x)

    def span(self, figure: Figure) -> tuple[float, float]:
        """The smallest and the largest that a figure of a whole model can be, all changes of width counted."""
        rows = self.figures[figure]
        largest = sum(map(max, rows)) + sum(self._conversions(figure))
        return self.fixed[figure] + sum(map(min, rows)), self.fixed[figure] + largest

    # --- columns: x of every layer and format, then z of every junction, then y ----------------------------------

    @property
    def _choices(self) -> int:
        return sum(map(len, self.formats))

    @property
    def _columns(self) -> int:
        return self._choices + 2 * len(self.junctions)

    def _flat(self, figure: Figure) -> np.ndarray:
        of_layers = [cell for row in self.figures[figure] for cell in row]
        return np.array([*of_layers, *(0.0 for _ in self.junctions), *self._conversions(figure)])

    def _largest(self, figure: Figure) -> float:
        rows = self.figures[figure]
        return max(sum(max(map(abs, row)) for row in rows) + sum(self._conversions(figure)), 1e-30)

    def _integrality(self, more: int) -> np.ndarray:
        """Layers take whole formats; of junctions, and `more` columns at the end, nothing is said."""
        return np.append(np.ones(self._choices), np.zeros(2 * len(self.junctions) + more))

    def _constraints(self, more: int) -> list[LinearConstraint]:
        """One format for each layer, and what junctions follow from that."""
        width = self._columns + more
        sizes = [len(row) for row in self.formats]
        each = np.zeros((len(sizes), width))
        each[:, : self._choices] = np.repeat(np.eye(len(sizes)), sizes, axis=1)
        found = [LinearConstraint(each, 1, 1)]
        rows = self._junction_rows(width)
        return [*found, LinearConstraint(np.array(rows), 0, np.inf)] if rows else found

    def _junction_rows(self, width: int) -> list[np.ndarray]:
        """Rows whose product with the columns must not be negative."""
        count, first = len(self.junctions), self._choices
        ends = np.cumsum([0, *map(len, self.formats)])
        wide = np.array([form_of(name).wide for row in self.formats for name in row])
        real = np.array([form_of(name).real is not None for row in self.formats for name in row])
        rows: list[np.ndarray] = []

        def add(plus: int, minus: Sequence[int], back: Sequence[int] = ()) -> None:
            row = np.zeros(width)
            row[plus] = 1
            row[list(minus)] -= 1
            row[list(back)] += 1
            rows.append(row)

        for index, junction in enumerate(self.junctions):
            z, y = first + index, first + count + index
            wanting = np.zeros(width)
            wanting[z] = -1
            wanting[[first + other for other in junction.moved]] += 1
            for place in junction.readers:
                columns = np.arange(ends[place], ends[place + 1])
                reading = columns[wide[columns]].tolist()
                wanting[reading] += 1
                add(z, reading)
                if junction.made_narrow:
                    add(y, reading)
                else:
                    add(y, [z], [*reading, *columns[real[columns]].tolist()])
            for other in junction.moved:
                add(z, [first + other])
                if junction.made_narrow:
                    add(y, [first + other])
                else:
                    add(y, [z], [first + other])
            rows.append(wanting)
        return rows

    def _assignment(self, solution: np.ndarray) -> Assignment:
        cells, chosen = iter(solution), list[LayerFormat]()
        for row in self.formats:
            taken = [next(cells) for _ in row]
            chosen.append(row[int(np.argmax(taken))])
        return tuple(chosen)


def problem(layers: Sequence[Layer], junctions: Sequence[Junction], felt: Sensitivities, prices: Prices) -> Problem:
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
        "noise": felt.fixed,
        "latency": prices.fixed.latency,
        "energy": prices.fixed.energy,
        "weights": prices.fixed.weights,
    }
    conversions: dict[Figure, tuple[float, ...]] = {
        "latency": tuple(cost.latency for cost in prices.conversions),
        "energy": tuple(cost.energy for cost in prices.conversions),
        "weights": tuple(cost.weights for cost in prices.conversions),
    }
    return Problem(
        tuple(layer.formats for layer in layers),
        {figure: tuple(rows[figure]) for figure in FIGURES},
        fixed,
        tuple(junctions),
        conversions,
    )
