import itertools

import pytest

from qcompiler.passes.fold_auto_pad import FoldAutoPad


@pytest.fixture
def padded(net):
    n = net()
    x = n.input(1, 3, 9, 10)
    same = n.op("Conv", x, n.weight(4, 3, 4, 3), auto_pad="SAME_UPPER", strides=[2, 3])
    pool = n.op("AveragePool", x, kernel_shape=[4, 4], strides=[3, 2], auto_pad="SAME_LOWER")
    valid = n.op("MaxPool", x, kernel_shape=[2, 3], strides=[2, 2], auto_pad="VALID", ceil_mode=1)
    up = n.op("ConvTranspose", x, n.weight(3, 2, 4, 3), auto_pad="SAME_UPPER", strides=[2, 2])
    sized = n.op("ConvTranspose", x, n.weight(3, 2, 3, 3), output_shape=[18, 21], strides=[2, 2])
    return n.model(same, pool, valid, up, sized)


def test_structure(padded, apply):
    after = apply(padded, FoldAutoPad())
    conv = after.the("Conv")
    # 9 rows by 4 every 2: 5 windows reach 12; 10 columns by 3 every 3: 4 windows reach 12.
    assert conv.attributes["pads"].as_ints() == (1, 1, 2, 1)
    for node in after.model.graph:
        assert "auto_pad" not in node.attributes and "output_shape" not in node.attributes
        assert {"pads", "kernel_shape"} <= set(node.attributes)


def test_numerics(padded, apply):
    assert apply(padded, FoldAutoPad()).largest_error() < 1e-6


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_numerics_over_sizes(net, apply, mode):
    n = net()
    outputs = []
    for size, kernel, stride in itertools.product((5, 6, 8), (1, 2, 3), (1, 2, 3)):
        x = n.input(1, 2, size, 7)
        attributes = {"auto_pad": mode, "strides": [stride, stride]}
        outputs.append(n.op("Conv", x, n.weight(2, 2, kernel, kernel), **attributes))
        # onnxruntime computes negative pads for other pools.
        if kernel >= stride:
            outputs.append(n.op("MaxPool", x, kernel_shape=[kernel, kernel], **attributes))
            outputs.append(n.op("ConvTranspose", x, n.weight(2, 2, kernel, kernel), **attributes))
    assert apply(n.model(*outputs), FoldAutoPad()).largest_error() < 1e-6


def test_dilation_widens_the_kernel(net, apply):
    """onnxruntime refuses SAME with dilation, so there is nothing to compare with but the definition."""
    n = net()
    y = n.op("Conv", n.input(1, 2, 12, 9), n.weight(2, 2, 3, 3), auto_pad="SAME_UPPER", dilations=[2, 3])
    conv = apply(n.model(y), FoldAutoPad()).the("Conv")
    assert conv.attributes["pads"].as_ints() == (2, 3, 2, 3)


def test_fixpoint(padded, assert_settled):
    assert_settled(padded, FoldAutoPad())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(1, 3, 9, 10)
    y = n.op("Conv", x, n.weight(4, 3, 3, 3), auto_pad="NOTSET", pads=[1, 0, 1, 0])
    assert_refused(n.model(n.op("MaxPool", y, kernel_shape=[2, 2])), FoldAutoPad())
