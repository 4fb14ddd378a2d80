"""Layers in 16-bit floats: what onnxruntime computes of the same casts, and weights of two bytes."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from small_networks import save_network

import qcompiler
from qcompiler import cli
from qcompiler.backends import relax
from qcompiler.compile import place
from qcompiler.errors import QCompilerError
from qcompiler.integer.reference import execute
from qcompiler.integer.weight_types import as_half
from qcompiler.options import Options
from qcompiler.quant.types import HalfType
from qcompiler.runtime import Executable

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits.onnx"


def network(path: Path, seed: int, scale: float = 1.0) -> Path:
    rng = np.random.default_rng(seed)
    shapes = {"w0": (9, 3, 3, 3), "b0": (9,), "w1": (9, 1, 3, 3), "w2": (33, 9, 1, 2), "w3": (7, 33)}
    constants = [
        numpy_helper.from_array((scale * rng.standard_normal(shape) / 4).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], group=9, pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "r0"], ["a"]),
        helper.make_node("Conv", ["a", "w2"], ["c2"]),
        helper.make_node("GlobalAveragePool", ["c2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w3"], ["y"], transB=1),
    ]
    return save_network(path, nodes, constants, [1, 3, 9, 7], [1, 7])


def ran(model: bytes | str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0])


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("layers", [("c2",), ("all",)])
def test_reference_cpu_and_onnxruntime(tmp_path: Path, half: HalfType, layers: tuple[str, ...]) -> None:
    model = network(tmp_path / "model.onnx", len(half) + len(layers[0]))
    done = place(model, "x86-cpu", Options(half=dict.fromkeys(layers, half)))
    feeds = {"x": np.random.default_rng(8).standard_normal((1, 3, 9, 7)).astype(np.float32)}
    lowered = relax.lower(done.integer, done.partition, done.target)
    relax.build(lowered, done.target.host, tmp_path / "model.so")
    (got,) = Executable(tmp_path / "model.so", lowered.parameters).run([feeds["x"]])
    theirs = ran(ir.to_proto(done.quantized).SerializeToString(), feeds)
    exact, spread = ran(str(model), feeds), 2.0 ** (-10 if half == "float16" else -7)
    # Sums in another order may fall on the other side of a rounding.
    for other in (got, execute(done.integer, feeds)["y"]):
        np.testing.assert_allclose(other, theirs, rtol=4 * spread, atol=4 * spread)
    if layers == ("all",):
        made = [node.op_type for node in done.integer.graph]
        assert made.count("QRoundHalf") >= 5 and "Cast" not in made and "QConv" not in made
        assert 0 < np.abs(exact - got).max() < 8 * spread * np.abs(exact).max()
        kept = sum(array.nbytes for array in lowered.parameters if array.dtype in (np.float16, np.uint16))
        assert kept >= 2 * (9 * 27 + 9 * 9 + 33 * 18 + 7 * 33)
    else:
        reasons = {done.layers[item.node]: item.op for item in done.partition.placements}
        assert "Conv" in reasons.values() and any(node.op_type == "QConv" for node in done.integer.graph)


def test_a_bundle_in_float16(tmp_path: Path) -> None:
    bundle = qcompiler.compile(DIGITS, "x86-cpu", half={"all": "float16"}, output=tmp_path / "b.qc")
    check = bundle.report.self_check
    assert check is not None and check.outputs[0].sqnr is not None and check.outputs[0].sqnr > 55
    plain = qcompiler.compile(DIGITS, "x86-cpu", keep_float=["all"], output=tmp_path / "f.qc")
    assert bundle.report.totals.weights < 0.65 * plain.report.totals.weights


def test_what_is_stored_in_two_bytes() -> None:
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((4, 5)).astype(np.float32)
    assert as_half(weights) is weights
    assert as_half(weights.astype(np.float16).astype(np.float32)).dtype == np.float16
    large = (weights * 1e6).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert as_half(large).dtype == ml_dtypes.bfloat16
    integers = np.ones((2, 2), np.int8)
    assert as_half(integers) is integers


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network(tmp_path / "model.onnx", 2, scale=1e6)
    with pytest.raises(QCompilerError, match="--float16 c2: its weights go beyond float16; use bfloat16"):
        place(model, "x86-cpu", Options(half={"c2": "float16"}))
    with pytest.raises(QCompilerError, match="--bfloat16 a: this operator has no constant weights"):
        place(model, "x86-cpu", Options(half={"a": "bfloat16"}))
    with pytest.raises(SystemExit) as leaving:
        cli.main(["explain", str(DIGITS), "-t", "arm-npu", "--float16", "all", "--json"])
    rows = json.loads(capsys.readouterr().out)["placements"]
    assert not leaving.value.code and {row["backend"] for row in rows if row["op"] in ("Conv", "Gemm")} == {"cpu"}
