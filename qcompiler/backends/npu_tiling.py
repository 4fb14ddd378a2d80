"""How an operator is cut into tiles that fit the scratchpad.

An operator is a `Work`: its OFM as [N, H, W, C], the feature maps it reads and the constants it streams. Each axis
of a feature map follows the OFM's axis in some way, a `Span`: sliding windows for convolutions, the same position
for elementwise operators, everything for the input channels of a convolution. From the spans follow both the size
of a tile (to choose it) and the window that a tile reads (to emit it), so the two cannot disagree.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from math import prod
from typing import Literal, Protocol

from qcompiler.backends.npu_emit import Emitter, Index, divide, maximum, minimum
from qcompiler.backends.npu_memory import aligned
from qcompiler.graph import element_count
from qcompiler.simulator import isa
from qcompiler.target import Npu

Dims4 = tuple[int, int, int, int]
Strides4 = tuple[int, int, int, int]


@dataclass(frozen=True)
class Window:
    """What a tile reads along one axis; never empty."""

    first: Index
    count: Index
    before: Index = 0
    """Positions of padding before `first`, as a kernel command's pad wants it; negative if `first` lies before all."""


class Span(Protocol):
    """How one axis of an operand follows the OFM's axis."""

    @property
    def follows(self) -> bool:
        """False where every tile reads the same."""
        ...

    def extent(self, tile: int) -> int:
        """Most positions that `tile` consecutive outputs read."""
        ...

    def window(self, start: Index, length: Index, tile: int) -> Window:
        """What outputs start … start + length - 1 read; length <= tile."""
        ...


@dataclass(frozen=True)
class Same:
    """Output i reads position i."""

    follows = True

    def extent(self, tile: int) -> int:
        return tile

    def window(self, start: Index, length: Index, tile: int) -> Window:
        return Window(start, length)


@dataclass(frozen=True)
class Whole:
    """Every output reads the whole axis."""

    size: int
    follows = False

    def extent(self, tile: int) -> int:
        return self.size

    def window(self, start: Index, length: Index, tile: int) -> Window:
        return Window(0, self.size)


@dataclass(frozen=True)
class Repeated:
    """An axis of one position, broadcast: the command sees it as long as the output, with stride 0."""

    follows = False

    def extent(self, tile: int) -> int:
        return 1

    def window(self, start: Index, length: Index, tile: int) -> Window:
        return Window(0, length)


@dataclass(frozen=True)
class Sliding:
    """Output i reads kernel positions from i * stride - pad on, `dilation` apart."""

    size: int
    kernel: int
    stride: int
    dilation: int
    pad: int
    follows = True

    def extent(self, tile: int) -> int:
        return min(self.size, (tile - 1) * self.stride + (self.kernel - 1) * self.dilation + 1)

    def window(self, start: Index, length: Index, tile: int) -> Window:
        low = start * self.stride - self.pad
        high = low + (length - 1) * self.stride + (self.kernel - 1) * self.dilation + 1
        # A window wholly in the padding still fetches a position, which nobody then reads.
        first = minimum(maximum(low, 0), self.size - 1)
        return Window(first, maximum(minimum(high, self.size) - first, 1), first - low)


