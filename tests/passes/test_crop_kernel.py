import numpy as np
import pytest

from qcompiler.passes.crop_kernel import CropKernel


@pytest.fixture
def atrous(net):
    """Rates of DeepLabv3 on a map of 5 x 7: of 3 x 3 taps one, three and all can see it."""
    n = net()
    x = n.input(1, 4, 5, 7)
    convs = [n.op("Conv", x, n.weight(6, 4, 3, 3), n.weight(6), dilations=[d, d], pads=[d] * 4) for d in (12, 6, 2)]
    return n.model(*convs)


def test_structure(atrous, apply):
    after = apply(atrous, CropKernel())
    assert [after.array(node.inputs[1]).shape[2:] for node in after.model.graph] == [(1, 1), (1, 3), (3, 3)]
    assert [list(node.attributes["pads"].value) for node in after.model.graph] == [[0] * 4, [0, 6, 0, 6], [2] * 4]
    assert list(after.model.graph.node(0).attributes["dilations"].value) == [1, 1]


def test_numerics(atrous, apply):
    assert apply(atrous, CropKernel()).largest_error() < 1e-6


def test_quantized_weights_keep_their_scales(net, apply):
    n = net()
    y = n.op("Conv", n.qdq(n.input(1, 3, 4, 4)), n.int8_weight(5, 3, 3, 3, axis=0), dilations=[4, 4], pads=[4] * 4)
    after = apply(n.model(n.qdq(y)), CropKernel())
    assert after.array(after.the("Conv").inputs[1].producer().inputs[0]).shape == (5, 3, 1, 1)
    assert after.largest_error() == 0


@pytest.mark.parametrize("seed", range(12))
def test_numerics_over_sizes(net, apply, seed):
    rng = np.random.default_rng(seed)
    n = net(seed)
    kernel, size = rng.integers(1, 6, 2), rng.integers(1, 8, 2)
    dilations, strides = rng.integers(1, 7, 2).tolist(), rng.integers(1, 4, 2).tolist()
    reach = (kernel - 1) * dilations + 1
    begins, ends = rng.integers(0, 9, 2), rng.integers(0, 9, 2)
    ends = np.maximum(ends, reach - size - begins)  # the window fits
    x = n.input(1, 2, *size.tolist())
    y = n.op(
        "Conv", x, n.weight(3, 2, *kernel.tolist()), dilations=dilations, strides=strides, pads=[*begins, *ends]
    )  # fmt: skip
    applied = apply(n.model(y), CropKernel())
    assert applied.largest_error() < 1e-6


def test_fixpoint(atrous, assert_settled):
    assert_settled(atrous, CropKernel())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(1, 2, 9, 9)
    seen = n.op("Conv", x, n.weight(2, 2, 3, 3), dilations=[4, 4], pads=[4] * 4)
    variable = n.op("Conv", x, n.input(2, 2, 3, 3), dilations=[9, 9], pads=[9] * 4)
    assert_refused(n.model(seen, variable), CropKernel())
