"""CUDA kernels against the numpy reference, bit for bit, on a CPU: through the launcher and an emulated driver.

The cases are those of test_gpu.py and test_cpu.py, each test's graph as one region.
"""

import ctypes
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.backends.base import AcceleratorFunction
from qcompiler.backends.gpu import RUNTIMES, compile_region, driver
from qcompiler.backends.gpu_code import Device, device_of
from qcompiler.backends.gpu_kernels import grouped, refusal
from qcompiler.backends.gpu_program import encode
from qcompiler.backends.relax import build
from qcompiler.backends.relax import lower as lower_model
from qcompiler.backends.schedules import gpu_mma as mma
from qcompiler.compile import place
from qcompiler.graph import shape_of
from qcompiler.integer import ops
from qcompiler.integer.reference import execute
from qcompiler.options import Options
from qcompiler.partition import Partition
from qcompiler.quant import arithmetic
from qcompiler.quant.arithmetic import REQUANTIZE_VARIANTS, RequantizeVariant
from qcompiler.regions import Region
from qcompiler.runtime import Executable, gpu_device
from qcompiler.target import Target
from qcompiler.target_loader import load_target

DP4A = Device("cuda", ("sm_75",), frozenset({"dp4a"}), 48 * 1024)
MMA = Device("cuda", ("sm_75", "sm_80", "sm_90"), frozenset({"dp4a", "mma"}), 48 * 1024)
INT4 = Device("cuda", ("sm_75", "sm_80"), frozenset({"dp4a", "mma", "mma_s4", "cp_async"}), 48 * 1024, 40)
HOPPER = Device("cuda", ("sm_90",), frozenset({"dp4a", "mma", "cp_async", "dependent_launch"}), 48 * 1024, 132)
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def same(pad: int) -> tuple[int, int, int, int]:
    """Padding on every side."""
    return pad, pad, pad, pad


def module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"loaded_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


