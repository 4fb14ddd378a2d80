"""The TE arithmetic against the numpy definition, element by element, on values chosen to hurt."""

import numpy as np
import pytest
import tvm
from tvm import tirx

from qcompiler.backends import te, te_arithmetic
from qcompiler.backends.base import host_code
from qcompiler.quant import arithmetic
from qcompiler.quant.arithmetic import REQUANTIZE_VARIANTS, RequantizeVariant
from qcompiler.target_loader import load_target

COUNT = 6000


def run(function: tirx.PrimFunc, arguments: list[np.ndarray], out: np.ndarray) -> np.ndarray:
    compiled = tvm.compile(function, target=host_code(load_target("x86-cpu").host).target)
    tensors = [tvm.runtime.tensor(array) for array in (*arguments, out)]
    compiled["main"](*tensors)
    return tensors[-1].numpy()


def accumulators(rng: np.random.Generator) -> np.ndarray:
    """Any int32, small ones, halves of powers of two with their neighbours, and the extremes."""
    halves = np.exp2(rng.integers(0, 30, COUNT // 4)).astype(np.int64) * rng.integers(-3, 4, COUNT // 4)
    acc = np.concatenate(
        [
            rng.integers(-(1 << 31), 1 << 31, COUNT // 4),
            rng.integers(-3000, 3000, COUNT // 4),
            halves,
            halves + rng.integers(-1, 2, COUNT // 4),
        ]
    )
    acc = np.clip(acc, -(1 << 31), (1 << 31) - 1).astype(np.int32)
    acc[:4] = [-(1 << 31), (1 << 31) - 1, 0, -1]
    return acc


@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_requantize(variant: RequantizeVariant, dtype: str) -> None:
    rng = np.random.default_rng(len(dtype))
    acc = accumulators(rng)
    real = np.exp2(rng.integers(-24, 3, COUNT)) if variant == "shift" else np.exp2(rng.uniform(-30, 3, COUNT))
    multiplier, shift = arithmetic.multipliers(real, variant)
    if variant != "float32":
        multiplier[-3:], shift[-3:] = 0, 0
    info = np.iinfo(dtype)
    limits, zero = (int(info.min) + 3, int(info.max) - 2), 17
    a, m, s = (te.placeholder((COUNT,), str(array.dtype), "p") for array in (acc, multiplier, shift))
    y = te.compute(
        (COUNT,), lambda i: te_arithmetic.requantize(a[i], m[i], s[i], variant, zero, limits, dtype), "output"
    )
    actual = run(te.prim_func([a, m, s, y]), [acc, multiplier, shift], np.zeros(COUNT, dtype))
    np.testing.assert_array_equal(actual, arithmetic.requantize(acc, multiplier, shift, variant, zero, limits, dtype))


@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
def test_rescale_of_any_accumulator(variant: RequantizeVariant) -> None:
    """Without the clamp that `requantize` ends in, which hides the high bits."""
    rng = np.random.default_rng(3)
    acc = accumulators(rng) >> 2
    real = np.exp2(rng.integers(-24, 1, COUNT)) if variant == "shift" else np.exp2(rng.uniform(-30, 1, COUNT))
    multiplier, shift = arithmetic.multipliers(real, variant)
    a, m, s = (te.placeholder((COUNT,), str(array.dtype), "p") for array in (acc, multiplier, shift))
    y = te.compute((COUNT,), lambda i: te_arithmetic.rescale(a[i], m[i], s[i], variant).astype("int64"), "output")
    actual = run(te.prim_func([a, m, s, y]), [acc, multiplier, shift], np.zeros(COUNT, np.int64))
    np.testing.assert_array_equal(actual, arithmetic.rescale(acc, multiplier, shift, variant))


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
@pytest.mark.parametrize("scales", [(0.02, 0.013, 0.03), (0.5, 0.0001, 0.4), (0.0001, 0.0001, 0.5), (1.0, 1.0, 0.01)])
def test_add(variant: RequantizeVariant, scales: tuple[float, float, float], subtract: bool) -> None:
    """Every pair of zero-point-free operands of two 8-bit types at once."""
    factors = arithmetic.add_factors(*scales, variant)
    values = np.arange(-255, 256, dtype=np.int32)
    a, b = te.placeholder(values.shape, "int32", "a"), te.placeholder(values.shape, "int32", "b")
    shape = (values.size, values.size)
    y = te.compute(
        shape,
        lambda i, j: te_arithmetic.add(a[i], b[j], factors, variant, subtract=subtract).astype("int64"),
        "output",
    )
    actual = run(te.prim_func([a, b, y]), [values, values], np.zeros(shape, np.int64))
    np.testing.assert_array_equal(actual, arithmetic.add(values[:, None], values, factors, variant, subtract=subtract))


@pytest.mark.parametrize(("scale", "out_scale"), [(0.05, 1 / 256), (0.4, 1 / 255), (0.001, 0.01)])
def test_softmax(scale: float, out_scale: float) -> None:
    rng = np.random.default_rng(4)
    x = rng.integers(-128, 128, (20, 77)).astype(np.int8)
    x[0], x[1] = -128, 127
    table, inverse = arithmetic.softmax_tables(scale, out_scale)
    rows, entries = te.placeholder(x.shape, "int8", "x"), te.placeholder((256,), "int32", "table")
    y = te_arithmetic.softmax(rows, entries, inverse, -128, (-128, 127), "int8")
    actual = run(te.prim_func([rows, entries, y]), [x, table], np.zeros(x.shape, np.int8))
    np.testing.assert_array_equal(actual, arithmetic.softmax(x, table, inverse, -128, (-128, 127), "int8"))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_quantize_and_dequantize(dtype: str) -> None:
    """Ties, values far out of range, and scales that are not powers of two."""
    rng = np.random.default_rng(5)
    scale = np.float32(rng.uniform(0.001, 0.1))
    ties = (rng.integers(-300, 300, COUNT // 2) + 0.5).astype(np.float32) * scale
    x = np.concatenate([ties, rng.normal(0, 20, COUNT // 2).astype(np.float32)])
    x[:4] = [1e30, -1e30, 0.0, -0.0]
    zero = 3
    source, factor = te.placeholder((COUNT,), "float32", "x"), te.placeholder((1,), "float32", "s")
    y = te.compute(
        (COUNT,), lambda i: te_arithmetic.quantize(source[i], factor[0], te.const(zero, "int32"), dtype), "output"
    )
    q = run(te.prim_func([source, factor, y]), [x, scale.reshape(1)], np.zeros(COUNT, dtype))
    np.testing.assert_array_equal(q, arithmetic.quantize(x, scale, zero, dtype))
    codes = te.placeholder((COUNT,), dtype, "q")
    back = te.compute(
        (COUNT,), lambda i: te_arithmetic.dequantize(codes[i], factor[0], te.const(zero, "int32")), "output"
    )
    actual = run(te.prim_func([codes, factor, back]), [q, scale.reshape(1)], np.zeros(COUNT, np.float32))
    np.testing.assert_array_equal(actual, arithmetic.dequantize(q, scale, zero))
