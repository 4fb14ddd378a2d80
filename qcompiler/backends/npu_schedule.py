"""Decide what stays in the scratchpad, tile every operator into the rest, and give everything an address.

Intermediate feature maps live in the scratchpad from their first writer to their last reader. Where that leaves an
operator without room for its smallest tile, the largest map alive there is evicted to external memory, through which
its users then stream it. A region's outputs that nobody inside reads are streamed out too. The constants of an
operator's first tile are fetched during the operator before it where there is room.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.backends.npu_layers import Copy, Moves, Recipe
from qcompiler.backends.npu_layout import (
    Layout,
    View,
    dense_strides,
    engine_strides,
    is_dense,
    operand_strides,
    restride,
)
from qcompiler.backends.npu_loops import Fill, Placed, TiledWork, Transfer
from qcompiler.backends.npu_memory import Buffer, MemoryPlan, aligned, live_bytes, plan_memory
from qcompiler.backends.npu_tiling import MapOperand, Prices, Strides4, Tiling, Work, choose_tiling, fills_blocks
from qcompiler.graph import Shape, const_of, dtype_of, element_count, shape_of, value_name
from qcompiler.partition import Region
from qcompiler.simulator import isa
from qcompiler.target import Npu

BLOB_ALIGNMENT = 16
"""Each constant starts at a multiple of this, so that DMA bursts are whole."""


@dataclass(frozen=True)
class Step:
    """One node: what to emit for it. A node whose output is only a view has nothing."""

    node: str
    op: str
    work: TiledWork | None
    fills: tuple[Fill | Transfer, ...]
    """What comes before the copies, which write over parts of it."""
    copies: tuple[Transfer, ...]
    exports: tuple[Transfer, ...]
    """Region outputs to copy out once this node is done."""
    allocs: tuple[tuple[int, int], ...]
    """Scratchpad reservations that begin here: offset, bytes."""
    frees: tuple[tuple[int, int], ...]
    prefetch: int | None
    """The step whose first constants are fetched beside this one's last tile."""
    prefetched: bool


@dataclass(frozen=True)
class Schedule:
    steps: tuple[Step, ...]
    scratchpad: MemoryPlan
    workspace: MemoryPlan
    evicted: tuple[str, ...]
    """Intermediate values that did not stay in the scratchpad."""
    blob: np.ndarray
    """uint8: all constants."""


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


@dataclass
class _Blob:
    """Constants under construction; equal bytes are stored once."""

    parts: list[bytes] = field(default_factory=list)
    offsets: dict[bytes, int] = field(default_factory=dict)
    size: int = 0

    def add(self, data: bytes) -> int:
        if data not in self.offsets:
            self.offsets[data] = self.size
            self.parts.append(data + bytes(-len(data) % BLOB_ALIGNMENT))
            self.size += len(self.parts[-1])
        return self.offsets[data]

    def array(self) -> np.ndarray:
        return np.frombuffer(b"".join(self.parts) or bytes(BLOB_ALIGNMENT), np.uint8)


@dataclass(frozen=True)
class _Life:
    first: int
    last: int
    reads: int


@dataclass(frozen=True)
class _Draft:
    """A residency with tilings that fit by size; addresses are not yet known to exist."""

    tilings: tuple[Tiling | None, ...]
    buffers: tuple[Buffer, ...]
    prefetched: frozenset[int]

    @property
    def cycles(self) -> float:
        return sum(tiling.cycles for tiling in self.tilings if tiling is not None)


@dataclass(frozen=True)
class _Fit:
    """A draft whose buffers all have places."""

    draft: _Draft
    plan: MemoryPlan
    evicted: frozenset[ir.Value]


_PATTERN = 256
"""Bytes of a constant that fills are copied from."""

_EVICTION_TRIALS = 24

_SLIMMING = 0.01
"""Share of the cycles of traffic that may be paid for a smaller peak."""

_SLIMMING_TRIALS = 24


def schedule(region: Region, recipes: Sequence[Recipe], layout: Layout, npu: Npu) -> Schedule:
    """Raises AssertionError if some smallest tile does not fit: ask `npu.can_run` first."""
    return _Scheduler(region, recipes, layout, npu).run()


