"""The driver's loops: one step of a program to commands, on any `Emitter`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qcompiler.backends.npu_emit import Emitter, Index, divide, equal, minimum, modulo
from qcompiler.backends.npu_tiling import (
    Address,
    MapOperand,
    Repeated,
    Stream,
    Strides4,
    Tile,
    Tiling,
    Window,
    Work,
    buffer_strides,
    period,
)
from qcompiler.simulator import isa


@dataclass(frozen=True)
class Placed:
    """A feature map in memory, seen as [N, H, W, C]. Strides in bytes."""

    base: int
    offset: int
    strides: Strides4

    @property
    def resident(self) -> bool:
        return self.base == isa.SCRATCHPAD


@dataclass(frozen=True)
class Transfer:
    """A strided copy of a box of bytes."""

    dst_base: int
    dst_offset: int
    dst_strides: tuple[int, ...]
    src_base: int
    src_offset: int
    src_strides: tuple[int, ...]
    box: tuple[int, ...]


@dataclass(frozen=True)
class Fill:
    """Set `size` bytes from an address on to one value."""

    base: int
    offset: int
    size: int
    value: int


@dataclass(frozen=True)
class TiledWork:
    """A work with its tiling and every address."""

    work: Work
    tiling: Tiling
    maps: tuple[Placed, ...]
    ofm: Placed
    buffers: tuple[int, ...]
    """Scratchpad offsets in the order of `Tiling.buffers`; -1 where there is none."""
    blob: int
    """Base of the constants."""
    streams: tuple[int, ...]
    """Offsets in the constants."""


def emit_transfer(emit: Emitter, transfer: Transfer) -> None:
    """One DMA command, inside loops where the box has more than three dimensions left after merging."""
    dims = [
        (size, dst, src)
        for size, dst, src in zip(transfer.box, transfer.dst_strides, transfer.src_strides, strict=True)
        if size > 1
    ]
    # Neighbouring dimensions that are contiguous on both sides are one.
    merged: list[tuple[int, int, int]] = []
    for size, dst, src in dims:
        if merged and merged[-1][1] == size * dst and merged[-1][2] == size * src:
            merged[-1] = (merged[-1][0] * size, dst, src)
        else:
            merged.append((size, dst, src))
    row_bytes = merged.pop()[0] if merged and merged[-1][1:] == (1, 1) else 1
    rows = merged.pop() if merged else (1, 0, 0)
    planes = merged.pop() if merged else (1, 0, 0)

    def nest(outer: list[tuple[int, int, int]], dst: Index, src: Index) -> None:
        if outer:
            size, dst_stride, src_stride = outer[0]
            for i in emit.loop(size):
                nest(outer[1:], dst + i * dst_stride, src + i * src_stride)
            return
        emit.call(
            isa.DMA,
            *(transfer.dst_base, dst, planes[1], rows[1]),
            *(transfer.src_base, src, planes[2], rows[2]),
            *(planes[0], rows[0], row_bytes),
        )

    nest(merged, transfer.dst_offset, transfer.src_offset)


def emit_fill(emit: Emitter, fill: Fill) -> None:
    emit.call(isa.FILL, fill.base, fill.offset, 0, 0, 1, 1, fill.size, fill.value)


def emit_streams(emit: Emitter, step: TiledWork) -> None:
    """Fetch the constants of a step's first tile."""
    loops = _Loops(emit, step)
    for index in range(len(step.work.streams)):
        loops.load_stream(index, 0)


def emit_work(emit: Emitter, step: TiledWork, *, prefetched: bool, meanwhile: Callable[[], None]) -> None:
    """All tiles of one step; ends with nothing outstanding.

    prefetched: the first tile's constants are in place. meanwhile: emits what may run beside the last tile.
    """
    _Loops(emit, step).run(prefetched=prefetched, meanwhile=meanwhile)


