"""NHWC operators keep no Transposes between them, and the integers stay the same."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.graph import make_node, nodes_of, shape_of
from qcompiler.integer import reference
from qcompiler.integer.realize import realize
from qcompiler.passes.cancel_layout_transposes import CancelLayoutTransposes
from qcompiler.passes.rewriting import infer_types
from qcompiler.target_loader import load_target
from qcompiler.verify import verify, verify_shapes

TARGET = load_target("systolic-npu")


def conv(g, x: str, ins: int, outs: int, **attributes: object) -> str:
    """Quantized 3x3 convolution with Relu, in and out float."""
    y = g.op("Conv", x, g.int8_weight(outs, ins, 3, 3), pads=[1, 1, 1, 1], **attributes)
    return g.qdq(g.op("Relu", y), 0.05, -100)


def execute(model: ir.Model, seed: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        feeds[value.name or ""] = (
            rng.standard_normal(shape_of(value)).astype(np.float32)
            if value.dtype == ir.DataType.FLOAT
            else rng.integers(-128, 128, shape_of(value)).astype(np.int8)
        )
    return list(reference.execute(model, feeds).values())


def cancel(model: ir.Model, transposes: int) -> ir.Model:
    """Realize, run the pass, and check integers, count, form and fixpoint."""
    before = realize(model, TARGET)
    after = before.clone()
    CancelLayoutTransposes()(after)
    verify(after, "the pass")
    verify_shapes(after, "the pass")
    for old, new in zip(execute(before), execute(after), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(old, new)
        assert len(np.unique(old)) > 2
    assert len(nodes_of(after.graph, "Transpose")) == transposes
    settled = ir.to_proto(after).SerializeToString()
    assert not CancelLayoutTransposes()(after).modified
    assert ir.to_proto(after).SerializeToString() == settled
    return after


def test_residual_block_keeps_one_at_each_end(net) -> None:
    g = net()
    x = conv(g, g.qdq(g.input(1, 3, 8, 6)), 3, 4)
    y = g.qdq(g.op("Add", x, conv(g, x, 4, 4)), 0.06)
    cancel(g.model(g.op("Sigmoid", y)), 2)


def test_nhwc_name_and_public_name(net) -> None:
    g = net()
    y = conv(g, g.qdq(g.input(1, 3, 8, 6)), 3, 4)
    after = cancel(g.model(conv(g, y, 4, 2)), 2)
    first, second = nodes_of(after.graph, "QConv", domain="qcompiler")
    assert second.inputs[0] is first.outputs[0]
    assert (first.outputs[0].name or "").endswith(".nhwc")


# Each makes [1, n, h, w] out of a quantized [1, 4, 8, 6] and says how many channels it has.
BETWEEN: dict[str, Callable[..., tuple[str, int]]] = {
    "lookup": lambda g, x: (g.qdq(g.op("Sigmoid", x), 0.004, -128), 4),
    "requantize": lambda g, x: (g.qdq(x, 0.07), 4),
    "clip": lambda g, x: (g.qdq(g.op("Clip", x, g.const(0.0), g.const(1.0)), 0.05, -100), 4),
    "concat": lambda g, x: (g.qdq(g.op("Concat", x, conv(g, x, 4, 3), x, axis=1), 0.05, -100), 11),
    "concat of constants": lambda g, x: (g.qdq(g.op("Concat", x, g.weight(1, 2, 8, 6), axis=1), 0.05, -100), 6),
    "split": lambda g, x: (g.op("Split", x, axis=-3, num_outputs=1), 4),
    "slice": lambda g, x: (g.op("Slice", x, g.const([1, 0], np.int64), g.const([4, 6], np.int64),
                                g.const([1, -1], np.int64), g.const([1, 2], np.int64)), 3),
    "slice of leading axes": lambda g, x: (g.op("Slice", x, g.const([0, 1], np.int64), g.const([1, 3], np.int64)), 2),
    "pad": lambda g, x: (g.op("Pad", x, g.const([0, 1, 2, 0, 0, 0, 1, 3], np.int64)), 5),
    "pad some axes": lambda g, x: (g.op("Pad", x, g.const([1, 2, 3, 0], np.int64), "", g.const([1, -1], np.int64)), 8),
    "gather": lambda g, x: (g.op("Gather", x, g.const([2, 0, 2], np.int64), axis=1), 3),
    "scalar": lambda g, x: (g.qdq(g.op("Mul", x, g.const(0.3)), 0.02), 4),
    "per channel": lambda g, x: (g.qdq(g.op("Mul", x, g.weight(4, 1, 1)), 0.05), 4),
    "plane": lambda g, x: (g.qdq(g.op("Add", g.weight(8, 6), x), 0.05), 4),
    "softmax over channels": lambda g, x: (g.qdq(g.op("Softmax", x, axis=1), 0.004, -128), 4),
    "mean over channels": lambda g, x: (g.qdq(g.op("ReduceMean", x, g.const([1], np.int64)), 0.05, -100), 1),
    "squeeze and excite": lambda g, x: (
        g.qdq(g.op("Mul", x, g.qdq(g.op("Sigmoid", conv(g, g.qdq(g.op("GlobalAveragePool", x)), 4, 4)), 0.004)), 0.05),
        4,
    ),
    "scale from a product": lambda g, x: (
        g.qdq(g.op("Mul", x, g.op("Reshape", g.qdq(g.op("MatMul", g.op("Reshape", g.qdq(g.op("GlobalAveragePool", x)),
            g.const([1, 4], np.int64)), g.int8_weight(4, 4))), g.const([1, 4, 1, 1], np.int64))), 0.05), 4,
    ),
    "shuffle": lambda g, x: (
        g.op("Reshape", g.op("Transpose", g.op("Reshape", x, g.const([1, 2, 2, 8, 6], np.int64)),
                             perm=[0, 2, 1, 3, 4]), g.const([1, 4, 8, 6], np.int64)), 4,
    ),
    "depth to space": lambda g, x: (g.op("DepthToSpace", x, blocksize=2), 1),
    "pool": lambda g, x: (g.op("MaxPool", x, kernel_shape=[2, 2]), 4),
    "resize": lambda g, x: (g.op("Resize", x, "", g.const([1, 1, 2, 2]), mode="nearest"), 4),
}  # fmt: skip
INNER = {"shuffle": 1, "depth to space": 1}
"""Transposes that move data whatever the layout."""


@pytest.mark.parametrize("between", list(BETWEEN))
def test_operators_between_convolutions(net, between) -> None:
    g = net(4)
    y, channels = BETWEEN[between](g, conv(g, g.qdq(g.input(1, 3, 8, 6)), 3, 4))
    cancel(g.model(conv(g, y, channels, 3)), 2 + INNER.get(between, 0))


def test_arg_max_over_channels(net) -> None:
    g = net(5)
    x = conv(g, g.qdq(g.input(1, 3, 8, 6)), 3, 5)
    cancel(g.model(g.op("ArgMax", x, axis=1, keepdims=0)), 1)


def test_mean_and_index_that_drop_axes(net) -> None:
    g = net(6)
    x = conv(g, g.qdq(g.input(1, 3, 8, 6)), 3, 5)
    mean = g.qdq(g.op("ReduceMean", x, g.const([2, 3], np.int64), keepdims=0), 0.02, -100)
    row = g.op("Gather", x, g.const(2, np.int64), axis=2)
    # The mean is [1, 5] in either layout; the row must go from [1, 6, 5] to [1, 5, 6].
    cancel(g.model(mean, g.qdq(row, 0.06)), 2)


def test_gemm_reads_a_flattened_map_through_its_weights(net) -> None:
    g = net(7)
    x = conv(g, g.qdq(g.input(1, 3, 8, 6)), 3, 4)
    flat = g.op("Reshape", x, g.const([1, -1], np.int64))
    y = g.qdq(g.op("MatMul", flat, g.int8_weight(192, 7)), 0.5)
    z = g.qdq(g.op("MatMul", flat, g.int8_weight(192, 5)), 0.5)
    cancel(g.model(y, z), 1)


def test_flatten_that_something_else_reads_keeps_its_order(net) -> None:
    g = net(8)
    x = conv(g, g.qdq(g.input(1, 3, 8, 6)), 3, 4)
    flat = g.op("Reshape", x, g.const([1, -1], np.int64))
    cancel(g.model(g.qdq(g.op("MatMul", flat, g.int8_weight(192, 7)), 0.5), g.qdq(flat, 0.06)), 2)


def test_one_channel_needs_no_transpose(net) -> None:
    g = net(9)
    x = conv(g, g.qdq(g.input(1, 1, 8, 6)), 1, 4)
    y = g.qdq(g.op("GlobalAveragePool", x), 0.02)
    cancel(g.model(y), 0)


# --- what must stay ------------------------------------------------------------------------------------------


def test_softmax_over_rows_keeps_its_transposes(net) -> None:
    g = net(10)
    x = conv(g, g.qdq(g.input(1, 3, 8, 6)), 3, 4)
    y = g.qdq(g.op("Softmax", x, axis=3), 0.004, -128)
    # In, to rows last, back, and out.
    cancel(g.model(conv(g, y, 4, 2)), 4)


def test_float_transposes_and_inputs_are_left_alone(net) -> None:
    g = net(11)
    x = g.input(1, 3, 8, 6)
    y = g.op("Exp", g.op("Transpose", g.op("Relu", x), perm=[0, 2, 3, 1]))
    model = g.model(y)
    before = ir.to_proto(model).SerializeToString()
    assert not CancelLayoutTransposes()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


# --- any Transpose and Reshape -----------------------------------------------------------------------------


def fresh(index: int, shape: tuple[int, ...]) -> ir.Value:
    return ir.Value(name=f"v{index}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT8))


@st.composite
def chains(draw: st.DrawFn) -> ir.Model:
    """Two to five Transposes and Reshapes of int8."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=5))
    shape = tuple(factors)
    first = value = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT8))
    nodes, constants = [], []
    for index in range(draw(st.integers(2, 5))):
        if draw(st.booleans()):
            perm = draw(st.permutations(range(len(shape))))
            shape = tuple(shape[axis] for axis in perm)
            node = make_node("Transpose", [value], [fresh(index, shape)], {"perm": tuple(perm)})
        else:
            shape = draw(regrouped(shape))
            dims = ir.tensor(np.array(shape, np.int64), name=f"d{index}")
            constants.append(
                ir.Value(
                    name=f"d{index}", shape=ir.Shape((len(shape),)), type=ir.TensorType(dims.dtype), const_value=dims
                )
            )
            node = make_node("Reshape", [value, constants[-1]], [fresh(index, shape)])
        nodes.append(node)
        value = node.outputs[0]
    graph = ir.Graph([first], [value], nodes=nodes, initializers=constants, opset_imports={"": 21}, name="chain")
    return ir.Model(graph, ir_version=10)


