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


def live_bytes(buffers: Sequence[Buffer], step: int, alignment: int) -> int:
    return sum(aligned(buffer.size, alignment) for buffer in buffers if buffer.first <= step <= buffer.last)


def plan_memory(buffers: Sequence[Buffer], alignment: int, enough: int = 0) -> MemoryPlan:
    """Place buffers to keep the peak low.

    Best fit, in order of size (TFLite's greedy-by-size), of size times lifetime, of first use and of lifetime; then the
    best of these orders with the buffer that reaches highest moved to its front, again and again. The best plan
    wins. Deterministic; stops at the lower bound, or at a peak that is `enough`.
    """
    lower_bound = _most_live(buffers, alignment)
    best_peak, best_order, best_offsets = -1, list(range(len(buffers))), (0,) * len(buffers)
    rivals = _rivals(buffers)
    for key in _ORDERS:
        order = sorted(range(len(buffers)), key=partial(_rank, buffers, key))
        offsets = _place(buffers, order, rivals, alignment)
        peak, _ = _highest(buffers, offsets, alignment)
        if best_peak < 0 or peak < best_peak:
            best_peak, best_order, best_offsets = peak, order, offsets
    order, offsets = best_order, best_offsets
    for _ in range(_REPAIRS):
        if best_peak <= max(lower_bound, enough):
            break
        _, highest = _highest(buffers, offsets, alignment)
        order = [highest, *(index for index in order if index != highest)]
        offsets = _place(buffers, order, rivals, alignment)
        peak, _ = _highest(buffers, offsets, alignment)
        if peak < best_peak:
            best_peak, best_offsets = peak, offsets
    return MemoryPlan(tuple(buffers), best_offsets, best_peak, lower_bound)


def _most_live(buffers: Sequence[Buffer], alignment: int) -> int:
    """The most `live_bytes` of any step."""
    sizes = [aligned(buffer.size, alignment) for buffer in buffers]
    starts = ((buffer.first, size) for buffer, size in zip(buffers, sizes, strict=True))
    ends = ((buffer.last + 1, -size) for buffer, size in zip(buffers, sizes, strict=True))
    # What ends before a step sorts in front of what starts with it.
    return max(accumulate((change for _, change in sorted((*starts, *ends))), initial=0))


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


def _highest(buffers: Sequence[Buffer], offsets: Sequence[int], alignment: int) -> tuple[int, int]:
    """The highest end and the buffer that has it; (0, 0) if there is none."""
    ends = [offset + aligned(buffer.size, alignment) for offset, buffer in zip(offsets, buffers, strict=True)]
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


def _place(
    buffers: Sequence[Buffer], order: Sequence[int], rivals: Sequence[Sequence[int]], alignment: int
) -> tuple[int, ...]:
    """One after the other into the tightest gap among the placed buffers whose lives meet."""
    placed: dict[int, int] = {}
    for index in order:
        taken = sorted(
            (placed[other], placed[other] + buffers[other].size) for other in rivals[index] if other in placed
        )
        placed[index] = _best_gap(taken, buffers[index].size, alignment)
    return tuple(placed[index] for index in range(len(buffers)))


def _best_gap(taken: Sequence[tuple[int, int]], size: int, alignment: int) -> int:
    best_offset, best_gap, end = None, None, 0
    for low, high in taken:
        start = aligned(end, alignment)
        gap = low - start
        if gap >= size and (best_gap is None or gap < best_gap):
            best_offset, best_gap = start, gap
        end = max(end, high)
    return aligned(end, alignment) if best_offset is None else best_offset
