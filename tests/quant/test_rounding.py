import numpy as np
import pytest

from qcompiler.quant.rounding import Problem, adaround, damped, descend, gptq


def make_problem(seed, groups=1, rows=24, columns=72, bits=4, samples=4000):
    """Weights to round for inputs that are correlated and, as after a Relu, not centred."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((groups, columns, columns)) / columns**0.5
    x = np.maximum(rng.standard_normal((groups, samples, columns)) @ mix + 0.3, 0)
    weights = rng.standard_normal((groups, rows, columns))
    high = 2 ** (bits - 1) - 1
    scale = np.abs(weights).max(axis=2, keepdims=True) / high
    hessian = damped(x.transpose(0, 2, 1) @ x / samples, samples)
    return Problem(weights, hessian, scale, np.zeros_like(scale), -high, high), x


def _output_error(problem, integers, x):
    return np.square(x @ (problem.weights - problem.real(integers)).transpose(0, 2, 1)).mean(axis=1).sum()


METHODS = {"gptq": gptq, "descend": lambda p: descend(p, p.nearest()), "adaround": adaround}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", [1, 5])
def test_output_error_falls_well_below_rounding_to_nearest(method, groups):
    problem, x = make_problem(1, groups, columns=72 if groups == 1 else 9)
    chosen = METHODS[method](problem)
    assert chosen.shape == problem.weights.shape
    assert np.array_equal(chosen, np.rint(chosen)) and np.abs(chosen).max() <= problem.high
    # Measured on the inputs themselves, not by the quadratic form that was minimised.
    assert _output_error(problem, chosen, x) < 0.85 * _output_error(problem, problem.nearest(), x)


def test_learned_rounding_beats_the_closed_form_and_stays_between_neighbours():
    problem, x = make_problem(2, columns=144)
    learned, closed = adaround(problem), gptq(problem)
    assert _output_error(problem, learned, x) < _output_error(problem, closed, x)
    assert np.abs(problem.weights - problem.real(learned)).max() <= problem.scale.max() * (1 + 1e-9)


def test_descent_never_makes_it_worse():
    problem, _ = make_problem(3)
    start = gptq(problem)
    errors = [problem.error(descend(problem, start, sweeps)) for sweeps in (0, 1, 2, 8)]
    assert errors[0] == problem.error(start) and errors == sorted(errors, reverse=True)


def test_uncorrelated_inputs_leave_nothing_to_gain():
    problem, _ = make_problem(4)
    plain = Problem(problem.weights, np.eye(72)[None], problem.scale, problem.zero_point, problem.low, problem.high)
    for method in (gptq, METHODS["descend"]):
        np.testing.assert_array_equal(method(plain), plain.nearest())


def test_an_asymmetric_grid_keeps_its_limits():
    symmetric, x = make_problem(5)
    problem = Problem(symmetric.weights, symmetric.hessian, symmetric.scale, np.full((1, 24, 1), 9.0), 0, 15)
    for method in METHODS.values():
        chosen = method(problem)
        assert chosen.min() >= 0 and chosen.max() <= 15
        assert _output_error(problem, chosen, x) < _output_error(problem, problem.nearest(), x)


def test_few_rows_are_hardly_trusted():
    gram = np.array([[[2.0, 1.0], [1.0, 2.0]]])
    assert damped(gram, 2, 0.0)[0, 0, 1] == 0.5 and damped(gram, 2, 0.0)[0, 0, 0] == 2.0
    assert damped(gram, 10**6)[0, 0, 1] == pytest.approx(1.0, rel=1e-5)
    assert np.linalg.eigvalsh(damped(np.zeros((1, 3, 3)), 5)).min() > 0


@pytest.mark.parametrize("rounder", [gptq, adaround])
def test_binary_weights(rounder) -> None:
    """Only -1 and 1 come out, the error is no larger than that of the signs, and descending finds no better."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((400, 12)) @ rng.standard_normal((12, 12))
    hessian = damped((x.T @ x / 400)[None], 400)
    weights = rng.standard_normal((1, 5, 12))
    scale = np.abs(weights).mean(axis=2, keepdims=True)
    problem = Problem(weights, hessian, scale, np.zeros((1, 5, 1)), -1, 1, step=2)
    np.testing.assert_array_equal(problem.nearest(), np.where(weights < 0, -1, 1))
    chosen = descend(problem, rounder(problem))
    assert set(np.unique(chosen)) == {-1, 1}
    assert problem.error(chosen) < problem.error(problem.nearest())
