"""What repair and search learn from inside models."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from qcompiler.quant.moments import Moments, Tap, collect
from qcompiler.quant.quantize import quantize


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


def test_moments_of_parts_join(four_bits):
    """As if all rows had been seen at once."""
    model, plan, data = four_bits
    samples, layers = list(data), [node for node in model.graph if node.op_type == "Conv"]
    quantized = quantize(model, plan)
    whole = collect(model, quantized, layers, samples)
    first, second = (collect(model, quantized, layers, part) for part in (samples[:10], samples[10:]))
    for name, expected in whole.items():
        found = first[name].joined(second[name])
        assert found.rows == expected.rows == first[name].rows + second[name].rows
        for field in ("gram", "float_gram", "cross", "mean", "float_mean"):
            wanted = getattr(expected, field)
            np.testing.assert_allclose(getattr(found, field), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    assert isinstance(whole["a"], Moments)
