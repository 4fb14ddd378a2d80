"""When the commands between two barriers run, if units that work at the same time share the ports of memories.

Each engine, and each channel of a DMA, takes its commands in the order they were issued; all may start at once. While
a command moves bytes it asks its ports for the rate at which it would move them alone. A port that is asked for more
than its bandwidth gives every command the same share and what one leaves of its share to the others (max-min fairness:
a round-robin arbiter between bursts, of the same size for all); a command runs at the slowest of its ports. Commands
start and end at whole cycles.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Self

from qcompiler.target import Npu

_ROUNDING = 1e-6
"""Of a cycle: what sums of fractions may exceed a whole number by."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of an accelerator's memories that several units use."""

    engines: Mapping[str, str]
    """By memory, the port through which engines reach it, if they share one."""
    copies: Mapping[str, str]
    """The same for DMA."""
    bandwidth: Mapping[str, float]
    """Of each port, bytes a cycle."""
    memory: Mapping[str, str]
    """The memory of each port."""

    @classmethod
    def of(cls, npu: Npu) -> Self:
        engines: dict[str, str] = {}
        copies: dict[str, str] = {}
        for name, memory in npu.memories.items():
            copiers = sum(
                dma.channels
                for dma in npu.dma.values()
                if any(name in (path.source, path.destination) for path in dma.paths)
            )
            if memory.ports == "shared" and len(npu.engines) + copiers > 1:
                engines[name] = copies[name] = name
            elif memory.ports == "dual" and len(npu.engines) > 1:
                engines[name] = f"{name} of engines"
            if memory.ports != "shared" and copiers > 1:
                copies[name] = f"{name} of copies"
        owners = {port: name for ports in (engines, copies) for name, port in ports.items()}
        rates = {port: npu.memories[name].bandwidth.per_cycle(npu.clock) for port, name in owners.items()}
        return cls(engines, copies, rates, owners)


@dataclass(frozen=True, slots=True)
class Use:
    """What a command asks of a port that others use too."""

    port: str
    rate: float
    """Bytes a cycle while it moves, if nothing slows it."""


@dataclass(frozen=True, slots=True)
class Task:
    """A command apart from when it runs."""

    unit: str
    setup: int
    """Cycles before it uses any memory."""
    moving: int
    """Cycles after those, alone on its ports."""
    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True)
class Contention:
    """By what a command was slowed."""

    port: str
    """The one that cost most."""
    cycles: int
    """How much longer it took."""
    units: tuple[str, ...]
    """Who else used the port then."""


@dataclass(frozen=True, slots=True)
class Run:
    """When a command ran. Cycles."""

    channel: int
    start: int
    end: int
    contention: Contention | None


def run(tasks: Sequence[Task], begin: int, channels: Mapping[str, int], ports: Mapping[str, float]) -> list[Run]:
    """Run commands that were issued together, every unit being idle.

    Args:
        tasks: in the order they were issued.
        begin: when they were issued, in cycles.
        channels: how many commands each unit runs at a time.
        ports: bytes a cycle of each port that a task uses.
    """
    if _may_contend(tasks, channels, ports):
        return _Shared(tasks, begin, channels, ports).run()
    free = {unit: [begin] * count for unit, count in channels.items()}
    runs: list[Run] = []
    for task in tasks:
        slots = free[task.unit]
        channel = slots.index(min(slots)) if len(slots) > 1 else 0
        start = slots[channel]
        slots[channel] = end = start + task.setup + task.moving
        runs.append(Run(channel, start, end, None))
    return runs


def _may_contend(tasks: Sequence[Task], channels: Mapping[str, int], ports: Mapping[str, float]) -> bool:
    """Whether some port could be asked for more than it has."""
    if len(tasks) == 1:
        return False
    rates: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        for use in task.uses:
            rates.setdefault(use.port, {}).setdefault(task.unit, []).append(use.rate)
    return any(
        sum(sum(sorted(asked)[-channels[unit] :]) for unit, asked in by_unit.items()) > ports[port]
        for port, by_unit in rates.items()
    )