@st.composite
def regrouped(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same elements in other axes: neighbours merged, factors split off."""
    numbers = [int(factor) for size in shape for factor in ([2, 2] if size == 4 else [2, 3] if size == 6 else [size])]
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(numbers) - 1)), max_size=4)))
    parts = np.split(np.array(numbers), [cut for cut in cuts if cut < len(numbers)])
    dims = [int(np.prod(part)) for part in parts]
    if draw(st.booleans()):
        dims.insert(draw(st.integers(0, len(dims))), 1)
    return tuple(dims)


@settings(max_examples=150, deadline=None)
@given(chains())
def test_any_chain_means_the_same(model: ir.Model) -> None:
    (want,) = execute(model)
    count = len(nodes_of(model.graph, "Transpose"))
    CancelLayoutTransposes()(model)
    (got,) = execute(model)
    np.testing.assert_array_equal(got, want)
    assert got.shape == want.shape
    assert len(nodes_of(model.graph, "Transpose")) <= count
    assert not CancelLayoutTransposes()(model).modified


def test_floats_between_layers() -> None:
    """x → NCHW → Relu → Add → DynamicQuantizeLinear → NHWC: no Transpose is left, and nothing changes."""
    rng = np.random.default_rng(2)
    x = ir.Value(name="x", shape=ir.Shape((1, 4, 5, 3)), type=ir.TensorType(ir.DataType.FLOAT))
    other = ir.Value(name="other", shape=ir.Shape((1, 4, 5, 3)), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x, other], [], nodes=[], opset_imports={"": 21}, name="floats")

    def op(op_type: str, inputs: list[ir.Value], count: int = 1, **attributes: tuple[int, ...]) -> list[ir.Value]:
        outputs = [ir.Value(name=f"{op_type}{len(graph)}_{index}") for index in range(count)]
        node = make_node(op_type, inputs, outputs, dict(attributes))
        infer_types(node)
        graph.append(node)
        return outputs

    (first,), (second,) = (op("Transpose", [value], perm=(0, 3, 1, 2)) for value in (x, other))
    (added,) = op("Add", [op("Relu", [first])[0], second])
    integers, scale, zero_point = op("DynamicQuantizeLinear", [added], 3)
    graph.outputs.extend([op("Transpose", [integers], perm=(0, 2, 3, 1))[0], scale, zero_point])
    before = ir.Model(graph, ir_version=10)
    after = before.clone()
    assert CancelLayoutTransposes()(after).modified and not nodes_of(after.graph, "Transpose")
    verify(after, "the pass")
    verify_shapes(after, "the pass")
    feeds = {name: rng.standard_normal((1, 4, 5, 3)).astype(np.float32) for name in ("x", "other")}
    wanted, got = (list(reference.execute(model, feeds).values()) for model in (before, after))
    for old, new in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(old, new)
    assert not CancelLayoutTransposes()(after).modified
