"""The constants of a region as one buffer: weights, scale records, tables, constant operands."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.backends.npu_layers import Recipe
from qcompiler.backends.npu_maps import RegionMaps, root_bytes
from qcompiler.backends.npu_tiling import Stream, Work
from qcompiler.graph import const_of
from qcompiler.simulator.weight_code import EncodedSpan, golomb_rice_bytes

BLOB_ALIGNMENT = 16
"""Each constant starts at a multiple of this, so that DMA bursts are whole."""
_PATTERN = 256
"""Bytes of a constant that fills are copied from."""


@dataclass(frozen=True)
class Constants:
    data: np.ndarray
    """uint8 [n]"""
    streams: tuple[tuple[int, ...], ...]
    """Offsets of every step's streams."""
    roots: Mapping[ir.Value, int]
    """Offsets of constant feature maps."""
    fills: Mapping[int, tuple[int, int]]
    """Offset and bytes of what some steps fill their outputs with, where it is no single byte."""
    encoded: tuple[EncodedSpan, ...]
    """Where weights lie that the target keeps encoded."""


def constants_of(maps: RegionMaps, *, coded: bool) -> Constants:
    """Lay out the constants of all steps. `coded`: the target keeps int8 weights in a Golomb-Rice code."""
    blob = _Blob()
    works = [recipe if isinstance(recipe, Work) else None for recipe in maps.recipes]
    streams = tuple(tuple(blob.add(stream.data) for stream in work.streams) if work else () for work in works)
    roots: dict[ir.Value, int] = {}
    for step, recipe in enumerate(maps.recipes):
        for root in _sources(maps, step, recipe):
            constant = const_of(root)
            if constant is not None and root not in roots and root not in maps.inside:
                roots[root] = blob.add(np.ascontiguousarray(constant).tobytes())
    placed = [
        (offset, stream)
        for work, offsets in zip(works, streams, strict=True)
        if work is not None
        for offset, stream in zip(offsets, work.streams, strict=True)
    ]
    fills: dict[int, tuple[int, int]] = {}
    for step, recipe in enumerate(maps.recipes):
        if not isinstance(recipe, Work) and recipe.fill is not None and len(set(recipe.fill)) > 1:
            run = min(root_bytes(maps.region.nodes[step].outputs[0]), _PATTERN)
            fills[step] = blob.add(recipe.fill * (run // len(recipe.fill))), run
    return Constants(blob.array(), streams, roots, fills, _encoded(placed) if coded else ())


def _sources(maps: RegionMaps, step: int, recipe: Recipe) -> list[ir.Value]:
    if isinstance(recipe, Work):
        return list(maps.roots(step)[:-1])
    node = maps.region.nodes[step]
    return [maps.root(node.inputs[copy.source]) for copy in maps.layout.copies[step]]


@dataclass
class _Blob:
    """Constants under construction; equal bytes are stored once."""

    parts: list[bytes] = field(default_factory=list)
    offsets: dict[bytes, int] = field(default_factory=dict)
    size: int = 0

    def add(self, data: bytes) -> int:
        if data not in self.offsets:
            self.offsets[data] = self.size
            self.parts.append(data + bytes(-len(data) % BLOB_ALIGNMENT))
            self.size += len(self.parts[-1])
        return self.offsets[data]

    def array(self) -> np.ndarray:
        return np.frombuffer(b"".join(self.parts) or bytes(BLOB_ALIGNMENT), np.uint8)


def _encoded(placed: Sequence[tuple[int, Stream]]) -> tuple[EncodedSpan, ...]:
    spans: dict[int, EncodedSpan] = {}
    for start, stream in placed:
        if stream.weights is not None and start not in spans:
            rows = np.frombuffer(stream.data, stream.weights).reshape(-1, stream.unit)
            weights, places = rows[:, : stream.unit - stream.places], len(rows) * stream.places
            size = golomb_rice_bytes(weights, stream.zero_point) + places
            spans[start] = EncodedSpan(start, start + len(stream.data), min(1.0, size / len(stream.data)))
    return tuple(spans[start] for start in sorted(spans))
