"""Several accelerators in one library: what they compute, what they log, and what is reported of each."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends import accelerators, npu, relax
from qcompiler.backends.base import AcceleratorFunction
from qcompiler.compile import build, explain, place
from qcompiler.costs import cost
from qcompiler.graph import dtype_of
from qcompiler.integer.reference import Executor
from qcompiler.options import Options
from qcompiler.partition import Partition, Region, partition
from qcompiler.report import as_text
from qcompiler.runtime import Executable, Simulator
from qcompiler.simulator.cost import price
from qcompiler.target import Target

CHEAP_DSP = ("dsp.crossing.sync=200 ns",)
TIGHT = (
    "npu.crossing.sync=10 ns",
    "dsp.crossing.sync=10 ns",
    "dsp.engines.vpu.precisions.int8*int8.rate=4 MAC/cycle",
)
"""Hand-overs for nothing, and a DSP that had better leave convolutions to the array."""
SLOW_DSP = (
    "dsp.crossing.sync=1 us",
    "npu.crossing.sync=500 ns",
    "dsp.engines.vpu.precisions.int8*int8.rate=64 MAC/cycle",
)


def network(path: Path, seed: int) -> Path:
    """Convolutions for the array, a depthwise one, a sum and a softmax for the DSP, and one left in float."""
    rng = np.random.default_rng(seed)
    depth, height, width = (int(rng.integers(5, 30)) for _ in range(3))
    shapes = {"w0": (depth, 3, 3, 3), "w1": (depth, 1, 3, 3), "w2": (depth, depth, 1, 1), "w3": (depth, depth, 3, 1)}
    constants = [
        numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["wide"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["wide", "w1"], ["deep"], group=depth, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["deep", "w2"], ["mixed"]),
        helper.make_node("Add", ["mixed", "wide"], ["sum"]),
        helper.make_node("Conv", ["sum", "w2"], ["floating"]),
        helper.make_node("Conv", ["floating", "w3"], ["tall"], pads=[1, 0, 1, 0]),
        helper.make_node("GlobalAveragePool", ["tall"], ["pooled"]),
        helper.make_node("Softmax", ["pooled"], ["y"], axis=1),
    ]
    for node in nodes:
        node.name = node.output[0]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, height, width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, depth, 1, 1])
    graph = helper.make_graph(nodes, "random", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def check(model: ir.Model, parts: Partition, target: Target, library: Path, feeds: dict[str, np.ndarray]) -> None:
    """The library computes what the reference does, and each region logs the words its own accelerator is priced by."""
    programs = {
        region.name: npu.compile_region(region, target.alone(region.backend))
        for region in parts.regions
        if region.backend != "cpu"
    }
    numbers = {region.name: number for number, region in enumerate(parts.regions)}

    def driver(region: Region) -> AcceleratorFunction:
        return npu.region_function(programs[region.name], numbers[region.name])

    lowered = relax.lower(model, parts, target, driver)
    relax.build(lowered, target.host, library)
    simulator = Simulator(library)
    simulator.reset()
    results = Executable(library, lowered.parameters).run([feeds[spec.name] for spec in lowered.inputs])
    for name, wanted in Executor(model).run(feeds).items():
        got = next(out for spec, out in zip(lowered.outputs, results, strict=True) if spec.name == name)
        np.testing.assert_array_equal(got, wanted)
        assert len(np.unique(got)) > 1
    log = simulator.log()
    starts = [*(first for _, first in log.regions), len(log.words)]
    names = {node.name or "": node.name or "" for node in model.graph}
    priced = cost(parts, programs, target, 0, names)
    driven = [region for region in parts.regions if region.backend != "cpu"]
    assert [number for number, _ in log.regions] == [numbers[region.name] for region in driven]
    for region, start, end in zip(driven, starts, starts[1:], strict=False):
        assert region.backend != "cpu"
        program, own = programs[region.name], target.alone(region.backend)
        np.testing.assert_array_equal(log.words[start:end], npu.words(program))
        assert own.npu is not None and program.scratchpad_bytes == own.npu.scratchpad.size
        logged = price(log.words[start:end], own, {program.bases.blob: own.npu.weight_memory})
        assert logged == priced.regions[region.name] and logged.clock == own.npu.clock
    for unit in priced.totals.accelerators:
        own_regions = [region for region in driven if region.backend == unit.name]
        assert unit.cycles == pytest.approx(sum(priced.regions[region.name].cycles for region in own_regions))
        assert (unit.operators, unit.regions) == (sum(len(r.nodes) for r in own_regions), len(own_regions))


def expose_integers(model: ir.Model) -> None:
    """Compare integers: the floats after a softmax depend on the mathematics library in their last bits."""
    for node in model.graph:
        for value in node.outputs:
            if dtype_of(value).kind in "iu" and not value.is_graph_output() and node is not model.graph[-1]:
                model.graph.outputs.append(value)
    for value in list(model.graph.outputs):
        if dtype_of(value).kind not in "iu":
            model.graph.outputs.remove(value)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_three_engines_agree_with_the_reference(tmp_path: Path, seed: int) -> None:
    """Everything on the first engine that can run it, whatever that costs."""
    done = place(network(tmp_path / "model.onnx", seed), "npu-dsp", Options(keep_float=("floating",)))
    expose_integers(done.integer)
    can_run = partial(accelerators.can_run, target=done.target)
    parts = partition(done.integer, done.target, can_run=can_run, keep_islands=True)
    where = {item.node.partition("_q")[0].partition(".")[0]: item.backend for item in parts.placements}
    assert {"npu", "dsp", "cpu"} == set(where.values()), where
    shape = tuple(int(size) for size in done.integer.graph.inputs[0].shape or ())  # pyright: ignore[reportArgumentType]
    feeds = {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)}
    check(done.integer, parts, done.target, tmp_path / "model.so", feeds)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("resnet8_cifar10", CHEAP_DSP),
        ("mnist_cnn", SLOW_DSP),
        pytest.param("squeezenet11", (), marks=pytest.mark.slow),
        pytest.param("mobilenet_v1_025_128", SLOW_DSP, marks=pytest.mark.slow),
    ],
)
def test_the_cost_model_spreads_a_network(zoo: Path, tmp_path: Path, name: str, overrides: tuple[str, ...]) -> None:
    done = place(zoo / "models" / f"{name}.onnx", "npu-dsp", Options(overrides=overrides))
    assert {item.backend for item in done.partition.placements} == {"npu", "dsp", "cpu"}
    expose_integers(done.integer)
    shape = tuple(int(size) for size in done.integer.graph.inputs[0].shape or ())  # pyright: ignore[reportArgumentType]
    name = done.integer.graph.inputs[0].name or ""
    feeds = {name: np.random.default_rng(7).standard_normal(shape).astype(np.float32)}
    parts = partition(done.integer, done.target, can_run=partial(accelerators.can_run, target=done.target))
    check(done.integer, parts, done.target, tmp_path / "model.so", feeds)


def test_the_report_shows_what_others_would_take(tmp_path: Path) -> None:
    model = network(tmp_path / "model.onnx", 5)
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    report = explain(
        model,
        "npu-dsp",
        Options(overrides=TIGHT),
        html=page,
        trace=trace,
    )
    by_op = {item.op: item for item in report.placements if item.layer == item.op or item.backend != "cpu"}
    softmax = by_op["Softmax"]
    assert softmax.backend == "dsp" and {item.backend for item in softmax.alternatives} == {"npu", "cpu"}
    refused = next(item for item in softmax.alternatives if item.backend == "npu")
    assert refused.seconds is None and (refused.refusal or "").endswith("has no rule for Softmax")
    assert all(item.seconds is not None and item.seconds > 0 for item in softmax.alternatives if item.backend == "cpu")
    text = as_text(report)
    assert "on the NPU" in text and "on the DSP" in text and "Regions, by the estimates" in text
    assert all(region.seconds <= min(region.elsewhere.values(), default=np.inf) * 1.0001 for region in report.regions)
    events = json.loads(trace.read_text())["traceEvents"]
    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert len(processes) == 3 and "host" in processes
    assert "DSP vpu" in page.read_text() and "NPU mxu" in page.read_text()


def test_a_gpu_beside_other_accelerators(tmp_path: Path) -> None:
    """Which one is fastest depends on what a launch costs; rows, totals and pictures follow."""
    spec = tmp_path / "all.yaml"
    spec.write_text(
        "extends: npu-dsp\ndescription: all of them\nquantization: {requantize: float32}\ngpu: {extends: opencl-gpu}\n"
    )
    model, page, trace = network(tmp_path / "model.onnx", 6), tmp_path / "page.html", tmp_path / "trace.json"
    slow = explain(model, str(spec), Options(overrides=("gpu.launch=1 s",)))
    assert all(item.backend != "gpu" for item in slow.placements)
    free = ("gpu.launch=0 us", "gpu.crossing.sync=0 us", "npu.crossing.sync=1 s", "dsp.crossing.sync=1 s")
    fast = explain(model, str(spec), Options(overrides=free), html=page, trace=trace)
    own = [row for row in fast.layers if row.backend == "gpu"]
    (total,) = (unit for unit in fast.totals.accelerators if unit.name == "gpu")
    assert total.operators == sum(item.backend == "gpu" for item in fast.placements) > 5
    assert total.seconds == pytest.approx(sum(row.seconds for row in own)) and total.macs == fast.totals.npu_macs > 0
    assert fast.totals.latency < slow.totals.latency
    for row in own:
        assert row.traffic.keys() == {"gpu memory"} and row.energy >= 0
        assert row.utilisation is None or 0 < row.utilisation <= 1
    assert "GPU" in page.read_text()
    threads = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "thread_name"]
    assert {"CPU", "GPU"} <= {event["args"]["name"] for event in threads}


def test_a_bundle_of_three_engines_runs(tmp_path: Path) -> None:
    model = network(tmp_path / "model.onnx", 9)
    options = Options(overrides=TIGHT, keep_float=("floating",))
    bundle = build(model, "npu-dsp", options, output=tmp_path / "model.qc")
    assert {item.backend for item in bundle.report.placements} == {"npu", "dsp", "cpu"}
    (tensor,) = bundle.inputs
    outputs = bundle.run({tensor.name: np.random.default_rng(3).standard_normal(tensor.shape).astype(np.float32)})
    assert outputs["y"].sum() == pytest.approx(1, abs=0.1)
