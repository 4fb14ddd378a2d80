import numpy as np
import pytest

from qcompiler.passes.normalize_gather import NormalizeGather


@pytest.fixture
def regular(net):
    n = net()
    x = n.input(4, 9, 5)
    picks = [(1, 0), (-1, 1), ([2, 3, 4], 1), ([0, 2, 4, 6, 8], 1), ([-3, -2], 2), ([[1, 3], [5, 7]], -2), ([6], 1)]
    return n.model(*(n.op("Gather", x, n.const(indices, np.int64), axis=axis) for indices, axis in picks))


def test_structure(regular, apply):
    after = apply(regular, NormalizeGather())
    assert after.op_types.count("Slice") == 7
    # A scalar index drops the axis, a matrix adds one.
    assert after.op_types.count("Reshape") == 3
    assert "Gather" not in after.op_types


def test_numerics(regular, apply):
    assert apply(regular, NormalizeGather()).largest_error() == 0


def test_fixpoint(regular, assert_settled):
    assert_settled(regular, NormalizeGather())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(4, 9, 5)
    outputs = [n.op("Gather", x, n.const(indices, np.int64), axis=1) for indices in ([0, 1, 3], [2, 1], [3, 3])]
    outputs.append(n.op("Gather", n.weight(6, 3), n.const([1, 2], np.int64)))
    assert_refused(n.model(*outputs), NormalizeGather())
