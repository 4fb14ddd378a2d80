"""ConvInteger and MatMulInteger against onnxruntime, exactly."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import QCompilerError
from qcompiler.exact_session import exact_session
from qcompiler.passes.rewrite_integer_ops import RewriteIntegerOps

rng = np.random.default_rng(3)
NODE = helper.make_node


def make(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, list[int]]],
    output: int,
    weights: dict[str, np.ndarray],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, dtype, shape) for name, (dtype, shape) in inputs.items()],
        [helper.make_tensor_value_info("y", output, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def execute(proto: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return np.asarray(exact_session(proto.SerializeToString()).run(None, {"x": x})[0])


def rewritten(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(proto)
    assert RewriteIntegerOps()(model).modified
    return model


def integers(dtype: type, *shape: int) -> np.ndarray:
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max, shape, endpoint=True).astype(dtype)


CONV_INPUTS = {"x": (TensorProto.UINT8, [2, 4, 9, 7])}


@pytest.mark.parametrize("zero_points", [(), ("xz",), ("xz", "wz")])
def test_conv_is_exact(zero_points: tuple[str, ...]) -> None:
    weights = {"w": integers(np.int8, 6, 2, 3, 3), "xz": np.array(131, np.uint8), "wz": np.array(-3, np.int8)}
    node = NODE("ConvInteger", ["x", "w", *zero_points], ["y"], group=2, pads=[1, 2, 0, 1], strides=[2, 1])
    used = {name: array for name, array in weights.items() if name == "w" or name in zero_points}
    proto = make([node], CONV_INPUTS, TensorProto.INT32, used)
    x = integers(np.uint8, 2, 4, 9, 7)
    np.testing.assert_array_equal(execute(ir.to_proto(rewritten(proto)), x), execute(proto, x))


def test_matmul_with_a_zero_point_per_column_is_exact() -> None:
    weights = {"w": integers(np.int8, 32, 5), "xz": np.array(7, np.uint8), "wz": np.array([0, 3, -3, 9, 1], np.int8)}
    node = NODE("MatMulInteger", ["x", "w", "xz", "wz"], ["y"])
    proto = make([node], {"x": (TensorProto.UINT8, [3, 32])}, TensorProto.INT32, weights)
    x = integers(np.uint8, 3, 32)
    np.testing.assert_array_equal(execute(ir.to_proto(rewritten(proto)), x), execute(proto, x))


def dynamic_model() -> onnx.ModelProto:
    """What onnxruntime's dynamic quantization exports for a fully connected layer."""
    nodes = [
        NODE("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        NODE("MatMulInteger", ["xq", "w", "xz", "wz"], ["acc"], name="dense"),
        NODE("Cast", ["acc"], ["f"], to=TensorProto.FLOAT),
        NODE("Mul", ["xs", "ws"], ["scale"]),
        NODE("Mul", ["f", "scale"], ["y"]),
    ]
    weights = {"w": integers(np.int8, 32, 5), "wz": np.zeros((), np.int8), "ws": np.full((), 0.01, np.float32)}
    return make(nodes, {"x": (TensorProto.FLOAT, [3, 32])}, TensorProto.FLOAT, weights)


def test_dynamic_quantization_stays_in_float_and_exact() -> None:
    proto = dynamic_model()
    model = rewritten(proto)
    assert [node.op_type for node in model.graph] == [
        "DynamicQuantizeLinear",
        "DequantizeLinear",
        "DequantizeLinear",
        "MatMul",
        "Mul",
        "Mul",
    ]
    x = rng.normal(size=(3, 32)).astype(np.float32)
    np.testing.assert_array_equal(execute(ir.to_proto(model), x), execute(proto, x))


def test_an_integer_reader_beside_the_float_one_keeps_its_cast() -> None:
    proto = dynamic_model()
    proto.graph.node.append(NODE("Abs", ["acc"], ["other"]))
    proto.graph.output.append(helper.make_tensor_value_info("other", TensorProto.INT32, None))
    model = rewritten(proto)
    (cast,) = [node for node in model.graph if node.op_type == "Cast"]
    assert [reader.op_type for reader in (use.node for use in cast.outputs[0].uses())] == ["Abs"]
    x = rng.normal(size=(3, 32)).astype(np.float32)
    np.testing.assert_array_equal(execute(ir.to_proto(model), x), execute(proto, x))


def test_a_second_run_changes_nothing() -> None:
    model = rewritten(dynamic_model())
    before = ir.to_proto(model).SerializeToString()
    assert not RewriteIntegerOps()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_several_zero_points_computed_at_run_time_are_refused() -> None:
    inputs = {"x": (TensorProto.UINT8, [3, 32]), "xz": (TensorProto.UINT8, [3])}
    node = NODE("MatMulInteger", ["x", "w", "xz"], ["y"], name="dense")
    proto = make([node], inputs, TensorProto.INT32, {"w": integers(np.int8, 32, 5)})
    with pytest.raises(QCompilerError, match=r"'dense'.*several zero points"):
        RewriteIntegerOps()(ir.from_proto(proto))
