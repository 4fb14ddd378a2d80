"""Which layers have a choice, of what, and plans that mix formats."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.compile import Prepared, prepare
from qcompiler.options import Options
from qcompiler.quant.moments import Tap
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.types import QuantPlan, WeightRequest, WeightType
from qcompiler.quant.weight_bits import activation_dtype
from qcompiler.search.layers import FLOAT, Layer, compose, everywhere, layers_of, request, weight_types

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DIGITS, CALIBRATION = EXAMPLES / "digits.onnx", EXAMPLES / "digits_calibration.npz"


@cache
def digits(target: str, samples: int = 24) -> Prepared:
    return prepare(DIGITS, target, Options(calibration=CALIBRATION, samples=samples))


def layers(prepared: Prepared) -> tuple[Layer, ...]:
    assert prepared.plan is not None
    activation = activation_dtype(prepared.target, WeightRequest())
    return layers_of(prepared.graph, prepared.plan, prepared.target, activation)


def planned(prepared: Prepared, dtype: WeightType, keep_float: tuple[str, ...] = ()) -> QuantPlan:
    assert prepared.ranges is not None
    wanted, _ = request(layers(prepared), everywhere(layers(prepared), dtype), WeightRequest())
    return plan(prepared.graph, prepared.ranges, prepared.target, keep_float, wanted)


def outputs(prepared: Prepared, mixed: QuantPlan) -> np.ndarray:
    tap = Tap(quantize(prepared.graph, mixed), ["logits"])
    return np.concatenate([tap.run(sample)["logits"] for sample in prepared.samples])


def test_the_target_says_what_there_is() -> None:
    four = layers(digits("systolic-npu"))
    assert [layer.op for layer in four] == ["Conv", "Conv", "Conv", "Gemm"]
    for layer in four:
        assert layer.formats[0] == "int8" and layer.formats[-1] == FLOAT and "int4" in layer.formats
    eight = layers(digits("arm-npu"))
    assert {layer.formats for layer in eight} == {("int8", FLOAT)}
    assert weight_types(eight) == ["int8"]


def test_a_format_that_would_leave_the_accelerator_is_not_offered() -> None:
    prepared = digits("systolic-npu")
    npu = prepared.target.npu
    assert npu is not None
    rules = tuple(
        rule.model_copy(update={"precisions": ("int8*int8",)}) if "Gemm" in rule.ops else rule for rule in npu.rules
    )
    target = prepared.target.model_copy(update={"npu": npu.model_copy(update={"rules": rules})})
    assert prepared.plan is not None
    *convolutions, gemm = layers_of(prepared.graph, prepared.plan, target, "int8")
    assert gemm.formats == ("int8", FLOAT)
    assert all("int4" in layer.formats for layer in convolutions)


@pytest.mark.parametrize("target", ["systolic-npu", "x86-cpu"])
def test_a_mixture_has_each_layer_from_its_plan(target: str) -> None:
    """What `plan` makes of the same request."""
    prepared = digits(target)
    found = layers(prepared)
    plans: dict[WeightType, QuantPlan] = {dtype: planned(prepared, dtype) for dtype in ("int8", "int4")}
    mixture = ("int8", "int4", "int4", "int8")
    wanted, floats = request(found, mixture, WeightRequest())
    assert not floats and prepared.ranges is not None
    whole = plan(prepared.graph, prepared.ranges, prepared.target, (), wanted)
    mixed = compose(plans["int8"], found, mixture, plans)
    np.testing.assert_array_equal(outputs(prepared, mixed), outputs(prepared, whole))
    assert not np.array_equal(outputs(prepared, mixed), outputs(prepared, plans["int4"]))


def test_a_mixture_with_a_layer_in_float() -> None:
    prepared = digits("systolic-npu")
    found = layers(prepared)
    plans: dict[WeightType, QuantPlan] = {dtype: planned(prepared, dtype) for dtype in ("int8", "int4")}
    mixture = ("int4", FLOAT, "int8", "int4")
    wanted, floats = request(found, mixture, WeightRequest())
    assert floats == (found[1].name,) and prepared.ranges is not None
    whole = plan(prepared.graph, prepared.ranges, prepared.target, floats, wanted)
    mixed = compose(planned(prepared, "int8", floats), found, mixture, plans)
    np.testing.assert_array_equal(outputs(prepared, mixed), outputs(prepared, whole))


def test_operators_that_share_weights_are_one_layer(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    constants = [numpy_helper.from_array(rng.standard_normal((4, 4, 3, 3)).astype(np.float32) / 6, "w")]
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "w"], ["y"], name="second", pads=[1, 1, 1, 1]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 6, 5]) for name in ("x", "y"))
    graph = helper.make_graph(nodes, "shared", [x], [y], constants)
    path = tmp_path / "shared.onnx"
    ir.save(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)), path)
    prepared = prepare(path, "systolic-npu", Options(calibration={"x": rng.standard_normal((4, 4, 6, 5))
                                                                  .astype(np.float32)}))  # fmt: skip
    (layer,) = layers(prepared)
    assert layer.parts == ("first + relu", "second") and layer.members == {"first", "relu", "second"}
    wanted, floats = request([layer], ("int4",), WeightRequest())
    assert dict(wanted.by_layer) == {"first + relu": "int4", "second": "int4"} and not floats
    _, floats = request([layer], (FLOAT,), WeightRequest())
    assert floats == ("first + relu", "second")
