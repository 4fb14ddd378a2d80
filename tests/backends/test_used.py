"""The integers that tensors can hold."""

import ml_dtypes
import numpy as np
import pytest

from qcompiler.integer import ops
from qcompiler.integer.facts import facts_of_integer
from qcompiler.integer.used import four_bit_type, used
from qcompiler.target import Match
from qcompiler.target_loader import load_target


def clamped(bench, low: int, high: int, dtype: str = "int8", shape: tuple[int, ...] = (1, 4, 4, 8)):
    one, none = bench.constant(np.ones(1, np.float32)), bench.constant(np.zeros(1, np.int32))
    bench.integer(ops.QRequantize(0, 0, low, high, "float32"), [bench.random(shape, dtype), one, none], shape, dtype)
    return bench.outputs[-1]


@pytest.mark.parametrize(
    ("low", "high", "dtype", "name"),
    [(-8, 7, "int8", "int4"), (0, 15, "int8", "uint4"), (0, 15, "uint8", "uint4"), (0, 7, "int8", "int4"),
     (-8, 8, "int8", None), (1, 16, "uint8", None), (-128, 127, "int8", None)],
)  # fmt: skip
def test_clamps(workbench, low: int, high: int, dtype: str, name: str | None) -> None:
    value = clamped(workbench(seed=1), low, high, dtype)
    assert used(value) == (low, high)
    assert four_bit_type(value) == name


def test_inputs_and_constants(workbench) -> None:
    bench = workbench(seed=2)
    assert used(bench.random((2, 3), "uint8")) == (0, 255)
    assert used(bench.constant(np.array([3, -7, 5], np.int8))) == (-7, 5)


def test_movement_and_tables(workbench) -> None:
    bench, eight = workbench(seed=3), np.dtype(np.int8)
    narrow, wide = clamped(bench, -8, 7), clamped(bench, 0, 100)
    bench.standard("Transpose", [narrow], [((1, 8, 4, 4), eight)], {"perm": [0, 3, 1, 2]})
    assert used(bench.outputs[-1]) == (-8, 7)
    bench.standard("Concat", [narrow, wide], [((1, 4, 4, 16), eight)], {"axis": 3})
    assert used(bench.outputs[-1]) == (-8, 100)
    limits = [bench.constant(np.array(number, np.int8)) for number in (2, 120)]
    bench.standard("Clip", [wide, *limits], [((1, 4, 4, 8), eight)])
    assert used(bench.outputs[-1]) == (2, 100)
    table = bench.constant(np.arange(256).astype(np.int64).clip(3, 9).astype(np.int8))
    bench.integer(ops.QLookup("Tanh"), [wide, table], (1, 4, 4, 8), "int8")
    assert used(bench.outputs[-1]) == (3, 9)


@pytest.mark.parametrize(
    ("low", "weights", "target", "precision", "engine"),
    [(-8, "int4", "cuda-sm80", "int4*int4", "tensor"), (0, "int4", "cuda-gpu", "uint4*int4", "tensor"),
     (-8, "int4", "cuda-sm90", "int8*int4", "tensor"), (-8, "int8", "cuda-sm80", "int8*int8", "tensor"),
     (-9, "int4", "cuda-sm80", "int8*int4", "tensor"), (-8, "int4", "opencl-gpu", "int8*int4", "lanes")],
)  # fmt: skip
def test_precision_of_products(workbench, low: int, weights: str, target: str, precision: str, engine: str) -> None:
    """Targets that multiply numbers of four bits do; others take the same operator as before."""
    bench = workbench(seed=4)
    x = clamped(bench, low, low + 15)
    array = bench.rng.integers(-7, 8, (16, 1, 1, 8)).astype(ml_dtypes.int4 if weights == "int4" else np.int8)
    op = ops.QConv((1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, 0, 0, 0, -128, 127, "float32")
    numbers = (array, np.zeros(16, np.int32), np.ones(16, np.float32), np.zeros(16, np.int32))
    bench.integer(op, [x, *map(bench.constant, numbers)], (1, 4, 4, 16), "int8")
    facts = facts_of_integer(bench.nodes[-1])
    match = load_target(target).match(facts)
    assert isinstance(match, Match) and match.engine == engine
    assert facts.among(match.rule.precisions) == precision
