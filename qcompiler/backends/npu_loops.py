"""The driver's loops: one step of a program to commands, on any `Emitter`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qcompiler.backends.npu_emit import Emitter, Index, divide, equal, minimum, modulo
from qcompiler.backends.npu_tiling import (
    Address,
    MapOperand,
    Repeated,
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
    _Loops(emit, step).load_first_streams()


def emit_work(emit: Emitter, step: TiledWork, *, prefetched: bool, meanwhile: Callable[[], None]) -> None:
    """All tiles of one step; ends with nothing outstanding.

    prefetched: the first tile's constants are in place. meanwhile: emits what may run beside the last tile.
    """
    _Loops(emit, step).run(prefetched=prefetched, meanwhile=meanwhile)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tile, its number being an int or a TIR variable, and the part of the OFM that it is."""

    number: Index
    batch: Index
    start: tuple[Index, Index, Index]
    """First row, column, channel."""
    length: tuple[Index, Index, Index]
    depth: Index
    """Which piece of the channels."""


class _Loops:
    """Emits one step. Tiles count through the axes in the tiling's order."""

    def __init__(self, emit: Emitter, step: TiledWork) -> None:
        self.emit = emit
        self.step = step
        self.work = step.work
        self.tiling = step.tiling
        self.counts = dict(zip("nyxc", step.tiling.counts, strict=True))
        self.sizes = (step.tiling.y, step.tiling.x, step.tiling.c)
        self.tiles = step.tiling.tiles
        operands = (*self.work.maps, *self.work.streams)
        self.lasting = [*(period(self.tiling.order, self.counts, operand.followed) for operand in operands), 1]
        """By buffer, for how many tiles its part is the same; last the OFM's."""
        self.streamed = self._streamed()

    def run(self, *, prefetched: bool, meanwhile: Callable[[], None]) -> None:
        last = self.tiles - 1
        if self._load_first(prefetched=prefetched):
            self.emit.call(isa.BARRIER)
        for tile in self._steps(last):
            piece = self._piece(tile)
            if self.tiling.slots == 2:
                self._load_next(tile + 1)
                self._compute(piece)
                self.emit.call(isa.BARRIER)
                self._store(piece)
            else:
                self._compute(piece)
                self.emit.call(isa.BARRIER)
                self._store(piece)
                self._load_next(tile + 1)
                self.emit.call(isa.BARRIER)
        meanwhile()
        piece = self._piece(last)
        self._compute(piece)
        self.emit.call(isa.BARRIER)
        if not self.step.ofm.resident:
            self._store(piece)
            self.emit.call(isa.BARRIER)

    def load_first_streams(self) -> None:
        piece = self._piece(0)
        for index in range(len(self.work.streams)):
            self._load_stream(index, piece)

    # --- positions ---

    def _steps(self, count: int) -> Iterator[Index]:
        return iter(range(count)) if self.work.unroll else self.emit.loop(count)

    def _piece(self, tile: Index) -> _Piece:
        positions: dict[str, Index] = {}
        inner = 1
        for axis in reversed(self.tiling.order):
            count = self.counts[axis]
            quotient = divide(tile, inner) if count > 1 else 0
            inner *= count
            positions[axis] = quotient if inner == self.tiles else modulo(quotient, count)
        n, y, x, c = (positions[axis] for axis in "nyxc")
        start = (y * self.sizes[0], x * self.sizes[1], c * self.sizes[2])
        rows, columns, channels = (
            piece if size % piece == 0 else minimum(size - first, piece)
            for size, piece, first in zip(self.work.ofm[1:], self.sizes, start, strict=True)
        )
        return _Piece(tile, n, start, (rows, columns, channels), c)

    def _windows(self, operand: MapOperand, piece: _Piece) -> tuple[Window, Window, Window]:
        y, x, c = (
            span.window(start, length, size)
            for span, start, length, size in zip(operand.spans, piece.start, piece.length, self.sizes, strict=True)
        )
        return y, x, c

    def _slot(self, buffer: int, tile: Index) -> Index:
        """The scratchpad offset of the buffer that holds an operand's part for a tile; -1: the OFM's."""
        offset, same = self.step.buffers[buffer], self.lasting[buffer]
        assert offset >= 0, "a resident operand has no buffer"
        if self.tiling.slots == 1 or same == self.tiles:
            return offset
        return offset + modulo(divide(tile, same), 2) * (self.tiling.buffers[buffer] // 2)

    def _constants(self, index: int, piece: _Piece) -> Index:
        """Where a tile's constants lie among all."""
        return self.step.streams[index] + piece.depth * (self.tiling.c * self.work.streams[index].unit)

    # --- loads ---

    def _streamed(self) -> list[int]:
        """The numbers of the operands' buffers that need filling: feature maps first, then constants."""
        maps = [index for index, placed in enumerate(self.step.maps) if not placed.resident]
        first, streams = len(self.work.maps), 0 if self.tiling.in_place else len(self.work.streams)
        return [*maps, *range(first, first + streams)]

    def _load_first(self, *, prefetched: bool) -> bool:
        loaded = [index for index in self.streamed if not prefetched or index < len(self.work.maps)]
        piece = self._piece(0)
        for index in loaded:
            self._load(index, piece)
        return bool(loaded)

    def _load_next(self, tile: Index) -> None:
        """Fetch what tile `tile` reads and the tile before did not."""
        piece = self._piece(tile)
        for index in self.streamed:
            same = self.lasting[index]
            if same < self.tiles:
                for _ in self.emit.when(equal(modulo(tile, same), 0)):
                    self._load(index, piece)

    def _load(self, index: int, piece: _Piece) -> None:
        if index >= len(self.work.maps):
            self._load_stream(index - len(self.work.maps), piece)
            return
        operand, placed = self.work.maps[index], self.step.maps[index]
        windows = self._windows(operand, piece)
        counts = tuple(
            1 if isinstance(span, Repeated) else window.count
            for span, window in zip(operand.spans, windows, strict=True)
        )
        rows, columns, channels = counts[0], counts[1], counts[2] * operand.element
        dst_strides, src_strides = buffer_strides(operand, self.sizes), placed.strides[1:3]
        if operand.transposed:
            rows, columns = columns, rows
            dst_strides, src_strides = dst_strides[::-1], src_strides[::-1]
        self._dma(
            Address(isa.SCRATCHPAD, self._slot(index, piece.number)),
            dst_strides,
            Address(placed.base, self._origin(operand, placed, piece, windows)),
            src_strides,
            (rows, columns, channels),
        )

    def _load_stream(self, index: int, piece: _Piece) -> None:
        stream = self.work.streams[index]
        source = self._constants(index, piece)
        size = piece.length[2] * stream.unit if stream.unit else len(stream.data)
        target = self._slot(len(self.work.maps) + index, piece.number)
        self.emit.call(isa.DMA, isa.SCRATCHPAD, target, 0, 0, self.step.blob, source, 0, 0, 1, 1, size)

    def _store(self, piece: _Piece) -> None:
        placed = self.step.ofm
        if placed.resident:
            return
        rows, columns, channels = piece.length
        self._dma(
            Address(placed.base, self._ofm_origin(piece)),
            placed.strides[1:3],
            Address(isa.SCRATCHPAD, self._slot(-1, piece.number)),
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

    def _origin(
        self, operand: MapOperand, placed: Placed, piece: _Piece, windows: tuple[Window, Window, Window]
    ) -> Index:
        offset: Index = placed.offset
        if operand.shape[0] > 1:
            offset = offset + piece.batch * placed.strides[0]
        for span, window, stride in zip(operand.spans, windows, placed.strides[1:], strict=True):
            if not isinstance(span, Repeated):
                offset = offset + window.first * stride
        return offset

    def _ofm_origin(self, piece: _Piece) -> Index:
        placed = self.step.ofm
        offset = placed.offset + piece.batch * placed.strides[0]
        for start, stride in zip(piece.start, placed.strides[1:], strict=True):
            offset = offset + start * stride
        return offset

    def _compute(self, piece: _Piece) -> None:
        windows: list[tuple[Window, Window, Window]] = []
        for index, operand in enumerate(self.work.maps):
            placed = self.step.maps[index]
            y, x, c = window = self._windows(operand, piece)
            windows.append(window)
            if placed.resident:
                offset, strides = self._origin(operand, placed, piece, window), placed.strides[1:3]
            else:
                offset, strides = self._slot(index, piece.number), buffer_strides(operand, self.sizes)
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
            offset, strides = self._ofm_origin(piece), self.step.ofm.strides[1:3]
        else:
            offset, strides = self._slot(-1, piece.number), self._ofm_strides()
        self.emit.call(
            isa.OFM,
            *(isa.SCRATCHPAD, offset, *piece.length, *strides, self.work.dtype, self.work.zero_point, *self.work.clamp),
        )
        first_stream = len(self.work.maps)
        streams = tuple(
            Address(self.step.blob, self._constants(index, piece))
            if self.tiling.in_place
            else Address(isa.SCRATCHPAD, self._slot(first_stream + index, piece.number))
            for index in range(len(self.work.streams))
        )
        self.work.issue(self.emit, Tile(piece.start, piece.length[2], self.tiling.c, tuple(windows), streams))
