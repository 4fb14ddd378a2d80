"""Cascades: rows, rolling buffers and drivers, beside the definition and the reference; and when they are chosen."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest
from npu_nets import EIGHT, INT8, UINT8, WIDE, Case, Check, Maps, Net, whole, with_scratchpad

from qcompiler.backends import npu
from qcompiler.backends.npu_cascade import Line, Progress, Stripes, read_from, read_until
from qcompiler.backends.npu_layers import recipe_of
from qcompiler.backends.npu_layout import plan_layout
from qcompiler.backends.npu_maps import RegionMaps
from qcompiler.backends.npu_tiling import Same, Sliding, Span, Tabled, Transposed, Whole
from qcompiler.backends.npu_units import NoRoomError, Unit
from qcompiler.graph import shape_of
from qcompiler.simulator import isa
from qcompiler.simulator.cost import RegionCost, price
from qcompiler.target import Target
from qcompiler.target_loader import load_target

Pads = tuple[int, int, int, int]
Chain = Callable[[Net], ir.Model]


# --- rows -----------------------------------------------------------------------------------------------------------


def spans(rng: np.random.Generator) -> Iterator[tuple[Span, int, int]]:
    """Spans with the sizes of their operand and output."""
    for _ in range(300):
        size, kernel, stride, dilation, pad, below = (int(rng.integers(low, high)) for low, high in
                                                      ((1, 30), (1, 6), (1, 5), (1, 4), (0, 6), (0, 6)))  # fmt: skip
        reach = (kernel - 1) * dilation + 1
        if size + pad + below >= reach:
            yield Sliding(size, kernel, stride, dilation, pad), size, (size + pad + below - reach) // stride + 1
        outputs = (size - 1) * stride + reach - min(pad, reach - 1)
        yield Transposed(size, kernel, stride, dilation, min(pad, reach - 1)), size, outputs
        outputs = int(rng.integers(1, 40))
        low = np.sort(rng.integers(0, size, outputs))
        high = np.minimum(low + rng.integers(0, 2, outputs), size - 1)
        yield Tabled(tuple(zip(low.tolist(), high.tolist(), strict=True))), size, outputs
        yield Same(), size, size
        yield Whole(size), size, outputs


def reads(span: Span, output: int, size: int) -> set[int]:
    """The rows of an operand of `size` rows that one row of an output is computed from, by definition."""
    match span:
        case Sliding():
            taps = {output * span.stride - span.pad + tap * span.dilation for tap in range(span.kernel)}
            return taps & set(range(size))
        case Transposed():
            at = [output + span.pad - tap * span.dilation for tap in range(span.kernel)]
            return {place // span.stride for place in at if place % span.stride == 0} & set(range(size))
        case Tabled():
            return set(range(span.reads[output][0], span.reads[output][1] + 1))
        case Same():
            return {output}
        case _:
            return set(range(size))


def test_lines_and_first_rows_cover_what_is_read() -> None:
    """Beside the definition, for every number of outputs done."""
    rng = np.random.default_rng(0)
    for span, size, outputs in spans(rng):
        line = Line(int(rng.integers(1, 5)), int(rng.integers(1, 6)), int(rng.integers(1, 3)))
        needed = read_until(span, line)
        for stripe in range(12):
            done, rows = line.at(stripe), needed.at(stripe)
            assert isinstance(done, int) and isinstance(rows, int)
            for output in range(min(done, outputs)):
                assert max(reads(span, output, size), default=0) < max(1, rows), (span, line, stripe)
        firsts = read_from(span, np.arange(outputs + 1), outputs, size)
        assert firsts[outputs] == size and (np.diff(firsts) >= 0).all()
        for start in range(outputs):
            later = set[int]().union(*(reads(span, output, size) for output in range(start, outputs)))
            assert firsts[start] <= min(later, default=size), (span, start)


def test_progress_ends_with_the_last_stripe() -> None:
    progress = Progress.over(5, 20, [Line(4, 3), Line(2, 9)])
    assert progress.rows(5).tolist() == [0, 9, 11, 13, 15, 19] and progress.limit == 19
    assert [progress.at(stripe) for stripe in range(7)] == [9, 11, 13, 15, 19, 19, 19]
    assert Progress.over(3, 8, [Line(6, -5, 2)]).rows(3).tolist() == [0, 1, 1, 3], "at least one row is there"
    assert Progress.over(4, 9, [Line(0, 9)]).at_once and not progress.at_once


def test_lines_are_simplified_without_loss() -> None:
    rng = np.random.default_rng(1)
    for slope, start, divisor in rng.integers([0, -40, 1], [30, 40, 13], (500, 3)).tolist():
        line = Line(slope, start, divisor)
        assert [line.at(stripe) for stripe in range(30)] == [line.simplified().at(stripe) for stripe in range(30)]


def stripes_of(model: ir.Model, height: int) -> tuple[RegionMaps, Stripes]:
    target, region = with_scratchpad(1 << 20), whole(model)
    recipes = [recipe_of(node, target) for node in region.nodes]
    maps = RegionMaps(region, recipes, plan_layout(region, recipes))  # pyright: ignore[reportArgumentType]
    operators = [operator for operator in maps.operators if operator is not None]
    rows = operators[-1].ofm.rows
    stripes = Stripes(-(-rows // height), height, maps.outputs, maps.writers)
    for operator in reversed(operators):
        stripes.add(operator)
    return maps, stripes


@pytest.mark.parametrize("seed", range(40))
def test_rolling_buffers_hold_every_row_from_its_writing_to_its_last_reading(seed: int) -> None:
    """A cascade stepped row by row: what is read is there, and nothing is written over before its last reader."""
    net = Net(seed)
    model = random_chain(net)
    for height in (1, 2, 5):
        maps, stripes = stripes_of(model, height)
        order = stripes.in_order()
        computed: Counter[tuple[int, int]] = Counter()
        buffers: dict[ir.Value, dict[int, int]] = {}
        for stripe in range(stripes.count):
            for operator in order:
                first, last = stripes.rows[operator.step][stripe : stripe + 2].tolist()
                for access in operator.maps:
                    for output in range(first, last) if access.root in buffers else ():
                        read = reads(access.y, output, access.rows)
                        assert read <= set(buffers[access.root].values()), (stripe, operator.step)
                root = operator.ofm.root
                if root in stripes.readers:
                    held = stripes.held(root)
                    buffers.setdefault(root, {}).update({row % held: row for row in range(first, last)})
                computed.update((operator.step, row) for row in range(first, last))
        assert max(computed.values()) == 1, "no row is computed twice"
        for operator in order:
            done = sum(step == operator.step for step, _ in computed)
            assert done == operator.ofm.rows or operator.ofm.root not in maps.outputs


# --- drivers ----------------------------------------------------------------------------------------------------------


def keeping(size: int) -> Target:
    """`with_scratchpad`, but for engines that reach constants in the scratchpad only."""
    target = with_scratchpad(size)
    assert target.npu is not None
    return target.model_copy(update={"npu": target.npu.model_copy(update={"reads_constants_in_place": False})})


def as_cascade(model: ir.Model, target: Target) -> npu.NpuProgram | None:
    """All nodes as one cascade, or None if that does not fit."""
    try:
        return npu.compile_region(whole(model), target, [Unit(0, len(list(model.graph)) - 1)])
    except NoRoomError:
        return None


def cascades(
    label: str, model: ir.Model, make: Callable[[int], Target] = with_scratchpad, factors: Sequence[float] = (1, 1.5, 4)
) -> list[Case]:
    """The model as one cascade, in the smallest scratchpad that holds it and in larger ones."""
    low, high = 16, 1 << 18
    assert as_cascade(model, make(high)) is not None, label
    while high - low > max(16, high // 40):
        middle = (low + high) // 32 * 16
        low, high = (low, middle) if as_cascade(model, make(middle)) is not None else (middle, high)
    found: list[Case] = []
    for factor in factors:
        target = make(round(high * factor))
        program = as_cascade(model, target)
        assert program is not None
        if not any(case.program.cascades[0].plan == program.cascades[0].plan for case in found):
            found.append(Case(f"{label}, {round(high * factor)} bytes", model, program, target))
    return found


KERNELS: list[tuple[tuple[int, int], tuple[int, int], Pads, tuple[int, int]]] = [
    # kernel, strides, pads, dilations of the middle one of three convolutions
    ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    ((3, 3), (2, 2), (0, 0, 1, 1), (1, 1)),
    ((5, 3), (1, 1), (2, 1, 2, 1), (1, 1)),
    ((5, 2), (3, 2), (0, 0, 0, 0), (1, 1)),
    ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
    ((2, 3), (2, 1), (3, 0, 1, 2), (3, 1)),
    ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    ((1, 1), (3, 2), (2, 0, 0, 0), (1, 1)),
    ((4, 4), (4, 4), (0, 0, 0, 0), (1, 1)),
    ((7, 1), (2, 1), (3, 0, 3, 0), (1, 1)),
    ((2, 2), (1, 1), (5, 4, 3, 6), (1, 1)),
]
SIZES = ((17, 9), (16, 8), (23, 5))


@pytest.mark.parametrize("maps", [EIGHT, WIDE], ids=["8", "16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_chains_of_convolutions(check: Check, size: tuple[int, int], maps: Maps) -> None:
    all_cases: list[Case] = []
    for seed, (kernel, strides, pads, dilations) in enumerate(KERNELS):
        net = Net(seed, maps=maps)
        x = net.conv(net.input(1, *size, 6, dtype=net.dtype()), 11)
        x = net.conv(x, 8, kernel, strides, pads, dilations)
        net.conv(x, 7, (3, 1), (1 + seed % 2, 1), (1, 0, 1, 0))
        make = keeping if seed % 2 else with_scratchpad
        all_cases += cascades(f"{size} {kernel} {strides} {pads} {dilations}", net.done(), make, (1, 2))
    check(all_cases)
    plans = [case.program.cascades[0].plan for case in all_cases]
    assert len({plan.stripes for plan in plans}) > 5
    assert any(roll.rows < size[0] for plan in plans for roll in plan.rolls), "buffers roll"


def inverted_residual(net: Net) -> ir.Model:
    x = net.conv(net.input(1, 19, 14, 8, dtype=INT8), 8)
    y = net.conv(x, 30, (1, 1), (1, 1), (0, 0, 0, 0))
    y = net.conv(net.conv(y, 30, group=30), 8, (1, 1), (1, 1), (0, 0, 0, 0))
    net.lookup(net.sum(x, y))
    return net.done()


def residual_of_an_input(net: Net) -> ir.Model:
    """The first operator and the last read the same map from outside."""
    x = net.input(1, 15, 11, 8, dtype=INT8)
    net.sum(net.conv(net.conv(x, 12), 8), x)
    return net.done()


def down_and_up(net: Net) -> ir.Model:
    x = net.conv(net.input(1, 21, 10, 6, dtype=INT8), 12, (3, 3), (2, 2))
    y = net.max_pool(x, (3, 2), (2, 2), (1, 0, 1, 0))
    y = net.conv_transpose(y, 9, (3, 2), (2, 2), (1, 0, 0, 0), extra=0)
    net.conv(net.average_pool(y, (2, 2), (1, 1), (1, 0, 0, 1), 0), 5)
    return net.done()


def resized(net: Net, *, linear: bool) -> ir.Model:
    x = net.conv(net.input(1, 9, 7, 5, dtype=INT8), 6)
    net.conv(net.resize(x, (20, 11), linear=linear), 7)
    return net.done()


def concatenated(net: Net) -> ir.Model:
    """Two branches of different reach into one map, and its reader."""
    x = net.conv(net.input(1, 18, 9, 8), 8)
    left, right = net.conv(x, 5, (5, 5), (1, 1), (2, 2, 2, 2)), net.conv(x, 9, (1, 1), (1, 1), (0, 0, 0, 0))
    while left.dtype != right.dtype:
        left = net.requantize(left)
    net.conv(net.concat([left, right], 3), 6, (3, 3), (2, 1))
    return net.done()


def dense_block(net: Net) -> ir.Model:
    """Each convolution reads all maps before it, which are parts of one."""
    x = net.conv(net.input(1, 14, 8, 8), 8)
    for _ in range(2):
        y = net.conv(x, 4)
        while y.dtype != x.dtype:
            y = net.requantize(y)
        x = net.concat([x, y], 3)
    net.conv(x, 5)
    return net.done()


def several_outputs(net: Net) -> ir.Model:
    """Inner maps leave too, and one leaves only."""
    x = net.conv(net.input(1, 16, 9, 8), 12)
    y = net.conv(x, 6, (3, 3), (2, 2))
    head = net.lookup(x)
    z = net.conv(y, 9)
    return net.done(y, head, z)


def broadcasts(net: Net) -> ir.Model:
    """Operands that are constant, one of them as large as the map."""
    x = net.conv(net.input(1, 13, 9, 8), 10)
    x = net.sum(x, net.constant(net.random((1, 1, 1, 10), UINT8)))
    x = net.product(x, net.constant(net.random((1, 13, 9, 10), INT8)))
    x = net.sum(net.constant(net.random((1, 13, 1, 1), INT8)), x, subtract=1)
    net.product(net.requantize(x), x)
    return net.done()


def rows_nobody_reads(net: Net) -> ir.Model:
    """Strides that leave out the last rows, and rows between windows."""
    x = net.conv(net.input(1, 22, 6, 8), 8)
    x = net.conv(x, 8, (1, 1), (4, 1), (0, 0, 0, 0))
    net.conv(net.conv(x, 8), 8, (2, 1), (3, 2), (0, 0, 0, 0))
    return net.done()


GRAPHS: dict[str, Chain] = {
    "inverted residual": inverted_residual,
    "residual of an input": residual_of_an_input,
    "down and up": down_and_up,
    "nearest": lambda net: resized(net, linear=False),
    "linear": lambda net: resized(net, linear=True),
    "concatenated": concatenated,
    "dense block": dense_block,
    "several outputs": several_outputs,
    "broadcasts": broadcasts,
    "rows nobody reads": rows_nobody_reads,
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(check: Check, name: str) -> None:
    all_cases: list[Case] = []
    for seed in range(3):
        make = keeping if seed % 2 else with_scratchpad
        all_cases += cascades(f"{name} {seed}", GRAPHS[name](Net(seed)), make)
    check(all_cases)
    assert all(case.program.evicted == () or name == "several outputs" for case in all_cases)


def random_chain(net: Net) -> ir.Model:
    """A few operators, mostly each of the one before, that can be a cascade."""
    rng = net.rng
    maps = [net.input(1, int(rng.integers(7, 22)), int(rng.integers(4, 11)), int(rng.integers(1, 20)))]
    for _ in range(int(rng.integers(2, 7))):
        maps.append(_next(net, rng, maps))
    return net.done(*[value for value in maps[1:] if not value.uses()])


def _next(net: Net, rng: np.random.Generator, maps: Sequence[ir.Value]) -> ir.Value:
    x = maps[-1]
    _, h, w, c = shape_of(x)
    alike = [value for value in maps if shape_of(value) == shape_of(x)]
    match int(rng.integers(10)) if min(h, w) > 3 else 6 + int(rng.integers(3)):
        case 0 | 1:
            kernel, pads = (int(rng.integers(1, 4)), int(rng.integers(1, 4))), tuple(rng.integers(0, 3, 4).tolist())
            stride, dilation = (int(rng.integers(1, 4)), int(rng.integers(1, 3))), (int(rng.integers(1, 2)), 1)
            return net.conv(x, int(rng.integers(1, 30)), kernel, stride, pads, dilation)
        case 2:
            return net.conv(x, c, (3, 3), (int(rng.integers(1, 3)), 1), (1, 1, 1, 1), group=c)
        case 3:
            return net.conv_transpose(x, int(rng.integers(1, 12)), (3, 2), (2, 1), (int(rng.integers(0, 2)), 0, 1, 0))
        case 4:
            return net.max_pool(x, (int(rng.integers(2, 4)), 2), (int(rng.integers(1, 4)), 2), (0, 0, 1, 1))
        case 5:
            return net.average_pool(x, (2, 2), (int(rng.integers(1, 3)), 1), (1, 0, 0, 1), int(rng.integers(2)))
        case 6:
            return net.lookup(x)
        case 7 | 8:
            return net.sum(x, alike[int(rng.integers(len(alike)))])
        case _:
            return net.resize(x, (int(rng.integers(3, 2 * h)), w), linear=bool(rng.integers(2)))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(3))
def test_random_chains(check: Check, block: int) -> None:
    all_cases: list[Case] = []
    for seed in range(20 * block, 20 * block + 20):
        make, model = keeping if seed % 2 else with_scratchpad, random_chain(Net(500 + seed))
        if shape_of(model.graph.node(-1).outputs[0])[1] > 1:  # else there are no two stripes
            all_cases += cascades(f"seed {seed}", model, make)
    check(all_cases)
    assert len(all_cases) > 40


def test_weights_that_do_not_fit_are_streamed_for_every_stripe(check: Check) -> None:
    net = Net(4)
    x = net.conv(net.input(1, 12, 5, 16), 64)
    x = net.conv(x, 80)
    net.conv(x, 64, (1, 1), (1, 1), (0, 0, 0, 0))
    model = net.done()
    all_cases = cascades("streamed", model, keeping, (1, 1.1, 1.3, 2, 8))
    check(all_cases)
    stages = [stage for case in all_cases for stage in case.program.cascades[0].plan.stages]
    assert {stage.keep for stage in stages} == {"kept", "streamed"}
    assert {stage.tiles % 2 for stage in stages if stage.tiles > 1} == {0, 1}
    constants = [sum(len(stream.data) for work in case.program.cascades[0].works for stream in work.work.streams)
                 for case in all_cases]  # fmt: skip
    read = [sum(c["row_bytes"] for c in commands(case.program) if c.opcode is isa.DMA and c["src_base"] == 2)
            for case in all_cases]  # fmt: skip
    assert read[-1] == constants[-1], "in a roomy scratchpad all are fetched once"
    assert read[0] > 2 * constants[0]


def commands(program: npu.NpuProgram) -> list[isa.Command]:
    return list(isa.decode(npu.words(program).tolist()))


def test_rows_come_and_go_while_something_computes() -> None:
    net = Net(5)
    net.conv(net.conv(net.input(1, 40, 12, 8), 16), 8)
    program = as_cascade(net.done(), with_scratchpad(3000))
    assert program is not None and program.cascades[0].plan.stripes > 4
    between: list[list[str]] = [[]]
    for command in commands(program):
        between[-1].append(command.opcode.name)
        if command.opcode is isa.BARRIER:
            between.append([])
    busy = [names for names in between if "conv" in names]
    assert len(busy) == 2 * program.cascades[0].plan.stripes
    alone = [names for names in between if "dma" in names and "conv" not in names]
    assert len(alone) == 2, "the first rows and constants, and the last rows"


def test_what_a_cascade_moves_is_its_inputs_constants_and_outputs() -> None:
    net = Net(6)
    net.conv(net.conv(net.conv(net.input(1, 40, 12, 8), 24), 24), 8)
    program = as_cascade(net.done(), with_scratchpad(11000))
    assert program is not None
    moved = sum(c["planes"] * c["rows"] * c["row_bytes"] for c in commands(program) if c.opcode is isa.DMA)
    kept = [
        len(stream.data)
        for stage, work in zip(program.cascades[0].plan.stages, program.cascades[0].works, strict=True)
        for stream in work.work.streams
        if stage.keep == "kept"
    ]
    assert moved == 40 * 12 * 8 + sum(kept) + 40 * 12 * 8
    assert program.workspace_bytes == 0 and program.scratchpad.peak < 40 * 12 * 24


def test_the_next_units_constants_are_fetched_during_the_last_turn() -> None:
    net = Net(7)
    x = net.conv(net.conv(net.input(1, 16, 12, 8), 16), 8)
    net.conv(net.conv(x, 8), 40)
    region = whole(net.done())
    program = npu.compile_region(region, keeping(1 << 16), [Unit(0, 1), Unit(2, 2), Unit(3, 3)])
    assert program.steps[1].prefetch == 2 and program.steps[2].prefetched
    program = npu.compile_region(region, keeping(1 << 16), [Unit(0, 0), Unit(1, 2), Unit(3, 3)])
    assert program.steps[0].prefetch == 1 and program.steps[1].prefetched
    assert program.steps[2].prefetch == 3 and program.steps[3].prefetched


def test_units_that_cannot_be_are_refused() -> None:
    net = Net(8)
    net.conv(net.conv(net.input(1, 40, 12, 8), 24), 24)
    with pytest.raises(NoRoomError):
        npu.compile_region(whole(net.done()), with_scratchpad(1000), [Unit(0, 1)])


# --- choice -----------------------------------------------------------------------------------------------------------


def mobile_block(net: Net, depth: int = 16) -> ir.Model:
    x = net.conv(net.input(1, 40, 40, 8, dtype=INT8), depth, (3, 3), (2, 2))
    for _ in range(2):
        y = net.conv(x, 6 * depth, (1, 1), (1, 1), (0, 0, 0, 0))
        y = net.conv(net.conv(y, 6 * depth, group=6 * depth), depth, (1, 1), (1, 1), (0, 0, 0, 0))
        x = net.sum(x, y)
    net.conv(x, 32, (3, 3), (2, 2))
    return net.done()


def priced(model: ir.Model, target: Target) -> tuple[npu.NpuProgram, RegionCost]:
    program = npu.compile_region(whole(model), target)
    assert target.npu is not None
    blob = program.bases.blob
    return program, price(npu.words(program), target, {blob: target.npu.weight_memory}, {blob: program.encoded})


def external_bytes(cost: RegionCost) -> int:
    return sum(moved.read + moved.written for moved in cost.traffic if moved.memory == "dram")


@pytest.mark.parametrize("size", [8, 16, 24, 32, 48, 64, 128])
def test_cascades_save_traffic_and_never_cost_time(size: int) -> None:
    model = mobile_block(Net(9))
    program, cost = priced(model, with_scratchpad(size * 1024))
    _, plain = priced(model, with_scratchpad(size * 1024, rolling=False))
    assert cost.cycles <= plain.cycles
    if program.cascades:
        assert external_bytes(cost) < 0.7 * external_bytes(plain)
    assert bool(program.cascades) == (size != 128)


@pytest.mark.parametrize("seed", range(6))
def test_never_worse_than_without(seed: int) -> None:
    model = random_chain(Net(700 + seed))
    for size in (1 << 11, 3 << 10, 1 << 12, 3 << 11, 1 << 13):
        targets = [with_scratchpad(size, rolling=rolling) for rolling in (True, False)]
        if any(npu.can_run(node, targets[0]) for node in model.graph):
            continue
        (_, with_them), (_, without) = (priced(model, target) for target in targets)
        assert with_them.cycles <= without.cycles and with_them.energy.total <= without.energy.total


def test_no_cascades_where_everything_fits_or_buffers_do_not_roll() -> None:
    model = mobile_block(Net(9))
    assert npu.compile_region(whole(model), with_scratchpad(1 << 20)).cascades == ()
    assert npu.compile_region(whole(model), with_scratchpad(32 << 10, rolling=False)).cascades == ()
    assert npu.compile_region(whole(model), with_scratchpad(32 << 10)).cascades != ()


def test_an_accelerator_that_keeps_no_maps_has_no_cascades() -> None:
    target = load_target("nvdla-small")
    assert target.npu is not None and not target.npu.keeps_feature_maps and not target.npu.rolling_buffers


def test_chosen_cascades_equal_the_reference(check: Check) -> None:
    all_cases: list[Case] = []
    for size in (12, 16, 24, 32):
        model, target = mobile_block(Net(9)), with_scratchpad(size * 1024)
        all_cases.append(Case(f"{size} KiB", model, npu.compile_region(whole(model), target), target))
    check(all_cases)
    assert all(case.program.cascades for case in all_cases)


def test_two_compilations_are_equal() -> None:
    programs = [npu.compile_region(whole(mobile_block(Net(9))), with_scratchpad(24 << 10)) for _ in range(2)]
    assert programs[0].cascades and np.array_equal(npu.words(programs[0]), npu.words(programs[1]))
    texts = [npu.driver(program, "main").script() for program in programs]
    assert texts[0] == texts[1]


def test_stripes_are_a_loop_in_the_driver() -> None:
    """The driver's size does not grow with the number of stripes."""
    lengths = []
    for height in (40, 80, 160):
        net = Net(5)
        net.conv(net.conv(net.input(1, height, 12, 8), 16), 8)
        program = as_cascade(net.done(), with_scratchpad(3000))
        assert program is not None
        lengths.append((program.cascades[0].plan.stripes, len(npu.driver(program, "main").script())))
    assert all(after[0] > 1.9 * before[0] and after[1] < 1.1 * before[1] for before, after in pairwise(lengths))
