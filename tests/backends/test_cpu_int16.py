"""16-bit activations with 8- and 4-bit weights: CPU code against the numpy reference, bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from qcompiler.backends.cpu_conv import conv_problem, sum_dtype
from qcompiler.graph import value_name
from qcompiler.integer import ops
from qcompiler.integer.reference import execute
from qcompiler.quant import arithmetic, interpolation
from qcompiler.quant.arithmetic import REQUANTIZE_VARIANTS, RequantizeVariant
from qcompiler.target_loader import load_target

LIMITS = (-32768, 32767)


def check(bench, run, folder, target: str) -> None:
    model = bench.model()
    expected = execute(model, bench.feeds)
    actual = run(model, load_target(target), bench.feeds, folder)
    for value, array in zip(model.graph.outputs, actual, strict=True):
        wanted = expected[value_name(value)]
        node = value.producer()
        assert node is not None
        assert array.dtype == wanted.dtype == np.int16
        assert np.array_equal(array, wanted), (node.op_type, int((array != wanted).sum()), wanted.size)
        assert len(np.unique(wanted)) > min(10, wanted.size // 2), "a constant result proves nothing"


def factors(bench, size: int, variant: RequantizeVariant, typical: float) -> list:
    real = bench.rng.uniform(0.5, 2, size) * typical
    real = np.exp2(np.round(np.log2(real))) if variant == "shift" else real
    return list(map(bench.constant, arithmetic.multipliers(real, variant)))


def add_conv(bench, variant: RequantizeVariant, *, heavy: bool = False) -> None:
    """`heavy`: sums beyond 32 bits."""
    rng = bench.rng
    depthwise = not heavy and rng.random() < 0.3
    group = int(rng.integers(3, 20)) if depthwise else 1
    depth = 1 if depthwise else 150 if heavy else int(rng.integers(1, 20))
    outs = group if depthwise else int(rng.integers(1, 40))
    kernel = (int(rng.integers(2, 4)), int(rng.integers(2, 4)))
    dtype = np.int8 if rng.random() < 0.7 or heavy else ml_dtypes.int4
    low, high = (100, 128) if heavy else (-8, 8) if dtype != np.int8 else (-127, 128)
    n, h, w = 1, int(rng.integers(6, 12)), int(rng.integers(6, 20))
    strides, pads = (int(rng.integers(1, 3)), 1), (1, 0, int(rng.integers(0, 2)), 1)
    out = [(s + pads[i] + pads[i + 2] - kernel[i]) // strides[i] + 1 for i, s in enumerate((h, w))]
    op = ops.QConv(kernel, strides, pads, (1, 1), group, 0, 0, 0, int(rng.integers(-32768, 0)), 32767, variant)
    terms = depth * kernel[0] * kernel[1]
    spread = 18000 * (115 * terms if heavy else (high / 2) * terms**0.5)
    inputs = [
        bench.random((n, h, w, depth * group), "int16"),
        bench.constant(rng.integers(low, high, (outs, *kernel, depth)).astype(dtype)),
        bench.constant(rng.integers(-3000000, 3000000, outs).astype(np.int32)),
        *factors(bench, outs, variant, 16000 / spread * (30 if heavy else 1)),
    ]
    bench.integer(op, inputs, (n, *out, outs), "int16")


@pytest.mark.parametrize("target", ["x86-cpu", "x86-plain"])
@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_products(workbench, run_on_cpu, tmp_path, target: str) -> None:
    bench = workbench(seed=3)
    for variant in REQUANTIZE_VARIANTS:
        add_conv(bench, variant)
        add_conv(bench, variant)
        add_conv(bench, variant, heavy=True)
        m, k, n = (int(bench.rng.integers(1, 60)) for _ in range(3))
        op = ops.QGemm(0, 0, 0, *LIMITS, variant)
        inputs = [
            bench.random((m, k), "int16"),
            bench.constant(bench.rng.integers(-127, 128, (n, k)).astype(np.int8)),
            bench.constant(bench.rng.integers(-30000, 30000, n).astype(np.int32)),
            *factors(bench, n, variant, 1 / (70 * k**0.5)),
        ]
        bench.integer(op, inputs, (m, n), "int16")
    sums = [sum_dtype(conv_problem(node)) for node in bench.nodes if node.op_type == "QConv"]
    assert sums == ["int32", "int32", "int64"] * 4
    check(bench, run_on_cpu, tmp_path, target)


@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_other_operators(workbench, run_on_cpu, tmp_path) -> None:
    bench = workbench(seed=4)
    rng = bench.rng
    for variant in REQUANTIZE_VARIANTS:
        for a, b in (((2, 5, 6, 16), (2, 5, 6, 16)), ((1, 6, 6, 7), (7,))):
            scales = np.exp(rng.uniform(-10, -8, 3))
            terms = arithmetic.add_factors(float(scales[0]), float(scales[1]), float(scales[2]), variant, bits=16)
            add = ops.QAdd(int(rng.integers(2)), 0, 0, 0, *terms, -20000, 32767, variant)
            bench.integer(add, [bench.random(a, "int16"), bench.random(b, "int16")], a, "int16")
            mul = ops.QMul(0, 0, 0, *LIMITS, variant)
            inputs = [bench.random(a, "int16"), bench.random(b, "int16"), *factors(bench, 1, variant, 3e-5)]
            bench.integer(mul, inputs, a, "int16")
        requantize = ops.QRequantize(0, 0, *LIMITS, variant)
        bench.integer(requantize, [bench.random((3, 40), "int16"), *factors(bench, 1, variant, 0.7)], (3, 40), "int16")
        pool = ops.QMaxPool((3, 2), (2, 1), (1, 0, 1, 1), (1, 1), -30000, 30000)
        bench.integer(pool, [bench.random((1, 7, 8, 5), "int16")], (1, 4, 8, 5), "int16")
        shares = 1.0 / np.arange(1, 7)
        shares = np.exp2(np.floor(np.log2(shares))) if variant == "shift" else shares
        average = ops.QAveragePool((3, 2), (1, 2), (1, 0, 1, 0), 0, 0, 0, *LIMITS, variant)
        inputs = [bench.random((1, 7, 8, 16), "int16"), *map(bench.constant, arithmetic.multipliers(shares, variant))]
        bench.integer(average, inputs, (1, 7, 4, 16), "int16")
        mean = ops.QReduceMean((1, 2), 0, 0, *LIMITS, variant)
        bench.integer(mean, [bench.random((2, 6, 5, 12), "int16"), *factors(bench, 1, variant, 0.1)], (2, 12), "int16")
        many = bench.random((1, 1 << 16, 3), "int16")
        bench.feeds[value_name(many)] = rng.integers([32000, 30000, -32768], 32768, (1, 1 << 16, 3)).astype(np.int16)
        sums = ops.QReduceMean((1,), 0, 0, *LIMITS, variant)
        bench.integer(sums, [many, *factors(bench, 1, variant, 2.0**-18)], (1, 3), "int16")
        table = np.sort(rng.integers(-32768, 32768, interpolation.ENTRIES)).astype(np.int16)
        bench.integer(
            ops.QLookup("Any"), [bench.random((3, 7, 40), "int16"), bench.constant(table)], (3, 7, 40), "int16"
        )
        for rows, length, scale in ((3, 40, 2e-4), (1, 1001, 7e-4), (20, 2, 5e-5)):
            entries = bench.constant(interpolation.softmax_table(scale))
            softmax = ops.QSoftmax(ops.TFLITE_SOFTMAX, 0, 0, 32767)
            bench.integer(softmax, [bench.random((rows, length), "int16"), entries], (rows, length), "int16")
    check(bench, run_on_cpu, tmp_path, "x86-cpu")


@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
def test_an_addition_is_as_exact_as_sixteen_bits(variant: RequantizeVariant) -> None:
    scales = (2e-4, 3.1e-4, 4.2e-4)
    rng = np.random.default_rng(8)
    a, b = (rng.integers(-32767, 32768, 4000).astype(np.int32) for _ in range(2))
    if variant == "shift":
        scales = (2.0**-12, 2.0**-11, 2.0**-10)
    terms = arithmetic.add_factors(*scales, variant, bits=16)
    ours = arithmetic.add(a, b, terms, variant, bits=16)
    exact = (a * scales[0] + b * scales[1]) / scales[2]
    assert np.abs(ours - exact).max() <= 1.01


def test_the_wide_rescale_is_tflites() -> None:
    """`MultiplyByQuantizedMultiplier(int64_t x, int32_t quantized_multiplier, int shift)`, in Python's integers."""

    def tflite(x: int, multiplier: int, shift: int) -> int:
        reduced = (multiplier + (1 << 15)) >> 16 if multiplier < 0x7FFF0000 else 0x7FFF
        total = 15 - shift
        return (x * reduced + (1 << (total - 1))) >> total

    rng = np.random.default_rng(9)
    acc = rng.integers(-(1 << 47), 1 << 47, 500)
    multiplier = np.append(rng.integers(1 << 30, 1 << 31, 498), [(1 << 31) - 1, 0x7FFF0000]).astype(np.int32)
    shift = rng.integers(-31, 8, 500).astype(np.int32)
    expected = [tflite(*map(int, row)) for row in zip(acc, multiplier, shift, strict=True)]
    for variant in ("tflite", "tosa"):
        assert arithmetic.rescale_wide(acc, multiplier, shift, variant).tolist() == expected
