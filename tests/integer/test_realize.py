"""Each pattern of a QDQ graph becomes the integer operator meant for it, and computes what onnxruntime does."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph import const_of, is_op
from qcompiler.integer import ops
from qcompiler.quant.arithmetic import REQUANTIZE_VARIANTS

# The fixtures `qdq` and `run` make a Qdq and a Realized of tests/integer/conftest.py.

CONVS = [
    # weights, attributes
    ((6, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    ((6, 4, 3, 2), {"strides": [2, 1], "pads": [0, 1, 1, 0], "dilations": [1, 2]}),
    ((4, 1, 3, 3), {"group": 4, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((8, 2, 1, 1), {"group": 2}),
    ((5, 4, 2, 2), {"auto_pad": "SAME_LOWER"}),
]


@pytest.mark.parametrize(("weights", "attributes"), CONVS)
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_conv(qdq, run, weights, attributes, dtype) -> None:
    g = qdq(1, dtype)
    w = g.weight(*weights, axis=0)
    y = g.op("Conv", g.input(1, 4, 9, 8), w, g.const(g.rng.normal(0, 0.2, weights[0])), **attributes)
    result = run(g.model(g.quantize(y, 0.04)))
    assert result.op_types == ["QConv"] and result.is_integer
    result.check()


def test_conv_keeps_names_and_wraps_in_transposes(qdq, run) -> None:
    g = qdq()
    x = g.input(1, 4, 6, 6)
    out = g.quantize(g.op("Conv", x, g.weight(3, 4, 1, 1)))
    result = run(g.model(out))
    assert [node.op_type for node in result.model.graph] == ["QuantizeLinear", "Transpose", "QConv", "Transpose"]
    conv = result.the("QConv")
    assert conv.outputs[0].name == f"{out}.nhwc"
    assert result.model.graph.outputs[0].name == out
    assert tuple(conv.outputs[0].shape) == (1, 6, 6, 3) and tuple(conv.inputs[1].shape) == (3, 1, 1, 4)


def test_asymmetric_weights_of_one_zero_point(qdq, run) -> None:
    g = qdq(2, "uint8")
    y = g.op("Conv", g.input(1, 3, 7, 7), g.weight(4, 3, 3, 3, dtype="uint8", zero=120))
    result = run(g.model(g.quantize(y, 0.1)))
    assert ops.QConv.of(result.the("QConv")).w_zero_point == 120
    result.check()


def test_one_dimensional_conv(qdq, run) -> None:
    g = qdq(3)
    y = g.op("Conv", g.input(1, 4, 11), g.weight(5, 4, 3, axis=0), strides=[2], pads=[1, 0])
    result = run(g.model(g.quantize(y)))
    assert ops.QConv.of(result.the("QConv")).kernel_shape == (1, 3)
    result.check()


@pytest.mark.parametrize("scale", [None, 0.0007])
def test_int32_bias(qdq, run, scale) -> None:
    """A bias in accumulator units is used as it is; in others it is rounded to them."""
    g = qdq(4)
    array, w_scale = g.rng.integers(-127, 128, (5, 3, 3, 3)), np.float32(0.01)
    w = g.op("DequantizeLinear", g.const(array, "int8"), g.const(w_scale), g.const(0, "int8"))
    b = g.rng.integers(-3000, 3000, 5)
    units = np.float32(0.05) * w_scale if scale is None else np.float32(scale)
    bias = g.op("DequantizeLinear", g.const(b, "int32"), g.const(units))
    result = run(g.model(g.quantize(g.op("Conv", g.input(1, 3, 6, 6), w, bias), 0.1)))
    stored = const_of(result.the("QConv").inputs[2])
    want = b if scale is None else np.rint(b * np.float64(units) / (np.float64(np.float32(0.05)) * w_scale))
    np.testing.assert_array_equal(stored, want)
    result.check()


@pytest.mark.parametrize(
    ("activation", "bounds"), [("Relu", ()), ("Clip", (-0.4, 3.1)), ("Clip", (0.0, 6.0)), ("Clip", (None, 2.0))]
)
def test_activation_becomes_the_clamp(qdq, run, activation, bounds) -> None:
    g = qdq(5)
    y = g.op("Conv", g.input(1, 4, 8, 8), g.weight(6, 4, 3, 3))
    limits = ["" if bound is None else g.const(bound) for bound in bounds]
    result = run(g.model(g.quantize(g.op(activation, y, *limits), 0.05, 10)))
    assert result.op_types == ["QConv"] and result.is_integer
    conv = ops.QConv.of(result.the("QConv"))
    low, high = bounds or (0.0, None)
    assert conv.clamp_min == (-128 if low is None else 10 + round(low / 0.05))
    assert conv.clamp_max == (127 if high is None else min(127, 10 + round(high / 0.05)))
    result.check()


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [
        ((4, 3, 2, 2), {"strides": [2, 2]}),
        ((4, 2, 3, 3), {"strides": [2, 1], "pads": [1, 0, 1, 1], "group": 2, "output_padding": [1, 0]}),
        ((4, 5, 3, 3), {"strides": [2, 2], "output_shape": [13, 11]}),
        ((4, 5, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ],
)
def test_conv_transpose(qdq, run, shape, attributes) -> None:
    g = qdq(6)
    per_channel = g.weight(*shape, axis=1)
    result = run(g.model(g.quantize(g.op("ConvTranspose", g.input(1, 4, 6, 5), per_channel, **attributes), 0.04)))
    assert result.op_types == ["QConvTranspose"]
    result.check()


def test_gemm_forms(qdq, run) -> None:
    for trans_b, alpha, beta in ((0, 1.0, 1.0), (1, 0.5, 2.0)):
        g = qdq(7)
        w = g.weight(9, 20, axis=0) if trans_b else g.weight(20, 9, axis=1)
        bias = g.const(g.rng.normal(0, 1, (1, 9)))
        y = g.op("Gemm", g.input(3, 20), w, bias, transB=trans_b, alpha=alpha, beta=beta)
        result = run(g.model(g.quantize(y, 0.03)))
        assert result.op_types == ["QGemm"] and result.is_integer
        result.check(differing=0.05)


def test_matmul_forms(qdq, run) -> None:
    g = qdq(8)
    x = g.input(2, 5, 12)
    plain = g.op("MatMul", x, g.weight(12, 7, axis=1))
    biased = g.op("Add", g.op("MatMul", x, g.op("Transpose", g.weight(6, 12), perm=[1, 0])), g.const(np.arange(6) / 10))
    both = g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1]))
    outputs = [g.quantize(y, 0.05) for y in (plain, g.op("Relu", biased), both)]
    result = run(g.model(*outputs))
    assert result.op_types == ["QGemm", "QGemm", "QMatMul"] and result.is_integer
    result.check(differing=0.05)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_binary_operators(qdq, run, op_type, dtype) -> None:
    g = qdq(9, dtype)
    a, b = g.input(1, 4, 5, 6), g.input(1, 4, 1, 1, scale=0.0217)
    y = g.op("Relu", g.op(op_type, a, b))
    per_channel = g.op(op_type, a, g.const(g.rng.normal(0, 1, (4, 1, 1))))
    quantized = g.op(op_type, g.weight(1, 4, 5, 6), a)
    result = run(g.model(g.quantize(y, 0.0613), g.quantize(per_channel, 0.0613), g.quantize(quantized, 0.0613)))
    expected = {"Add": "QAdd", "Sub": "QAdd", "Mul": "QMul"}[op_type]
    assert result.op_types == [expected] * 3 and result.is_integer
    (want, got), (want_channel, got_channel), (want_constant, got_constant) = result.outputs()
    assert np.abs(want.astype(int) - got).max() <= 1 and np.mean(want != got) < 0.02
    # Constants that were float gain a rounding of their own.
    assert np.abs(want_channel.astype(int) - got_channel).max() <= 2
    assert np.abs(want_constant.astype(int) - got_constant).max() <= 1


def test_division_by_constants_multiplies(qdq, run) -> None:
    g = qdq(10)
    result = run(g.model(g.quantize(g.op("Div", g.input(1, 3, 4, 4), g.const([[[2.0]], [[4.0]], [[5.0]]])), 0.02)))
    assert result.op_types == ["QMul"]
    ((want, got),) = result.outputs()
    assert np.abs(want.astype(int) - got).max() <= 1


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ("AveragePool", {"kernel_shape": [3, 2], "pads": [1, 1, 1, 0], "count_include_pad": 1}),
        ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
        ("GlobalAveragePool", {}),
        ("MaxPool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2], "ceil_mode": 1}),
        ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 2]}),
        ("GlobalMaxPool", {}),
    ],
)
@pytest.mark.parametrize("scale", [0.05, 0.0717])
def test_pools(qdq, run, op_type, attributes, scale) -> None:
    g = qdq(11)
    y = g.op("Relu", g.op(op_type, g.input(1, 12, 7, 9), **attributes))
    result = run(g.model(g.quantize(y, scale)))
    name = "QMaxPool" if "Max" in op_type else "QAveragePool"
    assert name in result.op_types and result.is_integer
    assert result.op_types == ([name] if scale == 0.05 or name == "QAveragePool" else [name, "QRequantize"])
    result.check(differing=0.1)


def test_counted_padding_with_overhang_stays_float(qdq, run) -> None:
    g = qdq(11)
    y = g.op(
        "AveragePool", g.input(1, 2, 8, 8), kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], ceil_mode=1,
        count_include_pad=1,
    )  # fmt: skip
    result = run(g.model(g.quantize(y)))
    assert result.op_types == ["AveragePool"]
    result.check(exact=True)


@pytest.mark.parametrize("keepdims", [0, 1])
def test_reduce_mean(qdq, run, keepdims) -> None:
    g = qdq(12)
    y = g.op("ReduceMean", g.input(1, 30, 5, 6), g.const([-1, 2], "int64"), keepdims=keepdims)
    result = run(g.model(g.quantize(y, 0.01)))
    assert result.op_types == ["QReduceMean"]
    result.check(differing=0.1)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS[:3])
def test_softmax(qdq, run, axis, variant) -> None:
    g = qdq(13)
    y = g.op("Softmax", g.input(1, 12, 3, 7), axis=axis)
    result = run(g.model(g.quantize(y, 1 / 256, -128)), variant)
    assert result.op_types == ["QSoftmax"] and result.is_integer
    result.check(differing=0.02)


MODES = ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"]


@pytest.mark.parametrize("coordinates", MODES)
@pytest.mark.parametrize("scales", [(2.0, 2.0), (1.5, 0.7), (0.5, 3.0)])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize(qdq, run, coordinates, scales, mode) -> None:
    g = qdq(14)
    rounding = {"nearest_mode": "floor"} if coordinates == "asymmetric" else {}
    y = g.op(
        "Resize", g.input(1, 3, 6, 7), "", g.const([1, 1, *scales]), mode=mode,
        coordinate_transformation_mode=coordinates, **rounding,
    )  # fmt: skip
    result = run(g.model(g.quantize(y)))
    assert result.op_types == [{"nearest": "QResizeNearest", "linear": "QResizeLinear"}[mode]] and result.is_integer
    if mode == "nearest":
        result.check(exact=True)
    else:
        # Ties are common where weights are halves, and float breaks them to even.
        result.check(differing=0.3)


def test_resize_to_sizes_and_another_format(qdq, run) -> None:
    g = qdq(15)
    x = g.input(1, 3, 6, 7)
    sizes = g.const([1, 3, 13, 5], "int64")
    y = g.op("Resize", x, "", "", sizes, mode="nearest", coordinate_transformation_mode="half_pixel")
    result = run(g.model(g.quantize(y, 0.0837)))
    assert result.op_types == ["QRequantize", "QResizeNearest"]
    result.check()


def test_refused_resizes_stay_float(qdq, run) -> None:
    g = qdq(16)
    x = g.input(1, 2, 4, 4)
    cubic = g.op("Resize", x, "", g.const([1, 1, 2, 2]), mode="cubic")
    channels = g.op("Resize", x, "", g.const([1, 2, 1, 1]), mode="nearest")
    result = run(g.model(g.quantize(cubic), g.quantize(channels)))
    assert result.op_types == ["Resize", "Resize"]
    result.check(exact=True)


def swish(g, x: str) -> str:
    return g.op("Mul", x, g.op("Sigmoid", x))


def hard_swish(g, x: str) -> str:
    shifted = g.op("Clip", g.op("Add", x, g.const(3.0)), g.const(0.0), g.const(6.0))
    return g.op("Div", g.op("Mul", x, shifted), g.const([6.0]))


def gelu(g, x: str) -> str:
    inner = g.op("Add", g.op("Erf", g.op("Div", x, g.const(2**0.5))), g.const(1.0))
    return g.op("Mul", g.op("Mul", x, inner), g.const(0.5))


FUNCTIONS: dict[str, Callable[..., str]] = {
    "Sigmoid": lambda g, x: g.op("Sigmoid", x),
    "LeakyRelu": lambda g, x: g.op("LeakyRelu", x, alpha=0.2),
    "Sigmoid+Mul": swish,
    "Add+Clip+Mul+Div": hard_swish,
    "Div+Erf+Add+Mul+Mul": gelu,
    "Sqrt": lambda g, x: g.op("Sqrt", x),
    "Pow": lambda g, x: g.op("Pow", x, g.const(2.0)),
    "Add": lambda g, x: g.op("Add", x, x),
    "Mul": lambda g, x: g.op("Mul", g.op("DequantizeLinear", g.const(7, "int8"), g.const(0.1)), x),
    "PRelu": lambda g, x: g.op("PRelu", x, g.const([0.3])),
    "Greater+Where": lambda g, x: g.op("Where", g.op("Greater", x, g.const(0.5)), x, g.const(-1.0)),
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize(("dtype", "out"), [("int8", "int8"), ("uint8", "uint8"), ("int8", "uint8")])
def test_lookup_equals_onnxruntime(qdq, run, name, dtype, out) -> None:
    g = qdq(17, dtype)
    y = FUNCTIONS[name](g, g.input(1, 5, 30, 10, scale=0.04))
    result = run(g.model(g.quantize(y, 0.03, dtype=out)))
    assert result.op_types == ["QLookup"] and result.is_integer
    assert ops.QLookup.of(result.the("QLookup")).function == name
    if name == "Sqrt":
        # Roots of negatives have no integer; compare where there is a root.
        ((want, got),) = result.outputs()
        zero = 3 if out == "int8" else 131
        np.testing.assert_array_equal(got[got != zero], want[got != zero])
        assert np.mean(got != zero) > 0.3
    else:
        result.check(exact=True)


def test_per_channel_prelu_stays_float(qdq, run) -> None:
    g = qdq(18)
    result = run(g.model(g.quantize(g.op("PRelu", g.input(1, 3, 4, 4), g.const([[[0.1]], [[0.2]], [[0.3]]])))))
    assert result.op_types == ["PRelu"]
    result.check(exact=True)


def test_relu_in_the_same_format_is_a_clip_else_a_requantize(qdq, run) -> None:
    g = qdq(19)
    x = g.input(1, 3, 8, 8)
    result = run(g.model(g.quantize(g.op("Relu", x)), g.quantize(g.op("Relu", x), 0.0231)))
    assert result.op_types == ["Clip", "QRequantize"] and result.is_integer
    result.check()


def test_quantizing_again_is_removed_or_one_requantize(qdq, run) -> None:
    g = qdq(20)
    x = g.input(1, 3, 8, 8)
    same, other, unsigned = g.quantize(x), g.quantize(x, 0.07, -5), g.quantize(x, 0.05, 131, "uint8")
    result = run(g.model(same, other, unsigned))
    assert result.op_types == ["Identity", "QRequantize", "QRequantize"] and result.is_integer
    result.check()
    inner = qdq(20)
    x = inner.qdq(inner.input(1, 3, 8, 8))
    assert run(inner.model(inner.quantize(inner.op("Sigmoid", x), 1 / 256, -128))).op_types == ["QLookup"]


MOVES: dict[str, Callable[..., str]] = {
    "Reshape": lambda g, x: g.op("Reshape", x, g.const([2, -1], "int64")),
    "Flatten": lambda g, x: g.op("Flatten", x, axis=2),
    "Unsqueeze": lambda g, x: g.op("Unsqueeze", x, g.const([0], "int64")),
    "Transpose": lambda g, x: g.op("Transpose", x, perm=[0, 3, 1, 2]),
    "Slice": lambda g, x: g.op("Slice", x, g.const([1, -1], "int64"), g.const([3, -5], "int64"),
                               g.const([1, 3], "int64"), g.const([1, -2], "int64")),
    "Pad": lambda g, x: g.op("Pad", x, g.const([0, 0, 1, 2, 0, 0, 3, 0], "int64"), g.const(0.1)),
    "Pad reflect": lambda g, x: g.op("Pad", x, g.const([0, 0, 1, 2, 0, 0, 3, 0], "int64"), mode="reflect"),
    "Expand": lambda g, x: g.op("Expand", x, g.const([3, 1, 1, 1], "int64")),
    "Tile": lambda g, x: g.op("Tile", x, g.const([1, 2, 1, 1], "int64")),
    "Gather": lambda g, x: g.op("Gather", x, g.const([2, 0, 2], "int64"), axis=1),
    "Concat": lambda g, x: g.op("Concat", x, g.op("Transpose", x, perm=[0, 1, 3, 2]), x, axis=1),
    "Split": lambda g, x: g.ops("Split", x, outputs=2, axis=1, num_outputs=2)[1],
    "DepthToSpace": lambda g, x: g.op("DepthToSpace", x, blocksize=2),
    "DepthToSpace CRD": lambda g, x: g.op("DepthToSpace", x, blocksize=2, mode="CRD"),
    "SpaceToDepth": lambda g, x: g.op("SpaceToDepth", x, blocksize=2),
    "Identity": lambda g, x: g.op("Identity", x),
}  # fmt: skip


@pytest.mark.parametrize("move", list(MOVES))
def test_movement_runs_on_integers(qdq, run, move) -> None:
    g = qdq(21)
    y = MOVES[move](g, g.input(1, 4, 8, 8))
    result = run(g.model(g.quantize(y), g.quantize(y, 0.0231)))
    assert result.is_integer and result.op_types.count("QRequantize") == 1
    result.check()
    np.testing.assert_array_equal(*result.outputs()[0])


def test_chains_of_movement_reach_the_operator_behind_them(qdq, run) -> None:
    g = qdq(22)
    x = g.op("Pad", g.input(1, 8, 6, 4), g.const([0, 0, 1, 1, 0, 0, 1, 1], "int64"))
    y = g.op("Conv", g.op("Reshape", x, g.const([1, 8, 4, 12], "int64")), g.weight(5, 8, 3, 3))
    result = run(g.model(g.quantize(y)))
    assert result.op_types == ["Pad", "QConv"] and result.is_integer
    result.check()


def test_padding_with_a_number_the_format_lacks_stays_float(qdq, run) -> None:
    g = qdq(23)
    y = g.op("Pad", g.input(1, 2, 4, 4), g.const([0, 0, 1, 1, 0, 0, 1, 1], "int64"), g.const(0.123))
    result = run(g.model(g.quantize(y)))
    assert result.op_types == ["Pad"] and not result.is_integer
    result.check(exact=True)


def test_concat_brings_inputs_to_one_format(qdq, run) -> None:
    g = qdq(24)
    parts = [g.input(1, 2, 4, 4), g.input(1, 3, 4, 4, scale=0.02, zero=-7), g.const(g.rng.normal(0, 1, (1, 1, 4, 4)))]
    result = run(g.model(g.quantize(g.op("Concat", *parts, axis=1))))
    assert result.op_types == ["Concat", "QRequantize"] and result.is_integer
    result.check()


def test_arg_max_reads_integers(qdq, run) -> None:
    g = qdq(25)
    result = run(g.model(g.op("ArgMax", g.input(1, 5, 6, 6), axis=1, keepdims=0)))
    assert result.op_types == ["ArgMax"] and result.is_integer
    result.check(exact=True)


# --- what must stay as it is ---------------------------------------------------------------------------------


def test_float_reader_keeps_the_float_convolution(qdq, run) -> None:
    g = qdq(26)
    y = g.op("Conv", g.input(1, 3, 6, 6), g.weight(4, 3, 3, 3))
    result = run(g.model(g.quantize(y), g.op("Neg", y)))
    assert result.op_types == ["Conv", "Neg"]
    for want, got in result.outputs():
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_computed_weights_and_mixed_zero_points_stay_float(qdq, run) -> None:
    g = qdq(27)
    x = g.input(1, 2, 6, 6)
    computed = g.op("Conv", x, g.input(3, 2, 3, 3))
    array = g.const(g.rng.integers(0, 255, (3, 2, 3, 3)), "uint8")
    mixed = g.op("DequantizeLinear", array, g.const([0.01] * 3), g.const([3, 4, 5], "uint8"), axis=0)
    result = run(g.model(g.quantize(computed), g.quantize(g.op("Conv", x, mixed))))
    assert result.op_types == ["Conv", "Conv"]
    result.check()


def test_unknown_operators_and_sixteen_bits_stay_float(qdq, run) -> None:
    g = qdq(28)
    x = g.input(1, 4, 6, 6)
    norm = g.op("InstanceNormalization", x, g.const(np.ones(4)), g.const(np.zeros(4)))
    wide = g.op("QuantizeLinear", g.op("Sigmoid", x), g.const(1e-4), g.const(0, "int16"))
    back = g.op("DequantizeLinear", wide, g.const(1e-4), g.const(0, "int16"))
    result = run(g.model(g.quantize(norm), g.quantize(g.op("Add", back, x))))
    assert result.op_types == ["Add", "InstanceNormalization", "Sigmoid"]
    result.check(exact=True)


@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS[:3])
def test_small_network_in_every_variant(qdq, run, variant, tmp_path) -> None:
    g = qdq(29)
    x = g.input(1, 3, 12, 12)
    a = g.qdq(g.op("Relu", g.op("Conv", x, g.weight(8, 3, 3, 3, axis=0), pads=[1, 1, 1, 1])), 0.05, -128)
    b = g.qdq(g.op("Conv", a, g.weight(8, 1, 3, 3, axis=0), pads=[1, 1, 1, 1], group=8), 0.05)
    c = g.qdq(g.op("Add", a, b), 0.08)
    d = g.qdq(g.op("GlobalAveragePool", c), 0.02)
    e = g.qdq(g.op("Gemm", g.op("Flatten", d), g.weight(8, 5, axis=1)), 0.02)
    result = run(g.model(g.quantize(g.op("Softmax", e), 1 / 256, -128)), variant)
    assert result.is_integer
    assert result.op_types == ["QAdd", "QAveragePool", "QConv", "QConv", "QGemm", "QSoftmax"]
    ((want, got),) = result.outputs()
    assert np.abs(want.astype(int) - got).max() <= 3
    ir.save(result.model, tmp_path / "integer.onnx")
    again = ir.load(tmp_path / "integer.onnx")
    assert sum(is_op(node, "QConv", domain="qcompiler") for node in again.graph) == 2
