"""Timelines for Perfetto (ui.perfetto.dev) and chrome://tracing: of one region, or of a whole inference.

Format: Trace Event Format, "Complete" events on one track per engine and DMA channel, times in microseconds. Barriers
that waited have a track of their own; their `waited for` names the unit that was late. The track "stall" has the times
at which no engine worked, and why.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from qcompiler.simulator.cost import CommandCost, RegionCost
from qcompiler.simulator.stalls import Stall, stalls

_NPU, _HOST = 1, 2
"""Processes of the trace; further accelerators are counted on from the host."""

Event = dict[str, object]


@dataclass(frozen=True)
class RegionSpan:
    """A region of the accelerator within an inference."""

    cost: RegionCost
    layers: Mapping[int, str]
    """Names by layer index; a layer not named is shown by its index."""
    operators: Mapping[int, str]
    start: float
    """Seconds from the beginning of the inference."""
    owner: str = ""
    """Which accelerator it is, where there are several."""
    cascades: Mapping[int, str] = field(default_factory=dict)
    """By layer index, which cascade it runs in."""


@dataclass(frozen=True)
class HostSpan:
    """One operator on the CPU or a GPU, or a hand-over between CPU and accelerator. Times in seconds."""

    layer: str
    op: str
    start: float
    end: float
    unit: str = "CPU"


@dataclass(frozen=True)
class Timeline:
    """One inference."""

    regions: tuple[RegionSpan, ...]
    host: tuple[HostSpan, ...]
    seconds: float


def chrome_trace(cost: RegionCost, names: Mapping[int, str], title: str = "NPU") -> str:
    """The JSON text of a region's trace.

    Args:
        cost: a priced region.
        names: layer index to the node's name; a layer not named is shown by its index.
        title: the name of the trace's one process.
    """
    return _text(_npu_events((RegionSpan(cost, names, {}, 0.0),), _NPU, title))


def inference_trace(line: Timeline, title: str) -> str:
    """The JSON text of an inference's trace: each accelerator's units as one process, the host as another."""
    threads = {
        unit: number for number, unit in enumerate(dict.fromkeys(("CPU", *(s.unit for s in line.host))), start=1)
    }
    host: list[Event] = [
        _metadata("process_name", _HOST, None, "host"),
        *(_metadata("thread_name", _HOST, thread, unit) for unit, thread in threads.items()),
        *(
            {
                "ph": "X",
                "pid": _HOST,
                "tid": threads[span.unit],
                "name": f"{span.op} {span.layer}",
                "cat": span.op,
                "ts": span.start * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"layer": span.layer},
            }
            for span in line.host
        ),
    ]
    driven: list[Event] = []
    for number, owner in enumerate(dict.fromkeys(region.owner for region in line.regions)):
        own = tuple(region for region in line.regions if region.owner == owner)
        driven += _npu_events(own, _NPU if number == 0 else _HOST + number, f"{title} {owner}".strip())
    return _text([*driven, *host])


def _text(events: list[Event]) -> str:
    return json.dumps({"displayTimeUnit": "ns", "traceEvents": events}, separators=(",", ":"))


def _npu_events(regions: tuple[RegionSpan, ...], process: int, title: str) -> list[Event]:
    tracks = sorted({(command.unit, command.channel) for region in regions for command in region.cost.commands})
    threads = {track: number for number, track in enumerate(tracks, start=1)}
    stalled = [(stall, region) for region in regions for stall in stalls(region.cost)]
    idle = len(tracks) + 1
    return [
        _metadata("process_name", process, None, title),
        *(_metadata("thread_name", process, thread, _track_name(track)) for track, thread in threads.items()),
        *(
            _event(command, process, threads[command.unit, command.channel], region)
            for region in regions
            for command in region.cost.commands
        ),
        *([_metadata("thread_name", process, idle, "stall")] if stalled else []),
        *(_stall(stall, process, idle, region) for stall, region in stalled),
    ]


def _metadata(kind: str, process: int, thread: int | None, name: str) -> Event:
    place: Event = {"ph": "M", "pid": process} if thread is None else {"ph": "M", "pid": process, "tid": thread}
    return {**place, "name": kind, "args": {"name": name}}


def _track_name(track: tuple[str, int]) -> str:
    unit, channel = track
    return f"{unit} {channel}" if channel else unit


def _event(command: CommandCost, process: int, thread: int, region: RegionSpan) -> Event:
    microsecond = region.cost.clock / 1e6
    layer = region.layers.get(command.layer, f"layer {command.layer}")
    arguments: Event = {"layer": layer, "command": command.index, "cycles": command.end - command.start}
    if command.layer in region.cascades:
        arguments["cascade"] = region.cascades[command.layer]
    if command.macs:
        arguments["MACs"] = command.macs
    if command.elements:
        arguments["elements"] = command.elements
    for moved in command.traffic:
        if moved.read:
            arguments[f"{moved.memory} bytes read"] = moved.read
        if moved.written:
            arguments[f"{moved.memory} bytes written"] = moved.written
    if command.limit:
        arguments["bound by"] = command.limit
    if command.waited_for:
        arguments["waited for"] = command.waited_for
    if command.contention is not None:
        arguments["slowed by"] = f"{command.contention.memory}, shared with {' and '.join(command.contention.units)}"
        arguments["cycles lost"] = command.contention.cycles
    return {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "name": f"{command.name} {layer}",
        "cat": command.name,
        "ts": region.start * 1e6 + command.start / microsecond,
        "dur": (command.end - command.start) / microsecond,
        "args": arguments,
    }


def _stall(stall: Stall, process: int, thread: int, region: RegionSpan) -> Event:
    microsecond = region.cost.clock / 1e6
    layer = region.layers.get(stall.layer, f"layer {stall.layer}")
    return {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "name": f"stall {layer}",
        "cat": "stall",
        "ts": region.start * 1e6 + stall.start / microsecond,
        "dur": (stall.end - stall.start) / microsecond,
        "args": {"layer": layer, "cycles": stall.end - stall.start, "waited for": stall.reason},
    }
