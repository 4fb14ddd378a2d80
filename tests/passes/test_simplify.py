"""The simplification and legalization passes together: composed networks, and every model of the zoo."""

import json
import math

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph import is_op, shape_of
from qcompiler.importer import import_onnx
from qcompiler.pipeline import SIMPLIFY, legalize
from qcompiler.target_loader import load_target

TARGETS = ("ethos-u55-128", "systolic-npu", "x86-plain")

ZOO = {
    "ad01_autoencoder": {"Gemm", "Relu"},
    "fastestdet_352": {
        "Conv", "Relu", "MaxPool", "Concat", "Slice", "Resize", "AveragePool", "Add", "Sigmoid", "Transpose", "Softmax",
    },
    "kws_dscnn": {"Conv", "Relu", "AveragePool", "Reshape", "Gemm", "Softmax"},
    "kws_dscnn_tflite_int8_qdq": {"Reshape", "Conv", "Relu", "AveragePool", "Gemm", "Softmax"},
    "mnist_cnn": {"Conv", "Relu", "MaxPool", "Reshape", "Gemm"},
    "mobilenet_v1_025_128": {"Conv", "Clip", "AveragePool", "Reshape", "Softmax"},
    "mobilenet_v1_025_128_tflite_qat_qdq": {"Transpose", "Conv", "Clip", "AveragePool", "Reshape", "Softmax"},
    "resnet20_cifar10": {"Conv", "Relu", "Add", "Slice", "Pad", "AveragePool", "Reshape", "Gemm"},
    "resnet8_cifar10": {"Conv", "Relu", "Add", "AveragePool", "Reshape", "Gemm", "Softmax"},
    "resnet8_tflite_int8_qdq": {"Transpose", "Conv", "Relu", "Add", "AveragePool", "Reshape", "Gemm", "Softmax"},
    "squeezenet11": {"Conv", "Relu", "MaxPool", "Concat", "AveragePool", "Reshape", "Softmax"},
    "ultraface_slim_320": {
        "Conv", "Relu", "Transpose", "Reshape", "Concat", "Slice", "Mul", "Exp", "Add", "Sub", "Softmax",
    },
}  # fmt: skip
"""The operators each model is left with, Q and DQ aside."""


def _together(passes) -> ir.passes.Sequential:
    return ir.passes.Sequential(*passes)


def _kinds(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph} - {"QuantizeLinear", "DequantizeLinear"}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(zoo, name, apply):
    entry = next(entry for entry in json.loads((zoo / "manifest.json").read_text())["models"] if entry["name"] == name)
    model = import_onnx(zoo / entry["model"], {entry["input"]["name"]: tuple(entry["input"]["shape"])})
    after = apply(model, _together(SIMPLIFY))
    assert _kinds(model) == ZOO[name]
    assert after.largest_error() < (1e-6 if "qdq" in name else 1e-5)


@pytest.fixture
def conv1d_net(net):
    """Convolutions over time, with BatchNormalization, residual addition and a global pool."""
    n = net()

    def norm(x, channels):
        parameters = [n.weight(channels) for _ in range(3)]
        return n.op("BatchNormalization", x, *parameters, n.const(n.rng.uniform(0.5, 2, channels)))

    y = n.op("Relu", norm(n.op("Conv", n.input(1, 4, 33), n.weight(8, 4, 5), pads=[2, 2], strides=[2]), 8))
    z = n.op(
        "Clip", norm(n.op("Conv", y, n.weight(8, 1, 3), group=8, auto_pad="SAME_UPPER"), 8), n.const(0), n.const(6)
    )
    y = n.op("Relu", n.op("Add", y, norm(n.op("Conv", z, n.weight(8, 8, 1)), 8)))
    y = n.op("Flatten", n.op("GlobalAveragePool", y))
    return n.model(n.op("Add", n.op("MatMul", y, n.weight(8, 5)), n.weight(5)))


