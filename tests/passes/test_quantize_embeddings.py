import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from qcompiler.graph import data_input, dtype_of, nodes_of
from qcompiler.passes.quantize_embeddings import LEAST_ROWS, QuantizeEmbeddings


def embedding(rows: int, axis: int = 0) -> ir.Model:
    rng = np.random.default_rng(51)
    table = (rng.standard_normal((rows, rows if axis else 24)) * rng.uniform(0.01, 10, (rows, 1))).astype(np.float32)
    table[3] = 0
    shape = [2, 5, table.shape[1]] if axis == 0 else [rows, 2, 5]
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "ids"], ["y"], name="words", axis=axis)],
        "embedding",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [2, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(table, "table")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def run(model: ir.Model, ids: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"ids": ids})[0])


def test_rows_are_stored_in_eight_bits() -> None:
    model = embedding(LEAST_ROWS)
    assert QuantizeEmbeddings()(model).modified
    codes, scales = nodes_of(model.graph, "Gather")
    assert dtype_of(data_input(codes)) == np.int8 and dtype_of(data_input(scales)) == np.float32
    assert codes.name == "words" and "table" not in model.graph.initializers
    assert [node.op_type for node in model.graph] == ["Gather", "Cast", "Gather", "Mul"]


def test_every_row_keeps_eight_bits_of_its_own() -> None:
    model, exact = embedding(300), embedding(300)
    QuantizeEmbeddings()(model)
    ids = np.array([[0, 3, 299, 17, 5], [1, 2, 150, 3, 3]])
    got, wanted = run(model, ids), run(exact, ids)
    assert (np.abs(got - wanted) <= np.abs(wanted).max(axis=-1, keepdims=True) / 253).all()
    assert (got != wanted).any() and not got[0, 1].any()


def test_runs_once() -> None:
    model = embedding(400)
    QuantizeEmbeddings()(model)
    assert not QuantizeEmbeddings()(model).modified


def test_leaves_others_alone() -> None:
    assert not QuantizeEmbeddings()(embedding(LEAST_ROWS - 1)).modified
    assert not QuantizeEmbeddings()(embedding(300, axis=1)).modified
    assert not QuantizeEmbeddings(["words"])(embedding(300)).modified
