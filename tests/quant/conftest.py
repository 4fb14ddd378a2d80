"""Small float models written as ONNX text, and onnxruntime to run them."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler.calibrate import calibrate
from qcompiler.graph import const_of, data_input, shape_of, value_name
from qcompiler.quant.formats import bias_format, weight_format
from qcompiler.quant.plan import plan as make_plan
from qcompiler.quant.types import QuantPlan
from qcompiler.target_loader import load_target

NET = """g (float[1,3,16,16] x) => (float[1,10] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    d = Conv<pads=[1,1,1,1], group=16>(r, w2, b2)
    s = Relu(d)
    p = Conv(s, w3, b3)
    t = Relu(p)
    m = GlobalAveragePool(t)
    f = Flatten(m)
    y = Gemm(f, w4, b4)
}"""
SHAPES = {"w1": (16, 3, 3, 3), "b1": (16,), "w2": (16, 1, 3, 3), "b2": (16,), "w3": (24, 16, 1, 1), "b3": (24,),
          "w4": (24, 10), "b4": (10,)}  # fmt: skip
"""Plain, depthwise and pointwise convolutions, and a classifier."""

Constants = Mapping[str, tuple[int, ...] | np.ndarray | np.generic]
Parse = Callable[[str, Constants], ir.Model]


def parse_model(text: str, constants: Constants) -> ir.Model:
    """A model as the importer leaves it: `text` is a graph, `constants` are arrays, or shapes of random ones.

    Constants that nothing reads are left out, and outputs need no type. Nodes are named after their first output.
    """
    rng = np.random.default_rng(7)
    graph = onnx.parser.parse_graph(text)
    read = {name for node in graph.node for name in node.input}
    for name, given in constants.items():
        if name not in read:
            continue
        array = 0.3 * rng.standard_normal(given).astype(np.float32) if isinstance(given, tuple) else given
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    for node in graph.node:
        node.name = node.output[0]
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def run_model(model: ir.Model, feeds: Mapping[str, np.ndarray], *, optimize: bool = False) -> list[np.ndarray]:
    """The model's outputs in onnxruntime, by default without its own rewrites."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return [np.asarray(output) for output in session.run(None, dict(feeds))]


class Samples:
    """Random samples of a model's single float input, as a `Dataset` would yield them."""

    def __init__(self, model: ir.Model, count: int, *, seed: int = 0, spread: float = 1.0, synthetic: bool = False):
        (value,) = model.graph.inputs
        rng = np.random.default_rng(seed)
        name, shape = value_name(value), shape_of(value)
        self.arrays = [{name: (spread * rng.standard_normal(shape)).astype(np.float32)} for _ in range(count)]
        self.synthetic = synthetic

    def __len__(self) -> int:
        return len(self.arrays)

    def __iter__(self):
        return iter(self.arrays)


@pytest.fixture
def parse() -> Parse:
    return parse_model


@pytest.fixture
def run() -> Callable[..., list[np.ndarray]]:
    return run_model


@pytest.fixture
def samples() -> type[Samples]:
    return Samples


@pytest.fixture
def network() -> tuple[str, Constants]:
    """The text of a small network, and the shapes of its constants."""
    return NET, SHAPES


@pytest.fixture(scope="module")
def four_bits() -> tuple[ir.Model, QuantPlan, Samples]:
    """A small network, a plan with 4-bit weights for it, and calibration data."""
    model = parse_model(NET, SHAPES)
    data = Samples(model, 32)
    full = make_plan(model, calibrate(model, data), load_target("systolic-npu"))
    weights, biases = dict(full.weights), dict(full.biases)
    for node in model.graph:
        if node.name in biases:
            source, given = data_input(node), data_input(node, 1)
            name, array = value_name(given), const_of(given)
            assert array is not None
            weights[name] = weight_format(array, "int4", full.weights[name].axis, symmetric=True, narrow=True)
            biases[node.name or ""] = bias_format(full.activations[value_name(source)].scale, weights[name])
    return model, replace(full, weights=weights, biases=biases), data
