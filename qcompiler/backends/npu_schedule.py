"""Plan a region: what stays in the scratchpad, how every operator is cut, what runs as a cascade, and every address.

Two schedules compete, without cascades and with those that the search finds; the cheaper one by the simulator's prices
wins.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.backends.npu_cascade_loops import Cascade, CascadedWork
from qcompiler.backends.npu_cascade_plan import CascadePlan, Planner, Stage
from qcompiler.backends.npu_cascade_search import RegionCascades, Search, singles
from qcompiler.backends.npu_clock import TargetClock
from qcompiler.backends.npu_constants import BLOB_ALIGNMENT, Constants, constants_of
from qcompiler.backends.npu_emit import WordEmitter
from qcompiler.backends.npu_layers import Copy, Recipe
from qcompiler.backends.npu_layout import Layout, View, dense_strides, is_dense, restride
from qcompiler.backends.npu_loops import Fill, Placed, TiledWork, Transfer
from qcompiler.backends.npu_maps import RegionMaps, root_bytes
from qcompiler.backends.npu_memory import Buffer, MemoryPlan, aligned, plan_memory
from qcompiler.backends.npu_program import Step, emit_program
from qcompiler.backends.npu_tiling import Prices, Tiling, Work
from qcompiler.backends.npu_units import Fit, NoRoomError, Residency, Tilings, Unit, buffer_name
from qcompiler.graph import Shape, dtype_of, element_count, shape_of, value_name
from qcompiler.partition import Region
from qcompiler.simulator import isa
from qcompiler.simulator.cost import RegionCost, price
from qcompiler.simulator.weight_code import EncodedSpan
from qcompiler.target import Target


@dataclass(frozen=True)
class Schedule:
    steps: tuple[Step, ...]
    cascades: tuple[Cascade, ...]
    scratchpad: MemoryPlan
    workspace: MemoryPlan
    evicted: tuple[str, ...]
    """Intermediate values that did not stay in the scratchpad."""
    blob: np.ndarray
    """uint8: all constants."""
    encoded: tuple[EncodedSpan, ...]
    """Where in the constants weights lie that the target keeps encoded."""


@dataclass(frozen=True)
class Bases:
    """Numbers of the external buffers: inputs, constants, outputs, workspace."""

    inputs: tuple[int, ...]
    blob: int
    outputs: tuple[int, ...]
    workspace: int


def bases_of(region: Region) -> Bases:
    blob = 1 + len(region.inputs)
    workspace = blob + 1 + len(region.outputs)
    return Bases(tuple(range(1, blob)), blob, tuple(range(blob + 1, workspace)), workspace)


def schedule(
    region: Region, recipes: Sequence[Recipe], layout: Layout, target: Target, units: Sequence[Unit] | None = None
) -> Schedule:
    """Plan a region whose every smallest tile fits: ask `npu.can_run` first.

    Args:
        units: how to cut it, if that is not to be found out.

    Raises:
        NoRoomError: a cascade that was asked for does not fit.
    """
    scheduler = _Scheduler(RegionMaps(region, recipes, layout), target)
    return scheduler.run() if units is None else scheduler.cut(units)


class _Scheduler:
    def __init__(self, maps: RegionMaps, target: Target) -> None:
        assert target.npu is not None, f"{target.name} has no accelerator"
        self.maps, self.target, self.npu = maps, target, target.npu
        self.bases = bases_of(maps.region)
        self.prices = Prices.of(self.npu)
        self.alignment = max(self.npu.scratchpad.alignment, 1)
        self.capacity = self.npu.scratchpad.size // self.alignment * self.alignment
        self.constants = constants_of(maps, coded=self.npu.weight_code == "golomb_rice")
        self.clock = TargetClock(target, self.constants, self.bases.blob)
        self.cascades = RegionCascades(maps, Planner(self.prices, self.alignment, self.clock))
        self.tilings = Tilings(maps, self.prices, self.alignment)

    def run(self) -> Schedule:
        streamed = self._streamed()
        try:
            residency = self._residency(singles(len(self.maps.recipes)))
            fit = residency.fit(streamed)
            crowded = len(fit.evicted) > len(streamed)
            fit = residency.improved(fit) if crowded else fit
            best = self._placed(residency.slimmed(fit))
        except NoRoomError as error:
            node = self.maps.region.nodes[error.unit.first]
            raise AssertionError(
                f"{node.op_type} {node.name} does not fit an empty scratchpad; can_run would have said so"
            ) from error
        if crowded and self.npu.rolling_buffers and self.npu.keeps_feature_maps:
            best = self._with_cascades(best, streamed)
        return best

    def cut(self, units: Sequence[Unit]) -> Schedule:
        residency = self._residency(units)
        return self._placed(residency.slimmed(residency.fit(self._streamed())))

    def _streamed(self) -> frozenset[ir.Value]:
        """What never stays in the scratchpad."""
        if not self.npu.keeps_feature_maps:
            return frozenset(self.maps.lives)
        return frozenset(
            root for root, life in self.maps.lives.items() if life.reads == 0 and root in self.maps.outputs
        )

    def _residency(self, units: Sequence[Unit]) -> Residency:
        return Residency(self.maps, units, self.cascades, self.tilings, self.capacity, self.alignment)

    def _with_cascades(self, best: Schedule, streamed: frozenset[ir.Value]) -> Schedule:
        """The schedule that the search proposes, if it is no slower, takes no more energy, and is better in one."""
        search = Search(self.cascades, self.tilings, self.clock, streamed, self.capacity, self.alignment)
        proposal = search.propose()
        if not any(unit.cascaded for unit in proposal.units):
            return best
        residency = self._residency(proposal.units)
        try:
            fit = residency.improved(residency.fit(streamed | proposal.outside))
        except NoRoomError:
            return best
        without = self._price(best)
        rank = _rank(without)
        for each in (residency.slimmed(fit), fit):
            schedule = self._placed(each)
            cost = self._price(schedule)
            if cost.energy.total <= without.energy.total and _rank(cost) < rank:
                best, rank = schedule, _rank(cost)
        return best

    def _price(self, schedule: Schedule) -> RegionCost:
        emit, blob = WordEmitter(), self.bases.blob
        emit_program(emit, schedule.steps, schedule.cascades)
        return price(emit.words, self.target, {blob: self.npu.weight_memory}, {blob: self.constants.encoded})

    def _placed(self, fit: Fit) -> Schedule:
        return _Placer(self.maps, self.bases, self.constants, self.alignment, fit).run()


def _rank(cost: RegionCost) -> tuple[int, float]:
    return cost.cycles, cost.energy.total


# --- addresses -------------------------------------------------------------------------------------------------------


class _Placer:
    """Gives everything of a fit its address."""

    def __init__(self, maps: RegionMaps, bases: Bases, constants: Constants, alignment: int, fit: Fit) -> None:
        self.maps, self.region, self.layout = maps, maps.region, maps.layout
        self.bases, self.constants, self.alignment, self.fit = bases, constants, alignment, fit
        self.offsets = {
            buffer.name: offset for buffer, offset in zip(fit.memory.buffers, fit.memory.offsets, strict=True)
        }
        self.taken: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        self.given_back: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        """Offset and bytes of the buffers whose lives begin and end with each unit."""
        for buffer, offset in zip(fit.memory.buffers, fit.memory.offsets, strict=True):
            span = (offset, aligned(buffer.size, alignment))
            self.taken[buffer.first].append(span)
            self.given_back[buffer.last].append(span)
        self.homes: dict[ir.Value, tuple[int, int]] = {
            root: (bases.blob, offset) for root, offset in constants.roots.items()
        }

    def run(self) -> Schedule:
        for value, base in zip(self.region.inputs, self.bases.inputs, strict=True):
            self.homes[value] = (base, 0)
        for value, base in zip(self.region.outputs, self.bases.outputs, strict=True):
            view = self.layout.views[value]
            if view.root in self.fit.evicted and view.root not in self.homes and self._is_whole(value, view):
                self.homes[view.root] = (base, 0)
        inside = self._inside_cascades()
        lives = {root: life for root, life in self.maps.lives.items() if root not in inside}
        spilled = [root for root in lives if root in self.fit.evicted and root not in self.homes]
        workspace = plan_memory(
            [Buffer(value_name(root), root_bytes(root), *self._widened(root)) for root in spilled], BLOB_ALIGNMENT
        )
        for root in lives:
            if root not in self.fit.evicted:
                self.homes[root] = (isa.SCRATCHPAD, self.offsets[value_name(root)])
        for root in spilled:
            self.homes[root] = (self.bases.workspace, workspace.offset_of(value_name(root)))
        steps = tuple(step for number in range(len(self.fit.units)) for step in self._steps(number))
        return Schedule(
            steps,
            tuple(
                self._cascade(unit, plan)
                for unit, plan in zip(self.fit.units, self.fit.draft.plans, strict=True)
                if isinstance(plan, CascadePlan)
            ),
            self.fit.memory,
            workspace,
            tuple(sorted(value_name(root) for root in spilled)),
            self.constants.data,
            self.constants.encoded,
        )

    def _inside_cascades(self) -> set[ir.Value]:
        cascades = [unit for unit in self.fit.units if unit.cascaded]
        return {
            root for unit in cascades for root in self.maps.lives if self.maps.is_inside(root, unit.first, unit.last)
        }

    def _widened(self, root: ir.Value) -> tuple[int, int]:
        """Steps in which a map is in use, those of a cascade being one."""
        life = self.maps.lives[root]
        first = next(unit.first for unit in self.fit.units if unit.first <= life.first <= unit.last)
        return first, next(unit.last for unit in self.fit.units if unit.first <= life.last <= unit.last)

    def _is_whole(self, value: ir.Value, view: View) -> bool:
        same_size = element_count(shape_of(value)) == element_count(shape_of(view.root))
        return view.offset == 0 and same_size and is_dense(shape_of(value), view.strides)

    # --- steps ---

    def _steps(self, number: int) -> list[Step]:
        unit, plan, draft = self.fit.units[number], self.fit.draft.plans[number], self.fit.draft
        following = next((later for later in range(number + 1, len(draft.plans)) if draft.plans[later]), None)
        fetches = plan is not None and following in draft.prefetched
        steps: list[Step] = []
        for index in range(unit.first, unit.last + 1):
            node, recipe = self.region.nodes[index], self.maps.recipes[index]
            work: TiledWork | None = None
            fills: tuple[Fill | Transfer, ...] = ()
            copies: tuple[Transfer, ...] = ()
            if isinstance(recipe, Work):
                work = self._tiled(index, recipe, plan) if isinstance(plan, Tiling) else None
            else:
                copies = tuple(self._transfer(node, copy) for copy in self.layout.copies[index])
                if recipe.fill is not None:
                    fills = self._fills(index, node.outputs[0], recipe.fill)
            is_first, is_last = index == unit.first, index == unit.last
            steps.append(
                Step(
                    node.name or value_name(node.outputs[0]),
                    node.op_type,
                    work,
                    fills,
                    copies,
                    self._exports(index),
                    tuple(self.taken[number]) if is_first else (),
                    tuple(self.given_back[number]) if is_last else (),
                    self.fit.units[following].first if is_last and fetches and following is not None else None,
                    is_first and number in draft.prefetched,
                )
            )
        return steps

    def _tiled(self, index: int, work: Work, tiling: Tiling) -> TiledWork:
        node, unit = self.region.nodes[index], Unit(index, index)
        return TiledWork(
            work,
            tiling,
            tuple(
                Placed(*self._address(node.inputs[operand.source]), self.maps.read(index, operand)[1])
                for operand in work.maps
            ),
            Placed(*self._address(node.outputs[0]), self.maps.written(index, work)[1]),
            tuple(self.offsets.get(buffer_name(unit, number), -1) for number in range(len(tiling.buffers))),
            self.bases.blob,
            self.constants.streams[index],
        )

    def _address(self, value: ir.Value | None) -> tuple[int, int]:
        assert value is not None
        view = self.layout.views[value]
        assert view.root in self.homes, f"{view.root.name} is neither made in the region nor given to it"
        base, offset = self.homes[view.root]
        return base, offset + view.offset * dtype_of(value).itemsize

    def _transfer(self, node: ir.Node, copy: Copy) -> Transfer:
        source, output = node.inputs[copy.source], node.outputs[copy.output]
        assert source is not None
        src = restride(shape_of(source), self.layout.views[source].strides, copy.src_shape)
        dst = restride(shape_of(output), self.layout.views[output].strides, copy.dst_shape)
        assert src is not None and dst is not None, f"{node.name} was laid out so that it cannot be copied"
        src_base, src_offset = self._address(source)
        dst_base, dst_offset = self._address(output)
        element = dtype_of(output).itemsize
        return _of_elements(
            element,
            dst_base,
            dst_offset + element * sum(start * stride for start, stride in zip(copy.dst_start, dst, strict=True)),
            dst,
            src_base,
            src_offset + element * sum(start * stride for start, stride in zip(copy.src_start, src, strict=True)),
            tuple(src[axis] * copy.src_step[axis] for axis in copy.src_axes),
            copy.box,
        )

    def _fills(self, index: int, value: ir.Value, element: bytes) -> tuple[Fill | Transfer, ...]:
        """Every element of a value set to one: by a fill, or from a constant where its bytes differ."""
        base, offset = self._address(value)
        size = root_bytes(value)
        if index not in self.constants.fills:
            return (Fill(base, offset, size, element[0]),)
        source, run = self.constants.fills[index]
        whole, rest = divmod(size, run)
        repeated = Transfer(base, offset, (run, 1), self.bases.blob, source, (0, 1), (whole, run))
        last = Transfer(base, offset + whole * run, (1,), self.bases.blob, source, (1,), (rest,))
        return (repeated, last) if rest else (repeated,)

    def _exports(self, index: int) -> tuple[Transfer, ...]:
        exports: list[Transfer] = []
        for value, base in zip(self.region.outputs, self.bases.outputs, strict=True):
            src_base, src_offset = self._address(value)
            if self.maps.inside[value] == index and src_base != base:
                shape, strides = shape_of(value), self.layout.views[value].strides
                element, dense = dtype_of(value).itemsize, dense_strides(shape)
                exports.append(_of_elements(element, base, 0, dense, src_base, src_offset, strides, shape))
        return tuple(exports)

    # --- cascades ---

    def _cascade(self, unit: Unit, plan: CascadePlan) -> Cascade:
        buffers = [self.offsets.get(buffer_name(unit, number), -1) for number in range(len(plan.buffers))]
        rolls, streams = buffers[: len(plan.rolls)], iter(buffers[len(plan.rolls) :])
        arriving = {load.roll for load in plan.loads}
        works = tuple(
            self._cascaded(stage, plan, arriving, tuple(next(streams) for _ in stage.streams)) for stage in plan.stages
        )
        return Cascade(plan, works, tuple(rolls), self.bases.blob)

    def _cascaded(self, stage: Stage, plan: CascadePlan, arriving: set[int], buffers: tuple[int, ...]) -> CascadedWork:
        node, work = self.region.nodes[stage.step], self.maps.recipes[stage.step]
        assert isinstance(work, Work), "stages compute"
        maps: list[Placed] = []
        homes: list[Placed | None] = []
        for operand, roll in zip(work.maps, stage.maps, strict=True):
            value = node.inputs[operand.source]
            offset, strides = self.maps.read(stage.step, operand)
            outside = Placed(*self._address(value), strides) if roll < 0 or roll in arriving else None
            if outside is not None and roll < 0:
                maps.append(outside)
            elif outside is not None:
                pixel = operand.shape[3] * operand.element
                maps.append(Placed(isa.SCRATCHPAD, 0, (0, plan.rolls[roll].pitch, pixel, operand.element)))
            else:
                maps.append(Placed(isa.SCRATCHPAD, offset, strides))
            homes.append(outside if roll >= 0 else None)
        root = self.maps.root(node.outputs[0])
        offset, strides = self.maps.written(stage.step, work)
        target = Placed(*self._address(node.outputs[0]), strides) if root in self.homes else None
        ofm = Placed(isa.SCRATCHPAD, offset, strides)
        if stage.ofm < 0:
            assert target is not None and target.resident, "an OFM without a rolling buffer is in the scratchpad"
            ofm, target = target, None
        elif not any(stage.ofm == roll for other in plan.stages for roll in other.maps):
            # Nobody here reads it: its rows lie close together until they leave.
            pixel = work.ofm[3] * work.element
            ofm = Placed(isa.SCRATCHPAD, 0, (0, plan.rolls[stage.ofm].pitch, pixel, work.element))
        return CascadedWork(work, tuple(maps), ofm, tuple(homes), target, self.constants.streams[stage.step], buffers)


def _of_elements(
    element: int,
    dst_base: int,
    dst_offset: int,
    dst_strides: Shape,
    src_base: int,
    src_offset: int,
    src_strides: Shape,
    box: Shape,
) -> Transfer:
    """A transfer of elements, whose strides are given in elements and whose offsets in bytes."""
    return Transfer(
        dst_base,
        dst_offset,
        (*(stride * element for stride in dst_strides), 1),
        src_base,
        src_offset,
        (*(stride * element for stride in src_strides), 1),
        (*box, element),
    )
