"""GPU kernels against the numpy reference, bit for bit, run through OpenCL: on a CPU by PoCL where there is no GPU.

The cases are those of the CPU backend (test_cpu.py), each test's graph as one region.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends.base import AcceleratorFunction, Kernel
from qcompiler.backends.gpu import compile_region, driver, region_function
from qcompiler.backends.gpu_code import Device
from qcompiler.backends.gpu_kernels import grouped, lower, refusal
from qcompiler.backends.gpu_program import GpuProgram, describe, encode
from qcompiler.backends.relax import build
from qcompiler.backends.relax import lower as lower_model
from qcompiler.errors import QCompilerError
from qcompiler.integer import ops
from qcompiler.integer.reference import execute
from qcompiler.partition import Partition
from qcompiler.quant import arithmetic
from qcompiler.quant.arithmetic import REQUANTIZE_VARIANTS, RequantizeVariant
from qcompiler.regions import Region
from qcompiler.runtime import Executable, gpu_device, gpu_problem
from qcompiler.target import Target
from qcompiler.target_loader import load_target

OPENCL = Device("opencl", (), frozenset(), 32 * 1024)


def _cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpu_cases", Path(__file__).with_name("test_cpu.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = _cases()


def whole(model: ir.Model) -> Region:
    graph = model.graph
    return Region("gpu_0", "gpu", tuple(graph), tuple(graph.inputs), tuple(graph.outputs))


def compile_and_run(model: ir.Model, target: Target, feeds: dict[str, np.ndarray], folder: Path) -> list[np.ndarray]:
    """The whole graph as one region on the GPU of opencl-gpu."""
    gpu = load_target("opencl-gpu")
    region = whole(model)
    lowered = lower_model(model, Partition((region,), ()), gpu, lambda _: region_function(region, gpu, 0))
    library = folder / "model.so"
    build(lowered, gpu.host, library)
    if (problem := gpu_problem(library)) is not None:
        pytest.skip(problem)
    executable = Executable(library, lowered.parameters)
    return executable.run([feeds[spec.name] for spec in lowered.inputs])


@pytest.mark.parametrize("variant", REQUANTIZE_VARIANTS)
def test_convolution(workbench, tmp_path, variant: RequantizeVariant) -> None:
    bench = workbench(seed=100 + REQUANTIZE_VARIANTS.index(variant))
    for number in range(6):
        CASES.add_conv(bench, variant, transposed=number % 3 == 2, w_dtypes=("int8", "uint8", "int4"))
    CASES.check(bench, compile_and_run, tmp_path)


@pytest.mark.parametrize("case", ["addition", "multiplication_and_requantize", "pools", "lookup_softmax_and_resize"])
def test_other_operators(workbench, tmp_path, case: str) -> None:
    getattr(CASES, f"test_{case}")(workbench, compile_and_run, tmp_path)


def test_gemm_and_matmul(workbench, tmp_path) -> None:
    CASES.test_gemm_and_matmul(workbench, compile_and_run, tmp_path, "x86-cpu")


def residual_network(bench, variant: RequantizeVariant, channels: int) -> None:
    """Two convolutions, the second with the first's input added, of which somebody else reads one more copy."""
    rng = bench.rng
    x = bench.random((1, 9, 7, channels), "int8")
    values = [x]
    for _ in range(2):
        op = ops.QConv((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 3, 0, -5, -128, 127, variant)
        weights = rng.integers(-128, 128, (channels, 3, 3, channels)).astype(np.int8)
        bias = rng.integers(-3000, 3000, channels).astype(np.int32)
        scale = CASES.factors(rng, channels, variant, 9 * channels)
        inputs = [values[-1], *map(bench.constant, (weights, bias, *scale))]
        bench.integer(op, inputs, (1, 9, 7, channels), "int8")
        values.append(bench.outputs.pop())
    for a, b in ((values[2], values[0]), (values[1], values[0])):
        factors = arithmetic.add_factors(0.05, 0.03, 0.06, variant)
        add = ops.QAdd(0, -5, 3, 4, *factors, -100, 127, variant)
        bench.integer(add, [a, b], (1, 9, 7, channels), "int8")


@pytest.mark.parametrize("channels", [16, 5])
@pytest.mark.parametrize("variant", ["float32", "tflite"])
def test_addition_joins_the_convolution_before_it(
    workbench, tmp_path, variant: RequantizeVariant, channels: int
) -> None:
    bench = workbench(seed=110)
    residual_network(bench, variant, channels)
    labels = [group.label for group in grouped(bench.nodes)]
    # The first convolution has two readers.
    assert labels == ["QConv", "QConv_QAdd", "QAdd"]
    CASES.check(bench, compile_and_run, tmp_path)


def test_moved_data(workbench, tmp_path) -> None:
    bench = workbench(seed=120)
    eight = np.dtype(np.int8)
    bench.standard("Transpose", [bench.random((2, 5, 7, 6), "int8")], [((2, 6, 5, 7), eight)], {"perm": [0, 3, 1, 2]})
    bench.standard("Concat", [bench.random((2, n), "int8") for n in (3, 4, 9)], [((2, 16), eight)], {"axis": 1})
    sizes = bench.constant(np.array([2, 5], np.int64))
    split = [((3, 2, 4), eight), ((3, 5, 4), eight)]
    bench.standard("Split", [bench.random((3, 7, 4), "int8"), sizes], split, {"axis": 1})
    bounds = [bench.constant(np.array(numbers, np.int64)) for numbers in ([1, -1], [9, -6], [1, 2], [2, -2])]
    bench.standard("Slice", [bench.random((2, 9, 8), "int8"), *bounds], [((2, 4, 3), eight)])
    pads = [bench.constant(np.array([1, 0, 2, 3], np.int64)), bench.constant(np.array(-7, np.int8))]
    bench.standard("Pad", [bench.random((4, 5), "int8"), *pads], [((7, 8), eight)], {"mode": "constant"})
    limits = [bench.constant(np.array(number, np.int8)) for number in (-20, 33)]
    bench.standard("Clip", [bench.random((3, 8), "int8"), *limits], [((3, 8), eight)])
    indices = bench.constant(np.array([3, 0, -1], np.int64))
    bench.standard("Gather", [bench.random((5, 6), "int8"), indices], [((3, 6), eight)], {"axis": 0})
    CASES.check(bench, compile_and_run, tmp_path)


def test_views_cost_nothing(workbench, tmp_path) -> None:
    """A reshaped value is read, and given back, where it lies."""
    bench = workbench(seed=130)
    shape = bench.constant(np.array([24]))
    one, none = bench.constant(np.ones(1, np.float32)), bench.constant(np.zeros(1, np.int32))
    shift = ops.QRequantize(5, 0, -128, 127, "float32")
    bench.integer(shift, [bench.random((4, 6), "int8"), one, none], (4, 6), "int8")
    bench.standard("Reshape", [bench.outputs[0], shape], [((24,), np.dtype(np.int8))])
    bench.integer(shift, [bench.outputs[1], one, none], (24,), "int8")
    model = bench.model()
    program = compile_region(whole(model), OPENCL)
    assert len(program.steps) == 2
    assert program.outputs[0].span == program.outputs[1].span
    assert len({step.launch.kernel for step in program.steps}) == 1  # equal kernels are generated once
    outputs = compile_and_run(model, load_target("opencl-gpu"), bench.feeds, tmp_path)
    for array, expected in zip(outputs, execute(model, bench.feeds).values(), strict=True):
        assert np.array_equal(array, expected)


def test_lifetimes_share_the_arena(workbench) -> None:
    bench = workbench(seed=140)
    one, none = bench.constant(np.ones(1, np.float32)), bench.constant(np.zeros(1, np.int32))
    value = bench.random((8, 4096), "int8")
    for _ in range(5):
        bench.integer(ops.QRequantize(1, 0, -128, 127, "float32"), [value, one, none], (8, 4096), "int8")
        value = bench.outputs.pop()
    bench.outputs.append(value)
    assert compile_region(whole(bench.model()), OPENCL).arena == 2 * 8 * 4096


def test_programs_are_reproducible_and_described(workbench) -> None:
    def program() -> GpuProgram:
        bench = workbench(seed=150)
        CASES.add_conv(bench, "tosa")
        return compile_region(whole(bench.model()), OPENCL)

    first, second = program(), program()
    assert np.array_equal(encode(first), encode(second))
    text = describe(first)
    assert first.steps[0].launch.kernel in text and "input in0" in text and "arena+0[" in text


def test_int4_weights_take_half_the_bytes(workbench) -> None:
    sizes = []
    for dtype in (np.int8, ml_dtypes.int4):
        bench = workbench(seed=160)
        op = ops.QConv((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, 0, 0, 0, -128, 127, "float32")
        weights = bench.rng.integers(-8, 8, (32, 3, 3, 32)).astype(dtype)
        scale = CASES.factors(bench.rng, 32, "float32", 288)
        constants = [weights, np.zeros(32, np.int32), *scale]
        bench.integer(op, [bench.random((1, 8, 8, 32), "int8"), *map(bench.constant, constants)], (1, 8, 8, 32), "int8")
        (group,) = grouped(bench.nodes)
        kernel = lower(group, OPENCL)
        assert isinstance(kernel, Kernel)
        sizes.append(kernel.parameters[0].nbytes)
    assert sizes[0] == 2 * sizes[1]


def test_refusals(workbench) -> None:
    bench = workbench(seed=170)
    one, none = bench.constant(np.ones(1, np.float32)), bench.constant(np.zeros(1, np.int32))
    wide = bench.random((4, 4), "int16")
    bench.integer(ops.QRequantize(0, 0, -128, 127, "float32"), [wide, one, none], (4, 4), "int16")
    bench.standard("ArgMax", [bench.random((4, 4), "int8")], [((4, 1), np.dtype(np.int64))])
    bench.integer(
        ops.QRequantize(0, 0, -128, 127, "float32"), [bench.random((4, 4), "int8"), one, none], (4, 4), "int8"
    )
    reasons = [refusal(node) for node in bench.nodes]
    assert reasons[0] is not None and "8-bit" in reasons[0]
    assert reasons[1] is not None
    assert reasons[2] is None


def test_a_failing_device_is_a_user_error(workbench, tmp_path) -> None:
    """Kernels that do not build: the library says what the OpenCL compiler said."""
    bench = workbench(seed=180)
    CASES.add_conv(bench, "float32")
    gpu = load_target("opencl-gpu")
    model = bench.model()
    region = whole(model)
    program = compile_region(region, OPENCL)
    broken = encode(GpuProgram(**{**vars(program), "binary": b"this is no kernel"}))
    sources = region_function(region, gpu, 0).sources
    code = AcceleratorFunction(driver(program, broken, 0), broken, 1, sources)
    lowered = lower_model(model, Partition((region,), ()), gpu, lambda _: code)
    library = tmp_path / "model.so"
    build(lowered, gpu.host, library)
    if (problem := gpu_problem(library)) is not None:
        pytest.skip(problem)
    assert gpu_device(library)
    with pytest.raises(QCompilerError, match="cannot build the kernels"):
        Executable(library, lowered.parameters).run(list(bench.feeds.values()))


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc (the package nvidia-cuda-toolkit)")


# --- without a device --------------------------------------------------------------------------------------


def _nowhere(command: list[str]) -> subprocess.CompletedProcess[str]:
    """qcompile in a process that finds no OpenCL device."""
    environment = {**os.environ, "OCL_ICD_VENDORS": "/nonexistent/"}
    script = "from qcompiler.cli import main; main()"
    words = [sys.executable, "-c", script, *command]
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("target", "package"),
    [("opencl-gpu", "pocl-opencl-icd"), pytest.param("cuda-gpu", "nvidia-driver", marks=needs_nvcc)],
)
def test_without_a_device_a_bundle_is_written_and_says_so(tmp_path, target: str, package: str) -> None:
    examples = Path(__file__).resolve().parents[2] / "examples"
    bundle = tmp_path / "digits.qc"
    free = [f"gpu.{key}" for key in ("launch=0us", "crossing.sync=0us", "crossing.bandwidth=10000GB/s")]
    overrides = [word for change in free for word in ("--set", change)]
    compiled = _nowhere([str(examples / "digits.onnx"), "--target", target, "-o", str(bundle), *overrides])
    assert compiled.returncode == 0, compiled.stderr
    if "cannot be checked" not in compiled.stdout + compiled.stderr:
        pytest.skip("this machine has a device all the same")
    assert package in " ".join((compiled.stdout + compiled.stderr).split())
    kernels = {"opencl-gpu": "__kernel", "cuda-gpu": "__global__"}[target]
    (source,) = (file for file in bundle.iterdir() if file.suffix in (".cl", ".cu"))
    assert kernels in source.read_text("utf-8")
    inputs, outputs = str(examples / "digits_calibration.npz"), str(tmp_path / "outputs.npz")
    ran = _nowhere(["run", str(bundle), "--input", inputs, "--output", outputs])
    assert ran.returncode != 0 and "Traceback" not in ran.stderr
    assert package in " ".join(ran.stderr.split())
