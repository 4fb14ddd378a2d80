import numpy as np
import pytest

from qcompiler.passes.center_weights import CenterWeights
from qcompiler.target_loader import load_target


@pytest.fixture(scope="module")
def center():
    """For a target with symmetric weights only."""
    return CenterWeights(load_target("systolic-npu"))


def product(net, dtype, low: int, high: int, zero_point, **attributes):
    """A quantized convolution; weights are drawn from low to high, both included."""
    n = net()
    x = n.op("QuantizeLinear", n.input(1, 3, 7, 9), n.const(0.05), n.const(5, np.int8))
    real = n.op("DequantizeLinear", x, n.const(0.05), n.const(5, np.int8))
    values = n.rng.integers(low, high + 1, (4, 3, 3, 3))
    values.flat[:2] = low, high
    points = np.array(zero_point, dtype)
    scale = n.const(np.full(points.shape, 0.02, np.float32) if points.ndim else 0.02)
    weights = n.op("DequantizeLinear", n.const(values, dtype), scale, n.const(points, dtype), **attributes)
    y = n.op("Conv", real, weights, pads=[1, 1, 1, 1])
    return n.model(n.op("QuantizeLinear", y, n.const(0.1), n.const(0, np.int8)))


@pytest.fixture
def asymmetric(net):
    return product(net, np.int8, -90, 120, 17)


def test_structure(asymmetric, apply, center):
    after = apply(asymmetric, center)
    weights = after.the("Conv").inputs[1].producer()
    values, zero_point = (weights.inputs[index].const_value.numpy() for index in (0, 2))
    assert values.dtype == np.int8 == zero_point.dtype and zero_point == 0
    assert (values.min(), values.max()) == (-107, 103)


def test_numerics(asymmetric, apply, center):
    assert apply(asymmetric, center).largest_error() == 0


def test_each_channel_has_its_own(net, apply, center):
    after = apply(product(net, np.int8, -118, -18, [-125, -68, -18, 9], axis=0), center)
    assert after.largest_error() == 0
    weights = after.the("Conv").inputs[1].producer()
    assert weights.inputs[0].const_value.numpy().dtype == np.int8
    assert not weights.inputs[2].const_value.numpy().any()


def test_fixpoint(asymmetric, assert_settled, center):
    assert_settled(asymmetric, center)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "zero_point"),
    [(np.int8, -128, 127, 1), (np.uint8, 0, 255, 120), (np.int8, -128, 0, 1), (np.int8, -100, 100, 0)],
)
def test_refusal_where_codes_do_not_fit_or_are_symmetric(net, assert_refused, center, dtype, low, high, zero_point):
    assert_refused(product(net, dtype, low, high, zero_point), center)


def test_a_target_that_takes_any_zero_point_keeps_it(asymmetric, assert_refused):
    assert_refused(asymmetric, CenterWeights(load_target("arm-npu")))
    assert_refused(asymmetric, CenterWeights(load_target("x86-cpu")))
