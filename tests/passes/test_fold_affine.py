import numpy as np
import pytest

from qcompiler.passes.fold_affine import FoldAffine


@pytest.fixture
def after_linear(net):
    n = net()
    x = n.input(2, 6, 7, 5)
    y = n.op("Conv", x, n.weight(8, 3, 3, 3), group=2, pads=[1, 1, 1, 1])
    y = n.op("Add", n.op("Mul", y, n.weight(8, 1, 1)), n.weight(1, 8, 1, 1))
    y = n.op("Sub", n.const(0.5), n.op("Relu", y))
    y = n.op("ConvTranspose", y, n.weight(8, 3, 2, 3), n.weight(6), group=2, strides=[2, 2])
    y = n.op("Div", n.op("Sub", y, n.weight(6, 1, 1)), n.const(n.rng.uniform(0.5, 2, (6, 1, 1))))
    z = n.op("Gemm", n.input(3, 4), n.weight(5, 4), n.weight(5), transB=1)
    return n.model(y, n.op("Sub", n.weight(5), n.op("Mul", z, n.const(3.0))))


@pytest.fixture
def before_linear(net):
    """(x - mean) / std in front of a convolution, the shift only where there is no padding."""
    n = net()
    mean, std = n.weight(3, 1, 1), n.const(n.rng.uniform(0.5, 2, (1, 3, 1, 1)))
    bare = n.op("Conv", n.op("Div", n.op("Sub", n.input(1, 3, 8, 8), mean), std), n.weight(4, 3, 3, 3), n.weight(4))
    grouped = n.op(
        "Conv", n.op("Mul", n.input(1, 4, 8, 8), n.weight(4, 1, 1)), n.weight(6, 2, 3, 3), group=2, pads=[1] * 4
    )
    dense = n.op("Gemm", n.op("Add", n.input(2, 4), n.weight(4)), n.weight(3, 4), transB=1)
    return n.model(bare, grouped, dense)


@pytest.fixture
def quantized(net):
    n = net()
    y = n.op("Conv", n.qdq(n.input(1, 3, 6, 6)), n.int8_weight(4, 3, 3, 3, axis=0))
    bias = n.op("DequantizeLinear", n.const(n.rng.integers(-99, 99, (4, 1, 1)), np.int32), n.const(0.01))
    return n.model(n.op("Add", y, bias))


def test_structure(after_linear, before_linear, quantized, apply):
    assert sorted(apply(after_linear, FoldAffine()).op_types) == ["Conv", "ConvTranspose", "Gemm", "Relu", "Sub"]
    assert sorted(apply(before_linear, FoldAffine()).op_types) == ["Conv", "Conv", "Gemm"]
    folded = apply(quantized, FoldAffine())
    assert "Add" not in folded.op_types
    bias = folded.the("Conv").inputs[2].producer()
    assert folded.array(bias.inputs[0]).dtype == np.int32 and folded.array(bias.inputs[0]).shape == (4,)


def test_layer_keeps_the_convolutions_name(net, apply):
    n = net()
    model = n.model(n.op("Mul", n.op("Conv", n.input(1, 2, 4, 4), n.weight(3, 2, 1, 1)), n.weight(3, 1, 1)))
    name = model.graph[0].name
    assert apply(model, FoldAffine()).the("Conv").name == name


def test_numerics(after_linear, before_linear, quantized, apply):
    assert apply(after_linear, FoldAffine()).largest_error() < 1e-5
    assert apply(before_linear, FoldAffine()).largest_error() < 1e-5
    assert apply(quantized, FoldAffine()).largest_error() < 1e-6


def test_fixpoint(after_linear, before_linear, quantized, assert_settled):
    for model in (after_linear, before_linear, quantized):
        assert_settled(model, FoldAffine())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(1, 3, 6, 6)
    shifted = n.op("Conv", n.op("Add", x, n.weight(3, 1, 1)), n.weight(4, 3, 3, 3), pads=[1, 1, 1, 1])
    per_pixel = n.op("Mul", n.op("Conv", x, n.weight(4, 3, 3, 3)), n.weight(4, 4))
    by_zero = n.op("Div", n.op("Conv", x, n.weight(4, 3, 3, 3)), n.const(np.zeros((4, 1, 1))))
    quantized = n.op("Mul", n.op("Conv", x, n.int8_weight(4, 3, 3, 3)), n.weight(4, 1, 1))
    shared = n.op("Conv", x, n.weight(4, 3, 3, 3))
    wider = n.op("Add", n.op("Conv", x, n.weight(1, 3, 3, 3)), n.weight(4, 1, 1))
    outputs = [shifted, per_pixel, by_zero, quantized, shared, n.op("Mul", shared, n.const(2.0)), wider]
    assert_refused(n.model(*outputs), FoldAffine())
