import numpy as np
import pytest

from qcompiler.passes.normalize_matmul import NormalizeMatMul


@pytest.fixture
def layers(net):
    n = net()
    x = n.input(2, 3, 5)
    y = n.op("Add", n.weight(7), n.op("MatMul", x, n.weight(5, 7)))
    y = n.op("Relu", n.op("Reshape", y, n.const([6, 7], np.int64)))
    y = n.op("Add", n.op("MatMul", y, n.weight(7, 4)), n.weight(1, 4))
    y = n.op("Gemm", y, n.weight(4, 8), n.weight(1, 8), alpha=0.5, beta=2.0)
    z = n.op("Gemm", n.input(6, 3), n.weight(2, 6), n.const(0.25), transA=1, transB=1)
    return n.model(y, z, n.op("MatMul", n.input(5), n.weight(5, 2)))


@pytest.fixture
def quantized(net):
    n = net()
    y = n.op("MatMul", n.qdq(n.input(2, 3, 16)), n.int8_weight(16, 8, axis=1))
    y = n.op("Relu", n.op("Add", y, n.int32_bias(8)))
    return n.model(n.qdq(n.op("Add", n.op("MatMul", n.qdq(y), n.int8_weight(8, 4)), n.int32_bias(4))))


@pytest.fixture
def both_at_run_time(net):
    n = net()
    return n.model(n.op("Gemm", n.input(4, 5), n.input(6, 5), n.weight(4, 1), alpha=0.5, beta=3.0, transB=1))


def test_structure(layers, apply):
    after = apply(layers, NormalizeMatMul())
    gemms = [node for node in after.model.graph if node.op_type == "Gemm"]
    assert len(gemms) == 5 and not {"MatMul", "Add"} & set(after.op_types)
    for gemm in gemms:
        assert {name: attribute.value for name, attribute in gemm.attributes.items()} == {"transB": 1}
        assert len(gemm.inputs) == 2 or after.array(gemm.inputs[2]).shape == after.array(gemm.inputs[1]).shape[:1]


def test_quantized_weights_are_transposed_as_integers(quantized, apply):
    after = apply(quantized, NormalizeMatMul())
    weights = [node.inputs[1].producer() for node in after.model.graph if node.op_type == "Gemm"]
    assert [after.array(weight.inputs[0]).shape for weight in weights] == [(8, 16), (4, 8)]
    assert weights[0].attributes["axis"].as_int() == 0
    assert {"MatMul", "Add"}.isdisjoint(after.op_types)


def test_two_run_time_matrices_become_matmul(both_at_run_time, apply):
    assert apply(both_at_run_time, NormalizeMatMul()).op_types == ["Transpose", "MatMul", "Mul", "Mul", "Add"]


def test_numerics(layers, quantized, both_at_run_time, apply):
    assert apply(layers, NormalizeMatMul()).largest_error() < 1e-5
    assert apply(both_at_run_time, NormalizeMatMul()).largest_error() < 1e-5
    # One rounding step of the last QuantizeLinear may flip where sums are ordered otherwise.
    assert apply(quantized, NormalizeMatMul()).largest_error() < 0.02


def test_fixpoint(layers, quantized, both_at_run_time, assert_settled):
    for model in (layers, quantized, both_at_run_time):
        assert_settled(model, NormalizeMatMul())


def test_refusal(net, assert_refused):
    n = net()
    x = n.input(2, 4, 5)
    scores = n.op("MatMul", x, n.op("Transpose", x, perm=[0, 2, 1]))
    batched = n.op("MatMul", x, n.weight(2, 5, 3))
    left = n.op("MatMul", n.weight(3, 4), x)
    scaled = n.op("Gemm", n.input(3, 4), n.int8_weight(4, 4), alpha=0.3)
    full = n.op("Add", n.op("Gemm", n.input(3, 4), n.weight(2, 4), transB=1), n.weight(3, 2))
    assert_refused(n.model(scores, batched, left, scaled, full), NormalizeMatMul())
