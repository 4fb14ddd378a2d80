import numpy as np

from qcompiler.passes.migrate_scales import MigrateScales


def _attention_input(net, seed=0, outlier=60.0):
    """What follows a layer normalization: gamma, beta, and the products for query and key."""
    n = net(seed)
    gamma = n.rng.uniform(0.5, 1.5, 16)
    gamma[3] = outlier
    x = n.input(1, 7, 16)
    y = n.op("Add", n.op("Mul", x, n.const(gamma)), n.weight(16))
    return n.model(n.op("MatMul", y, n.weight(16, 8)), n.op("MatMul", y, n.weight(16, 12))), y


def _maxima(name, outlier=60.0):
    largest = np.full(16, 3.0)
    largest[3] = 3 * outlier
    return {name: largest}


def test_channels_meet_half_way(net, apply):
    model, y = _attention_input(net)
    weights = [node.inputs[1].const_value.numpy() for node in model.graph if node.op_type == "MatMul"]
    gamma = next(node for node in model.graph if node.op_type == "Mul").inputs[1].const_value.numpy()
    outcome = apply(model, MigrateScales(_maxima(y)))
    read = np.abs(np.concatenate(weights, axis=1)).max(axis=1)
    factor = np.sqrt(_maxima(y)[y] / read)
    np.testing.assert_allclose(outcome.array(outcome.the("Mul").inputs[1]), gamma / factor, rtol=1e-5)
    for node, old in zip((n for n in outcome.model.graph if n.op_type == "MatMul"), weights, strict=True):
        np.testing.assert_allclose(outcome.array(node.inputs[1]), old * factor[:, None], rtol=1e-5)


def test_it_computes_the_same(net, apply):
    model, y = _attention_input(net, 1)
    assert apply(model, MigrateScales(_maxima(y))).largest_error() < 1e-5


def test_it_runs_once(net, assert_settled):
    model, y = _attention_input(net)
    assert_settled(model, MigrateScales(_maxima(y)))


def test_other_readers_and_unknown_tensors_are_left_alone(net, assert_refused):
    model, _ = _attention_input(net)
    assert_refused(model, MigrateScales({}))
    n = net()
    y = n.op("Mul", n.input(1, 7, 16), n.weight(16))
    assert_refused(n.model(n.op("MatMul", y, n.weight(16, 8)), n.op("Relu", y)), MigrateScales(_maxima(y)))
    n = net()
    y = n.op("Relu", n.input(1, 7, 16))
    assert_refused(n.model(n.op("MatMul", y, n.weight(16, 8))), MigrateScales(_maxima(y)))


def test_one_activation_scale_suits_all_channels_better(net):
    """Products of inputs rounded to 8 bits per tensor: the squared error falls to less than a fifth."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((500, 16))
    errors = []
    for migrate in (False, True):
        model, y = _attention_input(net, 2)
        if migrate:
            MigrateScales(_maxima(y))(model)
        constants = {node.op_type: node.inputs[1].const_value.numpy() for node in model.graph}
        tensor = x * constants["Mul"] + constants["Add"]
        step, weights = np.abs(tensor).max() / 127, constants["MatMul"]
        errors.append(np.square((np.rint(tensor / step) * step - tensor) @ weights).mean())
    assert errors[1] < 0.2 * errors[0]
