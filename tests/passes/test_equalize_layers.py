import numpy as np
import pytest

from qcompiler.calibrate import calibrate
from qcompiler.passes.equalize_layers import TOLERANCE, EqualizeLayers
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.repair import output_errors
from qcompiler.target_loader import load_target


def _depthwise_chain(net, seed=0):
    """Pointwise, depthwise, pointwise; channels between them span four decades."""
    n = net(seed)
    spread = 10.0 ** np.random.default_rng(seed).uniform(-2, 2, 12)
    x = n.input(1, 4, 9, 11)
    first = n.rng.standard_normal((12, 4, 1, 1)) * spread.reshape(-1, 1, 1, 1)
    a = n.op("Relu", n.op("Conv", x, n.const(first), n.const(0.1 * spread)))
    depthwise = n.rng.standard_normal((12, 1, 3, 3))
    b = n.op("Relu", n.op("Conv", a, n.const(depthwise), n.const(0.1 * spread), group=12, pads=[1, 1, 1, 1]))
    last = n.rng.standard_normal((6, 12, 1, 1)) / spread.reshape(1, -1, 1, 1)
    c = n.op("GlobalAveragePool", n.op("LeakyRelu", n.op("Conv", b, n.const(last)), alpha=0.1))
    return n.model(c)


def _made(node):
    weights = node.inputs[1].const_value.numpy()
    return np.abs(weights).reshape(weights.shape[0], -1).max(axis=1)


def _read(node, group):
    weights = node.inputs[1].const_value.numpy()
    grouped = np.abs(weights).reshape(group, weights.shape[0] // group, weights.shape[1], -1)
    return grouped.max(axis=(1, 3)).reshape(-1)


def test_both_sides_of_every_channel_become_equal(net, apply):
    outcome = apply(_depthwise_chain(net), EqualizeLayers())
    first, depthwise, last = (node for node in outcome.model.graph if node.op_type == "Conv")
    assert outcome.modified
    np.testing.assert_allclose(_made(first), _read(depthwise, 12), rtol=3 * TOLERANCE)
    np.testing.assert_allclose(_made(depthwise), _read(last, 1), rtol=3 * TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_it_computes_the_same(net, apply, seed):
    outcome = apply(_depthwise_chain(net, seed), EqualizeLayers())
    assert outcome.largest_error() < 1e-5


def test_it_settles(net, assert_settled):
    assert_settled(_depthwise_chain(net), EqualizeLayers())


def test_channels_others_read_and_bounds_stay(net, assert_refused):
    n = net()
    x = n.input(1, 3, 8, 8)
    a = n.op("Relu", n.op("Conv", x, n.weight(4, 3, 1, 1)))
    assert_refused(n.model(n.op("Add", a, n.op("Conv", a, n.weight(4, 4, 1, 1)))), EqualizeLayers())
    n = net()
    x = n.input(1, 3, 8, 8)
    a = n.op("Clip", n.op("Conv", x, n.weight(4, 3, 1, 1)), n.const(0.0), n.const(6.0))
    assert_refused(n.model(n.op("Conv", a, n.weight(4, 4, 1, 1))), EqualizeLayers())


def test_a_badly_scaled_network_survives_one_scale_per_tensor(net):
    """SQNR in decibel with per-tensor 8-bit weights, before and after."""
    base = load_target("systolic-npu")
    weights = base.quantization.weights.model_copy(update={"per_channel": False})
    target = base.model_copy(update={"quantization": base.quantization.model_copy(update={"weights": weights})})
    rng = np.random.default_rng(5)

    class Data(list):
        synthetic = False

    def sqnr(model):
        name = model.graph.inputs[0].name
        data = Data({name: rng.standard_normal((1, 4, 9, 11)).astype(np.float32)} for _ in range(8))
        formats = plan(model, calibrate(model, data), target)
        return -10 * np.log10(output_errors(model, [quantize(model, formats)], data)[0])

    model = _depthwise_chain(net, 1)
    before = sqnr(model)
    EqualizeLayers()(model)
    assert before < 15 and sqnr(model) > before + 15
