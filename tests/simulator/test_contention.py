"""Ports that several units use: against an arbiter stepped cycle by cycle, and what every command reports."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from qcompiler.simulator.contention import Contention, Ports, Run, Task, Use, run
from qcompiler.target import Memory, Npu
from qcompiler.target_loader import load_target

PORTS = {"sram": 64.0, "dram": 12.0}
CHANNELS = {"mxu": 1, "vpu": 1, "dma": 2}


def copy(size: float, cycles: int, setup: int = 0) -> Task:
    return Task("dma", setup, cycles, (Use("dram", size / cycles), Use("sram", size / cycles)))


def operation(unit: str, cycles: int, rate: float) -> Task:
    return Task(unit, 0, cycles, (Use("sram", rate),))


def test_alone_everything_takes_its_own_time() -> None:
    tasks = [copy(1200, 100, setup=40), operation("mxu", 70, 30.0), operation("mxu", 5, 40.0)]
    runs = run(tasks, 1000, CHANNELS, PORTS)
    assert [(one.start, one.end) for one in runs] == [(1000, 1140), (1000, 1070), (1070, 1075)]
    assert all(one.contention is None for one in runs)


def test_two_that_ask_for_all_take_twice_as_long() -> None:
    first, second = run([copy(1200, 100), copy(1200, 100)], 0, CHANNELS, PORTS)
    assert (first.channel, first.start, first.end) == (0, 0, 200)
    assert (second.channel, second.start, second.end) == (1, 0, 200)
    assert first.contention == Contention("dram", 100, ("dma 1",))


def test_who_asks_for_little_gets_it() -> None:
    # 12 and 64 of 64 bytes a cycle: the copy keeps its 12, the operation gets 52.
    small, large = run([copy(12 * 640, 640), operation("mxu", 520, 64.0)], 0, CHANNELS, PORTS)
    assert small == Run(0, 0, 640, None)
    assert large == Run(0, 0, 640, Contention("sram", 120, ("dma",)))


def test_a_port_is_shared_only_while_both_move() -> None:
    # Alone until the second leaves its setup, half the rate from then on, alone again.
    first, second = run([copy(1200, 100), copy(600, 50, setup=50)], 0, CHANNELS, PORTS)
    assert (first.end, second.end) == (150, 150)
    assert first.contention is not None and first.contention.cycles == 50


def test_commands_of_a_unit_queue() -> None:
    tasks = [operation("vpu", 10, 8.0), operation("vpu", 10, 8.0), *[copy(1200, 100)] * 3]
    runs = run(tasks, 0, CHANNELS, PORTS)
    assert [one.start for one in runs[:2]] == [0, 10]
    assert [(one.channel, one.start, one.end) for one in runs[2:]] == [(0, 0, 200), (1, 0, 200), (0, 200, 300)]
    assert runs[4].contention is None


def stepped(tasks: Sequence[Task], ports: Mapping[str, float]) -> list[int]:
    """When each ends, all started at 0 on units of their own, arbitrated cycle by cycle."""
    left, ends, now = [float(task.moving) for task in tasks], [0] * len(tasks), 0
    while not all(ends):
        going = [i for i, task in enumerate(tasks) if not ends[i] and now >= task.setup]
        speed = dict.fromkeys(going, 1.0)
        for port, bandwidth in ports.items():
            asking = {i: use.rate for i in going for use in tasks[i].uses if use.port == port}
            # Raise everyone's share together until the port is full.
            low, high = 0.0, bandwidth
            for _ in range(100):
                share = (low + high) / 2
                low, high = (
                    (share, high) if sum(min(rate, share) for rate in asking.values()) < bandwidth else (low, share)
                )
            for i, rate in asking.items():
                speed[i] = min(speed[i], high / rate)
        now += 1
        for i in going:
            left[i] -= speed[i]
            ends[i] = now if left[i] < 1e-6 else 0
    return ends


@pytest.mark.parametrize("seed", range(30))
def test_against_an_arbiter_stepped_cycle_by_cycle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ports = {"a": 16.0, "b": 40.0}
    tasks = [
        Task(
            f"unit {index}",
            int(rng.integers(0, 30)),
            int(rng.integers(1, 200)),
            tuple(Use(name, float(rng.uniform(0.1, 1)) * ports[name]) for name in ports if rng.random() < 0.8),
        )
        for index in range(int(rng.integers(2, 6)))
    ]
    runs = run(tasks, 0, {task.unit: 1 for task in tasks}, ports)
    # An event ends a cycle: each may cost a fraction of one.
    assert np.abs(np.array([one.end for one in runs]) - stepped(tasks, ports)).max() <= len(tasks)
    for task, one in zip(tasks, runs, strict=True):
        lost = one.end - task.setup - task.moving
        assert lost == (one.contention.cycles if one.contention is not None else 0)


@pytest.mark.parametrize("seed", range(10))
def test_nobody_gains_and_ports_are_never_overdrawn(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    tasks: list[Task] = []
    for _ in range(40):
        cycles = int(rng.integers(1, 300))
        if rng.random() < 0.5:
            tasks.append(copy(cycles * float(rng.uniform(1, 12)), cycles, int(rng.integers(0, 50))))
        else:
            tasks.append(operation(str(rng.choice(["mxu", "vpu"])), cycles, float(rng.uniform(1, 64))))
    runs = run(tasks, 7, CHANNELS, PORTS)
    assert all(one.end - one.start >= task.setup + task.moving for task, one in zip(tasks, runs, strict=True))
    end = max(one.end for one in runs)
    for port, bandwidth in PORTS.items():
        moved = sum(use.rate * task.moving for task in tasks for use in task.uses if use.port == port)
        assert moved <= bandwidth * (end - 7) + 1e-6


# --- what the target says -----------------------------------------------------------------------------------------


def systolic(**ports: str) -> Npu:
    npu = load_target("systolic-npu").npu
    assert npu is not None
    memories: dict[str, Memory] = {
        name: memory.model_copy(update={"ports": ports.get(name, memory.ports)})
        for name, memory in npu.memories.items()
    }
    return npu.model_copy(update={"memories": memories})


def test_ports_are_those_the_target_names() -> None:
    shared = Ports.of(systolic())
    assert shared.engines["sram"] == shared.copies["sram"] == "sram" and shared.bandwidth["sram"] == 64
    dual = Ports.of(systolic(sram="dual"))
    assert dual.engines["sram"] != dual.copies["sram"]
    assert {dual.memory[port] for port in (dual.engines["sram"], dual.copies["sram"])} == {"sram"}
    private = Ports.of(systolic(sram="private"))
    assert "sram" not in private.engines and "sram" in private.copies


def test_who_is_alone_at_a_port_shares_nothing() -> None:
    """One engine and one channel of DMA with a port each: Vela's model, which knows no contention."""
    npu = load_target("ethos-u55-128").npu
    assert npu is not None
    assert Ports.of(npu) == replace(Ports.of(npu), engines={}, copies={}, bandwidth={}, memory={})
