import pytest

from qcompiler.passes.share_scales import ShareScales
from qcompiler.target_loader import load_target


@pytest.fixture(scope="module")
def share():
    return ShareScales(load_target("arm-npu"))


@pytest.fixture
def joined(net):
    """Concat of three formats and a constant, and pools whose output format differs from their input's."""
    n = net()
    x = n.input(1, 4, 8, 6)
    same, other = n.qdq(x, 0.04, 1), n.qdq(x, 0.011, -20)
    floating = n.op("Sin", x)
    joined = n.qdq(n.op("Concat", same, other, floating, other, n.weight(1, 2, 8, 6), axis=1), 0.04, 1)
    pooled = n.qdq(n.op("MaxPool", other, kernel_shape=[2, 2], strides=[2, 2]), 0.03, 5)
    resized = n.qdq(n.op("Resize", other, "", n.const([1, 1, 2, 2]), mode="nearest"), 0.03, 5)
    return n.model(joined, pooled, resized)


def _scale(dequantize):
    return float(dequantize.inputs[1].const_value.numpy())


def test_structure(joined, apply, share):
    after = apply(joined, share)
    concat = after.the("Concat")
    made = [value.producer() for value in concat.inputs[:4]]
    assert [node.op_type for node in made] == ["DequantizeLinear"] * 4
    assert [_scale(node) for node in made] == pytest.approx([0.04] * 4)
    # The requantize stands where there is less data: behind the pool, before the enlargement.
    assert _scale(after.the("MaxPool").outputs[0].uses()[0].node) == pytest.approx(0.011)
    assert _scale(after.the("Resize").inputs[0].producer()) == pytest.approx(0.03)


def test_numerics(joined, apply, share):
    assert apply(joined, share).largest_error() == 0


def test_fixpoint(joined, assert_settled, share):
    assert_settled(joined, share)


def test_only_what_the_target_names(joined, assert_refused):
    target = load_target("arm-npu")
    quantization = target.quantization.model_copy(update={"shared_scale": ("Split",)})
    assert_refused(joined, ShareScales(target.model_copy(update={"quantization": quantization})))


def test_refusal(net, assert_refused, share):
    n = net()
    x = n.input(1, 4, 8, 6)
    quantized, other = n.qdq(x, 0.04, 1), n.qdq(x, 0.011, -20)
    shared = n.qdq(n.op("Concat", quantized, quantized, axis=1), 0.04, 1)
    unquantized = n.op("Concat", quantized, other, axis=1)
    assert_refused(n.model(shared, n.op("Sin", unquantized), n.op("MaxPool", other, kernel_shape=[2, 2])), share)
