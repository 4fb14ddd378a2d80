"""Assembling and building: what goes in comes out in order, the same bytes every time, and mistakes are named."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import tvm
from tvm import tirx
from tvm.s_tir import Schedule

from qcompiler.backends import te
from qcompiler.backends.base import AcceleratorFunction, host_code
from qcompiler.backends.relax import build, c_compiler, lower
from qcompiler.backends.schedules.dot import dot_product
from qcompiler.errors import QCompilerError
from qcompiler.graph import shape_of
from qcompiler.integer import ops
from qcompiler.partition import Partition, Region
from qcompiler.runtime import Executable, Simulator
from qcompiler.simulator.machine import SIMULATOR
from qcompiler.target_loader import load_target

TARGET = load_target("x86-cpu")


def requantize_by(zero: int) -> ops.QRequantize:
    """Subtracts `zero` from an int8."""
    return ops.QRequantize(zero, 0, -128, 127, "float32")


def small_model(bench) -> ir.Model:
    """in0 → QRequantize → Reshape → (QRequantize, graph output); a constant is a graph output too."""
    x = bench.random((2, 3, 4), "int8")
    one, none = bench.constant(np.ones(1, np.float32)), bench.constant(np.zeros(1, np.int32))
    bench.integer(requantize_by(5), [x, one, none], (2, 3, 4), "int8")
    dims = bench.constant(np.array([6, 4]))
    bench.standard("Reshape", [bench.nodes[0].outputs[0], dims], [((6, 4), np.dtype(np.int8))])
    bench.integer(requantize_by(-9), [bench.nodes[1].outputs[0], one, none], (6, 4), "int8")
    bench.outputs.append(bench.constant(np.arange(3, dtype=np.float32)))
    return bench.model()


def saturated(x: np.ndarray, offset: int) -> np.ndarray:
    return np.clip(x.astype(int) - offset, -128, 127).astype(np.int8)


def test_values_constants_and_views_meet_their_readers(workbench, run_on_cpu, tmp_path) -> None:
    bench = workbench(seed=1)
    outputs = run_on_cpu(small_model(bench), TARGET, bench.feeds, tmp_path)
    first = saturated(bench.feeds["in0"], 5)
    for actual, expected in zip(
        outputs, [first, first.reshape(6, 4), saturated(first.reshape(6, 4), -9), np.arange(3)], strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


def test_equal_functions_and_parameters_are_shared(workbench) -> None:
    bench = workbench(seed=2)
    for _ in range(3):
        one, none = bench.constant(np.ones(1, np.float32)), bench.constant(np.zeros(1, np.int32))
        bench.integer(requantize_by(5), [bench.random((4, 4), "int8"), one, none], (4, 4), "int8")
    model = bench.model()
    region = Region("cpu", "cpu", tuple(model.graph), tuple(bench.inputs), tuple(bench.outputs))
    lowered = lower(model, Partition((region,), ()), TARGET)
    assert len(lowered.module.get_global_vars()) == 3  # main, workspace and one kernel
    assert len(lowered.parameters) == 2


def npu_model(bench) -> tuple[ir.Model, Partition]:
    """A CPU node, two nodes as an NPU region with two outputs, a CPU node."""
    one, none = bench.constant(np.ones(1, np.float32)), bench.constant(np.zeros(1, np.int32))
    value = bench.random((8,), "int8")
    for offset in (1, 2, 3, 4):
        bench.integer(requantize_by(offset), [value, one, none], (8,), "int8")
        value = bench.nodes[-1].outputs[0]
    model = bench.model()
    first, second, third, fourth = bench.nodes
    regions = (
        Region("a", "cpu", (first,), tuple(bench.inputs), tuple(first.outputs)),
        Region("b", "npu", (second, third), tuple(first.outputs), (second.outputs[0], third.outputs[0])),
        Region("c", "cpu", (fourth,), (third.outputs[0],), tuple(fourth.outputs)),
    )
    return model, Partition(regions, ())


def stand_in_driver(region: Region) -> AcceleratorFunction:
    """Does the region's arithmetic in TE, its offsets taken from the constants, through its workspace."""
    shape = shape_of(region.inputs[0])
    x, constants = te.placeholder(shape, "int8", "x"), te.placeholder((2,), "uint8", "constants")

    def minus(source: te.Tensor, index: int, name: str) -> te.Tensor:
        def element(i: te.Expr) -> te.Expr:
            difference = source[i].astype("int32") - constants[index].astype("int32")
            return te.clamp(difference, -128, 127).astype("int8")

        return te.compute(shape, element, name)

    first = minus(x, 0, "first")
    second = minus(first, 1, "second")
    workspace = te.compute((5,), lambda i: constants[0] + i.astype("uint8"), "workspace")
    function = te.prim_func([x, constants, first, second, workspace])
    return AcceleratorFunction(function, np.array([2, 3], np.uint8), 5, (SIMULATOR,))


