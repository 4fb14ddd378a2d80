import pytest

from qcompiler.passes.cancel_transposes import CancelTransposes

NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


@pytest.fixture
def elementwise(net):
    """What a channels-last framework leaves around activations and a residual addition."""
    n = net()
    x = n.input(1, 4, 3, 5)
    y = n.op("Transpose", n.op("Conv", x, n.weight(4, 4, 1, 1)), perm=NHWC)
    y = n.op("Clip", n.op("Mul", n.op("Relu", y), n.weight(4)), n.const(0), n.const(3))
    y = n.op("Add", y, n.op("Transpose", x, perm=NHWC))
    return n.model(n.op("Conv", n.op("Transpose", y, perm=NCHW), n.weight(2, 4, 3, 3)))


@pytest.fixture
def others(net):
    """Two that merge into one, two that meet across Q and DQ, and inverses at a graph output."""
    n = net()
    x = n.input(2, 3, 4, 5)
    merged = n.op("Sigmoid", n.op("Transpose", n.op("Transpose", x, perm=[1, 0, 2, 3]), perm=[0, 2, 1, 3]))
    quantized = n.op("Transpose", n.qdq(n.op("Transpose", n.op("Relu", x), perm=NHWC)), perm=NCHW)
    inverse = n.op("Transpose", n.op("Transpose", n.op("Tanh", x), perm=NHWC), perm=NCHW)
    return n.model(merged, quantized, inverse)


def test_structure(elementwise, others, apply):
    assert apply(elementwise, CancelTransposes()).op_types == ["Conv", "Relu", "Mul", "Clip", "Add", "Conv"]
    after = apply(others, CancelTransposes())
    assert after.the("Transpose").attributes["perm"].as_ints() == (1, 2, 0, 3)


def test_numerics(elementwise, others, apply):
    assert apply(elementwise, CancelTransposes()).largest_error() == 0
    assert apply(others, CancelTransposes()).largest_error() == 0


def test_fixpoint(elementwise, others, assert_settled):
    assert_settled(elementwise, CancelTransposes())
    assert_settled(others, CancelTransposes())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(1, 4, 3, 5)
    y = n.op("Transpose", x, perm=NHWC)
    no_gain = n.op("Softmax", n.op("Relu", y))
    mixed = n.op("Transpose", n.op("Add", n.op("Transpose", x, perm=NHWC), n.input(1, 3, 5, 4)), perm=NCHW)
    widened = n.op(
        "Transpose", n.op("Add", n.op("Transpose", n.input(1, 1, 1, 4), perm=NHWC), n.weight(3, 4, 1)), perm=NCHW
    )
    lone = n.op("Transpose", n.input(2, 3), perm=[1, 0])
    assert_refused(n.model(no_gain, mixed, widened, lone), CancelTransposes())
