import numpy as np
import pytest

from qcompiler.passes.fold_batch_norm import FoldBatchNorm


def _norm(n, x, channels, **attributes):
    variance = n.const(n.rng.uniform(0.2, 3, channels))
    return n.op(
        "BatchNormalization", x, n.weight(channels), n.weight(channels), n.weight(channels), variance, **attributes
    )


@pytest.fixture
def linear(net):
    n = net()
    y = _norm(n, n.op("Conv", n.input(2, 6, 7, 7), n.weight(8, 3, 3, 3), group=2, pads=[1] * 4), 8, epsilon=1e-2)
    y = _norm(n, n.op("ConvTranspose", y, n.weight(8, 3, 3, 3), n.weight(6), group=2), 6)
    z = _norm(n, n.op("Gemm", n.input(3, 4), n.weight(5, 4), n.weight(5), transB=1), 5)
    return n.model(y, z, _norm(n, n.op("Conv", n.input(1, 2, 9), n.weight(3, 2, 3)), 3))


@pytest.fixture
def alone(net):
    """Behind a Concat, and behind a quantized weight."""
    n = net()
    x = n.input(1, 2, 5, 5)
    y = _norm(n, n.op("Concat", x, n.op("Relu", x), axis=1), 4)
    return n.model(y, _norm(n, n.op("Conv", n.qdq(x), n.int8_weight(3, 2, 1, 1)), 3))


def test_structure(linear, alone, apply):
    assert sorted(apply(linear, FoldBatchNorm()).op_types) == ["Conv", "Conv", "ConvTranspose", "Gemm"]
    after = apply(alone, FoldBatchNorm())
    assert after.op_types.count("Mul") == after.op_types.count("Add") == 2
    assert "BatchNormalization" not in after.op_types


def test_numerics(linear, alone, apply):
    assert apply(linear, FoldBatchNorm()).largest_error() < 1e-5
    assert apply(alone, FoldBatchNorm()).largest_error() < 1e-5


def test_fixpoint(linear, alone, assert_settled):
    assert_settled(linear, FoldBatchNorm())
    assert_settled(alone, FoldBatchNorm())


def test_a_shared_weight_stays_for_its_other_reader(net, apply):
    n = net()
    x, w = n.input(1, 2, 5, 5), n.weight(3, 2, 3, 3)
    after = apply(n.model(_norm(n, n.op("Conv", x, w), 3), n.op("Conv", x, w)), FoldBatchNorm())
    assert after.op_types == ["Conv", "Conv"] and after.largest_error() < 1e-5


def test_refusal(net, assert_refused):
    n = net()
    x = n.op("Conv", n.input(2, 3, 4, 4), n.weight(3, 3, 1, 1))
    scale = n.op("Sigmoid", n.input(3))  # known at run time only
    y = n.op("BatchNormalization", x, scale, n.weight(3), n.weight(3), n.const(np.ones(3)))
    assert_refused(n.model(y), FoldBatchNorm())
