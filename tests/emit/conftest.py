"""Small float networks, quantized and realized for a target of TFLite's arithmetic, as one region."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompiler.calibrate import calibrate
from qcompiler.compile import EIGHT_BITS
from qcompiler.dataset import input_specs, synthetic
from qcompiler.graph import const_of, dtype_of, is_op, shape_of
from qcompiler.importer import import_onnx
from qcompiler.integer.realize import realize
from qcompiler.integer.reference import Executor
from qcompiler.partition import Region
from qcompiler.pipeline import LAYOUT, SIMPLIFY, harmonize, legalize, run_passes
from qcompiler.quant.plan import plan
from qcompiler.quant.quantize import quantize
from qcompiler.quant.types import WeightRequest
from qcompiler.target import Target
from qcompiler.target_loader import load_target

Attribute = int | float | str | list[int]


class Net:
    """A float ONNX graph written line by line; values are names."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.constants: list[onnx.TensorProto] = []

    def input(self, *shape: int) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        return name

    def const(self, array: object, dtype: str = "float32") -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.const(self.rng.normal(0, 0.4, shape))

    def op(self, op_type: str, *inputs: str, **attributes: Attribute) -> str:
        name = f"{op_type.lower()}{len(self.nodes)}"
        node = onnx.helper.make_node(op_type, inputs, [name], name=f"n_{name}")
        node.attribute.extend(onnx.helper.make_attribute(key, item) for key, item in attributes.items())
        self.nodes.append(node)
        return name

    def conv(self, x: str, inputs: int, outputs: int, kernel: tuple[int, int], **attributes: Attribute) -> str:
        group = attributes.get("group", 1)
        assert isinstance(group, int)
        weight = self.weight(outputs, inputs // group, *kernel)
        return self.op("Conv", x, weight, self.weight(outputs), **attributes)

    def save(self, file: Path, *outputs: str) -> Path:
        infos = [onnx.helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = onnx.helper.make_graph(self.nodes, "test", self.inputs, infos, self.constants)
        opset = [onnx.helper.make_opsetid("", 17)]
        proto = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
        onnx.save(onnx.shape_inference.infer_shapes(proto, strict_mode=True), file)
        return file


class Realized:
    """The integer part of a quantized network, and what the reference makes of it."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        borders = ("QuantizeLinear", "DequantizeLinear")
        nodes = tuple(node for node in model.graph if not is_op(node, *borders))
        inside = set(nodes)
        reads = [value for node in nodes for value in node.inputs if value is not None]
        inputs = [value for value in reads if value.producer() not in inside and const_of(value) is None]
        outputs = [
            value
            for node in nodes
            for value in node.outputs
            if value.is_graph_output() or any(use.node not in inside for use in value.uses())
        ]
        self.region = Region("npu_0", "npu", nodes, tuple(dict.fromkeys(inputs)), tuple(outputs))

    @property
    def op_types(self) -> list[str]:
        """In execution order."""
        return [node.op_type for node in self.region.nodes]

    def feeds(self, seed: int) -> list[np.ndarray]:
        """Integers for the region's inputs: of the whole range, or about its middle."""
        return random_feeds(self.region, np.random.default_rng(seed))

    def run(self, feeds: list[np.ndarray]) -> list[np.ndarray]:
        return run_region(self.model, self.region, feeds)


def random_feeds(region: Region, rng: np.random.Generator) -> list[np.ndarray]:
    arrays: list[np.ndarray] = []
    for value in region.inputs:
        info, wide = np.iinfo(dtype_of(value)), rng.integers(2)
        spread = rng.integers(info.min, info.max + 1, shape_of(value))
        near = rng.normal((info.min + info.max) / 2, 25 * (info.max - info.min) / 255, shape_of(value))
        arrays.append(np.clip(spread if wide else near, info.min, info.max).astype(dtype_of(value)))
    return arrays


def run_region(model: ir.Model, region: Region, feeds: list[np.ndarray]) -> list[np.ndarray]:
    """The region's outputs, by the numpy reference."""
    executor = Executor(model)
    values = dict(zip(region.inputs, feeds, strict=True))
    for node in region.nodes:
        inputs = [None if value is None else values.get(value, const_of(value)) for value in node.inputs]
        values.update(zip(node.outputs, executor.run_node(node, inputs), strict=True))
    return [values[value] for value in region.outputs]


@pytest.fixture
def net() -> Callable[[int], Net]:
    """Start a network: `net(seed)`."""
    return Net


@pytest.fixture
def realized(tmp_path: Path) -> Callable[..., Realized]:
    """Quantize a network for arm-npu's formats and arithmetic: `realized(net, output, …)`."""
    target = load_target("arm-npu")

    def make(network: Net, *outputs: str, chip: Target = target, formats: WeightRequest = EIGHT_BITS) -> Realized:
        graph = import_onnx(network.save(tmp_path / "net.onnx", *outputs), None)
        data = synthetic(input_specs(graph), 2)
        graph = run_passes(graph, SIMPLIFY, stage="simplify")
        graph = run_passes(graph, legalize(chip), stage="legalize")
        wide = formats.activations == "int16"
        ranges = calibrate(graph, data, "minmax", bits=16 if wide else 8, symmetric=wide)
        planned = plan(graph, ranges, chip, weights=formats)
        graph = run_passes(quantize(graph, planned), harmonize(chip), stage="harmonize")
        return Realized(run_passes(realize(graph, chip), LAYOUT, stage="layout"))

    return make


@pytest.fixture
def run_reference() -> Callable[[ir.Model, Region, list[np.ndarray]], list[np.ndarray]]:
    return run_region


@pytest.fixture
def feeds_of() -> Callable[[Region, np.random.Generator], list[np.ndarray]]:
    return random_feeds
