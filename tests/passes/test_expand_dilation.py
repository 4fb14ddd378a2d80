import numpy as np
import pytest

from qcompiler.graph import shape_of
from qcompiler.passes.expand_dilation import ExpandDilation

NO_DILATION = {"dilation_h": 1, "dilation_w": 1}
ANY_KERNEL = {"ops": ["Conv"], "where": NO_DILATION}
SMALL_KERNEL = {"ops": ["Conv"], "where": NO_DILATION | {"kernel_h": "<= 3", "kernel_w": "<= 3"}}


@pytest.fixture
def dilated(net):
    n = net()
    x = n.input(2, 4, 13, 12)
    y = n.op("Conv", x, n.weight(6, 2, 3, 3), n.weight(6), group=2, dilations=[2, 3], pads=[2, 1, 3, 4])
    return n.model(y, n.op("Conv", x, n.weight(5, 4, 2, 3), dilations=[3, 1]))


@pytest.fixture
def quantized(net):
    n = net()
    y = n.op("Conv", n.qdq(n.input(1, 3, 9, 9)), n.int8_weight(4, 3, 3, 3, axis=0), dilations=[2, 2], pads=[2] * 4)
    return n.model(n.qdq(y))


def test_structure(dilated, quantized, target_with, apply):
    after = apply(dilated, ExpandDilation(target_with(ANY_KERNEL)))
    assert after.op_types == ["Conv", "Conv"]
    assert [after.array(node.inputs[1]).shape for node in after.model.graph] == [(6, 2, 5, 7), (5, 4, 4, 3)]
    after = apply(quantized, ExpandDilation(target_with(ANY_KERNEL)))
    assert after.array(after.the("Conv").inputs[1].producer().inputs[0]).shape == (4, 3, 5, 5)


def test_space_to_batch_where_the_kernel_is_limited(dilated, target_with, apply):
    after = apply(dilated, ExpandDilation(target_with(SMALL_KERNEL)))
    convs = [node for node in after.model.graph if node.op_type == "Conv"]
    assert [shape_of(node.inputs[0])[0] for node in convs] == [12, 6]
    assert all("dilations" not in node.attributes for node in convs)
    assert max(len(shape_of(node.outputs[0])) for node in after.model.graph) == 4


@pytest.mark.parametrize("rule", [ANY_KERNEL, SMALL_KERNEL])
def test_numerics(dilated, quantized, target_with, apply, rule):
    assert apply(dilated, ExpandDilation(target_with(rule))).largest_error() < 1e-6
    assert apply(quantized, ExpandDilation(target_with(rule))).largest_error() == 0


@pytest.mark.parametrize("seed", range(6))
def test_numerics_over_sizes(net, target_with, apply, seed):
    rng = np.random.default_rng(seed)
    n = net(seed)
    pads, dilations = rng.integers(0, 4, 4).tolist(), rng.integers(1, 4, 2).tolist()
    x = n.input(1, 2, *rng.integers(8, 14, 2).tolist())
    model = n.model(n.op("Conv", x, n.weight(3, 2, 3, 2), pads=pads, dilations=dilations))
    assert apply(model, ExpandDilation(target_with(SMALL_KERNEL))).largest_error() < 1e-6


def test_many_zeros_are_not_written_out(net, target_with, apply, assert_refused):
    n = net()
    x = n.input(1, 2, 31, 31)
    model = n.model(n.op("Conv", x, n.weight(3, 2, 3, 3), dilations=[6, 6], pads=[6] * 4))
    after = apply(model, ExpandDilation(target_with(ANY_KERNEL)))
    assert shape_of(after.the("Conv").inputs[0])[0] == 36 and after.largest_error() < 1e-6
    one_image = target_with(ANY_KERNEL | {"where": NO_DILATION | {"batch": 1}})
    assert_refused(model, ExpandDilation(one_image))  # 13 x 13 for 3 x 3
    mild = n.model(n.op("Conv", x, n.weight(3, 2, 3, 3), dilations=[4, 4], pads=[4] * 4))
    assert apply(mild, ExpandDilation(one_image)).op_types[-1] == "Conv"


def test_fixpoint(dilated, quantized, target_with, assert_settled):
    assert_settled(dilated, ExpandDilation(target_with(SMALL_KERNEL)))
    assert_settled(quantized, ExpandDilation(target_with(ANY_KERNEL)))


def test_refusal(net, dilated, target_with, cpu_target, assert_refused):
    assert_refused(dilated, ExpandDilation(target_with({"ops": ["Conv"]})))
    assert_refused(dilated, ExpandDilation(cpu_target))
    one_image = SMALL_KERNEL | {"where": SMALL_KERNEL["where"] | {"batch": 1}}
    assert_refused(dilated, ExpandDilation(target_with(one_image)))
    n = net()
    strided = n.op("Conv", n.input(1, 2, 9, 9), n.weight(2, 2, 3, 3), dilations=[2, 2], strides=[2, 2])
    assert_refused(n.model(strided), ExpandDilation(target_with(SMALL_KERNEL)))