EMULATOR = module(Path(__file__).with_name("cuda_emulator") / "emulator.py")
GPU = module(Path(__file__).with_name("test_gpu.py"))
CASES, whole, residual_network = GPU.CASES, GPU.whole, GPU.residual_network


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Path:
    """A libcuda.so.1 for this process, before anybody loads another: who asks for that name gets it."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ (the package g++)")
    library = EMULATOR.build(tmp_path_factory.mktemp("cuda"))
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return library


def on_the_emulator(device: Device) -> Callable[[ir.Model, Target, dict[str, np.ndarray], Path], list[np.ndarray]]:
    def run(model: ir.Model, target: Target, feeds: dict[str, np.ndarray], folder: Path) -> list[np.ndarray]:
        gpu = load_target("cuda-gpu")
        region = whole(model)
        program = compile_region(region, device, EMULATOR.assemble)
        blob = encode(program)
        code = AcceleratorFunction(driver(program, blob, 0), blob, 1, RUNTIMES["cuda"])
        lowered = lower_model(model, Partition((region,), ()), gpu, lambda _: code)
        library = folder / "model.so"
        build(lowered, gpu.host, library)
        assert gpu_device(library) == "CUDA emulator"
        return Executable(library, lowered.parameters).run([feeds[spec.name] for spec in lowered.inputs])

    return run


# --- in emulation ------------------------------------------------------------------------------------------

Layer = tuple[int, int, int, int, int, int, int, str, str]
"""Batch, size, input and output channels, kernel, stride, groups, dtypes of activations and weights."""

LAYERS: tuple[Layer, ...] = (
    (1, 14, 64, 64, 3, 1, 1, "int8", "int8"),
    (1, 9, 32, 48, 3, 2, 1, "uint8", "int8"),
    (2, 10, 24, 40, 1, 1, 1, "int8", "int8"),  # steps of 16 bytes that cross pixels
    (1, 12, 64, 128, 3, 1, 2, "int8", "int4"),
    (1, 17, 16, 16, 3, 1, 1, "uint8", "int4"),
    (1, 16, 3, 32, 3, 2, 1, "uint8", "int8"),  # words put together from bytes
    (1, 16, 128, 250, 1, 1, 1, "int8", "int8"),  # columns that do not fill words
    (1, 11, 32, 32, 3, 1, 32, "int8", "int8"),
)


def add_layer(bench, layer: Layer, variant: RequantizeVariant) -> None:
    rng = bench.rng
    n, size, channels, outs, kernel, stride, group, x_dtype, w_dtype = layer
    pad = kernel // 2
    out = (size + 2 * pad - kernel) // stride + 1
    info = ml_dtypes.iinfo(w_dtype)
    weights = rng.integers(info.min, info.max + 1, (outs, kernel, kernel, channels // group)).astype(w_dtype)
    bias = rng.integers(-30000, 30000, outs).astype(np.int32)
    scale = CASES.factors(rng, outs, variant, weights[0].size)
    x_zero = CASES.zero_point(rng, x_dtype)
    two, four = (kernel, kernel), (pad, pad, pad, pad)
    op = ops.QConv(two, (stride, stride), four, (1, 1), group, x_zero, 0, 3, -128, 127, variant)
    inputs = [bench.random((n, size, size, channels), x_dtype), *map(bench.constant, (weights, bias, *scale))]
    bench.integer(op, inputs, (n, out, out, outs), "int8")


@pytest.mark.parametrize("device", [DP4A, MMA, HOPPER], ids=["dp4a", "mma", "hopper"])
def test_layers(workbench, emulator, tmp_path, device: Device) -> None:
    bench = workbench(seed=200)
    for number, layer in enumerate(LAYERS):
        add_layer(bench, layer, REQUANTIZE_VARIANTS[number % 4])
    CASES.check(bench, on_the_emulator(device), tmp_path)


def test_convolutions(workbench, emulator, tmp_path) -> None:
    bench = workbench(seed=210)
    for number in range(8):
        variant = REQUANTIZE_VARIANTS[number % 4]
        CASES.add_conv(bench, variant, transposed=number % 3 == 2, w_dtypes=("int8", "uint8", "int4"))
    residual_network(bench, "float32", 16)
    CASES.check(bench, on_the_emulator(MMA), tmp_path)


@pytest.mark.slow
def test_every_tile(workbench, emulator, tmp_path, monkeypatch) -> None:
    """And every way to split the reduction, on shapes that fill none of them."""
    work = mma.Work(1, 50, 40, 9 * 48, 8, 8, signed=True)
    tiles = mma.candidates(work, 1000)
    assert {replace(tile, stages=0, splits=0) for tile in tiles} == {
        replace(tile, stages=0, splits=0) for tile in mma.TILES
    }
    chosen = itertools.cycle(tiles)
    monkeypatch.setattr(mma, "mma_tile", lambda *_, **__: next(chosen))
    bench = workbench(seed=205)
    for number in range(len(tiles)):
        add_layer(
            bench, (2, 5, 48, 40, 3, 1, 1, ("int8", "uint8")[number % 2], ("int8", "int4")[number % 3 == 0]), "float32"
        )
    CASES.check(bench, on_the_emulator(HOPPER), tmp_path)


@pytest.mark.parametrize("case", ["pools", "lookup_softmax_and_resize"])
def test_other_operators(workbench, emulator, tmp_path, case: str) -> None:
    getattr(CASES, f"test_{case}")(workbench, on_the_emulator(MMA), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "inputs"), [("kws_dscnn", 3), ("resnet20_cifar10", 1), ("mobilenet_v1_025_128", 1)])
def test_networks(zoo: Path, emulator, tmp_path: Path, name: str, inputs: int) -> None:
    """Whole networks with tensor cores, through the CUDA launcher."""
    costless = ("launch=0 us", "crossing.sync=0 us", "crossing.bandwidth=100000 GB/s", "memory.bandwidth=100000 GB/s")
    overrides = tuple(f"gpu.{change}" for change in costless)
    done = place(zoo / "models" / f"{name}.onnx", "cuda-gpu", Options(overrides=overrides))
    assert done.target.gpu is not None
    device = device_of(done.target.gpu)

    def code(region: Region) -> AcceleratorFunction:
        program = compile_region(region, device, EMULATOR.assemble)
        assert "(qgpu_product<" in program.source
        return AcceleratorFunction(driver(program, encode(program), 0), encode(program), 1, RUNTIMES["cuda"])

    lowered = lower_model(done.integer, done.partition, done.target, code)
    library = tmp_path / "model.so"
    build(lowered, done.target.host, library)
    executable = Executable(library, lowered.parameters)
    rng = np.random.default_rng(7)
    for _ in range(inputs):
        feeds = {spec.name: rng.standard_normal(spec.shape).astype(spec.dtype) for spec in lowered.inputs}
        outputs = executable.run([feeds[spec.name] for spec in lowered.inputs])
        for spec, array in zip(lowered.outputs, outputs, strict=True):
            assert np.array_equal(array, execute(done.integer, feeds)[spec.name])


def test_channels_are_joined_in_place(workbench, emulator, tmp_path) -> None:
    """Two layers that read a third make the parts of a Concat; a Concat of an input is a kernel of its own."""
    bench, same = (workbench(seed=240) for _ in range(2))
    for each in (bench, same):
        x = each.random((1, 7, 9, 24), "int8")
        first = fire_layer(each, x, 1, 16)
        parts = [fire_layer(each, first, kernel, outs) for kernel, outs in ((1, 40), (3, 24), (1, 8))]
        joined = [((1, 7, 9, 72), np.dtype(np.int8))]
        each.standard("Concat", parts, joined, {"axis": 3})
        fire_layer(each, each.outputs.pop(), 3, 20)
        each.standard("Concat", [x, fire_layer(each, x, 1, 48)], joined, {"axis": 3})
        each.outputs = each.outputs[1:]
    program = compile_region(whole(same.model()), HOPPER, lambda source, _: source.encode())
    assert [step.operators for step in program.steps] == ["QConv"] * 6 + ["Concat"]
    shared = set.intersection(*(set(step.arguments) for step in program.steps[1:4]))
    assert 7 * 9 * 72 in {span.bytes for span in shared}
    CASES.check(bench, on_the_emulator(HOPPER), tmp_path)


def fire_layer(bench, x: ir.Value, kernel: int, outs: int) -> ir.Value:
    *size, channels = shape_of(x)[1:]
    op = ops.QConv((kernel, kernel), (1, 1), same(kernel // 2), (1, 1), 1, 3, 0, -5, -128, 127, "float32")
    weights = bench.rng.integers(-128, 128, (outs, kernel, kernel, channels)).astype(np.int8)
    constants = (weights, np.zeros(outs, np.int32), *CASES.factors(bench.rng, outs, "float32", weights[0].size))
    bench.integer(op, [x, *map(bench.constant, constants)], (1, *size, outs), "int8")
    return bench.outputs.pop()


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_borders_on_the_device(workbench, emulator, tmp_path, dtype: str) -> None:
    """Floats in, with a change of layout, and out."""
    bench, eight = workbench(seed=250), np.dtype(dtype)
    scale, zero_point = (bench.constant(array) for array in (np.array(0.013, np.float32), np.array(7, dtype)))
    image = bench.input(bench.rng.standard_normal((2, 3, 5, 11)).astype(np.float32))
    bench.standard("QuantizeLinear", [image, scale, zero_point], [((2, 3, 5, 11), eight)])
    bench.standard("Transpose", [bench.outputs.pop()], [((2, 5, 11, 3), eight)], {"perm": [0, 2, 3, 1]})
    rows = bench.input(bench.rng.standard_normal((3, 40)).astype(np.float32))
    bench.standard("QuantizeLinear", [rows, scale, zero_point], [((3, 40), eight)])
    bench.standard(
        "DequantizeLinear", [bench.random((2, 13), dtype), scale, zero_point], [((2, 13), np.dtype(np.float32))]
    )
    assert [group.label for group in grouped(bench.nodes)] == [
        "QuantizeLinear_Transpose", "QuantizeLinear", "DequantizeLinear"
    ]  # fmt: skip
    assert not any(map(refusal, bench.nodes))
    CASES.check(bench, on_the_emulator(HOPPER), tmp_path)


# --- four bits ---------------------------------------------------------------------------------------------


def four_bit_network(bench, channels: int, x_dtype: str, low: int) -> None:
    """Activations of sixteen integers from `low` on, weights of four bits.

    A requantized input, of bytes; a layer; another in groups, to which the first's result is added; one with strides.
    """
    rng = bench.rng
    high, size = low + 15, 9
    one, none = bench.constant(np.ones(1, np.float32)), bench.constant(np.zeros(1, np.int32))
    x = bench.random((2, size, size, channels), x_dtype)
    bench.integer(ops.QRequantize(0, low + 3, low, high, "float32"), [x, one, none], (2, size, size, channels), x_dtype)
    values = [bench.outputs.pop()]

    def conv(value: ir.Value, kernel: int, stride: int, group: int, outs: int) -> ir.Value:
        size = shape_of(value)[1]
        out = (size - 1) // stride + 1
        op = ops.QConv(
            (kernel, kernel),
            (stride, stride),
            same(kernel // 2),
            (1, 1),
            group,
            low + 3,
            0,
            low + 5,
            low,
            high,
            "float32",
        )
        weights = rng.integers(-8, 8, (outs, kernel, kernel, channels // group)).astype(ml_dtypes.int4)
        bias = rng.integers(-300, 300, outs).astype(np.int32)
        scale = rng.uniform(0.005, 0.02, outs).astype(np.float32), np.zeros(outs, np.int32)
        inputs = [value, *map(bench.constant, (weights, bias, *scale))]
        bench.integer(op, inputs, (2, out, out, outs), x_dtype)
        return bench.outputs.pop()

    values.append(conv(values[0], 3, 1, 1, channels))
    values.append(conv(values[1], 3, 1, 2, channels))
    factors = arithmetic.add_factors(0.05, 0.03, 0.06, "float32")
    add = ops.QAdd(0, low + 5, low + 3, low + 4, *factors, low, high, "float32")
    bench.integer(add, [values[2], values[1]], (2, size, size, channels), x_dtype)
    values.append(bench.outputs.pop())
    bench.outputs.append(conv(values[3], 1, 2, 1, channels))


@pytest.mark.parametrize(("x_dtype", "low"), [("int8", -8), ("uint8", 0), ("int8", 0)])
@pytest.mark.parametrize("channels", [64, 32, 24])
def test_four_bits(workbench, emulator, tmp_path, channels: int, x_dtype: str, low: int) -> None:
    bench, same = (workbench(seed=230 + channels + low) for _ in range(2))
    for each in (bench, same):
        four_bit_network(each, channels, x_dtype, low)
    sign = "true" if low < 0 else "false"
    program = compile_region(whole(same.model()), INT4, lambda source, _: source.encode())
    calls = re.findall(r"QOperands<(\d+), (\d), (\d), (\w+), (\d)>", program.source)
    # The first makes its words of bytes; the others read what is packed, unless groups have no whole words.
    packed = "4" if channels // 2 % 8 == 0 else "8"
    assert [call[1:] for call in calls] == [(bits, "4", sign, "4") for bits in ("8", packed, packed)]
    CASES.check(bench, on_the_emulator(INT4), tmp_path)


# --- what goes to a device ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_carried_to_a_device(emulator: Path, zoo: Path, tmp_path: Path, monkeypatch) -> None:
    """benchmarks/gpu_device.py, and its half that runs without qcompiler, beside the emulated driver."""
    sys.path.insert(0, str(BENCHMARKS))
    script = module(BENCHMARKS / "gpu_device.py")
    folder = script.Folder(tmp_path / "carried")
    file, versions = zoo / "models" / "mnist_cnn.onnx", {"all": HOPPER, "plain": MMA}
    integer = script.add_network(folder, "mnist_cnn", file, "cuda-sm90", versions, EMULATOR.assemble)
    few = mma.candidates(mma.Work(1, 196, 16, 200, 8, 8, signed=True), 132)[-2:]
    monkeypatch.setattr(script.mma, "candidates", lambda *_: few)
    script.add_sweep(folder, [integer], MMA, EMULATOR.assemble)
    script.build_launcher(folder.path)
    folder.finish()
    environment = {**os.environ, "LD_LIBRARY_PATH": str(emulator.parent)}
    command = [sys.executable, str(folder.path / "run.py"), "--repeat", "1", "--no-rivals"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder.path / "results.json").read_text("utf-8"))["results"]
    compared = [(item["device"], item["wrong"], item["samples"]) for item in results]
    assert compared == [("CUDA emulator", 0, 6)] * 2 + [("CUDA emulator", 0, 0)] * 3
    assert all(len(item["each"]) in (2, 3) for item in results[2:])
    text = (folder.path / "results.md").read_text("utf-8")
    assert "mnist_cnn | plain" in text and "5x5 14x14x8 to 16, stride 1" in text
