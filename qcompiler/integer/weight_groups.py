"""Weights that share scales in groups, in the integer graph: 8-bit constants that note how they may be stored.

They are products of codes of few bits and a factor for each group (`arithmetic.scaled_codes`). Whoever multiplies by
them need not know; whoever stores them takes them apart again with `arithmetic.split_codes`. Weights lie channels last:
groups along the last axis.
"""

from collections.abc import Collection
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qcompiler.graph import const_of, input_of, integer, producer
from qcompiler.integer.weight_types import narrowed, stored_bits
from qcompiler.quant.arithmetic import GROUP_FACTORS, scaled_codes

_KEY = "qcompiler.weight_groups"
_TOLERANCE = 1e-4
"""How far from a whole number a scale may be, in units."""


@dataclass(frozen=True)
class Groups:
    size: int
    """Weights that share a factor, at most."""
    bits: int
    """Of a code."""

    def __str__(self) -> str:
        return f"{'binary' if self.bits == 1 else f'int{self.bits}'}/{self.size}"

    @property
    def factor_bits(self) -> int:
        """Of a stored factor: less 1 it is a number of so many."""
        return 4 if GROUP_FACTORS[self.bits] == 1 << 4 else 8

    def count(self, depth: int) -> int:
        """Groups of one run of so many weights."""
        return -(-depth // self.size)

    def row_bytes(self, weights: np.ndarray) -> int:
        """Of one output channel of weights [O, …, depth], codes and factors each in whole bytes."""
        depth = weights.shape[-1]
        places = weights[0].size // depth
        codes, factors = places * depth * self.bits, places * self.count(depth) * self.factor_bits
        return -(-codes // 8) + -(-factors // 8)


@dataclass(frozen=True)
class GroupedWeights:
    """Weights in groups as a QDQ model holds them, with whole factors."""

    array: np.ndarray
    """int8, of the shape they have there."""
    unit: np.ndarray
    """[outputs] float32: the scale of products with factor 1."""
    groups: Groups


def record_groups(value: ir.Value, groups: Groups) -> None:
    """Note how constant weights may be stored."""
    value.metadata_props[_KEY] = f"{groups.size} {groups.bits}"


def groups_of(value: ir.Value | None) -> Groups | None:
    """What was noted, if anything."""
    noted = value.metadata_props.get(_KEY) if value is not None else None
    if noted is None:
        return None
    size, bits = map(int, noted.split())
    return Groups(size, bits)


def stored_bytes(value: ir.Value) -> int | None:
    """Of constant weights that are stored in groups; None for others."""
    groups, weights = groups_of(value), const_of(value)
    if groups is None or weights is None:
        return None
    return weights.shape[0] * groups.row_bytes(weights)


def grouped_weights(
    value: ir.Value | None, outputs_axis: int, offered: Collection[str], *, power_of_two: bool
) -> GroupedWeights | None:
    """The constants that `value` dequantizes by the group.

    Args:
        outputs_axis: 0 or 1; groups lie along the other one of the two.
        offered: the types of weights that the target has.
        power_of_two: whether units must be such.

    Returns:
        None if it does not, or not with whole multiples of one unit for each output that leave weights within 8 bits.
    """
    node = producer(value, "DequantizeLinear")
    size = integer(node, "block_size", 0) if node is not None else 0
    if node is None or not size or integer(node, "axis", 1) != 1 - outputs_axis:
        return None
    array, scale, zero_point = (const_of(input_of(node, index)) for index in range(3))
    if array is None or scale is None or array.dtype not in (ml_dtypes.int4, ml_dtypes.int2):
        return None
    if scale.dtype != np.float32 or (scale <= 0).any() or (input_of(node, 2) is not None and zero_point is None):
        return None
    if zero_point is not None and zero_point.astype(np.int8).any():
        return None
    codes = array.astype(np.int8)
    bits = stored_bits(narrowed(codes.astype(ml_dtypes.int4), offered))
    # Groups of zeros may have any scale.
    axis = 1 - outputs_axis
    starts = np.arange(0, codes.shape[axis], size)
    used = np.logical_or.reduceat(codes != 0, starts, axis=axis)
    scales = np.moveaxis(np.where(used, scale, 0), outputs_axis, 0)
    found = _whole_factors(scales, GROUP_FACTORS[bits], power_of_two=power_of_two)
    if found is None:
        return None
    unit, factors = found
    spread = scaled_codes(codes, np.moveaxis(factors, 0, outputs_axis), size, axis)
    return GroupedWeights(spread, unit, Groups(size, bits))


def _whole_factors(scale: np.ndarray, most: int, *, power_of_two: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Scales [outputs, …] as units [outputs] times whole factors, the smallest there are; zeros count as factor 1."""
    rows = scale.reshape(scale.shape[0], -1).astype(np.float64)
    largest = rows.max(axis=1)
    largest = np.where(largest > 0, largest, largest.max() if largest.any() else 1.0)
    unit, factors = np.zeros(largest.shape), np.zeros(rows.shape, np.uint8)
    for top in range(most, 0, -1):
        ratios = rows * (top / largest)[:, None]
        whole = np.rint(ratios)
        fits = (np.abs(ratios - whole) < _TOLERANCE).all(axis=1) & ((whole > 0) | (rows == 0)).all(axis=1)
        if power_of_two:
            fits &= np.frexp(largest / top)[0] == 0.5
        unit[fits] = (largest / top)[fits]
        factors[fits] = np.maximum(whole, 1).astype(np.uint8)[fits]
    return (unit.astype(np.float32), factors.reshape(scale.shape)) if unit.all() else None
