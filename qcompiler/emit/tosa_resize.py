"""Interpolation as TOSA's RESIZE."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.emit.tosa_emitter import (
    Emitter,
    refusal,
)
from qcompiler.emit.tosa_text import Tensor, power_of_two
from qcompiler.graph import (
    Shape,
    const_of,
    data_input,
    shape_of,
)

_RESIZE_WEIGHT_BITS = 22
"""Bits of the product of two weights of a QResizeLinear."""


def emit_resize_nearest(emitter: Emitter, node: ir.Node) -> None:
    x, y = data_input(node), node.outputs[0]
    axes: list[_Axis] = []
    for position, (size, count) in enumerate(zip(shape_of(x)[1:3], shape_of(y)[1:3], strict=True)):
        table = const_of(data_input(node, 1 + position))
        assert table is not None
        found = next((axis for axis in _axes(size, count) if np.array_equal(axis.nearest(), table)), None)
        if found is None:
            raise refusal(node, "no scale and offset of RESIZE pick the same pixels")
        axes.append(found)
    emitter.store(y, _resized(emitter, emitter.of(x), axes, "NEAREST_NEIGHBOR", "int8", shape_of(y)))


def emit_resize_linear(emitter: Emitter, node: ir.Node) -> None:
    """RESIZE interpolates exactly; its denominator must be a power of two, which the rounding shift then removes."""
    x, y = data_input(node), node.outputs[0]
    axes: list[_Axis] = []
    for position, (size, count) in enumerate(zip(shape_of(x)[1:3], shape_of(y)[1:3], strict=True)):
        index, weight = const_of(data_input(node, 1 + 2 * position)), const_of(data_input(node, 2 + 2 * position))
        assert index is not None and weight is not None
        found = next((axis for axis in _axes(size, count) if axis.interpolates(index, weight)), None)
        if found is None:
            raise refusal(node, "no scale and offset of RESIZE give the same weights")
        axes.append(found)
    total = _resized(emitter, emitter.of(x), axes, "BILINEAR", "int32", shape_of(y))
    bits = sum(axis.scale.bit_length() - 1 for axis in axes)
    emitter.store(y, emitter.text.rescale(total, power_of_two(-bits), "int8"))


class _Axis:
    """RESIZE along one axis: output o lies at (o * step + offset) / scale."""

    def __init__(self, size: int, count: int, scale: int, step: int, offset: int) -> None:
        self.scale, self.step, self.offset = scale, step, offset
        self.border = (count - 1) * step - (size - 1) * scale + offset
        self._size = size
        self._at = np.arange(count) * step + offset

    def nearest(self) -> np.ndarray:
        whole, rest = np.divmod(self._at, self.scale)
        return np.clip(whole + (2 * rest >= self.scale), 0, self._size - 1).astype(np.int32)

    def interpolates(self, index: np.ndarray, weight: np.ndarray) -> bool:
        """Whether the weights of every input element, [count, size], are the table's."""
        if self.scale & (self.scale - 1):
            return False
        whole, rest = np.divmod(self._at, self.scale)
        ours, theirs = (np.zeros((len(whole), self._size), np.int64) for _ in range(2))
        rows = np.arange(len(whole))
        for pixel, share in ((whole, self.scale - rest), (whole + 1, rest)):
            np.add.at(ours, (rows, np.clip(pixel, 0, self._size - 1)), share)
        for side in range(2):
            np.add.at(theirs, (rows, index[:, side]), weight[:, side])
        return np.array_equal(ours << (_RESIZE_WEIGHT_BITS // 2), theirs * self.scale)


def _axes(size: int, count: int) -> list[_Axis]:
    """Every way to lay `count` outputs over `size` inputs at even distances: their ratio, or from end to end."""
    found: list[_Axis] = []
    for numerator, denominator in ((count, size), (max(count - 1, 1), max(size - 1, 1))):
        common = int(np.gcd(numerator, denominator))
        # Twice over, so that the offset may be half of an output.
        scale, step = 2 * numerator // common, 2 * denominator // common
        found += [_Axis(size, count, scale, step, offset) for offset in range(-scale, scale)]
    return [axis for axis in found if -16 * axis.scale <= axis.border < axis.scale]


def _resized(emitter: Emitter, x: Tensor, axes: Sequence[_Axis], mode: str, dtype: str, shape: Shape) -> Tensor:
    text = emitter.text
    scale = [number for axis in axes for number in (axis.scale, axis.step)]
    inputs = [
        x,
        text.shape_constant(scale),
        text.shape_constant([axis.offset for axis in axes]),
        text.shape_constant([axis.border for axis in axes]),
    ]
    return text.op("resize", inputs, shape, dtype, {"mode": f"#tosa.resize_mode<{mode}>"})