def test_npu_region_among_cpu_regions(workbench, tmp_path) -> None:
    bench = workbench(seed=3)
    model, partition = npu_model(bench)
    lowered = lower(model, partition, TARGET, stand_in_driver)
    assert lowered.sources == (SIMULATOR,)
    library = tmp_path / "model.so"
    build(lowered, TARGET.host, library)
    outputs = Executable(library, lowered.parameters).run([bench.feeds["in0"]])
    expected = bench.feeds["in0"]
    for offset, actual in zip((1, 2, 3, 4), outputs, strict=True):
        expected = saturated(expected, offset)
        np.testing.assert_array_equal(actual, expected)
    simulator = Simulator(library)
    simulator.reset()
    log = simulator.log()
    assert log.words.size == 0 and log.regions == () and log.scratchpad_peak == 0


BUILD_ELSEWHERE = """
import importlib.util, sys, pathlib
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec); spec.loader.exec_module(shared)
spec = importlib.util.spec_from_file_location("tests_relax", sys.argv[2])
tests = importlib.util.module_from_spec(spec); spec.loader.exec_module(tests)
model, partition = tests.npu_model(shared.Workbench(4))
lowered = tests.lower(model, partition, tests.TARGET, tests.stand_in_driver)
tests.build(lowered, tests.TARGET.host, pathlib.Path(sys.argv[3]))
"""


def test_builds_are_byte_identical(workbench, tmp_path) -> None:
    """In this process, and in another with other hashes, folder and time."""
    bench = workbench(seed=4)
    model, partition = npu_model(bench)
    build(lower(model, partition, TARGET, stand_in_driver), TARGET.host, tmp_path / "first.so")
    here = Path(__file__)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    arguments = [str(here.with_name("conftest.py")), str(here), str(elsewhere / "second.so")]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TMPDIR": str(elsewhere), "PYTHONPATH": str(here.parent)}
    subprocess.run([sys.executable, "-c", BUILD_ELSEWHERE, *arguments], check=True, env=environment, cwd=elsewhere)
    first, second = (
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "first.so", elsewhere / "second.so")
    )
    assert first == second


def test_no_c_compiler_is_the_users_to_mend(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(QCompilerError, match=r"no C compiler found.*apt-get install gcc"):
        c_compiler(TARGET.host)
    with pytest.raises(QCompilerError, match="aarch64-linux-gnu-gcc"):
        c_compiler(load_target("arm-cpu").host)


def test_links_for_another_architecture(workbench, tmp_path) -> None:
    if not any(shutil.which(tool) for tool in ("aarch64-linux-gnu-gcc", "ld.lld")):
        pytest.skip("no cross linker for aarch64 here")
    bench = workbench(seed=6)
    model = small_model(bench)
    region = Region("cpu", "cpu", tuple(model.graph), tuple(bench.inputs), tuple(bench.outputs))
    arm = load_target("arm-cpu")
    library = tmp_path / "model.so"
    build(lower(model, Partition((region,), ()), arm), arm.host, library)
    elf = library.read_bytes()
    assert elf[:4] == b"\x7fELF" and int.from_bytes(elf[18:20], "little") == 183  # EM_AARCH64
    with pytest.raises(QCompilerError, match="compiled for another machine"):
        Executable(library, [])


def test_compiler_errors_are_shown(workbench, monkeypatch, tmp_path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho out of cheese >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    bench = workbench(seed=5)
    model = small_model(bench)
    region = Region("cpu", "cpu", tuple(model.graph), tuple(bench.inputs), tuple(bench.outputs))
    lowered = lower(model, Partition((region,), ()), TARGET)
    with pytest.raises(QCompilerError, match="exited with 3: out of cheese"):
        build(lowered, TARGET.host, tmp_path / "model.so")
    assert not (tmp_path / "model.so").exists()


def test_this_tvm_and_its_ffi_agree() -> None:
    """apache-tvm-ffi 0.1.15 makes tensorize and save_json segfault with this TVM; pyproject.toml pins an older one."""
    x, w = te.placeholder((1, 4), "uint8", "x"), te.placeholder((16, 4), "int8", "w")
    k = te.reduce_axis(4, "k")
    y = te.compute((1, 16), lambda i, j: te.reduce_sum(x[i, k].astype("int32") * w[j, k].astype("int32"), [k]), "y")
    function = te.prim_func([x, w, y])
    dot = dot_product(host_code(load_target("x86-avx512vnni").host), "uint8")
    assert dot is not None
    schedule = Schedule(function)
    block = schedule.get_sblock("y")
    lanes = schedule.get_loops(block)[1]
    schedule.decompose_reduction(block, lanes)
    schedule.tensorize(lanes, dot.name)
    assert "vpdpbusd" in schedule.mod.script()
    loaded = tvm.ir.load_json(tvm.ir.save_json(function))
    assert isinstance(loaded, tirx.PrimFunc) and loaded.script() == function.script()
