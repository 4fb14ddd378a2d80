import numpy as np
import pytest

from qcompiler.graph import shape_of
from qcompiler.passes.lower_conv_transpose import LowerConvTranspose

CONV = {"ops": ["Conv"]}


@pytest.fixture
def deconvolutions(net):
    n = net()
    x = n.input(2, 4, 5, 6)
    up = n.op(
        "ConvTranspose", x, n.weight(4, 3, 3, 4), n.weight(3), strides=[2, 3], pads=[1, 0, 1, 2], output_padding=[1, 2]
    )
    grouped = n.op("ConvTranspose", x, n.weight(4, 3, 2, 2), group=2, strides=[2, 2])
    dilated = n.op("ConvTranspose", x, n.weight(4, 2, 3, 3), dilations=[2, 1], strides=[1, 2], pads=[1, 1, 2, 0])
    return n.model(up, grouped, dilated)


@pytest.fixture
def quantized(net):
    n = net()
    y = n.op(
        "ConvTranspose", n.qdq(n.input(1, 4, 5, 5)), n.int8_weight(4, 6, 3, 3, axis=1), n.int32_bias(6), strides=[2, 2]
    )
    return n.model(n.qdq(y))


def test_structure(deconvolutions, quantized, target_with, apply):
    target = target_with(CONV)
    after = apply(deconvolutions, LowerConvTranspose(target))
    assert after.op_types.count("Conv") == 3 and "ConvTranspose" not in after.op_types
    assert max(len(shape_of(node.outputs[0])) for node in after.model.graph) == 4
    after = apply(quantized, LowerConvTranspose(target))
    weight = after.the("Conv").inputs[1].producer()
    assert after.array(weight.inputs[0]).shape == (6, 4, 3, 3) and weight.attributes["axis"].as_int() == 0


def test_numerics(deconvolutions, quantized, target_with, apply):
    assert apply(deconvolutions, LowerConvTranspose(target_with(CONV))).largest_error() < 1e-6
    assert apply(quantized, LowerConvTranspose(target_with(CONV))).largest_error() == 0


@pytest.mark.parametrize("seed", range(8))
def test_numerics_over_forms(net, target_with, apply, seed):
    rng = np.random.default_rng(seed)
    n = net(seed)
    strides = rng.integers(1, 4, 2)
    kernel = strides + rng.integers(0, 3, 2)
    attributes = {"strides": strides.tolist(), "pads": (rng.integers(0, 2, 4) % kernel.min()).tolist()}
    extra = [int(rng.integers(0, stride)) for stride in strides]
    x = n.input(1, 3, *rng.integers(1, 7, 2).tolist())
    model = n.model(n.op("ConvTranspose", x, n.weight(3, 2, *kernel), output_padding=extra, **attributes))
    after = apply(model, LowerConvTranspose(target_with(CONV)))
    # Cropping more than the kernel reaches behind the last pixel is left alone.
    assert ("Conv" in after.op_types) or any(attributes["pads"])
    assert after.largest_error() < 1e-6


def test_fixpoint(deconvolutions, quantized, target_with, assert_settled):
    assert_settled(deconvolutions, LowerConvTranspose(target_with(CONV)))
    assert_settled(quantized, LowerConvTranspose(target_with(CONV)))


def test_refusal(net, deconvolutions, target_with, cpu_target, assert_refused):
    assert_refused(deconvolutions, LowerConvTranspose(target_with({"ops": ["Conv", "ConvTranspose"]})))
    assert_refused(deconvolutions, LowerConvTranspose(target_with({"ops": ["Gemm"]})))
    assert_refused(deconvolutions, LowerConvTranspose(cpu_target))
    n = net()
    cropped = n.op("ConvTranspose", n.input(1, 2, 5, 5), n.weight(2, 2, 1, 1), strides=[3, 3], pads=[1, 1, 1, 1])
    run_time = n.op("ConvTranspose", n.input(1, 2, 5, 5), n.op("Relu", n.input(2, 3, 2, 2)))
    by_group = n.op("ConvTranspose", n.qdq(n.input(1, 4, 5, 5)), n.int8_weight(4, 2, 3, 3, axis=1), group=2)
    assert_refused(n.model(cropped, run_time, by_group), LowerConvTranspose(target_with(CONV)))
