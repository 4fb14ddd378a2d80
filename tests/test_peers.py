"""Networks that other toolchains quantized come in, and equal what onnxruntime makes of them.

tests/data/digits_*.onnx: the example's network as onnxruntime, NNCF and PyTorch quantized it, made by
benchmarks/import_peers.py. Ours go to onnxruntime and OpenVINO.
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import qcompiler
from qcompiler.bundle import QDQ_MODEL
from qcompiler.compile import compile as compile_model
from qcompiler.compile import place
from qcompiler.integer.reference import Executor
from qcompiler.options import Options
from qcompiler.quant.types import WeightType

DATA = Path(__file__).parent / "data"
EXAMPLES = Path(__file__).parents[1] / "examples"
IMAGES = 60


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    with np.load(EXAMPLES / "digits_test.npz") as arrays:
        return arrays["image"][:IMAGES]


def in_onnxruntime(model: Path, images: np.ndarray) -> np.ndarray:
    """Without rewrites, which round otherwise than the file says."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    [name] = [value.name for value in session.get_inputs()]
    return np.concatenate([np.asarray(session.run(None, {name: image[None]})[0]) for image in images])


def steps_apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The distance in steps of eight bits, for logits that are rounded and for logits that stay float."""
    return np.rint(np.abs(a - b) / ((b.max() - b.min()) / 255)).astype(int)


# The last column: how many of the 600 logits may differ by one step.
# x86-cpu rounds as onnxruntime's integer operators do, so its own files are equal. NNCF and PyTorch leave biases float,
# ours are rounded to 32 bits: with such biases in the file nothing differs (the next test).
# arm-npu rescales as TFLite does, rounding twice: five roundings one after the other, each now and then by one.
DIFFERENCES = (
    ("onnxruntime_qdq", "x86-cpu", 0),
    ("onnxruntime_qoperator", "x86-cpu", 0),
    ("nncf", "x86-cpu", 60),
    ("torch", "x86-cpu", 60),
    ("onnxruntime_qdq", "arm-npu", 200),
    ("onnxruntime_qoperator", "arm-npu", 200),
    ("nncf", "arm-npu", 200),
    ("torch", "arm-npu", 200),
)


@pytest.mark.parametrize(("peer", "target", "allowed"), DIFFERENCES)
def test_equals_onnxruntime(peer, target, allowed, images, tmp_path):
    model = DATA / f"digits_{peer}.onnx"
    compile_model(model, target=target, output=tmp_path / "digits.qc")
    bundle = qcompiler.load(tmp_path / "digits.qc")
    [output] = [tensor.name for tensor in bundle.manifest.outputs]
    got, want = bundle.run({"image": images})[output], in_onnxruntime(model, images)
    steps = steps_apart(got, want)
    print(f"{peer} {target}: {np.count_nonzero(steps)} of {steps.size} differ, by up to {steps.max()} steps")
    assert len(np.unique(want)) > 20
    assert np.count_nonzero(steps) <= allowed and steps.max() <= 2
    assert (got.argmax(axis=1) == want.argmax(axis=1)).mean() > 0.98


def with_rounded_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """Float biases of convolutions and dense layers on the grid of the sums they are added to."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}

    def scale(name: str) -> np.ndarray:
        node = producers[name]
        return arrays[node.input[1]] if node.op_type == "DequantizeLinear" else scale(node.input[0])

    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            step = scale(node.input[0]) * scale(node.input[1])
            rounded = (np.rint(arrays[node.input[2]] / step) * step).astype(np.float32)
            next(t for t in model.graph.initializer if t.name == node.input[2]).CopyFrom(
                numpy_helper.from_array(rounded, node.input[2])
            )
    return model


def test_biases_are_all_that_differs_from_pytorch(images, tmp_path):
    onnx.save(with_rounded_biases(onnx.load(DATA / "digits_torch.onnx")), tmp_path / "digits.onnx")
    executor = Executor(place(tmp_path / "digits.onnx", "x86-cpu", Options()).integer)
    got = np.concatenate([executor.run({"image": image[None]})["logits"] for image in images])
    np.testing.assert_array_equal(got, in_onnxruntime(tmp_path / "digits.onnx", images))


def of_ours(weights: WeightType, folder: Path) -> Path:
    """The example, quantized here: QDQ with biases of 32 bits, and first and last layer of eight."""
    prepared = compile_model(
        EXAMPLES / "digits.onnx",
        target="x86-cpu",
        calibration=EXAMPLES / "digits_calibration.npz",
        output=folder / "ours.qc",
        weights=weights,
        all_layers=True,
    )
    return prepared.path / QDQ_MODEL


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_ours_in_onnxruntime(weights, images, tmp_path):
    model = of_ours(weights, tmp_path)
    bundle = qcompiler.load(tmp_path / "ours.qc")
    [output] = [tensor.name for tensor in bundle.manifest.outputs]
    steps = steps_apart(bundle.run({"image": images})[output], in_onnxruntime(model, images))
    assert np.count_nonzero(steps) <= 0.02 * steps.size and steps.max() <= 1


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_ours_in_openvino(weights, images, tmp_path):
    openvino = pytest.importorskip("openvino", reason="the extra 'bench' is not installed")
    model = of_ours(weights, tmp_path)
    compiled = openvino.compile_model(openvino.Core().read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = np.concatenate([compiled(image[None])[0] for image in images])
    want = in_onnxruntime(model, images)
    steps = steps_apart(got, want)
    print(f"OpenVINO {weights}: {np.count_nonzero(steps)} of {steps.size} differ, by up to {steps.max()} steps")
    # OpenVINO's plugin fuses and rounds by its own rules between layers.
    assert steps.max() <= 3 and (got.argmax(axis=1) == want.argmax(axis=1)).mean() > 0.98
