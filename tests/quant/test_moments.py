"""What repair and search learn from inside models."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from qcompiler.quant.moments import Tap


def test_weights_left_in_float_are_not_rounded() -> None:
    """Between quantized activations onnxruntime would store them in eight bits, one scale for all channels."""
    rng = np.random.default_rng(8)
    sizes = np.logspace(-3, 0, 6, dtype=np.float32)
    weights = rng.standard_normal((6, 5, 3, 3)).astype(np.float32) * sizes[:, None, None, None]
    constants = [
        numpy_helper.from_array(weights, "w"),
        numpy_helper.from_array(np.array(0.03, np.float32), "xs"),
        numpy_helper.from_array(np.array(0.01, np.float32), "ys"),
        numpy_helper.from_array(np.array(4, np.int8), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "z"], ["xd"]),
        helper.make_node("Conv", ["xd", "w"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "ys", "z"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "ys", "z"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, 8, 7])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6, 6, 5])
    graph = helper.make_graph(nodes, "float island", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feeds = {"x": rng.standard_normal((1, 5, 8, 7)).astype(np.float32)}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (wanted,) = exact.run(None, feeds)
    got = Tap(ir.from_proto(model), ["y"]).run(feeds)["y"]
    np.testing.assert_array_equal(got, np.asarray(wanted))
    assert len(np.unique(got)) > 20
