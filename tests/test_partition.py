"""Regions over random graphs, and islands, against the properties that define them."""

import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.graph import make_node
from qcompiler.integer import ops
from qcompiler.partition import Partition, partition
from qcompiler.target import OpRule, Target
from qcompiler.target_loader import load_target

BASE = load_target("systolic-npu")
assert BASE.npu is not None


def target_for(*supported: str) -> Target:
    """The systolic target with one rule, for these operators."""
    assert BASE.npu is not None
    rule = OpRule(ops=supported, engine="vpu", precisions=("int8",))
    return BASE.model_copy(update={"npu": BASE.npu.model_copy(update={"rules": (rule,)})})


def value(name: str, shape: tuple[int, ...] = (1, 4, 4, 8)) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT8))


def lookup(name: str, source: ir.Value, graph_table: ir.Value) -> ir.Node:
    return ops.QLookup("Test").node([source, graph_table], value(f"{name}_out", tuple(source.shape or ())), name)  # type: ignore[arg-type]


@st.composite
def graphs(draw: st.DrawFn) -> ir.Model:
    """Up to 24 nodes of "Max" (supported) and "Min" (not), each reading one to three earlier values."""
    count = draw(st.integers(1, 24))
    values = [value("x0"), value("x1")]
    nodes: list[ir.Node] = []
    for index in range(count):
        picks = draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3, unique=True))
        op_type = draw(st.sampled_from(["Max", "Min"]))
        nodes.append(make_node(op_type, [values[pick] for pick in picks], [value(f"v{index}")], name=f"n{index}"))
        values.append(nodes[-1].outputs[0])
    outputs = [node.outputs[0] for node in nodes if not node.outputs[0].uses()]
    extra = draw(st.sampled_from(nodes)).outputs[0]
    outputs += [extra] if extra not in outputs else []
    graph = ir.Graph(values[:2], outputs, nodes=nodes, opset_imports={"": 21}, name="random")
    return ir.Model(graph, ir_version=10)


def check(model: ir.Model, parts: Partition) -> None:
    """What every partition must satisfy."""
    nodes = [node for region in parts.regions for node in region.nodes]
    assert len(nodes) == len(set(nodes)) and set(nodes) == set(model.graph)
    assert [placement.node for placement in parts.placements] == [node.name for node in model.graph]
    backend = {placement.node: placement.backend for placement in parts.placements}
    available = set(model.graph.inputs)
    for region in parts.regions:
        assert all(backend[node.name or ""] == region.backend for node in region.nodes)
        assert set(region.inputs) <= available, "a region reads what no earlier one made"
        made = {output for node in region.nodes for output in node.outputs}
        seen: set[ir.Value] = set(region.inputs)
        for node in region.nodes:
            assert all(read in seen for read in node.inputs if read is not None)
            seen |= set(node.outputs)
        needed = {
            out for out in made if out.is_graph_output() or any(use.node not in region.nodes for use in out.uses())
        }
        assert set(region.outputs) == needed and len(region.outputs) == len(needed)
        available |= set(region.outputs)
    assert len({region.name for region in parts.regions}) == len(parts.regions)
    assert not has_cycle([set(region.nodes) for region in parts.regions])


def has_cycle(groups: list[set[ir.Node]]) -> bool:
    """Whether groups of nodes read from each other in a circle."""
    owner = {node: index for index, group in enumerate(groups) for node in group}
    edges = {
        (owner[node], owner[use.node])
        for node in owner
        for out in node.outputs
        for use in out.uses()
        if owner[node] != owner[use.node]
    }
    waiting = set(range(len(groups)))
    while ready := {group for group in waiting if not any(a in waiting and b == group for a, b in edges)}:
        waiting -= ready
    return bool(waiting)


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_regions_cover_once_in_order_and_are_maximal(model: ir.Model) -> None:
    parts = partition(model, target_for("Max"), keep_islands=True)
    check(model, parts)
    for placement in parts.placements:
        assert (placement.backend, placement.engine) == (("npu", "vpu") if placement.op == "Max" else ("cpu", "cpu"))
        assert (placement.reason is None) == (placement.op == "Max")
    for i, first in enumerate(parts.regions):
        for last in parts.regions[i + 1 :]:
            if first.backend == last.backend:
                others = [set(region.nodes) for region in parts.regions if region not in (first, last)]
                merged = [*others, {*first.nodes, *last.nodes}]
                assert has_cycle(merged), "two regions could have been one"


@settings(max_examples=40, deadline=None)
@given(graphs())
def test_giving_islands_back_keeps_the_properties(model: ir.Model) -> None:
    parts = partition(model, target_for("Max"))
    check(model, parts)
    for placement in parts.placements:
        assert placement.backend == "cpu" or placement.op == "Max"
        assert (placement.reason is None) == (placement.backend == "npu")


