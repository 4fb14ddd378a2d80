"""Systolic arrays beside SCALE-Sim 3's compute cycles, for every distinct layer of three networks."""

import csv
from pathlib import Path

import pytest

from qcompiler.simulator.engines import systolic
from qcompiler.simulator.workload import Shape
from qcompiler.target import Systolic

ROWS = tuple(csv.DictReader((Path(__file__).parent / "scalesim_cycles.csv").open()))
"""Made by benchmarks/scalesim_cycles.py."""


def test_the_reference_covers_the_networks_and_arrays() -> None:
    assert {row["network"] for row in ROWS} == {"ResNet-18", "ResNet-50", "MobileNetV1"}
    assert {(row["array"], row["dataflow"]) for row in ROWS} == {
        (size, flow) for size in ("16", "32") for flow in ("weight_stationary", "output_stationary")
    }


@pytest.mark.parametrize("network", ["ResNet-18", "ResNet-50", "MobileNetV1"])
def test_cycles_are_scale_sims(network: str) -> None:
    for row in (row for row in ROWS if row["network"] == network):
        m, k, n, groups, size = (int(row[name]) for name in ("m", "k", "n", "groups", "array"))
        array = Systolic.model_validate({"kind": "systolic", "rows": size, "cols": size, "dataflow": row["dataflow"]})
        op = "depthwise" if groups > 1 else "conv"
        window = (1, 9) if groups > 1 else (1, 1)
        depth = groups if groups > 1 else k
        shape = Shape(op, (1, m, n * groups), (1, m, depth), window, (1, 1), (1, 1), groups, 8, 8, 8, 1)
        assert systolic(shape, array, size * size).cycles == groups * int(row["cycles"]), row
