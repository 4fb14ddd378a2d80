"""What the tests of backends share: graphs of many unconnected nodes, compiled and run at once."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from npu_nets import Case, Check, check_cases

from qcompiler.backends.relax import build, lower
from qcompiler.backends.schedules import loops
from qcompiler.graph import Attribute, make_node, value_name
from qcompiler.integer.ops import DOMAIN_VERSION, IntegerOp
from qcompiler.partition import Partition, Region
from qcompiler.passes.rewriting import infer_types
from qcompiler.runtime import Executable
from qcompiler.simulator.machine import compile_simulator
from qcompiler.target import Target


class Workbench:
    """A graph to which nodes are added one by one, each reading inputs of its own filled with random numbers."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.feeds: dict[str, np.ndarray] = {}
        self.inputs: list[ir.Value] = []
        self.constants: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.outputs: list[ir.Value] = []

    def input(self, array: np.ndarray) -> ir.Value:
        value = self._value(f"in{len(self.inputs)}", array.shape, array.dtype)
        self.inputs.append(value)
        self.feeds[value_name(value)] = array
        return value

    def random(self, shape: Sequence[int], dtype: str) -> ir.Value:
        """An input with every value of an 8-bit type equally likely."""
        info = np.iinfo(dtype)
        return self.input(self.rng.integers(info.min, info.max + 1, shape).astype(dtype))

    def constant(self, array: np.ndarray) -> ir.Value:
        name = f"const{len(self.constants)}"
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.constants.append(value)
        return value

    def integer(self, op: IntegerOp, inputs: Sequence[ir.Value], shape: Sequence[int], dtype: str) -> None:
        """Add an integer operator whose output is one of the graph's."""
        output = self._output(shape, np.dtype(dtype))
        self.nodes.append(op.node(list(inputs), output, f"node{len(self.nodes)}"))

    def standard(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[tuple[Sequence[int], np.dtype]],
        attributes: dict[str, Attribute] | None = None,
    ) -> ir.Node:
        """Add an ONNX operator; shapes and dtypes of the outputs are given."""
        values = [self._output(shape, dtype) for shape, dtype in outputs]
        node = make_node(op_type, inputs, values, attributes, name=f"node{len(self.nodes)}")
        self.nodes.append(node)
        return node

    def inferred(
        self, op_type: str, inputs: Sequence[ir.Value | None], outputs: int, attributes: dict[str, Attribute]
    ) -> None:
        """Add an ONNX operator; ONNX infers shapes and dtypes."""
        values = [ir.Value(name=f"out{len(self.outputs) + index}") for index in range(outputs)]
        node = make_node(op_type, inputs, values, attributes, name=f"node{len(self.nodes)}")
        infer_types(node)
        self.nodes.append(node)
        self.outputs.extend(values)

    def model(self) -> ir.Model:
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=self.constants,
            opset_imports={"": 21, "qcompiler": DOMAIN_VERSION},
            name="workbench",
        )
        return ir.Model(graph, ir_version=10)

    def _output(self, shape: Sequence[int], dtype: np.dtype) -> ir.Value:
        value = self._value(f"out{len(self.outputs)}", shape, dtype)
        self.outputs.append(value)
        return value

    @staticmethod
    def _value(name: str, shape: Sequence[int], dtype: np.dtype) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.from_numpy(dtype)))


def on_the_cpu(model: ir.Model) -> Partition:
    """The whole graph as one CPU region."""
    graph = model.graph
    nodes = tuple(graph)
    return Partition((Region("cpu", "cpu", nodes, tuple(graph.inputs), tuple(graph.outputs)),), ())


def compile_and_run(model: ir.Model, target: Target, feeds: dict[str, np.ndarray], folder: Path) -> list[np.ndarray]:
    lowered = lower(model, on_the_cpu(model), target)
    library = folder / "model.so"
    build(lowered, target.host, library)
    executable = Executable(library, lowered.parameters)
    return executable.run([feeds[spec.name] for spec in lowered.inputs])


@pytest.fixture
def workbench() -> type[Workbench]:
    return Workbench


@pytest.fixture
def run_on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """compile_and_run(model, target, feeds, folder) -> outputs.

    With the parameter "shared", two threads share every operator, small as those of tests are.
    """
    if getattr(request, "param", "") != "shared":
        return compile_and_run
    monkeypatch.setattr(loops, "MIN_PARALLEL", 0)

    def run(model: ir.Model, target: Target, feeds: dict[str, np.ndarray], folder: Path) -> list[np.ndarray]:
        host = target.host.model_copy(update={"threads": 2})
        return compile_and_run(model, target.model_copy(update={"host": host}), feeds, folder)

    return run


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_simulator(tmp_path_factory.mktemp("simulator"))


@pytest.fixture
def check(simulator: Path, tmp_path: Path) -> Check:
    """Runs NPU programs on the simulator beside the reference."""

    def run(all_cases: Sequence[Case]) -> None:
        check_cases(all_cases, simulator, tmp_path)

    return run
