from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.calibrate import calibrate
from qcompiler.graph import const_of, data_input, producer
from qcompiler.quant.formats import dequantize_array, quantize_array
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.types import QuantPlan
from qcompiler.target_loader import load_target

TEXT = (
    "g (float[1,3,16,12] x) => (boxes, scores)"
    "{ c = Conv<pads=[1,1,1,1]>(x, w1, b1)  r = Relu(c)  d = Conv<group=8, pads=[1,1,1,1]>(r, w2)  s = Add(d, r)"
    "  k = Clip(s, zero, six)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(k)  j = Concat<axis=1>(p, p)"
    "  boxes = Conv(j, w3)  g = Sigmoid(j)  m = Mul(j, g)  f = Reshape(m, shape)  h = Gemm<transB=1>(f, w4, b4)"
    "  e = Exp(h)  scores = Softmax(h) }"
)
CONSTANTS = {
    "w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 1, 3, 3), "w3": (4, 16, 1, 1), "w4": (5, 768), "b4": (5,),
    "zero": np.float32(0), "six": np.float32(6), "shape": np.array([1, 768]),
}  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return load_target("arm-npu")


@pytest.fixture
def quantized(parse, samples, target):
    model = parse(TEXT, CONSTANTS)
    made = plan(model, calibrate(model, samples(model, 8)), target)
    return model, made, quantize(model, made)


def _deep(model):
    return [node for node in model.graph if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]


def test_structure(quantized):
    model, made, after = quantized
    kinds = Counter(node.op_type for node in after.graph)
    assert kinds["QuantizeLinear"] == len(made.activations)
    # A pair for each activation, and the weights and biases of four products (w2 and w3 get a bias by correction).
    assert kinds["DequantizeLinear"] == len(made.activations) + 8
    assert [node.name for node in _deep(after)] == [node.name for node in model.graph if node.name != "e"]
    for node in _deep(after):
        for value in node.inputs[:1]:
            maker = value.producer()
            # Only the values inside a fused Relu or a lookup table reach an operator unquantized.
            assert maker.op_type == "DequantizeLinear" or value.name in ("c", "s", "g")


def test_weights_and_biases_are_stored_as_integers(quantized):
    _, made, after = quantized
    stored = {
        node.outputs[0].uses()[0].node.name: node
        for node in after.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0].const_value is not None and "bias" not in node.name
    }
    assert stored["d"].inputs[0].dtype in (ir.DataType.INT8, ir.DataType.INT32)
    dtypes = Counter(str(value.dtype) for value in after.graph.initializers.values())
    assert dtypes["INT32"] == 4 and dtypes["FLOAT"] == len(made.activations) + 8 + 2  # scales, and Clip's bounds
    weights = after.graph.initializers["w1_quantized"].const_value.numpy()
    assert weights.dtype == np.int8 and weights.min() >= -127 and np.abs(weights.astype(int)).max() == 127


def test_outputs_stay_close_and_keep_names(quantized, run, samples):
    model, _, after = quantized
    assert [value.name for value in after.graph.outputs] == ["boxes", "scores"]
    for feeds in samples(model, 4, seed=9):
        for exact, coarse in zip(run(model, feeds), run(after, feeds), strict=True):
            assert 10 * np.log10(np.square(exact).mean() / np.square(exact - coarse).mean()) > 28  # SQNR, dB


def test_onnxruntime_takes_it_with_all_optimizations(quantized, run, samples):
    model, _, after = quantized
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    for feeds in samples(model, 2, seed=10):
        for plain, optimized in zip(run(after, feeds), run(after, feeds, optimize=True), strict=True):
            np.testing.assert_allclose(optimized, plain, atol=0.1 * np.abs(plain).max())


def test_the_float_model_is_left_alone(quantized, parse):
    model, _, _ = quantized
    assert ir.to_proto(model).SerializeToString() == ir.to_proto(parse(TEXT, CONSTANTS)).SerializeToString()


def test_float_readers_of_a_float_value_keep_it(parse, samples, target):
    model = parse(
        "g (float[1,4,8,8] x) => (y, z) { z = LayerNormalization(x, s)  y = Conv(x, w) }",
        {"s": (8,), "w": (4, 4, 1, 1)},
    )
    after = quantize(model, plan(model, calibrate(model, samples(model, 2)), target))
    readers = {node.name: data_input(node) for node in _deep(after)}
    assert readers["z"].is_graph_input() and producer(readers["y"], "DequantizeLinear")


def test_a_shared_bias_is_rounded_for_each_reader(parse, samples, target):
    model = parse(
        "g (float[1,4,8,8] x) => (y) { c = Conv(x, w, b)  y = Conv(c, w, b) }", {"w": (4, 4, 1, 1), "b": (4,)}
    )
    ranges = calibrate(model, samples(model, 4, synthetic=True))  # without bias correction
    made = plan(model, ranges, target)
    after = quantize(model, made)
    bias = const_of(model.graph.initializers["b"])
    assert bias is not None and len(made.biases) == 2
    for node in _deep(after):
        dequantize = producer(data_input(node, 2), "DequantizeLinear")
        integers = const_of(data_input(dequantize)) if dequantize else None
        assert integers is not None
        fmt = made.biases[node.name or ""]
        np.testing.assert_array_equal(integers, quantize_array(bias, fmt))
        np.testing.assert_allclose(dequantize_array(integers, fmt), bias, atol=1e-3)


def test_int4_weights_are_stored_in_four_bits(parse, run, samples):
    target = load_target("arm-npu")
    weights = target.quantization.weights.model_copy(update={"dtypes": ("int4",)})
    spec = target.quantization.model_copy(update={"weights": weights})
    model = parse("g (float[1,4,8,8] x) => (y) { y = Conv(x, w) }", {"w": (6, 4, 3, 3)})
    made = plan(model, calibrate(model, samples(model, 2)), target.model_copy(update={"quantization": spec}))
    after = quantize(model, made)
    assert after.graph.initializers["w_quantized"].dtype == ir.DataType.INT4
    # onnxruntime's Conv reads them too.
    assert np.isfinite(run(after, samples(model, 1).arrays[0])[0]).all()


def test_an_empty_plan_changes_nothing(parse):
    model = parse(TEXT, CONSTANTS)
    after = quantize(model, QuantPlan({}, {}, {}))
    assert [node.op_type for node in after.graph] == [node.op_type for node in model.graph if node.name != "e"]
