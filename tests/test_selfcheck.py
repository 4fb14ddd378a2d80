from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qcompiler.selfcheck import SAMPLES, Arrays, doubts, self_check, sqnr


@pytest.fixture
def doubling(tmp_path: Path) -> Path:
    """y = x + x, [1,4]."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    path = tmp_path / "double.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class Scaled:
    def __init__(self, factor: float, calls: list[int]) -> None:
        self.factor, self.calls = factor, calls

    def __call__(self, inputs: Arrays) -> Arrays:
        self.calls.append(1)
        return {"y": inputs["x"] * np.float32(self.factor)}


def _samples(count: int) -> list[Arrays]:
    rng = np.random.default_rng()
    return [{"x": rng.normal(size=(1, 4)).astype(np.float32)} for _ in range(count)]


def test_identical_outputs(doubling: Path) -> None:
    check = self_check(doubling, Scaled(2, []), _samples(3))
    assert check.samples == 3
    assert check.outputs[0].sqnr is None and check.outputs[0].top1_agreement == 1.0


def test_noise_and_disagreement_are_seen(doubling: Path) -> None:
    calls: list[int] = []
    check = self_check(doubling, Scaled(-2, calls), _samples(SAMPLES + 9))
    assert len(calls) == check.samples == SAMPLES
    # y against -y: the noise has twice the amplitude.
    assert check.outputs[0].sqnr == pytest.approx(-20 * np.log10(2))
    assert check.outputs[0].top1_agreement == 0.0
    (warning,) = doubts(check, "double.onnx")
    assert "'y'" in warning and "-6.0 dB" in warning and "qcompile debug double.onnx" in warning


def test_small_noise_is_no_doubt(doubling: Path) -> None:
    for factor in (2, 2.5):
        assert doubts(self_check(doubling, Scaled(factor, []), _samples(4)), "double.onnx") == ()


def test_sqnr_of_an_output_that_should_be_zero() -> None:
    assert sqnr(0.0, 1.0) == -np.inf
    assert sqnr(100.0, 1.0) == pytest.approx(20)
