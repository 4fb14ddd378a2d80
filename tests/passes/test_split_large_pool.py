import pytest

from qcompiler.passes.split_large_pool import SplitLargePool

LIMITED = {"ops": ["AveragePool", "MaxPool"], "where": {"kernel_area": "<= 64"}}


def _pools(net, size, kernel, strides):
    n = net()
    x = n.input(1, 3, *size)
    return n.model(*(n.op(op, x, kernel_shape=kernel, strides=strides) for op in ("AveragePool", "MaxPool")))


@pytest.fixture
def large(net):
    return _pools(net, (24, 50), [12, 12], [12, 12])


def test_structure(large, target_with, apply):
    after = apply(large, SplitLargePool(target_with(LIMITED)))
    assert sorted(after.op_types) == ["AveragePool"] * 2 + ["MaxPool"] * 2
    for node in after.model.graph:
        height, width = node.attributes["kernel_shape"].as_ints()
        assert height * width <= 64


def test_numerics(large, net, target_with, apply):
    target = target_with(LIMITED)
    assert apply(large, SplitLargePool(target)).largest_error() < 1e-6
    everything = _pools(net, (49, 10), [49, 10], [1, 1])  # one window; needs three pools
    assert apply(everything, SplitLargePool(target)).largest_error() < 1e-6
    overlapping = _pools(net, (30, 30), [12, 12], [6, 4])
    after = apply(overlapping, SplitLargePool(target))
    assert len(after.op_types) == 4 and after.largest_error() < 1e-6


def test_no_chain_is_left_half_taken(net, target_with, assert_refused):
    """22 = 2 * 11, and 11 is beyond the limit whichever way the window is cut."""
    limit = {"ops": ["AveragePool", "MaxPool"], "where": {"kernel_h": "<= 8"}}
    assert_refused(_pools(net, (44, 8), [22, 2], [22, 2]), SplitLargePool(target_with(limit)))


def test_a_maximum_in_a_qdq_graph_splits(net, target_with, apply):
    n = net()
    model = n.model(n.qdq(n.op("MaxPool", n.qdq(n.input(1, 2, 20, 20)), kernel_shape=[10, 10], strides=[10, 10])))
    after = apply(model, SplitLargePool(target_with(LIMITED)))
    assert after.op_types.count("MaxPool") == 2 and after.largest_error() == 0


def test_fixpoint(large, target_with, assert_settled):
    assert_settled(large, SplitLargePool(target_with(LIMITED)))


def test_refusal(net, large, target_with, cpu_target, assert_refused):
    target = target_with(LIMITED)
    assert_refused(
        _pools(net, (13, 13), [13, 13], [1, 1]),
        SplitLargePool(target_with({"ops": ["MaxPool", "AveragePool"], "where": {"kernel_h": "<= 8"}})),
    )
    assert_refused(_pools(net, (16, 16), [8, 8], [1, 1]), SplitLargePool(target))  # small enough
    assert_refused(_pools(net, (30, 30), [12, 12], [5, 7]), SplitLargePool(target))  # windows overlap unevenly
    assert_refused(large, SplitLargePool(cpu_target))
    n = net()
    padded = n.op("AveragePool", n.input(1, 2, 20, 20), kernel_shape=[10, 10], strides=[10, 10], pads=[1, 0, 0, 0])
    quantized = n.qdq(n.op("AveragePool", n.qdq(n.input(1, 2, 20, 20)), kernel_shape=[10, 10], strides=[10, 10]))
    assert_refused(n.model(padded, quantized), SplitLargePool(target))
