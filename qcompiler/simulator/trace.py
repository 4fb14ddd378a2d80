"""A region's timeline for Perfetto (ui.perfetto.dev) and chrome://tracing.

Format: Trace Event Format, "Complete" events on one track per engine and DMA channel, times in microseconds of the
accelerator's clock. Barriers that waited have a track of their own; their `waited for` names the unit that was late.
"""

import json
from collections.abc import Mapping

from qcompiler.simulator.cost import CommandCost, RegionCost

_PROCESS = 1


def chrome_trace(cost: RegionCost, names: Mapping[int, str], title: str = "NPU") -> str:
    """The JSON text of a trace.

    Args:
        cost: a priced region.
        names: layer index to the node's name; a layer not named is shown by its index.
        title: the name of the trace's one process.
    """
    tracks = sorted({(command.unit, command.channel) for command in cost.commands})
    threads = {track: number for number, track in enumerate(tracks, start=1)}
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": title}},
        *(
            {"ph": "M", "pid": _PROCESS, "tid": thread, "name": "thread_name", "args": {"name": _track_name(track)}}
            for track, thread in threads.items()
        ),
        *(_event(command, threads[command.unit, command.channel], names, cost.clock) for command in cost.commands),
    ]
    return json.dumps({"displayTimeUnit": "ns", "traceEvents": events}, separators=(",", ":"))


def _track_name(track: tuple[str, int]) -> str:
    unit, channel = track
    return f"{unit} {channel}" if channel else unit


def _event(command: CommandCost, thread: int, names: Mapping[int, str], clock: float) -> dict[str, object]:
    microsecond = clock / 1e6
    layer = names.get(command.layer, f"layer {command.layer}")
    arguments: dict[str, object] = {"layer": layer, "command": command.index, "cycles": command.end - command.start}
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
    return {
        "ph": "X",
        "pid": _PROCESS,
        "tid": thread,
        "name": f"{command.name} {layer}",
        "cat": command.name,
        "ts": command.start / microsecond,
        "dur": (command.end - command.start) / microsecond,
        "args": arguments,
    }
