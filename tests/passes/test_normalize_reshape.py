import numpy as np
import pytest

from qcompiler.passes.normalize_reshape import NormalizeReshape


@pytest.fixture
def shapes(net):
    """Every way to change a shape, in a row, and a channels-last vector flattened."""
    n = net()
    x = n.input(2, 3, 4)
    y = n.op("Unsqueeze", x, n.const([0, 3], np.int64))
    y = n.op("Squeeze", y, n.const([0], np.int64))
    y = n.op("Flatten", y, axis=2)
    y = n.op("Reshape", y, n.const([0, -1, 1], np.int64))
    z = n.op("Transpose", n.op("Relu", n.input(2, 1, 1, 7)), perm=[0, 3, 1, 2])
    return n.model(n.op("Relu", y), n.op("Flatten", z))


@pytest.fixture
def product(net):
    """A product whose activation stands behind a Reshape."""
    n = net()
    y = n.op("Reshape", n.op("Gemm", n.input(6, 5), n.weight(5, 4)), n.const([2, 3, 4], np.int64))
    y = n.op("Clip", n.op("LeakyRelu", y, alpha=0.2), n.const(-1), n.const(2))
    return n.model(n.op("Softmax", y))


@pytest.fixture
def quantized(net):
    n = net()
    y = n.op("Conv", n.qdq(n.input(1, 3, 4, 6)), n.int8_weight(5, 3, 1, 1, axis=0))
    y = n.op(
        "Reshape", n.op("Relu", n.op("Reshape", y, n.const([1, 5, 24], np.int64))), n.const([1, 5, 6, 4], np.int64)
    )
    return n.model(n.op("Conv", n.qdq(y), n.int8_weight(2, 5, 3, 3)))


def test_structure(shapes, apply):
    after = apply(shapes, NormalizeReshape())
    assert sorted(after.op_types) == ["Relu", "Relu", "Reshape", "Reshape"]
    targets = [tuple(after.array(node.inputs[1])) for node in after.model.graph if node.op_type == "Reshape"]
    assert sorted(targets) == [(2, 7), (6, 4, 1)]


def test_reshape_sinks_below_activations(product, apply):
    assert apply(product, NormalizeReshape()).op_types == ["Gemm", "LeakyRelu", "Clip", "Reshape", "Softmax"]


def test_reshapes_meet_across_q_and_dq(quantized, apply):
    after = apply(quantized, NormalizeReshape())
    kinds = [kind for kind in after.op_types if kind not in ("QuantizeLinear", "DequantizeLinear")]
    assert kinds == ["Conv", "Relu", "Reshape", "Conv"]


def test_numerics(shapes, product, quantized, apply):
    assert apply(shapes, NormalizeReshape()).largest_error() == 0
    assert apply(product, NormalizeReshape()).largest_error() == 0
    assert apply(quantized, NormalizeReshape()).largest_error() == 0


def test_fixpoint(shapes, product, quantized, assert_settled):
    for model in (shapes, product, quantized):
        assert_settled(model, NormalizeReshape())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(2, 3, 4)
    split = n.op("Reshape", x, n.const([6, 4], np.int64))
    turned = n.op("Transpose", split, perm=[1, 0])  # really moves elements
    quantized = n.op("QuantizeLinear", split, n.const(np.full(6, 0.1)), n.const(np.zeros(6), np.int8), axis=0)
    assert_refused(n.model(n.op("Reshape", turned, n.const([4, 2, 3], np.int64)), quantized), NormalizeReshape())
