"""Quantizing at run time on the CPU: integers bit for bit, what onnxruntime makes of a tensor too."""

import ml_dtypes
import numpy as np
import pytest

from qcompiler.graph import value_name
from qcompiler.integer import ops
from qcompiler.integer.reference import execute
from qcompiler.target_loader import load_target

INF = float("inf")


def add_conv(bench, x_dtype: str, w_dtype: type, zero_point: int) -> None:
    """Scales of 1 and biases of whole numbers: the float result is the integer sum."""
    rng = bench.rng
    depthwise = rng.random() < 0.3
    group = int(rng.integers(3, 40)) if depthwise else int(rng.integers(1, 3))
    depth = 1 if depthwise else int(rng.integers(1, 20))
    outs = group if depthwise else group * int(rng.integers(1, 20))
    kernel = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    h, w = int(rng.integers(5, 12)), int(rng.integers(5, 20))
    strides, pads = (int(rng.integers(1, 3)), int(rng.integers(1, 3))), (1, 0, int(rng.integers(0, 2)), 1)
    out = [(s + pads[i] + pads[i + 2] - kernel[i]) // strides[i] + 1 for i, s in enumerate((h, w))]
    low, high = {np.int8: (-128, 128), np.uint8: (0, 256), ml_dtypes.int4: (-8, 8)}[w_dtype]
    clamp = (-INF, INF) if rng.random() < 0.5 else (-5000.0, 60000.0)
    op = ops.QConvDynamic(kernel, strides, pads, (1, 1), group, zero_point, *clamp)
    info = np.iinfo(x_dtype)
    inputs = [
        bench.random((2, h, w, depth * group), x_dtype),
        bench.input(np.ones((), np.float32)),
        bench.input(np.array(rng.integers(info.min, info.max + 1), x_dtype)),
        bench.constant(rng.integers(low, high, (outs, *kernel, depth)).astype(w_dtype)),
        bench.constant(np.ones(outs, np.float32)),
        bench.constant(rng.integers(-1000, 1000, outs).astype(np.float32)),
    ]
    bench.integer(op, inputs, (2, *out, outs), "float32")


def add_gemm(bench, x_dtype: str) -> None:
    rng = bench.rng
    rows, depth, outs = (int(rng.integers(1, high)) for high in (9, 70, 50))
    inputs = [
        bench.random((rows, depth), x_dtype),
        bench.input(np.ones((), np.float32)),
        bench.input(np.array(rng.integers(np.iinfo(x_dtype).min, np.iinfo(x_dtype).max + 1), x_dtype)),
        bench.constant(rng.integers(-127, 128, (outs, depth)).astype(np.int8)),
        bench.constant(np.ones(outs, np.float32)),
        bench.constant(np.zeros(outs, np.float32)),
    ]
    bench.integer(ops.QGemmDynamic(0, -INF, INF), inputs, (rows, outs), "float32")


@pytest.mark.parametrize("target", ["x86-cpu", "x86-avx2", "x86-plain"])
@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_sums_are_exact(workbench, run_on_cpu, tmp_path, target: str) -> None:
    bench = workbench(len(target))
    for _ in range(3):
        for x_dtype in ("uint8", "int8"):
            add_conv(bench, x_dtype, np.int8, 0)
            add_gemm(bench, x_dtype)
        add_conv(bench, "uint8", np.int8, 7)
        add_conv(bench, "uint8", np.uint8, 131)
        add_conv(bench, "uint8", ml_dtypes.int4, 0)
    model = bench.model()
    expected = execute(model, bench.feeds)
    got = run_on_cpu(model, load_target(target), bench.feeds, tmp_path)
    for value, array in zip(model.graph.outputs, got, strict=True):
        wanted = expected[value_name(value)]
        assert np.abs(wanted).max() < 1 << 24
        np.testing.assert_array_equal(array, wanted)
        assert len(np.unique(wanted)) > min(10, wanted.size // 2)


def test_scales_biases_and_clamps(workbench, run_on_cpu, tmp_path) -> None:
    bench = workbench(4)
    rng = bench.rng
    op = ops.QGemmDynamic(0, -0.5, 6.0)
    inputs = [
        bench.random((7, 33), "uint8"),
        bench.input(np.array(0.013, np.float32)),
        bench.input(np.array(101, np.uint8)),
        bench.constant(rng.integers(-127, 128, (21, 33)).astype(np.int8)),
        bench.constant(rng.uniform(0.001, 0.02, 21).astype(np.float32)),
        bench.constant(rng.standard_normal(21).astype(np.float32)),
    ]
    bench.integer(op, inputs, (7, 21), "float32")
    model = bench.model()
    (wanted,) = execute(model, bench.feeds).values()
    (got,) = run_on_cpu(model, load_target("x86-cpu"), bench.feeds, tmp_path)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.min() == -0.5 and wanted.max() == 6.0


@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_dynamic_quantize_linear(workbench, run_on_cpu, tmp_path) -> None:
    """Whole vectors and rests, ranges on one side of zero, nothing but zeros, ties."""
    bench = workbench(11)
    rng = bench.rng
    tensors = [
        rng.standard_normal(shape).astype(np.float32) * scale
        for shape, scale in (((1,), 1), ((5, 7), 1e-3), ((3, 16, 4), 30), ((1, 8, 9, 9), 1e6), ((2, 65), 1), ((16,), 2))
    ]
    tensors += [np.abs(tensors[1]) + 1, -np.abs(tensors[2]) - 5, np.zeros((3, 5), np.float32)]
    tensors.append((np.arange(-255, 256) / 2).astype(np.float32))
    for tensor in tensors:
        bench.standard(
            "DynamicQuantizeLinear",
            [bench.input(tensor)],
            [(tensor.shape, np.dtype(np.uint8)), ((), np.dtype(np.float32)), ((), np.dtype(np.uint8))],
        )
    model = bench.model()
    expected = execute(model, bench.feeds)  # onnxruntime's, a node at a time
    got = run_on_cpu(model, load_target("x86-cpu"), bench.feeds, tmp_path)
    for value, array in zip(model.graph.outputs, got, strict=True):
        np.testing.assert_array_equal(array, expected[value_name(value)])
