import numpy as np
import pytest

from qcompiler.graph import const_of, shape_of
from qcompiler.passes.normalize_arithmetic import NormalizeArithmetic


@pytest.fixture
def arithmetic(net):
    n = net()
    x, y = n.input(2, 3, 4), n.input(2, 3, 4)
    return n.model(
        n.op("Sub", x, n.weight(3, 1)),
        n.op("Div", x, n.const(4.0)),
        n.op("Neg", x),
        n.op("Sum", x, y, n.weight(4)),
        n.op("Pow", x, n.const(2.0)),
        n.op("Add", n.const(1.5), x),
        n.op("Mul", n.weight(4), x),
    )


@pytest.fixture
def blocks(net):
    n = net()
    x = n.input(2, 12, 3, 5)
    return n.model(
        n.op("DepthToSpace", x, blocksize=2),
        n.op("DepthToSpace", x, blocksize=2, mode="CRD"),
        n.op("SpaceToDepth", n.input(2, 3, 6, 4), blocksize=2),
        n.op("DepthToSpace", n.qdq(n.input(1, 18, 2, 2)), blocksize=3),
    )


def test_structure(arithmetic, blocks, apply):
    after = apply(arithmetic, NormalizeArithmetic())
    assert after.op_types == ["Add", "Mul", "Mul", "Add", "Add", "Mul", "Add", "Mul"]
    for node in after.model.graph:
        assert const_of(node.inputs[0]) is None
    after = apply(blocks, NormalizeArithmetic())
    assert set(after.op_types) == {"Transpose", "Reshape", "QuantizeLinear", "DequantizeLinear"}
    assert max(len(shape_of(node.outputs[0])) for node in after.model.graph) == 4


def test_numerics(arithmetic, blocks, apply):
    assert apply(arithmetic, NormalizeArithmetic()).largest_error() < 1e-6
    assert apply(blocks, NormalizeArithmetic()).largest_error() == 0


def test_division_by_a_power_of_two_is_exact(net, apply):
    n = net()
    assert apply(n.model(n.op("Div", n.input(5, 9), n.const(0.125))), NormalizeArithmetic()).largest_error() == 0


def test_fixpoint(arithmetic, blocks, assert_settled):
    assert_settled(arithmetic, NormalizeArithmetic())
    assert_settled(blocks, NormalizeArithmetic())


def test_refusal(net, assert_refused):
    n = net()
    x, y = n.input(2, 3), n.input(2, 3)
    outputs = [
        n.op("Sub", x, y),
        n.op("Div", n.const(1.0), x),
        n.op("Div", x, n.const([1.0, 0.0, 2.0])),
        n.op("Pow", x, n.const(3.0)),
        n.op("Sub", n.const(2.0), x),
        n.qdq(n.op("Neg", n.qdq(x))),  # x * -1 would need a scale for -1
        n.op("Div", x, n.const(np.float32(1e-45))),  # its reciprocal is infinite
    ]
    assert_refused(n.model(*outputs), NormalizeArithmetic())
