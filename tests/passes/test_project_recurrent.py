import numpy as np
import pytest

from qcompiler.graph import const_of
from qcompiler.passes.normalize_recurrent import NormalizeRecurrent
from qcompiler.passes.project_recurrent import ProjectRecurrent
from qcompiler.recurrent import is_projected

STEPS, BATCH, WIDTH, HIDDEN = 5, 2, 6, 8


@pytest.fixture
def layers(net):
    n = net()
    x = n.input(STEPS, BATCH, WIDTH)
    lstm = n.op("LSTM", x, n.weight(1, 32, WIDTH), n.weight(1, 32, HIDDEN), n.weight(1, 64), hidden_size=HIDDEN)
    gru = n.op("GRU", x, n.weight(1, 24, WIDTH), n.weight(1, 24, HIDDEN), n.weight(1, 48), hidden_size=HIDDEN)
    bare = n.op("RNN", x, n.weight(1, 8, WIDTH), n.weight(1, 8, HIDDEN), hidden_size=HIDDEN, direction="reverse")
    return n.model(lstm, gru, bare)


@pytest.fixture
def reset_after(net):
    n = net()
    x, bias = n.input(STEPS, BATCH, WIDTH), n.weight(1, 48)
    weights = n.weight(1, 24, WIDTH), n.weight(1, 24, HIDDEN)
    return n.model(n.op("GRU", x, *weights, bias, hidden_size=HIDDEN, linear_before_reset=1))


@pytest.fixture
def quantized(net):
    n = net()
    x = n.qdq(n.input(STEPS, BATCH, WIDTH))
    weights = n.int8_weight(1, 32, WIDTH, axis=1), n.int8_weight(1, 32, HIDDEN, axis=1)
    return n.model(n.op("LSTM", x, *weights, n.weight(1, 64), hidden_size=HIDDEN))


def test_structure(layers, apply):
    after = apply(layers, ProjectRecurrent())
    assert [name for name in after.op_types if name != "Reshape"] == ["Gemm", "LSTM", "Gemm", "GRU", "Gemm", "RNN"]
    for node in after.model.graph:
        if node.op_type in ("LSTM", "GRU", "RNN"):
            assert is_projected(node) and (len(node.inputs) < 4 or node.inputs[3] is None)
    assert [len(node.inputs) for node in after.model.graph if node.op_type == "Gemm"] == [3, 3, 2]


def test_the_bias_that_is_reset_stays_inside(reset_after, apply):
    after = apply(reset_after, ProjectRecurrent())
    inside, outside = const_of(after.the("GRU").inputs[3]), const_of(after.the("Gemm").inputs[2])
    assert inside is not None and outside is not None
    assert not inside[0, :40].any() and inside[0, 40:].all() and outside.all()


def test_numerics(layers, reset_after, apply):
    assert apply(layers, ProjectRecurrent()).largest_error() < 1e-5
    assert apply(reset_after, ProjectRecurrent()).largest_error() < 1e-5


def test_quantized_weights_stay_integers(quantized, apply):
    after = apply(quantized, ProjectRecurrent())
    weight = after.the("Gemm").inputs[1].producer()
    assert weight.op_type == "DequantizeLinear" and after.array(weight.inputs[0]).dtype == np.int8
    assert after.largest_error() < 1e-5


def test_settles(layers, assert_settled):
    assert_settled(layers, ProjectRecurrent())


def test_weights_of_run_time_and_unknown_functions_are_refused(net, assert_refused):
    n = net()
    x, weights = n.input(STEPS, BATCH, WIDTH), n.input(1, 8, WIDTH)
    assert_refused(n.model(n.op("RNN", x, weights, n.weight(1, 8, HIDDEN), hidden_size=HIDDEN)), ProjectRecurrent())


def test_directions_are_taken_apart_before(net, apply):
    n = net()
    x = n.input(STEPS, BATCH, WIDTH)
    both = n.op("RNN", x, n.weight(2, 8, WIDTH), n.weight(2, 8, HIDDEN), hidden_size=HIDDEN, direction="bidirectional")
    model = n.model(both)
    assert not ProjectRecurrent()(model).modified
    apply(model, NormalizeRecurrent())
    assert apply(model, ProjectRecurrent()).op_types.count("Gemm") == 2
