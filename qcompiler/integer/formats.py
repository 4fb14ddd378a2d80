"""What the integers of a tensor mean: its scales and zero point, kept in the value's metadata.

The integer operators compute without them; writing a network for another compiler needs them back. Realizing records
the format of every tensor that a QuantizeLinear made or a DequantizeLinear read, and of quantized constants. Operators
that only move elements share their input's format, so one record serves all that movement connects.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)
QUANTIZED = (*EIGHT_BITS, ir.DataType.INT16)
"""Types of tensors that have a format."""
_SCALE, _ZERO_POINT = "qcompiler.scale", "qcompiler.zero_point"

MOVEMENT = frozenset({
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Transpose", "Slice", "Split", "Concat", "Pad", "Clip",
    "Gather", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "QMaxPool", "QResizeNearest", "QResizeLinear",
})  # fmt: skip
"""Operators whose outputs have the format of their first input; Concat's inputs all have it."""


@dataclass(frozen=True)
class TensorFormat:
    """real = (q - zero_point) * scale; scales are float32, [1] or one per output channel."""

    scales: tuple[float, ...]
    zero_point: int

    @property
    def scale(self) -> float:
        """The scale of a tensor that has one."""
        assert len(self.scales) == 1
        return self.scales[0]


def record(value: ir.Value, scale: np.ndarray | np.float32, zero_point: int) -> None:
    """Note the format of an integer tensor. Scales are written as hexadecimal floats, which lose nothing."""
    scales = tuple(float(item) for item in np.atleast_1d(np.asarray(scale, np.float32)))
    _write(value, TensorFormat(scales, zero_point))


def record_moved(nodes: Iterable[ir.Node]) -> None:
    """Note the formats that movement shares on every tensor, so that they outlive the movement."""
    for value, noted in formats_of(nodes).items():
        _write(value, noted)


def _write(value: ir.Value, noted: TensorFormat) -> None:
    value.metadata_props[_SCALE] = " ".join(scale.hex() for scale in noted.scales)
    value.metadata_props[_ZERO_POINT] = str(noted.zero_point)


def recorded(value: ir.Value) -> TensorFormat | None:
    """The format noted on this very value."""
    scale = value.metadata_props.get(_SCALE)
    if scale is None:
        return None
    scales = tuple(float.fromhex(item) for item in scale.split())
    return TensorFormat(scales, int(value.metadata_props[_ZERO_POINT]))


def formats_of(nodes: Iterable[ir.Node]) -> Mapping[ir.Value, TensorFormat]:
    """The format of every tensor of an integer graph that has just one, movement followed both ways.

    Tensors without: factors, biases, tables, indices and shapes.
    """
    nodes = tuple(nodes)
    known: dict[ir.Value, TensorFormat] = {}
    for node in nodes:
        for value in (*node.inputs, *node.outputs):
            if value is not None and (noted := recorded(value)) is not None:
                known[value] = noted
    links = [_shared(node) for node in nodes if node.op_type in MOVEMENT]
    pending = True
    while pending:
        pending = False
        for tensors in links:
            noted = next((known[value] for value in tensors if value in known), None)
            for value in tensors:
                if noted is not None and value not in known:
                    known[value] = noted
                    pending = True
    # A model may read the same integers in two formats; then neither is the tensor's own.
    unclear = {value for tensors in links if len({known.get(value) for value in tensors}) > 1 for value in tensors}
    return {value: noted for value, noted in known.items() if value not in unclear}


def _shared(node: ir.Node) -> tuple[ir.Value, ...]:
    inputs = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return (*(value for value in inputs if value is not None and value.dtype in QUANTIZED), *node.outputs)
