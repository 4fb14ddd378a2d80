"""Depthwise convolutions with windows in words, against the numpy reference: every instruction this machine has."""

import numpy as np
import pytest

from qcompiler.backends.base import host_code
from qcompiler.backends.schedules.depthwise import chunk_vectors, lane_dot
from qcompiler.graph import value_name
from qcompiler.integer import ops
from qcompiler.integer.reference import execute
from qcompiler.quant import arithmetic
from qcompiler.target_loader import load_target

Pair = tuple[int, int]
CASES: tuple[tuple[str, int, Pair, Pair, Pair, Pair], ...] = (
    # activations, channels, size, kernel, strides, dilations
    ("uint8", 32, (8, 9), (3, 3), (1, 1), (1, 1)),  # words serve two rows
    ("int8", 32, (9, 8), (3, 3), (1, 1), (1, 1)),  # an odd number of rows
    ("uint8", 48, (11, 12), (3, 3), (2, 2), (1, 1)),
    ("int8", 24, (10, 7), (5, 5), (1, 1), (1, 1)),  # more rows than a word holds
    ("uint8", 8, (12, 13), (7, 2), (2, 1), (1, 1)),
    ("int8", 16, (12, 14), (3, 3), (1, 1), (2, 3)),
    ("uint8", 80, (6, 20), (1, 3), (1, 2), (1, 1)),
    ("int8", 4, (6, 6), (2, 3), (1, 1), (1, 1)),
    ("uint8", 6, (6, 6), (3, 3), (1, 1), (1, 1)),  # fills no vector
    ("int16", 16, (7, 8), (3, 3), (1, 1), (1, 1)),
    ("int16", 16, (8, 8), (5, 3), (2, 2), (1, 1)),
)


@pytest.mark.parametrize("name", ["x86-cpu", "x86-avx2", "x86-plain"])
@pytest.mark.parametrize("run_on_cpu", ["alone", "shared"], indirect=True)
def test_agrees_with_the_reference(workbench, run_on_cpu, tmp_path, name: str) -> None:
    bench = workbench(seed=len(name))
    rng: np.random.Generator = bench.rng
    for dtype, channels, size, kernel, strides, dilations in CASES:
        top, left, bottom, right = (int(rng.integers(0, k)) for k in (*kernel, *kernel))
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        padded = (size[0] + top + bottom, size[1] + left + right)
        out = [(p - r) // s + 1 for p, r, s in zip(padded, reach, strides, strict=True)]
        wide = dtype == "int16"
        spread = np.sqrt(kernel[0] * kernel[1]) * (70 if not wide else 300)
        multiplier, shift = arithmetic.multipliers(rng.uniform(0.2, 4, channels) / spread, "float32")
        zero_point = 0 if wide else int(rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max + 1))
        limits = np.iinfo(dtype)
        op = ops.QConv(
            kernel, strides, (top, left, bottom, right), dilations, channels, zero_point, 0,
            0 if wide else 3, limits.min, limits.max, "float32",
        )  # fmt: skip
        inputs = [
            bench.random((2, *size, channels), dtype),
            bench.constant(rng.integers(-128, 128, (channels, *kernel, 1)).astype(np.int8)),
            bench.constant(rng.integers(-999, 999, channels).astype(np.int32)),
            bench.constant(multiplier),
            bench.constant(shift),
        ]
        bench.integer(op, inputs, (2, *out, channels), dtype)
    model = bench.model()
    expected = execute(model, bench.feeds)
    for value, array in zip(
        model.graph.outputs, run_on_cpu(model, load_target(name), bench.feeds, tmp_path), strict=True
    ):
        node = value.producer()
        assert node is not None
        np.testing.assert_array_equal(array, expected[value_name(value)], err_msg=str(dict(node.attributes)))


def test_instructions_by_features() -> None:
    def chosen(target: str, dtype: str, channels: int):
        return lane_dot(host_code(load_target(target).host), dtype, channels)

    widest = chosen("x86-avx512vnni", "int8", 64)
    assert widest is not None and (widest.lanes, widest.length, widest.a_dtype) == (16, 4, "uint8")
    narrow = chosen("x86-avx512vnni", "int8", 24)
    assert narrow is not None and narrow.lanes == 8
    pairs = chosen("x86-avx2", "uint8", 64)
    assert pairs is not None and (pairs.lanes, pairs.length, pairs.a_dtype) == (8, 2, "int16")
    signed = chosen("arm-cpu", "uint8", 64)
    assert signed is not None and (signed.lanes, signed.length, signed.a_dtype) == (4, 4, "int8")
    assert chosen("x86-avx512vnni", "int8", 6) is None


def test_chunks_fit_the_first_cache() -> None:
    assert chunk_vectors(64, 10, 16) == 4  # a cache line of bytes
    assert chunk_vectors(960, 9, 16) == 4
    assert chunk_vectors(32, 400, 16) == 1
    assert chunk_vectors(48, 100, 16) == 3
