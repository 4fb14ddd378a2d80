"""Which layers have a choice, of what, and plans that mix formats."""

from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.compile import Prepared, prepare
from qcompiler.graph import data_input, shape_of
from qcompiler.options import Options
from qcompiler.quant.moments import Tap
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.types import QuantPlan, WeightRequest
from qcompiler.search.forms import FLOAT, UNIFORM, Form, LayerFormat, form_of
from qcompiler.search.layers import (
    Assignment,
    Junction,
    Layer,
    compose,
    everywhere,
    junctions_of,
    layers_of,
    request,
    stored_forms,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DIGITS, CALIBRATION = EXAMPLES / "digits.onnx", EXAMPLES / "digits_calibration.npz"


@cache
def digits(target: str, samples: int = 24) -> Prepared:
    options = Options(calibration=CALIBRATION, samples=samples)
    return prepare(DIGITS, target, options, widths=("int8", "int16") if target == "x86-cpu" else ())


def layers(prepared: Prepared) -> tuple[Layer, ...]:
    assert prepared.plan is not None
    return layers_of(prepared.graph, prepared.plan, prepared.target, WeightRequest())


def planned(prepared: Prepared, chosen: Assignment) -> QuantPlan:
    """What `plan` makes of a choice without 16-bit floats."""
    assert prepared.ranges is not None
    wanted = request(layers(prepared), chosen, WeightRequest())
    return plan(prepared.graph, prepared.ranges, prepared.target, wanted.floats, wanted.formats)


def composed(prepared: Prepared, chosen: Assignment) -> QuantPlan:
    """The same from plans with one format of weights each."""
    found = layers(prepared)
    plans = {stored: planned(prepared, everywhere(found, stored)) for stored in stored_forms(found)}
    eight = tuple(
        form_of(name).real or Form(wide=form_of(name).wide).named(weighted=layer.weights is not None)
        for layer, name in zip(found, chosen, strict=True)
    )
    base = planned(prepared, eight)
    return compose(prepared.graph, base, found, chosen, plans, lambda: planned(prepared, chosen))


def outputs(prepared: Prepared, mixed: QuantPlan) -> np.ndarray:
    tap = Tap(quantize(prepared.graph, mixed), ["logits"])
    return np.concatenate([tap.run(sample)["logits"] for sample in prepared.samples])


def test_the_target_says_what_there_is() -> None:
    four = layers(digits("systolic-npu"))
    assert [layer.op for layer in four if layer.weights] == ["Conv", "Conv", "Conv", "Gemm"]
    for layer in four:
        assert layer.formats[0] == UNIFORM
        if layer.weights:
            assert layer.formats[-1] == FLOAT and layer.formats[-2] in ("float16", "bfloat16")
            assert "int4" in layer.formats
    eight = layers(digits("arm-npu"))
    assert all(not any(form_of(name).weights == "int4" for name in layer.formats) for layer in eight)
    assert stored_forms(eight) == [UNIFORM]


def test_cpus_mix_widths() -> None:
    found = layers(digits("x86-cpu"))
    assert all({"int16*int8", "int16*int4"} < set(layer.formats) for layer in found if layer.weights)
    assert all(layer.formats == ("int8", "int16") for layer in found if not layer.weights)
    assert any(form_of(name).group == 32 for layer in found for name in layer.formats) == any(
        layer.weights and shape_of(data_input(layer.products[0], 1))[1] > 32 for layer in found
    )


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("int8", Form()),
        ("int4/32", Form("int4", 32)),
        ("int16*binary", Form("binary", 0, wide=True)),
        ("int16*int2/8", Form("int2", 8, wide=True)),
        ("bfloat16", Form(real="bfloat16")),
        ("float", Form(real="float")),
    ],
)
def test_names_of_formats(name: LayerFormat, form: Form) -> None:
    assert form_of(name) == form and form.named(weighted=True) == name


def test_names_of_formats_without_weights() -> None:
    assert Form().named(weighted=False) == "int8" and Form(wide=True).named(weighted=False) == "int16"
    assert form_of("int16") == Form(wide=True)


