import pytest

from qcompiler.passes.fold_pad import FoldPad
from qcompiler.passes.unfold_pool_pad import UnfoldPoolPad

UNCOUNTED = {"ops": ["AveragePool"], "where": {"pad_counted": False}}
COUNTED = {"kernel_shape": [3, 3], "count_include_pad": 1}


@pytest.fixture
def counted(net):
    n = net()
    x = n.input(1, 3, 8, 7)
    return n.model(n.op("AveragePool", x, pads=[1, 0, 2, 1], strides=[2, 2], **COUNTED))


def test_structure(counted, target_with, apply):
    after = apply(counted, UnfoldPoolPad(target_with(UNCOUNTED)))
    assert after.op_types == ["Pad", "AveragePool"]
    assert after.array(after.the("Pad").inputs[1]).tolist() == [0, 0, 1, 0, 0, 0, 2, 1]
    assert "pads" not in after.the("AveragePool").attributes


def test_numerics(counted, target_with, apply):
    assert apply(counted, UnfoldPoolPad(target_with(UNCOUNTED))).largest_error() < 1e-6


def test_it_undoes_fold_pad(counted, target_with, apply):
    apply(counted, UnfoldPoolPad(target_with(UNCOUNTED)))
    assert apply(counted, FoldPad()).op_types == ["AveragePool"]


def test_fixpoint(counted, target_with, assert_settled):
    assert_settled(counted, UnfoldPoolPad(target_with(UNCOUNTED)))


def test_refusal(net, counted, target_with, cpu_target, assert_refused):
    assert_refused(counted, UnfoldPoolPad(target_with({"ops": ["AveragePool"]})))
    assert_refused(counted, UnfoldPoolPad(target_with({"ops": ["MaxPool"]})))
    assert_refused(counted, UnfoldPoolPad(cpu_target))
    n = net()
    uncounted = n.op("AveragePool", n.input(1, 2, 9, 9), kernel_shape=[3, 3], pads=[1] * 4)
    inner = {"ops": ["AveragePool"], "where": {"padded": False}}
    assert_refused(n.model(uncounted), UnfoldPoolPad(target_with(inner)))
