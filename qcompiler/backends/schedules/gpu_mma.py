"""Products on CUDA's tensor cores: which tile a block computes, the order of its weights, and the kernel itself.

`runtime_stubs/gpu/products.cuh` stages operands and multiplies; the kernel built here calls it and finishes the sums
while they are in registers: a thread has rows of neighbouring channels, which it loads and stores at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx as _tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as _builder

from qcompiler.backends.schedules.gpu import Filled
from qcompiler.backends.te import Expr

# TVM's annotations do not describe its expressions.
tirx: Any = _tirx
builder: Any = _builder

WARP = 32
STEP = 32
"""Bytes of the reduction that one instruction multiplies."""
SHARED = 48 * 1024
"""Bytes of shared memory that a kernel gets without asking."""
FEWEST_COLUMNS = 8
"""Output channels for which tensor cores are worth it: those of one instruction."""
COUNTER_ALIGNMENT = 32
"""Counters are filled up to so many, so that sums start on a cache line."""


# --- tiles -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MmaTile:
    """What one block of threads computes, and each of its warps."""

    m: int
    n: int
    warp_m: int
    warp_n: int
    warps_k: int
    """Warps that share one tile of sums, each with a part of the reduction."""
    k: int
    """Bytes of the reduction staged at a time."""
    stages: int
    """Of them that are in shared memory at once."""
    splits: int = 1
    """Blocks that share one tile of sums."""

    @property
    def warps(self) -> int:
        return (self.m // self.warp_m) * (self.n // self.warp_n) * self.warps_k

    @property
    def threads(self) -> int:
        return WARP * self.warps

    @property
    def slots(self) -> int:
        """Rows of a thread."""
        return self.warp_m // 8

    @property
    def columns(self) -> int:
        """Neighbouring columns of a thread."""
        return self.warp_n // 4

    def shared_bytes(self, weight_share: float) -> int:
        """weight_share: bytes of weights for each byte of the reduction."""
        staged = self.stages * self.k * (self.m + round(self.n * weight_share))
        return max(staged, 4 * self.m * self.n * self.warps_k if self.warps_k > 1 else 0)

    def filled(self, m: int, n: int, k: int) -> Filled:
        """k in bytes."""
        return Filled(*(-(-size // tile) * tile for size, tile in ((m, self.m), (n, self.n), (k, self.k))))


TILES: tuple[MmaTile, ...] = (
    MmaTile(128, 128, 64, 32, 1, 64, 3),
    MmaTile(128, 64, 32, 32, 1, 64, 4),
    MmaTile(64, 128, 32, 32, 1, 64, 4),
    MmaTile(64, 64, 32, 32, 1, 128, 3),
    MmaTile(64, 64, 32, 32, 2, 64, 4),
    MmaTile(128, 32, 32, 32, 1, 64, 4),
    MmaTile(64, 32, 32, 32, 2, 128, 3),
    MmaTile(64, 32, 16, 32, 1, 64, 4),
    MmaTile(32, 64, 16, 32, 2, 128, 3),
    MmaTile(32, 64, 32, 32, 4, 128, 3),
    MmaTile(32, 32, 16, 32, 4, 128, 4),
    MmaTile(32, 32, 16, 16, 1, 64, 4),
    MmaTile(16, 64, 16, 32, 4, 128, 4),
    MmaTile(16, 32, 16, 32, 4, 128, 4),
    MmaTile(64, 16, 16, 16, 1, 64, 4),
    MmaTile(32, 16, 16, 16, 2, 64, 4),
    MmaTile(16, 16, 16, 16, 4, 128, 4),
)
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)


@dataclass(frozen=True)
class Work:
    """A product on tensor cores: for each of `groups` [m, k] × [k, n]."""

    groups: int
    m: int
    n: int
    k: int
    """In bytes of the left operand."""
    bits: int
    """Of the numbers that are multiplied: 8 or 4."""
    weight_bits: int
    """Of stored weights: 4 or 8, and 4 if `bits` is."""
    signed: bool
    """Whether the left numbers are; the right ones are."""

    @property
    def weight_share(self) -> float:
        """Bytes of weights for each byte of the left operand."""
        return self.weight_bits / self.bits


def mma_tile(work: Work, units: int, *, asynchronous: bool, fewest_columns: int = 4) -> MmaTile:
    """The tile and split of the reduction that take the least time, by `cycles`.

    Args:
        units: multiprocessors.
        asynchronous: whether copies to shared memory go on while threads compute.
        fewest_columns: neighbouring channels that a thread must have.
    """
    tiles = [tile for tile in _fitting(work) if tile.columns >= fewest_columns]
    choices = [replace(tile, splits=splits) for tile in tiles for splits in _SPLITS if _splits(work, tile, splits)]
    return min(choices, key=lambda tile: cycles(work, tile, units, asynchronous=asynchronous))


def candidates(work: Work, units: int) -> tuple[MmaTile, ...]:
    """What may suit a product: for each tile the splits that do not outgrow the device."""
    found: list[MmaTile] = []
    for tile in _fitting(work):
        blocks = _blocks(work, tile)
        found += [
            replace(tile, splits=splits)
            for splits in _SPLITS
            if _splits(work, tile, splits) and (splits == 1 or blocks * splits <= 2 * units)
        ]
    return tuple(found)


def _fitting(work: Work) -> list[MmaTile]:
    """Tiles whose stages are no more than there are, and their bytes no more than a kernel gets."""
    fitting: list[MmaTile] = []
    for tile in TILES:
        stages = -(-work.k // tile.k)
        fitted = replace(tile, stages=max(2, min(tile.stages, stages + 1)))
        if fitted.shared_bytes(work.weight_share) <= SHARED:
            fitting.append(fitted)
    return fitting


def _splits(work: Work, tile: MmaTile, splits: int) -> bool:
    """Whether each part of the reduction has something to do."""
    stages = -(-work.k // tile.k)
    return splits == 1 or (splits <= stages and (splits - 1) * -(-stages // splits) < stages)


def _blocks(work: Work, tile: MmaTile) -> int:
    return work.groups * -(-work.m // tile.m) * -(-work.n // tile.n)


# Cycles of one multiprocessor, in the order of magnitude that NVIDIA publishes or others measured of sm_80 to sm_90
# (Luo et al., Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking, IPDPS 2024:
# latencies of ldmatrix, mma and memories); not measured by us.
_START = 1500
"""Of the launch, the first loads and the epilogue."""
_MEETING = 2500
"""Of adding sums of several blocks up: atomics, a fence, a ticket, loads."""
_LOAD, _STAGE, _MEMORY = 40, 60, 600
"""Latency of fragments' loads, of a barrier between stages, of memory where nothing hides it."""
_MULTIPLY = 8
"""A scheduler's cycles of 16 x 8 sums over 32 bytes."""
_BANDWIDTH = 40
"""Bytes a cycle from the second-level cache to one multiprocessor, with all of them reading."""