@pytest.fixture
def transformer(net):
    """One encoder block: attention of two heads, LayerNormalization, and a Gelu written out."""
    n = net()

    def linear(x, rows, cols):
        return n.op("Add", n.op("MatMul", x, n.weight(rows, cols)), n.weight(cols))

    def heads(x, perm):
        return n.op("Transpose", n.op("Reshape", x, n.const([1, 6, 2, 4], np.int64)), perm=perm)

    x = n.input(1, 6, 8)
    q, k, v = (heads(linear(x, 8, 8), perm) for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]))
    scores = n.op("Softmax", n.op("Div", n.op("MatMul", q, k), n.const(2.0)))
    mixed = n.op(
        "Reshape", n.op("Transpose", n.op("MatMul", scores, v), perm=[0, 2, 1, 3]), n.const([1, 6, 8], np.int64)
    )
    y = n.op("LayerNormalization", n.op("Add", x, linear(mixed, 8, 8)), n.weight(8), n.weight(8))
    h = linear(y, 8, 16)
    gate = n.op("Add", n.op("Erf", n.op("Div", h, n.const(math.sqrt(2)))), n.const(1))
    h = n.op("Mul", n.op("Mul", h, gate), n.const(0.5))
    return n.model(n.op("Gather", n.op("Add", y, linear(h, 16, 8)), n.const(0, np.int64), axis=1))


@pytest.fixture
def mobile(net):
    """Squeeze and excitation with hard activations, from a channels-last framework, normalization in front."""
    n = net()
    x = n.op("Div", n.op("Sub", n.input(1, 12, 12, 3), n.const([1, 2, 3])), n.const([2, 4, 5]))
    y = n.op(
        "Conv", n.op("Transpose", x, perm=[0, 3, 1, 2]), n.weight(8, 3, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"
    )
    y = n.op("Add", n.op("Mul", y, n.weight(8, 1, 1)), n.weight(8, 1, 1))
    y = n.op("Mul", y, n.op("Div", n.op("Clip", n.op("Add", y, n.const(3)), n.const(0), n.const(6)), n.const(6)))
    squeezed = n.op("ReduceMean", y, n.const([2, 3], np.int64))
    gate = n.op("HardSigmoid", n.op("Conv", squeezed, n.weight(8, 8, 1, 1)), alpha=1 / 6, beta=0.5)
    y = n.op("Conv", n.op("Mul", y, gate), n.weight(8, 4, 3, 3), group=2, dilations=[3, 3], pads=[3] * 4)
    return n.model(n.op("ConvTranspose", y, n.weight(8, 2, 2, 2), strides=[2, 2]))


def test_conv1d_net(conv1d_net, apply):
    after = apply(conv1d_net, _together(SIMPLIFY))
    # Every BatchNormalization is folded; Reshapes are left at the input, around the sum, and at the end.
    assert _kinds(conv1d_net) == {"Conv", "Relu", "Clip", "Add", "AveragePool", "Gemm", "Reshape"}
    assert after.largest_error() < 1e-5
    for node in conv1d_net.graph:
        assert not is_op(node, "Conv", "AveragePool") or len(shape_of(node.outputs[0])) == 4


def test_transformer(transformer, apply):
    after = apply(transformer, _together(SIMPLIFY))
    assert {"Gelu", "Gemm", "MatMul", "LayerNormalization", "Slice"} <= _kinds(transformer)
    assert not {"Erf", "Div", "Gather"} & _kinds(transformer)
    assert after.op_types.count("Gemm") == 6
    assert after.largest_error() < 1e-5


@pytest.mark.parametrize("name", TARGETS)
def test_mobile_is_legalized(mobile, apply, name):
    target = load_target(name)
    after = apply(mobile, _together((*SIMPLIFY, *legalize(target))))
    assert "HardSwish" in _kinds(mobile) or "Clip" in _kinds(mobile)
    assert after.largest_error() < 1e-5
    if target.npu is not None:
        convs = [node for node in mobile.graph if is_op(node, "Conv")]
        assert all(node.attributes.get_int("group", 1) == 1 for node in convs)
