"""Running without the compiler half of TVM."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

import qcompiler
from qcompiler.backends.relax import Lowered, build, lower
from qcompiler.errors import QCompilerError
from qcompiler.graph import make_node
from qcompiler.partition import Partition, Region
from qcompiler.runtime import Executable, Simulator
from qcompiler.simulator.machine import SIMULATOR
from qcompiler.target_loader import load_target

TARGET = load_target("x86-cpu")


def addition(addend: float) -> Lowered:
    """y = x + addend, x float32 [2,3]; and the input again."""
    values = [ir.Value(name=name, shape=ir.Shape((2, 3)), type=ir.TensorType(ir.DataType.FLOAT)) for name in ("x", "y")]
    tensor = ir.tensor(np.full((1,), addend, np.float32))
    constant = ir.Value(name="c", shape=ir.Shape((1,)), type=ir.TensorType(tensor.dtype), const_value=tensor)
    node = make_node("Add", [values[0], constant], [values[1]])
    graph = ir.Graph([values[0]], [values[1], values[0]], nodes=[node], initializers=[constant], opset_imports={"": 21})
    region = Region("cpu", "cpu", (node,), (values[0],), (values[1],))
    return lower(ir.Model(graph, ir_version=10), Partition((region,), ()), TARGET)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runtime") / "model.so"
    build(addition(1.5), TARGET.host, path)
    return path


WITHOUT_COMPILER = """
import sys
from pathlib import Path
import numpy as np
from qcompiler.runtime import Executable
run = Executable(Path(sys.argv[1]), [np.full((1,), 1.5, np.float32)]).run
first, same = run([np.arange(6, dtype=np.float32).reshape(2, 3)])
assert first.tolist() == [[1.5, 2.5, 3.5], [4.5, 5.5, 6.5]], first
assert "libtvm_runtime" in Path("/proc/self/maps").read_text()
assert "libtvm_compiler" not in Path("/proc/self/maps").read_text()
assert not {"tvm", "onnx", "onnxruntime"} & set(sys.modules)
import tvm.relax
assert "libtvm_compiler" in Path("/proc/self/maps").read_text(), "the compiler must still be there for who asks"
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc, to see what is mapped")
def test_the_compiler_is_not_loaded(library: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_COMPILER, str(library)], check=True)


def test_outputs_are_the_callers_own(library: Path) -> None:
    """Not views of the input, of parameters, or of memory the next run reuses."""
    executable = Executable(library, [np.full((1,), 1.5, np.float32)])
    x = np.zeros((2, 3), np.float32)
    first, same = executable.run([x])
    second, _ = executable.run([x + 1])
    same += 7
    assert not x.any()
    np.testing.assert_array_equal(first, np.full((2, 3), 1.5))
    np.testing.assert_array_equal(second, np.full((2, 3), 2.5))


def test_inputs_of_any_layout(library: Path) -> None:
    """Transposed, read-only and unaligned arrays."""
    executable = Executable(library, [np.full((1,), 1.5, np.float32)])
    x = np.arange(6, dtype=np.float32).reshape(3, 2).T
    unaligned = np.frombuffer(b"\0" + np.ascontiguousarray(x).tobytes(), np.uint8)[1:].view(np.float32).reshape(2, 3)
    for array in (x, unaligned):
        np.testing.assert_array_equal(executable.run([array])[0], x + 1.5)


def test_a_replaced_library_is_the_one_that_runs(tmp_path) -> None:
    """The dynamic linker remembers libraries by name; compiling twice to one path must not run the first again."""
    path, x = tmp_path / "model.so", np.zeros((2, 3), np.float32)
    build(addition(1.5), TARGET.host, path)
    old = Executable(path, addition(1.5).parameters)
    lowered = replace(addition(2.5), sources=(SIMULATOR,))
    build(lowered, TARGET.host, path)
    new = Executable(path, lowered.parameters)
    assert old.run([x])[0][0, 0] == 1.5 and new.run([x])[0][0, 0] == 2.5
    assert Simulator(path).log().words.size == 0  # only the second has a simulator


def test_library_without_a_simulator(library: Path) -> None:
    with pytest.raises(QCompilerError, match="no NPU simulator"):
        Simulator(library)


def test_a_file_that_is_no_library(tmp_path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"not a library")
    with pytest.raises(QCompilerError, match="cannot be loaded here"):
        Executable(path, [])


_PARALLEL = """
import os, sys
import numpy as np
import qcompiler

bundle = qcompiler.load(sys.argv[1])
(spec,) = bundle.inputs
bundle.run({spec.name: np.zeros(spec.shape, spec.dtype)})
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_bundle_starts_the_threads_its_spec_says(tmp_path: Path, threads: int) -> None:
    graph = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> agraph (float[1,64,56,56] x, float[64,64,3,3] w)'
        " => (float[1,64,56,56] y) { y = Conv<pads=[1,1,1,1]>(x, w) }"
    )
    weights = np.random.default_rng(0).normal(size=(64, 64, 3, 3)).astype(np.float32)
    graph.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    del graph.graph.input[1]
    onnx.save(graph, tmp_path / "net.onnx")
    overrides = [f"host.threads={threads}"]
    qcompiler.compile(tmp_path / "net.onnx", "x86-cpu", overrides=overrides, output=tmp_path / "net.qc")
    # The numerics libraries' own pools would be counted too.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("TVM_NUM_THREADS", None)
    command = [sys.executable, "-c", _PARALLEL, str(tmp_path / "net.qc")]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert int(finished.stdout) == threads
