"""Regions on the CPU: what goes into a product's epilogue, and float maps with channels last."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends.base import Kernel, host_code
from qcompiler.backends.cpu_region import lower_region
from qcompiler.compile import place
from qcompiler.graph import value_name
from qcompiler.importer import import_onnx
from qcompiler.integer.reference import execute
from qcompiler.options import Options
from qcompiler.target import Target
from qcompiler.target_loader import load_target

HOST = load_target("x86-cpu")


class Net:
    """An ONNX model put together node by node."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: str, **attributes: int | float | str | list[int]) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        node = helper.make_node(op, list(inputs), [name], name)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return name

    def constant(self, *shape: int, scale: float = 0.3) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(
            numpy_helper.from_array((self.random.standard_normal(shape) * scale).astype(np.float32), name)
        )
        return name

    def conv(self, x: str, inputs: int, outputs: int, kernel: int = 1, **attributes: int | list[int]) -> str:
        group = attributes.get("group", 1)
        assert isinstance(group, int)
        weights = self.constant(outputs, inputs // group, kernel, kernel)
        return self.add("Conv", x, weights, self.constant(outputs), **{"pads": [kernel // 2] * 4, **attributes})

    def save(self, path: Path, shapes: Sequence[Sequence[int]], outputs: Sequence[str]) -> Path:
        inputs = [
            helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, list(shape)) for i, shape in enumerate(shapes)
        ]
        made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", inputs, made, self.weights)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return path

    def feeds(self, shapes: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        return {f"x{i}": self.random.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}


def step_names(model: ir.Model, target: Target = HOST) -> list[str]:
    steps = lower_region(tuple(model.graph), host_code(target.host))
    return [step.name for step in steps if isinstance(step.lowering, Kernel)]


def check_float(net: Net, shapes, outputs, run, folder: Path, target: Target = HOST) -> list[str]:
    """Compare with onnxruntime; the steps' names."""
    path = net.save(folder / "net.onnx", shapes, outputs)
    feeds = net.feeds(shapes)
    expected = onnxruntime.InferenceSession(path).run(None, feeds)
    model = import_onnx(path, {})
    for wanted, array in zip(expected, run(model, target, feeds, folder), strict=True):
        assert isinstance(wanted, np.ndarray)
        assert array.shape == wanted.shape
        np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    return step_names(model, target)


@pytest.mark.parametrize("target", ["x86-cpu", "x86-avx2"])
@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_residual_network_in_float(run_on_cpu, tmp_path, target: str) -> None:
    net, shapes = Net(0), [(2, 3, 19, 23)]
    first = net.add("Relu", net.conv("x0", 3, 32, 3, strides=[2, 2]))
    pooled = net.add("MaxPool", first, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    inner = net.add("Relu", net.conv(pooled, 32, 32, 3))
    shortcut = net.conv(pooled, 32, 48)
    merged = net.add("Relu", net.add("Add", net.conv(inner, 32, 48, 3), shortcut))
    mean = net.add("Flatten", net.add("GlobalAveragePool", merged))
    out = net.add("Gemm", mean, net.constant(48, 10), net.constant(10))
    names = check_float(net, shapes, [out], run_on_cpu, tmp_path, load_target(target))
    assert "Conv_Add_Relu" in names
    assert names.count("Transpose") == 1  # of the input; the mean has one pixel


@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_every_kind_of_product_and_map_in_float(run_on_cpu, tmp_path) -> None:
    net, shapes = Net(1), [(1, 5, 11, 13), (1, 24, 11, 13)]
    wide = net.conv("x0", 5, 24, 3)
    silu = net.add("Mul", wide, net.add("Sigmoid", wide))
    deep = net.add("Clip", net.conv(silu, 24, 24, 5, group=24, dilations=[2, 2], pads=[4, 4, 4, 4]), *_bounds(net))
    grouped = net.conv(net.add("Add", deep, "x1"), 24, 12, 3, group=3)
    scaled = net.add("Add", net.add("Mul", grouped, net.constant(12, 1, 1)), net.constant(1, 12, 1, 1))
    transposed = net.add(
        "ConvTranspose", scaled, net.constant(12, 7, 3, 3), net.constant(7), strides=[2, 2], pads=[1, 1, 1, 1]
    )
    joined = net.add("Concat", transposed, transposed, axis=1)
    average = net.add("AveragePool", joined, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1])
    rows = net.add("MatMul", net.add("Softmax", average, axis=1), net.constant(13, 9))
    pieces = net.add("Transpose", average, perm=[0, 2, 3, 1])
    top = net.add("GlobalMaxPool", net.add("Tanh", joined))
    outputs = [rows, pieces, top, grouped, wide]
    names = check_float(net, shapes, outputs, run_on_cpu, tmp_path)
    assert "Conv_Sigmoid_Mul" not in names  # another reads the convolution's result
    assert "Conv_Clip" not in names or "Conv_Clip_Add" in names
    assert "ConvTranspose" in names


def _bounds(net: Net) -> tuple[str, str]:
    net.weights += [numpy_helper.from_array(np.array(bound, np.float32), f"bound{bound}") for bound in (-1, 6)]
    return "bound-1", "bound6"


def test_activation_of_two_operators_goes_into_the_epilogue(run_on_cpu, tmp_path) -> None:
    net, shapes = Net(2), [(1, 4, 9, 9)]
    conv = net.conv("x0", 4, 20, 3)
    out = net.add("Mul", conv, net.add("Sigmoid", conv))
    assert check_float(net, shapes, [out], run_on_cpu, tmp_path) == ["Transpose", "Conv_Sigmoid_Mul", "Transpose"]


def test_float_weights_that_are_no_constants_keep_the_plain_code(run_on_cpu, tmp_path) -> None:
    net, shapes = Net(3), [(1, 4, 9, 9), (6, 4, 3, 3)]
    out = net.add("Relu", net.add("Conv", "x0", "x1"))
    assert check_float(net, shapes, [out], run_on_cpu, tmp_path) == ["Conv", "Relu"]


# --- integers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "size"), [(16, (7, 9)), (48, (14, 14)), (24, (8, 8)), (20, (8, 8))])
def test_addition_in_the_epilogue_is_exact(run_on_cpu, tmp_path, channels: int, size) -> None:
    net, shapes = Net(channels), [(1, channels, *size)]
    first = net.add("Relu", net.conv("x0", channels, channels, 3))
    added = net.add("Relu", net.add("Add", net.conv(first, channels, channels, 3), first))
    deep = net.conv(added, channels, channels, 3, group=channels)
    features = net.add("Flatten", net.add("GlobalAveragePool", net.conv(net.add("Add", added, deep), channels, 40)))
    out = net.add("Gemm", features, net.constant(40, 10), net.constant(10))
    path = net.save(tmp_path / "net.onnx", shapes, [out])
    placed = place(path, "x86-cpu", Options())
    feeds = net.feeds(shapes)
    expected = execute(placed.integer, feeds)
    names = step_names(placed.integer)
    (output,) = run_on_cpu(placed.integer, HOST, feeds, tmp_path)
    (value,) = placed.integer.graph.outputs
    np.testing.assert_array_equal(output, expected[value_name(value)])
    # Depthwise convolutions take additions whatever the number of channels, others if it fills vectors.
    fused = channels % (host_code(HOST.host).vector_bytes // 4) == 0
    assert names.count("QConv_QAdd") == (2 if fused else 1)
    assert names[-1] == "QGemm_DequantizeLinear"


def test_what_others_read_stays_outside_the_epilogue(run_on_cpu, tmp_path) -> None:
    net, shapes = Net(5), [(1, 16, 6, 6)]
    first = net.conv("x0", 16, 16, 3)
    added = net.add("Add", net.conv(first, 16, 16, 3), first)
    path = net.save(tmp_path / "net.onnx", shapes, [net.conv(added, 16, 16), net.conv(first, 16, 16)])
    placed = place(path, "x86-cpu", Options())
    names = step_names(placed.integer)
    assert names.count("QConv_QAdd") == 1 and names.count("QConv") == 3
    feeds = net.feeds(shapes)
    expected = execute(placed.integer, feeds)
    outputs = run_on_cpu(placed.integer, HOST, feeds, tmp_path)
    for value, output in zip(placed.integer.graph.outputs, outputs, strict=True):
        np.testing.assert_array_equal(output, expected[value_name(value)])


def test_a_float_layer_among_integers_costs_no_transpose(run_on_cpu, tmp_path) -> None:
    net, shapes = Net(6), [(1, 16, 12, 11)]
    first = net.add("Relu", net.conv("x0", 16, 32, 3))
    middle = net.conv(net.add("Relu", net.conv(first, 32, 32, 3)), 32, 32, 3)
    out = net.conv(net.add("Add", net.add("Relu", middle), first), 32, 16)
    path = net.save(tmp_path / "net.onnx", shapes, [out])
    placed = place(path, "x86-cpu", Options(keep_float=[middle]))
    names = step_names(placed.integer)
    assert names == [
        "QuantizeLinear", "Transpose", "QConv", "QConv", "DequantizeLinear", "Conv_Relu_QuantizeLinear_QAdd", "QConv",
        "DequantizeLinear", "Transpose",
    ]  # fmt: skip
    feeds = net.feeds(shapes)
    (expected,) = execute(placed.integer, feeds).values()
    (output,) = run_on_cpu(placed.integer, HOST, feeds, tmp_path)
    # Sums of floats in another order may round a value in the middle to its neighbour.
    assert np.mean(np.abs(output - expected) > 1e-6) < 0.02
    assert np.abs(output - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_gates_on_maps_of_integers_are_exact(run_on_cpu, tmp_path) -> None:
    net, shapes = Net(7), [(1, 16, 8, 8)]
    wide = net.conv("x0", 16, 32, 3)
    gated = net.add("Mul", net.conv(wide, 32, 32, 3), wide)
    out = net.conv(gated, 32, 16)
    path = net.save(tmp_path / "net.onnx", shapes, [out])
    placed = place(path, "x86-cpu", Options())
    assert "QConv_QMul" in step_names(placed.integer)
    feeds = net.feeds(shapes)
    (expected,) = execute(placed.integer, feeds).values()
    (output,) = run_on_cpu(placed.integer, HOST, feeds, tmp_path)
    np.testing.assert_array_equal(output, expected)
