"""The whole road on the bundled example, and small models that need the fallback."""

import gc
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler import Bundle, QCompilerError
from qcompiler.compile import Silent, explain
from qcompiler.exact_session import exact_session
from qcompiler.options import Options

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIGITS = EXAMPLES / "digits.onnx"
CALIBRATION = EXAMPLES / "digits_calibration.npz"


@pytest.fixture(scope="module")
def digits() -> Bundle:
    return qcompiler.compile(DIGITS, calibration=CALIBRATION)


def _test_data() -> tuple[np.ndarray, np.ndarray]:
    with np.load(EXAMPLES / "digits_test.npz") as data:
        return data["image"], data["label"]


def _float_outputs(model: Path, images: np.ndarray) -> np.ndarray:
    session = exact_session(model)
    name = session.get_inputs()[0].name
    return np.concatenate([np.asarray(session.run(None, {name: image[None]})[0]) for image in images])


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- the example ----------------------------------------------------------------------------------------------


def test_accuracy_of_the_example(digits: Bundle) -> None:
    images, labels = _test_data()
    compiled = (digits.run({"image": images})["logits"].argmax(axis=1) == labels).mean()
    reference = (_float_outputs(DIGITS, images).argmax(axis=1) == labels).mean()
    assert reference >= 0.96
    assert compiled >= reference - 0.01


@pytest.mark.parametrize("target", ["systolic-npu", "x86-cpu"])
def test_other_targets(target: str) -> None:
    images, _ = _test_data()
    bundle = qcompiler.compile(DIGITS, target, calibration=CALIBRATION, samples=32)
    reference = _float_outputs(DIGITS, images[:50])
    noise = bundle.run({"image": images[:50]})["logits"] - reference
    assert 10 * np.log10((reference**2).sum() / (noise**2).sum()) > 25


def test_report_adds_up(digits: Bundle) -> None:
    report = digits.report
    totals = report.totals
    assert report.model == "digits.onnx" and report.target == "arm-npu"
    assert totals.latency == pytest.approx(sum(layer.seconds for layer in report.layers))
    assert totals.macs == sum(layer.macs for layer in report.layers)
    # 8·8·12·9 + 8·8·16·12·9 + 4·4·32·16·9 + 32·10, whatever the compiler made of it beside.
    assert totals.macs >= 191_552
    assert totals.npu_macs == totals.macs
    assert 0 < totals.peak_sram <= totals.sram
    assert totals.weights > 6834
    assert totals.energy > 0
    on_npu = {placement.node for placement in report.placements if placement.backend == "npu"}
    assert on_npu and on_npu <= {layer.node for layer in report.layers}
    for layer in report.layers:
        assert layer.utilisation is None or 0 < layer.utilisation <= 1
    for placement in report.placements:
        assert (placement.reason is None) == (placement.backend == "npu")
    assert report.self_check is not None and report.self_check.samples == 16
    sqnr = report.self_check.outputs[0].sqnr
    assert sqnr is not None and sqnr > 25
    assert report.warnings == ()


def test_explain_agrees_with_the_bundle(digits: Bundle) -> None:
    report = explain(DIGITS, options=Options(calibration=CALIBRATION))
    assert report.self_check is None
    assert report.placements == digits.report.placements
    assert report.layers == digits.report.layers
    assert report.totals.latency == digits.report.totals.latency


def test_manifest_describes_the_interface(digits: Bundle) -> None:
    (image,), (logits,) = digits.inputs, digits.outputs
    assert (image.name, image.shape, image.dtype) == ("image", (1, 1, 8, 8), "float32")
    assert (logits.name, logits.shape, logits.dtype) == ("logits", (1, 10), "float32")
    assert image.quantization is not None and logits.quantization is not None
    # Pixels are 0 to 16.
    assert image.quantization.scale * 255 == pytest.approx(16, rel=0.3)


def test_every_file_is_as_readable_as_the_others(digits: Bundle) -> None:
    assert len({file.stat().st_mode for file in digits.path.iterdir() if file.suffix != ".so"}) == 1


def test_onnx_files_in_the_bundle(digits: Bundle) -> None:
    """The QDQ model is standard and computes what the bundle computes, up to the rounding of its variant."""
    images, _ = _test_data()
    qdq = digits.path / "model.qdq.onnx"
    onnx.checker.check_model(onnx.load(qdq), full_check=True)
    quantized = _float_outputs(qdq, images[:50])
    compiled = digits.run({"image": images[:50]})["logits"]
    assert digits.outputs[0].quantization is not None
    step = digits.outputs[0].quantization.scale
    assert np.abs(quantized - compiled).max() < 4 * step
    integer = onnx.load(digits.path / "model.int.onnx")
    assert {"QConv", "QGemm"} <= {node.op_type for node in integer.graph.node}


