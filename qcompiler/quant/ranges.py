"""Running statistics of a tensor, and the interval a number format should span.

A `Histogram` sees the samples one after the other and needs the same memory however many there are. Its
bins span [-limit, limit] with `limit` a power of two; when a larger value comes along the limit doubles and
neighbouring bins merge, so that the result does not depend on the order of the samples.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np

from qcompiler.quant.types import Range

BINS = 8192
SUBSAMPLE = 1 << 16
"""Elements of one tensor of one sample that reach the histogram; minimum and maximum always see all."""

_CANDIDATES = np.exp2(-np.arange(96) / 16)
"""Fractions of the observed extreme at which the interval may end: 1 down to 1/61 in steps of 4%."""

PERCENTILE = 0.9999
"""Share of the elements that a percentile range holds."""

HEADROOM = 2.0
"""How much wider than what was seen a range of 16 bits is: one bit there, but samples to come may reach further."""

_MOMENTUM = 0.9
"""Weight of what was seen before in a moving average: one over ten samples, as calibration sees few."""


@dataclass
class Histogram:
    """Extremes and distribution of one tensor over all samples."""

    low: float = 0.0
    high: float = 0.0
    limit: float = 0.0
    """Bins span [-limit, limit]; 0 while only zeros were seen."""
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    """Elements in each bin, or the sum of their weights."""
    zeros: int = 0
    """Exact zeros, which are in no bin: every format represents them exactly."""
    finite: bool = True
    """False once an infinity was seen; it enters `low` or `high` but no bin."""
    average_low: float = math.nan
    """Moving average of the samples' minima (zero at most); NaN before the first."""
    average_high: float = math.nan

    def add(self, values: np.ndarray, *, histogram: bool, weights: np.ndarray | None = None) -> None:
        """Take one sample's tensor in; only its extremes unless `histogram`. NaN makes `low` NaN.

        `weights`, of the tensor's shape, say how much an error in each element matters; all alike by default.
        """
        low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.average_low = _averaged(self.average_low, min(low, 0.0))
        self.average_high = _averaged(self.average_high, max(high, 0.0))
        if not (math.isfinite(low) and math.isfinite(high)):
            self.finite = False
            # min() keeps its first argument when compared with NaN.
            self.low = math.nan if math.isnan(low) else self.low
            return
        if histogram and self.finite:
            self._count(values.reshape(-1), weights.reshape(-1) if weights is not None else None, max(-low, high))

    def _count(self, flat: np.ndarray, weights: np.ndarray | None, extreme: float) -> None:
        # An odd step does not fall in with the rows of feature maps, whose sizes are mostly even.
        step = -(-flat.size // SUBSAMPLE) | 1
        if flat.size > SUBSAMPLE:
            flat, weights = flat[::step], weights[::step] if weights is not None else None
        self._grow(extreme)
        kept = flat != 0
        nonzero = flat[kept]
        self.zeros += flat.size - nonzero.size
        if nonzero.size:
            # Scaling by a power of two is exact, so that bins merge as if the final limit had been known.
            position = np.floor(nonzero * np.float32(BINS / 2 / self.limit)).astype(np.int32)
            index = np.minimum(position + BINS // 2, BINS - 1)
            self.counts += np.bincount(index, weights[kept] if weights is not None else None, minlength=BINS)

    def _grow(self, extreme: float) -> None:
        if extreme <= self.limit:
            return
        if self.limit == 0:
            self.limit = math.ldexp(1.0, max(math.frexp(extreme)[1], -100))  # below, float32 bins would overflow
        while self.limit < extreme:
            quarter = BINS // 4
            merged = self.counts.reshape(BINS // 2, 2).sum(axis=1)
            self.counts = np.concatenate([np.zeros(quarter), merged, np.zeros(quarter)])
            self.limit *= 2

    @property
    def centers(self) -> np.ndarray:
        """The value each bin stands for, float64 [BINS]."""
        return (np.arange(BINS) + 0.5) * (2 * self.limit / BINS) - self.limit


def _averaged(average: float, new: float) -> float:
    return new if math.isnan(average) else _MOMENTUM * average + (1 - _MOMENTUM) * new


def observed_range(histogram: Histogram) -> Range:
    """The interval from minimum to maximum."""
    return Range(histogram.low, histogram.high, histogram.low, histogram.high)


def with_headroom(chosen: Range) -> Range:
    """The interval wider by `HEADROOM` on both sides of zero."""
    return replace(chosen, low=HEADROOM * chosen.low, high=HEADROOM * chosen.high)


def averaged_range(histogram: Histogram) -> Range:
    """Moving averages of the samples' minima and maxima (Jacob et al., CVPR 2018, section 3.1)."""
    if not histogram.finite:
        return observed_range(histogram)
    return Range(histogram.average_low, histogram.average_high, histogram.low, histogram.high)


def percentile_range(histogram: Histogram, share: float = PERCENTILE) -> Range:
    """The interval outside which no more than (1 - share) / 2 of the elements lie on either side."""
    low, high = histogram.low, histogram.high
    if not histogram.finite or histogram.counts.sum() == 0:
        return observed_range(histogram)
    allowed = (histogram.counts.sum() + histogram.zeros) * (1 - share) / 2
    width = 2 * histogram.limit / BINS
    # Bins are dropped from the outside in as long as those dropped together hold no more than is allowed.
    above = int(np.searchsorted(np.cumsum(histogram.counts[::-1]), allowed, side="right"))
    below = int(np.searchsorted(np.cumsum(histogram.counts), allowed, side="right"))
    return Range(
        max(low, min(0.0, below * width - histogram.limit)),
        min(high, max(0.0, histogram.limit - above * width)),
        low,
        high,
    )


def entropy_range(histogram: Histogram, bits: int, *, symmetric: bool) -> Range:
    """The interval that loses least information, by the Kullback-Leibler divergence of the quantized distribution.

    As in TensorRT (Migacz, 8-bit Inference with TensorRT, GTC 2017): the reference holds what lies outside in its outer
    bins, the candidate spreads the inner elements of each level evenly over the level's bins that are not empty. Of an
    asymmetric interval the upper end is chosen first, then the lower one.
    """
    low, high = histogram.low, histogram.high
    if not histogram.finite or histogram.counts.sum() == 0:
        return observed_range(histogram)
    levels = 2**bits - 1
    if symmetric:
        ends = max(-low, high) * _CANDIDATES
        best = float(ends[np.argmin([_divergence(histogram, -end, end, levels) for end in ends])])
        return Range(max(low, -best), min(high, best), low, high)
    highs = high * _CANDIDATES if high > 0 else np.zeros(1)
    end = float(highs[np.argmin([_divergence(histogram, low, each, levels) for each in highs])])
    lows = low * _CANDIDATES if low < 0 else np.zeros(1)
    start = float(lows[np.argmin([_divergence(histogram, each, end, levels) for each in lows])])
    return Range(start, end, low, high)


def _divergence(histogram: Histogram, low: float, high: float, levels: int) -> float:
    """KL divergence from the distribution clipped to [low, high] to that distribution in `levels` steps."""
    if low >= high:
        return math.inf
    x = histogram.centers
    first, last = np.searchsorted(x, [low, high])
    last = max(last, first + 1)
    inside = histogram.counts[first:last]
    reference = inside.copy()
    reference[0] += histogram.counts[:first].sum()
    reference[-1] += histogram.counts[last:].sum()
    if last - first <= levels or inside.sum() == 0:
        return math.inf  # the bins are no finer than the levels: nothing can be said
    level = np.clip(np.rint((x[first:last] - low) * (levels / (high - low))), 0, levels).astype(int)
    filled = reference > 0
    per_level = np.bincount(level, inside, minlength=levels + 1)
    bins = np.bincount(level, filled, minlength=levels + 1)
    spread = np.where(filled, per_level[level] / np.maximum(bins[level], 1), 0)
    p, q = reference[filled] / reference.sum(), spread[filled] / spread.sum()
    return float((p * np.log(p / np.maximum(q, 1e-12))).sum())


def mse_range(histogram: Histogram, bits: int, *, symmetric: bool) -> Range:
    """The interval that minimises the expected squared error of quantizing to `bits`.

    A value inside costs step²/12 (rounding to a step much finer than the distribution), one outside costs its squared
    distance to the nearer end, a zero costs nothing. `symmetric` intervals are [-high, high] as far as
    error goes, but are returned cut to the observed side, so that they can still be judged by their span.
    """
    low, high = histogram.low, histogram.high
    if not histogram.finite or histogram.counts.sum() == 0:
        return observed_range(histogram)
    if symmetric:
        extreme = max(-low, high)
        highs = extreme * _CANDIDATES
        # One side at a time is enough: the counts of |x| are those of both sides folded.
        above, inside_above = _beyond(histogram.centers, histogram.counts, highs)
        below, inside_below = _beyond(-histogram.centers, histogram.counts, highs)
        inside = inside_above + inside_below - histogram.counts.sum()
        step = highs / (2 ** (bits - 1) - 1)
        best = highs[np.argmin(above + below + inside * step**2 / 12)]
        return Range(max(low, -float(best)), min(high, float(best)), low, high)
    highs = high * _CANDIDATES if high > 0 else np.zeros(1)
    lows = low * _CANDIDATES if low < 0 else np.zeros(1)
    above, inside_above = _beyond(histogram.centers, histogram.counts, highs)
    below, inside_below = _beyond(-histogram.centers, histogram.counts, -lows)
    inside = inside_above[None, :] + inside_below[:, None] - histogram.counts.sum()
    step = (highs[None, :] - lows[:, None]) / (2**bits - 1)
    error = above[None, :] + below[:, None] + inside * step**2 / 12
    row, column = np.unravel_index(np.argmin(error), error.shape)
    return Range(float(lows[row]), float(highs[column]), low, high)


def _beyond(centers: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each end: Σ (x - end)² over the values above it, and how many values are not above it."""
    order = slice(None) if centers[0] < centers[-1] else slice(None, None, -1)
    x, n = centers[order], counts[order]
    zeroth, first, second = (np.append(np.cumsum((n * x**power)[::-1])[::-1], 0.0) for power in (0, 1, 2))
    start = np.searchsorted(x, ends, side="right")
    squares = second[start] - 2 * ends * first[start] + ends**2 * zeroth[start]
    return np.maximum(squares, 0), n.sum() - zeroth[start]
