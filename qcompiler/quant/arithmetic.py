"""The single definition of the integer arithmetic, in numpy.

The TE expressions (`qcompiler.backends.te_arithmetic`) and the simulator's C (`runtime_stubs/simulator/qarith.h`)
follow this file and are compared with it bit for bit.

Every integer operator ends in `requantize`: an int32 accumulator becomes an 8- or 16-bit output.
The target spec picks one of four variants:

============  ==================================================================  =======================
variant       y - zero_point, before saturation                                   source
============  ==================================================================  =======================
``float32``   ``rint(float32(acc) * multiplier)``, half to even                   ONNX Runtime QLinearConv
``tflite``    ``SRDHM(acc << left, multiplier)`` then a rounding shift by -shift  TFLite reference kernels
``tosa``      ``(acc * multiplier + 2^(30 - shift)) >> (31 - shift)``, 64 bit     TOSA 1.0 RESCALE, single round
``shift``     ``(acc + 2^(-shift - 1)) >> -shift``                                power-of-two hardware
============  ==================================================================  =======================

Products of 16-bit activations and weights accumulate in 64 bits (48 bits suffice), where the fixed-point variants
multiply by the upper half of the multiplier, rounded: see `rescale_wide`.

Weights that share scales in groups along the input channels are 8-bit integers, too: code times factor, a code of few
bits and one small factor for each group (`scaled_codes`). The scale of an output channel is that of the products, so
sums over groups add up as they are, and nothing is rescaled before the end. This is the two-level scheme of Dai et al.,
VS-Quant, MLSys 2021, with factors that keep the product within a byte: a chip may decode weights as it loads them and
multiply them like any others, or multiply each group's sum by its factor; the integers are the same.

A fixed-point multiplier is an int32 in [2^30, 2^31) with an exponent `shift`; the real factor is
``multiplier * 2^(shift - 31)`` (TFLite's `QuantizeMultiplier`). For `shift` the multiplier is 1 and the
factor is ``2^shift``. For `float32` the multiplier is a float32 and `shift` is 0.
"""

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from qcompiler.errors import QCompilerError

RequantizeVariant = Literal["float32", "tflite", "tosa", "shift"]
REQUANTIZE_VARIANTS: tuple[RequantizeVariant, ...] = ("float32", "tflite", "tosa", "shift")

IntArray = npt.NDArray[np.integer]
_INT32_MIN, _INT32_MAX = -(1 << 31), (1 << 31) - 1

# Additions bring both inputs to a common scale with this many extra bits (TFLite `add.cc`).
TFLITE_ADD_LEFT_SHIFT = 20
TFLITE_ADD_LEFT_SHIFT_INT16 = 15


def fixed_point_multiplier(factor: float) -> tuple[int, int]:
    """Return (multiplier, shift) with ``factor ≈ multiplier * 2^(shift - 31)``.

    `factor` must be finite and not negative. Zero, and factors below 2^-32, give (0, 0), as
    `QuantizeMultiplier` in tensorflow/lite/kernels/internal/quantization_util.cc does.
    """
    assert math.isfinite(factor) and factor >= 0, factor
    if factor == 0:
        return 0, 0
    mantissa, shift = math.frexp(factor)
    multiplier = math.floor(mantissa * (1 << 31) + 0.5)
    if multiplier == 1 << 31:
        multiplier //= 2
        shift += 1
    if shift < -31:
        return 0, 0
    if shift > 30:
        raise QCompilerError(f"the rescale factor {factor} is above 2^30 and no target can represent it")
    return multiplier, shift


def multipliers(factors: npt.ArrayLike, variant: RequantizeVariant) -> tuple[np.ndarray, np.ndarray]:
    """Encode real rescale factors for `variant`.

    Args:
        factors: real factors (input scale * weight scale / output scale), any shape.
        variant: the requantize variant.

    Returns:
        (multiplier, shift), both of the shape of `factors`. multiplier is float32 for ``float32`` and
        int32 otherwise; shift is int32.

    Raises:
        QCompilerError: variant ``shift`` and a factor that is not a power of two.
    """
    real = np.asarray(factors, np.float64)
    if variant == "float32":
        return real.astype(np.float32), np.zeros(real.shape, np.int32)
    if variant == "shift":
        exponent = np.round(np.log2(real)).astype(np.int32)
        if not np.array_equal(np.exp2(exponent.astype(np.float64)), real):
            raise QCompilerError(
                "this target rescales by powers of two only and the model's scales are not powers of two; "
                "compile the float model so that the scales are chosen for the target"
            )
        return np.ones(real.shape, np.int32), exponent
    pairs = [fixed_point_multiplier(float(factor)) for factor in real.ravel()]
    mult = np.array([pair[0] for pair in pairs], np.int32).reshape(real.shape)
    shift = np.array([pair[1] for pair in pairs], np.int32).reshape(real.shape)
    return mult, shift


