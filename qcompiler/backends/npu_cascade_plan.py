"""How a cascade runs: rolling buffers, where weights are, when rows come and go, and what that is reckoned to cost.

The operators of a cascade take turns, once each stripe. While one computes, DMA brings what the next one lacks, and
rows of the next stripe from outside, and takes finished rows away; between turns everything waits. Weights are kept in
the scratchpad for the whole cascade, streamed again for every stripe in tiles of channels, or read where they lie,
whatever costs least in the room there is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import onnx_ir as ir

from qcompiler.backends.npu_cascade import Access, Operator, Part, Progress, Stripes, Turns
from qcompiler.backends.npu_memory import aligned
from qcompiler.backends.npu_tiling import CHANNEL_STEP, Prices, Stream

Home = Literal["inside", "scratchpad"]
"""Where a map is that is not outside: in a rolling buffer only, or whole in the scratchpad."""
Keep = Literal["kept", "streamed", "in place"]


@dataclass(frozen=True)
class Roll:
    """A rolling buffer: row r of a map lies at row r % rows of it."""

    rows: int
    pitch: int
    """Bytes of a row."""

    @property
    def size(self) -> int:
        return self.rows * self.pitch


@dataclass(frozen=True)
class Load:
    """Rows of a map from outside arrive."""

    stage: int
    operand: int
    """Whose operand it is: its address is the map's."""
    roll: int
    progress: Progress
    turn: int
    """During which stage's turn."""
    ahead: bool
    """For the next stripe; those of the first arrive before it."""


@dataclass(frozen=True)
class Store:
    """Rows that a stage finished leave."""

    stage: int
    turn: int
    behind: bool
    """Those of the stripe before; those of the last leave after it."""


@dataclass(frozen=True)
class Stage:
    """One operator of a cascade."""

    step: int
    progress: Progress
    maps: tuple[int, ...]
    """The rolling buffer of each operand, -1 for maps that are whole in the scratchpad."""
    ofm: int
    keep: Keep
    depth: int
    """Channels of a tile."""
    tiles: int
    streams: tuple[int, ...]
    """Bytes of scratchpad for each stream, 0 where it is read in place."""


@dataclass(frozen=True)
class CascadePlan:
    stripes: int
    stages: tuple[Stage, ...]
    rolls: tuple[Roll, ...]
    loads: tuple[Load, ...]
    stores: tuple[Store, ...]
    cycles: float

    @property
    def buffers(self) -> tuple[int, ...]:
        """Bytes of scratchpad: of the rolls, then of every stage's streams."""
        return (*(roll.size for roll in self.rolls), *(size for stage in self.stages for size in stage.streams))

    def rows_at_once(self, stage: Stage) -> int:
        """Most rows that a stage computes in a stripe."""
        return int(np.diff(stage.progress.rows(self.stripes)).max())


class Clock(Protocol):
    """What an operator's commands cost."""

    def cycles(self, operator: Operator, rows: int, depth: int, *, in_place: bool) -> float:
        """Of the engine, for one tile."""
        ...

    def encoded(self, operator: Operator, stream: int) -> float:
        """Bytes that DMA moves of all of a stream."""
        ...


