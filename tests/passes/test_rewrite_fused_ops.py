"""onnxruntime's fused float operators against onnxruntime."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import QCompilerError
from qcompiler.passes.rewrite_fused_ops import RewriteFusedOps

MS = "com.microsoft"
rng = np.random.default_rng(2)
Attribute = int | float | str | list[int] | list[float]


def random(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


X = random(2, 3, 6, 7)
CONV = {"w": random(4, 3, 3, 3), "b": random(4)}
GEMM = {"w": random(5, 8), "b": random(5)}


def make(op_type: str, x: np.ndarray, weights: Mapping[str, np.ndarray], **attributes: Attribute) -> onnx.ModelProto:
    node = helper.make_node(op_type, ["x", *weights], ["y"], name="the_node", domain=MS)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def execute(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return np.asarray(ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0])


def rewritten(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(proto)
    assert RewriteFusedOps()(model).modified
    return model


CASES: tuple[tuple[str, np.ndarray, Mapping[str, np.ndarray], dict[str, Attribute], list[str]], ...] = (
    ("FusedConv", X, CONV, {"activation": "Relu", "pads": [1, 0, 1, 2]}, ["Conv", "Relu"]),
    ("FusedConv", X, CONV, {"activation": "Clip", "activation_params": [-0.5, 1.0]}, ["Conv", "Clip"]),
    ("FusedConv", X, CONV, {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]}, ["Conv", "HardSigmoid"]),
    ("FusedConv", X, {**CONV, "z": random(2, 4, 4, 5)}, {"activation": "Relu"}, ["Conv", "Add", "Relu"]),
    ("FusedGemm", random(3, 8), GEMM, {"activation": "Relu", "transB": 1, "alpha": 0.5}, ["Gemm", "Relu"]),
    (
        "FusedGemm",
        random(3, 8),
        GEMM,
        {"activation": "LeakyRelu", "activation_alpha": 0.2, "transB": 1},
        ["Gemm", "LeakyRelu"],
    ),
    ("Gelu", X, {}, {}, ["Gelu"]),
    ("BiasGelu", X, {"b": random(7)}, {}, ["Add", "Gelu"]),
    ("FastGelu", X, {"b": random(7)}, {}, ["Add", "Gelu"]),
    ("QuickGelu", X, {}, {"alpha": 1.3}, ["Mul", "Sigmoid", "Mul"]),
)


@pytest.mark.parametrize(("op_type", "x", "weights", "attributes", "expected"), CASES)
def test_form_and_numbers(
    op_type: str,
    x: np.ndarray,
    weights: Mapping[str, np.ndarray],
    attributes: dict[str, Attribute],
    expected: list[str],
) -> None:
    proto = make(op_type, x, weights, **attributes)
    model = rewritten(proto)
    assert [node.op_type for node in model.graph] == expected
    assert all(node.domain == "" for node in model.graph)
    np.testing.assert_allclose(execute(ir.to_proto(model), x), execute(proto, x), rtol=1e-5, atol=1e-5)


def test_a_second_run_changes_nothing() -> None:
    model = rewritten(make("QuickGelu", X, {}))
    before = ir.to_proto(model).SerializeToString()
    assert not RewriteFusedOps()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(QCompilerError, match=r"'the_node' \(FusedConv\) has the fused activation 'Magic'"):
        RewriteFusedOps()(ir.from_proto(make("FusedConv", X, CONV, activation="Magic")))


def test_other_operators_are_left_alone() -> None:
    assert not RewriteFusedOps()(ir.from_proto(make("NhwcMaxPool", X, {}))).modified
