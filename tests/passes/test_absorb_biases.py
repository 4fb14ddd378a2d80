from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcompiler.passes.absorb_biases import DEVIATIONS, AbsorbBiases, ChannelMoments
from qcompiler.quant.repair import equalizers


def _model(net, seed=0, *, group=1, pads=(0, 0, 0, 0), bias=True):
    """Half of the channels between the layers lie well above zero."""
    n = net(seed)
    x = n.input(1, 3, 7, 6)
    weights = n.rng.uniform(-0.01, 0.01, (8, 3, 1, 1))
    offset = np.where(np.arange(8) % 2, 5.0, 0.0)
    between = n.op("Relu", n.op("Conv", x, n.const(weights), n.const(offset)))
    last = n.rng.standard_normal((8, 8 // group, 3, 3))
    extra = [n.const(n.rng.standard_normal(8))] if bias else []
    return n.model(n.op("Conv", between, n.const(last), *extra, group=group, pads=list(pads)))


def _moments(model):
    made = next(node for node in model.graph if node.op_type == "Conv").outputs[0].name
    return {made: ChannelMoments(np.where(np.arange(8) % 2, 5.0, 0.0), np.full(8, 0.1))}


def test_the_common_part_moves_to_the_next_bias(net, apply):
    model = _model(net)
    before = [node.inputs[2].const_value.numpy() for node in model.graph if node.op_type == "Conv"]
    outcome = apply(model, AbsorbBiases(_moments(model)))
    first, second = (node for node in outcome.model.graph if node.op_type == "Conv")
    common = np.where(np.arange(8) % 2, 5.0 - DEVIATIONS * 0.1, 0.0)
    np.testing.assert_allclose(first.inputs[2].const_value.numpy(), before[0] - common, rtol=1e-6)
    gained = second.inputs[1].const_value.numpy().sum(axis=(2, 3)) @ common
    np.testing.assert_allclose(second.inputs[2].const_value.numpy(), before[1] + gained, rtol=1e-5)


def test_it_computes_the_same(net, apply):
    for seed, group, bias in ((0, 1, True), (1, 8, True), (2, 2, False)):
        model = _model(net, seed, group=group, bias=bias)
        outcome = apply(model, AbsorbBiases(_moments(model)))
        assert outcome.modified and outcome.largest_error() < 1e-5


def test_it_settles(net, assert_settled):
    model = _model(net)
    assert_settled(model, AbsorbBiases(_moments(model)))


def test_padding_other_readers_and_low_channels_stay(net, assert_refused):
    padded = _model(net, pads=(1, 1, 1, 1))
    assert_refused(padded, AbsorbBiases(_moments(padded)))
    low = _model(net)
    assert_refused(low, AbsorbBiases({name: ChannelMoments(m.mean, m.mean) for name, m in _moments(low).items()}))
    n = net(0)
    x = n.input(1, 3, 5, 5)
    between = n.op("Relu", n.op("Conv", x, n.weight(4, 3, 1, 1), n.const(np.full(4, 9.0))))
    shared = n.model(n.op("Add", between, n.op("Conv", between, n.weight(4, 4, 1, 1))))
    made = next(node for node in shared.graph if node.op_type == "Conv").outputs[0].name
    assert_refused(shared, AbsorbBiases({made: ChannelMoments(np.full(4, 9.0), np.full(4, 0.1))}))


@dataclass(frozen=True)
class _Samples:
    arrays: tuple[dict[str, np.ndarray], ...]
    synthetic: bool = False

    def __len__(self) -> int:
        return len(self.arrays)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(self.arrays)


def test_repair_measures_the_moments(net, apply):
    model = _model(net)
    name = model.graph.inputs[0].name
    rng = np.random.default_rng(0)
    samples = _Samples(tuple({name: rng.uniform(-1, 1, (1, 3, 7, 6)).astype(np.float32)} for _ in range(8)))
    changes = [change for change in equalizers(model, samples, per_channel=True) if isinstance(change, AbsorbBiases)]
    outcome = apply(model, changes[0])
    first = next(node for node in outcome.model.graph if node.op_type == "Conv")
    assert outcome.modified and (first.inputs[2].const_value.numpy()[1::2] < 1.0).all()
