import numpy as np
import pytest

from qcompiler.passes.normalize_recurrent import NormalizeRecurrent

STEPS, BATCH, WIDTH, HIDDEN = 5, 4, 6, 8
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(n, kind, *rest, directions=2, outputs=1, **attributes):
    rows = GATES[kind] * HIDDEN
    operands = [
        n.input(STEPS, BATCH, WIDTH),
        n.weight(directions, rows, WIDTH),
        n.weight(directions, rows, HIDDEN),
        n.weight(directions, 2 * rows),
    ]
    direction = {"direction": "bidirectional"} if directions == 2 else {}
    return n.ops(kind, *operands, *rest, outputs=outputs, hidden_size=HIDDEN, **direction, **attributes)


@pytest.fixture
def both_ways(net):
    n = net()
    lstm = recurrent(n, "LSTM", "", n.input(2, BATCH, HIDDEN), n.weight(2, BATCH, HIDDEN), n.weight(2, 24), outputs=3)
    gru = recurrent(n, "GRU", outputs=2, linear_before_reset=1)
    rnn = recurrent(n, "RNN", activations=["Relu", "Tanh"])
    return n.model(*lstm, *gru, *rnn)


def lengths(net, kind, *numbers, **options):
    n = net()
    states = [n.input(2, BATCH, HIDDEN)] if options.pop("starts", False) else []
    values = recurrent(n, kind, n.const(numbers, np.int32), *states, **options)
    return n.model(*values)


def test_structure(both_ways, apply):
    after = apply(both_ways, NormalizeRecurrent())
    nodes = [node for node in after.model.graph if node.op_type in GATES]
    assert [node.op_type for node in nodes] == ["LSTM", "LSTM", "GRU", "GRU", "RNN", "RNN"]
    assert [node.attributes["direction"].as_string() for node in nodes] == ["forward", "reverse"] * 3
    assert [node.attributes["activations"].as_strings() for node in nodes[4:]] == [("Relu",), ("Tanh",)]
    assert all(len(node.outputs) == outputs for node, outputs in zip(nodes, (3, 3, 2, 2, 1, 1), strict=True))


def test_numerics(both_ways, apply):
    assert apply(both_ways, NormalizeRecurrent()).largest_error() < 1e-5


def test_settles(both_ways, assert_settled):
    assert_settled(both_ways, NormalizeRecurrent())


@pytest.mark.parametrize(
    ("numbers", "pieces"), [((5, 5, 5, 5), 2), ((3, 3, 3, 3), 2), ((5, 2, 2, 4), 6), ((0, 5, 0, 1), 4)]
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_constant_lengths_become_shorter_sequences(net, apply, kind, numbers, pieces):
    outputs = 3 if kind == "LSTM" else 2
    after = apply(lengths(net, kind, *numbers, outputs=outputs, starts=True), NormalizeRecurrent())
    nodes = [node for node in after.model.graph if node.op_type == kind]
    assert len(nodes) == pieces and all(len(node.inputs) < 5 or node.inputs[4] is None for node in nodes)
    assert after.largest_error() < 1e-5


def test_lengths_of_run_time_stay(net, apply):
    n = net()
    values = recurrent(n, "GRU", n.op("Cast", n.input(BATCH), to=6), directions=1)
    assert apply(n.model(*values), NormalizeRecurrent()).op_types == ["Cast", "GRU"]
