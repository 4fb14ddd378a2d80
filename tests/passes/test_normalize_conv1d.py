import pytest

from qcompiler.graph import shape_of
from qcompiler.passes.normalize_conv1d import NormalizeConv1d


@pytest.fixture
def flat(net):
    n = net()
    x = n.input(2, 4, 19)
    y = n.op("Conv", x, n.weight(6, 2, 3), n.weight(6), group=2, pads=[2, 1], strides=[2], dilations=[2])
    y = n.op("MaxPool", y, kernel_shape=[3], strides=[2], pads=[1, 0])
    y = n.op("ConvTranspose", y, n.weight(6, 2, 4), strides=[3], output_padding=[1], pads=[1, 1])
    return n.model(n.op("AveragePool", y, kernel_shape=[2], pads=[1, 1], count_include_pad=1))


@pytest.fixture
def quantized(net):
    n = net()
    y = n.op("Conv", n.qdq(n.input(1, 4, 11)), n.int8_weight(6, 4, 5, axis=0), n.int32_bias(6))
    return n.model(n.op("ConvTranspose", n.qdq(y), n.int8_weight(6, 3, 2, axis=1)))


def test_structure(flat, quantized, apply):
    after = apply(flat, NormalizeConv1d())
    for node in after.model.graph:
        assert node.op_type == "Reshape" or len(shape_of(node.outputs[0])) == 4
    assert after.the("Conv").attributes["pads"].as_ints() == (0, 2, 0, 1)
    assert after.array(after.the("Conv").inputs[1]).shape == (6, 2, 1, 3)
    after = apply(quantized, NormalizeConv1d())
    assert after.array(after.the("ConvTranspose").inputs[1].producer().inputs[0]).shape == (6, 3, 1, 2)


def test_numerics(flat, quantized, apply):
    assert apply(flat, NormalizeConv1d()).largest_error() < 1e-6
    assert apply(quantized, NormalizeConv1d()).largest_error() < 1e-6


def test_fixpoint(flat, quantized, assert_settled):
    assert_settled(flat, NormalizeConv1d())
    assert_settled(quantized, NormalizeConv1d())


def test_refusal(net, assert_refused):
    n = net()
    two_d = n.op("Conv", n.input(1, 2, 5, 5), n.weight(2, 2, 3, 3))
    run_time = n.op("Conv", n.input(1, 2, 9), n.op("Relu", n.input(3, 2, 3)))
    with_indices = n.ops("MaxPool", n.input(1, 2, 9), outputs=2, kernel_shape=[2])
    assert_refused(n.model(two_d, run_time, *with_indices), NormalizeConv1d())
