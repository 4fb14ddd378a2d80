"""What depends on constants alone is computed at compile time."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.graph import add_initializer, const_of, make_node
from qcompiler.integer import ops, reference
from qcompiler.passes.fold_integer_constants import FoldIntegerConstants

FORM = ir.TensorType(ir.DataType.INT8)


def value(name: str, *shape: int, kind: ir.TypeProtocol = FORM) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=kind)


@pytest.fixture
def model() -> ir.Model:
    """x + lookup(transpose(constant)), and a MatMul of dequantized x by a dequantized constant."""
    rng = np.random.default_rng(1)
    x, total = value("x", 3, 4), value("total", 3, 4)
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21, "qcompiler": 1}, name="g")

    def const(array: np.ndarray) -> ir.Value:
        return add_initializer(graph, "c", array)

    stored = const(rng.integers(-128, 128, (4, 3)).astype(np.int8))
    turned, looked = value("turned", 3, 4), value("looked", 3, 4)
    table = const(rng.integers(-128, 128, 256).astype(np.int8))
    graph.append(make_node("Transpose", [stored], [turned], {"perm": [1, 0]}))
    graph.append(ops.QLookup("Test").node([turned, table], looked, "lookup"))
    add = ops.QAdd(0, 0, 0, 0, 1 << 20, 0, 1 << 20, 0, 1, 21, -128, 127, "tosa")
    graph.append(add.node([x, looked], total, "add"))
    real = ir.TensorType(ir.DataType.FLOAT)
    weights, source = value("weights", 4, 3, kind=real), value("source", 3, 4, kind=real)
    product = value("product", 3, 3, kind=real)
    scale = const(np.array(0.1, np.float32))
    graph.append(make_node("DequantizeLinear", [stored, scale], [weights]))
    graph.append(make_node("DequantizeLinear", [x, scale], [source]))
    graph.append(make_node("MatMul", [source, weights], [product]))
    graph.outputs.extend([total, product])
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model) -> list[np.ndarray]:
    x = np.random.default_rng(2).integers(-128, 128, (3, 4)).astype(np.int8)
    return list(reference.execute(model, {"x": x}).values())


def test_chains_fold(model) -> None:
    assert FoldIntegerConstants()(model).modified
    assert [node.op_type for node in model.graph] == ["QAdd", "DequantizeLinear", "MatMul"]
    operand = const_of(next(iter(model.graph)).inputs[1])
    assert operand is not None and operand.dtype == np.int8 and operand.shape == (3, 4)


def test_results_stay(model) -> None:
    want = run(model)
    FoldIntegerConstants()(model)
    for old, new in zip(want, run(model), strict=True):
        np.testing.assert_array_equal(old, new)


def test_second_run_changes_nothing(model) -> None:
    FoldIntegerConstants()(model)
    before = ir.to_proto(model).SerializeToString()
    assert not FoldIntegerConstants()(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_constant_outputs_and_inputs_stay() -> None:
    x, out = value("x", 2), value("out", 2)
    constant_out = value("constant_out", 2)
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="g")
    stored = add_initializer(graph, "c", np.array([1, 2], np.int8))
    graph.append(make_node("Identity", [stored], [constant_out]))
    graph.append(make_node("Identity", [x], [out]))
    graph.outputs.extend([out, constant_out])
    model = ir.Model(graph, ir_version=10)
    assert not FoldIntegerConstants()(model).modified
    assert len(model.graph) == 2
