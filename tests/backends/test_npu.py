"""NPU drivers on the simulator: results equal the reference, logs equal the static words, whatever the tiling."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from npu_nets import (
    EIGHT,
    INT4,
    INT8,
    INT16,
    UINT8,
    WIDE,
    Case,
    Check,
    Maps,
    Net,
    Shape,
    cases,
    pair,
    whole,
    with_scratchpad,
)

from qcompiler.backends import npu
from qcompiler.graph import dtype_of, shape_of
from qcompiler.integer import ops
from qcompiler.quant.arithmetic import REQUANTIZE_VARIANTS, RequantizeVariant
from qcompiler.simulator import isa
from qcompiler.simulator.cost import price
from qcompiler.target_loader import load_target

each_width = pytest.mark.parametrize("maps", [EIGHT, WIDE], ids=["8", "16"])


def tilings(all_cases: Sequence[Case]) -> list[tuple[int, ...]]:
    """Tiles along n, y, x, c of every operator that runs on an engine."""
    return [step.work.tiling.counts for case in all_cases for step in case.program.steps if step.work is not None]


# --- one operator at a time ----------------------------------------------------------------------------------------


@each_width
@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
def test_convolutions(check: Check, variant: RequantizeVariant, maps: Maps) -> None:
    all_cases: list[Case] = []
    rng = np.random.default_rng(REQUANTIZE_VARIANTS.index(variant))
    for seed in range(8):
        net = Net(100 + seed, variant, maps=maps)
        group = int(rng.choice([1, 1, 2, 3, 6]))
        depth_in, depth_out = 6 * int(rng.integers(1, 4)), 6 * int(rng.integers(1, 6))
        kernel, strides, dilations = (pair(rng, 1, top) for top in (5, 4, 3))
        pads = (*pair(rng, 0, 3), *pair(rng, 0, 3))
        size = [int(k) for k in rng.integers(9, 20, 2)]
        x = net.input(int(rng.integers(1, 3)), *size, depth_in, dtype=net.dtype())
        net.conv(x, depth_out, kernel, strides, pads, dilations, group)
        all_cases += cases(f"seed {seed}: {size} {kernel} {strides} {pads} {dilations} {group}", net.done(), variant)
    check(all_cases)
    cut = np.array(tilings(all_cases)) > 1
    assert cut[:, 1].any() and cut[:, 2].any() and cut[:, 3].any()


@each_width
def test_depthwise_convolutions(check: Check, maps: Maps) -> None:
    all_cases: list[Case] = []
    for seed, (h, w, c, k, s, d) in enumerate([(14, 15, 33, 3, 1, 1), (23, 9, 40, 5, 2, 1), (12, 12, 16, 3, 1, 2)]):
        net = Net(seed, maps=maps)
        net.conv(net.input(2, h, w, c), c, (k, k), (s, s), (k // 2, 1, 0, k // 2), (d, d), group=c)
        all_cases += cases(f"{h}x{w}x{c}", net.done())
    # Several outputs per input channel: neither depthwise nor dense.
    net = Net(9, maps=maps)
    net.conv(net.input(1, 9, 9, 8), 24, group=8)
    all_cases += cases("multiplier 3", net.done())
    check(all_cases)


@each_width
def test_four_bit_weights(check: Check, maps: Maps) -> None:
    """Odd filters leave half a byte unused; tiles of channels start at whole bytes all the same."""
    all_cases: list[Case] = []
    for seed, variant in enumerate(REQUANTIZE_VARIANTS):
        net = Net(70 + seed, variant, weights=(INT4,), maps=maps)
        x = net.conv(net.input(1, 9, 8, 5), 11, strides=pair(net.rng, 1, 3))
        x = net.conv(net.conv(x, 11, group=11), 22, kernel=(1, 3), group=11)
        net.conv_transpose(x, 7, (3, 3), (2, 2), (1, 1, 1, 1))
        net.gemm(net.input(3, 33), 21)
        all_cases += cases(f"int4 {variant}", net.done(), variant)
    check(all_cases)
    assert any(counts[3] > 1 for counts in tilings(all_cases))


def test_four_bit_weights_cost_half_the_bytes() -> None:
    """On the wire and in the cost model alike."""
    moved, sizes = [], []
    for dtype in (INT8, INT4):
        net = Net(75, "tosa", weights=(dtype,))
        net.conv(net.input(1, 6, 6, 32), 64)
        target = load_target("systolic-npu")
        program = npu.compile_region(whole(net.done()), target)
        sizes.append(len(program.blob))
        memory = target.npu.weight_memory if target.npu is not None else ""
        priced = price(npu.words(program), target, {program.bases.blob: memory})
        moved.append(sum(entry.read for entry in priced.traffic if entry.memory == memory))
    saved = 64 * 9 * 32 // 2
    assert sizes[0] - sizes[1] == moved[0] - moved[1] == saved


def test_windows_wholly_in_the_padding(check: Check) -> None:
    net = Net(5)
    net.conv(net.input(1, 4, 5, 8), 16, (2, 2), (1, 1), (5, 4, 3, 6))
    check(list(cases("wide padding", net.done())))


@each_width
def test_transposed_convolutions(check: Check, maps: Maps) -> None:
    all_cases: list[Case] = []
    settings = [((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1, 1), ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1), 1, 0),
                ((2, 3), (3, 2), (0, 1, 1, 0), (1, 1), 1, 0), ((3, 2), (1, 2), (2, 0, 1, 1), (2, 1), 2, 0),
                ((1, 1), (3, 3), (0, 0, 0, 0), (1, 1), 1, 2), ((4, 4), (2, 2), (1, 1, 1, 1), (1, 1), 8, 0)]  # fmt: skip
    for seed, (kernel, strides, pads, dilations, group, extra) in enumerate(settings):
        net = Net(seed, maps=maps)
        net.conv_transpose(net.input(1 + seed % 2, 7, 9, 8), 24, kernel, strides, pads, dilations, group, extra)
        all_cases += cases(f"{kernel} {strides} {pads}", net.done())
    check(all_cases)


@each_width
def test_gemms(check: Check, maps: Maps) -> None:
    all_cases: list[Case] = []
    for variant in REQUANTIZE_VARIANTS:
        for m, k, n in ((1, 130, 37), (5, 64, 10), (33, 17, 70)):
            net = Net(m, variant, maps=maps)
            net.gemm(net.input(m, k, dtype=net.dtype()), n)
            all_cases += cases(f"{m}x{k}x{n} {variant}", net.done(), variant)
    check(all_cases)


@each_width
@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
def test_additions_and_products(check: Check, variant: RequantizeVariant, maps: Maps) -> None:
    shapes: list[tuple[Shape, Shape]] = [
        ((1, 9, 7, 20), (1, 9, 7, 20)), ((2, 9, 7, 20), (1, 1, 1, 20)), ((2, 5, 6, 8), (2, 1, 1, 8)),
        ((1, 9, 7, 1), (1, 1, 7, 20)), ((7, 20), (20,)), ((3, 4, 5, 2, 6), (3, 4, 5, 2, 6)), ((40,), (1,)),
        ((2, 3, 4, 5, 6), (6,)), ((1, 6, 6, 4), (1, 6, 6, 1)),
    ]  # fmt: skip
    all_cases: list[Case] = []
    for seed, (a, b) in enumerate(shapes):
        net = Net(seed, variant, maps=maps)
        left, right = net.input(*a, dtype=net.dtype()), net.input(*b, dtype=net.dtype())
        if left.dtype != right.dtype and INT16 in maps:
            right = net.requantize(right, left.dtype)
        net.sum(left, right, subtract=seed % 2)
        net.product(right, left)
        net.sum(left, net.constant(net.random(b, INT16 if left.dtype == INT16 else UINT8)))
        all_cases += cases(f"{a} {b}", net.done(), variant)
    net = Net(77, variant, maps=maps)
    x = net.input(1, 8, 8, 16)
    net.product(x, x)
    all_cases += cases("a square", net.done(), variant)
    check(all_cases)


@each_width
def test_pools(check: Check, maps: Maps) -> None:
    all_cases: list[Case] = []
    for seed, variant in enumerate((*REQUANTIZE_VARIANTS, *REQUANTIZE_VARIANTS)):
        net = Net(seed, variant, maps=maps)
        rng = net.rng
        x = net.input(int(rng.integers(1, 3)), *(int(k) for k in rng.integers(8, 17, 2)), 24, dtype=net.dtype())
        kernel, strides = pair(rng, 1, 4), pair(rng, 1, 4)
        top, left, bottom, right = (int(rng.integers(0, kernel[i % 2])) for i in range(4))
        pads = (top, left, bottom, right)
        net.max_pool(x, kernel, strides, pads, (2, 1))
        net.average_pool(x, kernel, strides, pads, 0)
        net.average_pool(x, kernel, strides, pads, 1)
        net.average_pool(x, kernel, strides, (0, 0, 0, 0), 0)
        all_cases += cases(f"{shape_of(x)} {kernel} {strides} {pads}", net.done(), variant)
    check(all_cases)


@each_width
def test_means(check: Check, maps: Maps) -> None:
    all_cases: list[Case] = []
    settings: list[tuple[Shape, tuple[int, ...], bool]] = [
        ((2, 7, 6, 20), (1, 2), True), ((1, 7, 6, 20), (1, 2), False), ((3, 10, 8), (1,), True), ((4, 30), (1,), False),
        ((2, 3, 4, 5), (1, 2, 3), True), ((2, 3, 4, 5), (0,), False),
    ]  # fmt: skip
    for seed, (shape, axes, keep) in enumerate(settings):
        net = Net(seed, maps=maps)
        net.reduce_mean(net.input(*shape, dtype=net.dtype()), axes, keep=keep)
        all_cases += cases(f"{shape} {axes}", net.done())
    check(all_cases)


@each_width
def test_unary_operators(check: Check, maps: Maps) -> None:
    all_cases: list[Case] = []
    for seed, shape in enumerate(((1, 9, 7, 20), (3, 100), (40,), (2, 3, 4, 5, 6), (2, 5, 9))):
        for variant in REQUANTIZE_VARIANTS[seed % 2 :: 2]:
            net = Net(seed, variant, maps=maps)
            x = net.input(*shape, dtype=net.dtype())
            for dtype in maps:
                net.requantize(x, dtype)
            for operator in (net.clip, net.lookup, net.softmax):
                operator(x)
            all_cases += cases(f"{shape} {variant}", net.done(), variant)
    check(all_cases)


@each_width
def test_resizes(check: Check, maps: Maps) -> None:
    all_cases: list[Case] = []
    for seed, (h, w, size) in enumerate([(5, 7, (10, 14)), (9, 6, (5, 13)), (4, 4, (11, 3)), (6, 5, (6, 5))]):
        net = Net(seed, maps=maps)
        x = net.input(1 + seed % 2, h, w, 20, dtype=net.dtype())
        net.resize(x, size, linear=False)
        if x.dtype != INT16:
            net.resize(x, size, linear=True)
        all_cases += cases(f"{h}x{w} to {size}", net.done())
    check(all_cases)


@each_width
def test_data_movement(check: Check, maps: Maps) -> None:
    all_cases: list[Case] = []
    for seed, n in enumerate((1, 2)):
        net = Net(seed, maps=maps)
        x, y = net.input(n, 6, 5, 8), net.input(n, 6, 5, 3)
        for axis, other in ((0, x), (1, x), (2, x), (3, y)):
            net.concat([x, other, net.constant(net.random(shape_of(other), maps[0]))], axis)
        net.split(x, 3, (3, 4, 1))
        net.split(x, 1, (2, 4))
        net.slice(x, (1, 2), (6, 5), (1, 3), (2, 3))
        net.slice(x, (-4,), (100,), (2,), (1,))
        net.slice(x, (1,), (100,), (3,), (2,))
        net.slice(y, (0,), (3,), (-1,), (2,))
        net.pad(x, (0, 1, 2, 0), (0, 3, 0, 1))
        net.pad(x, (0, 0, 0, 0), (0, 0, 0, 0))
        net.reshape(x, n * 30, 8)
        for perm in ((0, 3, 1, 2), (0, 2, 3, 1), (0, 2, 1, 3), (3, 2, 1, 0), (0, 1, 3, 2), (1, 0, 2, 3)):
            net.transpose(x, *perm)
        net.transpose(net.input(2, 3, 4, 2, 5), 4, 1, 0, 3, 2)
        net.pad(net.input(n, 11, 13, 7), (0, 2, 3, 1), (0, 3, 1, 0))
        all_cases += cases(f"batch {n}", net.done())
    check(all_cases)


# --- regions ----------------------------------------------------------------------------------------------------------


def random_region(seed: int, kinds: Maps = EIGHT) -> ir.Model:
    """A random directed graph: every operator picks its inputs among all values so far."""
    net = Net(1000 + seed, REQUANTIZE_VARIANTS[seed % 4], maps=kinds)
    rng = net.rng
    maps = [net.input(int(rng.integers(1, 3)), int(rng.integers(8, 15)), int(rng.integers(8, 15)), 12)]

    def pick() -> ir.Value:
        return maps[int(rng.integers(len(maps)))]

    def alike(x: ir.Value) -> ir.Value:
        same = [value for value in maps if shape_of(value) == shape_of(x)]
        return as_wide(same[int(rng.integers(len(same)))], x)

    def as_wide(y: ir.Value, x: ir.Value) -> ir.Value:
        return y if dtype_of(y).itemsize == dtype_of(x).itemsize else net.requantize(y, x.dtype)

    for _ in range(int(rng.integers(5, 13))):
        x = pick()
        n, h, w, c = shape_of(x)
        match int(rng.integers(14)):
            case 0 | 1:
                y = net.conv(x, int(rng.integers(1, 30)))
            case 2:
                y = net.conv(x, c, group=c)
            case 3:
                y = net.conv(x, int(rng.integers(8, 40)), (1, 1), (1, 1), (0, 0, 0, 0))
            case 4 | 5:
                y = net.sum(x, alike(x))
            case 6:
                y = net.max_pool(x, (2, 2), (2, 2), (0, 0, 1, 1)) if min(h, w) > 3 else net.clip(x)
            case 7:
                y = net.product(x, as_wide(net.reduce_mean(x, (1, 2), keep=True), x))
            case 13:
                y = net.lookup(x)
            case 8 | 9:
                same = [value for value in maps if shape_of(value)[:3] == (n, h, w) and value.dtype == x.dtype]
                y = net.concat(same[-3:], 3) if sum(shape_of(value)[3] for value in same[-3:]) < 80 else net.clip(x)
            case 10:
                half = c // 2
                parts = net.split(x, 3, (half, c - half)) if half else [net.requantize(x)]
                maps.append(parts[-1])
                y = parts[0]
            case 11:
                y = net.reshape(net.requantize(net.reshape(x, n * h * w, c)), n, h, w, c)
            case _:
                y = net.pad(x, (0, 1, 0, 0), (0, 0, 1, 0))
        maps.append(y)
    unread = [value for value in maps if not value.uses() and value.producer() is not None]
    inner = [value for value in maps if value.uses() and value.producer() is not None]
    # Some inner value leaves the region too.
    return net.done(*unread, *inner[: int(rng.integers(2))])


@each_width
@pytest.mark.parametrize("block", range(3))
def test_random_regions(check: Check, block: int, maps: Maps) -> None:
    all_cases: list[Case] = []
    for seed in range(8 * block, 8 * block + 8):
        all_cases += cases(f"seed {seed}", random_region(seed, maps), REQUANTIZE_VARIANTS[seed % 4])
    check(all_cases)
    assert any(case.program.evicted for case in all_cases)


def inception(size: int) -> ir.Model:
    net = Net(3)
    x = net.conv(net.input(1, 24, 24, 8), 32)
    left, right = net.conv(x, 16), net.conv(x, 24, (1, 1), (1, 1), (0, 0, 0, 0))
    dtype = right.dtype
    left = left if left.dtype == dtype else net.requantize(left)
    while left.dtype != dtype:
        left = net.requantize(left)
    net.conv(net.concat([left, right], 3), size)
    return net.done()


def test_inputs_of_a_concat_are_written_in_place() -> None:
    program = npu.compile_region(whole(inception(16)), with_scratchpad(1 << 20))
    concat = next(step for step in program.steps if step.op == "Concat")
    assert concat.copies == () and not program.evicted
    writers = [step.work.ofm for step in program.steps if step.work is not None and step.work.ofm.strides[2] == 40]
    assert len(writers) == 2 and {placed.base for placed in writers} == {isa.SCRATCHPAD}


def test_maps_stay_in_the_scratchpad_when_they_fit() -> None:
    model = inception(16)
    roomy = npu.compile_region(whole(model), with_scratchpad(1 << 20))
    tight = npu.compile_region(whole(model), with_scratchpad(32 * 1024, rolling=False))
    assert roomy.workspace_bytes == 0 and roomy.evicted == ()
    assert tight.workspace_bytes > 0 and tight.evicted
    moved = [
        sum(step.work.tiling.moved for step in program.steps if step.work is not None) for program in (roomy, tight)
    ]
    assert moved[0] < moved[1]
    # Region input, constants and output once each: nothing can move less.
    assert moved[0] == 24 * 24 * 8 + sum(len(stream.data) for stream in streams_of(roomy)) + 24 * 24 * 16


def streams_of(program: npu.NpuProgram) -> list:
    return [stream for step in program.steps if step.work is not None for stream in step.work.work.streams]


def test_the_next_tile_is_fetched_while_one_computes() -> None:
    net = Net(8)
    net.conv(net.input(1, 40, 40, 32), 64)
    program = npu.compile_region(whole(net.done()), with_scratchpad(64 * 1024))
    (step,) = program.steps
    assert step.work is not None and step.work.tiling.slots == 2 and step.work.tiling.tiles > 2
    names = [command.opcode.name for command in isa.decode(npu.words(program).tolist())]
    spans = " ".join(names).split("barrier")
    assert sum("dma" in span and "conv" in span for span in spans) >= step.work.tiling.tiles - 1


def test_constants_are_fetched_during_the_operator_before() -> None:
    net = Net(8)
    net.conv(net.conv(net.input(1, 16, 16, 16), 16), 16)
    program = npu.compile_region(whole(net.done()), with_scratchpad(1 << 20))
    assert [step.prefetched for step in program.steps] == [False, True] and program.steps[0].prefetch == 1
    layer, fetched = 0, {0: 0, 1: 0}
    for command in isa.decode(npu.words(program).tolist()):
        if command.opcode is isa.LAYER:
            layer = command["index"]
        elif command.opcode is isa.DMA and command["src_base"] == program.bases.blob:
            fetched[layer] += command["row_bytes"]
    expected = [sum(len(stream.data) for stream in step.work.work.streams) for step in program.steps if step.work]
    assert list(fetched.values()) == expected


def test_weights_used_once_are_read_where_they_lie() -> None:
    net = Net(8)
    net.gemm(net.gemm(net.input(1, 640), 128), 64)
    program = npu.compile_region(whole(net.done()), with_scratchpad(1 << 20))
    copied = [c for c in isa.decode(npu.words(program).tolist()) if c.opcode is isa.DMA]
    assert program.bases.blob not in {command["src_base"] for command in copied}
    assert program.scratchpad.peak == 640 + 128
    blob = program.bases.blob
    cost = price(npu.words(program), with_scratchpad(1 << 20), {blob: "flash"}, {blob: program.encoded})
    (flash,) = [traffic for traffic in cost.traffic if traffic.memory == "flash"]
    constants = sum(len(stream.data) for stream in streams_of(program))
    assert 0.9 * constants < flash.read < 1.1 * constants, "random weights have no shorter code"


def test_a_small_peak_is_had_where_it_costs_nothing() -> None:
    """Weights come in pieces: never are those of both layers there whole, though there is room."""
    net = Net(8)
    net.conv(net.conv(net.input(1, 8, 8, 64), 64), 64)
    program = npu.compile_region(whole(net.done()), with_scratchpad(1 << 20))
    assert program.scratchpad.peak < 1.5 * 64 * 64 * 9
    assert all(step.work.tiling.c % 16 == 0 for step in program.steps if step.work is not None)


def test_the_cost_model_prices_the_words() -> None:
    program = npu.compile_region(whole(inception(16)), with_scratchpad(40 * 1024))
    cost = price(npu.words(program), with_scratchpad(40 * 1024), {program.bases.blob: "flash"})
    macs = 24 * 24 * (32 * 9 * 8 + 16 * 9 * 32 + 24 * 32 + 16 * 9 * 40)
    assert cost.macs == macs and cost.cycles > macs / 128
    assert cost.scratchpad_top == program.scratchpad.peak


def test_equal_constants_are_stored_once() -> None:
    net = Net(8)
    x = net.input(1, 4, 4, 8)
    table = net.constant(net.random((256,), INT8))
    for _ in range(3):
        net.integer(ops.QLookup("Tanh"), [x, table], (1, 4, 4, 8), INT8)
    assert len(npu.compile_region(whole(net.done()), with_scratchpad(1 << 16)).blob) == 256


def test_two_compilations_are_equal() -> None:
    programs = [npu.compile_region(whole(random_region(3)), with_scratchpad(40 * 1024)) for _ in range(2)]
    assert np.array_equal(npu.words(programs[0]), npu.words(programs[1]))
    assert np.array_equal(programs[0].blob, programs[1].blob)
    texts = [npu.driver(program, "main").script() for program in programs]
    assert texts[0] == texts[1]


# --- refusals -------------------------------------------------------------------------------------------------------


def reason_of(net: Net, scratchpad: int = 1 << 20) -> str | None:
    (node,) = net.graph
    return npu.can_run(node, with_scratchpad(scratchpad))


def test_refuses_a_tile_that_cannot_fit() -> None:
    net = Net(0)
    net.gemm(net.input(1, 20000), 10)
    assert reason_of(net) is None
    assert reason_of(net, 32768) == "its smallest tile needs 40032 bytes and the scratchpad has 32768"


def test_refuses_what_its_driver_lacks() -> None:
    net = Net(0)
    a, b = net.input(3, 4), net.input(4, 5)
    net.integer(ops.QMatMul(0, 0, 0, -128, 127, "tflite"), [a, b, *net.scales(1, 0.1)], (3, 5), INT8)
    assert reason_of(net) == "the NPU's driver has no QMatMul"


def test_refuses_means_over_scattered_axes() -> None:
    net = Net(0)
    net.reduce_mean(net.input(2, 3, 4, 5), (1, 3), keep=True)
    assert reason_of(net) == "the axes it averages are not neighbours"


def test_refuses_computed_weights() -> None:
    net = Net(0)
    net.gemm(net.input(2, 8), 4)
    (node,) = net.graph
    node.replace_input_with(1, net.input(4, 8))
    assert reason_of(net) == "its weights are not constant"


def test_refuses_wide_tensors_and_backward_slices() -> None:
    net = Net(0)
    net.reshape(net.input(2, 8, dtype=ir.DataType.INT32), 16)
    assert reason_of(net) == "Reshape works on 8- and 16-bit tensors only"
    net = Net(0)
    net.sum(net.input(4, dtype=INT16), net.input(4))
    assert reason_of(net) == "its operands are of different widths"
    net = Net(0)
    net.resize(net.input(1, 4, 4, 3, dtype=INT16), (8, 8), linear=True)
    assert reason_of(net) == "QResizeLinear works on 8-bit tensors only"
    net = Net(0)
    net.integer(ops.QLookup("Tanh"), [net.input(4), net.constant(net.random((256,), INT16))], (4,), INT16)
    assert reason_of(net) == "its table leads to another width"
    net = Net(0)
    net.slice(net.input(8), (7,), (-9,), (0,), (-1,))
    assert reason_of(net) == "it slices backwards"
    net = Net(0)
    net.standard("ArgMax", [net.input(2, 8)], [(2, 1)], axis=1)
    assert reason_of(net) == "the NPU's driver has no ArgMax"
