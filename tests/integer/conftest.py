"""Writing small QDQ models, and running them beside their integer graphs."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qcompiler.graph import QCOMPILER_DOMAIN, is_op
from qcompiler.integer import reference
from qcompiler.integer.realize import realize
from qcompiler.quant.arithmetic import RequantizeVariant
from qcompiler.target_loader import load_target

OPSET = 21
Attribute = int | float | str | list[int]
BASE = load_target("arm-npu")


def realized(model: ir.Model, variant: RequantizeVariant = "float32") -> ir.Model:
    quantization = BASE.quantization.model_copy(update={"requantize": variant})
    return realize(model, BASE.model_copy(update={"quantization": quantization}))


class Qdq:
    """A QDQ graph written line by line; values are names."""

    def __init__(self, seed: int = 0, dtype: str = "int8") -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def _name(self, stem: str) -> str:
        return f"{stem}{len(self.nodes)}_{len(self.initializers)}_{len(self.inputs)}"

    def const(self, array: object, dtype: str = "float32") -> str:
        name = self._name("c")
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def op(self, op_type: str, *inputs: str, **attributes: Attribute) -> str:
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def ops(self, op_type: str, *inputs: str, outputs: int, **attributes: Attribute) -> list[str]:
        names = [f"{self._name(op_type.lower())}_{index}" for index in range(outputs)]
        node = onnx.helper.make_node(op_type, inputs, names, name=f"n_{names[0]}")
        node.attribute.extend(onnx.helper.make_attribute(name, item) for name, item in attributes.items())
        self.nodes.append(node)
        return names

    def input(self, *shape: int, scale: float = 0.05, zero: int | None = None) -> str:
        """A float input behind Q and DQ."""
        name = f"x{len(self.inputs)}"
        self.inputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        return self.dequantize(self.quantize(name, scale, zero), scale, zero)

    def format(self, scale: float, zero: int | None, dtype: str | None = None) -> tuple[str, str]:
        dtype = dtype or self.dtype
        zero = zero if zero is not None else (3 if dtype == "int8" else 131)
        return self.const(scale), self.const(zero, dtype)

    def quantize(self, value: str, scale: float = 0.05, zero: int | None = None, dtype: str | None = None) -> str:
        return self.op("QuantizeLinear", value, *self.format(scale, zero, dtype))

    def dequantize(self, value: str, scale: float = 0.05, zero: int | None = None, dtype: str | None = None) -> str:
        return self.op("DequantizeLinear", value, *self.format(scale, zero, dtype))

    def qdq(self, value: str, scale: float = 0.05, zero: int | None = None, dtype: str | None = None) -> str:
        return self.dequantize(self.quantize(value, scale, zero, dtype), scale, zero, dtype)

    def weight(self, *shape: int, axis: int | None = None, dtype: str = "int8", zero: int = 0) -> str:
        """DequantizeLinear of random 8-bit constants."""
        info = np.iinfo(dtype)
        array = self.const(self.rng.integers(info.min + 1, info.max + 1, shape), dtype)
        channels = () if axis is None else (shape[axis],)
        scale = self.const(self.rng.uniform(0.003, 0.01, channels))
        zeros = self.const(np.full(channels, zero), dtype)
        return self.op("DequantizeLinear", array, scale, zeros, **({} if axis is None else {"axis": axis}))

    def model(self, *outputs: str) -> ir.Model:
        infos = [onnx.helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = onnx.helper.make_graph(self.nodes, "test", self.inputs, infos, self.initializers)
        opset = [onnx.helper.make_opsetid("", OPSET)]
        proto = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        onnx.checker.check_model(proto, full_check=True)
        return ir.from_proto(proto)


class Realized:
    """A QDQ model and its integer graph, run on the same inputs by onnxruntime and by the reference."""

    def __init__(self, model: ir.Model, variant: RequantizeVariant = "float32") -> None:
        self.source = ir.to_proto(model)
        self.model = realized(model, variant)
        assert ir.to_proto(model).SerializeToString() == self.source.SerializeToString(), "the input was changed"
        onnx.checker.check_model(ir.to_proto(self.model), full_check=False)

    @property
    def op_types(self) -> list[str]:
        """Sorted, without Transposes, Reshapes and the Q and DQ at the borders."""
        hidden = ("Transpose", "Reshape", "QuantizeLinear", "DequantizeLinear")
        return sorted(node.op_type for node in self.model.graph if node.domain or not is_op(node, *hidden))

    @property
    def is_integer(self) -> bool:
        """Whether nothing floating remains but Q of inputs and DQ of outputs."""
        for node in self.model.graph:
            inner = [value for value in node.inputs if value is not None and value.producer() is not None]
            if any(value.dtype is not None and value.dtype.is_floating_point() for value in inner):
                return False
        return True

    def the(self, op_type: str) -> ir.Node:
        (node,) = [node for node in self.model.graph if node.domain == QCOMPILER_DOMAIN and node.op_type == op_type]
        return node

    def outputs(self, seed: int = 1, spread: float = 3.0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Pairs of outputs: of onnxruntime, of the integer graph."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(self.source.SerializeToString(), options)
        rng = np.random.default_rng(seed)
        feeds = {
            info.name: (spread * rng.standard_normal(info.shape)).astype(np.float32) for info in session.get_inputs()
        }
        want = [np.asarray(array) for array in session.run(None, feeds)]
        got = list(reference.execute(self.model, feeds).values())
        for old, new in zip(want, got, strict=True):
            assert old.shape == new.shape and old.dtype == new.dtype
        return list(zip(want, got, strict=True))

    def check(self, *, exact: bool = False, differing: float = 0.01) -> None:
        """Outputs are integers: equal, or at most one apart in at most this share of the elements."""
        for want, got in self.outputs():
            assert want.dtype in (np.int8, np.uint8, np.int64)
            if exact:
                np.testing.assert_array_equal(got, want)
            assert np.abs(want.astype(int) - got.astype(int)).max() <= 1
            assert np.mean(want != got) <= differing
            assert len(np.unique(want)) > 2, "a constant result proves nothing"


@pytest.fixture
def qdq() -> Callable[..., Qdq]:
    """Make an empty QDQ graph: `qdq(seed, dtype)`."""
    return Qdq


@pytest.fixture
def run() -> Callable[..., Realized]:
    """Realize a model for the float32 variant, or the one given."""
    return Realized