def cycles(work: Work, tile: MmaTile, units: int, *, asynchronous: bool) -> float:
    """An estimate, to choose tiles by."""
    all_stages = -(-work.k // tile.k)
    stages = -(-all_stages // tile.splits)
    blocks = _blocks(work, tile) * tile.splits
    steps = tile.k // STEP // tile.warps_k
    fragments = (tile.warp_m // 16) * (tile.warp_n // 8)
    multiplying = steps * fragments * _MULTIPLY * -(-tile.warps // 4)
    loading = tile.k * (tile.m + tile.n * work.weight_share) / _BANDWIDTH
    alone = _STAGE + steps * _LOAD + max(multiplying, loading) + (0 if asynchronous else _MEMORY)
    together = max(1, SHARED * 4 // max(tile.shared_bytes(work.weight_share), 1024))
    together = max(1, min(together, 2048 // tile.threads, 4))
    on_one = -(-blocks // units)
    busy = max(-(-on_one // together) * stages * alone, on_one * stages * max(multiplying, loading))
    finishing = -(-on_one // together) * 4 * tile.slots * tile.columns
    return _START + busy + finishing + (_MEETING if tile.splits > 1 else 0)


# --- the order of weights ----------------------------------------------------------------------------------


def arranged(matrix: np.ndarray, tile: MmaTile, work: Work) -> np.ndarray:
    """Weights int8 [groups, N, K], both in whole tiles, as uint8 [groups, N / warp_n, steps, fragments / 2, 32, bytes].

    That is: for each warp's columns and each step of the reduction the words of each lane, of two fragments of eight
    columns together. Lane l multiplies column l // 4 of a fragment by the bytes at 4 (l % 4) and at 16 + 4 (l % 4) of
    the step. Column 8 f + 2 t + e of a warp is its channel t * columns + 2 f + e: so a thread, which gets the sums of
    columns 2 t and 2 t + 1 of each fragment, gets those of neighbouring channels.
    """
    groups, n, k = matrix.shape
    fragments, elements = tile.warp_n // 8, STEP * 8 // work.bits
    # [groups, warp, t, fragment, e, step, half, quarter, element]
    parts = matrix.reshape(groups, n // tile.warp_n, 4, fragments, 2, k // elements, 2, 4, elements // 8)
    # [groups, warp, step, fragment pair, column (t, e), quarter, fragment of the pair, half, element]
    parts = parts.reshape(groups, n // tile.warp_n, 4, fragments // 2, 2, 2, k // elements, 2, 4, elements // 8)
    ordered = parts.transpose(0, 1, 6, 3, 2, 5, 8, 4, 7, 9)
    lanes = ordered.reshape(groups, n // tile.warp_n, k // elements, fragments // 2, WARP, 2, 2, elements // 8)
    if work.bits == 4:
        nibbles = lanes.view(np.uint8) & 15
        return np.ascontiguousarray(nibbles[..., ::2] | nibbles[..., 1::2] << 4).reshape(*lanes.shape[:5], -1)
    if work.weight_bits == 4:
        # The word of a fragment: its first half's bytes in the low nibbles, the second's in the high ones.
        nibbles = lanes.view(np.uint8) & 15
        return np.ascontiguousarray(nibbles[..., 0, :] | nibbles[..., 1, :] << 4).reshape(*lanes.shape[:5], -1)
    return np.ascontiguousarray(lanes).view(np.uint8).reshape(*lanes.shape[:5], -1)


# --- the kernel --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """What `QWindow` and `QOperands` of products.cuh say of the left operand; sizes in bytes."""

    shape: tuple[int, ...]
    dtype: str
    window: tuple[int, ...]
    """The arguments of `QWindow`."""
    word: int
    """Bytes read at a time, 1 where words are put together."""
    bits: int
    """Of an element in memory."""
    zero_point: int
    """What padding is filled with."""

    @property
    def padding(self) -> np.ndarray:
        """uint8 [16]."""
        value = self.zero_point & 0xFF if self.bits == 8 else (self.zero_point & 15) * 0x11
        return np.full(16, value, np.uint8)


@dataclass(frozen=True)
class Elements:
    """What a tensor [m, groups * n] in memory consists of; it may be columns of a wider one."""

    dtype: str
    bits: int
    """4 or 8."""
    signed: bool
    """Not always its dtype's word: four bits of an int8 that is never negative are not."""
    pitch: int
    """Elements of a row in memory."""
    offset: int
    """Which of them is the first."""


@dataclass(frozen=True)
class Ending:
    """What becomes of sums, a few neighbouring channels at a time."""

    channels: tuple[np.ndarray, ...]
    """The bias, and what else there is per channel: [groups, channels of whole tiles], of 32 bits."""
    maps: tuple[Elements, ...]
    """The tensors that are read."""
    output: Elements
    expression: Callable[[Expr, Sequence[Expr], Sequence[Expr]], Expr]
    """Of a sum with its bias, the other numbers of the channel, and elements of the maps."""


def product(work: Work, tile: MmaTile, image: Image, ending: Ending) -> _tirx.PrimFunc:
    """``kernel(x, maps…, weights, padding, channels…, output, scratch)``.

    Tensors are words of 32 bits, bytes where rows are no multiple of that; the output is [m, groups * n].
    """
    filled = tile.filled(work.m, work.n, work.k)
    arguments = (
        f"QTile<{tile.m}, {tile.n}, {tile.warp_m}, {tile.warp_n}, {tile.warps_k}, {tile.k}, {tile.stages}>",
        f"QWindow<{', '.join(map(str, image.window))}>",
        f"QOperands<{image.word}, {image.bits}, {work.bits}, {str(work.signed).lower()}, {work.weight_bits}>",
        f"{work.m}, {filled.k // tile.k}, {tile.splits}",
    )
    with IRBuilder() as ir_builder:
        with builder.prim_func(s_tir=True):
            builder.func_name("main")
            builder.func_attr({"global_symbol": "main", "tirx.noalias": True})

            def argument(name: str, shape: Sequence[int], dtype: str) -> Any:
                return builder.arg(name, builder.Buffer(tuple(shape), dtype))

            x = argument("x", image.shape, image.dtype)
            maps = [
                _Rows(argument(f"map_{i}", *_stored(work, elements)), elements, work)
                for i, elements in enumerate(ending.maps)
            ]
            size = filled.n * filled.k * work.groups * work.weight_bits // work.bits
            weights = argument("weights", (size,), "uint8")
            padding = argument("padding", (16,), "uint8")
            channels = [
                argument(f"channels_{i}", array.shape, str(array.dtype)) for i, array in enumerate(ending.channels)
            ]
            output = _Rows(argument("output", *_stored(work, ending.output)), ending.output, work)
            scratch = argument("scratch", (scratch_words(work, tile),), "int32")
            grid = (filled.m // tile.m, filled.n // tile.n, work.groups * tile.splits)
            with (
                builder.launch_thread("blockIdx.x", grid[0]) as block_m,
                builder.launch_thread("blockIdx.y", grid[1]) as block_n,
                builder.launch_thread("blockIdx.z", grid[2]) as block_z,
                builder.launch_thread("threadIdx.x", tile.threads) as thread,
            ):
                sums = builder.alloc_buffer((tile.slots * tile.columns,), "int32", scope="local")
                call = f"qgpu_product<{', '.join(arguments)}>"
                read = (buffer.access_ptr("r") for buffer in (x, padding, weights))
                finishes = tirx.call_extern("int32", call, sums.access_ptr("rw"), *read, scratch.access_ptr("rw"))
                with builder.If(tirx.NE(finishes, 0)), builder.Then():
                    place = _Place(tile, work, block_m, block_n, block_z, thread)
                    _finish(place, sums, ending, channels, maps, output)
        function = ir_builder.get()
    assert isinstance(function, _tirx.PrimFunc)
    return function


def scratch_words(work: Work, tile: MmaTile) -> int:
    """int32 that are zero before and after: a counter for each tile, then its sums."""
    if tile.splits == 1:
        return 1
    tiles = _blocks(work, tile)
    return -(-tiles // COUNTER_ALIGNMENT) * COUNTER_ALIGNMENT + tiles * tile.m * tile.n


def _stored(work: Work, elements: Elements) -> tuple[tuple[int, ...], str]:
    """As words of 32 bits if a group's columns, in every row, are whole words."""
    lanes, size = 32 // elements.bits, work.m * elements.pitch
    whole = all(number % lanes == 0 for number in (work.n, elements.pitch, elements.offset))
    assert whole or elements.bits == 8, "four bits are packed into whole words"
    return ((size // lanes,), "int32") if whole else ((size,), elements.dtype)


@dataclass(frozen=True)
class _Place:
    """Where the sums of a thread lie."""

    tile: MmaTile
    work: Work
    block_m: Any
    block_n: Any
    block_z: Any
    thread: Any

    @property
    def group(self) -> Any:
        return self.block_z // self.tile.splits

    @property
    def warp_k(self) -> Any:
        return self.thread // (self.tile.threads // self.tile.warps_k)

    @property
    def column(self) -> Any:
        """The first channel, of its group."""
        warps_n = self.tile.n // self.tile.warp_n
        warp = self.thread // WARP % warps_n
        return self.block_n * self.tile.n + warp * self.tile.warp_n + self.thread % 4 * self.tile.columns

    def row(self, slot: Any) -> Any:
        warps_n, warps_m = self.tile.n // self.tile.warp_n, self.tile.m // self.tile.warp_m
        warp = self.thread // (WARP * warps_n) % warps_m
        return self.block_m * self.tile.m + warp * self.tile.warp_m + slot * 8 + self.thread % WARP // 4


@dataclass(frozen=True)
class _Rows:
    """A tensor [m, groups * n] of which threads read or write some neighbouring elements of a row."""

    buffer: Any
    elements: Elements
    work: Work

    @property
    def lanes(self) -> int:
        """Elements of a word; 1 where rows are no whole words."""
        return 32 // self.elements.bits if str(self.buffer.dtype) == "int32" else 1

    def words(self, columns: int) -> int:
        """Words that can be moved at once: of `columns` neighbours, no more than whole rows and groups are made of."""
        if self.lanes == 1:
            return 1
        words = min(4, max(1, columns // self.lanes))
        while any(size % (words * self.lanes) for size in (self.work.n, self.elements.pitch, self.elements.offset)):
            words //= 2
        return words

    def index(self, place: _Place, row: Any, column: Any) -> Any:
        first = row * self.elements.pitch + place.group * self.work.n + self.elements.offset
        return first // self.lanes + column // self.lanes


def _finish(
    place: _Place, sums: Any, ending: Ending, channels: Sequence[Any], maps: Sequence[_Rows], output: _Rows
) -> None:
    tile, work = place.tile, place.work
    own = [builder.alloc_buffer((tile.columns,), str(buffer.dtype), scope="local") for buffer in channels]
    # Parameters are filled up to whole tiles.
    for buffer, local in zip(channels, own, strict=True):
        from_ = tirx.address_of(buffer[place.group, place.column])
        builder.evaluate(tirx.call_extern("int32", f"qgpu_load<{tile.columns}>", local.access_ptr("w"), from_))
    piece = _piece(tile.columns, output, maps)
    # Not a loop for the device's compiler to unroll: it may index the sums by the warp, and they leave the registers.
    for slot in range(tile.slots):
        row = place.row(slot)
        mine = [tirx.EQ(place.warp_k, slot % tile.warps_k)] if tile.warps_k > 1 else []
        with builder.If(tirx.all(*mine, row < work.m)), builder.Then():
            for first in range(0, tile.columns, piece):
                with builder.If(place.column + first < work.n), builder.Then():
                    _elements(place, sums, ending, own, maps, output, piece, slot, row, first)


def _piece(columns: int, output: _Rows, maps: Sequence[_Rows]) -> int:
    """Elements that a thread finishes together: what can be moved at once everywhere."""
    return min(rows.words(columns) * rows.lanes for rows in (output, *maps))


def _elements(
    place: _Place,
    sums: Any,
    ending: Ending,
    own: Sequence[Any],
    maps: Sequence[_Rows],
    output: _Rows,
    piece: int,
    slot: int,
    row: Any,
    first: int,
) -> None:
    column = place.column + first
    loaded: list[Any] = []
    for rows in maps:
        words = builder.alloc_buffer(
            (max(1, piece // rows.lanes),), "int32" if rows.lanes > 1 else rows.elements.dtype, scope="local"
        )
        loaded.append(words)
        at = rows.index(place, row, column)
        if rows.lanes > 1:
            call = f"qgpu_load<{piece // rows.lanes}>"
            builder.evaluate(tirx.call_extern("int32", call, words.access_ptr("w"), tirx.address_of(rows.buffer[at])))
        else:
            builder.buffer_store(words, rows.buffer[at], [0])
    results: list[Any] = []
    for index in range(piece):
        bias, *others = (local[first + index] for local in own)
        total = sums[slot * place.tile.columns + first + index] + bias
        elements = [
            _element(words[index // rows.lanes], index % rows.lanes, rows)
            for rows, words in zip(maps, loaded, strict=True)
        ]
        results.append(ending.expression(total, others, elements))
    at = output.index(place, row, column)
    if output.lanes == 1:
        builder.buffer_store(output.buffer, results[0], [at])
        return
    count = piece // output.lanes
    words = builder.alloc_buffer((count,), "int32", scope="local")
    for word in range(count):
        builder.buffer_store(words, _word(results[word * output.lanes :][: output.lanes], output.elements.bits), [word])
    call = f"qgpu_store<{count}>"
    builder.evaluate(tirx.call_extern("int32", call, tirx.address_of(output.buffer[at]), words.access_ptr("r")))


def _element(word: Any, position: int, rows: _Rows) -> Any:
    """An element of a word, in its own dtype."""
    elements = rows.elements
    if rows.lanes == 1:
        return word
    if elements.signed:
        up = tirx.shift_left(word, tirx.const(32 - elements.bits * (position + 1), "int32"))
        return tirx.shift_right(up, tirx.const(32 - elements.bits, "int32")).astype(elements.dtype)
    down = tirx.shift_right(word, tirx.const(elements.bits * position, "int32"))
    return tirx.bitwise_and(down, tirx.const((1 << elements.bits) - 1, "int32")).astype(elements.dtype)


def _word(elements: Sequence[Any], bits: int) -> Any:
    mask = tirx.const((1 << bits) - 1, "int32")
    word: Any = None
    for position, element in enumerate(elements):
        low = tirx.bitwise_and(element.astype("int32"), mask)
        shifted = tirx.shift_left(low, tirx.const(bits * position, "int32")) if position else low
        word = shifted if word is None else tirx.bitwise_or(word, shifted)
    return word
