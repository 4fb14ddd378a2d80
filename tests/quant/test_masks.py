"""Masks must not take the scores' eight bits."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.quant.masks import MARGIN, is_masked, unmasked_ranges
from qcompiler.quant.types import Range


def attention(low: float, *, made_by: str = "Mul", reader: str = "Softmax") -> ir.Model:
    """scores + mask, the mask being `low` where `keep` is 1."""
    maker = (
        helper.make_node("Mul", ["keep", "low"], ["mask"], name="mask")
        if made_by == "Mul"
        else helper.make_node("Identity", ["keep"], ["mask"], name="mask")
    )
    nodes = [
        maker,
        helper.make_node("Add", ["scores", "mask"], ["masked"], name="masked"),
        helper.make_node(reader, ["masked"], ["y"], name="reader"),
    ]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 8]) for name in ("scores", "keep")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 8])],
        [numpy_helper.from_array(np.array(low, np.float32), "low")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


def seen(low: float, high: float) -> Range:
    return Range(low, high, low, high)


@pytest.mark.parametrize("low", [-3.4e38, -1e9, -10000.0])
@pytest.mark.parametrize("masks", [True, False])
def test_both_saturate_below_the_lowest_score(low: float, masks: bool) -> None:
    """Whether or not calibration data had anything to mask."""
    model = attention(low)
    ranges = {"scores": seen(-3, 5), "keep": seen(0, 1), "mask": seen(low if masks else 0, 0)}
    ranges["masked"] = seen(ranges["mask"].low - 3, 5)
    found = unmasked_ranges(model.graph, ranges)
    assert (found["masked"].low, found["masked"].high) == (-3 - MARGIN, 5)
    assert found["mask"].high == 0
    assert found["mask"].low + 5 <= found["masked"].low, "the highest score reaches the bottom"
    assert (found["scores"], found["keep"]) == (ranges["scores"], ranges["keep"])


@pytest.mark.parametrize(
    ("model", "mask"),
    [
        (attention(-2.0), seen(-2, 0)),
        (attention(-1e9, reader="Relu"), seen(-1e9, 0)),
        (attention(-1e9, made_by="Identity"), seen(0, 0)),
    ],
)
def test_leaves_other_sums_alone(model: ir.Model, mask: Range) -> None:
    ranges = {"scores": seen(-3, 5), "mask": mask, "masked": seen(mask.low - 3, 5)}
    assert unmasked_ranges(model.graph, ranges) == ranges


def test_a_mask_serves_several_layers() -> None:
    """It reaches the bottom of the one with the widest scores."""
    graph = attention(-1e9).graph
    more = ir.node(
        "Add", [graph.inputs[1], graph.node("mask").outputs[0]], outputs=[ir.Value(name="masked2")], name="m2"
    )
    graph.extend([more, ir.node("Softmax", more.outputs, outputs=[ir.Value(name="y2")], name="reader2")])
    graph.outputs.append(graph.node("reader2").outputs[0])
    for scores, keep in ((seen(-3, 5), seen(-10, 20)), (seen(-10, 20), seen(-3, 5))):
        ranges = {
            "scores": scores,
            "keep": keep,
            "mask": seen(-1e9, 0),
            "masked": seen(-1e9, 5),
            "masked2": seen(-1e9, 20),
        }
        assert unmasked_ranges(graph, ranges)["mask"].low == -38


def test_scores_that_stay_masked_are_known() -> None:
    (*_, softmax) = attention(-1e9).graph
    assert is_masked(softmax, {"masked": seen(-1e9, 5)})
    assert not is_masked(softmax, {"masked": seen(-11, 5)})
