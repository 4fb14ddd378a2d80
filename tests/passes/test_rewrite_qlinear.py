"""QLinear* and com.microsoft quantized operators against onnxruntime's own kernels."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import QCompilerError
from qcompiler.exact_session import exact_session
from qcompiler.passes.rewrite_qlinear import RewriteQLinear

MS = "com.microsoft"
Attribute = int | float | str | list[int]
DTYPES = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.int8): TensorProto.INT8}


class Case:
    """One operator with random quantized operands, collected input by input."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.weights: dict[str, np.ndarray] = {}
        self.feeds: dict[str, np.ndarray] = {}
        self.inputs: list[str] = []

    def constant(self, array: np.ndarray) -> None:
        self.inputs.append(f"c{len(self.inputs)}")
        self.weights[self.inputs[-1]] = array

    def absent(self) -> None:
        self.inputs.append("")

    def parameters(self, dtype: type, scale: float, *, channels: int = 0, zero_point: int | None = None) -> None:
        """Scale and zero point, of one entry or one per channel."""
        info, shape = np.iinfo(dtype), (channels,) if channels else ()
        self.constant((scale * self.rng.uniform(0.5, 1.5, shape)).astype(np.float32))
        zero = (
            self.rng.integers(info.min // 4, info.max // 4, shape) if zero_point is None else np.full(shape, zero_point)
        )
        self.constant(zero.astype(dtype))

    def values(self, dtype: type, *shape: int) -> np.ndarray:
        info = np.iinfo(dtype)
        return self.rng.integers(info.min, info.max, shape, endpoint=True).astype(dtype)

    def tensor(self, dtype: type, *shape: int) -> None:
        self.inputs.append(f"x{len(self.inputs)}")
        self.feeds[self.inputs[-1]] = self.values(dtype, *shape)

    def activation(self, dtype: type, scale: float, *shape: int, zero_point: int | None = None) -> None:
        self.tensor(dtype, *shape)
        self.parameters(dtype, scale, zero_point=zero_point)

    def model(self, op_type: str, domain: str, output: int, **attributes: Attribute) -> onnx.ModelProto:
        while self.inputs[-1] == "":
            self.inputs.pop()
        node = helper.make_node(op_type, self.inputs, ["y"], name="the_node", domain=domain)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info(name, DTYPES[x.dtype], x.shape) for name, x in self.feeds.items()],
            [helper.make_tensor_value_info("y", output, None)],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)], ir_version=10
        )


def execute(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(exact_session(proto.SerializeToString()).run(None, feeds)[0])


def rewritten(proto: onnx.ModelProto) -> ir.Model:
    model = ir.from_proto(proto)
    assert RewriteQLinear()(model).modified
    return model


def assert_same(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], differing: float = 0.01) -> None:
    """Equal to within one step, exactly in all but a share of the elements; the output must not be saturated flat."""
    expected = execute(proto, feeds)
    got = execute(ir.to_proto(rewritten(proto)), feeds)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    steps = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    if expected.dtype == np.float32:
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
        return
    assert steps.max() <= 1
    assert np.count_nonzero(steps) <= max(1, differing * steps.size)
    assert len(np.unique(expected)) > 8


@pytest.mark.parametrize("x_type", [np.uint8, np.int8])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_conv(x_type: type, per_channel: bool, bias: bool) -> None:
    case = Case(1)
    case.activation(x_type, 0.02, 2, 6, 9, 7)
    case.constant(case.values(np.int8, 8, 3, 3, 2))
    case.parameters(np.int8, 0.01, channels=8 if per_channel else 0, zero_point=0)
    case.parameters(x_type, 0.1)
    if bias:
        case.constant(case.rng.integers(-3000, 3000, 8).astype(np.int32))
    attributes = {"group": 2, "strides": [2, 1], "pads": [1, 0, 1, 1], "dilations": [1, 2]}
    assert_same(case.model("QLinearConv", "", DTYPES[np.dtype(x_type)], **attributes), case.feeds)


def test_conv_with_weight_zero_point() -> None:
    case = Case(2)
    case.activation(np.uint8, 0.02, 1, 3, 8, 8)
    case.constant(case.values(np.uint8, 5, 3, 3, 3))
    case.parameters(np.uint8, 0.01, zero_point=117)
    case.parameters(np.uint8, 0.1)
    assert_same(case.model("QLinearConv", "", TensorProto.UINT8, auto_pad="SAME_UPPER", strides=[2, 2]), case.feeds)


def test_matmul_of_two_activations() -> None:
    case = Case(3)
    case.activation(np.uint8, 0.02, 2, 5, 16, zero_point=131)
    case.activation(np.uint8, 0.02, 2, 16, 9, zero_point=119)
    case.parameters(np.uint8, 0.4, zero_point=128)
    assert_same(case.model("QLinearMatMul", "", TensorProto.UINT8), case.feeds)