def test_batches_are_looped_over(digits: Bundle) -> None:
    images, _ = _test_data()
    together = digits.run({"image": images[:5]})["logits"]
    assert together.shape == (5, 10)
    for index in range(5):
        np.testing.assert_array_equal(digits.run({"image": images[index : index + 1]})["logits"][0], together[index])
    # Whole floats of another width, and integers that lose nothing, are converted.
    np.testing.assert_array_equal(digits.run({"image": images[:2].astype(np.float64)})["logits"], together[:2])
    np.testing.assert_array_equal(digits.run({"image": images[:2].astype(np.uint8)})["logits"], together[:2])


def test_a_bundle_without_output_lives_as_long_as_it_is_held() -> None:
    bundle = qcompiler.compile(DIGITS, "x86-cpu", calibration=CALIBRATION, samples=4)
    folder = bundle.path
    assert folder.is_dir()
    bundle.run({"image": np.zeros((1, 1, 8, 8), np.float32)})
    del bundle
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("target", ["arm-npu", "x86-cpu"])
def test_two_compilations_are_byte_identical(target: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(DIGITS, tmp_path / "elsewhere")
    with np.load(CALIBRATION) as data:
        arrays = {"image": data["image"]}
    qcompiler.compile(DIGITS, target, calibration=CALIBRATION, output=tmp_path / "one.qc")
    qcompiler.compile(copy, target, calibration=arrays, output=tmp_path / "elsewhere" / "two.qc")
    one, two = _files(tmp_path / "one.qc"), _files(tmp_path / "elsewhere" / "two.qc")
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []


def test_progress_names_the_stages() -> None:
    class Recorder(Silent):
        def __init__(self) -> None:
            self.stages: list[str] = []
            self.steps: list[tuple[int, int]] = []

        def stage(self, name: str) -> None:
            self.stages.append(name)

        def advance(self, done: int, total: int) -> None:
            self.steps.append((done, total))

    recorder = Recorder()
    explain(DIGITS, options=Options(calibration=CALIBRATION, samples=7), progress=recorder)
    assert recorder.stages[0] == "import" and "calibrate" in recorder.stages
    assert (7, 7) in recorder.steps


# --- fallback -----------------------------------------------------------------------------------------------------


SHAPE = (1, 16, 15, 17)


def _conv_model(path: Path, middle: Sequence[onnx.NodeProto], seed: int) -> Path:
    """Conv, whatever `middle` makes of "a" as "b", Conv; random weights, maps too large to leave to a CPU."""
    rng = np.random.default_rng(seed)
    initializers = [
        numpy_helper.from_array((rng.normal(size=(16, 16, 3, 3)) / 12).astype(np.float32), name)
        for name in ("w1", "w2")
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "first", pads=[1, 1, 1, 1]),
        *middle,
        helper.make_node("Conv", ["b", "w2"], ["y"], "last", pads=[1, 1, 1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("target", ["arm-npu", "systolic-npu"])
def test_an_operator_the_accelerator_lacks_runs_on_the_cpu(target: str, tmp_path: Path) -> None:
    # No target has a rule for it, and no integer form exists.
    scale = helper.make_node("Constant", [], ["gamma"], value=numpy_helper.from_array(np.ones(SHAPE[-1], np.float32)))
    middle = [scale, helper.make_node("LayerNormalization", ["a", "gamma"], ["b"], "strange", axis=3)]
    model = _conv_model(tmp_path / "net.onnx", middle, seed=3)
    rng = np.random.default_rng()
    inputs = rng.normal(size=(8, *SHAPE[1:])).astype(np.float32)
    bundle = qcompiler.compile(model, target, calibration={"x": inputs})
    placements = {placement.node: placement for placement in bundle.report.placements}
    reason = placements["strange"].reason
    assert reason is not None and target in reason and "LayerNormalization" in reason
    backends = [placement.backend for placement in bundle.report.placements]
    regions = 1 + sum(before != after for before, after in pairwise(backends))
    assert regions >= 3
    reference = _float_outputs(model, inputs)
    noise = bundle.run({"x": inputs})["y"] - reference
    assert 10 * np.log10((reference**2).sum() / (noise**2).sum()) > 20


def test_mistakes_come_out_as_one_exception(tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match="did you mean 'systolic-npu'"):
        qcompiler.compile(DIGITS, "systolic_npu")
    with pytest.raises(QCompilerError, match="no array for the input"):
        qcompiler.compile(DIGITS, calibration={"picture": np.zeros((2, 1, 8, 8)), "x": np.zeros(3)})
    with pytest.raises(QCompilerError, match="does not exist"):
        qcompiler.compile(tmp_path / "nothing.onnx", output=tmp_path / "net.qc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["cortex-m55", "portable-c"])
def test_chips_without_a_system_get_c(target: str, tmp_path: Path) -> None:
    with pytest.raises(QCompilerError, match=rf"{target} has no operating system .* --emit c"):
        qcompiler.compile(DIGITS, target, output=tmp_path / "digits.qc")
    assert not list(tmp_path.iterdir())
