import pytest

from qcompiler.passes.expand_hard_sigmoid import ExpandHardSigmoid

ARITHMETIC = {"ops": ["Mul", "Add", "Clip"]}
TABLES = {"ops": ["Lookup"]}


@pytest.fixture
def gates(net):
    n = net()
    x = n.input(1, 3, 8, 8)
    return n.model(n.op("HardSigmoid", x, alpha=0.3, beta=0.4), n.op("HardSwish", x), n.op("HardSigmoid", x))


def test_structure(gates, target_with, apply):
    after = apply(gates, ExpandHardSigmoid(target_with(ARITHMETIC)))
    assert after.op_types == ["Mul", "Add", "Clip", "Mul", "Add", "Clip", "Mul", "Mul", "Add", "Clip"]


def test_numerics(gates, target_with, apply):
    assert apply(gates, ExpandHardSigmoid(target_with(ARITHMETIC))).largest_error() < 1e-6


def test_fixpoint(gates, target_with, assert_settled):
    assert_settled(gates, ExpandHardSigmoid(target_with(ARITHMETIC)))


def test_refusal(net, gates, target_with, cpu_target, assert_refused):
    assert_refused(gates, ExpandHardSigmoid(target_with(ARITHMETIC, TABLES)))
    assert_refused(gates, ExpandHardSigmoid(target_with({"ops": ["Mul", "Clip"]})))
    assert_refused(gates, ExpandHardSigmoid(cpu_target))
    n = net()
    quantized = n.qdq(n.op("HardSwish", n.qdq(n.input(1, 3))))
    assert_refused(n.model(quantized), ExpandHardSigmoid(target_with(ARITHMETIC)))