class Planner:
    """Plans cascades of one region."""

    def __init__(self, prices: Prices, alignment: int, clock: Clock) -> None:
        self.prices, self.alignment, self.clock = prices, alignment, clock
        self.known: dict[tuple[int, Turns, int], tuple[_Weights, ...]] = {}

    def plan(self, stripes: Stripes, homes: Mapping[ir.Value, Home], budget: int) -> CascadePlan | None:
        """The cascade in so many bytes of scratchpad, or None if it cannot be.

        Args:
            stripes: its rows.
            homes: of roots that are not outside.
            budget: bytes for its buffers.
        """
        routes = _routes(stripes, homes)
        if routes is None:
            return None
        room = budget - sum(aligned(roll.size, self.alignment) for roll in routes.rolls)
        if room < 0:
            return None
        operators = stripes.in_order()
        works = [_Turn(operator, stripes.turns[operator.step]) for operator in operators]
        chosen = self._choose(works, stripes.count, room)
        if chosen is None:
            return None
        for turn, weights in zip(works, chosen, strict=True):
            turn.compute = weights.compute
        loads = tuple(self._load(route, stripes, works) for route in routes.loads)
        stores = tuple(self._store(stage, stripes, works) for stage in routes.stores)
        stages = tuple(
            Stage(
                operator.step, stripes.progress[operator.step], routes.maps[index], routes.ofms[index], weights.keep,
                weights.depth, weights.tiles, weights.sizes,
            )
            for index, (operator, weights) in enumerate(zip(operators, chosen, strict=True))
        )  # fmt: skip
        cycles = _cycles(works, chosen, stripes.count) + sum(self._first(route) for route in routes.loads)
        return CascadePlan(stripes.count, stages, routes.rolls, loads, stores, cycles)

    # --- weights ---

    def _choose(self, turns: Sequence["_Turn"], count: int, room: int) -> list["_Weights"] | None:
        """What is cheapest for each operator; while that is too much, less where a byte saved costs least."""
        options = [self._options(turn, count) for turn in turns]
        chosen = [min(ways, key=lambda way: way.cost(count)) for ways in options]
        size = sum(weights.size for weights in chosen)
        while size > room:
            best: tuple[float, int, _Weights] | None = None
            for index, (ways, now) in enumerate(zip(options, chosen, strict=True)):
                for way in ways:
                    if way.size < now.size:
                        price = (way.cost(count) - now.cost(count)) / (now.size - way.size)
                        if best is None or price < best[0]:
                            best = (price, index, way)
            if best is None:
                return None
            _, index, way = best
            size += way.size - chosen[index].size
            chosen[index] = way
        return chosen

    def _options(self, turn: "_Turn", count: int) -> tuple["_Weights", ...]:
        key = (turn.operator.step, turn.turns, count)
        if key not in self.known:
            self.known[key] = tuple(self._ways(turn, count))
        return self.known[key]

    def _ways(self, turn: "_Turn", count: int) -> "list[_Weights]":
        operator, work, depth = turn.operator, turn.operator.work, turn.operator.work.ofm[3]

        def cycles(tile: int, *, in_place: bool = False) -> float:
            """Of the engine, of one turn in the mean."""
            times = ((times, self.clock.cycles(operator, rows, tile, in_place=in_place)) for rows, times in turn.turns)
            return sum(number * each for number, each in times) / count

        whole = cycles(depth)
        encoded = [self.clock.encoded(operator, index) for index in range(len(work.streams))]
        sizes = tuple(aligned(len(stream.data), self.alignment) for stream in work.streams)
        once = sum(self.prices.constants.cycles(1, round(size), round(size)) for size in encoded)
        ways = [_Weights("kept", depth, 1, sizes, once, 0.0, whole)]
        units = [stream.unit for stream in work.streams]
        if any(units):
            for tile in _depths(depth, work.group):
                tiles = -(-depth // tile)
                compute = tiles * cycles(tile)
                each = sum(
                    self.prices.constants.cycles(tiles, round(size), max(1, round(size / tiles)))
                    for size, unit in zip(encoded, units, strict=True)
                    if unit
                )
                parts = tuple(self._part(stream, tile, tiles) for stream in work.streams)
                ways.append(_Weights("streamed", tile, tiles, parts, 0.0, each, compute))
        if self.prices.in_place is not None and work.streams:
            ways.append(_Weights("in place", depth, 1, (0,) * len(sizes), 0.0, 0.0, cycles(depth, in_place=True)))
        return ways

    def _part(self, stream: Stream, tile: int, tiles: int) -> int:
        return aligned(stream.extent(tile), self.alignment) * (2 if tiles > 1 and stream.unit else 1)

    # --- rows ---

    def _load(self, route: "_Arrival", stripes: Stripes, turns: Sequence["_Turn"]) -> Load:
        """During the longest turn between the last that reads the rows and the first that needs the new ones."""
        after, before = range(route.last + 1, len(turns)), range(route.first)
        free = [*after, *before] or [*range(len(turns))]
        rows = route.progress.limit / stripes.count
        cycles = self.prices.maps.cycles(1, round(rows * route.access.row_bytes), _run(route.access, rows))
        turn = max(free, key=lambda index: turns[index].compute - turns[index].moving)
        turns[turn].moving += cycles
        return Load(route.stage, route.operand, route.roll, route.progress, turn, turn >= route.first)

    def _store(self, stage: int, stripes: Stripes, turns: Sequence["_Turn"]) -> Store:
        """During the longest turn of another stage before it computes again."""
        access = turns[stage].operator.ofm
        rows = access.rows / stripes.count
        cycles = self.prices.maps.cycles(1, round(rows * access.row_bytes), _run(access, rows))
        others = [index for index in range(len(turns)) if index != stage]
        turn = max(others, key=lambda index: turns[index].compute - turns[index].moving)
        turns[turn].moving += cycles
        return Store(stage, turn, turn < stage)

    def _first(self, route: "_Arrival") -> float:
        """What is waited for before the first stripe."""
        if route.first:
            return 0.0
        rows = route.progress.at(0)
        assert isinstance(rows, int)
        return self.prices.maps.cycles(1, rows * route.access.row_bytes, _run(route.access, rows))


@dataclass
class _Turn:
    """An operator's turn, in the mean."""

    operator: Operator
    turns: Turns
    compute: float = 0.0
    """Cycles of the engine."""
    moving: float = 0.0
    """Cycles of DMA meanwhile, constants aside."""


_TRAFFIC = 0.05
"""What a hidden cycle of DMA counts: its energy, and that others may need the bus."""


@dataclass(frozen=True)
class _Weights:
    """One way to have an operator's constants."""

    keep: Keep
    depth: int
    tiles: int
    sizes: tuple[int, ...]
    once: float
    """Cycles of DMA."""
    each: float
    """The same for every stripe."""
    compute: float
    """The same of the engine."""

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def cost(self, stripes: int) -> float:
        """Cycles, DMA being hidden behind computing, and a little for its energy."""
        hidden = max(self.compute, self.each) * stripes + max(0.0, self.once - self.compute)
        return hidden + _TRAFFIC * (self.once + self.each * stripes)


def _cycles(turns: Sequence[_Turn], chosen: Sequence[_Weights], stripes: int) -> float:
    """Of all stripes: in each part of a turn the longer of computing and moving, constants coming a part early."""
    total = once = 0.0
    for index, (turn, weights) in enumerate(zip(turns, chosen, strict=True)):
        following = chosen[(index + 1) % len(turns)]
        compute, own = turn.compute / weights.tiles, weights.each / weights.tiles
        last = following.each / following.tiles + (turn.moving if weights.tiles == 1 else 0.0)
        parts = max(compute, last)
        if weights.tiles > 1:
            parts += max(compute, own + turn.moving) + (weights.tiles - 2) * max(compute, own)
        total += parts
        once += max(0.0, following.once - turn.compute) if index + 1 < len(turns) else chosen[0].once
    return total * stripes + once


def _depths(depth: int, group: int) -> list[int]:
    """Channels of a tile to try where weights are streamed."""
    depths = {depth}
    parts = 2
    while parts < 2 * depth:
        tile = min(depth, aligned(-(-depth // parts), CHANNEL_STEP))
        if group == 1 or tile % group == 0 or group % tile == 0:
            depths.add(tile)
        parts *= 2
    return sorted(depths, reverse=True)


def _run(access: Access, rows: float) -> int:
    """Contiguous bytes of so many rows where they lie outside."""
    _, y, x, _ = access.strides
    pixel = access.shape[3] * access.element
    if x != pixel and access.shape[2] > 1:
        return pixel
    return round(rows * access.row_bytes) if y == access.row_bytes else access.row_bytes


# --- where maps go ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Arrival:
    """A map from outside: who reads it first and last in a stripe."""

    stage: int
    operand: int
    access: Access
    roll: int
    progress: Progress
    first: int
    last: int


@dataclass(frozen=True)
class _Routes:
    rolls: tuple[Roll, ...]
    maps: tuple[tuple[int, ...], ...]
    ofms: tuple[int, ...]
    loads: tuple[_Arrival, ...]
    stores: tuple[int, ...]
    """Stages."""


def _routes(stripes: Stripes, homes: Mapping[ir.Value, Home]) -> _Routes | None:
    """Which maps go through which rolling buffers; None if one would have to that cannot."""
    operators = stripes.in_order()
    rolls: list[Roll] = []
    of_root: dict[ir.Value, int] = {}
    for root, writers in stripes.writers.items():
        if homes.get(root) == "scratchpad" or (root not in homes and root not in stripes.readers):
            continue
        accesses = [stripes.operators[step].ofm for step in writers]
        accesses += [access for _, access in stripes.readers.get(root, ())]
        if not all(access.rolls for access in accesses) or not stripes.has_all_writers(root):
            return None
        of_root[root] = len(rolls)
        rolls.append(Roll(stripes.held(root), accesses[0].pitch))

    arrivals: dict[Part, list[tuple[int, int, Access]]] = {}
    maps: list[list[int]] = []
    ofms: list[int] = []
    stores: list[int] = []
    for index, operator in enumerate(operators):
        maps.append([])
        for number, access in enumerate(operator.maps):
            maps[-1].append(of_root.get(access.root, -1))
            if access.root not in homes and access.root not in of_root:
                arrivals.setdefault(access.part, []).append((index, number, access))
        ofm = operator.ofm
        if ofm.root not in homes:
            stores.append(index)
        if ofm.root not in homes and ofm.root not in of_root:
            ofms.append(len(rolls))
            rolls.append(Roll(stripes.most[operator.step], ofm.row_bytes))
        else:
            ofms.append(of_root.get(ofm.root, -1))

    loads: list[_Arrival] = []
    for readers in arrivals.values():
        users = [(operators[index].step, access) for index, _, access in readers]
        first, last = readers[0][0], readers[-1][0]
        progress, held = stripes.arrival(users, early=first == 0 and last == len(operators) - 1)
        for index, number, _ in readers:
            maps[index][number] = len(rolls)
        index, number, access = readers[0]
        loads.append(_Arrival(index, number, access, len(rolls), progress, first, last))
        rolls.append(Roll(held, access.row_bytes))
    return _Routes(tuple(rolls), tuple(map(tuple, maps)), tuple(ofms), tuple(loads), tuple(stores))
