"""Emitted TFLite in LiteRT's reference kernels, bit for bit."""

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="the extra 'ethosu' is not installed")

from ai_edge_litert.interpreter import Interpreter, OpResolverType

from qcompiler.compile import EIGHT_BITS
from qcompiler.emit.tflite import tflite_of
from qcompiler.errors import QCompilerError
from qcompiler.quant.types import WeightRequest

FEEDS = 4


def run_tflite(network: bytes, feeds: list[np.ndarray]) -> list[np.ndarray]:
    interpreter = Interpreter(model_content=network, experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    for detail, array in zip(interpreter.get_input_details(), feeds, strict=True):
        interpreter.set_tensor(detail["index"], array)
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]


SIXTEEN = WeightRequest(activations="int16")


@pytest.fixture(params=[EIGHT_BITS, SIXTEEN], ids=["8", "16"])
def check(realized, request) -> Callable[..., list[str]]:
    """Compare a network's region with its TFLite on several inputs; returns the operators of the region.

    With 8- and with 16-bit activations.
    """

    def compare(network, *outputs: str, varied: bool = True) -> list[str]:
        made = realized(network, *outputs, formats=request.param)
        emitted = tflite_of(made.region)
        assert emitted == tflite_of(made.region), "two emissions differ"
        for seed in range(FEEDS):
            feeds = made.feeds(seed)
            for want, got in zip(made.run(feeds), run_tflite(emitted, feeds), strict=True):
                assert want.dtype == got.dtype == (np.int16 if request.param is SIXTEEN else got.dtype)
                np.testing.assert_array_equal(got, want)
                assert not varied or len(np.unique(want)) > 1, "a constant result proves nothing"
        return made.op_types

    return compare


eight_bits = pytest.mark.parametrize("check", [EIGHT_BITS], ids=["8"], indirect=True)