def chain(*op_types: str) -> ir.Model:
    values = [value("x")]
    nodes = []
    for index, op_type in enumerate(op_types):
        nodes.append(make_node(op_type, [values[-1]], [value(f"v{index}")], name=f"{op_type}{index}"))
        values.append(nodes[-1].outputs[0])
    graph = ir.Graph([values[0]], [values[-1]], nodes=nodes, opset_imports={"": 21}, name="chain")
    return ir.Model(graph, ir_version=10)


def test_names_and_order_of_a_chain() -> None:
    parts = partition(chain("Min", "Max", "Max", "Min", "Max"), target_for("Max"), keep_islands=True)
    assert [region.name for region in parts.regions] == ["cpu_0", "npu_1", "cpu_2", "npu_3"]
    assert [len(region.nodes) for region in parts.regions] == [1, 2, 1, 1]
    assert parts.placements[0].reason == "systolic-npu has no rule for Min"


def test_backend_refusal_becomes_the_reason() -> None:
    parts = partition(
        chain("Max", "Max"),
        target_for("Max"),
        can_run=lambda node, accelerator: "does not fit the scratchpad" if node.name == "Max1" else None,
        keep_islands=True,
    )
    assert [(p.backend, p.reason) for p in parts.placements] == [("npu", None), ("cpu", "does not fit the scratchpad")]


def test_without_accelerator_there_is_one_region_and_no_reason() -> None:
    parts = partition(chain("Min", "Max"), BASE.model_copy(update={"npu": None}))
    assert [region.backend for region in parts.regions] == ["cpu"]
    assert all(placement.reason is None for placement in parts.placements)


def lookup_model(side: int) -> ir.Model:
    """One QLookup on a map of side x side x 64."""
    table = ir.Value(name="t", shape=ir.Shape((256,)), type=ir.TensorType(ir.DataType.INT8))
    table.const_value = ir.tensor(np.zeros(256, np.int8), name="t")
    source = value("x", (1, side, side, 64))
    node = lookup("layer", source, table)
    graph = ir.Graph([source], [node.outputs[0]], nodes=[node], initializers=[table], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


def conv_model(side: int, channels: int) -> ir.Model:
    x, y = value("x", (1, side, side, channels)), value("y", (1, side, side, channels))
    inputs = [x]
    for name, array in (
        ("w", np.ones((channels, 3, 3, channels), np.int8)),
        ("b", np.zeros(channels, np.int32)),
        ("m", np.ones(channels, np.int32)),
        ("s", np.zeros(channels, np.int32)),
    ):
        tensor = ir.tensor(array, name=name)
        inputs.append(
            ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    op = ops.QConv((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 0, 0, 0, -128, 127, "tosa")
    graph = ir.Graph(
        [x], [y], nodes=[op.node(inputs, y, "conv")], initializers=inputs[1:], opset_imports={"": 21}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def test_small_island_goes_back_and_says_what_it_costs() -> None:
    (placement,) = partition(lookup_model(2), target_for("Lookup")).placements
    assert placement.backend == "cpu"
    match = re.fullmatch(r"supported, but crossing costs ([\d.]+) µs and saves ([\d.]+) µs", placement.reason or "")
    assert match is not None and float(match.group(1)) > float(match.group(2))
    (kept,) = partition(lookup_model(2), target_for("Lookup"), keep_islands=True).placements
    assert (kept.backend, kept.engine, kept.precision) == ("npu", "vpu", "int8")


def test_large_convolution_stays() -> None:
    (placement,) = partition(conv_model(56, 64), BASE).placements
    assert (placement.op, placement.backend, placement.engine, placement.precision) == (
        "Conv",
        "npu",
        "mxu",
        "int8*int8",
    )
    assert placement.reason is None


@pytest.mark.parametrize("name", ["arm-npu", "ethos-u55-32", "ethos-u65-512", "systolic-npu"])
def test_every_bundled_accelerator_prices_a_convolution(name: str) -> None:
    parts = partition(conv_model(32, 32), load_target(name))
    assert [region.backend for region in parts.regions] == ["npu"]


def test_the_transpose_of_an_nchw_input_stays_on_the_cpu() -> None:
    model = conv_model(32, 32)
    (x,) = model.graph.inputs
    source, moved = value("nchw", (1, 32, 32, 32)), value("nhwc", (1, 32, 32, 32))
    transpose = make_node("Transpose", [source], [moved], {"perm": [0, 2, 3, 1]}, name="to_nhwc")
    x.replace_all_uses_with(moved)
    model.graph.inputs[0] = source
    model.graph.insert_before(model.graph[0], transpose)
    target = load_target("arm-npu")
    placement, conv = partition(model, target).placements
    assert (placement.backend, conv.backend) == ("cpu", "npu")
    match = re.fullmatch(
        r"supported, but takes ([\d.]+) µs there and ([\d.]+) µs on the CPU .*", placement.reason or ""
    )
    assert match is not None and float(match.group(1)) > float(match.group(2))
    kept = partition(model, target, keep_islands=True).placements
    assert [item.backend for item in kept] == ["npu", "npu"]
