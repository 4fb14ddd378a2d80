"""Weights with a scale per group: grids, and schemes that beat rounding to nearest on the error of outputs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import QCompilerError
from qcompiler.graph import const_of, data_input, integer, nodes_of
from qcompiler.integer.reference import execute
from qcompiler.passes.rewriting import weight_dequantize
from qcompiler.pipeline import SIMPLIFY, run_passes
from qcompiler.quant.formats import dequantize_array, limits, quantize_array
from qcompiler.quant.quantize import quantize
from qcompiler.quant.types import Quality, Scheme, WeightRequest
from qcompiler.quant.weight_only import channel_factors, group_format, half_quadratic_format, weight_only


@dataclass(frozen=True)
class Data:
    """Samples by input name."""

    arrays: np.ndarray
    synthetic: bool = False

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        return ({"x": array} for array in self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)


def perceptron(rng: np.random.Generator, depth: int, inner: int, outputs: int) -> ir.Model:
    """MatMul → Add → Relu → MatMul of [3, depth], weights with heavy tails."""
    arrays = {
        "w0": rng.standard_t(4, (depth, inner)) / np.sqrt(depth),
        "b0": rng.standard_normal(inner) / 4,
        "w1": rng.standard_t(4, (inner, outputs)) / np.sqrt(inner),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["m0"], name="first"),
        helper.make_node("Add", ["m0", "b0"], ["a0"], name="bias"),
        helper.make_node("Relu", ["a0"], ["r0"], name="relu"),
        helper.make_node("MatMul", ["r0", "w1"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, depth])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, outputs])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
        value_info=[helper.make_tensor_value_info(name, TensorProto.FLOAT, [3, inner]) for name in ("m0", "a0", "r0")],
    )
    opsets = [helper.make_opsetid("", 21)]
    return run_passes(ir.from_proto(helper.make_model(graph, opset_imports=opsets)), SIMPLIFY, stage="simplify")


def uneven_inputs(rng: np.random.Generator, count: int, depth: int) -> np.ndarray:
    """Channels of very different sizes, correlated through a few directions."""
    mix = rng.standard_normal((depth // 3, depth))
    rows = rng.standard_normal((count, 3, depth // 3)) @ mix + 0.3 * rng.standard_normal((count, 3, depth))
    return (rows * np.exp(rng.standard_normal(depth))).astype(np.float32)


@pytest.mark.parametrize("dtype", ["int4", "int8"])
@pytest.mark.parametrize("make", [group_format, half_quadratic_format])
def test_a_group_has_a_grid_of_its_own(make, dtype) -> None:
    rng = np.random.default_rng(3)
    weights = (rng.standard_normal((7, 70)) * np.repeat([0.01, 1.0, 30.0], [32, 32, 6])).astype(np.float32)
    weights[2, 32:64] = 0
    fmt = make(weights, dtype, 32)
    assert fmt.block == 32 and fmt.axis == 1 and fmt.scale.shape == fmt.zero_point.shape == (7, 3)
    assert (fmt.scale > 0).all() and np.isfinite(fmt.scale).all()
    integers = quantize_array(weights, fmt)
    assert integers.min() >= limits(dtype)[0] and integers.max() <= limits(dtype)[1]
    real = dequantize_array(integers, fmt)
    np.testing.assert_array_equal(real[2, 32:64], 0)
    if make is group_format:
        step = np.repeat(fmt.scale, 32, axis=1)[:, :70]
        assert (np.abs(real - weights) <= 0.51 * step + 1e-6).all()
    if dtype == "int8":
        assert not fmt.zero_point.any()


def test_one_group_is_a_scale_per_channel() -> None:
    weights = np.random.default_rng(4).standard_normal((5, 24)).astype(np.float32)
    for group in (None, 24, 64):
        fmt = group_format(weights, "int4", group)
        assert fmt.axis == 0 and fmt.block is None and fmt.scale.shape == (5,)


def test_half_quadratic_grids_err_less() -> None:
    rng = np.random.default_rng(5)
    weights = rng.standard_t(3, (64, 256)).astype(np.float32)
    inputs = rng.standard_normal((400, 256))

    def error(fmt) -> float:
        off = dequantize_array(quantize_array(weights, fmt), fmt) - weights
        return float(np.square(inputs @ off.T).mean())

    assert error(half_quadratic_format(weights, "int4", 128)) < 0.95 * error(group_format(weights, "int4", 128))


def test_large_channels_are_scaled_up() -> None:
    rng = np.random.default_rng(6)
    inputs = uneven_inputs(rng, 100, 60).reshape(-1, 60).astype(np.float64)
    weights = rng.standard_normal((20, 60)).astype(np.float32)
    factors = channel_factors(weights, inputs.T @ inputs / len(inputs), "int4", 32)
    assert np.corrcoef(np.log(factors), np.log(np.square(inputs).mean(axis=0)))[0, 1] > 0.99
    even = channel_factors(weights, np.eye(60), "int4", 32)
    np.testing.assert_allclose(even, 1)


def output_error(model: ir.Model, wanted: WeightRequest, seen: np.ndarray, tested: np.ndarray) -> float:
    changed, plan = weight_only(model, wanted, Data(seen), "fast")
    quantized = quantize(changed, plan)
    errors = [execute(quantized, {"x": x})["y"] - execute(model, {"x": x})["y"] for x in tested]
    return float(np.square(errors).mean())


@pytest.mark.parametrize(("scheme", "share"), [("hqq", 0.98), ("gptq", 0.8), ("awq", 0.9)])
def test_every_scheme_beats_rounding_to_nearest(scheme: Scheme, share: float) -> None:
    rng = np.random.default_rng(7)
    model = perceptron(rng, 72, 80, 24)
    inputs = uneven_inputs(rng, 60, 72)
    errors = {
        each: output_error(
            model, WeightRequest("int4", activations="float", group=32, scheme=each), inputs[:40], inputs[40:]
        )
        for each in ("rtn", scheme)
    }
    assert errors[scheme] < share * errors["rtn"]


def test_the_quantized_model_computes_with_dequantized_weights() -> None:
    rng = np.random.default_rng(8)
    model = perceptron(rng, 40, 48, 16)
    request = WeightRequest("int4", {"second": "int8"}, activations="float", group=16, scheme="rtn")
    changed, plan = weight_only(model, request, Data(np.zeros((0,)), synthetic=True), "fast")
    quantized = quantize(changed, plan)
    products = nodes_of(quantized.graph, "Gemm")
    weights = {p.name: node for p in products if (node := weight_dequantize(p.inputs[1])) is not None}
    assert {name: str(data_input(node).dtype) for name, node in weights.items()} == {"first": "INT4", "second": "INT8"}
    for node in weights.values():
        assert integer(node, "block_size") == 16 and integer(node, "axis") == 1
    assert not nodes_of(quantized.graph, "QuantizeLinear")
    x = rng.standard_normal((3, 40)).astype(np.float32)
    exact, coarse = (execute(each, {"x": x})["y"] for each in (model, quantized))
    assert 0 < np.abs(exact - coarse).max() < 0.2 * np.abs(exact).max()
    assert const_of(nodes_of(model.graph, "Gemm")[0].inputs[1]) is not None, "the given model is left alone"


@pytest.mark.parametrize(
    ("quality", "synthetic", "wanted"), [("fast", False, "rtn"), ("balanced", True, "hqq"), ("best", False, "gptq")]
)
def test_quality_chooses_the_scheme(quality: Quality, synthetic: bool, wanted: Scheme) -> None:
    rng = np.random.default_rng(9)
    model, data = perceptron(rng, 32, 32, 8), Data(uneven_inputs(rng, 8, 32), synthetic)

    def plan(scheme: Scheme | None, quality: Quality):
        return weight_only(model, WeightRequest("int4", activations="float", group=16, scheme=scheme), data, quality)[1]

    chosen, asked = plan(None, quality), plan(wanted, "fast")
    assert chosen.weights.keys() == asked.weights.keys()
    for name, fmt in asked.weights.items():
        np.testing.assert_array_equal(chosen.weights[name].scale, fmt.scale)
    assert chosen.rounded.keys() == asked.rounded.keys()
    assert bool(asked.rounded) == (wanted == "gptq")


def test_layers_stay_in_float_on_request() -> None:
    rng = np.random.default_rng(10)
    model = perceptron(rng, 32, 32, 8)
    request = WeightRequest("int4", activations="float", group=16)
    _, plan = weight_only(model, request, Data(np.zeros(0), synthetic=True), "fast", keep_float=["first"])
    assert len(plan.weights) == 1 and list(plan.float_nodes) == ["first"]


@pytest.mark.parametrize(
    ("request_", "keep", "message"),
    [
        (WeightRequest("int4", activations="float", group=12), (), "multiples of 8"),
        (WeightRequest("int2", activations="float", group=32), (), "int4 or int8, not int2"),
        (WeightRequest("int4", activations="float", group=32, scheme="gptq"), (), "give --calibration"),
        (WeightRequest("int4", {"frist": "int8"}, "float"), (), "did you mean 'first'"),
        (WeightRequest("int4", activations="float"), ("third",), "--float third"),
    ],
)
def test_refuses(request_: WeightRequest, keep: tuple[str, ...], message: str) -> None:
    model = perceptron(np.random.default_rng(11), 32, 32, 8)
    with pytest.raises(QCompilerError, match=message):
        weight_only(model, request_, Data(np.zeros(0), synthetic=True), "fast", keep)


def test_refuses_a_model_without_products() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")],
        "relu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    with pytest.raises(QCompilerError, match="no matrix product"):
        weight_only(model, WeightRequest(activations="float"), Data(np.zeros(0), synthetic=True), "fast")
