"""The driver's loops of a cascade: its stripes to commands, on any `Emitter`.

The first stripe is written out and the others are one loop, in which rows are expressions of the stripe.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from qcompiler.backends.npu_cascade import Progress
from qcompiler.backends.npu_cascade_plan import CascadePlan, Load, Store
from qcompiler.backends.npu_emit import Emitter, Index, equal, minimum, modulo, positive, select
from qcompiler.backends.npu_loops import Placed
from qcompiler.backends.npu_tiling import Address, MapOperand, Repeated, Tile, Window, Work
from qcompiler.simulator import isa


@dataclass(frozen=True)
class CascadedWork:
    """One operator of a cascade, with its addresses."""

    work: Work
    maps: tuple[Placed, ...]
    """Operands as they are read: of one in a rolling buffer, the offset is that in a row."""
    ofm: Placed
    """The same of the OFM."""
    homes: tuple[Placed | None, ...]
    """Operands outside, for those that arrive."""
    target: Placed | None
    """The OFM outside, if it leaves."""
    streams: tuple[int, ...]
    """Offsets in the constants."""
    buffers: tuple[int, ...]
    """Scratchpad offsets of the streams, -1 where they are read in place."""


@dataclass(frozen=True)
class Cascade:
    """A cascade with every address known."""

    plan: CascadePlan
    works: tuple[CascadedWork, ...]
    """One per stage."""
    rolls: tuple[int, ...]
    """Scratchpad offsets of the rolling buffers."""
    blob: int
    """Base of the constants."""

    @property
    def steps(self) -> range:
        """Of the region, views between the stages included."""
        return range(self.plan.stages[0].step, self.plan.stages[-1].step + 1)


def emit_cascade(emit: Emitter, cascade: Cascade, *, prefetched: bool, meanwhile: Callable[[], None]) -> None:
    """All stripes; ends with nothing outstanding.

    prefetched: the first stage's constants are in place. meanwhile: emits what may run beside the last turn.
    """
    _Loops(emit, cascade).run(prefetched=prefetched, meanwhile=meanwhile)


def emit_first_constants(emit: Emitter, cascade: Cascade) -> None:
    """Fetch the constants that the first turn needs."""
    _Loops(emit, cascade).fetch_first(0)


@dataclass(frozen=True)
class _Lines:
    """Where rows of a map lie."""

    base: int
    offset: int
    pitch: int
    """Bytes between rows."""
    pixel: int
    """Bytes between columns."""
    ring: int = 0
    """Rows of the rolling buffer, 0 where the map is whole."""

    def at(self, row: Index) -> Index:
        return self.offset + (modulo(row, self.ring) if self.ring else row) * self.pitch


class _Loops:
    def __init__(self, emit: Emitter, cascade: Cascade) -> None:
        self.emit, self.cascade, self.plan = emit, cascade, cascade.plan
        self.last = len(self.plan.stages) - 1

    def run(self, *, prefetched: bool, meanwhile: Callable[[], None]) -> None:
        if not prefetched:
            self.fetch_first(0)
        for load in self.plan.loads:
            if load.ahead:
                self._load(load, 0)
        self.emit.call(isa.BARRIER)
        self._stripe(0, meanwhile)
        for stripe in self._others():
            self._stripe(stripe, meanwhile)
        leaving = [store for store in self.plan.stores if store.behind]
        for store in leaving:
            self._store(store, self.plan.stripes - 1)
        if leaving:
            self.emit.call(isa.BARRIER)

    # --- turns ---

    def _others(self) -> Iterator[Index]:
        """The stripes after the first."""
        if any(placed.work.unroll for placed in self.cascade.works):
            yield from range(1, self.plan.stripes)
        else:
            for index in self.emit.loop(self.plan.stripes - 1):
                yield index + 1

    def _stripe(self, stripe: Index, meanwhile: Callable[[], None]) -> None:
        for stage, planned in enumerate(self.plan.stages):
            for tile in range(planned.tiles):
                if tile == 0:
                    self._transfer(stage, stripe)
                self._fetch_next(stage, stripe, tile)
                self._layer(stage)
                if stage == self.last and tile == planned.tiles - 1:
                    for _ in self.emit.when(equal(stripe, self.plan.stripes - 1)):
                        meanwhile()
                self._compute(stage, stripe, tile)
                self.emit.call(isa.BARRIER)

    def _transfer(self, stage: int, stripe: Index) -> None:
        """What arrives and leaves during a stage's turn."""
        for load in self.plan.loads:
            if load.turn == stage and (not load.progress.at_once or (_is_first(stripe) and not load.ahead)):
                self._load(load, stripe + 1 if load.ahead else stripe)
        for store in self.plan.stores:
            if store.turn == stage and not (store.behind and _is_first(stripe)):
                self._store(store, stripe - 1 if store.behind else stripe)

    def _layer(self, stage: int) -> None:
        self.emit.call(isa.LAYER, self.plan.stages[stage].step)

    # --- constants ---

    def fetch_first(self, stage: int) -> None:
        """All that a stage keeps, and the first tile of what it does not."""
        self._layer(stage)
        for stream in range(len(self.cascade.works[stage].streams)):
            self._fetch(stage, stream, 0, 0)

    def _fetch_next(self, stage: int, stripe: Index, tile: int) -> None:
        """What the next tile needs, of this stage or the following one."""
        if tile + 1 < self.plan.stages[stage].tiles:
            self._fetch_tile(stage, stripe, tile + 1)
        elif stage < self.last and _is_first(stripe):
            self.fetch_first(stage + 1)
        elif stage < self.last:
            self._fetch_tile(stage + 1, stripe, 0)
        elif self.plan.stages[0].keep == "streamed":
            for _ in self.emit.when(positive(self.plan.stripes - 1 - stripe)):
                self._fetch_tile(0, stripe + 1, 0)

    def _fetch_tile(self, stage: int, stripe: Index, tile: int) -> None:
        if self.plan.stages[stage].keep == "streamed":
            self._layer(stage)
            for index, stream in enumerate(self.cascade.works[stage].work.streams):
                if stream.unit:
                    self._fetch(stage, index, stripe, tile)

    def _fetch(self, stage: int, stream: int, stripe: Index, tile: int) -> None:
        if self.cascade.works[stage].buffers[stream] >= 0:
            part = self.cascade.works[stage].work.streams[stream]
            size = self._depth(stage, tile) * part.unit if part.unit else len(part.data)
            target, source = self._slot(stage, stream, stripe, tile), self._constants(stage, stream, tile)
            self.emit.call(isa.DMA, isa.SCRATCHPAD, target, 0, 0, self.cascade.blob, source, 0, 0, 1, 1, size)

    def _constants(self, stage: int, stream: int, tile: int) -> int:
        placed = self.cascade.works[stage]
        return placed.streams[stream] + tile * self.plan.stages[stage].depth * placed.work.streams[stream].unit

    def _slot(self, stage: int, stream: int, stripe: Index, tile: int) -> Index:
        """Where a tile's constants are: the tiles of all stripes alternate between two halves."""
        planned, placed = self.plan.stages[stage], self.cascade.works[stage]
        if planned.tiles == 1 or not placed.work.streams[stream].unit:
            return placed.buffers[stream]
        half = planned.streams[stream] // 2
        return placed.buffers[stream] + modulo(stripe * planned.tiles + tile, 2) * half

    def _depth(self, stage: int, tile: int) -> int:
        """Channels of a tile."""
        planned = self.plan.stages[stage]
        return min(planned.depth, self.cascade.works[stage].work.ofm[3] - tile * planned.depth)

    # --- rows ---

    def _start(self, progress: Progress, stripe: Index) -> Index:
        """Rows that are there before a stripe."""
        if isinstance(stripe, int):
            return progress.at(stripe - 1) if stripe else 0
        return select(equal(stripe, 0), 0, progress.at(stripe - 1))

    def _load(self, load: Load, stripe: Index) -> None:
        placed, ring = self.cascade.works[load.stage], self.plan.rolls[load.roll]
        home, operand = placed.homes[load.operand], placed.work.maps[load.operand]
        assert home is not None, "only maps from outside arrive"
        inside = _Lines(isa.SCRATCHPAD, self.cascade.rolls[load.roll], ring.pitch, _pixel(operand), ring.rows)
        outside = _Lines(home.base, home.offset, *home.strides[1:3])
        self._layer(load.stage)
        self._move(inside, outside, load.progress, stripe, (operand.shape[2], _pixel(operand)), beyond=load.ahead)

    def _store(self, store: Store, stripe: Index) -> None:
        stage, placed = self.plan.stages[store.stage], self.cascade.works[store.stage]
        assert placed.target is not None, "only maps outside leave"
        ring, target = self.plan.rolls[stage.ofm], placed.target
        at = self.cascade.rolls[stage.ofm] + placed.ofm.offset
        inside = _Lines(isa.SCRATCHPAD, at, ring.pitch, placed.ofm.strides[2], ring.rows)
        outside = _Lines(target.base, target.offset, *target.strides[1:3])
        row = (placed.work.ofm[2], placed.work.ofm[3] * placed.work.element)
        self._layer(store.stage)
        self._move(outside, inside, stage.progress, stripe, row, beyond=False)

    def _move(
        self, dst: _Lines, src: _Lines, progress: Progress, stripe: Index, row: tuple[int, int], *, beyond: bool
    ) -> None:
        """The rows of one stripe, in two pieces where they wrap around a rolling buffer.

        row: columns, and bytes of a pixel. beyond: the stripe may be one after the last.
        """
        ring, done = dst.ring or src.ring, progress.rows(self.plan.stripes)
        counts = np.diff(done)
        wraps = bool((done[:-1] % ring + counts > ring).any())
        start = self._start(progress, stripe)
        rows = progress.at(stripe) - start
        for _ in self._if_any(rows, always=not beyond and bool(counts.all())):
            first = minimum(rows, ring - modulo(start, ring)) if wraps else rows
            self._copy(dst, src, start, first, row)
            if wraps:
                for _ in self._if_any(rows - first, always=False):
                    self._copy(dst, src, start + first, rows - first, row)

    def _copy(self, dst: _Lines, src: _Lines, start: Index, rows: Index, row: tuple[int, int]) -> None:
        columns, run = row
        planes = rows
        dst_strides, src_strides = (dst.pitch, dst.pixel), (src.pitch, src.pixel)
        if dst.pixel == src.pixel == run or columns == 1:
            planes, rows, run = 1, planes, columns * run
            dst_strides, src_strides = (0, dst.pitch), (0, src.pitch)
            if dst.pitch == src.pitch == run:
                rows, run = 1, rows * run
        else:
            rows = columns
        self.emit.call(
            isa.DMA, dst.base, dst.at(start), *dst_strides, src.base, src.at(start), *src_strides, planes, rows, run
        )

    def _if_any(self, count: Index, *, always: bool) -> Iterator[None]:
        return self.emit.when(True if always else positive(count))

    # --- computation ---

    def _compute(self, stage: int, stripe: Index, tile: int) -> None:
        progress = self.plan.stages[stage].progress
        start = self._start(progress, stripe)
        rows = progress.at(stripe) - start
        for _ in self._if_any(rows, always=bool(np.diff(progress.rows(self.plan.stripes)).all())):
            self._issue(stage, start, rows, stripe, tile)

    def _issue(self, stage: int, start: Index, rows: Index, stripe: Index, tile: int) -> None:
        planned, placed = self.plan.stages[stage], self.cascade.works[stage]
        work, at, depth = placed.work, tile * planned.depth, self._depth(stage, tile)
        windows: list[tuple[Window, Window, Window]] = []
        for index, operand in enumerate(work.maps):
            y = operand.y.window(start, rows, work.ofm[1])
            x, c = operand.x.window(0, work.ofm[2], work.ofm[2]), operand.c.window(at, depth, planned.depth)
            windows.append((y, x, c))
            self._read(index, operand, placed.maps[index], planned.maps[index], (y, x, c))
        inside = placed.ofm.offset + at * work.element
        lines, wrapped = self._lines(placed.ofm, planned.ofm, inside)
        _, _, width, _ = work.ofm
        self.emit.call(
            isa.OFM,
            *(isa.SCRATCHPAD, lines.at(start), rows, width, depth, lines.pitch, lines.pixel),
            *(work.dtype, work.zero_point, *work.clamp),
        )
        if wrapped:
            self.emit.call(isa.WRAP, isa.OFM_MAP, lines.ring - modulo(start, lines.ring), lines.offset)
        streams = tuple(
            Address(self.cascade.blob, self._constants(stage, index, tile))
            if placed.buffers[index] < 0
            else Address(isa.SCRATCHPAD, self._slot(stage, index, stripe, tile))
            for index in range(len(work.streams))
        )
        work.issue(self.emit, Tile((start, 0, at), depth, planned.depth, tuple(windows), streams))

    def _read(
        self, slot: int, operand: MapOperand, placed: Placed, roll: int, windows: tuple[Window, Window, Window]
    ) -> None:
        y, x, c = windows
        repeated = [isinstance(span, Repeated) for span in operand.spans]
        first_x, first_c = (0 if fixed else window.first for fixed, window in zip(repeated[1:], (x, c), strict=True))
        inside = placed.offset + first_x * placed.strides[2] + first_c * operand.element
        assert isinstance(inside, int), "columns and channels are known when the driver is written"
        lines, wrapped = self._lines(placed, roll, inside)
        first: Index = 0 if repeated[0] else y.first
        strides = (lines.pitch, lines.pixel, operand.element)
        self.emit.call(
            isa.IFM,
            *(slot, isa.SCRATCHPAD, lines.at(first), y.count, x.count, c.count),
            *(0 if fixed else stride for fixed, stride in zip(repeated, strides, strict=True)),
            *(operand.dtype, operand.zero_point),
        )
        if wrapped and not repeated[0]:
            self.emit.call(isa.WRAP, slot, lines.ring - modulo(first, lines.ring), lines.offset)

    def _lines(self, placed: Placed, roll: int, inside: int) -> tuple[_Lines, bool]:
        """Rows as an operator sees them, from an offset in the first row; and whether they may wrap around."""
        if roll < 0:
            return _Lines(isa.SCRATCHPAD, inside, *placed.strides[1:3]), False
        ring = self.plan.rolls[roll]
        lines = _Lines(isa.SCRATCHPAD, self.cascade.rolls[roll] + inside, ring.pitch, placed.strides[2], ring.rows)
        return lines, True


def _pixel(operand: MapOperand) -> int:
    return operand.shape[3] * operand.element


def _is_first(stripe: Index) -> bool:
    """Known when the driver is written: the loop starts at the second."""
    return isinstance(stripe, int) and stripe == 0
