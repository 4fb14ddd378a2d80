"""Small float models written as ONNX text, and onnxruntime to run them."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler.graph import shape_of, value_name

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
