import math

import numpy as np
import pytest

from qcompiler.quant.ranges import (
    BINS,
    Histogram,
    averaged_range,
    entropy_range,
    mse_range,
    observed_range,
    percentile_range,
)


def _seen(*arrays):
    histogram = Histogram()
    for array in arrays:
        histogram.add(np.asarray(array, np.float32), histogram=True)
    return histogram


def _error(values, low, high, bits):
    """Mean squared error of quantizing `values` to an asymmetric format that spans [low, high]."""
    scale = (high - low) / (2**bits - 1)
    zero = np.rint(-low / scale)
    q = np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1)
    return float(((q - zero) * scale - values).__pow__(2).mean())


def test_extremes_are_exact_however_large_the_tensor():
    values = np.zeros(300_001, np.float32)
    values[123_456], values[7] = 5.25, -3.5  # single elements a subsample would miss
    histogram = _seen(values)
    assert observed_range(histogram).low == -3.5 and observed_range(histogram).high == 5.25


def test_zero_is_always_in_the_range():
    assert (_seen([2.0, 3.0]).low, _seen([2.0, 3.0]).high) == (0.0, 3.0)
    assert (_seen([-2.0, -3.0]).low, _seen([-2.0, -3.0]).high) == (-3.0, 0.0)


def test_the_order_of_samples_does_not_matter():
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(1000) * 10.0**power for power in range(-3, 4)]
    a, b = _seen(*arrays), _seen(*reversed(arrays))
    assert (a.low, a.high, a.limit, a.zeros) == (b.low, b.high, b.limit, b.zeros)
    np.testing.assert_array_equal(a.counts, b.counts)


def test_counts_hold_every_nonzero_element_near_its_value():
    rng = np.random.default_rng(2)
    arrays = [rng.standard_normal(5000).astype(np.float32) * scale for scale in (0.1, 1.0, 7.0)]
    arrays[0][:100] = 0
    histogram = _seen(*arrays)
    assert histogram.zeros == 100 and histogram.counts.sum() == 14_900
    everything = np.concatenate(arrays)
    width = 2 * histogram.limit / BINS
    assert np.average(histogram.centers, weights=histogram.counts) == pytest.approx(
        everything[everything != 0].mean(), abs=width
    )


def test_mse_keeps_an_even_distribution_whole():
    chosen = mse_range(_seen(np.linspace(-1, 3, 20_000)), 8, symmetric=False)
    assert (chosen.low, chosen.high) == (-1.0, 3.0)


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_clips_outliers_and_is_near_the_best_choice(bits):
    rng = np.random.default_rng(3)
    values = np.maximum(rng.standard_normal(60_000), -0.5).astype(np.float32)
    values[:3] = 60.0
    chosen = mse_range(_seen(values), bits, symmetric=False)
    assert chosen.observed_high == 60
    assert (chosen.high < 40) == (bits == 4)  # eight bits can afford three outliers in 60 000
    got = _error(values, chosen.low, chosen.high, bits)
    best = min(_error(values, -0.5, high, bits) for high in np.linspace(1, 60, 400))
    assert got <= 1.1 * best


def test_mse_does_not_spend_steps_on_zeros():
    """Zeros cost nothing, so adding any number of them must not change the interval."""
    rng = np.random.default_rng(4)
    values = rng.exponential(size=5_000).astype(np.float32)
    assert mse_range(_seen(values), 8, symmetric=False) == mse_range(
        _seen(np.concatenate([values, np.zeros(50_000)])), 8, symmetric=False
    )


def test_symmetric_ranges_clip_both_sides_alike():
    rng = np.random.default_rng(5)
    values = rng.laplace(size=60_000)
    chosen = mse_range(_seen(values), 4, symmetric=True)
    assert chosen.low == -chosen.high and chosen.high < np.abs(values).max() / 2


def test_symmetric_ranges_stay_within_what_was_seen():
    chosen = mse_range(_seen(np.linspace(0, 2, 1000)), 8, symmetric=True)
    assert (chosen.low, chosen.high) == (0.0, 2.0)


def test_all_zero_and_infinite_tensors_keep_their_extremes():
    assert mse_range(_seen(np.zeros(10)), 8, symmetric=False).high == 0.0
    infinite = mse_range(_seen([1.0, -math.inf], [2.0, 3.0]), 8, symmetric=False)
    assert infinite.low == -math.inf and infinite.high == 3.0


def test_nan_shows_in_the_minimum():
    assert math.isnan(_seen([1.0], [math.nan, 2.0]).low)


def test_a_moving_average_follows_the_samples_extremes():
    chosen = averaged_range(_seen([-1.0, 4.0], [-2.0, 2.0], [-2.0, 6.0]))
    assert chosen.low == pytest.approx(-1 * 0.9**2 - 2 * 0.1 * 0.9 - 2 * 0.1)
    assert chosen.high == pytest.approx((4 * 0.9 + 2 * 0.1) * 0.9 + 6 * 0.1)
    assert (chosen.observed_low, chosen.observed_high) == (-2.0, 6.0)


def test_a_moving_average_of_positive_samples_starts_at_zero():
    assert averaged_range(_seen([1.0, 2.0], [3.0, 4.0])).low == 0.0


@pytest.mark.parametrize("share", [0.9, 0.99, 0.9999])
def test_percentiles_are_those_of_all_elements(share):
    rng = np.random.default_rng(11)
    arrays = [rng.standard_normal(60_000).astype(np.float32) for _ in range(3)]
    arrays[1][:30_000] = 0  # zeros count, though no bin holds them
    chosen = percentile_range(_seen(*arrays), share)
    expected = np.quantile(np.concatenate(arrays), [(1 - share) / 2, (1 + share) / 2])
    np.testing.assert_allclose([chosen.low, chosen.high], expected, atol=0.06)
    everything = np.concatenate(arrays)
    assert np.mean((everything < chosen.low) | (everything > chosen.high)) <= 1 - share


def test_a_percentile_of_one_is_the_whole_range():
    chosen = percentile_range(_seen([-3.0, 0.5, 7.0]), 1.0)
    assert (chosen.low, chosen.high) == (-3.0, 7.0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_entropy_clips_a_lone_outlier_and_keeps_an_even_distribution(symmetric):
    rng = np.random.default_rng(12)
    bulk = rng.standard_normal(60_000).astype(np.float32)
    clipped = entropy_range(_seen(np.append(bulk, 60.0)), 8, symmetric=symmetric)
    assert 3 < clipped.high < 20
    even = rng.uniform(-1, 1, 60_000).astype(np.float32)
    kept = entropy_range(_seen(even), 8, symmetric=symmetric)
    assert kept.high > 0.9 and kept.low < -0.9


@pytest.mark.parametrize("choose", [averaged_range, percentile_range, lambda h: entropy_range(h, 8, symmetric=False)])
def test_infinities_and_zeros_leave_the_observed_range(choose):
    infinite = choose(_seen([1.0, math.inf]))
    assert infinite.high == math.inf
    nothing = choose(_seen(np.zeros(5)))
    assert (nothing.low, nothing.high) == (0.0, 0.0)
