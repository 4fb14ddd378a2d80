"""Activations quantized at run time: reference, CPU code and onnxruntime agree, without calibration data."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

import qcompiler
from qcompiler import cli
from qcompiler.backends import relax
from qcompiler.compile import Placed, place
from qcompiler.errors import QCompilerError
from qcompiler.exact_session import exact_session
from qcompiler.integer.reference import execute
from qcompiler.options import Options
from qcompiler.quant.types import WeightRequest
from qcompiler.runtime import Executable

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS = EXAMPLES / "digits.onnx"
DYNAMIC = WeightRequest(activations="dynamic")


def network(path: Path, seed: int) -> Path:
    """Odd sizes, strides, padding, a depthwise and a grouped convolution, a sum, and products of two and three axes."""
    rng = np.random.default_rng(seed)
    depth = 2 * int(rng.integers(4, 12))
    shapes = {
        "w0": (depth, 3, 3, 3), "b0": (depth,), "w1": (depth, 1, 3, 3), "w2": (depth, depth // 2, 1, 2), "b2": (depth,),
        "w3": (5, depth, 2, 2), "w4": (30, 11), "b4": (11,), "w5": (11, 7),
    }  # fmt: skip
    constants = [
        numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    constants.append(numpy_helper.from_array(np.array([1, 5, 30], np.int64), "rows"))
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1], strides=[2, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], group=depth, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c1", "w2", "b2"], ["c2"], group=2, pads=[0, 1, 0, 0]),
        helper.make_node("Add", ["c2", "r0"], ["a"]),
        helper.make_node("Conv", ["a", "w3"], ["c3"], strides=[1, 2]),
        helper.make_node("Reshape", ["c3", "rows"], ["f"]),
        helper.make_node("MatMul", ["f", "w4"], ["m"]),
        helper.make_node("Add", ["m", "b4"], ["g"]),
        helper.make_node("MatMul", ["g", "w5"], ["y"]),
    ]
    for node in nodes:
        node.name = node.output[0]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 11, 13])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5, 7])
    graph = helper.make_graph(nodes, "random", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def run(done: Placed, feeds: dict[str, np.ndarray], library: Path) -> list[np.ndarray]:
    lowered = relax.lower(done.integer, done.partition, done.target)
    relax.build(lowered, done.target.host, library)
    return list(Executable(library, lowered.parameters).run([feeds[spec.name] for spec in lowered.inputs]))


def session(model: bytes | Path) -> ort.InferenceSession:
    return exact_session(model)


@pytest.mark.parametrize("target", ["x86-cpu", "x86-plain"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_reference_cpu_and_onnxruntime(tmp_path: Path, target: str, weights: str) -> None:
    seed = 3 + len(target) + (weights == "int4")
    model = network(tmp_path / "model.onnx", seed)
    done = place(model, target, Options(formats=WeightRequest(weights, {}, "dynamic")))  # pyright: ignore[reportArgumentType]
    made = [node.op_type for node in done.integer.graph]
    assert made.count("QConvDynamic") == 4 and made.count("QGemmDynamic") == 2
    products = [item.precision for item in done.partition.placements if item.op in ("ConvInteger", "MatMulInteger")]
    assert products.count("uint8*int4") == (4 if weights == "int4" else 0) and len(products) == 6
    feeds = {"x": np.random.default_rng(seed).standard_normal((1, 3, 11, 13)).astype(np.float32)}
    wanted = execute(done.integer, feeds)["y"]
    (got,) = run(done, feeds, tmp_path / "model.so")
    theirs = np.asarray(session(ir.to_proto(done.quantized).SerializeToString()).run(None, feeds)[0])
    exact = np.asarray(session(model).run(None, feeds)[0])
    spread = np.abs(exact).max()
    # Rounding in float may move one element of a tensor that is then quantized by one step.
    for other in (got, theirs):
        assert np.abs(other - wanted).max() < 0.01 * spread
    assert np.abs(wanted - exact).max() < (0.3 if weights == "int4" else 0.04) * spread


def test_maps_stay_channels_last_between_layers(tmp_path: Path) -> None:
    done = place(network(tmp_path / "model.onnx", 1), "x86-cpu", Options(formats=DYNAMIC))
    transposes = [node for node in done.integer.graph if node.op_type == "Transpose"]
    assert len(transposes) == 2  # of the image, and before the Reshape


def test_models_of_onnxruntime(tmp_path: Path) -> None:
    """quantize_dynamic makes ConvInteger and MatMulInteger; we compute the same with our own integer kernels."""
    model = network(tmp_path / "model.onnx", 5)
    for kind in (QuantType.QUInt8, QuantType.QInt8):
        arrived = tmp_path / f"{kind}.onnx"
        operators = ["MatMul"] if kind == QuantType.QInt8 else ["Conv", "MatMul"]
        quantize_dynamic(model, arrived, op_types_to_quantize=operators, weight_type=kind)
        done = place(arrived, "x86-cpu")
        made = [node.op_type for node in done.integer.graph]
        assert made.count("QGemmDynamic") == 2 and made.count("QConvDynamic") == (4 if "Conv" in operators else 0)
        assert "DequantizeLinear" not in made and done.ranges is None
        feeds = {"x": np.random.default_rng(8).standard_normal((1, 3, 11, 13)).astype(np.float32)}
        theirs = np.asarray(session(arrived).run(None, feeds)[0])
        (got,) = run(done, feeds, tmp_path / f"{kind}.so")
        np.testing.assert_allclose(got, theirs, atol=0.005 * np.abs(theirs).max())


def test_an_accelerator_leaves_them_to_the_cpu(tmp_path: Path) -> None:
    done = place(network(tmp_path / "model.onnx", 2), "arm-npu", Options(formats=DYNAMIC))
    dynamic = [item for item in done.partition.placements if item.op in ("ConvInteger", "MatMulInteger")]
    assert len(dynamic) >= 6 and {item.backend for item in dynamic} == {"cpu"}  # one convolution is grouped
    assert "has no rule for ConvInteger" in (dynamic[0].reason or "")


def test_a_bundle_needs_no_calibration(tmp_path: Path) -> None:
    bundle = qcompiler.compile(DIGITS, "x86-cpu", activations="dynamic", output=tmp_path / "b.qc")
    with np.load(EXAMPLES / "digits_test.npz") as data:
        images, labels = data["image"], data["label"]
    exact = np.stack([np.asarray(session(DIGITS).run(None, {"image": image[None]})[0])[0] for image in images])
    ours = bundle.run({"image": images})["logits"]
    assert (ours.argmax(axis=1) == labels).mean() >= (exact.argmax(axis=1) == labels).mean() - 0.005
    assert bundle.report.calibration is None


def test_layers_kept_in_float(tmp_path: Path) -> None:
    model = network(tmp_path / "model.onnx", 4)
    done = place(model, "x86-cpu", Options(formats=DYNAMIC, keep_float=["c1", "y"]))
    made = [node.op_type for node in done.integer.graph]
    assert made.count("QConvDynamic") == 3 and made.count("Conv") == 1 and made.count("QGemmDynamic") == 1


def test_repair_helps_four_bits(tmp_path: Path) -> None:
    model = network(tmp_path / "model.onnx", 6)
    samples = {"x": np.random.default_rng(1).standard_normal((32, 3, 11, 13)).astype(np.float32)}
    fresh = np.random.default_rng(2).standard_normal((8, 1, 3, 11, 13)).astype(np.float32)
    formats = WeightRequest("int4", {}, "dynamic")
    errors = []
    for quality in ("fast", "balanced"):
        done = place(model, "x86-cpu", Options(calibration=samples, formats=formats, quality=quality))
        theirs, exact = session(ir.to_proto(done.quantized).SerializeToString()), session(model)
        errors.append(
            sum(
                float(
                    np.square(
                        np.asarray(theirs.run(None, {"x": x})[0]) - np.asarray(exact.run(None, {"x": x})[0])
                    ).sum()
                )
                for x in fresh
            )
        )
    assert errors[1] < errors[0]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    def explained(*options: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as leaving:
            cli.main([*options, str(DIGITS), "--activations", "dynamic", "--json"])
        return int(leaving.value.code or 0), capsys.readouterr().out

    code, shown = explained("explain", "-t", "x86-cpu")
    assert code == 0
    assert "uint8*int8" in {row["precision"] for row in json.loads(shown)["placements"]}
    code, shown = explained("debug", "-t", "x86-cpu")
    assert code == 2 and "run time" in shown
    with pytest.raises(QCompilerError, match="no operator 'nothing'"):
        place(DIGITS, "x86-cpu", Options(formats=DYNAMIC, keep_float=["nothing"]))
