"""Scales and zero points travel with the integer graph."""

import numpy as np
import onnx_ir as ir

from qcompiler.graph import data_input, make_node, value_name
from qcompiler.integer.formats import TensorFormat, formats_of, record, recorded


def tensor(name: str, *shape: int, dtype: ir.DataType = ir.DataType.INT8) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def test_scales_come_back_exactly_through_a_file(tmp_path):
    x, y = tensor("x", 2, 3), tensor("y", 3, 2)
    scales = np.array([0.1, 1e-30, np.float32(1) / 3], np.float32)
    record(y, scales, -7)
    graph = ir.Graph([x], [y], nodes=[make_node("Transpose", [x], [y], {"perm": [1, 0]})], opset_imports={"": 21})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "g.onnx")
    loaded = ir.load(tmp_path / "g.onnx").graph.outputs[0]
    noted = recorded(loaded)
    assert noted is not None and noted.zero_point == -7
    np.testing.assert_array_equal(np.array(noted.scales, np.float32), scales)
    assert noted.scales == tuple(float(scale) for scale in scales)


def test_movement_shares_a_format_both_ways():
    x, moved, joined, other, out = (tensor(name, 4, 4) for name in "xmjoy")
    nodes = [
        make_node("Transpose", [x], [moved], {"perm": [1, 0]}),
        make_node("Concat", [moved, other], [joined], {"axis": 0}),
        make_node("Relu", [joined], [out]),
    ]
    record(joined, np.float32(0.5), 3)
    assert formats_of(nodes) == dict.fromkeys((x, moved, other, joined), TensorFormat((0.5,), 3))
    record(x, np.float32(0.25), 3)
    assert formats_of(nodes) == {x: TensorFormat((0.25,), 3)}, "tensors with two formats have none"


def test_realizing_records_every_quantized_tensor(qdq, run):
    g = qdq(1)
    x = g.op("MaxPool", g.input(1, 4, 8, 8, scale=0.1, zero=5), kernel_shape=[2, 2], strides=[2, 2])
    x = g.op("Concat", g.qdq(x, 0.1, 5), g.qdq(x, 0.1, 5), axis=1)
    y = g.qdq(g.op("Conv", x, g.weight(6, 8, 3, 3, axis=0)), 0.7, -9)
    y = g.quantize(g.op("Add", y, g.const(np.linspace(-1, 2, 6).reshape(6, 1, 1))), 0.3, 11)
    graph = run(g.model(y), "tflite").model.graph
    known = formats_of(graph)
    inner = [node for node in graph if node.op_type not in ("QuantizeLinear", "DequantizeLinear")]
    read = {value for node in inner for value in (*node.inputs, *node.outputs) if value is not None}
    eight_bits = {value for value in read if value.dtype == ir.DataType.INT8}
    assert eight_bits <= set(known), [value_name(value) for value in eight_bits - set(known)]
    (conv,) = (node for node in graph if node.op_type == "QConv")
    assert known[data_input(conv)] == TensorFormat((float(np.float32(0.1)),), 5)
    assert known[conv.outputs[0]] == TensorFormat((float(np.float32(0.7)),), -9)
    assert len(known[data_input(conv, 1)].scales) == 6
    assert known[graph.outputs[0]].zero_point == 11
