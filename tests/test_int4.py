"""4-bit weights all the way: reference, CPU and simulator agree, bundles shrink, the command knows them."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_networks import random_weights, save_network

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

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS, CALIBRATION = EXAMPLES / "digits.onnx", EXAMPLES / "digits_calibration.npz"
TARGETS = ("x86-cpu", "x86-plain", "systolic-npu")


def random_network(path: Path, seed: int) -> Path:
    """Convolutions of odd sizes, a depthwise one, a residual sum, a fully connected end."""
    rng = np.random.default_rng(seed)
    inner, depth = int(rng.integers(5, 40)), int(rng.integers(5, 30))
    height, width = int(rng.integers(7, 15)), int(rng.integers(7, 15))
    kernel = [int(rng.integers(1, 4)) for _ in range(2)]
    shapes = {
        "w0": (inner, 3, 3, 3), "w1": (depth, inner, *kernel), "b1": (depth,), "w2": (depth, 1, 3, 3),
        "w3": (depth, depth, 1, 1), "w4": (9, depth), "w5": (4, 9),
    }  # fmt: skip
    constants = random_weights(rng, shapes)
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c0", "w1", "b1"], ["c1"], strides=[int(rng.integers(1, 3))] * 2),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], group=depth, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c2", "w3"], ["c3"]),
        helper.make_node("Add", ["c3", "r1"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w4"], ["g"], transB=1),
        helper.make_node("Gemm", ["g", "w5"], ["y"], transB=1),
    ]
    return save_network(path, nodes, constants, [1, 3, height, width], [1, 4])


@pytest.mark.parametrize("target", TARGETS)
def test_reference_cpu_and_simulator_agree(tmp_path: Path, target: str) -> None:
    seed = 5 + TARGETS.index(target)
    model = random_network(tmp_path / "model.onnx", seed)
    done = place(model, target, Options(formats=WeightRequest("int4")))
    precisions = [item.precision for item in done.partition.placements]
    assert sum(precision.endswith("*int4") for precision in precisions) == 4
    feeds = {"x": np.random.default_rng(seed).standard_normal(done.integer.graph.inputs[0].shape).astype(np.float32)}  # pyright: ignore[reportArgumentType, reportCallIssue]
    wanted = execute(done.integer, feeds)["y"]
    for index, chip in enumerate((done.target, done.target.model_copy(update={"npu": None}))):
        can_run = partial(accelerators.can_run, target=chip)
        parts = partition(done.integer, chip, can_run=can_run, keep_islands=True)
        if chip.npu is not None:
            on_npu = [item for item in parts.placements if item.backend == "npu" and item.precision == "int8*int4"]
            assert len(on_npu) == 4

        def driver(region: Region, chip=chip) -> AcceleratorFunction:
            return npu.region_function(npu.compile_region(region, chip), 0)

        lowered = relax.lower(done.integer, parts, chip, driver)
        relax.build(lowered, chip.host, tmp_path / f"{index}.so")
        (got,) = Executable(tmp_path / f"{index}.so", lowered.parameters).run([feeds["x"]])
        np.testing.assert_array_equal(got, wanted)
        assert len(np.unique(got)) > 1


def test_the_bundle_holds_half_the_weights(tmp_path: Path) -> None:
    eight, four = (
        qcompiler.compile(DIGITS, "x86-cpu", calibration=CALIBRATION, samples=32, weights=weights,
                          output=tmp_path / f"{weights}.qc")
        for weights in ("int8", "int4")
    )  # fmt: skip
    constants = onnx.load(four.path / bundle_files.INTEGER_MODEL).graph.initializer
    halved = [tensor for tensor in constants if tensor.data_type == TensorProto.INT4]
    elements = sum(int(np.prod(tensor.dims)) for tensor in halved)
    assert elements > 0
    saved = eight.report.totals.weights - four.report.totals.weights
    # Rows of lanes and runs of nibbles are filled up with zeros.
    assert 0.4 * elements < saved < 0.75 * elements
    with np.load(EXAMPLES / "digits_test.npz") as data:
        images, labels = data["image"], data["label"]
    accuracy = [(bundle.run({"image": images})["logits"].argmax(axis=1) == labels).mean() for bundle in (eight, four)]
    assert accuracy[1] >= accuracy[0] - 0.03
    session = exact_session(four.path / bundle_files.QDQ_MODEL)
    theirs = np.stack([np.asarray(session.run(None, {"image": image[None]})[0])[0] for image in images[:20]])
    ours = four.run({"image": images[:20]})["logits"]
    assert (theirs.argmax(axis=1) == ours.argmax(axis=1)).all()


def test_our_own_model_compiles_again_to_the_same_integers(tmp_path: Path) -> None:
    """A QDQ model with 4-bit weights is read, not requantized."""
    model = random_network(tmp_path / "model.onnx", 9)
    first = place(model, "x86-cpu", Options(formats=WeightRequest("int4")))
    onnx_file = tmp_path / "quantized.onnx"
    ir.save(first.quantized, onnx_file)
    second = place(onnx_file, "x86-cpu")
    assert [item.precision for item in second.partition.placements] == [
        item.precision for item in first.partition.placements
    ]
    feeds = {"x": np.random.default_rng(2).standard_normal(first.integer.graph.inputs[0].shape).astype(np.float32)}  # pyright: ignore[reportArgumentType, reportCallIssue]
    np.testing.assert_array_equal(execute(first.integer, feeds)["y"], execute(second.integer, feeds)["y"])
    with pytest.raises(QCompilerError, match="arrived quantized"):
        place(onnx_file, "x86-cpu", Options(formats=WeightRequest("int4")))


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def explained(*options: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as leaving:
            cli.main(["explain", str(DIGITS), "-t", "systolic-npu", "--samples", "8", "--json", *options])
        return int(leaving.value.code or 0), capsys.readouterr().out

    code, plain = explained()
    assert code == 0 and "int4" not in plain
    layer = next(row["layer"] for row in json.loads(plain)["placements"] if row["precision"] == "int8*int8")
    code, shown = explained("--weights", "int4", "--layer-weights", f"{layer}=int4")
    rows = {row["layer"]: row["precision"] for row in json.loads(shown)["placements"]}
    assert code == 0 and rows[layer] == "int8*int4"
    code, shown = explained("--layer-weights", "nothing")
    assert code == 2 and "write LAYER=int4 or LAYER=int8" in shown
    code, shown = explained("--weights", "int4", "-t", "arm-npu")
    assert code == 2 and "arm-npu has no int4 weights" in shown


@pytest.mark.parametrize("dtype", [TensorProto.UINT4, TensorProto.INT4])
@pytest.mark.parametrize("target", ["x86-cpu", "systolic-npu"])
def test_models_that_arrive_with_four_bit_weights(tmp_path: Path, dtype: int, target: str) -> None:
    rng = np.random.default_rng(12)
    low, zero = (0, 8) if dtype == TensorProto.UINT4 else (-8, 0)
    weights = rng.integers(low, low + 16, (6, 5, 3, 3))
    constants = [
        helper.make_tensor("w", dtype, weights.shape, weights.ravel()),
        helper.make_tensor("wz", dtype, [6], [zero] * 6),
        numpy_helper.from_array(rng.uniform(0.02, 0.1, 6).astype(np.float32), "ws"),
        numpy_helper.from_array(np.array(0.03, np.float32), "xs"),
        numpy_helper.from_array(np.array(0.2, np.float32), "ys"),
        numpy_helper.from_array(np.array(4, np.int8), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["c", "ys", "z"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "ys", "z"], ["y"]),
    ]
    for node in nodes:
        node.name = node.output[0]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 8, 7]) for n, c in (("x", 5), ("y", 6)))
    graph = helper.make_graph(nodes, "arrived", [x], [y], constants)
    path = tmp_path / "arrived.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    done = place(path, target)
    (conv,) = [node for node in done.integer.graph if node.op_type == "QConv"]
    assert conv.inputs[1] is not None and conv.inputs[1].dtype == ir.DataType.INT4
    feeds = {"x": rng.standard_normal((1, 5, 8, 7)).astype(np.float32)}
    (theirs,) = exact_session(path, optimize=False).run(None, feeds)
    ours = execute(done.integer, feeds)["y"]
    assert np.abs(np.asarray(theirs) - ours).max() <= 0.2001 and np.mean(theirs != ours) < 0.02
    assert len(np.unique(ours)) > 20