CONVOLUTIONS = {
    "valid": (8, 12, (3, 3), {}),
    "same": (5, 7, (3, 3), {"pads": [1, 1, 1, 1]}),
    "same, even kernel": (4, 6, (2, 4), {"pads": [0, 1, 1, 2]}),
    "neither": (3, 8, (3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "lopsided": (3, 8, (5, 3), {"pads": [4, 0, 1, 2]}),
    "strides": (6, 5, (3, 2), {"strides": [3, 2]}),
    "dilated": (4, 4, (3, 3), {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    "depthwise": (9, 9, (3, 3), {"pads": [1, 1, 1, 1], "group": 9}),
    "depthwise, strided": (9, 9, (5, 5), {"pads": [2, 2, 2, 2], "group": 9, "strides": [2, 2]}),
    "depthwise, two each": (6, 12, (3, 3), {"pads": [1, 1, 1, 1], "group": 6}),
    "one channel": (1, 5, (3, 3), {"pads": [1, 1, 1, 1]}),
    "one output": (7, 6, (12, 10), {"strides": [2, 2]}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("activation", ["", "Relu", "Relu6", "Clip"])
def test_convolutions(net, check, case, activation):
    inputs, outputs, kernel, attributes = CONVOLUTIONS[case]
    network = net(len(case))
    y = network.conv(network.input(1, inputs, 13, 11), inputs, outputs, kernel, **attributes)
    if activation == "Relu":
        y = network.op("Relu", y)
    elif activation:
        bounds = (0.0, 6.0) if activation == "Relu6" else (-0.7, 0.9)
        y = network.op("Clip", y, *(network.const(bound) for bound in bounds))
    # A single pixel behind a tight clamp may well be constant.
    assert "QConv" in check(network, y, varied=case != "one output")


def test_several_rows_through_a_dense_layer(net, check):
    network = net(3)
    y = network.op("Gemm", network.input(7, 40), network.weight(40, 23), network.weight(23))
    assert check(network, network.op("Relu", y)) == ["QGemm"]


def test_a_dense_layer_has_the_weights_that_layout_permuted(net, check):
    network = net(4)
    x = network.conv(network.input(1, 3, 6, 5), 3, 8, (3, 3))
    flat = network.op("Flatten", x)
    assert "QGemm" in check(network, network.op("Gemm", flat, network.weight(96, 10), network.weight(10)))


@pytest.mark.parametrize("function", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("other", [(1, 6, 9, 5), (1, 6, 1, 1)])
def test_arithmetic_of_two_tensors(net, check, function, other):
    network = net(5)
    # Of different ranges, so that both operands are rescaled.
    a = network.conv(network.input(1, 4, 9, 5), 4, 6, (1, 1))
    b = network.conv(network.input(*other), 6, 6, (1, 1))
    y = network.conv(network.op("Relu", network.op(function, a, b)), 6, 3, (1, 1))
    assert f"Q{'Mul' if function == 'Mul' else 'Add'}" in check(network, y)


@pytest.mark.parametrize("function", ["Add", "Mul"])
def test_arithmetic_with_constants(net, check, function):
    network = net(6)
    x = network.input(1, 6, 9, 5)
    y = network.op(function, x, network.const(network.rng.normal(0, 1, (1, 6, 9, 5))))
    assert f"Q{function}" in check(network, network.conv(network.op("Relu", y), 6, 4, (1, 1)))


POOLS = {
    "max": ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
    "max, same": ("MaxPool", {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1, 1, 1, 1]}),
    "max, padded": ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "max, ceil": ("MaxPool", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    "average": ("AveragePool", {"kernel_shape": [3, 2], "strides": [2, 2]}),
    "average, counted": (
        "AveragePool",
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    ),
    "global": ("GlobalAveragePool", {}),
}


@pytest.mark.parametrize("case", POOLS)
def test_pools(net, check, case):
    op_type, attributes = POOLS[case]
    network = net(7)
    x = network.conv(network.input(1, 5, 12, 14), 5, 9, (1, 1))
    op_types = check(network, network.op(op_type, x, **attributes))
    assert {"QMaxPool", "QAveragePool", "QReduceMean"} & set(op_types)


@pytest.mark.parametrize(("shape", "axes"), [((2, 6, 5, 3), [2, 3]), ((4, 9, 7), [1]), ((3, 50), [1])])
def test_means(net, check, shape, axes):
    network = net(8)
    y = network.op("ReduceMean", network.input(*shape), axes=axes, keepdims=0)
    assert {"QReduceMean", "QAveragePool"} & set(check(network, y))


@pytest.mark.parametrize("width", [2, 10, 400])
def test_softmax(net, check, width):
    network = net(9)
    # Many rows, so that their sums meet every entry of the reciprocals' table.
    y = network.op("Gemm", network.input(1000, 16), network.weight(16, width), network.weight(width))
    assert check(network, network.op("Softmax", y, axis=1))[-1] == "QSoftmax"


GAINS = [(function, gain) for function in ("Sigmoid", "Tanh", "HardSwish") for gain in (0.3, 3.0)]


@pytest.mark.parametrize(("function", "gain"), [*GAINS, ("Exp", 0.3)])
def test_tables(net, check, function, gain):
    """A sigmoid of the full range of 8 bits is LOGISTIC, everything else a table of its own."""
    network = net(10)
    x = network.op("Mul", network.input(1, 4, 5, 5), network.const(gain))
    y = network.op("Mul", x, network.op("HardSigmoid", x)) if function == "HardSwish" else network.op(function, x)
    assert "QLookup" in check(network, network.conv(y, 4, 6, (1, 1)))


def test_data_movement(net, check):
    network = net(11)
    x = network.conv(network.input(1, 4, 8, 10), 4, 8, (3, 3), pads=[1, 1, 1, 1])
    starts, ends, axes = (network.const(numbers, "int64") for numbers in ([0, 1], [8, 9], [1, 3]))
    every = network.op("Slice", x, starts, ends, axes, network.const([2, 2], "int64"))
    odd = network.op("Slice", x, *(network.const(numbers, "int64") for numbers in ([1], [8], [1], [2])))
    padded = network.op("Pad", odd, network.const([0, 0, 1, 2, 0, 0, 3, 0], "int64"))
    resized = network.op(
        "Resize", every, "", network.const([1, 1, 2, 2]), mode="nearest", nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )  # fmt: skip
    joined = network.op("Concat", padded, network.op("Relu", network.conv(padded, 4, 3, (1, 1))), axis=1)
    flat = network.op("Reshape", joined, network.const([7, 12, 12], "int64"))
    moved = network.op("Unsqueeze", network.op("Transpose", flat, perm=[2, 0, 1]), network.const([0], "int64"))
    op_types = check(network, network.conv(moved, 12, 3, (1, 1)), network.conv(resized, 4, 3, (3, 3)))
    assert {"Slice", "Pad", "Concat", "QResizeNearest"} <= set(op_types), op_types


@pytest.mark.parametrize(("strides", "pads"), [([2, 2], [0, 0, 0, 0]), ([2, 1], [1, 0, 1, 1]), ([1, 2], [2, 1, 0, 1])])
def test_transposed_convolutions(net, check, strides, pads):
    network = net(12)
    x = network.input(1, 5, 6, 7)
    y = network.op("ConvTranspose", x, network.weight(5, 4, 3, 3), network.weight(4), strides=strides, pads=pads)
    assert "QConvTranspose" in check(network, network.op("Relu", y))


@eight_bits
def test_products_of_two_tensors(net, check):
    network = net(13)
    a, b = network.input(2, 3, 6, 8), network.input(2, 3, 8, 5)
    assert "QMatMul" in check(network, network.op("MatMul", a, b))


REFUSED = {
    "average over fewer elements at the border": (
        "AveragePool",
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
        "windows at the border average fewer elements",
    ),
    "pool with gaps": ("MaxPool", {"kernel_shape": [3, 3], "dilations": [2, 2]}, "no dilation"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_tflite_computes_otherwise(net, realized, case):
    op_type, attributes, reason = REFUSED[case]
    network = net(14)
    x = network.conv(network.input(1, 3, 9, 9), 3, 4, (1, 1))
    made = realized(network, network.op(op_type, x, **attributes))
    with pytest.raises(QCompilerError, match=reason):
        tflite_of(made.region)


def test_refuses_bilinear_interpolation(net, realized):
    network = net(15)
    x = network.conv(network.input(1, 3, 5, 5), 3, 4, (1, 1))
    made = realized(network, network.op("Resize", x, "", network.const([1, 1, 2, 2]), mode="linear"))
    with pytest.raises(QCompilerError, match=r"QResizeLinear.*no such operator"):
        tflite_of(made.region)


def test_refuses_other_arithmetic(net, realized):
    from qcompiler.target_loader import load_target

    chip = load_target("arm-npu")
    chip = chip.model_copy(update={"quantization": chip.quantization.model_copy(update={"requantize": "float32"})})
    network = net(16)
    made = realized(network, network.conv(network.input(1, 3, 5, 5), 3, 4, (1, 1)), chip=chip)
    with pytest.raises(QCompilerError, match="rescales as 'float32'"):
        tflite_of(made.region)
