"""The numpy operators against onnxruntime's float kernels, which are exact on small integers."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.graph import make_node
from qcompiler.integer import ops, reference
from qcompiler.quant import arithmetic

VARIANTS = arithmetic.REQUANTIZE_VARIANTS
OPSETS = {"": 21, "qcompiler": 1}


def value(name: str, array: np.ndarray) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))


def run(op: ops.IntegerOp, inputs: Sequence[np.ndarray], shape: Sequence[int], dtype: str) -> np.ndarray:
    """One integer operator as a model, through `execute`."""
    values = [value(f"i{index}", array) for index, array in enumerate(inputs)]
    out = value("y", np.zeros(shape, dtype))
    graph = ir.Graph(values, [out], nodes=[op.node(values, out, "n")], opset_imports=OPSETS, name="g")
    feeds = {f"i{index}": array for index, array in enumerate(inputs)}
    return reference.execute(ir.Model(graph, ir_version=10), feeds)["y"]


def onnx_float(op_type: str, inputs: Sequence[np.ndarray], **attributes: object) -> np.ndarray:
    names = [f"i{index}" for index in range(len(inputs))]
    info = [onnx.helper.make_tensor_value_info(n, 1, a.shape) for n, a in zip(names, inputs, strict=True)]
    node = onnx.helper.make_node(op_type, names, ["y"])
    node.attribute.extend(onnx.helper.make_attribute(name, item) for name, item in attributes.items())
    graph = onnx.helper.make_graph([node], "g", info, [onnx.helper.make_tensor_value_info("y", 1, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {n: a.astype(np.float32) for n, a in zip(names, inputs, strict=True)}
    return np.asarray(session.run(None, feeds)[0])


def codes(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def factors(rng: np.random.Generator, count: int, variant: str, typical: float) -> tuple[np.ndarray, np.ndarray]:
    real = rng.uniform(0.2, 1.0, count) / typical
    if variant == "shift":
        real = np.exp2(np.round(np.log2(real)))
    return arithmetic.multipliers(real, variant)  # type: ignore[arg-type]


def nchw(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 3, 1, 2)


def nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


CONVS = [
    # in, out, group, kernel, strides, pads, dilations, size
    (3, 8, 1, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (9, 7)),
    (5, 7, 1, (2, 3), (2, 1), (0, 1, 1, 2), (1, 2), (11, 8)),
    (6, 6, 6, (3, 3), (2, 2), (0, 0, 1, 1), (1, 1), (8, 10)),
    (6, 12, 3, (1, 5), (1, 3), (0, 2, 0, 2), (1, 1), (5, 13)),
    (4, 8, 4, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), (7, 7)),
    (1, 4, 1, (7, 5), (2, 2), (3, 2, 3, 2), (1, 1), (16, 9)),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize(("x_dtype", "w_dtype"), [("int8", "int8"), ("uint8", "uint8"), ("uint8", "int8")])
def test_conv(case: tuple, variant: str, x_dtype: str, w_dtype: str) -> None:
    channels, outputs, group, kernel, strides, pads, dilations, size = case
    rng = np.random.default_rng([CONVS.index(case), len(x_dtype), len(w_dtype)])
    x = codes(rng, (2, *size, channels), x_dtype)
    w = codes(rng, (outputs, *kernel, channels // group), w_dtype)
    bias = rng.integers(-5000, 5000, outputs).astype(np.int32)
    multiplier, shift = factors(rng, outputs, variant, 3000.0)
    x_zero, w_zero, y_zero = int(codes(rng, (), x_dtype)), int(codes(rng, (), w_dtype)), 3
    acc = onnx_float(
        "Conv",
        [nchw(x.astype(np.int32) - x_zero), (w.astype(np.int32) - w_zero).transpose(0, 3, 1, 2), bias],
        strides=strides, pads=pads, dilations=dilations, group=group,
    )  # fmt: skip
    acc = nhwc(acc).astype(np.int64)
    want = arithmetic.requantize(acc, multiplier, shift, variant, y_zero, (-100, 127), "int8")  # type: ignore[arg-type]
    op = ops.QConv(kernel, strides, pads, dilations, group, x_zero, w_zero, y_zero, -100, 127, variant)
    got = run(op, [x, w, bias, multiplier, shift], want.shape, "int8")
    assert got.dtype == np.int8
    np.testing.assert_array_equal(got, want)
    assert len(np.unique(got)) > 5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("group", "kernel", "strides", "pads", "dilations", "extra"),
    [
        (1, (2, 2), (2, 2), (0, 0, 0, 0), (1, 1), (0, 0)),
        (1, (3, 4), (2, 3), (1, 0, 1, 1), (1, 1), (1, 2)),
        (2, (3, 3), (1, 2), (1, 1, 1, 1), (2, 1), (0, 1)),
        (4, (1, 1), (3, 3), (0, 0, 0, 0), (1, 1), (2, 2)),
    ],
)
def test_conv_transpose(
    variant: str, group: int, kernel: tuple, strides: tuple, pads: tuple, dilations: tuple, extra: tuple
) -> None:
    rng = np.random.default_rng(5)
    x, w = codes(rng, (1, 5, 6, 4), "int8"), codes(rng, (8, *kernel, 4 // group), "int8")
    bias = rng.integers(-500, 500, 8).astype(np.int32)
    multiplier, shift = factors(rng, 8, variant, 1000.0)
    # ONNX keeps [in, out / group, height, width]; ours is [out, height, width, in / group].
    split = (w.astype(np.int32) - 2).reshape(group, 8 // group, *kernel, 4 // group)
    onnx_weights = split.transpose(0, 4, 1, 2, 3).reshape(4, 8 // group, *kernel)
    acc = onnx_float(
        "ConvTranspose", [nchw(x.astype(np.int32) + 7), onnx_weights, bias],
        strides=strides, pads=pads, dilations=dilations, group=group, output_padding=extra,
    )  # fmt: skip
    acc = nhwc(acc).astype(np.int64)
    want = arithmetic.requantize(acc, multiplier, shift, variant, 0, (-128, 127), "int8")  # type: ignore[arg-type]
    op = ops.QConvTranspose(kernel, strides, pads, dilations, group, -7, 2, 0, -128, 127, variant)
    np.testing.assert_array_equal(run(op, [x, w, bias, multiplier, shift], want.shape, "int8"), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gemm_and_matmul(variant: str) -> None:
    rng = np.random.default_rng(6)
    x, w = codes(rng, (3, 37), "uint8"), codes(rng, (11, 37), "int8")
    bias = rng.integers(-(10**4), 10**4, 11).astype(np.int32)
    multiplier, shift = factors(rng, 11, variant, 10000.0)
    acc = (x.astype(np.int64) - 120) @ (w.astype(np.int64) - 1).T + bias
    want = arithmetic.requantize(acc, multiplier, shift, variant, 128, (128, 255), "uint8")  # type: ignore[arg-type]
    op = ops.QGemm(120, 1, 128, 128, 255, variant)
    np.testing.assert_array_equal(run(op, [x, w, bias, multiplier, shift], (3, 11), "uint8"), want)

    a, b = codes(rng, (2, 1, 5, 9), "int8"), codes(rng, (3, 9, 4), "uint8")
    multiplier, shift = factors(rng, 1, variant, 10000.0)
    acc = np.einsum("bcik,ckj->bcij", np.repeat(a.astype(np.int64) + 3, 3, 1), b.astype(np.int64) - 100)
    want = arithmetic.requantize(acc, multiplier, shift, variant, 1, (-128, 127), "int8")  # type: ignore[arg-type]
    op = ops.QMatMul(-3, 100, 1, -128, 127, variant)
    np.testing.assert_array_equal(run(op, [a, b, multiplier, shift], (2, 3, 5, 4), "int8"), want)


def test_long_sums_are_exact_and_wrap() -> None:
    x, w = np.full((1, 70000), 255, np.uint8), np.full((1, 70000), -128, np.int8)
    w[0, 0] = -127
    total = -(70000 * 255 * 128) + 255
    wrapped = (total + 2**31) % 2**32 - 2**31
    multiplier, shift = arithmetic.multipliers([2.0**-25], "tosa")
    op = ops.QGemm(0, 0, 0, -128, 127, "tosa")
    got = run(op, [x, w, np.zeros(1, np.int32), multiplier, shift], (1, 1), "int8")
    assert got.item() == round(wrapped / 2**25)


@pytest.mark.parametrize("variant", ["float32", "tflite", "tosa"])
@pytest.mark.parametrize("subtract", [0, 1])
def test_add_is_within_one_of_real(variant: str, subtract: int) -> None:
    rng = np.random.default_rng(7)
    a, b = codes(rng, (2, 5, 6, 3), "int8"), codes(rng, (1, 1, 3), "int8")
    sa, sb, sy = 0.11, 0.047, 0.09
    f = arithmetic.add_factors(sa, sb, sy, variant)  # type: ignore[arg-type]
    op = ops.QAdd(subtract, 5, -9, 2, *f, -90, 120, variant)
    got = run(op, [a, b], a.shape, "int8")
    sign = -1 if subtract else 1
    real = ((a.astype(float) - 5) * sa + sign * (b.astype(float) + 9) * sb) / sy + 2
    error = np.abs(got - np.clip(real, -90, 120))
    assert error.max() <= 0.51


@pytest.mark.parametrize("variant", VARIANTS)
def test_mul(variant: str) -> None:
    rng = np.random.default_rng(8)
    a, b = codes(rng, (4, 5, 3), "uint8"), codes(rng, (4, 1, 3), "int8")
    multiplier, shift = factors(rng, 1, variant, 100.0)
    acc = (a.astype(np.int64) - 128) * (b.astype(np.int64) - 4)
    want = arithmetic.requantize(acc, multiplier, shift, variant, 10, (0, 255), "uint8")  # type: ignore[arg-type]
    op = ops.QMul(128, 4, 10, 0, 255, variant)
    np.testing.assert_array_equal(run(op, [a, b, multiplier, shift], (4, 5, 3), "uint8"), want)


POOLS = [((2, 2), (2, 2), (0, 0, 0, 0), 0), ((3, 2), (1, 2), (1, 1, 1, 0), 0), ((3, 3), (2, 2), (1, 1, 1, 1), 1)]


@pytest.mark.parametrize(("kernel", "strides", "pads", "ceil_mode"), POOLS)
def test_max_pool(kernel: tuple, strides: tuple, pads: tuple, ceil_mode: int) -> None:
    x = codes(np.random.default_rng(9), (2, 8, 7, 5), "int8")
    want = nhwc(onnx_float("MaxPool", [nchw(x)], kernel_shape=kernel, strides=strides, pads=pads, ceil_mode=ceil_mode))
    op = ops.QMaxPool(kernel, strides, pads, (1, 1), -100, 100)
    np.testing.assert_array_equal(run(op, [x], want.shape, "int8"), np.clip(want, -100, 100))


@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize(("kernel", "strides", "pads", "ceil_mode"), POOLS[:2])
def test_average_pool(kernel: tuple, strides: tuple, pads: tuple, ceil_mode: int, counted: int) -> None:
    x, zero = codes(np.random.default_rng(10), (2, 8, 7, 5), "uint8"), 90
    mean = onnx_float(
        "AveragePool", [nchw(x.astype(np.int32) - zero)],
        kernel_shape=kernel, strides=strides, pads=pads, ceil_mode=ceil_mode, count_include_pad=counted,
    )  # fmt: skip
    area = kernel[0] * kernel[1]
    multiplier, shift = arithmetic.multipliers(0.7 / np.arange(1, area + 1), "tosa")
    op = ops.QAveragePool(kernel, strides, pads, counted, zero, 30, 0, 255, "tosa")
    got = run(op, [x, multiplier, shift], nhwc(mean).shape, "uint8")
    assert np.abs(got - np.clip(nhwc(mean) * 0.7 + 30, 0, 255)).max() <= 0.5001


def test_reduce_mean() -> None:
    x = codes(np.random.default_rng(11), (2, 6, 7, 5), "int8")
    multiplier, shift = arithmetic.multipliers([0.9 / 42], "tosa")
    op = ops.QReduceMean((1, 2), 4, 2, -128, 127, "tosa")
    real = (x.astype(float) - 4).mean(axis=(1, 2)) * 0.9 + 2
    for shape in ((2, 5), (2, 1, 1, 5)):
        got = run(op, [x, multiplier, shift], shape, "int8")
        assert got.shape == shape and np.abs(got.reshape(2, 5) - real).max() <= 0.5001


def test_requantize_changes_signedness() -> None:
    x = np.arange(256, dtype=np.uint8)
    multiplier, shift = arithmetic.multipliers([1.0], "float32")
    got = run(ops.QRequantize(128, 0, -128, 127, "float32"), [x, multiplier, shift], (256,), "int8")
    np.testing.assert_array_equal(got, np.arange(-128, 128))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_lookup(dtype: str) -> None:
    rng = np.random.default_rng(12)
    x, table = codes(rng, (3, 50), dtype), codes(rng, (256,), "int8")
    got = run(ops.QLookup("Test"), [x, table], x.shape, "int8")
    lowest = np.iinfo(dtype).min
    np.testing.assert_array_equal(got, [[table[int(item) - lowest] for item in row] for row in x])


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_softmax_is_within_one(dtype: str) -> None:
    x = codes(np.random.default_rng(13), (20, 11), dtype)
    table, inverse = arithmetic.softmax_tables(0.05, 1 / 256)
    got = run(ops.QSoftmax(inverse, -128, -128, 127), [x, table], x.shape, "int8")
    e = np.exp((x.astype(float) - x.max(axis=-1, keepdims=True)) * 0.05)
    real = e / e.sum(axis=-1, keepdims=True) * 256 - 128
    assert np.abs(got - np.clip(real, -128, 127)).max() <= 0.52


def test_resize() -> None:
    x = codes(np.random.default_rng(14), (1, 3, 4, 2), "int8")
    rows, cols = np.array([0, 0, 1, 2, 2], np.int32), np.array([3, 1, 0], np.int32)
    got = run(ops.QResizeNearest(), [x, rows, cols], (1, 5, 3, 2), "int8")
    np.testing.assert_array_equal(got, x[:, rows][:, :, cols])

    pairs = np.array([[0, 1], [1, 2]], np.int32)
    weights = np.array([[2048, 0], [512, 1536]], np.int32)
    got = run(ops.QResizeLinear(), [x, pairs, weights, pairs, weights], (1, 2, 2, 2), "int8")
    real = x.astype(float)
    mid = 0.25 * real[:, :, 1] + 0.75 * real[:, :, 2]
    want = [real[0, 0, 0], mid[0, 0], 0.25 * real[0, 1, 0] + 0.75 * real[0, 2, 0], 0.25 * mid[0, 1] + 0.75 * mid[0, 2]]
    np.testing.assert_array_equal(got.reshape(4, 2), np.floor(np.array(want) + 0.5))


def test_standard_operators_on_integer_tensors() -> None:
    """Operators onnxruntime has for int8 and one (int8 Neg aside) it lacks both run."""
    x = codes(np.random.default_rng(15), (1, 4, 2, 3), "int8")
    source = value("x", x)
    moved, spread = value("t", np.zeros((1, 2, 3, 4), np.int8)), value("d", np.zeros((1, 1, 4, 6), np.int8))
    nodes = [
        make_node("Transpose", [source], [moved], {"perm": [0, 2, 3, 1]}),
        make_node("DepthToSpace", [source], [spread], {"blocksize": 2}),
    ]
    graph = ir.Graph([source], [moved, spread], nodes=nodes, opset_imports=OPSETS, name="g")
    got = reference.execute(ir.Model(graph, ir_version=10), {"x": x})
    np.testing.assert_array_equal(got["t"], x.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(got["d"], x.reshape(1, 2, 2, 1, 2, 3).transpose(0, 3, 4, 1, 5, 2).reshape(1, 1, 4, 6))


def test_quantize_and_dequantize_match_onnxruntime() -> None:
    x = np.random.default_rng(16).normal(0, 3, (2, 5, 4)).astype(np.float32)
    scale, zero = np.array([0.1, 0.03, 0.2, 0.5, 0.017], np.float32), np.array([0, 3, -7, 9, 1], np.int8)
    source, s, z = value("x", x), value("s", scale), value("z", zero)
    q, y = value("q", np.zeros(x.shape, np.int8)), value("y", x)
    nodes = [
        make_node("QuantizeLinear", [source, s, z], [q], {"axis": 1}),
        make_node("DequantizeLinear", [q, s, z], [y], {"axis": 1}),
    ]
    graph = ir.Graph([source, s, z], [q, y], nodes=nodes, opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    feeds = {"x": x, "s": scale, "z": zero}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    want_q, want_y = session.run(None, feeds)
    got = reference.execute(model, feeds)
    np.testing.assert_array_equal(got["q"], np.asarray(want_q))
    np.testing.assert_array_equal(got["y"], np.asarray(want_y))
