"""When the engines of an accelerator stood still, and for what: read off the commands of a priced region."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from qcompiler.simulator.cost import CommandCost, RegionCost

COPIES = ("dma", "fill")
BARRIER = "barrier"


@dataclass(frozen=True, slots=True)
class Stall:
    """No engine worked from `start` to `end`, in cycles from the region's start."""

    layer: int
    """Whose barrier it was."""
    start: int
    end: int
    unit: str
    """The DMA that was waited for."""
    limit: str
    """What that one waited for: a memory, or itself while it set up."""
    contention: tuple[str, ...]
    """Who slowed it, if anyone did."""

    @property
    def reason(self) -> str:
        slowed = f", shared with {' and '.join(self.contention)}" if self.contention else ""
        return f"{self.unit}, bound by {self.limit}{slowed}" if self.limit != self.unit else f"{self.unit}{slowed}"


def stalls(cost: RegionCost) -> Iterator[Stall]:
    """Every stall of a region, in order: what is left of each barrier when the last engine is done."""
    pending: list[CommandCost] = []
    for command in cost.commands:
        if command.name != BARRIER:
            pending.append(command)
            continue
        start = max((one.end for one in pending if one.name not in COPIES), default=command.start)
        if start < command.end:
            last = _last(pending, command.end)
            slowed = last.contention.units if last.contention is not None else ()
            yield Stall(command.layer, start, command.end, last.unit, last.limit, slowed)
        pending.clear()


def _last(commands: Sequence[CommandCost], end: int) -> CommandCost:
    return next(command for command in commands if command.end == end)


def stalled_cycles(cost: RegionCost, layers: Collection[int] | None = None) -> int:
    """Cycles in which no engine worked while a barrier waited, of some layers or all."""
    return sum(one.end - one.start for one in stalls(cost) if layers is None or one.layer in layers)
