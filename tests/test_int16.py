"""16-bit activations all the way: reference and CPU agree, onnxruntime reads the model alike, noise falls."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler import bundle as bundle_files
from qcompiler import cli
from qcompiler.backends import accelerators, npu, relax
from qcompiler.backends.base import AcceleratorFunction
from qcompiler.compile import place
from qcompiler.errors import QCompilerError
from qcompiler.exact_session import exact_session
from qcompiler.integer.reference import execute
from qcompiler.options import Options
from qcompiler.partition import Region, partition
from qcompiler.quant.types import WeightRequest
from qcompiler.runtime import Executable
from qcompiler.target import Target

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS, CALIBRATION = EXAMPLES / "digits.onnx", EXAMPLES / "digits_calibration.npz"
SIXTEEN = WeightRequest(activations="int16")
FOUR_SIXTEEN = WeightRequest("int4", {}, "int16")
SLOW_HOST = ("host.element_rate=0.0001 element/cycle",)


def network(path: Path, seed: int) -> Path:
    """What 16 bits have integers for, with a Sigmoid in the middle and a Softmax at the end."""
    rng = np.random.default_rng(seed)
    depth = int(rng.integers(5, 20))
    shapes = {"w0": (depth, 3, 3, 3), "b0": (depth,), "w1": (depth, 1, 3, 3), "w2": (depth, depth, 1, 1),
              "w3": (7, 2 * depth, 2, 2), "w4": (4, 7)}  # fmt: skip
    constants = [
        numpy_helper.from_array((rng.standard_normal(s) / np.sqrt(np.prod(s[1:]))).astype(np.float32), name)
        for name, s in shapes.items()
    ]
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
        node("Relu", ["c0"], ["r0"]),
        node("Conv", ["r0", "w1"], ["c1"], group=depth, pads=[1, 1, 1, 1]),
        node("Sigmoid", ["c1"], ["s1"]),
        node("Conv", ["s1", "w2"], ["c2"]),
        node("Add", ["c2", "r0"], ["a"]),
        node("Concat", ["a", "r0"], ["j"], axis=1),
        node("MaxPool", ["j"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["m", "w3"], ["c3"]),
        node("GlobalAveragePool", ["c3"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w4"], ["logits"], transB=1),
        node("Softmax", ["logits"], ["y"]),
    ]
    for item in nodes:
        item.name = item.output[0]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 11, 14])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("logits", "y")]
    graph = helper.make_graph(nodes, "random", [x], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("wanted", [SIXTEEN, FOUR_SIXTEEN], ids=["w8", "w4"])
def test_reference_cpu_and_onnxruntime(tmp_path: Path, wanted: WeightRequest) -> None:
    model = network(tmp_path / "model.onnx", 3)
    done = place(model, "x86-cpu", Options(formats=wanted))
    by_node = {item.node: (item.op, item.precision) for item in done.partition.placements}
    products = [precision for op, precision in by_node.values() if op in ("Conv", "Gemm")]
    assert len(products) == 5 and products[0] == products[-1] == "int16*int8"
    assert set(products[1:-1]) == {"int16*int8" if wanted is SIXTEEN else "int16*int4"}
    for op, precision in by_node.values():
        assert precision.startswith("int16") == (op not in ("QuantizeLinear", "DequantizeLinear", "Softmax")), op
    assert "Lookup" in {op for op, _ in by_node.values()}

    lowered = relax.lower(done.integer, done.partition, done.target)
    relax.build(lowered, done.target.host, tmp_path / "model.so")
    executable = Executable(tmp_path / "model.so", lowered.parameters)
    session = exact_session(ir.to_proto(done.quantized).SerializeToString())
    exact = exact_session(model)
    rng = np.random.default_rng(6)
    for _ in range(3):
        feeds = {"x": rng.standard_normal((1, 3, 11, 14)).astype(np.float32)}
        logits, probabilities = executable.run([feeds["x"]])
        wanted_arrays = execute(done.integer, feeds)
        np.testing.assert_array_equal(logits, wanted_arrays["logits"])
        np.testing.assert_allclose(probabilities, wanted_arrays["y"], atol=1e-6)
        theirs = np.asarray(session.run(["logits"], feeds)[0])
        reference = np.asarray(exact.run(["logits"], feeds)[0])
        spread = np.abs(reference).max()
        # Both round to 16 bits at the same places; ties fall differently.
        assert np.abs(theirs - logits).max() < 2e-3 * spread
        assert np.abs(reference - logits).max() < (0.05 if wanted is SIXTEEN else 0.3) * spread


@pytest.mark.parametrize("target", ["arm-npu", "ethos-u85-256", "systolic-npu"])
def test_tables_and_softmax_on_accelerators(tmp_path: Path, target: str) -> None:
    """Reference, CPU and simulator agree on all of it (tests/test_zoo.py has whole networks)."""
    done = place(network(tmp_path / "model.onnx", 8), target, Options(formats=SIXTEEN, overrides=SLOW_HOST))
    made = {(item.op, item.precision, item.backend) for item in done.partition.placements}
    assert {("Lookup", "int16", "npu"), ("Softmax", "int16", "npu")} <= made
    feeds = {"x": np.random.default_rng(9).standard_normal((1, 3, 11, 14)).astype(np.float32)}
    wanted = execute(done.integer, feeds)
    assert all(len(np.unique(array)) > 1 for array in wanted.values())
    for index, chip in enumerate((done.target, done.target.model_copy(update={"npu": None}))):
        parts = partition(done.integer, chip, can_run=partial(accelerators.can_run, target=chip), keep_islands=True)

        def driver(region: Region, chip: Target = chip) -> AcceleratorFunction:
            return npu.region_function(npu.compile_region(region, chip), int(region.name.rpartition("_")[2]))

        lowered = relax.lower(done.integer, parts, chip, driver)
        relax.build(lowered, chip.host, tmp_path / f"{index}.so")
        got = Executable(tmp_path / f"{index}.so", lowered.parameters).run([feeds["x"]])
        for name, array in zip(("logits", "y"), got, strict=True):
            np.testing.assert_array_equal(array, wanted[name])


def steep(path: Path, function: str, gain: float) -> Path:
    """A function of numbers so large that straight lines miss it."""
    node = helper.make_node
    weights = gain * np.eye(4, dtype=np.float32)[:, :, None, None]
    nodes = [node("Conv", ["x", "w"], ["c"], name="c"), node(function, ["c"], ["f"], name="f"),
             node("Conv", ["f", "v"], ["y"], name="y")]  # fmt: skip
    constants = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(weights / np.float32(gain), "v")]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 6, 6]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "steep", infos[:1], infos[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(("function", "gain", "kept"), [("Tanh", 1, True), ("Tanh", 100, False), ("Sigmoid", 3, True)])
def test_functions_that_straight_lines_miss_stay_float(tmp_path: Path, function: str, gain: float, kept: bool) -> None:
    done = place(steep(tmp_path / "m.onnx", function, gain), "x86-cpu", Options(formats=SIXTEEN))
    ops = {item.op: item.precision for item in done.partition.placements}
    assert ops["Lookup"] == ("int16" if kept else "float32")


def test_noise_of_activations_is_gone(tmp_path: Path) -> None:
    """With weights on an 8-bit grid only activations round: 16 bits leave next to nothing."""
    rng = np.random.default_rng(1)
    grid = (rng.integers(-127, 128, (8, 3, 3, 3)) / 256).astype(np.float32)
    grid[:, 0, 0, 0] = 127 / 256
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="y", pads=[1, 1, 1, 1])
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 9, 9]) for n, c in (("x", 3), ("y", 8))]
    graph = helper.make_graph([node], "grid", infos[:1], infos[1:], [numpy_helper.from_array(grid, "w")])
    model = tmp_path / "grid.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), model)
    samples = {"x": rng.uniform(-1, 1, (16, 3, 9, 9)).astype(np.float32)}
    signal = []
    for activations in ("int8", "int16"):
        # No larger values are to come, so that a range needs no room for them.
        bundle = qcompiler.compile(model, "x86-cpu", calibration=samples, activations=activations, method="minmax")
        check = bundle.report.self_check
        assert check is not None and check.outputs[0].sqnr is not None
        signal.append(check.outputs[0].sqnr)
    assert signal[0] < 50 and signal[1] > 85


@pytest.mark.parametrize("target", ["x86-cpu", "arm-npu", "systolic-npu"])
def test_a_bundle(tmp_path: Path, target: str) -> None:
    bundle = qcompiler.compile(
        DIGITS, target, calibration=CALIBRATION, samples=16, activations="int16", output=tmp_path / "b.qc"
    )
    placements = bundle.report.placements
    assert {item.backend for item in placements if item.precision.startswith("int16")} == {
        "cpu" if target == "x86-cpu" else "npu"
    }
    with np.load(EXAMPLES / "digits_test.npz") as data:
        images = data["image"][:60]
    session = ort.InferenceSession(DIGITS, providers=["CPUExecutionProvider"])
    exact = np.stack([np.asarray(session.run(None, {"image": image[None]})[0])[0] for image in images])
    assert np.mean(exact.argmax(axis=1) == bundle.run({"image": images})["logits"].argmax(axis=1)) >= 0.98
    quantized = onnx.load(tmp_path / "b.qc" / bundle_files.QDQ_MODEL)
    types = {tensor.data_type for tensor in quantized.graph.initializer if tensor.name.endswith("zero_point")}
    assert TensorProto.INT16 in types and TensorProto.UINT8 not in types


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(QCompilerError, match="gemmini has no int16 activations: its spec lists int8"):
        place(DIGITS, "gemmini", Options(formats=SIXTEEN))
    with pytest.raises(SystemExit) as leaving:
        cli.main(["explain", str(DIGITS), "-t", "x86-cpu", "--activations", "int16", "--json"])
    assert not leaving.value.code
    rows = json.loads(capsys.readouterr().out)["placements"]
    assert "int16*int8" in {row["precision"] for row in rows}
