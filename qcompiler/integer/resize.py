"""Index and weight tables of Resize, computed once at compile time.

Coordinates follow the ONNX operator's definition, in float32 as onnxruntime computes them.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, data_input, input_of, integer, ints, real, shape_of, string

WEIGHT_ONE = 2048
"""Weights have 11 fraction bits."""

_Coordinate = Callable[[np.ndarray, int, int, np.float32], np.ndarray]
"""(output positions, input size, output size, scale) to input positions, float32."""


def _half_pixel(x: np.ndarray, size: int, out: int, scale: np.float32) -> np.ndarray:
    assert size > 0 and out > 0
    return (x + np.float32(0.5)) / scale - np.float32(0.5)


def _half_pixel_symmetric(x: np.ndarray, size: int, out: int, scale: np.float32) -> np.ndarray:
    adjustment = np.float32(out) / (scale * np.float32(size))
    center = np.float32(size) / np.float32(2)
    return center * (np.float32(1) - adjustment) + _half_pixel(x, size, out, scale)


def _pytorch_half_pixel(x: np.ndarray, size: int, out: int, scale: np.float32) -> np.ndarray:
    return _half_pixel(x, size, out, scale) if out > 1 else np.zeros_like(x)


def _align_corners(x: np.ndarray, size: int, out: int, scale: np.float32) -> np.ndarray:
    assert scale > 0
    return np.zeros_like(x) if out == 1 else x * np.float32(size - 1) / np.float32(out - 1)


def _asymmetric(x: np.ndarray, size: int, out: int, scale: np.float32) -> np.ndarray:
    assert size > 0 and out > 0
    return x / scale


_COORDINATES: Mapping[str, _Coordinate] = {
    "half_pixel": _half_pixel,
    "half_pixel_symmetric": _half_pixel_symmetric,
    "pytorch_half_pixel": _pytorch_half_pixel,
    "align_corners": _align_corners,
    "asymmetric": _asymmetric,
}

_ROUNDING: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda x: np.ceil(x - np.float32(0.5)),
    "round_prefer_ceil": lambda x: np.floor(x + np.float32(0.5)),
    "floor": np.floor,
    "ceil": np.ceil,
}


def is_plain_resize(node: ir.Node) -> bool:
    """Whether tables can express it: 4-D, height and width only, no antialiasing, no cropping, no kept aspect ratio."""
    before, after = shape_of(data_input(node)), shape_of(node.outputs[0])
    return (
        len(before) == 4
        and before[:2] == after[:2]
        and string(node, "coordinate_transformation_mode", "half_pixel") in _COORDINATES
        and string(node, "nearest_mode", "round_prefer_floor") in _ROUNDING
        and string(node, "keep_aspect_ratio_policy", "stretch") == "stretch"
        and not integer(node, "antialias", 0)
        and all(value is None or const_of(value) is not None for value in node.inputs[1:])
    )


def spatial_scales(node: ir.Node) -> tuple[np.float32, np.float32]:
    """Vertical and horizontal scale, as given or from the sizes."""
    before, after = shape_of(data_input(node)), shape_of(node.outputs[0])
    scales = const_of(input_of(node, 2))
    by_axis = {axis: np.float32(after[axis] / before[axis]) for axis in range(4)}
    if scales is not None and scales.size:
        axes = [axis % 4 for axis in ints(node, "axes", range(4))]
        by_axis |= {axis: np.float32(scale) for axis, scale in zip(axes, scales, strict=True)}
    return by_axis[2], by_axis[3]


def nearest_table(node: ir.Node, size: int, out: int, scale: np.float32) -> np.ndarray:
    """Input index of each output position, int32 [out]."""
    rounding = _ROUNDING[string(node, "nearest_mode", "round_prefer_floor")]
    return np.clip(rounding(_positions(node, size, out, scale)), 0, size - 1).astype(np.int32)


def linear_tables(node: ir.Node, size: int, out: int, scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Two input indices and their weights for each output position, int32 [out, 2]; weights add to 2048."""
    position = np.clip(_positions(node, size, out, scale), 0, size - 1)
    low = np.floor(position).astype(np.int32)
    upper = np.rint((position - low) * WEIGHT_ONE).astype(np.int32)
    index = np.stack([low, np.minimum(low + 1, size - 1)], axis=1)
    return index.astype(np.int32), np.stack([WEIGHT_ONE - upper, upper], axis=1).astype(np.int32)


def float_linear_tables(node: ir.Node, size: int, out: int, scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """As `linear_tables`, the weights float32 and adding to 1."""
    position = np.clip(_positions(node, size, out, scale), 0, size - 1)
    low = np.floor(position).astype(np.int32)
    upper = (position - low).astype(np.float32)
    return np.stack([low, np.minimum(low + 1, size - 1)], axis=1), np.stack([1 - upper, upper], axis=1)


def float_cubic_tables(node: ir.Node, size: int, out: int, scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Four input indices and their weights for each output position, int32 and float32 [out, 4].

    Keys 1981, "Cubic convolution interpolation for digital image processing", with ONNX's cubic_coeff_a. Indices beyond
    the input are those of its border; with exclude_outside they weigh nothing, and the others add to 1.
    """
    a = np.float32(real(node, "cubic_coeff_a", -0.75))
    position = _positions(node, size, out, scale)
    low = np.floor(position)
    # Distances of the four neighbours: between 1 and 2, below 1, below 1, between 1 and 2.
    index = low[:, None].astype(np.int32) + np.arange(-1, 3, dtype=np.int32)
    distance = np.abs(position[:, None] - index.astype(np.float32))
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    weight = np.where(distance <= 1, near, far).astype(np.float32)
    if integer(node, "exclude_outside", 0):
        weight = np.where((index >= 0) & (index < size), weight, np.float32(0))
        weight = weight / weight.sum(axis=1, keepdims=True)
    return np.clip(index, 0, size - 1), weight.astype(np.float32)


def _positions(node: ir.Node, size: int, out: int, scale: np.float32) -> np.ndarray:
    transform = _COORDINATES[string(node, "coordinate_transformation_mode", "half_pixel")]
    positions = transform(np.arange(out, dtype=np.float32), size, out, scale)
    assert positions.dtype == np.float32 and math.isfinite(positions.sum())
    return positions
