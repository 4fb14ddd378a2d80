import numpy as np
import onnx
import pytest

from qcompiler.passes.remove_identity import RemoveIdentity


@pytest.fixture
def idle(net):
    n = net()
    x = n.input(2, 3, 5, 5)
    y = n.op("Identity", n.op("Relu", n.op("Identity", x)))
    y = n.op("Dropout", y, n.const(0.5), n.const(False, bool))
    y = n.op("Reshape", y, n.const([2, 3, 5, 5], np.int64))
    y = n.op("Transpose", y, perm=[0, 1, 2, 3])
    y = n.op("Cast", y, to=onnx.TensorProto.FLOAT)
    y = n.op("Pad", y, n.const([0] * 8, np.int64))
    y = n.op("Slice", y, n.const([0], np.int64), n.const([99], np.int64), n.const([1], np.int64))
    y = n.op("Concat", y, axis=1)
    y = n.op("Expand", y, n.const([3, 1, 1], np.int64))
    y = n.op("AveragePool", y, kernel_shape=[1, 1])
    y = n.op("MaxPool", y, kernel_shape=[1, 1], strides=[1, 1])
    y = n.op("Mul", n.op("Add", n.const(0.0), y), n.const(np.ones((3, 1, 1))))
    return n.model(n.op("Sigmoid", y), n.op("Identity", y))


def test_structure(idle, apply):
    after = apply(idle, RemoveIdentity())
    assert after.op_types == ["Relu", "Sigmoid"]
    assert after.model.graph.outputs[1] is after.the("Relu").outputs[0]


def test_numerics(idle, apply):
    assert apply(idle, RemoveIdentity()).largest_error() == 0


def test_fixpoint(idle, assert_settled):
    assert_settled(idle, RemoveIdentity())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(4, 4)
    y = n.op("Relu", x)
    outputs = [
        n.op("Identity", x),  # an input cannot be an output
        n.op("Transpose", y, perm=[1, 0]),  # same shape, other order
        n.op("Pad", y, n.const([1, 0, -1, 0], np.int64)),
        n.op(
            "Slice",
            y,
            n.const([-1], np.int64),
            n.const([-9], np.int64),
            n.const([0], np.int64),
            n.const([-1], np.int64),
        ),
        n.op("Add", y, n.const(np.zeros((2, 1, 1)))),  # broadcasts
        n.op("Sub", n.const(0.0), y),
        n.op("Div", n.const(1.0), y),
    ]
    assert_refused(n.model(*outputs), RemoveIdentity())
