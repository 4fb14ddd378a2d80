import numpy as np
import pytest

from qcompiler.passes.fold_pad import FoldPad

_SPATIAL = [0, 0, 1, 0, 0, 0, 2, 1]
"""Top 1, bottom 2, right 1 of an NCHW tensor."""


def _pad(n, x, pads, *value, **attributes):
    return n.op("Pad", x, n.const(pads, np.int64), *value, **attributes)


@pytest.fixture
def padded(net):
    n = net()
    x = n.input(1, 3, 8, 9)
    conv = n.op("Conv", _pad(n, x, _SPATIAL), n.weight(4, 3, 3, 3), pads=[1, 1, 0, 0], strides=[2, 2])
    by_axes = n.op("Conv", _pad(n, x, [1, 2], n.const(0.0), n.const([-1], np.int64)), n.weight(4, 3, 3, 3))
    mean = n.op("AveragePool", _pad(n, x, _SPATIAL), kernel_shape=[3, 3], strides=[2, 2])
    more = n.op(
        "AveragePool", _pad(n, x, [0, 0, 1, 1, 0, 0, 1, 1]), kernel_shape=[4, 4], pads=[1] * 4, count_include_pad=1
    )
    low = n.op("MaxPool", _pad(n, x, _SPATIAL, n.const(-np.inf)), kernel_shape=[3, 3])
    zero = n.op("MaxPool", _pad(n, n.op("Relu", x), _SPATIAL), kernel_shape=[3, 3], strides=[2, 2])
    return n.model(conv, by_axes, mean, more, low, zero)


@pytest.fixture
def quantized(net):
    n = net()
    x = _pad(n, n.qdq(n.input(1, 3, 6, 6)), _SPATIAL)
    return n.model(n.op("Conv", x, n.int8_weight(4, 3, 3, 3, axis=0), n.int32_bias(4)))


def test_structure(padded, apply):
    after = apply(padded, FoldPad())
    assert "Pad" not in after.op_types
    pads = [node.attributes["pads"].as_ints() for node in after.model.graph if node.op_type == "Conv"]
    assert pads == [(2, 1, 2, 1), (0, 1, 0, 2)]
    for node in after.model.graph:
        assert node.op_type != "AveragePool" or node.attributes["count_include_pad"].as_int() == 1


def test_numerics(padded, quantized, apply):
    assert apply(padded, FoldPad()).largest_error() < 1e-6
    folded = apply(quantized, FoldPad())
    assert "Pad" not in folded.op_types and folded.largest_error() < 1e-6


def test_fixpoint(padded, quantized, assert_settled):
    assert_settled(padded, FoldPad())
    assert_settled(quantized, FoldPad())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(1, 3, 8, 9)
    window = {"kernel_shape": [3, 3]}
    outputs = [
        n.op("Conv", _pad(n, x, [0, 1, 0, 0, 0, 0, 0, 0]), n.weight(2, 4, 3, 3)),  # channels
        n.op("Conv", _pad(n, x, _SPATIAL, n.const(1.0)), n.weight(2, 3, 3, 3)),
        n.op("Conv", _pad(n, x, _SPATIAL, mode="reflect"), n.weight(2, 3, 3, 3)),
        n.op("Conv", _pad(n, x, [0, 0, -1, 0, 0, 0, 0, 0]), n.weight(2, 3, 3, 3)),  # crops
        n.op("AveragePool", _pad(n, x, _SPATIAL), pads=[1] * 4, **window),  # its own padding is not counted
        n.op("AveragePool", _pad(n, x, [0, 0, 3, 0, 0, 0, 0, 0]), **window),  # a window of padding alone
        n.op("MaxPool", _pad(n, x, _SPATIAL), **window),  # zero may win
    ]
    assert_refused(n.model(*outputs), FoldPad())