def leading_zeros(positive: IntArray) -> np.ndarray:
    """Of int64 numbers from 1 on, as 32 bits; none of those that do not fit 31."""
    return (positive[..., None] < np.int64(1) << np.arange(1, 32)).sum(axis=-1)


def saturating_rounding_doubling_high_mul(a: IntArray, b: IntArray) -> np.ndarray:
    """High half of 2*a*b with rounding to nearest, ties away from zero in the truncated product (gemmlowp)."""
    product = a.astype(np.int64) * b.astype(np.int64)
    nudge = np.where(product >= 0, np.int64(1 << 30), np.int64(1 - (1 << 30)))
    total = product + nudge
    # C++ integer division truncates toward zero; numpy's floors.
    high = np.where(total >= 0, total >> 31, -((-total) >> 31))
    return np.minimum(high, _INT32_MAX)


def rounding_divide_by_pot(x: IntArray, exponent: IntArray) -> np.ndarray:
    """x / 2^exponent, to nearest, ties away from zero (gemmlowp `RoundingDivideByPOT`)."""
    x, exponent = x.astype(np.int64), exponent.astype(np.int64)
    mask = (np.int64(1) << exponent) - 1
    remainder = x & mask
    threshold = (mask >> 1) + (x < 0)
    return (x >> exponent) + (remainder > threshold)


def wrap_int32(x: IntArray) -> np.ndarray:
    """Two's complement int32 of x, as an int64 array."""
    return x.astype(np.int64).astype(np.uint64).astype(np.uint32).astype(np.int32).astype(np.int64)


def rescale(acc: IntArray, multiplier: npt.ArrayLike, shift: npt.ArrayLike, variant: RequantizeVariant) -> np.ndarray:
    """Scale int32 `acc` by the encoded factor; no zero point, no saturation. Returns int64.

    `multiplier` and `shift` broadcast against `acc` (per channel: the last axis).
    `float32` clips to ±2^30 before rounding, so that the conversion back to an integer is defined.
    """
    if variant == "float32":
        scaled = acc.astype(np.float32) * np.asarray(multiplier, np.float32)
        limit = np.float32(1 << 30)
        return np.rint(np.clip(scaled, -limit, limit)).astype(np.int64)
    multiplier, shift = np.asarray(multiplier, np.int64), np.asarray(shift, np.int64)
    if variant == "tflite":
        left, right = np.maximum(shift, 0), np.maximum(-shift, 0)
        shifted = wrap_int32(acc.astype(np.int64) << left)
        return rounding_divide_by_pot(saturating_rounding_doubling_high_mul(shifted, multiplier), right)
    if variant == "tosa":
        total_shift = 31 - shift
        rounding = np.int64(1) << (total_shift - 1)
        return (acc.astype(np.int64) * multiplier + rounding) >> total_shift
    left, right = np.maximum(shift, 0), np.maximum(-shift, 0)
    rounding = np.where(right > 0, np.int64(1) << np.maximum(right - 1, 0), 0)
    return ((acc.astype(np.int64) << left) + rounding) >> right


def rescale_wide(
    acc: IntArray, multiplier: npt.ArrayLike, shift: npt.ArrayLike, variant: RequantizeVariant
) -> np.ndarray:
    """`rescale` of accumulators of up to 48 bits: no zero point, no saturation. Returns int64.

    ``tflite`` and ``tosa`` are the same here: `MultiplyByQuantizedMultiplier(int64_t, …)` of TFLite's common.h, and
    TOSA's `apply_scale_16` with the multiplier of 15 bits that it gives. `shift` must be at most 14.
    """
    if variant in ("float32", "shift"):
        return rescale(acc, multiplier, shift, variant)
    total_shift = 15 - np.asarray(shift, np.int64)
    assert (total_shift > 0).all(), "a rescale factor above 2^14"
    reduced = reduced_multiplier(np.asarray(multiplier, np.int64))
    return (acc.astype(np.int64) * reduced + (np.int64(1) << (total_shift - 1))) >> total_shift


