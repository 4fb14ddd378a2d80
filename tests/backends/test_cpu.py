"""Every integer operator's CPU code against the numpy reference, bit for bit, on random shapes and parameters.

All cases of a test are nodes of one graph, so that TVM compiles once.
"""

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tvm

from qcompiler import host_cpu
from qcompiler.backends.base import Kernel, host_code
from qcompiler.backends.cpu import lower_node
from qcompiler.graph import value_name
from qcompiler.integer import ops
from qcompiler.integer.reference import execute
from qcompiler.quant import arithmetic, tflite_functions
from qcompiler.quant.arithmetic import REQUANTIZE_VARIANTS, RequantizeVariant
from qcompiler.target import Target
from qcompiler.target_loader import load_target

# x86-plain has SSE2 only. x86-cpu is this machine, whatever it has; test_cpu_features.py takes features from it.
TARGETS = ("x86-cpu", "x86-plain")


def check(bench, run, folder: Path, target: str = "x86-cpu") -> None:
    compare(bench, run, folder, load_target(target))


def compare(bench, run, folder: Path, target: Target) -> None:
    model = bench.model()
    expected = execute(model, bench.feeds)
    actual = run(model, target, bench.feeds, folder)
    for value, array in zip(model.graph.outputs, actual, strict=True):
        wanted = expected[value_name(value)]
        node = value.producer()
        assert node is not None
        wrong = int((wanted != array).sum())
        assert array.dtype == wanted.dtype and np.array_equal(array, wanted), (
            f"{wrong} of {wanted.size} differ in {node.op_type} {dict(node.attributes)} "
            f"{[tuple(v.shape) for v in node.inputs if v is not None and v.shape is not None]}"
        )


def pick(rng: np.random.Generator, *choices):
    return choices[rng.integers(len(choices))]


def out_range(rng: np.random.Generator, dtype: str) -> tuple[int, int, int]:
    """y_zero_point, clamp_min, clamp_max: the whole range or a fused activation's part of it."""
    info = np.iinfo(dtype)
    zero = int(rng.integers(info.min, info.max + 1))
    low = pick(rng, info.min, min(zero, info.max - 1))
    return zero, low, int(rng.integers(low + 1, info.max + 1))


