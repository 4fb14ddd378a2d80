"""Whole networks priced on the bundled chips that are described but not compared elsewhere."""

from pathlib import Path

import pytest

from qcompiler.compile import Placed, place, schedule
from qcompiler.costs import region_cost
from qcompiler.graph import element_count, shape_of
from qcompiler.options import Options
from qcompiler.simulator.cost import RegionCost

CHIPS = ("edge-tpu", "gemmini", "vector-dsp", "vta", "nvdla-large", "nvdla-small")


def largest_region(zoo: Path, chip: str) -> tuple[Placed, str, RegionCost]:
    """ResNet-8 on a chip: the accelerator's largest region and its cost."""
    model = zoo / "models" / "resnet8_cifar10.onnx"
    placed = place(model, chip, Options(method="minmax", samples=1))
    programs = schedule(placed)
    regions = [region for region in placed.partition.regions if region.backend == "npu"]
    region = max(regions, key=lambda one: len(one.nodes))
    return placed, region.name, region_cost(programs[region.name], placed.target)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_network_runs_on_the_accelerator_no_faster_than_its_peak(zoo: Path, chip: str) -> None:
    placed, _, cost = largest_region(zoo, chip)
    npu = placed.target.npu
    assert npu is not None
    peak = max(cost.rate for engine in npu.engines.values() for cost in engine.precisions.values())
    assert cost.macs > 12e6  # all convolutions
    assert cost.cycles >= cost.macs / peak
    read = sum(moved.read for moved in cost.traffic if moved.memory == "dram")
    assert read >= 77_000  # every weight


def test_without_kept_feature_maps_every_one_goes_through_external_memory(zoo: Path) -> None:
    placed, name, cost = largest_region(zoo, "nvdla-large")
    region = next(region for region in placed.partition.regions if region.name == name)
    written = sum(moved.written for moved in cost.traffic if moved.memory == "dram")
    computed = [node for node in region.nodes if node.op_type in ("QConv", "QAdd")]
    assert written >= sum(element_count(shape_of(node.outputs[0])) for node in computed)


def test_larger_nvdla_are_faster(zoo: Path) -> None:
    names = ("nvdla-32", "nvdla-small", "nvdla-128", "nvdla-256", "nvdla-512", "nvdla-1024", "nvdla-large")
    seconds = [largest_region(zoo, name)[2].seconds for name in names]
    assert seconds == sorted(seconds, reverse=True)