class _Loops:
    """Emits one step. Tile `t` counts through the axes in the tiling's order; `t` may be a TIR variable."""

    def __init__(self, emit: Emitter, step: TiledWork) -> None:
        self.emit = emit
        self.step = step
        self.work = step.work
        self.tiling = step.tiling
        self.counts = dict(zip("nyxc", step.tiling.counts, strict=True))
        self.sizes = (step.tiling.y, step.tiling.x, step.tiling.c)

    def run(self, *, prefetched: bool, meanwhile: Callable[[], None]) -> None:
        last = self.tiling.tiles - 1
        if self._load_first(prefetched=prefetched):
            self.emit.call(isa.BARRIER)
        for tile in self._steps(last):
            if self.tiling.slots == 2:
                self._load_next(tile + 1)
                self._compute(tile)
                self.emit.call(isa.BARRIER)
                self._store(tile)
            else:
                self._compute(tile)
                self.emit.call(isa.BARRIER)
                self._store(tile)
                self._load_next(tile + 1)
                self.emit.call(isa.BARRIER)
        meanwhile()
        self._compute(last)
        self.emit.call(isa.BARRIER)
        if not self.step.ofm.resident:
            self._store(last)
            self.emit.call(isa.BARRIER)

    def load_stream(self, index: int, tile: Index) -> None:
        stream = self.work.streams[index]
        source = self._constants(index, tile)
        size = self._length("c", tile) * stream.unit if stream.unit else len(stream.data)
        target = self._slot(len(self.work.maps) + index, stream, tile)
        self.emit.call(isa.DMA, isa.SCRATCHPAD, target, 0, 0, self.step.blob, source, 0, 0, 1, 1, size)

    def _constants(self, index: int, tile: Index) -> Index:
        """Where a tile's constants lie among all."""
        return self.step.streams[index] + self._position("c", tile) * self.tiling.c * self.work.streams[index].unit

    # --- positions ---

    def _steps(self, count: int) -> Iterator[Index]:
        return iter(range(count)) if self.work.unroll else self.emit.loop(count)

    def _position(self, axis: str, tile: Index) -> Index:
        """Which piece of an axis a tile is."""
        if self.counts[axis] == 1:
            return 0
        inner = 1
        for other in reversed(self.tiling.order[self.tiling.order.index(axis) + 1 :]):
            inner *= self.counts[other]
        quotient = divide(tile, inner)
        return quotient if inner * self.counts[axis] == self.tiling.tiles else modulo(quotient, self.counts[axis])

    def _start(self, axis: str, tile: Index) -> Index:
        return self._position(axis, tile) * self.sizes["yxc".index(axis)]

    def _length(self, axis: str, tile: Index) -> Index:
        index = "yxc".index(axis)
        size, piece = self.work.ofm[1 + index], self.sizes[index]
        return piece if size % piece == 0 else minimum(size - self._start(axis, tile), piece)

    def _windows(self, operand: MapOperand, tile: Index) -> tuple[Window, Window, Window]:
        y, x, c = (
            span.window(self._start(axis, tile), self._length(axis, tile), size)
            for axis, span, size in zip("yxc", operand.spans, self.sizes, strict=True)
        )
        return y, x, c

    def _slot(self, buffer: int, operand: MapOperand | Stream, tile: Index) -> Index:
        """The scratchpad offset of the buffer that holds an operand's part for a tile."""
        same = period(self.tiling.order, self.counts, operand.follows)
        return self._nth_slot(buffer, same, tile)

    def _nth_slot(self, buffer: int, same: int, tile: Index) -> Index:
        offset = self.step.buffers[buffer]
        assert offset >= 0, "a resident operand has no buffer"
        if self.tiling.slots == 1 or same == self.tiling.tiles:
            return offset
        return offset + modulo(divide(tile, same), 2) * (self.tiling.buffers[buffer] // 2)

    # --- loads ---

    def _streamed(self) -> list[tuple[int, MapOperand | Stream]]:
        """The operands that need fetching, with the number of their buffer."""
        maps = [(i, m) for i, m in enumerate(self.work.maps) if not self.step.maps[i].resident]
        streams = () if self.tiling.in_place else self.work.streams
        return [*maps, *((len(self.work.maps) + i, stream) for i, stream in enumerate(streams))]

    def _load_first(self, *, prefetched: bool) -> bool:
        loaded = [(i, operand) for i, operand in self._streamed() if not (prefetched and isinstance(operand, Stream))]
        for index, _ in loaded:
            self._load(index, 0)
        return bool(loaded)

    def _load_next(self, tile: Index) -> None:
        """Fetch what tile `tile` reads and the tile before did not."""
        for index, operand in self._streamed():
            same = period(self.tiling.order, self.counts, operand.follows)
            if same < self.tiling.tiles:
                for _ in self.emit.when(equal(modulo(tile, same), 0)):
                    self._load(index, tile)

    def _load(self, index: int, tile: Index) -> None:
        if index >= len(self.work.maps):
            self.load_stream(index - len(self.work.maps), tile)
            return
        operand, placed = self.work.maps[index], self.step.maps[index]
        counts = tuple(
            1 if isinstance(span, Repeated) else window.count
            for span, window in zip(operand.spans, self._windows(operand, tile), strict=True)
        )
        rows, columns, channels = counts[0], counts[1], counts[2] * operand.element
        dst_strides, src_strides = buffer_strides(operand, self.sizes), placed.strides[1:3]
        if operand.transposed:
            rows, columns = columns, rows
            dst_strides, src_strides = dst_strides[::-1], src_strides[::-1]
        self._dma(
            Address(isa.SCRATCHPAD, self._slot(index, operand, tile)),
            dst_strides,
            Address(placed.base, self._origin(operand, placed, tile)),
            src_strides,
            (rows, columns, channels),
        )

    def _store(self, tile: Index) -> None:
        placed = self.step.ofm
        if placed.resident:
            return
        rows, columns, channels = (self._length(axis, tile) for axis in "yxc")
        self._dma(
            Address(placed.base, self._ofm_origin(tile)),
            placed.strides[1:3],
            Address(isa.SCRATCHPAD, self._nth_slot(-1, 1, tile)),
            self._ofm_strides(),
            (rows, columns, channels * self.work.element),
        )

    def _ofm_strides(self) -> tuple[int, int]:
        """Bytes between rows and between columns in the OFM's tile buffer."""
        pixel = self.tiling.c * self.work.element
        return self.tiling.x * pixel, pixel

    def _dma(
        self,
        dst: Address,
        dst_strides: tuple[int, ...],
        src: Address,
        src_strides: tuple[int, ...],
        counts: tuple[Index, ...],
    ) -> None:
        """Rows, columns, bytes of a pixel; axes that are contiguous on both sides become one run."""
        planes, rows, run = counts
        if isinstance(run, int) and dst_strides[1] == src_strides[1] == run:
            planes, rows, run = 1, planes, rows * run
            dst_strides, src_strides = (0, dst_strides[0]), (0, src_strides[0])
            if isinstance(run, int) and dst_strides[1] == src_strides[1] == run:
                planes, rows, run = 1, 1, rows * run
        self.emit.call(
            isa.DMA, dst.base, dst.offset, *dst_strides, src.base, src.offset, *src_strides, planes, rows, run
        )

    # --- computation ---

    def _origin(self, operand: MapOperand, placed: Placed, tile: Index) -> Index:
        offset: Index = placed.offset
        if operand.shape[0] > 1:
            offset = offset + self._position("n", tile) * placed.strides[0]
        for span, window, stride in zip(operand.spans, self._windows(operand, tile), placed.strides[1:], strict=True):
            if not isinstance(span, Repeated):
                offset = offset + window.first * stride
        return offset

    def _ofm_origin(self, tile: Index) -> Index:
        placed = self.step.ofm
        offset = placed.offset + self._position("n", tile) * placed.strides[0]
        for axis, stride in zip("yxc", placed.strides[1:], strict=True):
            offset = offset + self._start(axis, tile) * stride
        return offset

    def _compute(self, tile: Index) -> None:
        windows: list[tuple[Window, Window, Window]] = []
        for index, operand in enumerate(self.work.maps):
            placed = self.step.maps[index]
            if placed.resident:
                offset, strides = self._origin(operand, placed, tile), placed.strides[1:3]
            else:
                offset, strides = self._slot(index, operand, tile), buffer_strides(operand, self.sizes)
            y, x, c = self._windows(operand, tile)
            windows.append((y, x, c))
            stride_y, stride_x, stride_c = (
                0 if isinstance(span, Repeated) else stride
                for span, stride in zip(operand.spans, (*strides, operand.element), strict=True)
            )
            self.emit.call(
                isa.IFM,
                *(index, isa.SCRATCHPAD, offset, y.count, x.count, c.count),
                *(stride_y, stride_x, stride_c, operand.dtype, operand.zero_point),
            )
        if self.step.ofm.resident:
            offset, strides = self._ofm_origin(tile), self.step.ofm.strides[1:3]
        else:
            offset, strides = self._nth_slot(-1, 1, tile), self._ofm_strides()
        lengths = (self._length("y", tile), self._length("x", tile), self._length("c", tile))
        self.emit.call(
            isa.OFM,
            *(isa.SCRATCHPAD, offset, *lengths, *strides, self.work.dtype, self.work.zero_point, *self.work.clamp),
        )
        start = (self._start("y", tile), self._start("x", tile), self._start("c", tile))
        first_stream = len(self.work.maps)
        streams = tuple(
            Address(self.step.blob, self._constants(index, tile))
            if self.tiling.in_place
            else Address(isa.SCRATCHPAD, self._slot(first_stream + index, stream, tile))
            for index, stream in enumerate(self.work.streams)
        )
        self.work.issue(self.emit, Tile(start, lengths[2], self.tiling.c, tuple(windows), streams))
