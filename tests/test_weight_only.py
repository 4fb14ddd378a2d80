"""Float activations and weights in groups, end to end: compiled, written for other runtimes, read again."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler import cli
from qcompiler.compile import place
from qcompiler.emit_c import emit_c
from qcompiler.errors import QCompilerError
from qcompiler.integer.reference import execute
from qcompiler.options import Options, WeightOperators
from qcompiler.quant.types import WeightRequest
from qcompiler.quantized_file import quantize_file
from qcompiler.target_loader import load_target

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LENGTH = 12
SHAPES = {name: (1, LENGTH) for name in ("input_ids", "attention_mask", "token_type_ids")}


@pytest.fixture(scope="module")
def bert() -> ModuleType:
    """benchmarks/encoder.py"""
    spec = importlib.util.spec_from_file_location("encoder", BENCHMARKS / "encoder.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["encoder"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def encoder(bert: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder of seeded weights."""
    rng = np.random.default_rng(41)
    weights = bert.random_weights(rng, layers=1, hidden=48, inner=96, words=60, positions=32)
    path = tmp_path_factory.mktemp("encoder") / "encoder.onnx"
    onnx.save(bert.encoder(weights, bert.Sizes(1, 4)), path)
    return path


def sentences(count: int, seed: int) -> dict[str, np.ndarray]:
    """Random words, filled up to LENGTH with padding that the mask hides."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(LENGTH) < rng.integers(4, LENGTH + 1, (count, 1))).astype(np.int64)
    ids = rng.integers(1, 60, (count, LENGTH)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def in_onnxruntime(model: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    rows = range(len(feeds["input_ids"]))
    return np.concatenate(
        [
            np.asarray(session.run(None, {name: array[row : row + 1] for name, array in feeds.items()})[0])
            for row in rows
        ]
    )


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def compiled(model: Path, target: str, request: WeightRequest, output: Path) -> qcompiler.Bundle:
    return qcompiler.compile(
        model, target, calibration=sentences(24, 1), input_shapes=SHAPES, weights=request.default,
        activations=request.activations, group=request.group, scheme=request.scheme, output=output,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "mean"),
    [
        (WeightRequest(), 0.98),
        (WeightRequest("int8", activations="float"), 0.9995),
        (WeightRequest("int4", activations="float", group=16, scheme="gptq"), 0.985),
        (WeightRequest("int4", activations="dynamic", group=16, scheme="gptq"), 0.985),
    ],
)
def test_an_encoder_embeds_alike(encoder: Path, tmp_path: Path, request_: WeightRequest, mean: float) -> None:
    bundle = compiled(encoder, "x86-cpu", request_, tmp_path / "encoder.qc")
    feeds = sentences(16, 2)
    got, wanted = bundle.run(feeds)["sentence_embedding"], in_onnxruntime(encoder, feeds)
    similar = similarity(got, wanted)
    assert similar.mean() > mean and similar.min() < 1 - 1e-7
    integer = place(encoder, "x86-cpu", Options(calibration=sentences(24, 1), input_shapes=SHAPES, formats=request_))
    one = {name: array[:1] for name, array in feeds.items()}
    np.testing.assert_allclose(execute(integer.integer, one)["sentence_embedding"], got[:1], atol=0.02)
    if request_.activations == "int8":
        # Products that residual sums read go on in float, all others in 8 bits.
        ops = [item.op for item in bundle.report.placements]
        assert (ops.count("Gemm"), ops.count("MatMulInteger"), ops.count("MatMul")) == (4, 2, 2)
    else:
        assert sum(item.op == "Gemm" for item in bundle.report.placements) == 6


def test_an_accelerator_leaves_it_to_the_cpu_and_says_why(encoder: Path, tmp_path: Path) -> None:
    request = WeightRequest("int4", activations="float", group=16)
    bundle = compiled(encoder, "arm-npu", request, tmp_path / "encoder.qc")
    products = [item for item in bundle.report.placements if item.op == "Gemm"]
    assert len(products) == 6
    for item in products:
        assert item.backend == "cpu" and item.precision == "float32" and "float32" in (item.reason or "")
    ours = compiled(encoder, "x86-cpu", request, tmp_path / "x86.qc").run(sentences(2, 3))
    np.testing.assert_allclose(bundle.run(sentences(2, 3))["sentence_embedding"], ours["sentence_embedding"], atol=1e-5)


def test_the_bundle_holds_packed_nibbles(encoder: Path, tmp_path: Path) -> None:
    wide, narrow = (
        compiled(encoder, "x86-cpu", WeightRequest(kind, activations="float", group=16), tmp_path / f"{kind}.qc")
        for kind in ("int8", "int4")
    )
    weights = 4 * 48 * 48 + 2 * 48 * 96
    saved = wide.report.totals.weights - narrow.report.totals.weights
    # Zero points, which int8 does without, take some of it back.
    assert 0.1 * weights < saved <= 0.5 * weights


@pytest.mark.parametrize("operators", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("activations", ["float", "dynamic"])
def test_what_is_written_computes_the_same(
    encoder: Path, tmp_path: Path, operators: WeightOperators, activations
) -> None:
    request = WeightRequest("int4", activations=activations, group=16, scheme="hqq")
    options = Options(input_shapes=SHAPES, formats=request)
    written = quantize_file(encoder, "x86-cpu", options, tmp_path / "small.onnx", operators)
    assert written.path.stat().st_size == written.bytes < 0.5 * written.float_bytes
    assert written.integer_weights == 6 and written.matmul_nbits == (6 if operators == "matmulnbits" else 0)
    feeds = sentences(8, 4)
    again = qcompiler.compile(written.path, "x86-cpu", output=tmp_path / "again.qc").run(feeds)["sentence_embedding"]
    direct = compiled(encoder, "x86-cpu", request, tmp_path / "direct.qc").run(feeds)["sentence_embedding"]
    np.testing.assert_array_equal(again, direct)
    if operators == "matmulnbits" or activations == "float":
        # An activation next to a half may round the other way.
        atol = 1e-5 if activations == "float" else 2e-3
        np.testing.assert_allclose(in_onnxruntime(written.path, feeds), direct, atol=atol)


def test_a_written_model_takes_no_other_formats(encoder: Path, tmp_path: Path) -> None:
    options = Options(input_shapes=SHAPES, formats=WeightRequest("int4", activations="float", group=16))
    path = quantize_file(encoder, "x86-cpu", options, tmp_path / "small.onnx").path
    with pytest.raises(QCompilerError, match="arrived quantized"):
        place(path, "x86-cpu", Options(formats=WeightRequest("int4", activations="float", group=32)))
    rounding = place(path, "x86-cpu", Options(formats=WeightRequest(activations="dynamic")))
    computes = {node.attributes["compute"].value for node in rounding.integer.graph if node.op_type == "WeightOnlyGemm"}
    assert computes == {"int8"}


def test_portable_c_is_refused(encoder: Path, tmp_path: Path) -> None:
    options = Options(input_shapes=SHAPES, formats=WeightRequest("int4", activations="float", group=16))
    with pytest.raises(QCompilerError, match="portable C has no vectors"):
        emit_c(encoder, "portable-c", tmp_path / "c", options)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("target", "weights"), [("arm-cpu", "int8"), ("arm-cpu", "int4"), ("cortex-m55", "int4")])
def test_other_machines_compute_what_the_reference_does(tmp_path: Path, target: str, weights) -> None:
    """Emulated: NEON's dot product of signed bytes, and a microcontroller without any."""
    chip = load_target(target).host.bare_metal
    assert chip is not None
    for tool in ("make", chip.compiler, chip.emulator[0]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing")
    rng = np.random.default_rng(42)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="product", transB=1)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 70])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 21])],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in (("w", (21, 70)), ("b", (21,)))
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    options = Options(formats=WeightRequest(weights, activations="dynamic", group=32))
    emit_c(tmp_path / "m.onnx", target, tmp_path / "c", options)
    done = subprocess.run(["make", "-C", tmp_path / "c", "run"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "PASS" in done.stdout + done.stderr, done.stdout + done.stderr


def test_static_models_are_written_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = Path(__file__).resolve().parents[1] / "examples"
    arguments = ["quantize", str(examples / "digits.onnx"), "-t", "x86-cpu", "-o", str(tmp_path / "q.onnx"), "--json"]
    with pytest.raises(SystemExit) as done:
        cli.main([*arguments, "-c", str(examples / "digits_calibration.npz"), "--samples", "32"])
    assert done.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["quantize_linear"] > 3 and shown["matmul_nbits"] == 0 and shown["bytes"] < shown["float_bytes"]
    with np.load(examples / "digits_test.npz") as data:
        images, labels = data["image"][:100], data["label"][:100]
    session = ort.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
    guesses = [np.asarray(session.run(None, {"image": image[None]})[0]).argmax() for image in images]
    assert (np.array(guesses) == labels).mean() > 0.9


def test_the_command_takes_groups_and_schemes(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = [option for name in SHAPES for option in ("--input-shape", f"{name}=1,{LENGTH}")]
    common = [str(encoder), "-t", "x86-cpu", *shapes, "--weights", "int4", "--activations", "float"]
    with pytest.raises(SystemExit) as done:
        cli.main(["quantize", *common, "--group-size", "32", "--scheme", "hqq", "-o", str(tmp_path / "small.onnx")])
    assert done.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "6 MatMulNBits" in shown and "% of the model given" in shown
    with pytest.raises(SystemExit) as done:
        cli.main(["compile", *common, "--group-size", "32", "--scheme", "awq", "-o", str(tmp_path / "x.qc")])
    assert done.value.code == cli.USAGE_ERROR
    assert "give --calibration" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x.qc").exists()
