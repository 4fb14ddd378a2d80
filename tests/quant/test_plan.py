import math

import numpy as np
import pytest

from qcompiler.calibrate import calibrate
from qcompiler.errors import QCompilerError
from qcompiler.quant.masks import MARGIN
from qcompiler.quant.plan import ON_REQUEST, SUM_REASON, plan
from qcompiler.quant.types import Range, Ranges
from qcompiler.target_loader import load_target

CONV = {"w": (4, 4, 1, 1), "bias": (4,)}


@pytest.fixture(scope="module")
def npu():
    return load_target("arm-npu")


@pytest.fixture(scope="module")
def cpu():
    return load_target("x86-cpu")


def _with(target, **quantization):
    """The target with other quantization properties."""
    spec = target.quantization
    activations = spec.activations.model_copy(
        update={key: quantization.pop(key) for key in ("dtypes", "symmetric") if key in quantization}
    )
    weights = spec.weights.model_copy(update=quantization.pop("weights", {}))
    return target.model_copy(
        update={
            "quantization": spec.model_copy(update={"activations": activations, "weights": weights, **quantization})
        }
    )


@pytest.fixture
def make(parse, samples):
    """Parse, calibrate and plan."""

    def run(text, constants, target, **kwargs):
        model = parse(text, constants)
        return plan(model, calibrate(model, samples(model, 4), **kwargs), target)

    return run


def _one(fmt):
    return fmt.dtype, float(fmt.scale), int(fmt.zero_point)


def same_format(formats):
    return len({_one(fmt) for fmt in formats}) == 1


def test_fused_values_and_outputs(make, npu):
    made = make(
        "g (float[1,4,8,8] x) => (float[1,4,8,8] y)"
        "{ c = Conv(x, w, bias)  r = Relu(c)  s = Conv(r, w)  t = Add(s, r)  u = Relu(t)  y = Conv(u, w) }",
        CONV,
        npu,
    )
    assert set(made.activations) == {"x", "r", "s", "u", "y"}
    assert not made.float_nodes
    assert set(made.weights) == {"w"} and set(made.biases) == {"c", "s", "y"}
    assert made.weights["w"].axis == 0 and made.weights["w"].dtype == "int8"
    # After a Relu the whole of int8 is there for what is positive.
    assert int(made.activations["r"].zero_point) == -128
    expected = np.float32(made.activations["x"].scale) * made.weights["w"].scale
    np.testing.assert_array_equal(made.biases["c"].scale, expected)


def test_formats_follow_the_target(make, npu, cpu):
    text = "g (float[1,4,8,8] x) => (float[1,4,8,8] y) { y = Conv(x, w) }"
    assert make(text, CONV, cpu).activations["x"].dtype == "uint8"
    symmetric = make(text, CONV, _with(npu, dtypes=("int8",), symmetric=True), symmetric=True)
    assert all(int(fmt.zero_point) == 0 for fmt in symmetric.activations.values())
    per_tensor = make(text, CONV, _with(npu, weights={"per_channel": False}))
    assert per_tensor.weights["w"].axis is None and per_tensor.weights["w"].scale.shape == ()
    int4 = make(text, CONV, _with(npu, weights={"dtypes": ("int4",)}))
    assert int4.weights["w"].dtype == "int4"
    shifting = make(text, CONV, _with(npu, requantize="shift"))
    for fmt in (*shifting.activations.values(), *shifting.weights.values(), *shifting.biases.values()):
        np.testing.assert_array_equal(np.log2(fmt.scale), np.rint(np.log2(fmt.scale)))


def test_a_target_that_shifts_averages_only_powers_of_two(make, npu):
    text = (
        "g (float[1,4,12,12] x) => (y) { c = Conv(x, w)  p = AveragePool<kernel_shape=[3,3], strides=[3,3]>(c)"
        "  d = Conv(p, w)  q = AveragePool<kernel_shape=[2,2], strides=[2,2]>(d)  y = Conv(q, w) }"
    )
    made = make(text, CONV, _with(npu, requantize="shift"))
    assert set(made.float_nodes) == {"p"} and "powers of two" in made.float_nodes["p"]


def test_movement_takes_its_inputs_format(make, npu):
    made = make(
        "g (float[1,4,8,8] x) => (y) { c = Conv(x, w)  p = MaxPool<kernel_shape=[2,2]>(c)"
        "  t = Transpose<perm=[0,1,3,2]>(p)  l, r = Split<axis=1, num_outputs=2>(t)  y = Concat<axis=1>(r, l) }",
        CONV,
        npu,
    )
    assert same_format([made.activations[name] for name in ("c", "p", "t", "l", "r", "y")])


def _planned(parse, text, constants, ranges, target):
    by_name = {name: Range(low, high, low, high) for name, (low, high) in ranges.items()}
    return plan(parse(text, constants), Ranges(by_name, "minmax", 1, False), target)


