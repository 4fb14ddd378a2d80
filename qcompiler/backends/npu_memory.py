"""Give buffers with lifetimes their places in one memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate


@dataclass(frozen=True)
class Buffer:
    """`size` bytes, alive from step `first` to step `last`, both included."""

    name: str
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class MemoryPlan:
    """Where each buffer lies. Buffers alive at the same step never overlap."""

    buffers: tuple[Buffer, ...]
    offsets: tuple[int, ...]
    """Bytes, one per buffer, multiples of the alignment."""
    peak: int
    """End of the highest buffer, in bytes, rounded up to the alignment."""
    lower_bound: int
    """Most bytes alive at one step, each buffer rounded up: no plan can need less."""

    def offset_of(self, name: str) -> int:
        return next(offset for buffer, offset in zip(self.buffers, self.offsets, strict=True) if buffer.name == name)


def aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def live_bytes(buffers: Sequence[Buffer], steps: int, alignment: int) -> list[int]:
    """Bytes alive at each of so many steps, each buffer rounded up."""
    changes = [0] * (steps + 1)
    for buffer in buffers:
        size = aligned(buffer.size, alignment)
        changes[buffer.first] += size
        changes[buffer.last + 1] -= size
    return list(accumulate(changes))[:steps]


def plan_memory(buffers: Sequence[Buffer], alignment: int, enough: int = 0) -> MemoryPlan:
    """Place buffers to keep the peak low.

    Best fit, in order of size (TFLite's greedy-by-size), of size times lifetime, of first use and of lifetime; then the
    best of these orders with the buffer that reaches highest moved to its front, again and again. The best plan
    wins. Deterministic; stops at the lower bound, or at a peak that is `enough`.
    """
    sizes = [-(-buffer.size // alignment) for buffer in buffers]
    steps = max((buffer.last + 1 for buffer in buffers), default=0)
    lower_bound = max(live_bytes(buffers, steps, alignment), default=0) // alignment
    best_peak, best_order, best_offsets = -1, list(range(len(buffers))), [0] * len(buffers)
    rivals = _rivals(buffers)
    for key in _ORDERS:
        if best_peak == lower_bound:
            break
        order = sorted(range(len(buffers)), key=partial(_rank, buffers, key))
        offsets = _place(sizes, order, rivals)
        peak, _ = _highest(sizes, offsets)
        if best_peak < 0 or peak < best_peak:
            best_peak, best_order, best_offsets = peak, order, offsets
    order, offsets = best_order, best_offsets
    for _ in range(_REPAIRS):
        if best_peak <= max(lower_bound, enough // alignment):
            break
        _, highest = _highest(sizes, offsets)
        order = [highest, *(index for index in order if index != highest)]
        offsets = _place(sizes, order, rivals)
        peak, _ = _highest(sizes, offsets)
        if peak < best_peak:
            best_peak, best_offsets = peak, offsets
    places = tuple(offset * alignment for offset in best_offsets)
    return MemoryPlan(tuple(buffers), places, best_peak * alignment, lower_bound * alignment)


_REPAIRS = 40

_Key = Callable[[Buffer], tuple[int, int, str]]
_ORDERS: tuple[_Key, ...] = (
    lambda buffer: (-buffer.size, buffer.first, buffer.name),
    lambda buffer: (-buffer.size * (buffer.last - buffer.first + 1), buffer.first, buffer.name),
    lambda buffer: (buffer.first, -buffer.size, buffer.name),
    lambda buffer: (buffer.first - buffer.last, -buffer.size, buffer.name),
)


def _rank(buffers: Sequence[Buffer], key: _Key, index: int) -> tuple[int, int, str]:
    return key(buffers[index])


# From here on sizes and offsets are in units of the alignment.


def _highest(sizes: Sequence[int], offsets: Sequence[int]) -> tuple[int, int]:
    """The highest end and the buffer that has it; (0, 0) if there is none."""
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    return max(((end, index) for index, end in enumerate(ends)), default=(0, 0))


def _rivals(buffers: Sequence[Buffer]) -> list[list[int]]:
    """For each buffer, the others that are alive at some time with it."""
    by_start = sorted(range(len(buffers)), key=lambda index: buffers[index].first)
    rivals: list[list[int]] = [[] for _ in buffers]
    alive: list[int] = []
    for index in by_start:
        alive = [other for other in alive if buffers[other].last >= buffers[index].first]
        for other in alive:
            rivals[index].append(other)
            rivals[other].append(index)
        alive.append(index)
    return rivals


def _place(sizes: Sequence[int], order: Sequence[int], rivals: Sequence[Sequence[int]]) -> list[int]:
    """One after the other into the tightest gap among the placed buffers whose lives meet."""
    ends: list[int | None] = [None] * len(sizes)
    offsets = [0] * len(sizes)
    for index in order:
        taken = sorted((offsets[other], end) for other in rivals[index] if (end := ends[other]) is not None)
        offsets[index] = _best_gap(taken, sizes[index])
        ends[index] = offsets[index] + sizes[index]
    return offsets


def _best_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    best_offset, best_gap, end = -1, 0, 0
    for low, high in taken:
        gap = low - end
        if gap >= size and (best_offset < 0 or gap < best_gap):
            best_offset, best_gap = end, gap
        end = max(end, high)
    return end if best_offset < 0 else best_offset
