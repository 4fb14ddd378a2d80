import pytest

from qcompiler.graph import integer
from qcompiler.passes.split_grouped_conv import SplitGroupedConv

PLAIN = {"ops": ["Conv"], "where": {"group": 1}}
DEPTHWISE = {"ops": ["Conv"], "where": {"depthwise": True}}


@pytest.fixture
def grouped(net):
    n = net()
    return n.model(n.op("Conv", n.input(1, 8, 7, 6), n.weight(12, 4, 3, 3), n.weight(12), group=2, pads=[1] * 4))


@pytest.fixture
def quantized(net):
    n = net()
    return n.model(
        n.qdq(n.op("Conv", n.qdq(n.input(1, 8, 5, 5)), n.int8_weight(6, 4, 3, 3, axis=0), n.int32_bias(6), group=2))
    )


def test_structure(grouped, target_with, apply):
    after = apply(grouped, SplitGroupedConv(target_with(PLAIN)))
    assert after.op_types == ["Split", "Conv", "Conv", "Concat"]
    assert [after.array(node.inputs[1]).shape for node in after.model.graph if node.op_type == "Conv"] == [
        (6, 4, 3, 3)
    ] * 2


def test_narrow_groups_become_one_dense_conv(grouped, target_with, apply):
    """Rounded up to 16 channels, two pieces would cost more than the zeros."""
    after = apply(grouped, SplitGroupedConv(target_with(PLAIN, channel_alignment=16)))
    conv = after.the("Conv")
    assert after.op_types == ["Conv"] and after.array(conv.inputs[1]).shape == (12, 8, 3, 3)
    assert integer(conv, "group") == 1 and after.largest_error() < 1e-6


def test_quantized_weights_are_cut_with_their_scales(quantized, target_with, apply):
    after = apply(quantized, SplitGroupedConv(target_with(PLAIN)))
    weights = [node.inputs[1].producer() for node in after.model.graph if node.op_type == "Conv"]
    assert [after.array(weight.inputs[0]).shape for weight in weights] == [(3, 4, 3, 3)] * 2
    assert [after.array(weight.inputs[1]).shape for weight in weights] == [(3,)] * 2


@pytest.mark.parametrize("alignment", [1, 16])
def test_numerics(grouped, quantized, target_with, apply, alignment):
    target = target_with(PLAIN, channel_alignment=alignment)
    assert apply(grouped, SplitGroupedConv(target)).largest_error() < 1e-6
    assert apply(quantized, SplitGroupedConv(target)).largest_error() == 0


def test_channel_multiplier(net, target_with, apply):
    """Neither depthwise nor a handful of groups: 24 groups of one channel become a dense convolution."""
    n = net()
    model = n.model(n.op("Conv", n.input(1, 24, 5, 5), n.weight(48, 1, 3, 3), group=24))
    after = apply(model, SplitGroupedConv(target_with(PLAIN, DEPTHWISE)))
    assert after.op_types == ["Conv"] and after.largest_error() < 1e-6


def test_fixpoint(grouped, quantized, target_with, assert_settled):
    assert_settled(grouped, SplitGroupedConv(target_with(PLAIN)))
    assert_settled(quantized, SplitGroupedConv(target_with(PLAIN, channel_alignment=16)))


def test_refusal(net, grouped, target_with, cpu_target, assert_refused):
    assert_refused(grouped, SplitGroupedConv(target_with({"ops": ["Conv"]})))  # taken as it is
    assert_refused(grouped, SplitGroupedConv(target_with({"ops": ["Gemm"]})))  # not taken either way
    assert_refused(grouped, SplitGroupedConv(cpu_target))
    n = net()
    depthwise = n.op("Conv", n.input(1, 6, 5, 5), n.weight(6, 1, 3, 3), group=6)
    run_time = n.op("Conv", n.input(1, 6, 5, 5), n.op("Relu", n.input(4, 3, 3, 3)), group=2)
    assert_refused(n.model(depthwise, run_time), SplitGroupedConv(target_with(PLAIN, DEPTHWISE)))
