"""The timeline as a picture: one lane for the host, for each engine and DMA channel, and for stalls."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qcompiler.report import byte_count, quantity
from qcompiler.simulator.cost import CommandCost
from qcompiler.simulator.stalls import stalls
from qcompiler.simulator.trace import Timeline
from qcompiler.views.scales import even_ticks
from qcompiler.views.timeline import units

WIDTH, LEFT, RIGHT = 1080, 96, 16
LANE, GAP, TOP, AXIS = 26, 8, 8, 30
RESOLUTION = 0.5
"""Pixels; shorter commands of a layer grow to this and neighbours join, which bounds the size of the page."""

_MOVEMENT = (
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Pad", "Reshape", "Slice", "SpaceToDepth", "Split",
    "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip

KINDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("product", "convolution, matrix product", ("Conv", "ConvTranspose", "Gemm", "MatMul")),
    ("pool", "pooling", ("MaxPool", "AveragePool", "ReduceMean", "ReduceMax", "Resize")),
    ("arithmetic", "elementwise", ("Add", "Sub", "Mul", "Div", "Requantize", "Clip", "Relu")),
    ("function", "lookup table, softmax", ("Lookup", "Softmax")),
    ("movement", "data movement", _MOVEMENT),
    ("hand-over", "hand-over", ("hand-over",)),
    ("stall", "no engine works", ("stall",)),
)
"""CSS class, legend and operators; others are "other"."""
STALL = "stall"


@dataclass(frozen=True)
class Mark:
    """All that one layer does on one lane, as one path."""

    path: str
    kind: str
    tip: str


@dataclass(frozen=True)
class Lane:
    label: str
    y: float
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class TimeTick:
    x: float
    label: str


@dataclass(frozen=True)
class Lanes:
    lanes: tuple[Lane, ...]
    ticks: tuple[TimeTick, ...]
    legend: tuple[tuple[str, str], ...]
    """CSS class and words."""
    height: int
    axis: float
    width: int = WIDTH
    left: int = LEFT
    right: int = WIDTH - RIGHT
    lane: int = LANE


@dataclass(frozen=True)
class _Piece:
    layer: str
    op: str
    start: float
    end: float
    traffic: Mapping[str, int] = field(default_factory=dict)
    """Bytes by memory."""
    reason: str = ""
    """Why it took longer than by itself, or what was waited for."""
    lost: float = 0.0
    """Seconds for that reason."""


def kind_of(op: str) -> str:
    return next((kind for kind, _, ops in KINDS if op in ops), "other")


def lanes(line: Timeline) -> Lanes | None:
    """Draw a timeline; None if nothing in it takes time."""
    if line.seconds <= 0:
        return None
    pieces: list[tuple[str, list[_Piece]]] = []
    for host in dict.fromkeys(span.unit for span in line.host):
        found = [_Piece(span.layer, span.op, span.start, span.end) for span in line.host if span.unit == host]
        pieces.append((host, found))
    for owner, unit, channel in units(line):
        label = " ".join(part for part in (owner, unit, str(channel or "")) if part)
        pieces.append((label, list(_commands(line, owner, unit, channel))))
    if idle := list(_stalls(line)):
        pieces.append((STALL, idle))
    scale = (WIDTH - LEFT - RIGHT) / line.seconds
    drawn = tuple(
        Lane(label, TOP + index * (LANE + GAP), tuple(_marks(found, scale, TOP + index * (LANE + GAP))))
        for index, (label, found) in enumerate(pieces)
    )
    seen = {mark.kind for lane in drawn for mark in lane.marks}
    legend = [(kind, words) for kind, words, _ in KINDS if kind in seen]
    axis = TOP + len(drawn) * (LANE + GAP)
    return Lanes(
        drawn,
        tuple(TimeTick(LEFT + value * scale, quantity(value, "s")) for value in even_ticks(line.seconds, 8)),
        (*legend, *([("other", "other")] if "other" in seen else [])),
        axis + AXIS,
        axis,
    )


def _commands(line: Timeline, owner: str, unit: str, channel: int) -> Iterable[_Piece]:
    for region in line.regions:
        for command in region.cost.commands:
            if (region.owner, command.unit, command.channel) == (owner, unit, channel):
                slowed = command.contention
                yield _Piece(
                    region.layers.get(command.layer, f"layer {command.layer}"),
                    region.operators.get(command.layer, ""),
                    region.start + command.start / region.cost.clock,
                    region.start + command.end / region.cost.clock,
                    _traffic(command),
                    f"slowed by {slowed.memory}" if slowed is not None else "",
                    slowed.cycles / region.cost.clock if slowed is not None else 0.0,
                )


def _stalls(line: Timeline) -> Iterable[_Piece]:
    for region in line.regions:
        for stall in stalls(region.cost):
            layer = region.layers.get(stall.layer, f"layer {stall.layer}")
            start, end = (region.start + time / region.cost.clock for time in (stall.start, stall.end))
            yield _Piece(layer, STALL, start, end, {}, f"waiting for {stall.reason}", end - start)


def _traffic(command: CommandCost) -> dict[str, int]:
    return {moved.memory: moved.read + moved.written for moved in command.traffic}


def _marks(pieces: list[_Piece], scale: float, y: float) -> Iterable[Mark]:
    by_layer: dict[tuple[str, str], list[_Piece]] = {}
    for piece in pieces:
        by_layer.setdefault((piece.layer, piece.op), []).append(piece)
    for (layer, op), found in by_layer.items():
        path = "".join(
            f"M{start:.1f} {y:g}h{end - start:.1f}v{LANE}h{start - end:.1f}z"
            for start, end in _joined((LEFT + piece.start * scale, LEFT + piece.end * scale) for piece in found)
        )
        yield Mark(path, kind_of(op), _tip(layer, op, found))


def _tip(layer: str, op: str, pieces: list[_Piece]) -> str:
    """How long a layer keeps a lane busy, what it moves by memory, and what it loses time to."""
    moved: Counter[str] = Counter()
    lost: dict[str, float] = {}
    for piece in pieces:
        moved.update(piece.traffic)
        if piece.reason:
            lost[piece.reason] = lost.get(piece.reason, 0.0) + piece.lost
    busy = quantity(sum(piece.end - piece.start for piece in pieces), "s")
    parts = [f"{busy} idle" if op == STALL else f"{busy} busy from {quantity(pieces[0].start, 's')}"]
    parts += [f"{memory} {byte_count(size)}" for memory, size in moved.items() if size]
    most = sorted(lost, key=lambda reason: -lost[reason])[:_REASONS]
    parts += [f"{quantity(lost[reason], 's')} {reason}" for reason in most]
    return f"{layer} ({op}): {', '.join(parts)}"


_REASONS = 3
"""Most reasons a tip names."""


def _joined(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans in pixels, each at least `RESOLUTION` wide, those closer than that made one."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        wide = max(end, start + RESOLUTION)
        if joined and start - joined[-1][1] < RESOLUTION:
            joined[-1] = (joined[-1][0], max(joined[-1][1], wide))
        else:
            joined.append((start, wide))
    return joined