CONCAT = (
    "g (float[1,4,8,8] x) => (z) {{ a = Conv(x, w)  b = Conv(x, w)  y = Concat<axis=1>(a, b)  z = Conv(y, wide) {} }}"
)
WIDE = CONV | {"wide": (4, 8, 1, 1)}


def test_concat_shares_one_range_where_it_is_all_that_reads(parse, npu):
    ranges = {"x": (-1, 1), "a": (-1, 1), "b": (-8, 4), "z": (-1, 1)}
    made = _planned(parse, CONCAT.format(""), WIDE, ranges, npu)
    assert same_format([made.activations[name] for name in ("a", "b", "y")])
    assert float(made.activations["a"].scale) == pytest.approx(12 / 255)


@pytest.mark.parametrize(("high", "shared"), [(0.7, True), (0.3, False)])
def test_concat_leaves_a_much_narrower_tensor_that_others_read_too(parse, npu, high, shared):
    ranges = {"x": (-1, 1), "a": (0, high), "b": (0, 1), "z": (-1, 1), "q": (-1, 1)}
    made = _planned(parse, CONCAT.format(" q = Conv(a, w) "), WIDE, ranges, npu)
    assert same_format([made.activations[name] for name in ("a", "y")]) == shared
    assert same_format([made.activations[name] for name in ("b", "y")])


def test_post_processing_stays_in_float(make, npu):
    made = make(
        "g (float[1,4,8,8] x) => (boxes, float[1,4,8,8] s)"
        "{ c = Conv(x, w)  t = Transpose<perm=[0,2,3,1]>(c)  e = Exp(t)  m = Mul(e, per)  boxes = Concat<axis=3>(m, t)"
        "  d = Conv(x, w)  s = Sigmoid(d) }",
        CONV | {"per": (4,)},
        npu,
    )
    # The Transpose moves integers; the Sigmoid is an activation, which the target looks up.
    assert set(made.float_nodes) == {"e", "m", "boxes"}
    assert "post-processing" in made.float_nodes["e"]
    assert _one(made.activations["s"]) == ("int8", 1 / 256, -128)


def test_arithmetic_before_the_last_convolution_is_quantized(make, npu):
    made = make(
        "g (float[1,4,8,8] x) => (y) { n = Mul(x, per)  c = Conv(n, w)  a = Add(c, n)  m = Mul(a, c)  y = Conv(m, w) }",
        CONV | {"per": (1, 4, 1, 1)},
        npu,
    )
    assert not made.float_nodes
    assert made.weights["per"].axis is None  # an operand, not a weight
    assert set(made.activations) == {"x", "n", "c", "a", "m", "y"}


def test_a_last_softmax_goes_where_the_target_takes_it(make, npu, cpu):
    text = "g (float[1,8] x) => (float[1,5] y) { z = Gemm(x, w)  y = Softmax(z) }"
    made = make(text, {"w": (8, 5)}, npu)
    assert _one(made.activations["y"]) == ("int8", 1 / 256, -128)
    on_cpu = make(text, {"w": (8, 5)}, cpu)
    assert set(on_cpu.float_nodes) == {"y"} and "y" not in on_cpu.activations


@pytest.mark.parametrize(("high", "scale"), [(0.8, 1 / 128), (0.1, 0.2 / 255)])
def test_a_tanh_that_hardly_moves_keeps_its_own_range(parse, npu, high, scale):
    text = "g (float[1,4,8,8] x) => (y) { c = Conv(x, w)  t = Tanh(c)  y = Conv(t, w) }"
    made = _planned(parse, text, CONV, {"x": (-1, 1), "c": (-1, 1), "t": (-high, high), "y": (-1, 1)}, npu)
    assert float(made.activations["t"].scale) == pytest.approx(scale)


def test_uneven_concat_at_the_end_stays_in_float(parse, npu):
    text = "g (float[1,4,8,8] x) => (y) { a = Conv(x, w)  b = Conv(x, w)  y = Concat<axis=1>(a, b) }"
    uneven = _planned(parse, text, CONV, {"x": (-1, 1), "a": (-1, 1), "b": (-3, 2)}, npu)
    assert "different ranges" in uneven.float_nodes["y"]
    even = _planned(parse, text, CONV, {"x": (-1, 1), "a": (-1, 1), "b": (-1, 0.5)}, npu)
    assert not even.float_nodes and same_format([even.activations[name] for name in ("a", "b", "y")])


def test_operators_without_an_integer_form_are_named(make, npu):
    made = make(
        "g (float[1,4,8,8] x) => (y)"
        "{ c = Conv(x, w)  n = LayerNormalization(c, s)  r = Reshape(n, shape)  y = Conv(r, w) }",
        CONV | {"s": (8,), "shape": np.array([1, 4, 8, 8])},
        npu,
    )
    assert set(made.float_nodes) == {"n"} and "LayerNormalization" in made.float_nodes["n"]
    assert {"c", "n", "r", "y"} <= set(made.activations)


