import numpy as np
import pytest

from qcompiler.passes.fold_constants import FoldConstants


@pytest.fixture
def computed_weight(net):
    """A product whose weight is computed, and a reshape whose shape is."""
    n = net()
    x = n.input(2, 6)
    w = n.op("Mul", n.op("Transpose", n.weight(4, 6), perm=[1, 0]), n.const(0.5))
    y = n.op("MatMul", x, w)
    shape = n.op("Concat", n.op("Shape", x, end=1), n.const([2, 2], np.int64), axis=0)
    return n.model(n.op("Reshape", y, shape))


@pytest.fixture
def quantized_weight(net):
    """Transposes and reshapes of dequantized weights, and a float weight quantized on the fly."""
    n = net()
    x = n.input(1, 5, 6, 6)
    w = n.op("Transpose", n.int8_weight(3, 3, 5, 7, axis=3), perm=[3, 2, 0, 1])
    y = n.op("Conv", x, w)
    flat = n.op("Reshape", y, n.const([1, -1], np.int64))
    w2 = n.op("Reshape", n.int8_weight(7, 4, 4, 3), n.const([112, 3], np.int64))
    return n.model(n.op("Add", n.op("MatMul", flat, w2), n.qdq(n.weight(3))))


def test_structure(computed_weight, apply):
    assert apply(computed_weight, FoldConstants()).op_types == ["MatMul", "Reshape"]


def test_dequantize_stays_and_moves_stand_on_the_integers(quantized_weight, apply):
    after = apply(quantized_weight, FoldConstants())
    assert sorted(after.op_types) == sorted(["DequantizeLinear"] * 3 + ["Conv", "Reshape", "MatMul", "Add"])
    conv_weight = after.the("Conv").inputs[1].producer()
    assert conv_weight.attributes["axis"].as_int() == 0
    assert after.array(conv_weight.inputs[0]).shape == (7, 5, 3, 3)


def test_standardized_weights_fold(net, apply):
    """As exporters write weight standardization: batch normalization, in training mode, of the reshaped weight."""
    n = net()
    weight = n.weight(4, 3, 2, 2)
    flat = n.op("Reshape", weight, n.const([1, 4, -1], np.int64))
    mean = n.op("ReduceMean", flat, n.const([0, 2], np.int64), keepdims=0)
    variance = n.op("ReduceMean", n.op("Mul", flat, flat), n.const([0, 2], np.int64), keepdims=0)
    normal, _, _ = n.ops(
        "BatchNormalization", flat, n.weight(4), n.const([0.0] * 4), mean, variance, outputs=3, training_mode=1
    )
    shaped = n.op("Reshape", normal, n.const([4, 3, 2, 2], np.int64))
    after = apply(n.model(n.op("Conv", n.input(1, 3, 5, 5), shaped)), FoldConstants())
    assert after.op_types == ["Conv"] and after.largest_error() < 1e-5


def test_numerics(computed_weight, quantized_weight, apply):
    assert apply(computed_weight, FoldConstants()).largest_error() < 1e-6
    assert apply(quantized_weight, FoldConstants()).largest_error() == 0


def test_fixpoint(computed_weight, quantized_weight, assert_settled):
    assert_settled(computed_weight, FoldConstants())
    assert_settled(quantized_weight, FoldConstants())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(1, 5, 6, 6)
    y = n.op("Conv", x, n.int8_weight(7, 5, 3, 3, axis=0))
    # Reshaping a per-channel weight would part channels from their scales.
    w = n.op("Reshape", n.int8_weight(4, 4, axis=0), n.const([2, 8], np.int64))
    assert_refused(n.model(y, n.op("MatMul", n.input(3, 2), w)), FoldConstants())