def reduced_multiplier(multiplier: IntArray) -> np.ndarray:
    """The upper 16 bits of a multiplier, to nearest, at most 2^15 - 1."""
    return np.minimum((multiplier + (1 << 15)) >> 16, 0x7FFF)


def saturate(x: IntArray, low: int, high: int, dtype: npt.DTypeLike) -> np.ndarray:
    return np.clip(x, low, high).astype(dtype)


def requantize(
    acc: IntArray,
    multiplier: np.ndarray,
    shift: np.ndarray,
    variant: RequantizeVariant,
    zero_point: int,
    clamp: tuple[int, int],
    dtype: npt.DTypeLike,
    *,
    wide: bool = False,
) -> np.ndarray:
    """Accumulators to quantized outputs: rescale, add the zero point, clamp to [clamp[0], clamp[1]].

    Accumulators are int32, or up to 48 bits if `wide`.
    """
    scaled = (rescale_wide if wide else rescale)(acc, multiplier, shift, variant)
    return saturate(scaled + zero_point, *clamp, dtype)


def add_factors(
    scale_a: float, scale_b: float, scale_y: float, variant: RequantizeVariant, *, bits: int = 8
) -> "AddFactors":
    """Encode y = (a*scale_a ± b*scale_b) / scale_y.

    ``tflite`` follows `AddElementwise` of TFLite's add.h: both inputs are shifted left by 20 bits,
    scaled down to twice the larger scale, added, and scaled to the output. The other variants use one
    common shift: ``(a*multiplier_a ± b*multiplier_b + 2^(shift-1)) >> shift``, all in int32 for operands of 8 `bits`.
    For 16 bits ``tflite`` shifts left by 15 and the others compute in int64.
    """
    if variant == "tflite":
        twice_max = 2.0 * max(scale_a, scale_b)
        ma, sa = fixed_point_multiplier(scale_a / twice_max)
        mb, sb = fixed_point_multiplier(scale_b / twice_max)
        my, sy = fixed_point_multiplier(twice_max / ((1 << add_left_shift(bits)) * scale_y))
        return (ma, sa, mb, sb, my, sy)
    largest = max(scale_a, scale_b) / scale_y
    # |a - zero_point| < 2^8 and both multipliers < 2^21: two products and the rounding term stay below 2^31.
    shift = 21 - max(math.frexp(largest)[1], -8)
    if shift < 1:
        raise QCompilerError(f"an addition's input scale is {largest:.3g} times its output scale; no target can do it")
    return (round(scale_a / scale_y * 2.0**shift), 0, round(scale_b / scale_y * 2.0**shift), 0, 1, shift)


AddFactors = tuple[int, int, int, int, int, int]
"""multiplier_a, shift_a, multiplier_b, shift_b, multiplier_y, shift_y."""


def add_left_shift(bits: int) -> int:
    """The extra bits of TFLite's addition of 8- or 16-bit operands."""
    return TFLITE_ADD_LEFT_SHIFT_INT16 if bits == 16 else TFLITE_ADD_LEFT_SHIFT


def add(
    a: IntArray,
    b: IntArray,
    factors: AddFactors,
    variant: RequantizeVariant,
    *,
    subtract: bool = False,
    bits: int = 8,
) -> np.ndarray:
    """a ± b on zero-point-free int32 inputs, rescaled to the output; no zero point, no saturation. Int64."""
    ma, sa, mb, sb, my, sy = factors
    sign = -1 if subtract else 1
    if variant == "tflite":
        scaled_a = rescale(a.astype(np.int64) << add_left_shift(bits), ma, sa, "tflite")
        scaled_b = rescale(b.astype(np.int64) << add_left_shift(bits), mb, sb, "tflite")
        return rescale(scaled_a + sign * scaled_b, my, sy, "tflite")
    total = a.astype(np.int64) * ma + sign * (b.astype(np.int64) * mb)
    return (total + (1 << (sy - 1))) >> sy


def quantize(x: np.ndarray, scale: npt.ArrayLike, zero_point: npt.ArrayLike, dtype: npt.DTypeLike) -> np.ndarray:
    """ONNX QuantizeLinear: saturate(round_half_even(x / scale) + zero_point). `scale` float32."""
    info = np.iinfo(dtype)
    with np.errstate(over="ignore"):  # infinite ratios saturate like any other
        ratio = np.asarray(x, np.float32) / np.asarray(scale, np.float32)
    limit = np.float32(1 << 30)
    rounded = np.rint(np.clip(ratio, -limit, limit)).astype(np.int64) + np.asarray(zero_point, np.int64)
    return np.clip(rounded, info.min, info.max).astype(dtype)