def test_a_format_that_would_leave_the_accelerator_is_not_offered() -> None:
    prepared = digits("systolic-npu")
    npu = prepared.target.npu
    assert npu is not None
    rules = tuple(
        rule.model_copy(update={"precisions": ("int8*int8",)}) if "Gemm" in rule.ops else rule for rule in npu.rules
    )
    target = prepared.target.model_copy(update={"npu": npu.model_copy(update={"rules": rules})})
    assert prepared.plan is not None
    found = layers_of(prepared.graph, prepared.plan, target, WeightRequest())
    *convolutions, gemm = [layer for layer in found if layer.weights]
    assert {form_of(name).weights for name in gemm.formats if form_of(name).real is None} == {"int8"}
    assert all("int4" in layer.formats for layer in convolutions)


def mixture(prepared: Prepared, *weighted: LayerFormat) -> Assignment:
    """Formats of the layers with weights, 8 bits for the others."""
    given = iter(weighted)
    return tuple(next(given) if layer.weights else UNIFORM for layer in layers(prepared))


@pytest.mark.parametrize(
    ("target", "formats"),
    [
        ("systolic-npu", ("int8", "int4", "int4", "int8")),
        ("x86-cpu", ("int8", "int4", "int4", "int8")),
        ("systolic-npu", ("int4", FLOAT, "int8", "int4")),
        ("x86-cpu", ("int16*int8", "int4", "int16*int4", "int8")),
        ("x86-cpu", ("int4", FLOAT, "int16*int2", "int16*int8")),
    ],
)
def test_a_mixture_has_each_layer_from_its_plan(target: str, formats: tuple[LayerFormat, ...]) -> None:
    """What `plan` makes of the same request."""
    prepared = digits(target)
    chosen = mixture(prepared, *formats)
    mixed = outputs(prepared, composed(prepared, chosen))
    np.testing.assert_array_equal(mixed, outputs(prepared, planned(prepared, chosen)))
    assert not np.array_equal(mixed, outputs(prepared, planned(prepared, mixture(prepared, *("int4",) * 4))))


def test_junctions_follow_data_movement(tmp_path: Path) -> None:
    """A sum that a convolution, a table and a pool read, and what two pools are joined to."""
    rng = np.random.default_rng(6)
    constants = [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 6, name)
                 for name, shape in (("w", (4, 4, 3, 3)), ("v", (4, 4, 1, 1)), ("u", (2, 8, 1, 1)))]  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="a", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["a", "x"], ["s"], name="s"),
        helper.make_node("Conv", ["s", "v"], ["b"], name="b"),
        helper.make_node("Sigmoid", ["b"], ["t"], name="t"),
        helper.make_node("MaxPool", ["s"], ["p"], name="p", kernel_shape=[2, 2]),
        helper.make_node("MaxPool", ["t"], ["q"], name="q", kernel_shape=[2, 2]),
        helper.make_node("Concat", ["p", "q"], ["c"], name="c", axis=1),
        helper.make_node("Conv", ["c", "u"], ["y"], name="y"),
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
             for name, shape in (("x", [1, 4, 6, 5]), ("y", [1, 2, 5, 4]))]  # fmt: skip
    graph = helper.make_graph(nodes, "junctions", infos[:1], infos[1:], constants)
    path = tmp_path / "junctions.onnx"
    ir.save(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)), path)
    samples = {"x": rng.standard_normal((4, 4, 6, 5)).astype(np.float32)}
    prepared = prepare(path, "x86-cpu", Options(calibration=samples))
    found = layers(prepared)
    assert [layer.name for layer in found] == ["a", "s", "b", "y"]  # a table reads 8 bits in any case
    assert prepared.plan is not None
    junctions = junctions_of(prepared.graph, prepared.plan, found)
    # x, a, s, b, t, p, q, c, y
    assert junctions == (
        Junction((0, 1), (), made_narrow=False),
        Junction((1,), (), made_narrow=False),
        Junction((2,), (5,), made_narrow=False),
        Junction((), (), made_narrow=False),
        Junction((), (6,), made_narrow=True),
        Junction((), (7,), made_narrow=False),
        Junction((), (7,), made_narrow=False),
        Junction((3,), (), made_narrow=False),
        Junction((), (), made_narrow=False),
    )


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
    wanted = request([layer], ("int4",), WeightRequest())
    assert dict(wanted.formats.by_layer) == {"first + relu": "int4", "second": "int4"} and not wanted.floats
    assert request([layer], (FLOAT,), WeightRequest()).floats == ("first + relu", "second")
    assert request([layer], ("bfloat16",), WeightRequest()).halves == dict.fromkeys(layer.parts, "bfloat16")
