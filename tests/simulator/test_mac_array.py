"""Blocks and cycles of the MAC array beside those Arm's compiler chose and estimated, operator by operator."""

import csv
from collections.abc import Mapping
from pathlib import Path

import pytest

from qcompiler.simulator.mac_array import find_block, mac_array
from qcompiler.simulator.workload import Dims, Feed, OpClass, Port, Shape
from qcompiler.target import MacArray, Target
from qcompiler.target_loader import load_target

GOLDEN: Mapping[int, str] = {8: "vela_operators.csv", 16: "vela_operators_int16.csv"}
"""By bits of activations: distinct operators of networks in ethos-u-vela 5.2.0, made by benchmarks/simulator.py."""
ROWS = {bits: tuple(csv.DictReader((Path(__file__).parent / name).open())) for bits, name in GOLDEN.items()}
each_width = pytest.mark.parametrize("bits", GOLDEN)
TARGETS = ("ethos-u55-32", "ethos-u55-64", "ethos-u55-128", "ethos-u55-256", "ethos-u65-256", "ethos-u65-512")
CLASSES: Mapping[str, OpClass] = {
    "conv": "conv", "depthwise": "depthwise", "max_pool": "max_pool", "average_pool": "average_pool", "add": "add",
    "mul": "mul", "requantize": "requantize", "lookup": "lookup",
}  # fmt: skip


def array_of(target: Target) -> MacArray:
    assert target.npu is not None
    geometry = target.npu.engines["mac"].geometry
    assert isinstance(geometry, MacArray)
    return geometry


def dims(row: Mapping[str, str], name: str) -> Dims:
    return int(row[f"{name}_h"]), int(row[f"{name}_w"]), int(row[f"{name}_c"])


def pair(row: Mapping[str, str], name: str) -> tuple[int, int]:
    return int(row[f"{name}_h"]), int(row[f"{name}_w"])


def shape_of(row: Mapping[str, str], bits: int) -> Shape:
    return Shape(
        CLASSES[row["op"]], dims(row, "ofm"), dims(row, "ifm"), pair(row, "kernel"), pair(row, "stride"),
        pair(row, "dilation"), int(row["groups"]), bits, int(row["ofm_bits"]), 8, 1,
        dims(row, "second") if row["second_h"] else None,
    )  # fmt: skip


def rows_of(target: str, bits: int) -> list[dict[str, str]]:
    rows = [row for row in ROWS[bits] if row["accelerator"] == target]
    assert len(rows) > 50
    return rows


@each_width
@pytest.mark.parametrize("name", TARGETS)
def test_blocks_are_those_vela_chooses(name: str, bits: int) -> None:
    array, rows = array_of(load_target(name)), rows_of(name, bits)
    wrong = [row for row in rows if find_block(shape_of(row, bits), array).ofm != dims(row, "block")]
    assert len(wrong) <= 0.05 * len(rows), wrong


@each_width
@pytest.mark.parametrize("name", TARGETS)
def test_cycles_are_near_velas(name: str, bits: int) -> None:
    target = load_target(name)
    assert target.npu is not None
    inside = Port.of(target.npu.scratchpad, target.npu.clock)
    outside = Port.of(target.npu.memories[target.npu.weight_memory], target.npu.clock)
    near = 0
    rows = rows_of(name, bits)
    for row in rows:
        feed = Feed(inside, inside, inside if row["scales_staged"] == "1" else outside)
        near += abs(mac_array(shape_of(row, bits), array_of(target), feed).cycles / int(row["npu_cycles"]) - 1) <= 0.10
    # Vela's figures include waits for weights that the engine itself does not know of.
    assert near >= 0.85 * len(rows)


def test_blocks_are_whole_micro_blocks_within_the_limits() -> None:
    for name in TARGETS:
        array = array_of(load_target(name))
        for size in ((1, 1, 1), (3, 5, 7), (17, 33, 65), (200, 300, 500)):
            block = find_block(Shape("conv", size, size, (3, 3), (1, 1), (1, 1), 1, 8, 8, 8, 1), array).ofm
            for extent, step, limit, whole in zip(block, array.ublock, array.block_max, size, strict=True):
                assert extent % step == 0 and extent <= limit and extent < whole + step


# Operators of the zoo's networks on the Ethos-U85 in ethos-u-vela 5.2.0 (perf_debug_main and perf of its debug
# database): accelerator, bits, OFM, IFM, kernel, micro-block, and cycles, waiting for scale records included.
ETHOS_U85: tuple[tuple[str, int, Dims, Dims, tuple[int, int], float, Dims, int], ...] = (
    ("ethos-u85-256", 8, (28, 28, 8), (28, 28, 1), (5, 5), 2, (1, 4, 8), 3818),
    ("ethos-u85-256", 8, (14, 14, 16), (14, 14, 8), (5, 5), 1, (2, 2, 8), 3413),
    ("ethos-u85-256", 8, (44, 44, 24), (44, 44, 24), (1, 1), 1, (1, 4, 8), 25781),
    ("ethos-u85-2048", 8, (8, 8, 64), (8, 8, 64), (3, 3), 1, (2, 2, 64), 2930),
    ("ethos-u85-2048", 8, (16, 16, 32), (16, 16, 32), (3, 3), 1, (4, 4, 16), 2240),
    ("ethos-u85-256", 16, (28, 28, 8), (28, 28, 1), (5, 5), 2, (1, 4, 8), 6043),
    ("ethos-u85-256", 16, (14, 14, 16), (14, 14, 8), (5, 5), 1, (2, 2, 8), 5778),
    ("ethos-u85-256", 16, (1, 1, 10), (1, 1, 256), (1, 1), 1, (1, 2, 16), 1415),
    ("ethos-u85-128", 16, (8, 8, 64), (8, 8, 64), (3, 3), 1, (1, 2, 8), 42420),
)


@pytest.mark.parametrize(("name", "bits", "ofm", "ifm", "kernel", "speedup", "micro_block", "vela"), ETHOS_U85)
def test_arrays_of_several_micro_blocks(
    name: str, bits: int, ofm: Dims, ifm: Dims, kernel: tuple[int, int], speedup: float, micro_block: Dims, vela: int
) -> None:
    array, inside = array_of(load_target(name)), Port(32, 32, 64)
    shape = Shape("conv", ofm, ifm, kernel, (1, 1), (1, 1), 1, bits, bits, 8, 1, None, speedup)
    block = find_block(shape, array).ofm
    assert [size % step for size, step in zip(block, micro_block, strict=True)] == [0, 0, 0]
    scales = Port(12, 500, 128) if name == "ethos-u85-2048" and ofm == (8, 8, 64) else inside  # not staged by Vela
    assert mac_array(shape, array, Feed(inside, inside, scales)).cycles == pytest.approx(vela, rel=0.20)


def test_accumulators_of_their_own_bound_the_block() -> None:
    array = array_of(load_target("ethos-u85-256"))
    shape = Shape("conv", (64, 64, 16), (64, 64, 16), (1, 1), (1, 1), (1, 1), 1, 8, 8, 8, 1, None)
    height, width, depth = find_block(shape, array).ofm
    assert 2 * 4 * height * width * depth <= array.own_accumulator_banks * array.bank_size
    shared = array.model_copy(update={"own_accumulator_banks": 0})
    height, width, depth = find_block(shape, shared).ofm
    assert 2 * 4 * height * width * depth > array.own_accumulator_banks * array.bank_size
