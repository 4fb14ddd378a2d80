"""Cascades: operators that run together in horizontal stripes, depth first.

Stripe after stripe, each operator of a cascade computes the rows of its output that the stripe of the last one needs
and that are not there yet; no row is computed twice. A map between two of them is never whole: a rolling buffer holds
its rows from the first that someone will still read to the last that is there. Maps from outside arrive in rolling
buffers too, and maps that go outside leave from them.

How far each operator is after stripe t is a line, ⌊(slope * t + start) / divisor⌋, until it is done: that of the last
operator, carried back through kernels, strides, dilations and paddings. Where several read a map, the furthest line
counts. Nothing here knows of costs or addresses.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.backends.npu_emit import Index, divide, maximum, minimum
from qcompiler.backends.npu_tiling import (
    Dims4,
    Repeated,
    Same,
    Sliding,
    Span,
    Strides4,
    Tabled,
    Transposed,
    Whole,
    Work,
)

Part = tuple[ir.Value, int, Strides4, Dims4]

Rows = npt.NDArray[np.int64]
"""A number of rows per stripe; of what is done, preceded by the 0 before the first."""


@dataclass(frozen=True)
class Line:
    """⌊(slope * t + start) / divisor⌋"""

    slope: int
    start: int
    divisor: int = 1

    def at(self, stripe: Index) -> Index:
        return divide(stripe * self.slope + self.start, self.divisor)

    def simplified(self) -> "Line":
        common = gcd(self.slope, self.divisor)
        return Line(self.slope // common, self.start // common, self.divisor // common) if common > 1 else self


@dataclass(frozen=True)
class Progress:
    """How many rows of a map are there after each stripe: as far as the furthest line, but no more than `limit`.

    The last stripe reaches the limit.
    """

    limit: int
    lines: tuple[Line, ...]

    @classmethod
    def over(cls, stripes: int, size: int, lines: Iterable[Line]) -> "Progress":
        """Of `size` rows: as far as the furthest of these lines, and at least one row."""
        found = [line.simplified() for line in lines]
        if all(int(_values(line, 1)[0]) < 1 for line in found):
            found.append(Line(0, 1))
        kept = tuple(dict.fromkeys(found))
        if len(kept) > 1:
            values = [_values(line, stripes) for line in kept]
            most = np.max(values, 0)
            leads = next((line for line, value in zip(kept, values, strict=True) if (value == most).all()), None)
            kept = (leads,) if leads is not None else kept
        return cls(int(_furthest(kept, stripes)[-1].clip(max=size)), kept)

    def at(self, stripe: Index) -> Index:
        """Rows done after a stripe, 0 being the first."""
        rows = self.lines[0].at(stripe)
        for line in self.lines[1:]:
            rows = maximum(rows, line.at(stripe))
        return minimum(rows, self.limit)

    @property
    def at_once(self) -> bool:
        """Whether the first stripe is all."""
        return self.at(0) == self.limit

    def rows(self, stripes: int) -> Rows:
        """[0, at(0), at(1), …]"""
        return np.concatenate([[0], _furthest(self.lines, stripes).clip(max=self.limit)])


def _values(line: Line, stripes: int) -> Rows:
    return (np.arange(stripes) * line.slope + line.start) // line.divisor


def _furthest(lines: Sequence[Line], stripes: int) -> Rows:
    return np.max([_values(line, stripes) for line in lines], 0)


def read_until(span: Span, line: Line) -> Line:
    """How many rows of an operand the first ⌊…⌋ rows of an output need, if none were missing at the ends."""
    a, b, d = line.slope, line.start, line.divisor
    match span:
        case Same():
            return line
        case Sliding():
            behind = (span.kernel - 1) * span.dilation + 1 - span.pad - span.stride
            return Line(span.stride * a, span.stride * b + behind * d, d)
        case Transposed():
            return Line(a, b + (span.pad - 1 + span.stride) * d, d * span.stride)
        case Tabled():
            outputs, need = len(span.reads), np.maximum.accumulate([high + 1 for _, high in span.reads])
            rows = int(need[-1])
            # Of all lines of this slope the lowest that is never too low.
            above = max(-(-(int(need[i]) * outputs - (i + 1) * rows) // outputs) for i in range(outputs))
            return Line(a * rows, b * rows + above * d * outputs, d * outputs)
        case Whole():
            return Line(0, span.size)
        case _:
            assert isinstance(span, Repeated), f"rows do not follow a {type(span).__name__}"
            return Line(0, 1)


def read_from(span: Span, starts: Rows, outputs: int, size: int) -> Rows:
    """The first row of an operand of `size` rows that outputs from each start on read; `size` where none is left."""
    match span:
        case Same():
            first = starts
        case Sliding():
            first = np.clip(starts * span.stride - span.pad, 0, size - 1)
        case Transposed():
            reach = (span.kernel - 1) * span.dilation
            first = np.clip(-((reach - span.pad - starts) // span.stride), 0, size - 1)
        case Tabled():
            lows = np.minimum.accumulate([low for low, _ in reversed(span.reads)])[::-1]
            first = lows[np.minimum(starts, outputs - 1)]
        case _:
            first = np.zeros_like(starts)
    return np.where(starts >= outputs, size, first)


@dataclass(frozen=True)
class Access:
    """A feature map as an operator reads or writes it: part of a root, in bytes."""

    root: ir.Value
    offset: int
    strides: Strides4
    shape: Dims4
    """As the operator sees it."""
    y: Span
    """How its rows follow those of the output; `Same` for the output itself."""
    element: int
    pitch: int
    """Bytes of a row of the root, if that is a single map [1, H, W, C], else 0."""
    rolls: bool
    """Whether its rows are rows of the root, each inside one: the root may then live in a rolling buffer."""

    @property
    def rows(self) -> int:
        return self.shape[1]

    @property
    def part(self) -> "Part":
        """Equal where the same bytes are read in the same shape."""
        return self.root, self.offset, self.strides, self.shape

    @property
    def row_bytes(self) -> int:
        """Of a row by itself."""
        return self.shape[2] * self.shape[3] * self.element

    def meets(self, other: "Access") -> bool:
        """Whether two parts of a root may have bytes in common; slices of its channels may not."""
        if self.root is not other.root:
            return False
        pixel = self.strides[2]
        first, second = (
            range(access.offset, access.offset + access.shape[3] * access.element) for access in (self, other)
        )
        sliced = self.strides == other.strides and self.shape[:3] == other.shape[:3]
        if not sliced or max(first.stop, second.stop) > pixel:
            return True
        return first.start < second.stop and second.start < first.stop


@dataclass(frozen=True)
class Operator:
    """A step that may be part of a cascade."""

    step: int
    work: Work
    maps: tuple[Access, ...]
    ofm: Access


Turns = tuple[tuple[int, float], ...]
"""How often an operator computes how many rows; of many stripes, as if all were the usual ones."""

_EXACT = 8
"""Stripes up to which each counts by itself."""


class Stripes:
    """The rows of a cascade whose last operator is done in a number of stripes; grows towards the front.

    Operators are added last to first.

    Args:
        count: stripes.
        height: rows of a stripe of the last operator.
        kept: roots that are needed after the cascade, which are finished.
        all_writers: how many steps of the region write to each root.
    """

    def __init__(self, count: int, height: int, kept: frozenset[ir.Value], all_writers: Mapping[ir.Value, int]) -> None:
        self.count, self.height, self.kept, self.all_writers = count, height, kept, all_writers
        self.operators: dict[int, Operator] = {}
        """By step, the last first."""
        self.progress: dict[int, Progress] = {}
        self.rows: dict[int, Rows] = {}
        self.readers: dict[ir.Value, list[tuple[int, Access]]] = {}
        self.writers: dict[ir.Value, list[int]] = {}
        self.turns: dict[int, Turns] = {}
        self.most: dict[int, int] = {}
        """The most rows it has in a stripe."""
        self._held: dict[tuple[ir.Value, int, int], int] = {}
        self._arrivals: dict[tuple[Part, int, bool], tuple[Progress, int]] = {}

    def add(self, operator: Operator) -> None:
        """Put an operator in front."""
        ofm, step = operator.ofm, operator.step
        readers = [(user, access) for user, access in self.readers.get(ofm.root, ()) if access.meets(ofm)]
        lines = [read_until(access.y, line) for user, access in readers for line in self.progress[user].lines]
        if not self.operators:
            lines = [Line(self.height, self.height)]
        elif not lines or (ofm.root in self.kept and not self._finishes(ofm.rows, lines)):
            lines.append(Line(ofm.rows, ofm.rows, self.count))
        self.progress[step] = Progress.over(self.count, ofm.rows, lines)
        self.rows[step] = self.progress[step].rows(self.count)
        self.turns[step] = _turns(self.rows[step])
        self.most[step] = int(np.diff(self.rows[step]).max())
        self.operators[step] = operator
        self.writers.setdefault(ofm.root, []).append(step)
        for access in operator.maps:
            self.readers.setdefault(access.root, []).append((step, access))

    def has_all_writers(self, root: ir.Value) -> bool:
        return len(self.writers[root]) == self.all_writers[root]

    def in_order(self) -> list[Operator]:
        """The operators as they take turns."""
        return [self.operators[step] for step in sorted(self.operators)]

    def _finishes(self, size: int, lines: Sequence[Line]) -> bool:
        return Progress.over(self.count, size, lines).limit == size

    def held(self, root: ir.Value) -> int:
        """Rows of a rolling buffer for a map that is made here and read here."""
        key = (root, len(self.writers[root]), len(self.readers[root]))
        if key not in self._held:
            rows = [self.rows[step] for step in self.writers[root]]
            done = rows[0] if len(rows) == 1 else np.max(rows, 0)
            held = self._most(done, self.readers[root])
            # One that is behind the others still writes rows which they have done.
            behind = int((done[1:] - np.min(rows, 0)[:-1]).max()) if len(rows) > 1 else 1
            self._held[key] = max(held, behind)
        return self._held[key]

    def arrival(self, readers: Sequence[tuple[int, Access]], *, early: bool) -> tuple[Progress, int]:
        """How far a map from outside must have come for those who read it, and the rows of its rolling buffer.

        Args:
            readers: they read the same part of it.
            early: rows arrive while the stripe before is still being read.
        """
        key = (readers[0][1].part, len(readers), early)
        if key not in self._arrivals:
            lines = [read_until(access.y, line) for user, access in readers for line in self.progress[user].lines]
            progress = Progress.over(self.count, readers[0][1].rows, lines)
            done = progress.rows(self.count)
            self._arrivals[key] = progress, self._most(done, readers, early=early)
        return self._arrivals[key]

    def _most(self, done: Rows, readers: Iterable[tuple[int, Access]], *, early: bool = False) -> int:
        """Most rows from the first that is written or read in a stripe, or read later, to the last that is there."""
        firsts = [
            read_from(access.y, self.rows[user], self.operators[user].ofm.rows, access.rows) for user, access in readers
        ]
        lows = np.minimum(firsts[0] if len(firsts) == 1 else np.min(firsts, 0), done)[:-1]
        held = int((done[1:] - lows).max())
        return max(held, int((done[2:] - lows[:-1]).max(initial=1))) if early else max(held, 1)


def _turns(rows: Rows) -> Turns:
    counts = np.diff(rows)
    if len(counts) <= _EXACT:
        found = Counter(counts.tolist())
        return tuple((count, float(times)) for count, times in found.items() if count)
    usual = int(counts[1:].max(initial=0)) or int(counts[0])
    return ((usual, int(rows[-1]) / usual),)