def test_matmul_per_column() -> None:
    case = Case(4)
    case.activation(np.uint8, 0.02, 5, 16)
    # Of seven bits: onnxruntime's sums of two products saturate at 16 bits on x86 CPUs without VNNI.
    case.constant(case.values(np.int8, 16, 9) // 2)
    case.parameters(np.int8, 0.01, channels=9, zero_point=0)
    case.parameters(np.uint8, 0.05)
    assert_same(case.model("QLinearMatMul", "", TensorProto.UINT8), case.feeds)


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("float_output", [False, True])
def test_gemm(trans_b: int, float_output: bool) -> None:
    case = Case(5)
    case.activation(np.int8, 0.02, 5, 16)
    case.constant(case.values(np.int8, *((9, 16) if trans_b else (16, 9))))
    case.parameters(np.int8, 0.01, channels=9, zero_point=0)
    case.constant(case.rng.integers(-3000, 3000, 9).astype(np.int32))
    if float_output:
        case.absent()
    else:
        case.parameters(np.int8, 0.05)
    output = TensorProto.FLOAT if float_output else TensorProto.INT8
    assert_same(case.model("QGemm", MS, output, transB=trans_b, alpha=0.5), case.feeds)


@pytest.mark.parametrize("op_type", ["QLinearAdd", "QLinearMul"])
def test_binary(op_type: str) -> None:
    case = Case(6)
    case.activation(np.uint8, 0.02, 2, 5, 16)
    case.activation(np.uint8, 0.03, 5, 1)
    case.parameters(np.uint8, 0.06)
    assert_same(case.model(op_type, MS, TensorProto.UINT8), case.feeds)


UNARY: tuple[tuple[str, float, dict[str, Attribute]], ...] = (
    ("QLinearLeakyRelu", 0.03, {"alpha": 0.25}),
    ("QLinearSigmoid", 1 / 200, {}),
    ("QLinearSoftmax", 1 / 300, {"axis": -1, "opset": 13}),
    ("QLinearSoftmax", 1 / 900, {"axis": 2, "opset": 11}),
    ("QLinearGlobalAveragePool", 0.01, {"channels_last": 0}),
    ("QLinearGlobalAveragePool", 0.01, {"channels_last": 1}),
    ("QLinearAveragePool", 0.02, {"kernel_shape": [3, 2], "strides": [1, 2], "pads": [1, 0, 1, 1]}),
    ("QLinearAveragePool", 0.02, {"kernel_shape": [3, 3], "count_include_pad": 1, "pads": [1, 1, 1, 1]}),
    ("QLinearAveragePool", 0.02, {"kernel_shape": [3, 2], "channels_last": 1}),
)


@pytest.mark.parametrize(("op_type", "scale", "attributes"), UNARY)
def test_unary(op_type: str, scale: float, attributes: dict[str, Attribute]) -> None:
    case = Case(7)
    case.activation(np.uint8, 0.025, 4, 8, 7, 6, zero_point=125)
    case.parameters(np.uint8, scale, zero_point=0 if op_type in ("QLinearSoftmax", "QLinearSigmoid") else 130)
    # onnxruntime's softmax kernel truncates its table of exponentials.
    differing = 0.25 if op_type == "QLinearSoftmax" else 0.01
    assert_same(case.model(op_type, MS, TensorProto.UINT8, **attributes), case.feeds, differing)


def test_concat() -> None:
    case = Case(8)
    case.parameters(np.uint8, 0.03)
    case.activation(np.uint8, 0.02, 2, 3, 5)
    case.activation(np.uint8, 0.04, 2, 4, 5)
    assert_same(case.model("QLinearConcat", MS, TensorProto.UINT8, axis=1), case.feeds)


def test_microsoft_quantize_and_dequantize() -> None:
    case = Case(9)
    case.activation(np.uint8, 0.02, 2, 30)
    assert_same(case.model("DequantizeLinear", MS, TensorProto.FLOAT), case.feeds)


def test_the_form_is_qdq_with_the_weights_still_quantized() -> None:
    case = Case(10)
    case.activation(np.uint8, 0.02, 1, 3, 8, 8)
    case.constant(case.values(np.int8, 4, 3, 3, 3))
    case.parameters(np.int8, 0.01, channels=4, zero_point=0)
    case.parameters(np.uint8, 0.1)
    case.constant(np.arange(4, dtype=np.int32))
    model = rewritten(case.model("QLinearConv", "", TensorProto.UINT8))
    assert [node.op_type for node in model.graph] == [*["DequantizeLinear"] * 3, "Conv", "QuantizeLinear"]
    _, weight, bias, _, quantize = model.graph
    assert weight.attributes["axis"].as_int() == 0
    assert weight.inputs[0] is not None and weight.inputs[0].dtype == ir.DataType.INT8
    x_scale, w_scale = case.weights["c1"], case.weights["c4"]
    assert bias.inputs[1] is not None and bias.inputs[1].const_value is not None
    np.testing.assert_array_equal(bias.inputs[1].const_value.numpy(), x_scale * w_scale)
    assert quantize.outputs[0].name == "y"


def test_a_second_run_changes_nothing() -> None:
    case = Case(11)
    case.activation(np.uint8, 0.02, 2, 5)
    case.parameters(np.uint8, 0.03)
    model = rewritten(case.model("QLinearSigmoid", MS, TensorProto.UINT8))
    before = ir.to_proto(model).SerializeToString()
    assert not RewriteQLinear()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_scales_computed_at_run_time_are_refused() -> None:
    case = Case(12)
    case.activation(np.uint8, 0.02, 2, 5)
    case.parameters(np.uint8, 0.03)
    proto = case.model("QLinearSigmoid", MS, TensorProto.UINT8)
    scale = case.inputs[1]
    kept = [tensor for tensor in proto.graph.initializer if tensor.name != scale]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    proto.graph.input.append(helper.make_tensor_value_info(scale, TensorProto.FLOAT, []))
    with pytest.raises(QCompilerError, match=r"'the_node'.*at run time"):
        RewriteQLinear()(ir.from_proto(proto))


def test_float_operators_are_left_alone() -> None:
    graph = helper.make_graph(
        [helper.make_node("Sigmoid", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
    )
    assert not RewriteQLinear()(ir.from_proto(helper.make_model(graph))).modified
