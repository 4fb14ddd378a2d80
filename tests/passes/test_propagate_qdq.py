import numpy as np
import pytest

from qcompiler.passes.propagate_qdq import PropagateQdq


@pytest.fixture
def chain(net):
    """Conv → (unquantized) → Transpose → Q/DQ → Reshape → MaxPool → Sigmoid, and two float readers of a Split."""
    n = net()
    x = n.qdq(n.input(1, 3, 9, 11))
    y = n.op("Conv", x, n.int8_weight(6, 3, 3, 3, axis=0))
    y = n.qdq(n.op("Transpose", y, perm=[0, 1, 3, 2]), 0.05, -7)
    y = n.op("Reshape", y, n.const([1, 6, 7, 9], np.int64))
    y = n.op("MaxPool", y, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1])
    left, right = n.ops("Split", y, outputs=2, axis=1, num_outputs=2)
    return n.model(n.op("Sigmoid", left), n.op("Exp", right), right)


def test_structure(chain, apply):
    after = apply(chain, PropagateQdq())
    for node in after.model.graph:
        if node.op_type in ("Transpose", "Reshape", "MaxPool", "Split"):
            assert node.inputs[0].producer().op_type == "DequantizeLinear"
            readers = [use.node.op_type for output in node.outputs for use in output.uses()]
            assert readers == ["QuantizeLinear"] * len(node.outputs)
    assert after.the("Conv").outputs[0].uses()[0].node.op_type == "QuantizeLinear"


def test_numerics(chain, apply):
    assert apply(chain, PropagateQdq()).largest_error() == 0


def test_output_names_stay(chain, apply):
    names = [value.name for value in chain.graph.outputs]
    after = apply(chain, PropagateQdq())
    assert [value.name for value in after.model.graph.outputs] == names


def test_fixpoint(chain, assert_settled):
    assert_settled(chain, PropagateQdq())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(1, 2, 6, 6)
    q = n.qdq(x)
    linear = n.op("Resize", q, "", n.const([1, 1, 2, 2]), mode="linear")
    padded = n.op("Pad", q, n.const([0, 0, 1, 1, 0, 0, 1, 1], np.int64), n.const(0.7))
    floating = n.op("Relu", x)  # read by more than the Transpose, so it must stay in float
    moved = n.qdq(n.op("Transpose", floating, perm=[0, 1, 3, 2]))
    weight = n.op("Transpose", n.int8_weight(6, 4), perm=[1, 0])
    outputs = (linear, padded, floating, moved, n.op("MatMul", n.weight(2, 4), weight))
    assert_refused(n.model(*(n.op("Sigmoid", value) for value in outputs)), PropagateQdq())
