"""How small weights get where an accelerator keeps them encoded: the bytes its DMA moves.

The simulator itself holds weights as they are; only the cost model knows of encodings.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt

_RICE_PARAMETERS = np.arange(8)[:, None]


@dataclass(frozen=True, slots=True)
class EncodedSpan:
    """Part of an external buffer."""

    start: int
    end: int
    ratio: float
    """Encoded bytes per byte."""


_ZERO_RUNS = 4
"""How much more common than any other weight zero must be for zeros to be coded as runs (ZERO_RUN_THRES)."""


def golomb_rice_bytes(weights: npt.NDArray[np.integer], zero_point: int) -> int:
    """Bytes of 8-bit weights in a Golomb-Rice code of the best parameter, the code of Arm's weight streams.

    Zero points are taken off and signs are folded into the lowest bit; of a value v, v >> k is written in unary and the
    rest in k bits. Where most weights are zeros, those between two others are one number, their count, in a code of its
    own. Arm's encoder (ethosu/mlw_codec of ethos-u-vela) changes k along the stream and knows a palette: it is a little
    better on large tensors, and worse on small ones, which it pads.
    """
    assert weights.itemsize == 1, f"weights of {weights.dtype} have no Golomb-Rice code"
    lowest = int(np.iinfo(weights.dtype).min)
    # All that matters is how often each value occurs, which is quicker to find than to go by the values themselves.
    occurring = np.roll(_histogram(weights.ravel().view(np.uint8)), lowest)
    values = np.arange(256) + lowest - zero_point
    folded = np.where(values < 0, -2 * values - 1, 2 * values)
    counts = np.zeros(int(folded.max()) + 1, np.int64)
    counts[folded] = occurring
    if counts[0] > _ZERO_RUNS * counts[1:].max(initial=0):
        at = np.flatnonzero(weights.ravel() != zero_point)
        runs = np.diff(at, prepend=-1, append=weights.size) - 1
        bits = _rice_bits(counts[1:]) + _rice_bits(np.bincount(runs))
    else:
        bits = _rice_bits(counts)
    return -(-bits // 8)


def _histogram(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """How often each of 256 values occurs."""
    paired = values.size // 2 * 2
    if paired < _MANY:
        return np.bincount(values, minlength=256).astype(np.int64)
    # Counting pairs takes half the time.
    pairs = np.bincount(values[:paired].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts = pairs.sum(0) + pairs.sum(1)
    counts[values[paired:]] += 1
    return counts


_MANY = 1 << 16
"""Bytes from which a table of all pairs is small in comparison."""


def _rice_bits(counts: npt.NDArray[np.integer]) -> int:
    """Of numbers that occur so often, counted from 0, with the best parameter."""
    lengths = (np.arange(counts.size) >> _RICE_PARAMETERS) + 1 + _RICE_PARAMETERS
    return int((lengths @ counts).min())


def ratio_at(spans: Sequence[EncodedSpan], offset: int) -> float:
    """Of the span that holds an offset, 1 outside all. Spans are in order and apart."""
    position = bisect_right(spans, offset, key=attrgetter("start")) - 1
    return spans[position].ratio if position >= 0 and offset < spans[position].end else 1.0