def dequantize(q: IntArray, scale: npt.ArrayLike, zero_point: npt.ArrayLike) -> np.ndarray:
    """ONNX DequantizeLinear: float32(q - zero_point) * scale."""
    difference = q.astype(np.int32) - np.asarray(zero_point, np.int32)
    return difference.astype(np.float32) * np.asarray(scale, np.float32)


def pack_int4(values: npt.NDArray[np.generic]) -> np.ndarray:
    """`pack_bits` of integers of [-8, 7]."""
    return pack_bits(values, 4)


def pack_bits(values: npt.NDArray[np.generic], bits: int) -> np.ndarray:
    """Several numbers of the last axis to a byte, the first in the lowest bits; zero bits fill up a row's last byte.

    Args:
        values: two's complement integers of so many bits, any integer dtype, [..., n]; of one bit: -1 and 1, which
            become 0 and 1 (and so must be what stands for nothing, if anything does).

    Returns:
        uint8 [..., ceil(n * bits / 8)]
    """
    assert bits in (1, 2, 4)
    if bits == 1:
        return np.packbits(values.astype(np.int8) > 0, axis=-1, bitorder="little")
    per_byte = 8 // bits
    codes = values.astype(np.int8).view(np.uint8) & ((1 << bits) - 1)
    rest = -codes.shape[-1] % per_byte
    codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], rest), np.uint8)], axis=-1)
    shifted = codes.reshape(*codes.shape[:-1], -1, per_byte) << (bits * np.arange(per_byte, dtype=np.uint8))
    return np.bitwise_or.reduce(shifted, axis=-1)