def test_residual_sums_before_normalization_stay_in_float(make, npu):
    """Two blocks of a transformer: what the branches add is quantized, the stream they add to is not."""
    made = make(
        "g (float[1,4,8,8] x) => (y)"
        "{ a = Conv(x, w)  b = Add(x, a)  m = LayerNormalization(b, s)  c = Conv(m, w)  d = Add(b, c)"
        "  n = LayerNormalization(d, s)  e = Conv(n, w)  f = Conv(m, w)  y = Add(e, f) }",
        CONV | {"s": (8,)},
        npu,
    )
    assert made.float_nodes["b"] == made.float_nodes["d"] == SUM_REASON
    assert {"a", "c", "m", "n", "e", "f"} <= set(made.activations)
    assert not {"b", "d"} & set(made.activations)


def test_islands_between_float_operators_stay_in_float(make, npu):
    made = make(
        "g (float[1,4,8,8] x) => (y) { f = Sin(x)  i = IsNaN(f)  k = Where(i, zero, f)  a = Add(k, k)"
        "  j = IsNaN(a)  l = Where(j, zero, a)  c = Conv(l, w)  y = Relu(c) }",
        CONV | {"zero": np.float32(0)},
        npu,
    )
    assert {"f", "a"} <= set(made.float_nodes)
    assert "connected" in made.float_nodes["a"]


def test_infinities_stay_in_float(parse, npu):
    text = "g (float[1,4,8,8] x) => (z) { c = Conv(x, w)  y = Add(c, c)  z = Conv(y, w) }"
    made = _planned(parse, text, CONV, {"x": (-1, 1), "c": (-1, 1), "y": (-math.inf, 1), "z": (-1, 1)}, npu)
    assert set(made.float_nodes) == {"y", "z"} and "infinities" in made.float_nodes["y"]


def test_a_constant_mask_of_infinities_saturates(make, npu):
    """Causal attention as exporters write it; the mask's format is finite, below all scores."""
    made = make(
        "g (float[1,4,8,8] x) => (y) { c = Conv(x, w)  m = Add(c, mask)  s = Softmax(m)  y = Conv(s, w) }",
        CONV | {"mask": np.triu(np.full((8, 8), -np.inf, np.float32), 1)},
        npu,
    )
    assert not made.float_nodes
    low = made.activations["m"].scale * (-128.0 - made.activations["m"].zero_point)
    assert -1000 < low < -MARGIN


def test_a_bias_shared_by_two_convolutions_has_two_formats(parse, npu):
    text = "g (float[1,4,8,8] x) => (y) { c = Conv(x, w, bias)  y = Conv(c, w, bias) }"
    made = _planned(parse, text, CONV, {"x": (-1, 1), "c": (-9, 9), "y": (-1, 1)}, npu)
    np.testing.assert_allclose(made.biases["y"].scale, 9 * made.biases["c"].scale, rtol=1e-6)


def test_models_without_products_are_quantized_too(make, npu):
    made = make("g (float[1,4,8,8] x) => (y) { a = Add(x, x)  y = Relu(a) }", {}, npu)
    assert not made.float_nodes and set(made.activations) == {"x", "y"}


def test_named_layers_stay_in_float_whole(make, npu, parse, samples):
    text = (
        "g (float[1,4,8,8] x) => (float[1,4,8,8] y)"
        "{ c = Conv(x, w, bias)  r = Relu(c)  s = Conv(r, w)  t = Relu(s)  y = Conv(t, w) }"
    )
    model = parse(text, CONV)
    names = {node.outputs[0].name: node.name for node in model.graph}
    ranges = calibrate(model, samples(model, 4))
    together = {names["s"], names["t"]}
    for wanted in (names["s"], names["t"], f"{names['s']} + {names['t']}"):
        made = plan(model, ranges, npu, [wanted])
        assert made.float_nodes == dict.fromkeys(together, ON_REQUEST)
        assert set(made.biases) == {names["c"], names["y"]}
    # A table of several nodes is one operator too.
    gate = parse("g (float[1,4] x) => (float[1,4] y) { s = Sigmoid(x)  y = Mul(x, s) }", {})
    first, last = gate.graph
    assert set(plan(gate, calibrate(gate, samples(gate, 4)), npu, [first.name]).float_nodes) == {first.name, last.name}


def test_an_unknown_name_suggests_the_nearest(npu, parse, samples):
    model = parse("g (float[1,4,8,8] x) => (float[1,4,8,8] y) { y = Conv(x, w) }", CONV)
    (node,) = model.graph
    node.name = "backbone/conv1"
    with pytest.raises(QCompilerError, match=r"--float backbone/conv_1: .*did you mean 'backbone/conv1'\?"):
        plan(model, calibrate(model, samples(model, 4)), npu, ["backbone/conv_1"])
