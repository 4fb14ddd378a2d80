import numpy as np
import pytest

from qcompiler.passes.merge_movement import MergeMovement


def _slice(n, x, start, end, axis, step=1):
    return n.op("Slice", x, *(n.const([number], np.int64) for number in (start, end, axis, step)))


@pytest.fixture
def shuffle(net):
    """ShuffleNet's channel shuffle, split in two halves."""
    n = net()
    x = n.op("Relu", n.input(1, 8, 3, 5))
    y = n.op("Transpose", n.op("Reshape", x, n.const([4, 2, 15], np.int64)), perm=[1, 0, 2])
    y = n.op("Reshape", y, n.const([2, 1, 4, 3, 5], np.int64))
    halves = [n.op("Reshape", _slice(n, y, i, i + 1, 0), n.const([1, 4, 3, 5], np.int64)) for i in (0, 1)]
    return n.model(*halves)


@pytest.fixture
def slices(net):
    n = net()
    x = n.input(1, 4, 9, 9)
    return n.model(n.op("Relu", _slice(n, _slice(n, x, 0, 9, 2, 2), 1, -1, 3, 2)))


def test_structure(shuffle, slices, apply):
    after = apply(shuffle, MergeMovement())
    assert "Transpose" not in after.op_types
    slices_of_relu = [node for node in after.model.graph if node.op_type == "Slice"]
    assert [node.inputs[0] for node in slices_of_relu] == [after.the("Relu").outputs[0]] * 2
    assert apply(slices, MergeMovement()).op_types == ["Slice", "Relu"]


def test_numerics(shuffle, slices, apply):
    assert apply(shuffle, MergeMovement()).largest_error() == 0
    assert apply(slices, MergeMovement()).largest_error() == 0


def test_fixpoint(shuffle, slices, assert_settled):
    assert_settled(shuffle, MergeMovement())
    assert_settled(slices, MergeMovement())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(1, 8, 3, 5)
    y = n.op("Transpose", n.op("Reshape", x, n.const([1, 2, 4, 3, 5], np.int64)), perm=[0, 2, 1, 3, 4])
    whole = n.op("Reshape", y, n.const([1, 8, 3, 5], np.int64))  # a shuffle of everything picks no part
    assert_refused(n.model(whole, _slice(n, x, 6, 2, 1, -1)), MergeMovement())
