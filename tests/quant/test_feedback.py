import numpy as np
import pytest

from qcompiler.quant.feedback import corrected
from qcompiler.quant.moments import Moments


def _moments(x, x_hat):
    """Of rows [groups, rows, K]."""
    rows = x.shape[1]
    turned = x_hat.transpose(0, 2, 1)
    return Moments(
        turned @ x_hat / rows, x.transpose(0, 2, 1) @ x / rows, turned @ x / rows, x_hat.mean(1), x.mean(1), rows
    )


def _error(weights, found, x, x_hat):
    wanted, reached = x @ weights.transpose(0, 2, 1), x_hat @ found.transpose(0, 2, 1)
    return np.square(wanted - reached - (wanted - reached).mean(1, keepdims=True)).mean()


def _parts(rng, rows, groups, size, *, mixed):
    """Inputs, and what became of them: errors that depend on them if `mixed`, and are chance if not."""
    mix = rng.standard_normal((groups, size, size)) / size
    for _ in range(2):
        x = rng.standard_normal((groups, rows, size)) + 1
        noise = x @ mix if mixed else 0.05 * rng.standard_normal(x.shape)
        yield x, x + noise + 0.3


@pytest.mark.parametrize(("groups", "size"), [(1, 24), (5, 9)])
def test_errors_that_follow_from_inputs_are_made_up_for(groups, size):
    rng = np.random.default_rng(groups)
    weights = rng.standard_normal((groups, 7, size))
    parts = list(_parts(rng, 4000, groups, size, mixed=True))
    found = corrected(weights, [_moments(*part) for part in parts], centred=True)
    for part in parts:
        assert _error(weights, found, *part) < 0.02 * _error(weights, weights, *part)


def test_what_few_rows_say_is_not_believed():
    """Errors are chance here, and rows fewer than weights: one damping for all would fit them, and do harm."""
    rng = np.random.default_rng(3)
    weights = rng.standard_normal((1, 6, 64))
    parts = list(_parts(rng, 20, 1, 64, mixed=False))
    seen = [_moments(*part) for part in parts]
    (fresh, _) = _parts(rng, 5000, 1, 64, mixed=False)
    before = _error(weights, weights, *fresh)
    bold, careful = corrected(weights, [seen[0].joined(seen[1])], centred=True), corrected(weights, seen, centred=True)
    assert _error(weights, bold, *fresh) > 1.2 * before
    assert _error(weights, careful, *fresh) < 1.05 * before


def test_weights_stay_if_every_correction_does_harm():
    """What the halves say is opposite."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((1, 500, 8))
    weights = rng.standard_normal((1, 3, 8))
    found = corrected(weights, [_moments(x, 0.9 * x), _moments(x, 1.1 * x)], centred=False)
    assert found is weights
