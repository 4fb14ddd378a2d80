import itertools
import math

import numpy as np
import pytest

from qcompiler.passes.fuse_activation import FuseActivation


@pytest.fixture
def clamps(net):
    n = net()
    x = n.input(3, 17)
    relu = n.op("Max", n.const([0.0]), x)
    relu6 = n.op("Min", n.op("Relu", x), n.const(6))
    twice = n.op("Relu", n.op("Relu", n.op("Clip", x, "", n.const(2.0))))
    crossed = n.op("Clip", n.op("Clip", x, n.const(0), n.const(1)), n.const(2), n.const(3))  # always 2
    return n.model(relu, relu6, twice, crossed, n.op("PRelu", x, n.const([0.25] * 17)), n.op("LeakyRelu", x, alpha=0.0))


def _gelu_forms(n, x):
    """The three groupings exporters write, and the tanh form with Pow and with Mul."""
    gate = n.op("Add", n.op("Erf", n.op("Div", x, n.const(math.sqrt(2)))), n.const(1))
    other = n.op("Add", n.const(1), n.op("Erf", n.op("Mul", n.const(math.sqrt(0.5)), x)))
    yield n.op("Mul", n.op("Mul", x, gate), n.const(0.5))
    yield n.op("Mul", n.op("Mul", n.const(0.5), x), other)
    yield n.op(
        "Mul", x, n.op("Mul", n.op("Add", n.op("Erf", n.op("Div", x, n.const(2**0.5))), n.const(1)), n.const(0.5))
    )
    for cube in (n.op("Pow", x, n.const(3)), n.op("Mul", n.op("Mul", x, x), x)):
        inner = n.op("Add", x, n.op("Mul", cube, n.const(0.044715)))
        tanh = n.op("Tanh", n.op("Mul", inner, n.const(math.sqrt(2 / math.pi))))
        yield n.op("Mul", n.op("Mul", n.const(0.5), x), n.op("Add", tanh, n.const(1)))


@pytest.fixture
def gelus(net):
    n = net()
    return n.model(*_gelu_forms(n, n.input(2, 33)))


def _hard_forms(n, x):
    """x * relu6(x + 3) / 6 in every order, by Div and by Mul; and with HardSigmoid."""
    for first, reciprocal in itertools.product((True, False), (True, False)):
        gate = n.op("Clip", n.op("Add", x, n.const(3)), n.const(0), n.const(6))
        by_six = ("Mul", n.const(1 / 6)) if reciprocal else ("Div", n.const(6))
        if first:
            yield n.op(by_six[0], n.op("Mul", x, gate), by_six[1])
        else:
            yield n.op("Mul", n.op(by_six[0], gate, by_six[1]), x)
    yield n.op("Mul", x, n.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))


@pytest.fixture
def hard(net):
    n = net()
    x = n.input(2, 33)
    alone = n.op("Div", n.op("Min", n.op("Relu", n.op("Add", x, n.const(3))), n.const(6)), n.const(6))
    return n.model(*_hard_forms(n, x), alone, n.op("Mul", n.op("Tanh", n.op("Softplus", x)), x))


def test_structure(clamps, gelus, hard, apply):
    after = apply(clamps, FuseActivation())
    assert after.op_types == ["Relu", "Clip", "Clip", "Clip", "LeakyRelu", "Relu"]
    bounds = [tuple(float(after.array(value)) for value in node.inputs[1:]) for node in after.model.graph]
    assert bounds[1:4] == [(0, 6), (0, 2), (2, 2)]
    after = apply(gelus, FuseActivation())
    assert after.op_types == ["Gelu"] * 5
    modes = [node.attributes.get_string("approximate", "none") for node in after.model.graph]
    assert modes == ["none"] * 3 + ["tanh"] * 2
    assert apply(hard, FuseActivation()).op_types == ["HardSigmoid", *["HardSwish"] * 5, "Mish"]


def test_numerics(clamps, gelus, hard, apply):
    assert apply(clamps, FuseActivation()).largest_error() == 0
    assert apply(gelus, FuseActivation()).largest_error() < 1e-6
    assert apply(hard, FuseActivation()).largest_error() < 1e-6


def test_fixpoint(clamps, gelus, hard, assert_settled):
    for model in (clamps, gelus, hard):
        assert_settled(model, FuseActivation())


def test_refusal(net, assert_refused):
    n = net()
    x, other = n.input(3, 17), n.input(3, 17)
    swish = n.op("Mul", x, n.op("Sigmoid", x))
    not_six = n.op("Mul", x, n.op("Clip", n.op("Add", x, n.const(3)), n.const(0), n.const(5)))
    other_x = n.op("Mul", other, n.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    other_slope = n.op("Mul", x, n.op("HardSigmoid", x, alpha=0.2, beta=0.5))
    not_gelu = n.op("Mul", n.op("Mul", x, n.op("Add", n.op("Erf", x), n.const(1))), n.const(0.5))
    per_channel = n.op("PRelu", x, n.const(np.arange(17)))
    vector = n.op("Min", x, n.const(np.arange(17)))
    integers = n.op("Clip", n.op("QuantizeLinear", x, n.const(0.1), n.const(0, np.int8)), n.const(0, np.int8))
    assert_refused(
        n.model(swish, not_six, other_x, other_slope, not_gelu, per_channel, vector, integers), FuseActivation()
    )
