"""Where intermediate tensors lie: one block of memory, planned when compiling."""

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""


@dataclass(frozen=True)
class Lifetime:
    """A tensor of so many bytes, written in step `first` and read last in step `last`."""

    size: int
    first: int
    last: int

    def meets(self, other: "Lifetime") -> bool:
        return self.first <= other.last and other.first <= self.last


def plan(tensors: Sequence[Lifetime], alignment: int = ALIGNMENT) -> tuple[list[int], int]:
    """An offset for every tensor, such that those that live at the same time do not overlap, and the size of it all.

    The largest are placed first, each in the lowest gap it fits (Pisarchyk and Lee 2020, greedy by size).
    """
    offsets = [0] * len(tensors)
    placed: list[int] = []
    for index in sorted(range(len(tensors)), key=lambda index: -tensors[index].size):
        tensor, offset = tensors[index], 0
        neighbours = sorted((offsets[other], other) for other in placed if tensor.meets(tensors[other]))
        for start, other in neighbours:
            if offset + tensor.size <= start:
                break
            offset = max(offset, _aligned(start + tensors[other].size, alignment))
        offsets[index] = offset
        placed.append(index)
    return offsets, max((offset + tensor.size for offset, tensor in zip(offsets, tensors, strict=True)), default=0)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
