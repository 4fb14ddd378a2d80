"""From quantities to places on a picture, and ticks worth reading."""

import math
from dataclasses import dataclass

ENOUGH = 3
"""Ticks."""


@dataclass(frozen=True)
class LogScale:
    """Maps [low, high], both positive, to [start, end] logarithmically."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log10(value / self.low) / math.log10(self.high / self.low)
        return self.start + (self.end - self.start) * share

    def ticks(self) -> list[float]:
        """Powers of ten in the interval; of a short interval, twice and five times these too."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1.0,), (1.0, 2.0, 5.0)):
            found = [factor * 10.0**exponent for exponent in range(first, last + 1) for factor in factors]
            inside = [value for value in found if self.low <= value <= self.high]
            if len(inside) >= ENOUGH:
                break
        return inside


def even_ticks(end: float, wanted: int) -> list[float]:
    """About `wanted` round values from 0 to `end`: multiples of 1, 2 or 5 times a power of ten."""
    if end <= 0:
        return [0.0]
    raw = end / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [index * step for index in range(int(end / step + 1e-9) + 1)]