@dataclass(frozen=True)
class Transposed:
    """Output i gathers positions p with i + pad == p * stride + tap * dilation."""

    size: int
    kernel: int
    stride: int
    dilation: int
    pad: int
    follows = True

    def extent(self, tile: int) -> int:
        return min(self.size, (tile - 1 + (self.kernel - 1) * self.dilation) // self.stride + 1)

    def window(self, start: Index, length: Index, tile: int) -> Window:
        reach = (self.kernel - 1) * self.dilation
        low = divide(start + (self.pad - reach + self.stride - 1), self.stride)
        high = divide(start + length + (self.pad - 1), self.stride) + 1
        first = minimum(maximum(low, 0), self.size - 1)
        count = maximum(minimum(high, self.size) - first, 1)
        return Window(first, count, start + self.pad - first * self.stride)


@dataclass(frozen=True)
class Grouped:
    """Channels of a grouped convolution: a tile of outputs is whole groups, or lies inside one."""

    out_depth: int
    in_depth: int
    follows = True

    def extent(self, tile: int) -> int:
        return max(tile // self.out_depth, 1) * self.in_depth

    def window(self, start: Index, length: Index, tile: int) -> Window:
        first = divide(start, self.out_depth) * self.in_depth
        if tile % self.out_depth == 0:
            return Window(first, divide(length, self.out_depth) * self.in_depth)
        return Window(first, self.in_depth)


@dataclass(frozen=True)
class Tabled:
    """Output i reads positions reads[i][0] … reads[i][1]; tiles are unrolled, so that starts are known."""

    reads: tuple[tuple[int, int], ...]
    follows = True

    def extent(self, tile: int) -> int:
        return max(
            self._range(start, min(tile, len(self.reads) - start))[1] for start in range(0, len(self.reads), tile)
        )

    def window(self, start: Index, length: Index, tile: int) -> Window:
        assert isinstance(start, int) and isinstance(length, int)
        return Window(*self._range(start, length))

    def _range(self, start: int, length: int) -> tuple[int, int]:
        part = self.reads[start : start + length]
        low = min(low for low, _ in part)
        return low, max(high for _, high in part) + 1 - low


@dataclass(frozen=True)
class MapOperand:
    """A feature map an operator reads, seen as [N, H, W, C]."""

    source: int
    """Which input of the node."""
    shape: Dims4
    y: Span
    x: Span
    c: Span
    dtype: int
    """Index of `isa.DTYPES`."""
    zero_point: int
    transposed: bool = False
    """In memory, and in its tile buffer, columns come before rows: [N, W, H, C]."""

    @property
    def memory_shape(self) -> Dims4:
        n, h, w, c = self.shape
        return (n, w, h, c) if self.transposed else self.shape

    @property
    def element(self) -> int:
        """Bytes of one."""
        return isa.element_bytes(self.dtype)

    @cached_property
    def spans(self) -> tuple[Span, Span, Span]:
        return (self.y, self.x, self.c)

    @cached_property
    def followed(self) -> str:
        """The axes of the output that what is read depends on."""
        axes = zip("nyxc", (self.shape[0] > 1, *(span.follows for span in self.spans)), strict=True)
        return "".join(axis for axis, follows in axes if follows)


@dataclass(frozen=True)
class Stream:
    """Constants an operator reads: weights, scale records, tables."""

    data: bytes
    unit: int
    """Bytes per output channel; 0 where every tile needs all of it."""
    weights: Literal["int8", "uint8"] | None = None
    """Their type, if these are weights a target may keep encoded."""
    zero_point: int = 0
    """Of the weights."""
    places: int = 0
    """Bytes at the end of each unit that say where weights stand, which no code makes shorter."""

    def extent(self, tile_c: int) -> int:
        return tile_c * self.unit or len(self.data)

    @property
    def followed(self) -> str:
        """The axes of the output that what is read depends on."""
        return "c" if self.unit else ""


@dataclass(frozen=True)
class Address:
    base: int
    offset: Index


@dataclass(frozen=True)
class Tile:
    """One tile under way, as the operator's `issue` sees it."""

    start: tuple[Index, Index, Index]
    """First OFM row, column, channel."""
    depth: Index
    """OFM channels of this tile."""
    full_depth: int
    """OFM channels of every tile but perhaps the last."""
    windows: tuple[tuple[Window, Window, Window], ...]
    """Rows, columns, channels that each feature map contributes."""
    streams: tuple[Address, ...]


@dataclass(frozen=True)
class Work:
    """An operator that runs on an engine, ready to be tiled."""

    ofm: Dims4
    dtype: int
    zero_point: int
    clamp: tuple[int, int]
    maps: tuple[MapOperand, ...]
    streams: tuple[Stream, ...]
    issue: Callable[[Emitter, Tile], None]
    """Emits the registers and the operation; the IFM and OFM registers are set already."""
    tiled: str = "yxc"
    """Axes that may be cut."""
    group: int = 1
    """A channel tile is a multiple or a divisor of this."""
    unroll: bool = False
    """Tile positions must be known when the driver is written."""

    @property
    def element(self) -> int:
        """Bytes of one element of the OFM."""
        return isa.element_bytes(self.dtype)


@dataclass(frozen=True)
class Tiling:
    """The choice for one operator."""

    y: int
    x: int
    c: int
    order: str
    """Loop axes, outermost first."""
    slots: int
    """2: the next tile is fetched and the last one stored while this one is computed."""
    counts: tuple[int, int, int, int]
    """Tiles along n, y, x, c."""
    in_place: bool
    """The engine reads the constants where they lie."""
    buffers: tuple[int, ...]
    """Scratchpad bytes of all slots: one entry per feature map, one per stream, one for the OFM; 0 = none needed."""
    moved: int
    """Bytes of DMA traffic."""
    transfer: float
    """Cycles of DMA."""
    exposed: float
    """Those of feature maps before the first tile and after the last."""
    cycles: float
    """What `choose_tiling` reckons it costs, MACs aside."""

    @property
    def tiles(self) -> int:
        n, y, x, c = self.counts
        return n * y * x * c

    def count(self, axis: str) -> int:
        return self.counts["nyxc".index(axis)]


CHANNEL_STEP = 16
"""Channel tiles are multiples of this unless nothing else fits: arrays work on whole blocks of channels."""

_BLOCK_PIXELS = 64

TILE_CYCLES = 64
"""What one more tile is taken to cost beside its traffic: registers, issue, a barrier."""


@dataclass(frozen=True)
class Bus:
    """DMA between an external memory and the scratchpad, in cycles of the accelerator."""

    latency: float
    """Of one command."""
    cycles_per_byte: float
    burst: int
    """Contiguous runs shorter than this cost as much."""

    def cycles(self, commands: int, size: int, run: int) -> float:
        """For `size` bytes in contiguous runs of `run`."""
        on_bus = size * max(self.burst, run) // max(run, 1)
        return commands * self.latency + on_bus * self.cycles_per_byte


@dataclass(frozen=True)
class Prices:
    """What moving bytes costs on one accelerator."""

    maps: Bus
    constants: Bus
    engine_cycles_per_byte: float
    """Of operands an engine reads or writes in the scratchpad."""
    in_place: Bus | None
    """For engines that read constants where they lie, if they can."""

    @property
    def once(self) -> int:
        """Pixels of an OFM up to which reading constants in place is tried: they are one block, so each is read once.

        DMA into the scratchpad moves as many bytes; it is preferred beyond one pixel unless it is slower.
        """
        assert self.in_place is not None
        return _BLOCK_PIXELS if self.in_place.cycles_per_byte < self.constants.cycles_per_byte else 1

    @classmethod
    def of(cls, npu: Npu) -> "Prices":
        inside = npu.memory_name("scratchpad")
        scratchpad = npu.scratchpad.bandwidth.per_cycle(npu.clock)

        def bus(name: str) -> Bus:
            memory = npu.memories[name]
            path = npu.path_between(name, inside)
            assert path is not None, f"the target has no path {name} -> {inside}"
            dma = npu.dma[path]
            rate = min(memory.bandwidth.per_cycle(npu.clock), dma.bandwidth.per_cycle(npu.clock), scratchpad)
            latency = max(memory.latency.cycles(npu.clock), npu.scratchpad.latency.cycles(npu.clock))
            return Bus(latency + dma.setup.cycles(npu.clock), 1 / rate, memory.burst)

        memory = npu.memories[npu.weight_memory]
        return cls(
            bus(npu.memory_name("external")),
            bus(npu.weight_memory),
            1 / scratchpad,
            Bus(0, 1 / (memory.engine_bandwidth or memory.bandwidth).per_cycle(npu.clock), memory.burst)
            if npu.reads_constants_in_place
            else None,
        )


def extents(operand: MapOperand, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    y, x, c = (span.extent(size) for span, size in zip(operand.spans, tile, strict=True))
    return y, x, c


def buffer_strides(operand: MapOperand, tile: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes between rows and between columns in an operand's tile buffer."""
    y, x, c = extents(operand, tile)
    pixel = c * operand.element
    return (pixel, y * pixel) if operand.transposed else (x * pixel, pixel)


def choose_tiling(work: Work, resident: tuple[bool, ...], budget: int, alignment: int, prices: Prices) -> Tiling | None:
    """The cheapest tiling whose buffers fit `budget` bytes, or None.

    `resident` says for each feature map, and last for the OFM, that it is in the scratchpad already. Cost is the
    cycles of DMA and of the engine's accesses to the scratchpad, plus those the engine has to wait for: the first
    tile's fetch and the last one's store if there are two slots, all DMA otherwise. MACs are the same for
    every tiling and left out. Constants stay where they are if the engine reaches them there and reads each only
    once, as for an OFM of one pixel.
    """
    in_place = prices.in_place is not None and work.ofm[0] == 1 and work.ofm[1] * work.ofm[2] <= prices.once
    for fine in (False, True):
        best: Tiling | None = None
        for tile in _candidates(work, planes=all(resident), fine=fine):
            flows, counts = _flows(work, resident, tile, in_place=in_place), _tile_counts(work, tile)
            for slots in (2, 1):
                buffers = _buffers(flows, counts, slots, alignment)
                if sum(buffers) > budget:
                    continue
                for order in _orders(counts):
                    tiling = _evaluate(flows, tile, counts, order, slots, buffers, prices, in_place=in_place)
                    if best is None or tiling.cycles < best.cycles:
                        best = tiling
                break
        if best is not None:
            return best
    return None


def fills_blocks(tiling: Tiling, work: Work) -> bool:
    """Whether its tiles are whole blocks of channels, as arrays want them."""
    return tiling.c >= min(CHANNEL_STEP, work.ofm[3])


def smallest_need(work: Work, alignment: int) -> int:
    """Scratchpad bytes of the smallest tile, nothing being resident."""
    nothing = (False,) * (len(work.maps) + 1)
    tiles = _candidates(work, planes=False, fine=True)
    return min(
        sum(_buffers(_flows(work, nothing, tile, in_place=False), _tile_counts(work, tile), 1, alignment))
        for tile in tiles
    )


def _candidates(work: Work, *, planes: bool, fine: bool) -> Iterator[tuple[int, int, int]]:
    """Tile heights, widths and depths to try. `planes` leaves height and width whole; `fine` admits any depth."""
    _, height, width, depth = work.ofm
    heights = _cuts(height, 1) if "y" in work.tiled and not planes else [height]
    widths = _cuts(width, 1) if "x" in work.tiled and not planes else [width]
    depths = [depth]
    if "c" in work.tiled:
        depths = [size for size in _cuts(depth, CHANNEL_STEP) if size % work.group == 0 or work.group % size == 0]
        if work.group > 1:
            depths += [size * work.group for size in _cuts(depth // work.group, 1)]
    if not fine:
        depths = [size for size in depths if size >= min(CHANNEL_STEP, depth)]
    for y, c in product(heights, sorted(set(depths), reverse=True)):
        # Columns are cut only where a single row is too much.
        for x in widths if y == 1 else [width]:
            yield y, x, c


@cache
def _cuts(size: int, step: int) -> list[int]:
    """Tile sizes to try, largest first: even splits in multiples of `step`, then powers of two below `step`."""
    cuts = {size, 1}
    parts = 1
    while parts < size:
        cuts.add(min(size, aligned(-(-size // parts), step)))
        parts += max(1, parts // 2)
    below = step // 2
    while below > 1:
        cuts.add(min(size, below))
        below //= 2
    return sorted(cuts, reverse=True)


def _tile_counts(work: Work, tile: tuple[int, int, int]) -> tuple[int, int, int, int]:
    n, height, width, depth = work.ofm
    return n, -(-height // tile[0]), -(-width // tile[1]), -(-depth // tile[2])


def _orders(counts: tuple[int, int, int, int]) -> tuple[str, ...]:
    """Loop orders that differ."""
    *pixels, depths = counts
    return ("cnyx", "nyxc") if depths > 1 and max(pixels) > 1 else ("cnyx",)


@dataclass(frozen=True, slots=True)
class _Flow:
    """What an operator reads or writes, cut into tiles. Sizes in bytes."""

    followed: str
    """Axes that it depends on."""
    first: int
    """In the first tile."""
    size: int
    """In all tiles, each part once."""
    run: int
    """Contiguous ones."""
    is_map: bool
    streamed: bool
    """Through a buffer of its own; the engine reaches others where they lie."""


def _flows(work: Work, resident: tuple[bool, ...], tile: tuple[int, int, int], *, in_place: bool) -> list[_Flow]:
    """The feature maps, the constants, the OFM."""
    flows: list[_Flow] = []
    for operand, is_resident in zip(work.maps, resident, strict=False):
        y, x, c = extents(operand, tile)
        size = operand.shape[0] * operand.element
        for span, outputs, length in zip(operand.spans, work.ofm[1:], tile, strict=True):
            if not span.follows:
                size *= span.extent(length)
            else:
                size *= outputs if isinstance(span, Same) else _total(span, outputs, length)
        run = _run((x, y, c) if operand.transposed else (y, x, c), operand.memory_shape) * operand.element
        flows.append(_Flow(operand.followed, y * x * c * operand.element, size, run, True, not is_resident))
    for stream in work.streams:
        first = stream.extent(tile[2])
        flows.append(_Flow(stream.followed, first, len(stream.data), first, False, not in_place))
    size, run = element_count(work.ofm) * work.element, _run(tile, work.ofm) * work.element
    flows.append(_Flow("nyxc", tile[0] * tile[1] * tile[2] * work.element, size, run, True, not resident[-1]))
    return flows


def _buffers(flows: Sequence[_Flow], counts: tuple[int, int, int, int], slots: int, alignment: int) -> tuple[int, ...]:
    """Bytes in the scratchpad for each; all slots for what differs between tiles."""
    cut = {axis for axis, count in zip("nyxc", counts, strict=True) if count > 1}
    return tuple(
        aligned(flow.first, alignment) * (1 if cut.isdisjoint(flow.followed) else slots) if flow.streamed else 0
        for flow in flows
    )


def _evaluate(
    flows: Sequence[_Flow],
    tile: tuple[int, int, int],
    counts: tuple[int, int, int, int],
    order: str,
    slots: int,
    buffers: tuple[int, ...],
    prices: Prices,
    *,
    in_place: bool,
) -> Tiling:
    by_axis = dict(zip("nyxc", counts, strict=True))
    tiles = prod(counts)
    moved = in_tile = 0
    cycles = waited = exposed = 0.0
    for flow in flows:
        if not flow.is_map and not flow.streamed:
            assert prices.in_place is not None
            cycles += flow.size * prices.in_place.cycles_per_byte
            continue
        in_tile += flow.first
        if not flow.streamed:
            continue
        bus = prices.maps if flow.is_map else prices.constants
        fetches = tiles // period(order, by_axis, flow.followed)
        size = flow.size * (fetches // prod(by_axis[axis] for axis in flow.followed))
        cycles += bus.cycles(fetches, size, flow.run)
        beginning = bus.cycles(1, flow.first, flow.run)
        waited += 0 if flow.is_map else beginning
        exposed += beginning if flow.is_map else 0
        moved += size
    engine = tiles * (in_tile * prices.engine_cycles_per_byte + TILE_CYCLES)
    total = engine + cycles + (waited + exposed if slots == 2 else cycles)
    return Tiling(*tile, order, slots, counts, in_place, buffers, moved, cycles, exposed, total)


def _run(tile: tuple[int, int, int], shape: Dims4) -> int:
    """Contiguous elements of a tile inside a dense feature map."""
    y, x, c = tile
    if c < shape[3]:
        return c
    return x * c if x < shape[2] else y * x * c


@cache
def _total(span: Span, size: int, tile: int) -> int:
    """Positions read along an axis by all its tiles together."""
    total = 0
    for start in range(0, size, tile):
        count = span.window(start, min(tile, size - start), tile).count
        assert isinstance(count, int)
        total += count
    return total


def period(order: str, counts: dict[str, int], followed: str) -> int:
    """Consecutive tiles that read the same part of an operand, which depends on the axes `followed`."""
    same = 1
    for axis in reversed(order):
        if counts[axis] > 1:
            if axis in followed:
                break
            same *= counts[axis]
    return same
