"""Rounding to 16-bit floats on the CPU, bit for bit."""

import numpy as np
import pytest

from qcompiler.integer import ops
from qcompiler.integer.reference import execute
from qcompiler.target_loader import load_target


@pytest.mark.parametrize("target", ["x86-cpu", "x86-plain"])
def test_rounding_is_exact(workbench, run_on_cpu, tmp_path, target: str) -> None:
    """Ties, numbers below the normal ones, overflow, infinities, both signs."""
    rng = np.random.default_rng(9)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    between = (halves[:-1] + halves[1:]) / 2
    spread = (rng.standard_normal(4000) * np.exp2(rng.uniform(-40, 30, 4000))).astype(np.float32)
    edges = np.array([65503, 65519.996, 65520, 65536, 1e30, np.inf, 0, 2**-24, 2**-25, 1.5 * 2**-25, 3e38], np.float32)
    values = np.concatenate([halves[::7], between[::5], spread, edges])
    values = np.concatenate([values, -values, np.nextafter(between[::9], np.float32(0))]).astype(np.float32)
    bench = workbench(1)
    for half in ("float16", "bfloat16"):
        bench.integer(ops.QRoundHalf(half), [bench.input(values)], values.shape, "float32")
    model = bench.model()
    expected = execute(model, bench.feeds)
    got = run_on_cpu(model, load_target(target), bench.feeds, tmp_path)
    for value, array in zip(model.graph.outputs, got, strict=True):
        np.testing.assert_array_equal(array, expected[value.name or ""])
