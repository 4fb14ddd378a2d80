"""Products with weights in groups: CPU code against the numpy reference, and that against onnxruntime."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends.schedules.weight_only import row_tile
from qcompiler.graph import value_name
from qcompiler.integer.ops import WeightOnlyGemm
from qcompiler.integer.reference import execute
from qcompiler.quant import arithmetic
from qcompiler.target_loader import load_target

TYPES = (ml_dtypes.int4, ml_dtypes.uint4, np.int8, np.uint8)
LIMITS = {ml_dtypes.int4: (-8, 7), ml_dtypes.uint4: (0, 15), np.int8: (-128, 127), np.uint8: (0, 255)}


def add_case(bench, rows: int, depth: int, outputs: int, group: int, dtype, compute: str, *, many_zeros: bool) -> float:
    """One WeightOnlyGemm; returns the largest sum of magnitudes that its outputs come from."""
    rng, (low, high) = bench.rng, LIMITS[dtype]
    groups = -(-depth // group)
    x = (rng.standard_normal((rows, depth)) * rng.uniform(0.1, 10, (rows, 1))).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = 0
    x[0, : min(group, depth)] = 0  # a group of zeros has no scale
    weights = rng.integers(low, high + 1, (outputs, depth)).astype(dtype)
    scale = rng.uniform(0.001, 0.02, (outputs, groups)).astype(np.float32)
    zeros = rng.integers(low, high + 1, scale.shape) if many_zeros else np.full(scale.shape, (low + high + 1) // 2)
    bias = rng.standard_normal(outputs).astype(np.float32)
    constants = [bench.constant(array) for array in (weights, scale, zeros.astype(dtype), bias)]
    bench.integer(WeightOnlyGemm(group, compute), [bench.input(x), *constants], (rows, outputs), "float32")
    real = (weights.astype(np.float32) - np.repeat(zeros, group, 1)[:, :depth]) * np.repeat(scale, group, 1)[:, :depth]
    return float((np.abs(x) @ np.abs(real).T).max())


@pytest.mark.parametrize("target", ["x86-cpu", "x86-avx2", "x86-plain"])
@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_matches_the_reference(workbench, run_on_cpu, tmp_path: Path, target: str) -> None:
    bench = workbench(seed=31)
    rng, largest = bench.rng, 0.0
    shapes = [(1, 96, 40, 32), (5, 70, 17, 16), (17, 129, 33, 64), (3, 20, 5, 32), (24, 64, 16, 24), (2, 37, 50, 37)]
    for index, (rows, depth, outputs, group) in enumerate(shapes):
        for compute in ("float32", "int8"):
            dtype = TYPES[(index + (compute == "int8")) % 4]
            largest = max(
                largest, add_case(bench, rows, depth, outputs, group, dtype, compute, many_zeros=bool(rng.integers(2)))
            )
    model = bench.model()
    expected = execute(model, bench.feeds)
    actual = run_on_cpu(model, load_target(target), bench.feeds, tmp_path)
    for value, array in zip(model.graph.outputs, actual, strict=True):
        node = value.producer()
        # One activation rounded the other way would be a hundred times as far off.
        np.testing.assert_allclose(
            array, expected[value_name(value)], rtol=0, atol=4e-7 * largest, err_msg=f"{node.name} {node.attributes}"
        )
        assert np.abs(array).max() > 0


@pytest.mark.parametrize(("bits", "level"), [(4, 4), (4, 1), (8, 4)])
def test_the_reference_computes_what_onnxruntime_does(bits: int, level: int) -> None:
    rng = np.random.default_rng(bits + level)
    rows, depth, outputs, group = 7, 96, 24, 32
    x = rng.standard_normal((rows, depth)).astype(np.float32)
    codes = rng.integers(0, 1 << bits, (outputs, depth)).astype(np.uint8)
    scale = rng.uniform(0.01, 0.02, (outputs, depth // group)).astype(np.float32)
    packed = (codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4).reshape(outputs, depth // group, -1)
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=depth, N=outputs, bits=bits, block_size=group,
        accuracy_level=level,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outputs])],
        [
            numpy_helper.from_array(packed, "b"),
            numpy_helper.from_array(scale, "s"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    session = ort.InferenceSession(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    theirs = np.asarray(session.run(None, {"x": x})[0])
    zeros = np.full(scale.shape, 1 << (bits - 1))
    exact = arithmetic.weight_only_matmul(x, codes, scale, zeros, group, "float32")
    ours = arithmetic.weight_only_matmul(x, codes, scale, zeros, group, "int8")
    if level == 1:
        np.testing.assert_allclose(theirs, exact, rtol=1e-5, atol=1e-4)
    elif np.abs(theirs - exact).max() > 1e-3:  # it has a kernel that rounds activations
        assert np.abs(theirs - ours).max() < 0.2 * np.abs(exact - ours).max()
    assert 0 < np.abs(ours - exact).max() < 0.02 * np.abs(exact).max()


def test_activations_round_by_their_own_group() -> None:
    x = np.array([[0.0, 0.0, 1.27, -0.635], [1e-41, 0.0, 12.7, 0.05]], np.float32)
    codes, scale = arithmetic.quantize_groups(x, 2)
    np.testing.assert_allclose(scale[:, 1], [0.01, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(codes[:, 2:], [[127, -64], [127, 0]])
    np.testing.assert_array_equal(codes[0, :2], [0, 0])


def test_row_tiles_waste_little() -> None:
    for registers, most in ((32, 12), (16, 4)):
        for rows in range(1, 200):
            tile = row_tile(rows, registers)
            assert 1 <= tile <= most
            assert -(-rows // tile) * tile <= rows + 3
    assert row_tile(128, 32) == 8 and row_tile(1, 32) == 1


def test_onnx_agrees_on_the_packing_of_nibbles() -> None:
    """The order that MatMulNBits and TensorProto.INT4 share: the first number is in the low nibble."""
    tensor = onnx.helper.make_tensor("w", TensorProto.UINT4, [2], np.array([3, 10]))
    assert tensor.raw_data == b"\xa3" or tensor.int32_data[0] == 0xA3
