"""Prices of command streams: closed forms worked out by hand, the timeline's rules, and sums."""

import json
import time
from math import ceil

import numpy as np
import pytest

from qcompiler.simulator import cost, engines, isa
from qcompiler.simulator.cost import CommandCost, LayerCost, RegionCost, price
from qcompiler.simulator.trace import chrome_trace
from qcompiler.simulator.workload import Feed, Port, Shape
from qcompiler.target import Bandwidth, Target
from qcompiler.target_loader import load_target

SYSTOLIC = load_target("systolic-npu")
ARM = load_target("arm-npu")

IN, WEIGHTS, OUT = 1, 2, 3
SRAM = Port(8, 32, 32)
"""The Ethos-U55's: bytes a cycle, cycles, bytes of a burst."""


def word(opcode: isa.Opcode, *arguments: int) -> list[int]:
    assert len(arguments) == len(opcode.arguments), opcode.name
    return [opcode.code, *arguments]


def load(size: int, base: int = IN, *, row: int | None = None) -> list[int]:
    """Copy `size` bytes into the scratchpad, contiguous or in rows with a gap after each."""
    if row is None:
        return word(isa.DMA, 0, 0, 0, size, base, 0, 0, size, 1, 1, size)
    return word(isa.DMA, 0, 0, 0, row, base, 0, 0, 2 * row, 1, size // row, row)


def store(size: int) -> list[int]:
    return word(isa.DMA, OUT, 0, 0, size, 0, 0, 0, size, 1, 1, size)


def maps(
    ifm: tuple[int, int, int], ofm: tuple[int, int, int], base: int = 0, types: tuple[str, str] = ("int8", "int8")
) -> list[int]:
    before, after = (isa.DTYPES.index(dtype) for dtype in types)
    a, b = isa.element_bytes(before), isa.element_bytes(after)
    return [
        *word(isa.IFM, 0, base, 0, *ifm, ifm[1] * ifm[2] * a, ifm[2] * a, a, before, 0),
        *word(isa.OFM, base, 0, *ofm, ofm[1] * ofm[2] * b, ofm[2] * b, after, 0, -128, 127),
    ]


def conv(
    ifm: tuple[int, int, int], ofm: tuple[int, int, int], kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[int]:
    return [
        *maps(ifm, ofm),
        *word(isa.KERNEL, kernel, kernel, stride, stride, 1, 1, 0, 0),
        *word(isa.WEIGHTS, 0, 0, isa.DTYPES.index("int8"), 0, 0),
        *word(isa.SCALES, 0, 0, 1),
        *word(isa.CONV, ifm[2] // groups, ofm[2] // groups),
    ]


BARRIER = word(isa.BARRIER)


def only(region: RegionCost) -> CommandCost:
    (command,) = region.commands
    return command


def edited(target: Target, **memories: str) -> Target:
    """The target with other memory bandwidths."""
    assert target.npu is not None
    changed = {
        name: memory.model_copy(update={"bandwidth": Bandwidth.model_validate(memories[name])})
        if name in memories
        else memory
        for name, memory in target.npu.memories.items()
    }
    return target.model_copy(update={"npu": target.npu.model_copy(update={"memories": changed})})


# --- systolic closed forms ----------------------------------------------------------------------------------------

SCALE_SIM = (
    # M, K, N, cycles with weights stationary, with outputs stationary: ResNet-18 layers, from SCALE-Sim 3.0.0's
    # COMPUTE_REPORT.csv for a 16x16 array (conv3_1, its 1x1 shortcut one stage on, conv5, fc).
    (225, 576, 128, 78047, 72719),
    (225, 128, 256, 34687, 37919),
    (49, 4608, 512, 875519, 593663),
    (1, 512, 1000, 94751, 34145),
)


@pytest.mark.parametrize(("m", "k", "n", "weight_stationary", "output_stationary"), SCALE_SIM)
def test_systolic_cycles_are_scale_sims(m: int, k: int, n: int, weight_stationary: int, output_stationary: int) -> None:
    assert engines.weight_stationary_cycles(m, k, n, 16, 16) == weight_stationary
    assert engines.output_stationary_cycles(m, k, n, 16, 16) == output_stationary


def wavefront_cycles(m: int, rows: int, cols: int) -> int:
    """One fold of a weight-stationary array, stepped cycle by cycle: when the last product has been formed."""
    holds = np.full((rows, cols), -1)  # the input row each cell works on
    done = np.zeros((rows, cols), int)
    cycle = rows  # loading the weights, a row a cycle
    while not (done == m).all():
        moved = np.full((rows, cols), -1)
        moved[:, 1:] = holds[:, :-1]
        for row in range(rows):  # row r is fed r cycles late
            fed = cycle - rows - row
            moved[row, 0] = fed if 0 <= fed < m else -1
        holds = moved
        done += holds >= 0
        cycle += 1
    return cycle


@pytest.mark.parametrize(("m", "rows", "cols"), [(1, 4, 4), (5, 3, 7), (20, 8, 2)])
def test_weight_stationary_fold_against_a_stepped_array(m: int, rows: int, cols: int) -> None:
    # SCALE-Sim numbers cycles from 0, so a count of n ends at n - 1.
    assert engines.weight_stationary_cycles(m, rows, cols, rows, cols) == wavefront_cycles(m, rows, cols) - 1
    assert (
        engines.weight_stationary_cycles(m, 3 * rows, 2 * cols, rows, cols) == 6 * wavefront_cycles(m, rows, cols) - 1
    )


def test_a_systolic_convolution_command() -> None:
    # 6x5 outputs, 3x3x20 window, 40 channels: M 30, K 180, N 40 on 16x16: 12 * 3 * (30 + 32 + 14) - 1, issue 12.
    command = only(price(conv((8, 7, 20), (6, 5, 40), kernel=3), SYSTOLIC))
    assert command.end - command.start == 12 + 12 * 3 * 76 - 1
    assert (command.unit, command.limit) == ("mxu", "compute")
    assert command.macs == 30 * 180 * 40
    assert command.elements == 30 * 40
    # Inputs are streamed once per 16 output channels, weights once, and 12 bytes of scales a channel.
    assert command.traffic == (cost.Traffic("sram", 30 * 180 * 3 + 180 * 40 + 40 * 12, 30 * 40),)


def test_depthwise_goes_to_the_vector_unit_by_the_targets_rule() -> None:
    command = only(price(conv((8, 8, 64), (6, 6, 64), kernel=3, groups=64), SYSTOLIC))
    assert command.unit == "vpu"
    assert command.macs == 36 * 64 * 9
    assert command.end - command.start == 12 + 36 * 64 * 9 // 32


@pytest.mark.parametrize(
    ("opcode", "arguments", "elements_per_cycle", "window", "types"),
    [
        (isa.LOOKUP, (0, 0), 32, 1, ("int8", "int8")),
        (isa.REQUANTIZE, (), 32, 1, ("int8", "int8")),
        (isa.REQUANTIZE, (), 16, 1, ("int16", "int16")),  # half as many elements in a vector
        (isa.REQUANTIZE, (), 16, 1, ("int16", "int8")),
        (isa.REQUANTIZE, (), 16, 1, ("int8", "int16")),
        (isa.SOFTMAX, (0, 0, 256), 4, 1, ("int8", "int8")),
        (isa.RESIZE_NEAREST, (0, 0, 0, 0), 8, 1, ("int8", "int8")),
        (isa.MAX_POOL, (), 32, 9, ("int8", "int8")),
        (isa.MAX_POOL, (), 16, 9, ("int16", "int16")),
    ],
)
def test_vector_unit_rates(
    opcode: isa.Opcode, arguments: tuple[int, ...], elements_per_cycle: int, window: int, types: tuple[str, str]
) -> None:
    words = [
        *maps((9, 9, 48), (9, 9, 48), types=types),
        *word(isa.KERNEL, 3, 3, 1, 1, 1, 1, 1, 1),
        *word(isa.SCALES, 0, 0, 1),
        *word(opcode, *arguments),
    ]
    command = only(price(words, SYSTOLIC))
    compute = 9 * 9 * 48 * window / elements_per_cycle
    memory = sum(moved.read + moved.written for moved in command.traffic) / 64
    assert command.end - command.start == ceil(12 + max(compute, memory))


# --- dot arrays ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ifm", "ofm", "kernel", "groups", "steps"),
    [
        ((8, 7, 64), (6, 5, 64), 3, 1, 30 * 9 * 1 * 2),  # 64 channels at once, 32 kernels at a time
        ((8, 7, 65), (6, 5, 33), 3, 1, 30 * 9 * 2 * 2),  # one channel and one kernel too many
        ((9, 9, 3), (3, 3, 32), 7, 1, 9 * 7 * 1),  # an image: a kernel row of 7 x 3 values is one step
        ((8, 8, 64), (8, 8, 64), 1, 64, 64 * 64),  # depthwise uses one product in 64 x 32
    ],
)
def test_dot_array_steps(
    ifm: tuple[int, int, int], ofm: tuple[int, int, int], kernel: int, groups: int, steps: int
) -> None:
    command = only(price(conv(ifm, ofm, kernel=kernel, groups=groups), load_target("nvdla-large")))
    assert (command.unit, command.limit) == ("cmac", "compute")
    assert command.end - command.start == steps


# --- Ethos-U ------------------------------------------------------------------------------------------------------


def test_mac_array_one_micro_block() -> None:
    assert ARM.npu is not None
    # One 1x2x8 micro-block, one 1x1 step over 32 channels: the weight stream takes 4 * 8 cycles, more than the
    # array's 4, and a lone micro-block waits 2. Then 16 outputs at half a cycle each, or 10 bytes of scales for
    # 8 channels at 32 cycles a 256 bytes, or the issue of blocks at a quarter of 34 and 10: 11. Before, 64 bytes of
    # input are fetched; after, 16 are written, in bricks of 16 channels: each after 32 cycles, at 8 bytes a cycle.
    work = engines.work(
        Shape("conv", (1, 2, 8), (1, 2, 32), (1, 1), (1, 1), (1, 1), 1, 8, 8, 8, 1),
        ARM.npu.engines["mac"],
        "int8*int8",
        Feed(SRAM, SRAM, SRAM),
    )
    assert work.cycles == 32 + 2 + 11 + (32 + 64 // 8) + (32 + 16 // 8)
    assert (work.ifm_bytes, work.weight_bytes, work.ofm_bytes) == (64, 256, 32)


def test_mac_array_reaches_its_peak_on_large_convolutions() -> None:
    region = price(conv((34, 34, 128), (32, 32, 128), kernel=3), edited(ARM, sram="4096 B/cycle"))
    assert 0.95 < region.utilisation <= 1
    assert region.layers[0].bound_by == "compute"


def test_mac_array_wastes_channels_it_does_not_have() -> None:
    # 1 input channel: part-kernel takes 4 kernel elements at once on 1 of 8 channels, 9 elements in 3 steps.
    region = price(conv((34, 34, 1), (32, 32, 64), kernel=3), edited(ARM, sram="4096 B/cycle"))
    assert region.utilisation == pytest.approx(9 / (3 * 4 * 8), rel=0.1)


def test_mac_array_depthwise_uses_one_channel_in_eight() -> None:
    region = price(conv((34, 34, 64), (32, 32, 64), kernel=3, groups=64), edited(ARM, sram="4096 B/cycle"))
    # Three steps of four cycles for nine kernel elements of 16 outputs: 144 MACs in 12 cycles of 128.
    assert region.utilisation == pytest.approx(9 / 12 / 8, rel=0.1)


@pytest.mark.parametrize(
    ("opcode", "arguments", "per_element"),
    [
        (isa.ADD, (0, 1, 0, 1, 0, 1, 0, 1), 1.5),
        (isa.MUL, (), 0.75),
    ],
)
def test_mac_array_output_stage(opcode: isa.Opcode, arguments: tuple[int, ...], per_element: float) -> None:
    int8 = isa.DTYPES.index("int8")
    words = [
        *maps((7, 5, 32), (7, 5, 32)),
        *word(isa.IFM, 1, 0, 0, 7, 5, 32, 160, 32, 1, int8, 0),
        *word(isa.SCALES, 0, 0, 1),
        *word(opcode, *arguments),
    ]
    command = only(price(words, edited(ARM, sram="4096 B/cycle")))
    assert command.end - command.start == ceil(per_element * 7 * 5 * 32)


@pytest.mark.parametrize(("opcode", "arguments"), [(isa.REQUANTIZE, ()), (isa.LOOKUP, (0, 0))])
def test_mac_array_rescales_and_looks_up_as_pools_of_one(opcode: isa.Opcode, arguments: tuple[int, ...]) -> None:
    words = [*maps((14, 32, 32), (14, 32, 32)), *word(isa.SCALES, 0, 0, 1), *word(opcode, *arguments)]
    command = only(price(words, edited(ARM, sram="4096 B/cycle")))
    # Sixteen cycles a micro-block of 1x2x8, whatever the output stage could do.
    assert command.end - command.start == pytest.approx(14 * 32 * 32, rel=0.1)


@pytest.mark.parametrize(
    ("target", "dtype", "classes", "vela"),
    [
        ("ethos-u55-128", "int8", 12, 807), ("ethos-u55-32", "int8", 1001, 22341),
        ("ethos-u55-128", "int8", 1001, 13842), ("ethos-u55-128", "int16", 100, 2424),
        ("ethos-u55-128", "int16", 1000, 20655),
    ],
)  # fmt: skip
def test_mac_array_softmax_takes_as_long_as_its_passes_in_vela(
    target: str, dtype: str, classes: int, vela: int
) -> None:
    """ethos-u-vela 5.2.0: NPU cycles of a softmax's operators in its debug database, for [1, classes]."""
    words = [*maps((1, 1, classes), (1, 1, classes), types=(dtype, dtype)), *word(isa.SOFTMAX, 0, 0, 1)]
    command = only(price(words, load_target(target)))
    assert command.end - command.start == pytest.approx(vela, rel=0.05)


def test_two_cores_and_larger_arrays_are_faster() -> None:
    words = conv((34, 34, 64), (32, 32, 128), kernel=3)
    cycles = [price(words, load_target(f"ethos-u55-{macs}")).cycles for macs in (32, 64, 128, 256)]
    assert cycles == sorted(cycles, reverse=True)
    assert price(words, load_target("ethos-u65-512")).cycles < price(words, load_target("ethos-u65-256")).cycles


def test_grouped_convolution_is_its_groups_one_after_another() -> None:
    whole = price(conv((8, 8, 64), (8, 8, 64), groups=4), edited(ARM, sram="4096 B/cycle"))
    one = price(conv((8, 8, 16), (8, 8, 16)), edited(ARM, sram="4096 B/cycle"))
    assert whole.macs == 4 * one.macs
    assert 3 * one.cycles < whole.cycles <= 4 * one.cycles


# --- copies -------------------------------------------------------------------------------------------------------


def test_a_copy_is_setup_latency_and_bytes_at_the_slowest_bandwidth() -> None:
    # DMA setup 40, DRAM latency 100 ns at 1 GHz, 4096 bytes at 12.8 B/cycle.
    command = only(price(load(4096), SYSTOLIC))
    assert command.end == 40 + 100 + ceil(4096 / 12.8)
    assert command.traffic == (cost.Traffic("dram", 4096, 0), cost.Traffic("sram", 0, 4096))
    assert (command.limit, command.unit) == ("dram", "dma")


def test_writes_may_have_a_latency_of_their_own() -> None:
    reading, writing = (only(price(words, ARM)) for words in (load(4096), store(4096)))
    assert (reading.end - reading.start) - (writing.end - writing.start) == 250


def test_rows_shorter_than_a_burst_cost_a_burst() -> None:
    # 100 rows of 24 bytes, 48 apart in DRAM: a 64 byte burst each; dense in the scratchpad.
    command = only(price(load(2400, row=24), SYSTOLIC))
    assert command.traffic == (cost.Traffic("dram", 6400, 0), cost.Traffic("sram", 0, 2400))
    assert command.end == 140 + 6400 / 12.8


def test_fills_touch_one_memory() -> None:
    command = only(price(word(isa.FILL, 0, 0, 0, 100, 1, 10, 100, 7), SYSTOLIC))
    assert command.traffic == (cost.Traffic("sram", 0, 1000),)
    assert command.end == 40 + 4 + ceil(1000 / 16)


def test_constants_may_be_copied_past_the_scratchpad() -> None:
    """The Ethos-U55 has paths from flash and to DRAM, but none from one to the other."""
    copied = price(word(isa.DMA, OUT, 0, 0, 0, WEIGHTS, 0, 0, 0, 1, 1, 4096), ARM, {WEIGHTS: "flash"})
    assert [(moved.read, moved.written) for moved in only(copied).traffic] == [(4096, 0), (0, 4096)]
    assert [moved.memory for moved in only(copied).traffic] == ["flash", "dram"]
    brought = price(load(4096, WEIGHTS), ARM, {WEIGHTS: "flash"})
    assert only(copied).unit == only(brought).unit == "dma" and copied.cycles >= brought.cycles


def test_weights_come_from_the_memory_their_base_names() -> None:
    words = load(1024, WEIGHTS)
    flash, dram = price(words, ARM, {WEIGHTS: "flash"}), price(words, ARM)
    assert only(flash).end == 64 + 1024  # 0.5 GB/s is a byte a cycle at 500 MHz
    assert only(dram).end == 500 + ceil(1024 / 7.5)
    assert {moved.memory: moved.read for moved in flash.traffic} == {"sram": 0, "flash": 1024, "dram": 0}


def test_channels_share_a_memorys_bandwidth() -> None:
    one, two = price(load(6400), SYSTOLIC), price([*load(6400), *load(6400)], SYSTOLIC)
    assert [command.channel for command in two.commands] == [0, 1]
    assert two.cycles == 140 + 2 * 6400 / 12.8 == one.cycles + 500
    assert [command.end for command in two.commands] == [1140, 1140]
    assert two.commands[1].contention == cost.Contention("dram", 500, ("dma",))
    assert two.commands[0].contention == cost.Contention("dram", 500, ("dma 1",))


def test_a_single_channel_runs_copies_in_order() -> None:
    first, second = price([*load(800), *load(800)], ARM).commands
    assert second.start == first.end
    assert second.waited_for == "dma"


def test_engines_and_copies_share_the_scratchpads_port() -> None:
    # The product asks for all of 16 B/cycle, the copy for 12.8 of them: half each until the product is done.
    words, narrow = conv((16, 16, 32), (16, 16, 32)), edited(SYSTOLIC, sram="16 B/cycle")
    (alone,), (moving,) = price(words, narrow).commands, price(load(1 << 16), narrow).commands
    assert alone.limit == "sram"
    copied, product = price([*load(1 << 16), *words], narrow).commands
    assert product.contention is not None and product.contention.memory == "sram"
    assert product.contention.units == ("dma",) and product.limit == "sram"
    assert product.contention.cycles == (product.end - product.start) - (alone.end - alone.start) > 0
    assert copied.contention is not None and copied.contention.units == ("mxu",)
    assert copied.end > moving.end


def test_a_product_that_leaves_bandwidth_is_not_slowed() -> None:
    words = conv((16, 16, 64), (16, 16, 64))
    alone, beside = only(price(words, SYSTOLIC)), price([*load(1 << 16), *words], SYSTOLIC).commands[1]
    assert (beside.end - beside.start, beside.contention) == (alone.end - alone.start, None)


def test_ports_of_their_own_keep_engines_and_copies_apart() -> None:
    words, narrow = conv((16, 16, 32), (16, 16, 32)), edited(ARM, sram="1 B/cycle")
    alone = max(price(words, narrow).cycles, price(load(1 << 14), narrow).cycles)
    assert price([*load(1 << 14), *words], narrow).cycles == alone


# --- the timeline ---------------------------------------------------------------------------------------------------


def test_copies_and_operations_overlap_until_a_barrier() -> None:
    work = conv((16, 16, 32), (16, 16, 32))
    copy, operation = price(load(8192), SYSTOLIC).cycles, price(work, SYSTOLIC).cycles
    assert price([*load(8192), *work], SYSTOLIC).cycles == max(copy, operation)
    apart = price([*load(8192), *BARRIER, *work], SYSTOLIC)
    assert apart.cycles == copy + operation
    barrier = next(command for command in apart.commands if command.name == "barrier")
    assert (barrier.start, barrier.end, barrier.waited_for) == (0, copy, "dma")


def test_operations_on_one_engine_queue_and_engines_run_beside_each_other() -> None:
    matrix, vector = conv((16, 16, 32), (16, 16, 32)), conv((16, 16, 32), (16, 16, 32), groups=32)
    one, other = price(matrix, SYSTOLIC).cycles, price(vector, SYSTOLIC).cycles
    queued = price([*matrix, *matrix], SYSTOLIC)
    assert queued.cycles == 2 * one
    assert queued.commands[1].waited_for == "mxu"
    assert price([*matrix, *vector], SYSTOLIC).cycles == max(one, other)


def test_a_barrier_with_nothing_outstanding_costs_nothing() -> None:
    assert price([*BARRIER, *BARRIER], SYSTOLIC).cycles == 0
    assert price([*load(64), *BARRIER, *BARRIER], SYSTOLIC).cycles == price(load(64), SYSTOLIC).cycles


def test_work_hidden_behind_an_earlier_layer_adds_no_cycles() -> None:
    words = [*word(isa.LAYER, 5), *load(1 << 20), *word(isa.LAYER, 6), *conv((4, 4, 16), (4, 4, 16))]
    first, second = price(words, SYSTOLIC).layers
    assert (first.index, second.index, second.cycles) == (5, 6, 0)
    assert second.macs == 4 * 4 * 16 * 16
    assert 0 < second.utilisation <= 1


def test_a_layer_without_commands_is_bound_by_nothing() -> None:
    (layer,) = price([*word(isa.LAYER, 3), *BARRIER], SYSTOLIC).layers
    assert (layer.index, layer.cycles, layer.bound_by, layer.energy.total) == (3, 0, "nothing", 0)


def test_no_words_cost_nothing() -> None:
    region = price([], ARM)
    assert (region.cycles, region.layers, region.commands, region.utilisation) == (0, (), (), 0)


def test_scratchpad_reservations() -> None:
    words = [
        *word(isa.ALLOC, 0, 1000),
        *word(isa.ALLOC, 2000, 500),
        *word(isa.FREE, 0, 1000),
        *word(isa.ALLOC, 3000, 100),
    ]
    region = price(words, ARM)
    assert (region.peak_scratchpad, region.scratchpad_top) == (1500, 3100)


# --- sums -----------------------------------------------------------------------------------------------------------


def random_words(generator: np.random.Generator, layers: int) -> list[int]:
    words: list[int] = []
    for index in range(layers):
        words += word(isa.LAYER, int(generator.integers(layers)) if index % 3 else index)
        for _ in range(int(generator.integers(1, 6))):
            height, width, depth, kernel = (int(generator.integers(1, 20)) for _ in range(4))
            kernel = kernel % 4 + 1
            row = int(generator.integers(8, 400))
            words += load(row * int(generator.integers(1, 30)), int(generator.integers(1, 4)), row=row)
            if generator.random() < 0.6:
                words += BARRIER
            ifm = (height + kernel - 1, width + kernel - 1, depth)
            groups = depth if generator.random() < 0.3 else 1
            ofm = (height, width, depth if groups > 1 else int(generator.integers(1, 80)))
            words += conv(ifm, ofm, kernel, groups=groups)
            if generator.random() < 0.5:
                words += store(int(generator.integers(1, 5000)))
        words += BARRIER
    return words


@pytest.mark.parametrize("name", ["arm-npu", "ethos-u65-512", "systolic-npu"])
@pytest.mark.parametrize("seed", range(4))
def test_totals_are_the_sums_of_layers_and_of_commands(name: str, seed: int) -> None:
    target = load_target(name)
    npu = target.npu
    assert npu is not None
    region = price(random_words(np.random.default_rng(seed), 8), target, {WEIGHTS: npu.weight_memory})
    assert region.cycles == max(command.end for command in region.commands)
    assert region.cycles == sum(layer.cycles for layer in region.layers)
    assert region.macs == sum(layer.macs for layer in region.layers) == sum(item.macs for item in region.commands)
    assert region.elements == sum(command.elements for command in region.commands)
    for moved in region.traffic:
        of_commands = [item for command in region.commands for item in command.traffic if item.memory == moved.memory]
        assert moved.read == sum(item.read for item in of_commands)
        assert moved.written == sum(item.written for item in of_commands)
    assert region.seconds == region.cycles / npu.clock
    assert region.energy.total == pytest.approx(sum(layer.energy.total for layer in region.layers))
    assert region.energy.macs == pytest.approx(region.macs * (0.1 if name == "systolic-npu" else 0.3))
    assert region.energy.memory == pytest.approx(
        sum(
            moved.read * npu.memories[moved.memory].energy.read
            + moved.written * npu.memories[moved.memory].energy.write
            for moved in region.traffic
        )
    )
    assert region.energy.idle == pytest.approx(npu.idle_power * region.seconds * 1e12)
    assert all(0 <= layer.utilisation <= 1 for layer in region.layers)
    assert all(_busy_in_order(region, unit) for unit in {command.unit for command in region.commands})


def _busy_in_order(region: RegionCost, unit: str) -> bool:
    """No unit does two things at once."""
    last: dict[int, int] = {}
    for command in region.commands:
        if command.unit == unit:
            if command.start < last.get(command.channel, 0):
                return False
            last[command.channel] = command.end
    return True


@pytest.mark.parametrize("name", ["arm-npu", "systolic-npu"])
@pytest.mark.parametrize("memory", ["dram", "sram"])
def test_more_bandwidth_is_never_slower(name: str, memory: str) -> None:
    words = random_words(np.random.default_rng(7), 6)
    target = load_target(name)
    cycles = [price(words, edited(target, **{memory: f"{rate} B/cycle"})).cycles for rate in (1, 2, 5, 16, 100, 1000)]
    assert cycles == sorted(cycles, reverse=True)
    assert cycles[0] > cycles[-1]


def test_a_starved_engine_is_bound_by_its_memory() -> None:
    words = conv((16, 16, 64), (16, 16, 64))
    assert price(words, SYSTOLIC).layers[0].bound_by == "compute"
    assert price(words, edited(SYSTOLIC, sram="1 B/cycle")).layers[0].bound_by == "sram"
    assert price([*load(1 << 16), *BARRIER, *words], SYSTOLIC).layers[0].bound_by == "dram"
    tiny = price(conv((1, 1, 1), (1, 1, 1), groups=1), _slow_issue(SYSTOLIC))
    assert tiny.layers[0].bound_by == "issue"


def _slow_issue(target: Target) -> Target:
    assert target.npu is not None
    engine = target.npu.engines["mxu"]
    slow = engine.model_copy(update={"issue": type(engine.issue)(value=5000, unit="cycles")})
    return target.model_copy(
        update={"npu": target.npu.model_copy(update={"engines": {**target.npu.engines, "mxu": slow}})}
    )


def test_words_may_be_an_array() -> None:
    words = random_words(np.random.default_rng(3), 3)
    assert price(np.array(words, np.int32), ARM) == price(words, ARM)


def test_five_thousand_commands_take_milliseconds() -> None:
    words: list[int] = []
    for index in range(300):
        words += word(isa.LAYER, index)
        words += [
            *load(4096),
            *BARRIER,
            *conv((18, 18, 32), (16, 16, 16 + index % 24), kernel=3),
            *store(2048),
            *BARRIER,
        ]
        words += [*load(64), *conv((8, 8, 16), (8, 8, 16)), *BARRIER]
    assert sum(1 for _ in isa.decode(words)) >= 5000
    array = np.array(words, np.int32)
    price(array, ARM)
    best = min(_timed(array) for _ in range(3))
    # 20 ms; the bound leaves room for slower machines.
    assert best < 0.1, f"{best * 1e3:.0f} ms"


def _timed(words: np.ndarray) -> float:
    """CPU seconds: others may be using the machine."""
    start = time.process_time()
    price(words, ARM)
    return time.process_time() - start


# --- the host ---------------------------------------------------------------------------------------------------------


def test_host_cost_by_hand() -> None:
    # Cortex-M55 of arm-npu: 8 int8 MACs and 1 element a cycle at 500 MHz, 9.1 pJ a MAC, 12.5 pJ a byte.
    spent = cost.host_cost(ARM.host, precision="int8*int8", macs=8000, elements=500, transferred=100)
    assert spent.seconds == pytest.approx(1500 / 500e6)
    assert spent.energy == pytest.approx(8000 * 9.1 + 1250)
    floating = cost.host_cost(ARM.host, precision="float32", macs=8000, elements=0, transferred=0)
    assert floating.seconds == pytest.approx(4000 / 500e6)
    unknown = cost.host_cost(ARM.host, precision="int16*int16", macs=8000, elements=0, transferred=0)
    assert unknown.seconds == floating.seconds


def test_crossing_cost_by_hand() -> None:
    assert SYSTOLIC.npu is not None
    spent = cost.crossing_cost(SYSTOLIC.npu, 12800)
    assert spent.seconds == pytest.approx(2e-6 + 1e-6)
    assert spent.energy == pytest.approx(12800 * 324)


# --- the trace --------------------------------------------------------------------------------------------------------


def test_trace_has_a_track_for_each_unit_and_an_event_for_each_command() -> None:
    words = [*word(isa.LAYER, 4), *load(6400), *load(6400), *BARRIER, *conv((8, 8, 16), (8, 8, 16))]
    region = price(words, SYSTOLIC)
    trace = json.loads(chrome_trace(region, {4: "conv1"}, "region 0"))
    events = trace["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event.get("name") == "thread_name"}
    assert tracks == {"dma", "dma 1", "barrier", "mxu", "stall"}
    (stall,) = [event for event in events if event.get("cat") == "stall"]
    assert (stall["ts"], stall["dur"]) == (0, pytest.approx(1.14))
    assert stall["args"]["waited for"] == "dma, bound by dram, shared with dma 1"
    shown = [event for event in events if event["ph"] == "X" and event is not stall]
    assert len(shown) == len(region.commands)
    for event, command in zip(shown, region.commands, strict=True):
        assert event["ts"] == pytest.approx(command.start / 1000)  # 1 GHz: a microsecond is 1000 cycles
        assert event["dur"] == pytest.approx((command.end - command.start) / 1000)
        assert event["args"]["layer"] == "conv1"
    assert shown[1]["args"]["slowed by"] == "dram, shared with dma" and shown[1]["args"]["cycles lost"] == 500
    assert shown[0]["args"]["dram bytes read"] == 6400
    assert shown[3]["args"]["MACs"] == 8 * 8 * 16 * 16


def test_results_are_values() -> None:
    region = price(load(64), ARM)
    assert isinstance(region.layers[0], LayerCost)
    with pytest.raises(AttributeError):
        region.cycles = 3  # pyright: ignore[reportAttributeAccessIssue]
