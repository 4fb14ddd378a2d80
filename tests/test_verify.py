"""The verifier passes sound models and names what is broken in others."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import graph as g
from qcompiler.importer import import_onnx
from qcompiler.verify import VerificationError, verify, verify_shapes

FLOAT = ir.DataType.FLOAT


def sound() -> ir.Model:
    """y = relu(x @ w)"""
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(FLOAT))
    hidden = ir.Value(name="h", shape=ir.Shape([2, 4]), type=ir.TensorType(FLOAT))
    y = ir.Value(name="y", shape=ir.Shape([2, 4]), type=ir.TensorType(FLOAT))
    graph = ir.Graph([x], [y], nodes=[], opset_imports={"": 21}, name="g")
    weight = g.add_initializer(graph, "w", np.ones((3, 4), np.float32))
    graph.append(g.make_node("MatMul", [x, weight], [hidden], name="product"))
    graph.append(g.make_node("Relu", [hidden], [y], name="relu"))
    return ir.Model(graph, ir_version=10)


def test_a_sound_model() -> None:
    verify(sound(), "test")
    verify_shapes(sound(), "test")


def lose_shape(model: ir.Model) -> None:
    model.graph.node("product").outputs[0].shape = None


def lose_static_size(model: ir.Model) -> None:
    model.graph.node("product").outputs[0].shape = ir.Shape(["N", 4])


def lose_type(model: ir.Model) -> None:
    model.graph.node("product").outputs[0].type = None


def swap(model: ir.Model) -> None:
    relu = model.graph.node("relu")
    model.graph.remove(relu)
    model.graph.insert_before(model.graph.node("product"), relu)


def dangle(model: ir.Model) -> None:
    stray = ir.Value(name="stray", shape=ir.Shape([2, 4]), type=ir.TensorType(FLOAT))
    model.graph.node("relu").replace_input_with(0, stray)


def same_node_names(model: ir.Model) -> None:
    model.graph.node("relu").name = "product"


def unnamed_node(model: ir.Model) -> None:
    model.graph.node("relu").name = None


def same_value_names(model: ir.Model) -> None:
    model.graph.outputs[0].name = "h"


def empty_constant(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = None


def unknown_attribute(model: ir.Model) -> None:
    model.graph.node("relu").attributes["slope"] = ir.AttrInt64("slope", 1)


def missing_input(model: ir.Model) -> None:
    model.graph.node("product").resize_inputs(1)


def foreign_domain(model: ir.Model) -> None:
    model.graph.node("relu").domain = "qcompiler"


def lost_output(model: ir.Model) -> None:
    model.graph.outputs[0] = ir.Value(name="z", shape=ir.Shape([2, 4]), type=ir.TensorType(FLOAT))


BREAKS: tuple[tuple[Callable[[ir.Model], None], str], ...] = (
    (lose_shape, r"node 'product' \(MatMul\): 'h' has no static shape"),
    (lose_static_size, r"node 'product' \(MatMul\): 'h' has no static shape"),
    (lose_type, r"node 'product' \(MatMul\): 'h' has no type"),
    (swap, r"node 'relu' \(Relu\) reads 'h', but it is made later"),
    (dangle, r"node 'relu' \(Relu\) reads 'stray', but nothing in the graph makes it"),
    (same_node_names, "another node has that name"),
    (unnamed_node, "a Relu has no name"),
    (same_value_names, "two values are named 'h'"),
    (empty_constant, "initializer 'w' has no constant"),
    (unknown_attribute, r"node 'relu' \(Relu\): .*slope"),
    (missing_input, r"node 'product' \(MatMul\): "),
    (foreign_domain, "domain 'qcompiler', which the model does not import"),
    (lost_output, "nothing makes the graph output 'z'"),
)


@pytest.mark.parametrize(("spoil", "message"), BREAKS, ids=[spoil.__name__ for spoil, _ in BREAKS])
def test_broken_models(spoil: Callable[[ir.Model], None], message: str) -> None:
    model = sound()
    spoil(model)
    with pytest.raises(VerificationError, match=f"after some pass: .*{message}|after some pass: {message}"):
        verify(model, "some pass")


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [([2, 5], FLOAT, r"'h' is recorded as \(2, 5\), but is \(2, 4\)"), ([2, 4], ir.DataType.INT32, "'h' is recorded")],
)
def test_recorded_shapes_and_types_that_are_wrong(shape: list[int], dtype: ir.DataType, message: str) -> None:
    model = sound()
    hidden = model.graph.node("product").outputs[0]
    hidden.shape, hidden.type = ir.Shape(shape), ir.TensorType(dtype)
    with pytest.raises(VerificationError, match=message):
        verify_shapes(model, "stage")


def test_our_own_operators_are_taken_at_their_word() -> None:
    model = sound()
    model.graph.opset_imports["qcompiler"] = 1
    product = model.graph.node("product")
    product.domain, product.op_type = "qcompiler", "QGemm"
    verify(model, "test")
    verify_shapes(model, "test")
    model.graph.outputs[0].shape = ir.Shape([2, 5])
    with pytest.raises(VerificationError, match=r"'y' is recorded as \(2, 5\), but is \(2, 4\)"):
        verify_shapes(model, "test")


def test_verification_is_cheap(zoo: Path) -> None:
    model = import_onnx(zoo / "models" / "mobilenet_v1_025_128.onnx")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        verify(model, "test")
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05  # about 2 ms; the bound allows for a busy machine
