import numpy as np
import onnx
import pytest

from qcompiler.passes.legalize_signedness import LegalizeSignedness
from qcompiler.target_loader import load_target

UINT8 = onnx.TensorProto.UINT8


@pytest.fixture(scope="module")
def legalize():
    """For a target with int8 only."""
    return LegalizeSignedness(load_target("systolic-npu"))


@pytest.fixture
def unsigned(net):
    """uint8 in and out as TFLite converters leave it, with uint8 weights and movement on the integers."""
    n = net()
    scale, zero = n.const(0.05), n.const(131, np.uint8)
    x = n.input(1, 7, 9, 3, dtype=UINT8)
    moved = n.op("Transpose", x, perm=[0, 3, 1, 2])
    weights = n.const(n.rng.integers(0, 256, (4, 3, 3, 3)), np.uint8)
    weights = n.op("DequantizeLinear", weights, n.const(0.02), n.const(117, np.uint8))
    y = n.op("Relu", n.op("Conv", n.op("DequantizeLinear", moved, scale, zero), weights))
    # Without a zero point, QuantizeLinear makes uint8 with zero point 0.
    q = n.op("QuantizeLinear", y, n.const(0.13))
    flat = n.op("Reshape", q, n.const([1, -1], np.int64))
    real = n.op("DequantizeLinear", flat, n.const(0.13))
    out = n.op("QuantizeLinear", n.op("Sin", real), n.const(0.01), n.const(128, np.uint8))
    return n.model(flat, out, n.op("Transpose", out, perm=[1, 0]))


def test_structure(unsigned, apply, legalize):
    after = apply(unsigned, legalize)
    graph = after.model.graph
    assert [str(value.dtype) for value in (*graph.inputs, *graph.outputs)] == ["UINT8"] * 4
    inner = [value for node in graph for value in node.inputs if value is not None and str(value.dtype) == "UINT8"]
    # What is left of uint8: the model's input and the zero points of the boundaries.
    assert all(value.is_graph_input() or value.const_value is not None for value in inner)
    assert str(after.the("Conv").inputs[1].producer().inputs[0].dtype) == "INT8"


def test_numerics(unsigned, apply, legalize):
    assert apply(unsigned, legalize).largest_error() == 0


def test_fixpoint(unsigned, assert_settled, legalize):
    assert_settled(unsigned, legalize)


def test_a_target_with_uint8_keeps_it(unsigned, assert_refused):
    assert_refused(unsigned, LegalizeSignedness(load_target("arm-npu")))


def test_refusal(net, assert_refused, legalize):
    n = net()
    x = n.input(1, 8)
    q = n.op("QuantizeLinear", x, n.const(0.05), n.const(3, np.uint8))
    number = n.op("Cast", q, to=onnx.TensorProto.FLOAT)  # reads the integers as numbers
    assert_refused(n.model(n.op("DequantizeLinear", q, n.const(0.05), n.const(3, np.uint8)), number), legalize)
