"""How small weights get where an accelerator keeps them encoded: the bytes its DMA moves.

The simulator itself holds weights as they are; only the cost model knows of encodings.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import numpy.typing as npt

_RICE_PARAMETERS = range(8)


@dataclass(frozen=True, slots=True)
class EncodedSpan:
    """Part of an external buffer."""

    start: int
    end: int
    ratio: float
    """Encoded bytes per byte."""


def golomb_rice_bytes(weights: npt.NDArray[np.integer], zero_point: int) -> int:
    """Bytes of 8-bit weights in a Golomb-Rice code of the best parameter, the code of Arm's weight streams.

    Zero points are taken off and signs are folded into the lowest bit; of a value v, v >> k is written in unary and the
    rest in k bits. Arm's encoder (ethosu/mlw_codec of ethos-u-vela) changes k along the stream and knows a palette: it
    is a little better on large tensors, and worse on small ones, which it pads.
    """
    lowest = int(np.iinfo(weights.dtype).min)
    counts = np.bincount(weights.ravel().astype(np.int64) - lowest, minlength=256)
    values = np.arange(256) + lowest - zero_point
    folded = np.where(values < 0, -2 * values - 1, 2 * values)
    bits = min(int((counts * ((folded >> k) + 1 + k)).sum()) for k in _RICE_PARAMETERS)
    return -(-bits // 8)


def ratio_at(spans: Sequence[EncodedSpan], offset: int) -> float:
    """Of the span that holds an offset, 1 outside all. Spans are in order and apart."""
    position = bisect_right(spans, offset, key=attrgetter("start")) - 1
    return spans[position].ratio if position >= 0 and offset < spans[position].end else 1.0
