"""Which maps stay in the scratchpad, and how each unit of a region is cut to fit beside them.

A unit is one step, tiled by itself, or a cascade of steps, in stripes. Units run one after the other, and what is alive
during a unit is so during all of it. Intermediate maps live in the scratchpad from their first writer to their last
reader, those inside a cascade in rolling buffers only. Where that leaves a unit without room, the largest map alive
there is evicted to external memory, through which its users then stream it. The first constants of a unit are fetched
during the unit before it where there is room.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import onnx_ir as ir

from qcompiler.backends.npu_cascade_plan import CascadePlan
from qcompiler.backends.npu_layers import Moves
from qcompiler.backends.npu_maps import Life, RegionMaps
from qcompiler.backends.npu_memory import Buffer, MemoryPlan, aligned, live_bytes, plan_memory
from qcompiler.backends.npu_tiling import Prices, Tiling, Work, choose_tiling, fills_blocks
from qcompiler.graph import value_name

_EVICTION_TRIALS = 24

_SLIMMING = 0.01
"""Share of the cycles of steps by themselves that may be paid for a smaller peak."""

_SLIMMING_TRIALS = 24


@dataclass(frozen=True)
class Unit:
    """Steps `first` to `last`, which run together."""

    first: int
    last: int

    @property
    def cascaded(self) -> bool:
        return self.last > self.first


Plan = Tiling | CascadePlan
"""How a unit is cut."""


@dataclass(frozen=True)
class Draft:
    """A residency with plans that fit by size; addresses are not yet known to exist."""

    plans: tuple[Plan | None, ...]
    """One per unit; None for what is moved or only seen otherwise."""
    buffers: tuple[Buffer, ...]
    """Their steps are units."""
    prefetched: frozenset[int]
    """Units whose first constants are there when they begin."""

    @property
    def cycles(self) -> float:
        return sum(plan.cycles for plan in self.plans if plan is not None)

    @property
    def tile_cycles(self) -> float:
        """Of steps by themselves, MACs aside."""
        return sum(plan.cycles for plan in self.plans if isinstance(plan, Tiling))


@dataclass(frozen=True)
class Fit:
    """A draft whose buffers all have places."""

    units: tuple[Unit, ...]
    draft: Draft
    memory: MemoryPlan
    evicted: frozenset[ir.Value]


class Cascades(Protocol):
    def plan(self, unit: Unit, resident: frozenset[ir.Value], budget: int) -> CascadePlan | None:
        """A cascade in so many bytes beside these maps, or None."""
        ...


class Tilings:
    """The cheapest tilings of single steps."""

    def __init__(self, maps: RegionMaps, prices: Prices, alignment: int) -> None:
        self.maps, self.prices, self.alignment = maps, prices, alignment
        self.known: dict[tuple[int, tuple[bool, ...], int], Tiling | None] = {}

    def of(self, step: int, resident: tuple[bool, ...], budget: int) -> Tiling | None:
        """As `choose_tiling`."""
        key = (step, resident, budget)
        if key not in self.known:
            work = self.maps.recipes[step]
            assert isinstance(work, Work), "moves need no plan"
            fits = budget >= 0
            self.known[key] = choose_tiling(work, resident, budget, self.alignment, self.prices) if fits else None
        return self.known[key]


class Residency:
    """Fits the units of one region into its scratchpad."""

    def __init__(
        self,
        maps: RegionMaps,
        units: Sequence[Unit],
        cascades: Cascades,
        tilings: "Tilings",
        capacity: int,
        alignment: int,
    ) -> None:
        self.recipes, self.maps, self.units, self.cascades = maps.recipes, maps, tuple(units), cascades
        self.tilings, self.capacity, self.alignment = tilings, capacity, alignment
        self.lives = self._lives()

    def _lives(self) -> dict[ir.Value, Life]:
        """In units, of the roots that are not inside a cascade."""
        unit_of = [number for number, unit in enumerate(self.units) for _ in range(unit.first, unit.last + 1)]
        lives: dict[ir.Value, Life] = {}
        for root, life in self.maps.lives.items():
            first, last = unit_of[life.first], unit_of[life.last]
            unit = self.units[first]
            if not (unit.cascaded and self.maps.is_inside(root, unit.first, unit.last)):
                lives[root] = Life(first, last, life.reads)
        return lives

    def fit(self, evicted: Iterable[ir.Value]) -> Fit:
        """A schedule whose buffers have places, at least these roots being evicted."""
        return self._fit(evicted, [self.capacity] * len(self.units), self.capacity)

    def _fit(self, evicted: Iterable[ir.Value], limits: Sequence[int], enough: int) -> Fit:
        """The same, plans being within limits; `enough`: the peak that need not be improved."""
        out, limits = set(evicted), list(limits)
        alone: set[int] = set()
        while True:
            draft = self._draft(out, limits, alone)
            if isinstance(draft, int):
                out.add(self._victim(draft, out))
                continue
            memory = plan_memory(draft.buffers, self.alignment, enough)
            if memory.peak <= self.capacity:
                return Fit(self.units, draft, memory, frozenset(out))
            self._relax(draft, memory, out, limits, alone)

    def improved(self, fit: Fit) -> Fit:
        """Where space is short, a resident map may cost its neighbours more than it saves: try to do without it."""
        residents = [root for root in self.lives if root not in fit.evicted]
        residents.sort(key=lambda root: (-self.maps.sizes[root], value_name(root)))
        for root in residents[:_EVICTION_TRIALS]:
            out = {*fit.evicted, root}
            draft = self._draft(out, [self.capacity] * len(self.units), set())
            if not isinstance(draft, int) and draft.cycles < fit.draft.cycles:
                trial = self.fit(out)
                fit = trial if trial.draft.cycles < fit.draft.cycles else fit
        return fit

    def slimmed(self, fit: Fit) -> Fit:
        """Cut finer where the scratchpad is fullest, as long as that costs next to nothing."""
        affordable = fit.draft.cycles + _SLIMMING * fit.draft.tile_cycles
        fit = replace(fit, memory=plan_memory(fit.draft.buffers, self.alignment))
        limits = [self.capacity] * len(self.units)
        for _ in range(_SLIMMING_TRIALS):
            live = live_bytes(fit.memory.buffers, len(self.units), self.alignment)
            fullest = max(range(len(live)), key=live.__getitem__, default=0)
            sizes = [
                (sum(plan.buffers), unit)
                for unit, plan in enumerate(fit.draft.plans)
                if plan is not None and (unit == fullest or (unit - 1 == fullest and unit in fit.draft.prefetched))
            ]
            size, unit = max(sizes, default=(0, 0))
            if not size:
                break
            limits[unit] = size - 1
            finer, work = self._plan(unit, set(fit.evicted), size - 1), self.recipes[self.units[unit].first]
            if finer is None or (
                isinstance(finer, Tiling) and isinstance(work, Work) and not fills_blocks(finer, work)
            ):
                break
            trial = self._fit(fit.evicted, limits, 0)
            if trial.evicted != fit.evicted or trial.memory.peak > fit.memory.peak or trial.draft.cycles > affordable:
                break
            fit = trial
        return fit

    def _draft(self, evicted: set[ir.Value], limits: Sequence[int], alone: set[int]) -> Draft | int:
        """Plans for a residency, or the unit that has no room. `alone`: units that may not be prefetched."""
        residents = [
            Buffer(value_name(root), self.maps.sizes[root], life.first, life.last)
            for root, life in self.lives.items()
            if root not in evicted
        ]
        plans: list[Plan | None] = []
        cut: list[Buffer] = []
        for number, live in enumerate(live_bytes(residents, len(self.units), self.alignment)):
            free = self.capacity - live
            if self._only_moves(number):
                plans.append(None)
                if free < 0:
                    return number
                continue
            plan = self._plan(number, evicted, min(free, limits[number]))
            if plan is None:
                return number
            plans.append(plan)
            cut += [
                Buffer(buffer_name(self.units[number], index), size, number, number)
                for index, size in enumerate(plan.buffers)
                if size
            ]
        return self._prefetch(plans, residents + cut, alone)

    def _only_moves(self, unit: int) -> bool:
        return not self.units[unit].cascaded and isinstance(self.recipes[self.units[unit].first], Moves)

    def _plan(self, number: int, evicted: set[ir.Value], budget: int) -> Plan | None:
        unit = self.units[number]
        if budget < 0:
            return None
        if unit.cascaded:
            resident = frozenset(
                root for root, life in self.lives.items() if root not in evicted and life.first <= number <= life.last
            )
            return self.cascades.plan(unit, resident, budget)
        resident = tuple(self._is_resident(root, evicted) for root in self.maps.roots(unit.first))
        return self.tilings.of(unit.first, resident, budget)

    def _is_resident(self, root: ir.Value, evicted: set[ir.Value]) -> bool:
        return root in self.lives and root not in evicted

    def _prefetch(self, plans: Sequence[Plan | None], buffers: list[Buffer], alone: set[int]) -> Draft:
        """Let constants' buffers begin at the unit before, wherever the bytes suffice."""
        by_name = {buffer.name: position for position, buffer in enumerate(buffers)}
        live = live_bytes(buffers, len(self.units), self.alignment)
        prefetched: set[int] = set()
        previous: int | None = None
        for number, plan in enumerate(plans):
            if plan is None:
                continue
            names = [buffer_name(self.units[number], index) for index in self._first_constants(number, plan)]
            extra = sum(aligned(buffers[by_name[name]].size, self.alignment) for name in names)
            between = [] if previous is None or number in alone else live[previous:number]
            if previous is not None and names and between and max(between) + extra <= self.capacity:
                prefetched.add(number)
                live[previous:number] = [size + extra for size in between]
                for name in names:
                    old = buffers[by_name[name]]
                    buffers[by_name[name]] = Buffer(old.name, old.size, previous, old.last)
            previous = number
        return Draft(tuple(plans), tuple(buffers), frozenset(prefetched))

    def _first_constants(self, number: int, plan: Plan) -> list[int]:
        """The buffers of the constants that a unit begins with."""
        if isinstance(plan, CascadePlan):
            first = len(plan.rolls)
            return [first + index for index, size in enumerate(plan.stages[0].streams) if size]
        work = self.recipes[self.units[number].first]
        assert isinstance(work, Work), "moves have no constants"
        return [] if plan.in_place else [len(work.maps) + index for index in range(len(work.streams))]

    def _relax(
        self, draft: Draft, memory: MemoryPlan, evicted: set[ir.Value], limits: list[int], alone: set[int]
    ) -> None:
        """Placement failed though the bytes suffice: give up a prefetch, else cut finer, else evict."""
        over = [
            buffer
            for buffer, offset in zip(memory.buffers, memory.offsets, strict=True)
            if offset + buffer.size > self.capacity
        ]
        first, last = min(buffer.first for buffer in over), max(buffer.last for buffer in over)
        guilty = {unit for unit in draft.prefetched if first <= unit <= last + 1} - alone
        if guilty:
            alone |= guilty
            return
        live = live_bytes(memory.buffers, len(self.units), self.alignment)
        crowded = sorted(range(first, last + 1), key=lambda unit: -live[unit])
        for unit in crowded:
            plan = draft.plans[unit]
            if plan is None:
                continue
            smaller = sum(plan.buffers) * 3 // 4
            if self._plan(unit, evicted, smaller) is not None:
                limits[unit] = smaller
                return
        evicted.add(self._victim(crowded[0], evicted))

    def _victim(self, number: int, evicted: set[ir.Value]) -> ir.Value:
        """The largest resident map alive at a unit."""
        alive = [root for root, life in self.lives.items() if root not in evicted and life.first <= number <= life.last]
        if not alive:
            raise NoRoomError(self.units[number])
        return max(alive, key=lambda root: (self.maps.sizes[root], value_name(root)))


class NoRoomError(Exception):
    """A unit does not fit an empty scratchpad."""

    def __init__(self, unit: Unit) -> None:
        super().__init__(f"steps {unit.first} to {unit.last} do not fit")
        self.unit = unit


def buffer_name(unit: Unit, number: int) -> str:
    """Buffers of a plan are named apart from values by a character that no ONNX name starts with here."""
    return f"\0{unit.first}.{number}"
