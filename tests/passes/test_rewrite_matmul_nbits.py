"""MatMulNBits in, and out again: against onnxruntime's own kernel."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import QCompilerError
from qcompiler.graph import integer, nodes_of, shape_of
from qcompiler.importer import import_onnx
from qcompiler.integer.realize_weight_only import compute_of
from qcompiler.passes.rewrite_matmul_nbits import ExportMatMulNBits, RewriteMatMulNBits
from qcompiler.pipeline import SIMPLIFY, run_passes

MICROSOFT = "com.microsoft"


def matmul_nbits(
    rng: np.random.Generator,
    *,
    depth: int = 72,
    outputs: int = 10,
    bits: int = 4,
    block: int = 32,
    level: int = 1,
    zeros: str = "packed",
    bias: bool = False,
    order: bool = False,
) -> onnx.ModelProto:
    """One MatMulNBits of x [2, 3, depth]. `zeros`: "none", "packed", "whole" or "broken" float ones."""
    groups = -(-depth // block)
    codes = rng.integers(0, 1 << bits, (outputs, groups * block)).astype(np.uint8)
    packed = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
    constants = {
        "b": packed.reshape(outputs, groups, -1),
        "s": rng.uniform(0.01, 0.03, (outputs, groups)).astype(np.float32),
    }
    inputs = ["x", "b", "s", "", "", ""]
    points = rng.integers(0, 1 << bits, (outputs, groups)).astype(np.uint8)
    if zeros == "packed":
        even = np.pad(points, ((0, 0), (0, groups % 2)))
        constants["z"] = points if bits == 8 else even[:, ::2] | even[:, 1::2] << 4
    elif zeros != "none":
        constants["z"] = points.astype(np.float32) + np.float32(0.5 if zeros == "broken" else 0)
    if zeros != "none":
        inputs[3] = "z"
    if order:
        inputs[4], constants["g"] = "g", np.repeat(np.arange(groups, dtype=np.int32), block)[:depth]
    if bias:
        inputs[5], constants["bias"] = "bias", rng.standard_normal(outputs).astype(np.float32)
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(
        "MatMulNBits", inputs, ["y"], name="product", domain=MICROSOFT, K=depth, N=outputs, bits=bits,
        block_size=block, accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "nbits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, outputs])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(model: onnx.ModelProto | ir.Model, x: np.ndarray) -> np.ndarray:
    proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
    options = ort.SessionOptions()
    # Optimized, DequantizeLinear → MatMul becomes a MatMulNBits that rounds activations.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


CASES = (
    {"bits": 4, "zeros": "none"},
    {"bits": 4, "zeros": "packed", "depth": 96, "bias": True},
    {"bits": 4, "zeros": "packed", "block": 16, "depth": 48},
    {"bits": 8, "zeros": "packed", "outputs": 7},
    {"bits": 8, "zeros": "none", "bias": True, "block": 64, "depth": 64},
)


@pytest.mark.parametrize("case", CASES)
def test_computes_what_onnxruntime_does(tmp_path: Path, case) -> None:
    rng = np.random.default_rng(21)
    proto = matmul_nbits(rng, **case)
    onnx.save(proto, tmp_path / "model.onnx")
    x = rng.standard_normal((2, 3, case.get("depth", 72))).astype(np.float32)
    wanted = run(proto, x)
    imported = import_onnx(tmp_path / "model.onnx")
    assert not nodes_of(imported.graph, "MatMulNBits", domain=MICROSOFT)
    np.testing.assert_allclose(run(imported, x), wanted, rtol=1e-4, atol=1e-4)
    simplified = run_passes(imported, SIMPLIFY, stage="simplify")
    (gemm,) = nodes_of(simplified.graph, "Gemm")
    assert gemm.name == "product_MatMul_1" and integer(gemm, "transB") == 1
    np.testing.assert_allclose(run(simplified, x), wanted, rtol=1e-4, atol=1e-4)
    assert ExportMatMulNBits()(simplified).modified
    np.testing.assert_allclose(run(simplified, x), wanted, rtol=1e-4, atol=1e-4)
    assert not ExportMatMulNBits()(simplified).modified


def test_structure(tmp_path: Path) -> None:
    onnx.save(matmul_nbits(np.random.default_rng(22), depth=70, block=32), tmp_path / "model.onnx")
    graph = import_onnx(tmp_path / "model.onnx").graph
    (dequantize,) = nodes_of(graph, "DequantizeLinear")
    assert [str(value.dtype) for value in dequantize.inputs if value is not None] == ["UINT4", "FLOAT", "UINT4"]
    assert [shape_of(value) for value in dequantize.inputs if value is not None] == [(70, 10), (3, 10), (3, 10)]
    assert integer(dequantize, "block_size") == 32 and integer(dequantize, "axis") == 0


def test_whole_zero_points_may_be_floats(tmp_path: Path) -> None:
    rng = np.random.default_rng(23)
    proto = matmul_nbits(rng, zeros="whole")
    onnx.save(proto, tmp_path / "model.onnx")
    x = rng.standard_normal((2, 3, 72)).astype(np.float32)
    np.testing.assert_allclose(run(import_onnx(tmp_path / "model.onnx"), x), run(proto, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("level", "compute"), [(4, "int8"), (1, "float32"), (0, "float32")])
def test_the_accuracy_level_is_kept(tmp_path: Path, level: int, compute: str) -> None:
    onnx.save(matmul_nbits(np.random.default_rng(24), level=level), tmp_path / "model.onnx")
    model = run_passes(import_onnx(tmp_path / "model.onnx"), SIMPLIFY, stage="simplify")
    assert compute_of(model) == compute
    ExportMatMulNBits()(model)
    (node,) = nodes_of(model.graph, "MatMulNBits", domain=MICROSOFT)
    assert integer(node, "accuracy_level") == (4 if level == 4 else 1)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"order": True}, "g_idx"),
        ({"zeros": "broken"}, "not whole numbers"),
        ({"bits": 2, "zeros": "none", "block": 64, "depth": 128}, "weights of 2 bits"),
    ],
)
def test_refuses(case, message: str) -> None:
    model = ir.from_proto(matmul_nbits(np.random.default_rng(25), **case))
    with pytest.raises(QCompilerError, match=f"'product'.*{message}"):
        RewriteMatMulNBits()(model)


def test_leaves_other_products_alone() -> None:
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0, name="d"),
            helper.make_node("Gemm", ["x", "d"], ["y"], transB=1, name="gemm"),
        ],
        "per_channel",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])],
        [
            numpy_helper.from_array(np.ones((4, 32), np.int8), "w"),
            numpy_helper.from_array(np.ones(4, np.float32), "s"),
        ],
        value_info=[helper.make_tensor_value_info("d", TensorProto.FLOAT, [4, 32])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    assert not ExportMatMulNBits()(model).modified
    assert not RewriteMatMulNBits()(model).modified
