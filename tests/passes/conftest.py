"""What the tests of passes share: writing small graphs, and comparing graphs before and after a pass."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompiler.graph import const_of
from qcompiler.target import OpRule, Target
from qcompiler.target_loader import load_target
from qcompiler.verify import verify, verify_shapes

OPSET = 21
Attribute = int | float | str | list[int]


class Net:
    """A small graph written line by line; values are names."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.count = 0

    def _name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def input(self, *shape: int, dtype: int = onnx.TensorProto.FLOAT) -> str:
        name = self._name("x")
        self.inputs.append(onnx.helper.make_tensor_value_info(name, dtype, shape))
        return name

    def const(self, value: object, dtype: type = np.float32) -> str:
        """A constant with these values."""
        name = self._name("c")
        self.initializers.append(onnx.numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        """A random float constant."""
        return self.const(self.rng.standard_normal(shape))

    def int8_weight(self, *shape: int, axis: int | None = None) -> str:
        """DequantizeLinear of a random int8 constant, per tensor or per channel."""
        channels = () if axis is None else (shape[axis],)
        quantized = self.const(self.rng.integers(-127, 128, shape), np.int8)
        scale = self.const(self.rng.uniform(0.005, 0.02, channels))
        zero = self.const(np.zeros(channels), np.int8)
        return self.op("DequantizeLinear", quantized, scale, zero, **({} if axis is None else {"axis": axis}))

    def int32_bias(self, size: int) -> str:
        return self.op("DequantizeLinear", self.const(self.rng.integers(-999, 999, size), np.int32), self.const(0.0004))

    def qdq(self, value: str, scale: float = 0.03, zero_point: int = 3) -> str:
        """QuantizeLinear and DequantizeLinear, int8."""
        parameters = (self.const(scale), self.const(zero_point, np.int8))
        return self.op("DequantizeLinear", self.op("QuantizeLinear", value, *parameters), *parameters)

    def ops(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Attribute) -> list[str]:
        names = [self._name(op_type.lower()) for _ in range(outputs)]
        node = onnx.helper.make_node(op_type, inputs, names, name=f"n_{names[0]}")
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())
        self.nodes.append(node)
        return names

    def op(self, op_type: str, *inputs: str, **attributes: Attribute) -> str:
        return self.ops(op_type, *inputs, outputs=1, **attributes)[0]

    def model(self, *outputs: str) -> ir.Model:
        """The model as the importer would leave it: opset 21, static shapes on every value."""
        infos = [onnx.helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = onnx.helper.make_graph(self.nodes, "test", self.inputs, infos, self.initializers)
        proto = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10, producer_name="test"
        )
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        onnx.checker.check_model(proto, full_check=True)
        return ir.from_proto(proto)


class Outcome:
    """A model after a pass, and how it computes beside the model before."""

    def __init__(self, before: onnx.ModelProto, model: ir.Model, modified: bool) -> None:
        self.before = before
        self.model = model
        self.modified = modified

    @property
    def op_types(self) -> list[str]:
        return [node.op_type for node in self.model.graph]

    def the(self, op_type: str) -> ir.Node:
        """The only node of this type."""
        (node,) = [node for node in self.model.graph if node.op_type == op_type]
        return node

    @staticmethod
    def array(value: ir.Value) -> np.ndarray:
        """The constant behind a value, which must have one."""
        constant = const_of(value)
        assert constant is not None, f"{value.name} is no constant"
        return constant

    def largest_error(self, seed: int = 1) -> float:
        """Largest difference between the outputs before and after, relative to the largest output, over two inputs.

        Both are run by onnxruntime without its own optimizations.
        """
        worst = 0.0
        first, second = run_both(self.before, ir.to_proto(self.model), seed)
        for old, new in zip(first, second, strict=True):
            assert old.shape == new.shape and old.dtype == new.dtype
            difference = np.abs(old.astype(np.float64) - new.astype(np.float64)).max(initial=0.0)
            worst = max(worst, difference / max(1e-6, float(np.abs(old).max(initial=0.0))))
        return worst


def run_both(before: onnx.ModelProto, after: onnx.ModelProto, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    sessions = [ort.InferenceSession(proto.SerializeToString(), options) for proto in (before, after)]
    rng = np.random.default_rng(seed)
    names = [output.name for output in sessions[0].get_outputs()]
    assert names == [output.name for output in sessions[1].get_outputs()]
    results: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for spread in (1.0, 4.0):
        feeds = {}
        for info in sessions[0].get_inputs():
            shape = [size if isinstance(size, int) else 1 for size in info.shape]
            dtype = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8, "tensor(int8)": np.int8}[info.type]
            integers = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape) if dtype != np.float32 else None
            feeds[info.name] = (spread * rng.standard_normal(shape) if integers is None else integers).astype(dtype)
        for session, outputs in zip(sessions, results, strict=True):
            outputs.extend(np.asarray(output) for output in session.run(names, feeds))
    return results


def apply_pass(model: ir.Model, change: ir.passes.PassBase) -> Outcome:
    """Run a pass; the result must be well formed."""
    before = ir.to_proto(model)
    result = change(model)
    verify(model, "the pass")
    verify_shapes(model, "the pass")
    return Outcome(before, model, result.modified)


@pytest.fixture(scope="session")
def target_with() -> Callable[..., Target]:
    """A target whose accelerator runs what these rules say and nothing else: `target_with({"ops": ["Conv"], …}, …)`."""
    base = load_target("systolic-npu")
    assert base.npu is not None
    npu = base.npu
    engine = next(iter(npu.engines))

    def make(*rules: Mapping[str, object], channel_alignment: int = 1) -> Target:
        defaults = {"engine": engine, "precisions": ("int8", "int8*int8")}
        parsed = tuple(OpRule.model_validate(defaults | dict(rule)) for rule in rules)
        changed = npu.model_copy(update={"rules": parsed, "channel_alignment": channel_alignment})
        return base.model_copy(update={"npu": changed})

    return make


@pytest.fixture(scope="session")
def cpu_target() -> Target:
    """A target without accelerator."""
    return load_target("x86-plain")


@pytest.fixture
def net() -> Callable[..., Net]:
    """Make an empty graph to write into: `net(seed)`."""
    return Net


@pytest.fixture
def apply() -> Callable[[ir.Model, ir.passes.PassBase], Outcome]:
    return apply_pass


@pytest.fixture
def assert_settled() -> Callable[[ir.Model, ir.passes.PassBase], None]:
    """The first run changes the model, the second does not."""

    def check(model: ir.Model, change: ir.passes.PassBase) -> None:
        assert apply_pass(model, change).modified
        settled = ir.to_proto(model).SerializeToString()
        assert not change(model).modified
        assert ir.to_proto(model).SerializeToString() == settled

    return check


@pytest.fixture
def assert_refused() -> Callable[[ir.Model, ir.passes.PassBase], None]:
    """The pass leaves the model exactly as it is."""

    def check(model: ir.Model, change: ir.passes.PassBase) -> None:
        before = ir.to_proto(model).SerializeToString()
        assert not change(model).modified
        assert ir.to_proto(model).SerializeToString() == before

    return check
