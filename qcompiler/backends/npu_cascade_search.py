"""Which operators to run as cascades, and which maps to leave outside.

Dynamic programming along the region, from cut to cut between its steps: the maps alive at a cut stay in the scratchpad
or go outside, and what lies between two cuts is one step, tiled by itself, or a cascade in stripes. Both are reckoned
at the simulator's prices of their commands. Maps that live across several cuts are looked at from each unit's own cuts,
so that the outcome is a proposal, which the schedule made from it must justify.
"""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import product

import onnx_ir as ir

from qcompiler.backends.npu_cascade import Operator, Stripes
from qcompiler.backends.npu_cascade_plan import CascadePlan, Clock, Home, Planner
from qcompiler.backends.npu_maps import RegionMaps, root_bytes
from qcompiler.backends.npu_memory import aligned
from qcompiler.backends.npu_units import Tilings, Unit

_HEIGHTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Rows of a stripe to try, of the last operator."""

_ENOUGH = 2
"""The highest stripes that fit are best but for what their weights cost: so many heights that fit are looked at."""

_LONGEST = 40
"""Steps of a cascade."""


class RegionCascades:
    """Plans of any run of steps of one region."""

    def __init__(self, maps: RegionMaps, planner: Planner) -> None:
        self.maps, self.planner = maps, planner
        self.stripes: dict[tuple[int, int, int], Stripes] = {}
        self.plans: dict[tuple[Unit, tuple[ir.Value, ...], int], CascadePlan | None] = {}

    def plan(self, unit: Unit, resident: AbstractSet[ir.Value], budget: int) -> CascadePlan | None:
        """The cheapest way to run steps as a cascade in so many bytes, beside maps that are in the scratchpad."""
        operators = [self.maps.operators[step] for step in range(unit.first, unit.last + 1)]
        roots = dict.fromkeys(
            access.root for operator in operators if operator is not None for access in (*operator.maps, operator.ofm)
        )
        homes: dict[ir.Value, Home] = {}
        for root in roots:
            if self.maps.is_inside(root, unit.first, unit.last):
                homes[root] = "inside"
            elif root in resident:
                homes[root] = "scratchpad"
        key = (unit, tuple(homes), budget)
        if key not in self.plans:
            plans = [self.planner.plan(stripes, homes, budget) for stripes in self._all_stripes(unit)]
            found = [plan for plan in plans if plan is not None]
            self.plans[key] = min(found, key=lambda plan: plan.cycles, default=None)
        return self.plans[key]

    def _all_stripes(self, unit: Unit) -> list[Stripes]:
        last = self.maps.operators[unit.last]
        assert last is not None, "a cascade ends with an operator"
        found: list[Stripes] = []
        for height in heights(last):
            key = (unit.first, unit.last, height)
            if key not in self.stripes:
                stripes = self.empty(last, height)
                for step in reversed(range(unit.first, unit.last + 1)):
                    if (operator := self.maps.operators[step]) is not None:
                        stripes.add(operator)
                self.stripes[key] = stripes
            found.append(self.stripes[key])
        return found

    def empty(self, last: Operator, height: int) -> Stripes:
        """Stripes of so many rows of a last operator, for operators to be added."""
        kept = frozenset(root for root, life in self.maps.lives.items() if life.last > last.step) | self.maps.outputs
        return Stripes(-(-last.ofm.rows // height), height, kept, self.maps.writers)


def heights(last: Operator) -> list[int]:
    """Heights of stripes to try, lowest first: at least two stripes, and none that only shortens the last one."""
    rows = last.ofm.rows
    counts = dict.fromkeys(-(-rows // height) for height in _HEIGHTS if height < rows)
    return [-(-rows // count) for count in counts]


@dataclass(frozen=True)
class Proposal:
    units: tuple[Unit, ...]
    outside: frozenset[ir.Value]


_State = bool
"""Whether the maps alive at a cut are outside."""


@dataclass(frozen=True)
class _Run:
    """Steps between two cuts."""

    unit: Unit
    homes: Mapping[ir.Value, Home]
    """Of roots that are not outside."""
    budget: int


class Search:
    """Proposes how to cut a region. `streamed` are the maps that never stay in the scratchpad."""

    def __init__(
        self,
        cascades: RegionCascades,
        tilings: Tilings,
        clock: Clock,
        streamed: AbstractSet[ir.Value],
        capacity: int,
        alignment: int,
    ) -> None:
        self.cascades, self.maps, self.tilings, self.clock = cascades, cascades.maps, tilings, clock
        self.streamed, self.capacity, self.alignment = streamed, capacity, alignment
        self.count = len(self.maps.recipes)
        self.crossing = [self._alive_across(cut) for cut in range(self.count + 1)]
        self.states = [self._states(cut) for cut in range(self.count + 1)]
        self.crowded = [self._is_crowded(step) for step in range(self.count)]

    def propose(self) -> Proposal:
        best: list[dict[_State, float]] = [{False: 0.0}] + [{} for _ in range(self.count)]
        back: list[dict[_State, tuple[int, _State]]] = [{} for _ in range(self.count + 1)]
        for last in range(self.count):
            prices = self._prices(last)
            for (first, before, after), price in prices.items():
                if before in best[first]:
                    total = best[first][before] + price
                    if total < best[last + 1].get(after, float("inf")):
                        best[last + 1][after], back[last + 1][after] = total, (first, before)
        units: list[Unit] = []
        outside: set[ir.Value] = set()
        cut, state = self.count, False
        while cut:
            if state:
                outside |= self.crossing[cut]
            first, state = back[cut][state]
            units.append(Unit(first, cut - 1))
            cut = first
        return Proposal(tuple(reversed(units)), frozenset(outside))

    # --- cuts ---

    def _alive_across(self, cut: int) -> frozenset[ir.Value]:
        """Maps written before a cut and needed after it."""
        return frozenset(
            root
            for root, life in self.maps.lives.items()
            if life.first < cut <= life.last and root not in self.streamed
        )

    def _states(self, cut: int) -> tuple[_State, ...]:
        size = self._bytes(self.crossing[cut])
        if size == 0:
            return (False,)
        return (True,) if size > self.capacity else (False, True)

    def _bytes(self, roots: AbstractSet[ir.Value]) -> int:
        return sum(aligned(self.maps.sizes[root], self.alignment) for root in roots)

    # --- prices ---

    def _prices(self, last: int) -> dict[tuple[int, _State, _State], float]:
        """Of all units that end with a step: by first step, and whether maps are outside before and after."""
        prices: dict[tuple[int, _State, _State], float] = {}
        for before, after in product(self.states[last], self.states[last + 1]):
            price = self._alone(self._run(Unit(last, last), before, after))
            if price is not None:
                prices[last, before, after] = price
        operator, runs = self.maps.operators[last], self._runs(last)
        if not runs or not self.maps.stripable[last] or operator is None:
            return prices
        fitting: Counter[tuple[int, _State, _State]] = Counter()
        for height in reversed(heights(operator)):
            stripes = self.cascades.empty(operator, height)
            for first in range(last, min(runs) - 1, -1):
                added = self.maps.operators[first]
                if added is not None:
                    stripes.add(added)
                if first in runs and self._rolling(stripes, runs[first][0][2]) > self.capacity:
                    break  # and so it is with more operators in front
                for before, after, run in runs.get(first, ()):
                    key = (first, before, after)
                    if run.budget <= 0 or fitting[key] == _ENOUGH:
                        continue
                    plan = self.cascades.planner.plan(stripes, run.homes, run.budget)
                    if plan is not None:
                        fitting[key] += 1
                        prices[key] = min(plan.cycles, prices.get(key, plan.cycles))
        return prices

    def _runs(self, last: int) -> dict[int, list[tuple[_State, _State, "_Run"]]]:
        """What may be a cascade that ends with a step, by first step: something in it must be short of room."""
        runs: dict[int, list[tuple[_State, _State, _Run]]] = {}
        first, crowded = last, self.crowded[last]
        while first > max(0, last - _LONGEST) and (self.maps.stripable[first - 1] or self.maps.only_views[first - 1]):
            first -= 1
            crowded = crowded or self.crowded[first]
            if crowded and self.maps.stripable[first]:
                states = product(self.states[first], self.states[last + 1])
                runs[first] = [(before, after, self._run(Unit(first, last), before, after)) for before, after in states]
        return runs

    def _is_crowded(self, step: int) -> bool:
        """Whether a step cannot have all maps in the scratchpad that are alive then."""
        run = self._run(Unit(step, step), False, False)
        return not self.maps.only_views[step] and self._alone(run) is None

    def _run(self, unit: Unit, before: _State, after: _State) -> _Run:
        homes: dict[ir.Value, Home] = {}
        taken = 0
        for root, life in self.maps.lives.items():
            if life.first > unit.last or life.last < unit.first or root in self.streamed:
                continue
            outside = (before and life.first < unit.first) or (after and life.last > unit.last)
            if unit.cascaded and self.maps.is_inside(root, unit.first, unit.last):
                homes[root] = "inside"
            elif not outside:
                homes[root] = "scratchpad"
                taken += aligned(self.maps.sizes[root], self.alignment)
        return _Run(unit, homes, self.capacity - taken)

    def _rolling(self, stripes: Stripes, run: _Run) -> int:
        """Bytes of the rolling buffers of maps inside."""
        return sum(
            aligned(stripes.held(root) * access.pitch, self.alignment)
            for root, home in run.homes.items()
            if home == "inside"
            for _, access in stripes.readers[root][:1]
        )

    def _alone(self, run: _Run) -> float | None:
        """A step by itself, its constants having been fetched during the one before."""
        step = run.unit.first
        operator = self.maps.operators[step]
        if operator is None:
            return self._moved(step) if run.budget >= 0 else None
        tiling = self.tilings.of(step, tuple(root in run.homes for root in self.maps.roots(step)), run.budget)
        if tiling is None:
            return None
        compute = tiling.tiles * self.clock.cycles(operator, tiling.y, tiling.c, in_place=tiling.in_place)
        compute *= tiling.x / operator.work.ofm[2]
        return max(compute, tiling.transfer) + tiling.exposed if tiling.slots == 2 else compute + tiling.transfer

    def _moved(self, step: int) -> float:
        """A step that only moves, wherever its maps are."""
        if self.maps.only_views[step]:
            return 0.0
        size = root_bytes(self.maps.region.nodes[step].outputs[0])
        return self.cascades.planner.prices.maps.cycles(1, size, size)


def singles(count: int) -> tuple[Unit, ...]:
    return tuple(Unit(step, step) for step in range(count))