def unpack_bits(packed: npt.NDArray[np.uint8], count: int, bits: int) -> np.ndarray:
    """The inverse of `pack_bits`: int8 [..., count]."""
    places = bits * np.arange(8 // bits, dtype=np.uint8)
    codes = (packed[..., None] >> places & ((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)[..., :count]
    if bits == 1:
        return (2 * codes.astype(np.int8) - 1).astype(np.int8)
    sign = 1 << (bits - 1)
    return ((codes ^ sign).astype(np.int8) - sign).astype(np.int8)


def unpack_int4(packed: npt.NDArray[np.uint8], count: int) -> np.ndarray:
    """`unpack_bits` of 4 bits."""
    return unpack_bits(packed, count, 4)


GROUP_FACTORS = {1: 127, 2: 64, 4: 16}
"""By bits of the codes of weights in groups: the largest factor whose product with any code is an int8."""


def scaled_codes(codes: IntArray, factors: IntArray, group: int, axis: int) -> np.ndarray:
    """Weights that share a factor in groups, as the int8 they are multiplied as.

    Args:
        codes: integers of 4, 2 or 1 bits, any shape.
        factors: from 1 to `GROUP_FACTORS`, of that shape but for `axis`, along which each serves `group` codes, the
            last perhaps fewer.
    """
    spread = spread_groups(factors, codes.shape[axis], group, axis)
    return (codes.astype(np.int16) * spread.astype(np.int16)).astype(np.int8)


def spread_groups(values: np.ndarray, count: int, group: int, axis: int) -> np.ndarray:
    """A value for each of `count` elements along an axis, from one for every `group`; the last may serve fewer."""
    return values.take(np.arange(count) // group, axis)


def cut_groups(values: np.ndarray, group: int) -> np.ndarray:
    """The last axis as groups, [..., groups, group], zeros filling up the last."""
    fill = [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % group)]
    return np.pad(values, fill).reshape(*values.shape[:-1], -1, group)


def split_codes(weights: IntArray, group: int, axis: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `scaled_codes`, with the smallest factors: (codes int8, factors uint8).

    Codes of one bit are -1 and 1. Weights must be products of codes of so many `bits` and factors.
    """
    moved = np.moveaxis(weights.astype(np.int16), axis, -1)
    blocks = cut_groups(moved, group)
    low, high = (-1, 1) if bits == 1 else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    factors = np.zeros(blocks.shape[:-1], np.uint8)
    for factor in range(GROUP_FACTORS[bits], 0, -1):
        fits = (blocks % factor == 0).all(axis=-1)
        fits &= (blocks.min(axis=-1) >= low * factor) & (blocks.max(axis=-1) <= high * factor)
        factors[fits] = factor
    assert factors.all(), f"weights that are no products of {bits}-bit codes and factors"
    codes = (blocks // factors[..., None]).reshape(*moved.shape[:-1], -1)[..., : moved.shape[-1]]
    return np.moveaxis(codes, -1, axis).astype(np.int8), np.moveaxis(factors, -1, axis)


WeightOnlyCompute = Literal["float32", "int8"]
WEIGHT_ONLY_COMPUTES: tuple[WeightOnlyCompute, ...] = ("float32", "int8")
"""What a product with weights in groups multiplies: see `weight_only_matmul`."""


def quantize_groups(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Round every `group` activations of a row to int8 by their own largest magnitude.

    scale = max|x| / 127; q = rint(x * (1 / scale)), half to even, all in float32 (onnxruntime's MatMulNBits at accuracy
    level 4, `QuantizeARow_CompInt8`). A group of zeros has the scale 0.

    Args:
        x: float32 [M, K], K a multiple of `group`.

    Returns:
        int8 [M, K], float32 scales [M, K / group]
    """
    grouped = x.reshape(x.shape[0], -1, group)
    scale = np.abs(grouped).max(axis=-1) / np.float32(127)
    # Of the smallest subnormal numbers the reciprocal is infinite, and zero times it not a number.
    with np.errstate(invalid="ignore", over="ignore"):
        reciprocal = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        rounded = np.nan_to_num(np.rint(grouped * reciprocal[..., None]))
    return np.clip(rounded, -128, 127).astype(np.int8).reshape(x.shape), scale


def weight_only_matmul(
    x: np.ndarray, w: IntArray, scale: np.ndarray, zero_point: IntArray, group: int, compute: WeightOnlyCompute
) -> np.ndarray:
    """x [M, K] times the transpose of weights [N, K] with a scale and zero point for every `group` along K.

    `float32`: Σ_g (Σ_k x (w - zero_point)) * scale, where k runs over a group. `int8`: the same with x rounded by
    `quantize_groups`, so that the inner sum is of integers and exact, and the scale that of the weights times that of
    the activations. Sums over groups are float32 in order of g in compiled code, which may fuse the multiplication and
    the addition; here they are float64, rounded at the end. So results agree to float32's rounding, not bit for bit.

    Args:
        x: float32.
        w: [N, K] int8 or narrower.
        scale: float32 [N, ceil(K / group)].
        zero_point: integers of that shape.

    Returns:
        float32 [M, N]
    """
    groups = scale.shape[1]
    fill = ((0, 0), (0, groups * group - x.shape[1]))
    padded = np.pad(x.astype(np.float32), fill)
    centred = np.pad(w.astype(np.int32), fill) - np.repeat(zero_point.astype(np.int32), group, axis=1)
    factors, x_scale = (padded, None) if compute == "float32" else quantize_groups(padded, group)
    total = np.zeros((x.shape[0], w.shape[0]))
    for g in range(groups):
        columns = slice(g * group, (g + 1) * group)
        part = (factors[:, columns].astype(np.float64) @ centred[:, columns].T.astype(np.float64)) * scale[:, g]
        total += part if x_scale is None else part * x_scale[:, g, None]
    return total.astype(np.float32)


def softmax_tables(scale_x: float, scale_y: float) -> tuple[np.ndarray, int]:
    """(exponentials, inverse output scale) for `softmax`.

    exponentials: int32 [256]; entry d is ``round(2^22 * exp(-d * scale_x))``, d = max(x) - x.
    The inverse output scale has 8 fraction bits.
    """
    distance = np.arange(256, dtype=np.float64)
    table = np.rint(np.exp(-distance * scale_x) * (1 << 22)).astype(np.int32)
    return table, round(256.0 / scale_y)


def softmax(
    x: IntArray,
    table: np.ndarray,
    inverse_scale: int,
    zero_point: int,
    clamp: tuple[int, int],
    dtype: npt.DTypeLike,
) -> np.ndarray:
    """Integer softmax over the last axis: an exponential table and one rounded 64-bit division.

    y = zero_point + floor((2 * e * inverse_scale + s) / (2 * s)),  s = 256 * sum(e).
    """
    distance = x.max(axis=-1, keepdims=True).astype(np.int64) - x.astype(np.int64)
    exponential = table.astype(np.int64)[distance]
    total = exponential.sum(axis=-1, keepdims=True) << 8
    y = (2 * exponential * inverse_scale + total) // (2 * total) + zero_point
    return saturate(y, *clamp, dtype)