class _Active:
    """A command that runs."""

    def __init__(self, index: int, task: Task, channel: int, start: int) -> None:
        self.index, self.task, self.channel, self.start = index, task, channel, start
        self.moves_from = start + task.setup
        self.left = float(task.moving)
        """Cycles it would still move alone."""
        self.lost: dict[str, float] = {}
        """Cycles by port."""
        self.met: dict[str, dict[str, None]] = {}
        """Other units by port."""

    @property
    def name(self) -> str:
        return f"{self.task.unit} {self.channel}" if self.channel else self.task.unit

    def lose(self, port: str, cycles: float, users: Sequence["_Active"]) -> None:
        self.lost[port] = self.lost.get(port, 0.0) + cycles
        self.met.setdefault(port, {}).update(dict.fromkeys(user.name for user in users if user is not self))

    def run(self, end: int) -> Run:
        cycles = end - self.moves_from - self.task.moving
        contention = None
        if cycles > 0:
            worst = max(self.lost, key=lambda port: self.lost[port])
            contention = Contention(worst, cycles, tuple(self.met[worst]))
        return Run(self.channel, self.start, end, contention)


@dataclass(frozen=True, slots=True)
class _Pace:
    """What a command gets of the rate it asks for, and at which port it gets least."""

    speed: float = 1.0
    port: str = ""


_FULL = _Pace()


class _Shared:
    """Steps from one event to the next: something ends, or begins to move."""

    def __init__(
        self, tasks: Sequence[Task], begin: int, channels: Mapping[str, int], ports: Mapping[str, float]
    ) -> None:
        self.tasks, self.ports, self.now = tasks, ports, begin
        self.waiting: dict[str, list[int]] = {}
        for index, task in reversed(list(enumerate(tasks))):
            self.waiting.setdefault(task.unit, []).append(index)
        self.idle = {unit: list(reversed(range(channels[unit]))) for unit in self.waiting}
        self.active: list[_Active] = []
        self.runs: dict[int, Run] = {}

    def run(self) -> list[Run]:
        self._start()
        while self.active:
            moving = [one for one in self.active if one.moves_from <= self.now]
            users = _users(moving)
            paces = self._paces(moving, users)
            events = [one.moves_from for one in self.active if one.moves_from > self.now]
            events += [
                self.now + max(0, ceil(one.left / pace.speed - _ROUNDING))
                for one, pace in zip(moving, paces, strict=True)
            ]
            passed = min(events) - self.now
            for one, pace in zip(moving, paces, strict=True):
                one.left -= passed * pace.speed
                if pace.port:
                    one.lose(pace.port, passed * (1 - pace.speed), users[pace.port])
            self.now += passed
            self._finish()
            self._start()
        return [self.runs[index] for index in range(len(self.tasks))]

    def _start(self) -> None:
        for unit, waiting in self.waiting.items():
            while waiting and self.idle[unit]:
                index = waiting.pop()
                self.active.append(_Active(index, self.tasks[index], self.idle[unit].pop(), self.now))

    def _finish(self) -> None:
        done = [one for one in self.active if one.moves_from <= self.now and one.left <= _ROUNDING]
        self.active = [one for one in self.active if one not in done]
        for one in done:
            self.runs[one.index] = one.run(self.now)
            self.idle[one.task.unit].append(one.channel)
            self.idle[one.task.unit].sort(reverse=True)

    def _paces(self, moving: Sequence[_Active], users: Mapping[str, Sequence[_Active]]) -> list[_Pace]:
        shares = {
            port: _share(self.ports[port], [use.rate for one in found for use in one.task.uses if use.port == port])
            for port, found in users.items()
            if len(found) > 1
        }
        paces: list[_Pace] = []
        for one in moving:
            pace = _FULL
            for use in one.task.uses:
                share = shares.get(use.port, use.rate)
                if share < use.rate * pace.speed:
                    pace = _Pace(share / use.rate, use.port)
            paces.append(pace)
        return paces


def _users(moving: Sequence[_Active]) -> dict[str, list[_Active]]:
    users: dict[str, list[_Active]] = {}
    for one in moving:
        for use in one.task.uses:
            users.setdefault(use.port, []).append(one)
    return users


def _share(bandwidth: float, rates: Sequence[float]) -> float:
    """The rate that all get who ask for more, what the others leave being shared out too."""
    left, count = bandwidth, len(rates)
    for rate in sorted(rates):
        if rate * count >= left:
            break
        left, count = left - rate, count - 1
    return left / count if count else bandwidth
