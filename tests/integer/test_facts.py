"""Facts of float, QDQ and integer operators, and that an operator's facts survive realizing."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph import is_op, nodes_of
from qcompiler.integer.facts import facts_of_float, facts_of_integer
from qcompiler.target import RULE_FIELDS, OpFacts


def first(model: ir.Model, op_type: str) -> ir.Node:
    return nodes_of(model.graph, op_type)[0]


def integer_node(model: ir.Model) -> ir.Node:
    (node,) = [node for node in model.graph if node.domain == "qcompiler"]
    return node


def check_fields(facts: OpFacts) -> None:
    assert set(facts.facts) <= set(RULE_FIELDS)


def test_conv_facts_before_and_after_realizing(qdq, run) -> None:
    g = qdq(1, "uint8")
    w = g.weight(6, 2, 3, 5, axis=0)
    model = g.model(
        g.quantize(g.op("Conv", g.input(1, 4, 9, 12), w, group=2, strides=[2, 1], pads=[1, 2, 1, 2], dilations=[1, 2]))
    )
    before = facts_of_float(first(model, "Conv"))
    assert (before.op, before.precision) == ("Conv", "uint8*int8")
    assert before.facts == {
        "rank": 4, "elements": 5 * 8 * 6, "batch": 1, "ifm_channels": 4, "ofm_channels": 6, "ifm_h": 9, "ifm_w": 12,
        "ofm_h": 5, "ofm_w": 8, "kernel_h": 3, "kernel_w": 5, "kernel_area": 15, "stride_h": 2, "stride_w": 1,
        "dilation_h": 1, "dilation_w": 2, "padded": True, "group": 2, "depthwise": False, "constant_weights": True,
        "symmetric_weights": True,
    }  # fmt: skip
    assert facts_of_integer(integer_node(run(model).model)) == before
    check_fields(before)


def agree(g, run, output: str, op_type: str) -> OpFacts:
    """Facts of the float operator, which must be those of the integer operator it becomes."""
    model = g.model(g.quantize(output))
    before = facts_of_float(first(model, op_type))
    after = facts_of_integer(integer_node(run(model).model))
    assert after == before
    check_fields(before)
    return before


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [3, 2], "strides": [2, 1]}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
        ("AveragePool", {"kernel_shape": [9, 12], "strides": [9, 12]}),
        ("GlobalAveragePool", {}),
        ("Sigmoid", {}),
        ("ReduceMean", {"keepdims": 1}),
    ],
)
def test_operators_agree(qdq, run, op_type, attributes) -> None:
    g = qdq(2)
    inputs = [g.input(1, 4, 9, 12)] + ([g.const([2, 3], "int64")] if op_type == "ReduceMean" else [])
    facts = agree(g, run, g.op(op_type, *inputs, **attributes), op_type)
    assert facts.precision == "int8"
    if op_type == "Sigmoid":
        assert (facts.op, facts.facts["function"]) == ("Lookup", "Sigmoid")
    if op_type == "ReduceMean":
        assert facts.facts["reduced"] == 108
    if facts.facts.get("kernel_area") == 108:
        assert facts.facts["stride_h"] == facts.facts["stride_w"] == 1, "no step is taken"
    if attributes.get("count_include_pad"):
        assert facts.facts["pad_counted"] is True


def test_products_agree(qdq, run) -> None:
    g = qdq(3)
    facts = agree(g, run, g.op("MatMul", g.input(3, 10), g.weight(10, 7, axis=1)), "MatMul")
    assert (facts.op, facts.precision, facts.facts["batch"]) == ("Gemm", "int8*int8", 3)
    g = qdq(3)
    facts = agree(g, run, g.op("MatMul", g.input(3, 10), g.input(10, 7)), "MatMul")
    assert (facts.op, facts.facts["constant_weights"]) == ("MatMul", False)


@pytest.mark.parametrize(("other", "broadcast"), [((1, 4, 9, 12), False), ((1, 4, 1, 1), True)])
@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul"])
def test_binary_operators_agree(qdq, run, op_type, other, broadcast) -> None:
    g = qdq(4)
    facts = agree(g, run, g.op(op_type, g.input(1, 4, 9, 12), g.input(*other)), op_type)
    assert (facts.op, facts.facts["broadcast"]) == (op_type, broadcast)


@pytest.mark.parametrize(("scales", "factors"), [((2.0, 4.0), (2, 4)), ((1.5, 0.5), ("1.5", "0.5"))])
def test_resize_factors(qdq, run, scales, factors) -> None:
    g = qdq(5)
    y = g.op("Resize", g.input(1, 3, 4, 6), "", g.const([1, 1, *scales]), mode="linear")
    facts = agree(g, run, y, "Resize")
    assert (facts.facts["scale_h"], facts.facts["scale_w"], facts.facts["mode"]) == (*factors, "linear")


def test_depthwise_means_one_output_for_each_channel(qdq) -> None:
    for outputs, depthwise in ((4, True), (8, False)):
        g = qdq(6)
        model = g.model(g.op("Conv", g.input(1, 4, 5, 5), g.weight(outputs, 1, 3, 3), group=4))
        assert facts_of_float(first(model, "Conv")).facts["depthwise"] is depthwise


def test_weights_that_are_not_symmetric_or_not_constant(qdq) -> None:
    g = qdq(7)
    x = g.input(1, 2, 5, 5)
    skewed = g.op("Conv", x, g.weight(3, 2, 3, 3, dtype="uint8", zero=7))
    computed = g.op("Conv", x, g.input(3, 2, 3, 3))
    model = g.model(skewed, computed)
    one, two = (facts_of_float(node) for node in nodes_of(model.graph, "Conv"))
    assert (one.facts["symmetric_weights"], one.facts["constant_weights"]) == (False, True)
    assert (two.facts["constant_weights"], two.precision) == (False, "int8*int8")


def test_float_model_takes_the_activation_type_to_come(qdq) -> None:
    g = qdq(8)
    g.input(1, 2, 5, 5)
    y = g.op("Conv", "x0", g.const(np.ones((3, 2, 3, 3))))
    facts = facts_of_float(first(g.model(g.op("Relu", y)), "Conv"), "uint8")
    assert facts.precision == "uint8*int8"


def test_fallbacks_and_borders_are_float32(qdq, run) -> None:
    g = qdq(9)
    x = g.input(1, 4, 6, 6)
    norm = g.op("InstanceNormalization", x, g.const(np.ones(4)), g.const(np.zeros(4)))
    model = run(g.model(g.quantize(norm))).model
    assert {facts_of_integer(node).precision for node in model.graph} == {"float32"}
    g = qdq(9)
    model = run(g.model(g.quantize(g.op("Transpose", g.input(1, 4, 6, 6), perm=[0, 2, 3, 1])))).model
    (transpose,) = [node for node in model.graph if is_op(node, "Transpose")]
    assert facts_of_integer(transpose) == OpFacts("Transpose", "int8", {"rank": 4, "elements": 144, "batch": 1})