class _Scheduler:
    def __init__(self, region: Region, recipes: Sequence[Recipe], layout: Layout, npu: Npu) -> None:
        self.region, self.recipes, self.layout = region, recipes, layout
        self.bases = bases_of(region)
        self.prices = Prices.of(npu)
        self.keeps_feature_maps = npu.keeps_feature_maps
        self.alignment = max(npu.scratchpad.alignment, 1)
        self.capacity = npu.scratchpad.size // self.alignment * self.alignment
        self.inside = {value: index for index, node in enumerate(region.nodes) for value in node.outputs}
        self.lives = self._lives()
        self.tiling_cache: dict[tuple[int, tuple[bool, ...], int], Tiling | None] = {}
        self.blob = _Blob()

    # --- lifetimes ---

    def _root(self, value: ir.Value | None) -> ir.Value:
        assert value is not None
        return self.layout.views[value].root

    def _lives(self) -> dict[ir.Value, _Life]:
        """When the roots made inside the region are in use."""
        steps: dict[ir.Value, list[int]] = {}
        reads: dict[ir.Value, int] = {}
        for index, (node, recipe) in enumerate(zip(self.region.nodes, self.recipes, strict=True)):
            if isinstance(recipe, Work):
                sources, outputs = [operand.source for operand in recipe.maps], [0]
            else:
                copies = self.layout.copies[index]
                sources = [copy.source for copy in copies]
                outputs = [copy.output for copy in copies] + ([0] if recipe.fill is not None else [])
            for output in outputs:
                steps.setdefault(self._root(node.outputs[output]), []).append(index)
            for source in sources:
                root = self._root(node.inputs[source])
                reads[root] = reads.get(root, 0) + 1
                steps.setdefault(root, []).append(index)
        for value in self.region.outputs:
            steps[self._root(value)].append(self.inside[value])
        # A value may also be a view of an input or a constant, which have homes already.
        return {
            root: _Life(min(used), max(used), reads.get(root, 0)) for root, used in steps.items() if root in self.inside
        }

    # --- residency and tiling ---

    def run(self) -> Schedule:
        outputs = {self._root(value) for value in self.region.outputs}
        if self.keeps_feature_maps:
            streamed = {root for root, life in self.lives.items() if life.reads == 0 and root in outputs}
        else:
            streamed = set(self.lives)
        fit = self._fit(streamed)
        return self._finish(self._slim(self._improve(fit) if len(fit.evicted) > len(streamed) else fit))

    def _fit(self, evicted: Iterable[ir.Value], limits: Sequence[int] | None = None) -> _Fit:
        """A schedule whose buffers have places, at least these roots being evicted, tiles being within limits."""
        out = set(evicted)
        limits = [self.capacity] * len(self.recipes) if limits is None else list(limits)
        alone: set[int] = set()
        while True:
            draft = self._draft(out, limits, alone)
            if isinstance(draft, int):
                out.add(self._victim(draft, out))
                continue
            plan = plan_memory(draft.buffers, self.alignment)
            if plan.peak <= self.capacity:
                return _Fit(draft, plan, frozenset(out))
            self._relax(draft, plan, out, limits, alone)

    def _improve(self, fit: _Fit) -> _Fit:
        """Where space is short, a resident map may cost its neighbours more than it saves: try to do without it."""
        residents = [root for root in self.lives if root not in fit.evicted]
        residents.sort(key=lambda root: (-self._size(root), value_name(root)))
        for root in residents[:_EVICTION_TRIALS]:
            out = {*fit.evicted, root}
            draft = self._draft(out, [self.capacity] * len(self.recipes), set())
            if not isinstance(draft, int) and draft.cycles < fit.draft.cycles:
                trial = self._fit(out)
                fit = trial if trial.draft.cycles < fit.draft.cycles else fit
        return fit

    def _slim(self, fit: _Fit) -> _Fit:
        """Tile finer where the scratchpad is fullest, as long as that costs next to nothing."""
        affordable = fit.draft.cycles * (1 + _SLIMMING)
        limits = [self.capacity] * len(self.recipes)
        for _ in range(_SLIMMING_TRIALS):
            live = [live_bytes(fit.plan.buffers, step, self.alignment) for step in range(len(self.recipes))]
            fullest = max(range(len(live)), key=live.__getitem__, default=0)
            steps = [
                (sum(tiling.buffers), index)
                for index, tiling in enumerate(fit.draft.tilings)
                if tiling is not None and (index == fullest or (index - 1 == fullest and index in fit.draft.prefetched))
            ]
            size, index = max(steps, default=(0, 0))
            if not size:
                break
            limits[index] = size - 1
            work = self.recipes[index]
            assert isinstance(work, Work), "only works are tiled"
            finer = self._tiling(index, work, set(fit.evicted), size - 1)
            if finer is None or not fills_blocks(finer, work):
                break
            trial = self._fit(fit.evicted, limits)
            if trial.evicted != fit.evicted or trial.plan.peak > fit.plan.peak or trial.draft.cycles > affordable:
                break
            fit = trial
        return fit

    def _draft(self, evicted: set[ir.Value], limits: Sequence[int], alone: set[int]) -> _Draft | int:
        """Tilings for a residency, or the step that has no room. `alone`: steps that may not be prefetched."""
        residents = [
            Buffer(value_name(root), self._size(root), life.first, life.last)
            for root, life in self.lives.items()
            if root not in evicted
        ]
        tilings: list[Tiling | None] = []
        tiles: list[Buffer] = []
        for index, recipe in enumerate(self.recipes):
            if isinstance(recipe, Moves):
                tilings.append(None)
                if live_bytes(residents, index, self.alignment) > self.capacity:
                    return index
                continue
            free = self.capacity - live_bytes(residents, index, self.alignment)
            tiling = self._tiling(index, recipe, evicted, min(free, limits[index]))
            if tiling is None:
                return index
            tilings.append(tiling)
            tiles += [
                Buffer(_tile_name(index, number), size, index, index)
                for number, size in enumerate(tiling.buffers)
                if size
            ]
        return self._prefetch(tilings, residents + tiles, alone)

    def _tiling(self, index: int, work: Work, evicted: set[ir.Value], budget: int) -> Tiling | None:
        node = self.region.nodes[index]
        resident = tuple(self._is_resident(self._root(node.inputs[operand.source]), evicted) for operand in work.maps)
        resident = (*resident, self._is_resident(self._root(node.outputs[0]), evicted))
        key = (index, resident, budget)
        if key not in self.tiling_cache:
            self.tiling_cache[key] = (
                choose_tiling(work, resident, budget, self.alignment, self.prices) if budget >= 0 else None
            )
        return self.tiling_cache[key]

    def _is_resident(self, root: ir.Value, evicted: set[ir.Value]) -> bool:
        return root in self.lives and root not in evicted

    def _prefetch(self, tilings: Sequence[Tiling | None], buffers: list[Buffer], alone: set[int]) -> _Draft:
        """Let constants' buffers begin at the operator before, wherever the bytes suffice."""
        by_name = {buffer.name: position for position, buffer in enumerate(buffers)}
        prefetched: set[int] = set()
        previous: int | None = None
        for index, (tiling, recipe) in enumerate(zip(tilings, self.recipes, strict=True)):
            if tiling is None or not isinstance(recipe, Work):
                continue
            streams = 0 if tiling.in_place else len(recipe.streams)
            names = [_tile_name(index, len(recipe.maps) + number) for number in range(streams)]
            extra = sum(buffers[by_name[name]].size for name in names)
            if previous is not None and names and index not in alone:
                live = [live_bytes(buffers, step, self.alignment) for step in range(previous, index)]
                if max(live) + extra <= self.capacity:
                    prefetched.add(index)
                    for name in names:
                        old = buffers[by_name[name]]
                        buffers[by_name[name]] = Buffer(old.name, old.size, previous, old.last)
            previous = index
        return _Draft(tuple(tilings), tuple(buffers), frozenset(prefetched))

    def _relax(
        self, draft: _Draft, plan: MemoryPlan, evicted: set[ir.Value], limits: list[int], alone: set[int]
    ) -> None:
        """Placement failed though the bytes suffice: give up a prefetch, else tile finer, else evict."""
        over = [
            buffer
            for buffer, offset in zip(plan.buffers, plan.offsets, strict=True)
            if offset + buffer.size > self.capacity
        ]
        first, last = min(buffer.first for buffer in over), max(buffer.last for buffer in over)
        guilty = {index for index in draft.prefetched if first <= index <= last + 1} - alone
        if guilty:
            alone |= guilty
            return
        steps = [step for step in range(first, last + 1) if draft.tilings[step] is not None]
        live = {step: live_bytes(plan.buffers, step, self.alignment) for step in range(first, last + 1)}
        for step in sorted(steps, key=lambda step: -live[step]):
            tiling = draft.tilings[step]
            assert tiling is not None
            smaller = sum(tiling.buffers) * 3 // 4
            work = self.recipes[step]
            assert isinstance(work, Work)
            if self._tiling(step, work, evicted, smaller) is not None:
                limits[step] = smaller
                return
        evicted.add(self._victim(max(live, key=lambda step: live[step]), evicted))

    def _victim(self, step: int, evicted: set[ir.Value]) -> ir.Value:
        """The largest resident map alive at a step."""
        alive = [root for root, life in self.lives.items() if root not in evicted and life.first <= step <= life.last]
        node = self.region.nodes[step]
        assert alive, f"{node.op_type} {node.name} does not fit an empty scratchpad; can_run would have said so"
        return max(alive, key=lambda root: (self._size(root), value_name(root)))

    @staticmethod
    def _size(root: ir.Value) -> int:
        return element_count(shape_of(root)) * _element(root)

    # --- addresses ---

    def _finish(self, fit: _Fit) -> Schedule:
        draft, plan, evicted = fit.draft, fit.plan, fit.evicted
        homes: dict[ir.Value, tuple[int, int]] = {}
        for value, base in zip(self.region.inputs, self.bases.inputs, strict=True):
            homes[value] = (base, 0)
        for value, base in zip(self.region.outputs, self.bases.outputs, strict=True):
            view = self.layout.views[value]
            if view.root in evicted and view.root not in homes and self._is_whole(value, view):
                homes[view.root] = (base, 0)
        spilled = [root for root in self.lives if root in evicted and root not in homes]
        workspace = plan_memory(
            [
                Buffer(value_name(root), self._size(root), self.lives[root].first, self.lives[root].last)
                for root in spilled
            ],
            BLOB_ALIGNMENT,
        )
        for root in self.lives:
            if root not in evicted:
                homes[root] = (isa.SCRATCHPAD, plan.offset_of(value_name(root)))
        for root in spilled:
            homes[root] = (self.bases.workspace, workspace.offset_of(value_name(root)))
        offsets = {buffer.name: offset for buffer, offset in zip(plan.buffers, plan.offsets, strict=True)}
        steps = tuple(self._step(index, draft, plan, homes, offsets) for index in range(len(self.recipes)))
        names = tuple(sorted(value_name(root) for root in spilled))
        return Schedule(steps, plan, workspace, names, self.blob.array())

    def _is_whole(self, value: ir.Value, view: View) -> bool:
        same_size = element_count(shape_of(value)) == element_count(shape_of(view.root))
        return view.offset == 0 and same_size and is_dense(shape_of(value), view.strides)

    def _step(
        self,
        index: int,
        draft: _Draft,
        plan: MemoryPlan,
        homes: dict[ir.Value, tuple[int, int]],
        offsets: dict[str, int],
    ) -> Step:
        node, recipe = self.region.nodes[index], self.recipes[index]
        work: TiledWork | None = None
        fills: tuple[Fill | Transfer, ...] = ()
        copies: tuple[Transfer, ...] = ()
        if isinstance(recipe, Work):
            tiling = draft.tilings[index]
            assert tiling is not None
            work = TiledWork(
                recipe,
                tiling,
                tuple(self._read_at(node.inputs[operand.source], operand, homes) for operand in recipe.maps),
                self._written_at(node.outputs[0], recipe, homes),
                tuple(offsets.get(_tile_name(index, number), -1) for number in range(len(tiling.buffers))),
                self.bases.blob,
                tuple(self.blob.add(stream.data) for stream in recipe.streams),
            )
        else:
            copies = tuple(self._transfer(node, copy, homes) for copy in self.layout.copies[index])
            if recipe.fill is not None:
                fills = self._fills(node.outputs[0], recipe.fill, homes)
        spans = [
            (buffer, (offset, aligned(buffer.size, self.alignment)))
            for buffer, offset in zip(plan.buffers, plan.offsets, strict=True)
        ]
        following = next((later for later in range(index + 1, len(self.recipes)) if draft.tilings[later]), None)
        return Step(
            node.name or value_name(node.outputs[0]),
            node.op_type,
            work,
            fills,
            copies,
            self._exports(index, homes),
            tuple(span for buffer, span in spans if buffer.first == index),
            tuple(span for buffer, span in spans if buffer.last == index),
            following if work is not None and following in draft.prefetched else None,
            index in draft.prefetched,
        )

    def _address(self, value: ir.Value | None, homes: dict[ir.Value, tuple[int, int]]) -> tuple[int, int]:
        assert value is not None
        view = self.layout.views[value]
        if view.root not in homes:
            constant = const_of(view.root)
            assert constant is not None, f"{view.root.name} is neither made in the region nor given to it"
            homes[view.root] = (self.bases.blob, self.blob.add(np.ascontiguousarray(constant).tobytes()))
        base, offset = homes[view.root]
        return base, offset + view.offset * _element(value)

    def _read_at(self, value: ir.Value | None, operand: MapOperand, homes: dict[ir.Value, tuple[int, int]]) -> Placed:
        assert value is not None
        strides = operand_strides(shape_of(value), self.layout.views[value].strides, operand)
        assert strides is not None, f"{value.name} was laid out so that its users cannot follow"
        return Placed(*self._address(value, homes), _in_bytes(strides, operand.element))

    def _written_at(self, value: ir.Value, work: Work, homes: dict[ir.Value, tuple[int, int]]) -> Placed:
        strides = engine_strides(shape_of(value), self.layout.views[value].strides, work.ofm)
        assert strides is not None, f"{value.name} was laid out so that its producer cannot follow"
        return Placed(*self._address(value, homes), _in_bytes(strides, work.element))

    def _transfer(self, node: ir.Node, copy: Copy, homes: dict[ir.Value, tuple[int, int]]) -> Transfer:
        source, output = node.inputs[copy.source], node.outputs[copy.output]
        assert source is not None
        src = restride(shape_of(source), self.layout.views[source].strides, copy.src_shape)
        dst = restride(shape_of(output), self.layout.views[output].strides, copy.dst_shape)
        assert src is not None and dst is not None, f"{node.name} was laid out so that it cannot be copied"
        src_base, src_offset = self._address(source, homes)
        dst_base, dst_offset = self._address(output, homes)
        element = _element(output)
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

    def _fills(
        self, value: ir.Value, element: bytes, homes: dict[ir.Value, tuple[int, int]]
    ) -> tuple[Fill | Transfer, ...]:
        """Every element of a value set to one: by a fill, or from a constant where its bytes differ."""
        base, offset = self._address(value, homes)
        size = self._size(value)
        if len(set(element)) == 1:
            return (Fill(base, offset, size, element[0]),)
        run = min(size, _PATTERN)
        source = self.blob.add(element * (run // len(element)))
        whole, rest = divmod(size, run)
        repeated = Transfer(base, offset, (run, 1), self.bases.blob, source, (0, 1), (whole, run))
        last = Transfer(base, offset + whole * run, (1,), self.bases.blob, source, (1,), (rest,))
        return (repeated, last) if rest else (repeated,)

    def _exports(self, index: int, homes: dict[ir.Value, tuple[int, int]]) -> tuple[Transfer, ...]:
        exports: list[Transfer] = []
        for value, base in zip(self.region.outputs, self.bases.outputs, strict=True):
            src_base, src_offset = self._address(value, homes)
            if self.inside[value] == index and src_base != base:
                shape, strides = shape_of(value), self.layout.views[value].strides
                dense = dense_strides(shape)
                exports.append(_of_elements(_element(value), base, 0, dense, src_base, src_offset, strides, shape))
        return tuple(exports)


def _element(value: ir.Value) -> int:
    """Bytes of one."""
    return dtype_of(value).itemsize


def _in_bytes(strides: Strides4, element: int) -> Strides4:
    n, y, x, c = strides
    return n * element, y * element, x * element, c * element


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


def _tile_name(step: int, number: int) -> str:
    """Tile buffers are named apart from values by a character that no ONNX name starts with here."""
    return f"\0{step}.{number}"
