import numpy as np
import pytest

from qcompiler.passes.normalize_pool import NormalizePool


def _axes(n, *axes):
    return n.const(axes, np.int64)


@pytest.fixture
def pools(net):
    n = net()
    x = n.input(2, 3, 5, 7)
    return n.model(
        n.op("GlobalAveragePool", x),
        n.op("GlobalMaxPool", x),
        n.op("ReduceMean", x, _axes(n, -2, -1), keepdims=0),
        n.op("ReduceMean", x, _axes(n, 3)),
        n.op("ReduceMax", x, _axes(n, 3, 2), keepdims=0),
        n.op("GlobalAveragePool", n.input(2, 3, 9)),
    )


@pytest.fixture
def ceiled(net):
    """Windows that hang over, and windows that do not."""
    n = net()
    x = n.input(1, 2, 8, 9)
    common = {"ceil_mode": 1, "strides": [2, 2]}
    return n.model(
        n.op("MaxPool", x, kernel_shape=[3, 3], **common),
        n.op("MaxPool", x, kernel_shape=[2, 3], pads=[0, 1, 0, 1], **common),
        n.op("AveragePool", x, kernel_shape=[3, 3], pads=[1, 0, 0, 0], **common),
        n.op("AveragePool", x, kernel_shape=[2, 3], count_include_pad=1, **common),
    )


def test_structure(pools, ceiled, apply):
    after = apply(pools, NormalizePool())
    kinds = [kind for kind in after.op_types if kind != "Reshape"]
    assert kinds == ["AveragePool", "MaxPool", "AveragePool", "AveragePool", "MaxPool", "AveragePool"]
    windows = [node.attributes["kernel_shape"].as_ints() for node in after.model.graph if node.op_type != "Reshape"]
    assert windows == [(5, 7), (5, 7), (5, 7), (1, 7), (5, 7), (1, 9)]
    after = apply(ceiled, NormalizePool())
    assert {node.attributes["ceil_mode"].as_int() for node in after.model.graph} == {0}
    assert after.model.graph[0].attributes["pads"].as_ints() == (0, 0, 1, 0)


def test_numerics(pools, ceiled, apply):
    assert apply(pools, NormalizePool()).largest_error() < 1e-6
    assert apply(ceiled, NormalizePool()).largest_error() < 1e-6


def test_fixpoint(pools, ceiled, assert_settled):
    assert_settled(pools, NormalizePool())
    assert_settled(ceiled, NormalizePool())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(2, 3, 5, 7)
    outputs = [
        n.op("ReduceMean", x, _axes(n, 1, 2)),  # over channels
        n.op("ReduceMean", x, keepdims=0),  # over everything
        n.op("ReduceMean", n.input(4, 6), _axes(n, 1)),  # no feature map
        n.op("ReduceMax", x, _axes(n, 0)),
        n.op("ReduceSum", x, _axes(n, 2, 3)),
        # What hangs over is not counted, padding would be.
        n.op("AveragePool", n.input(1, 1, 6, 6), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, count_include_pad=1),
    ]
    assert_refused(n.model(*outputs), NormalizePool())