def factors(
    rng: np.random.Generator, size: int, variant: RequantizeVariant, terms: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rescale factors that bring sums of `terms` products near the 8-bit range."""
    real = rng.uniform(0.2, 4, size) / (np.sqrt(terms) * 70)
    if variant == "shift":
        real = np.exp2(np.round(np.log2(real)))
    return arithmetic.multipliers(real, variant)


def zero_point(rng: np.random.Generator, dtype: str) -> int:
    info = ml_dtypes.iinfo(dtype)
    return int(rng.integers(info.min, info.max + 1))


Pair = tuple[int, int]


def random_pads(rng: np.random.Generator, below: Pair) -> tuple[int, int, int, int]:
    top, left, bottom, right = (int(rng.integers(0, below[axis % 2])) for axis in range(4))
    return top, left, bottom, right


def windows(padded: Pair, kernel: Pair, strides: Pair, dilations: Pair) -> list[int]:
    """Output height and width."""
    sizes = zip(padded, kernel, strides, dilations, strict=True)
    return [(size - (k - 1) * d - 1) // s + 1 for size, k, s, d in sizes]


def add_conv(
    bench, variant: RequantizeVariant, *, transposed: bool = False, w_dtypes: Sequence[str] = ("int8", "int8", "uint8")
) -> None:
    rng = bench.rng
    group = pick(rng, 1, 1, 1, 2, 3)
    depthwise = rng.random() < 0.25
    depth = 1 if depthwise else int(rng.integers(1, 12))
    per_group = 1 if depthwise else int(rng.integers(1, 40))
    group = pick(rng, 3, 8, 16, 24) if depthwise else group
    channels, outs = group * depth, group * per_group
    kernel = (int(rng.integers(1, 5)), int(rng.integers(1, 5)))
    strides, dilations = (pick(rng, 1, 1, 2, 3), pick(rng, 1, 1, 2)), (pick(rng, 1, 1, 2), pick(rng, 1, 1, 3))
    pads = random_pads(rng, (3, 3)) if rng.random() < 0.6 else (0, 0, 0, 0)
    n, h, w = int(rng.integers(1, 3)), int(rng.integers(8, 20)), int(rng.integers(10, 32))
    if transposed:
        out = [
            (i - 1) * s + (k - 1) * d + 1 - pads[a] - pads[a + 2] + int(rng.integers(0, s))
            for a, (i, s, k, d) in enumerate(zip((h, w), strides, kernel, dilations, strict=True))
        ]
    else:
        out = windows((h + pads[0] + pads[2], w + pads[1] + pads[3]), kernel, strides, dilations)
    x_dtype, w_dtype, y_dtype = (
        pick(rng, "int8", "uint8"),
        pick(rng, *w_dtypes),
        pick(rng, "int8", "uint8"),
    )
    w_zero = zero_point(rng, w_dtype) if w_dtype == "uint8" or rng.random() < 0.3 else 0
    y_zero, low, high = out_range(rng, y_dtype)
    cls = ops.QConvTranspose if transposed else ops.QConv
    op = cls(kernel, strides, pads, dilations, group, zero_point(rng, x_dtype), w_zero, y_zero, low, high, variant)
    info = ml_dtypes.iinfo(w_dtype)
    inputs = [
        bench.random((n, h, w, channels), x_dtype),
        bench.constant(rng.integers(info.min, info.max + 1, (outs, *kernel, depth)).astype(w_dtype)),
        bench.constant(rng.integers(-30000, 30000, outs).astype(np.int32)),
        *map(bench.constant, factors(rng, outs, variant, depth * kernel[0] * kernel[1])),
    ]
    bench.integer(op, inputs, (n, *out, outs), y_dtype)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
def test_convolution(workbench, run_on_cpu, tmp_path, variant: RequantizeVariant, target: str) -> None:
    bench = workbench(seed=REQUANTIZE_VARIANTS.index(variant))
    for _ in range(8):
        add_conv(bench, variant)
    check(bench, run_on_cpu, tmp_path, target)


def test_threads(workbench, run_on_cpu, tmp_path) -> None:
    """Kernels large enough to be shared: many rows, one row of many pixels, one pixel of many channels, depthwise."""
    bench = workbench(seed=5)
    for shape, outs, kernel, group in (
        ((1, 33, 29, 48), 64, 3, 1),
        ((1, 40, 41, 96), 50, 1, 1),
        ((1, 1, 1, 3000), 1111, 1, 1),
        ((1, 57, 57, 64), 64, 3, 64),
    ):
        pad, (_, h, w, channels) = kernel // 2, shape
        depth = channels // group
        op = ops.QConv((kernel, kernel), (1, 1), (pad, pad, pad, pad), (1, 1), group, 7, 0, -3, -128, 127, "float32")
        inputs = [
            bench.random(shape, "int8"),
            bench.constant(bench.rng.integers(-127, 128, (outs, kernel, kernel, depth)).astype(np.int8)),
            bench.constant(bench.rng.integers(-30000, 30000, outs).astype(np.int32)),
            *map(bench.constant, factors(bench.rng, outs, "float32", depth * kernel * kernel)),
        ]
        bench.integer(op, inputs, (1, h, w, outs), "int8")
    target = load_target("x86-cpu")
    two = target.model_copy(update={"host": target.host.model_copy(update={"threads": 2})})
    host = host_code(two.host)
    for node in bench.nodes:
        kernel = lower_node(node, host)
        assert isinstance(kernel, Kernel) and "T.parallel" in kernel.function.script(), node.name
    compare(bench, run_on_cpu, tmp_path, two)


@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_transposed_convolution(workbench, run_on_cpu, tmp_path) -> None:
    bench = workbench(seed=10)
    for variant in REQUANTIZE_VARIANTS * 2:
        add_conv(bench, variant, transposed=True)
    check(bench, run_on_cpu, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_four_bit_weights(workbench, run_on_cpu, tmp_path, target: str) -> None:
    bench = workbench(seed=15)
    for index in range(12):
        add_conv(bench, REQUANTIZE_VARIANTS[index % 4], transposed=index % 6 == 5, w_dtypes=("int4",))
    for m, k, n in ((1, 129, 33), (7, 64, 10)):
        op = ops.QGemm(zero_point(bench.rng, "int8"), 0, *out_range(bench.rng, "int8"), "float32")
        inputs = [
            bench.random((m, k), "int8"),
            bench.constant(bench.rng.integers(-8, 8, (n, k)).astype(ml_dtypes.int4)),
            bench.constant(bench.rng.integers(-30000, 30000, n).astype(np.int32)),
            *map(bench.constant, factors(bench.rng, n, "float32", k)),
        ]
        bench.integer(op, inputs, (m, n), "int8")
    check(bench, run_on_cpu, tmp_path, target)


def test_four_bit_weights_take_half_the_memory(workbench) -> None:
    bench, host = workbench(seed=16), host_code(load_target("x86-cpu").host)
    sizes = []
    for dtype in (np.dtype(np.int8), np.dtype(ml_dtypes.int4)):
        op = ops.QConv((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 0, 0, 0, -128, 127, "float32")
        inputs = [
            bench.random((1, 8, 8, 32), "int8"),
            bench.constant(np.ones((32, 3, 3, 32), dtype)),
            bench.constant(np.zeros(32, np.int32)),
            *map(bench.constant, factors(bench.rng, 32, "float32", 288)),
        ]
        bench.integer(op, inputs, (1, 8, 8, 32), "int8")
        kernel = lower_node(bench.nodes[-1], host)
        assert isinstance(kernel, Kernel)
        sizes.append(kernel.parameters[0].nbytes)
    assert sizes == [32 * 9 * 32, 32 * 9 * 32 // 2]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_gemm_and_matmul(workbench, run_on_cpu, tmp_path, target: str) -> None:
    bench = workbench(seed=20)
    rng = bench.rng
    for variant in REQUANTIZE_VARIANTS:
        x_dtype, y_dtype = pick(rng, "int8", "uint8"), pick(rng, "int8", "uint8")
        m, k, n = int(rng.integers(1, 30)), int(rng.integers(1, 70)), int(rng.integers(1, 50))
        y_zero, low, high = out_range(rng, y_dtype)
        w_zero = zero_point(rng, "int8")
        gemm = ops.QGemm(zero_point(rng, x_dtype), w_zero, y_zero, low, high, variant)
        inputs = [
            bench.random((m, k), x_dtype),
            bench.constant(rng.integers(-128, 128, (n, k)).astype(np.int8)),
            bench.constant(rng.integers(-30000, 30000, n).astype(np.int32)),
            *map(bench.constant, factors(rng, n, variant, k)),
        ]
        bench.integer(gemm, inputs, (m, n), y_dtype)
        matmul = ops.QMatMul(zero_point(rng, "int8"), zero_point(rng, x_dtype), y_zero, low, high, variant)
        for batch_a, batch_b, n in (((), (), 13), ((2, 3), (3,), 32), ((3,), (3,), 64), ((1, 2), (4, 1), 7)):
            a, b = bench.random((*batch_a, m, k), "int8"), bench.random((*batch_b, k, n), x_dtype)
            scale = map(bench.constant, factors(rng, 1, variant, k))
            batch = np.broadcast_shapes(batch_a, batch_b)
            bench.integer(matmul, [a, b, *scale], (*batch, m, n), y_dtype)
    check(bench, run_on_cpu, tmp_path, target)


BROADCASTS: tuple[tuple[Sequence[int], Sequence[int]], ...] = (
    ((2, 5, 7, 24), (2, 5, 7, 24)),
    ((1, 6, 6, 64), (64,)),
    ((2, 5, 3), (2, 1, 3)),
    ((1, 1, 1, 16), (2, 3, 4, 16)),
    ((3, 1, 5), (1, 4, 1)),
    ((), (7,)),
)


@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_addition(workbench, run_on_cpu, tmp_path) -> None:
    bench = workbench(seed=30)
    rng = bench.rng
    for variant in REQUANTIZE_VARIANTS:
        for a, b in BROADCASTS:
            dtypes = [pick(rng, "int8", "uint8") for _ in range(3)]
            y_zero, low, high = out_range(rng, dtypes[2])
            scales = np.exp(rng.uniform(-6, -2, 3))
            op = ops.QAdd(
                int(rng.integers(2)),
                zero_point(rng, dtypes[0]),
                zero_point(rng, dtypes[1]),
                y_zero,
                *arithmetic.add_factors(float(scales[0]), float(scales[1]), float(scales[2]), variant),
                low,
                high,
                variant,
            )
            inputs = [bench.random(a, dtypes[0]), bench.random(b, dtypes[1])]
            bench.integer(op, inputs, np.broadcast_shapes(tuple(a), tuple(b)), dtypes[2])
    check(bench, run_on_cpu, tmp_path)


@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_multiplication_and_requantize(workbench, run_on_cpu, tmp_path) -> None:
    bench = workbench(seed=40)
    rng = bench.rng
    for variant in REQUANTIZE_VARIANTS:
        for a, b in BROADCASTS:
            dtypes = [pick(rng, "int8", "uint8") for _ in range(3)]
            a_zero, b_zero = zero_point(rng, dtypes[0]), zero_point(rng, dtypes[1])
            mul = ops.QMul(a_zero, b_zero, *out_range(rng, dtypes[2]), variant)
            inputs = [bench.random(a, dtypes[0]), bench.random(b, dtypes[1])]
            scale = map(bench.constant, factors(rng, 1, variant, 1))
            bench.integer(mul, [*inputs, *scale], np.broadcast_shapes(tuple(a), tuple(b)), dtypes[2])
            requantize = ops.QRequantize(a_zero, *out_range(rng, dtypes[2]), variant)
            scale = map(bench.constant, arithmetic.multipliers(np.exp2(rng.integers(-3, 3, 1)), variant))
            bench.integer(requantize, [bench.random(b, dtypes[0]), *scale], b, dtypes[2])
    check(bench, run_on_cpu, tmp_path)


@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_pools(workbench, run_on_cpu, tmp_path) -> None:
    bench = workbench(seed=50)
    rng = bench.rng
    for variant in REQUANTIZE_VARIANTS * 2:
        dtype, y_dtype = pick(rng, "int8", "uint8"), pick(rng, "int8", "uint8")
        n, h, w, c = (
            int(rng.integers(1, 3)),
            int(rng.integers(6, 14)),
            int(rng.integers(6, 14)),
            pick(rng, 1, 5, 16, 64),
        )
        kernel = (int(rng.integers(2, 5)), int(rng.integers(1, 4)))
        strides = (pick(rng, 1, 2), pick(rng, 1, 2, 3))
        pads = random_pads(rng, kernel)
        dilations = (pick(rng, 1, 2), 1)
        y_zero, low, high = out_range(rng, y_dtype)
        size = (h + pads[0] + pads[2], w + pads[1] + pads[3])
        low_x = np.iinfo(dtype).min
        pool = ops.QMaxPool(kernel, strides, pads, dilations, low_x + 20, low_x + 200)
        bench.integer(
            pool, [bench.random((n, h, w, c), dtype)], (n, *windows(size, kernel, strides, dilations), c), dtype
        )
        count = kernel[0] * kernel[1]
        real = (
            np.exp2(-rng.integers(0, 4, count).astype(float)) if variant == "shift" else 1.3 / np.arange(1, count + 1)
        )
        average = ops.QAveragePool(
            kernel, strides, pads, int(rng.integers(2)), zero_point(rng, dtype), y_zero, low, high, variant
        )
        scale = list(map(bench.constant, arithmetic.multipliers(real, variant)))
        out = windows(size, kernel, strides, (1, 1))
        bench.integer(average, [bench.random((n, h, w, c), dtype), *scale], (n, *out, c), y_dtype)
        mean_scale = list(map(bench.constant, factors(rng, 1, variant, 30)))
        for axes, shape in (((1, 2), (n, 1, 1, c)), ((3,), (n, h, w)), ((1,), (n, w, c)), ((0, 1, 2, 3), (1, 1, 1, 1))):
            mean = ops.QReduceMean(axes, zero_point(rng, dtype), y_zero, low, high, variant)
            bench.integer(mean, [bench.random((n, h, w, c), dtype), *mean_scale], shape, y_dtype)
    check(bench, run_on_cpu, tmp_path)


@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_lookup_softmax_and_resize(workbench, run_on_cpu, tmp_path) -> None:
    bench = workbench(seed=60)
    rng = bench.rng
    for dtype in ("int8", "uint8"):
        info = np.iinfo(dtype)
        table = rng.integers(info.min, info.max + 1, 256).astype(dtype)
        bench.integer(ops.QLookup("Sigmoid"), [bench.random((3, 5, 7), dtype), bench.constant(table)], (3, 5, 7), dtype)
        for shape in ((1, 1000), (2, 3, 21), (5,)):
            exponentials, inverse = arithmetic.softmax_tables(float(rng.uniform(0.01, 0.3)), 1 / 256)
            softmax = ops.QSoftmax(inverse, info.min, info.min, info.max)
            bench.integer(softmax, [bench.random(shape, dtype), bench.constant(exponentials)], shape, dtype)
            kernel = ops.QSoftmax(ops.TFLITE_SOFTMAX, info.min, info.min, info.max)
            exponentials = tflite_functions.softmax_table(10 ** float(rng.uniform(-3, 0)))
            bench.integer(kernel, [bench.random(shape, dtype), bench.constant(exponentials)], shape, dtype)
        for n, h, w, c, oh, ow in ((2, 5, 7, 16, 10, 21), (1, 9, 4, 3, 4, 9)):
            rows, columns = rng.integers(0, h, oh).astype(np.int32), rng.integers(0, w, ow).astype(np.int32)
            inputs = [bench.random((n, h, w, c), dtype), bench.constant(rows), bench.constant(columns)]
            bench.integer(ops.QResizeNearest(), inputs, (n, oh, ow, c), dtype)
            y_index, y_weight = taps(rng, h, oh)
            x_index, x_weight = taps(rng, w, ow)
            linear = [bench.constant(a) for a in (y_index, y_weight, x_index, x_weight)]
            bench.integer(ops.QResizeLinear(), [bench.random((n, h, w, c), dtype), *linear], (n, oh, ow, c), dtype)
    check(bench, run_on_cpu, tmp_path)


def taps(rng: np.random.Generator, size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """Two neighbours and their weights, adding to 2048, for each output position."""
    first = rng.integers(0, size, out)
    weight = rng.integers(0, 2049, out)
    indices = np.stack([first, np.minimum(first + 1, size - 1)], 1)
    return indices.astype(np.int32), np.stack([2048 - weight, weight], 1).astype(np.int32)


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("x86-avx512vnni", "vpdpbusd"),
        ("x86-avx2", "vpmaddwd"),
        ("x86-plain", "\tpmaddwd"),
        ("arm-cpu", "sdot"),
        ("arm-cpu-neon", "sadalp"),
    ],
)
def test_dot_product_is_chosen_by_cpu_features(workbench, target: str, instruction: str) -> None:
    """Looked for in the assembly, as the target's CPU need not be this machine's."""
    bench = workbench(seed=70)
    op = ops.QConv((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 3, 0, 0, -128, 127, "float32")
    weights = bench.rng.integers(-128, 128, (32, 3, 3, 16)).astype(np.int8)
    scale = factors(bench.rng, 32, "float32", 144)
    constants = [weights, np.zeros(32, np.int32), *scale]
    bench.integer(op, [bench.random((1, 8, 8, 16), "int8"), *map(bench.constant, constants)], (1, 8, 8, 32), "int8")
    host = host_code(load_target(target).host)
    kernel = lower_node(bench.nodes[0], host)
    assert isinstance(kernel, Kernel)
    assembly = tvm.compile(kernel.function, target=host.target).mod.inspect_source("asm")
    for name in ("vpdpbusd", "vpmaddwd", "\tpmaddwd", "sdot", "sadalp", "pmaddubsw"):
        assert (name in assembly) == (name == instruction)


def test_256_bit_dot_product(workbench, run_on_cpu, tmp_path) -> None:
    """A CPU with AVX-VNNI and without AVX-512."""
    if "avxvnni" not in host_cpu.detect().features:
        pytest.skip("this machine has no AVX-VNNI")
    bench = workbench(seed=71)
    for variant in REQUANTIZE_VARIANTS:
        add_conv(bench, variant)
    target = load_target("x86-cpu")
    cpu = {"kind": "llvm", "mcpu": "x86-64-v3", "mattr": ("+avxvnni",)}
    narrow = target.model_copy(update={"host": target.host.model_copy(update={"tvm_target": cpu})})
    compare(bench, run_on_cpu, tmp_path, narrow)
