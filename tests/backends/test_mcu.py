"""Code for microcontrollers, run in emulators and natively, against the numpy reference, bit for bit."""

import ctypes
import importlib.util
import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qcompiler import cli
from qcompiler.backends import mcu
from qcompiler.backends.base import host_code
from qcompiler.backends.mcu_emit import TestVector, write_c
from qcompiler.backends.mcu_functions import generate
from qcompiler.compile import Placed, place
from qcompiler.emit_c import emit_c, write_placed
from qcompiler.errors import QCompilerError
from qcompiler.graph import data_input, is_op, nodes_of, value_name
from qcompiler.integer import ops
from qcompiler.integer.reference import execute
from qcompiler.options import Options
from qcompiler.quant import arithmetic
from qcompiler.quant.arithmetic import RequantizeVariant
from qcompiler.target import Target
from qcompiler.target_loader import load_target

ARM_CPUS = ("arm-cpu", "arm-cpu-neon", "arm-cpu-i8mm")
HEXAGONS = ("hexagon-dsp", "hexagon-v67", "hexagon-scalar")
TARGETS = ("cortex-m55", "cortex-m4", "cortex-m7", "riscv-rvv", "portable-c", *ARM_CPUS, *HEXAGONS)
LIBRARY_FUNCTIONS = {"memcpy", "memset", "memmove", "expf"}
MODELS = ("mnist_cnn", "kws_dscnn", "resnet8_cifar10", "resnet20_cifar10", "mobilenet_v1_025_128")
CALIBRATION_SAMPLES = 4


# --- tools -------------------------------------------------------------------------------------------------


def need_tools(target: Target) -> None:
    """Skip where the compiler or the emulator is missing."""
    chip = target.host.bare_metal
    assert chip is not None
    for tool, package in (
        ("make", "make"),
        (chip.compiler, chip.compiler_package),
        (chip.emulator[0], chip.emulator_package),
        *chip.tools.items(),
    ):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing; apt-get install {package}")


def make(folder: Path, *goals: str) -> tuple[int, str]:
    """Exit status and output. (QEMU's semihosting console is stderr.)"""
    done = subprocess.run(
        ["make", "--silent", "-C", str(folder), *goals],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout


def run_example(folder: Path) -> dict[str, int]:
    """Build, without warnings, and run the example; what it printed."""
    status, output = make(folder, "model.elf")
    assert status == 0 and "-W" not in output, output
    status, output = make(folder, "run")
    lines = [line.split() for line in output.splitlines()]
    assert status == 0 and ["PASS"] in lines, output
    return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}


def emit_bench(bench, target: Target, folder: Path) -> mcu.McuProgram:
    """Write a workbench's model with its feeds as the only test vector."""
    model = bench.model()
    program = mcu.lower(model, target)
    folder.mkdir(exist_ok=True)
    write_c(folder, program, target.host, [vector(program, model, bench.feeds)])
    return program


def vector(program: mcu.McuProgram, model: ir.Model, feeds: dict[str, np.ndarray]) -> TestVector:
    values = execute(model, feeds, [port.value for port in (*program.inputs, *program.outputs)])
    inputs, outputs = (tuple(values[port.value] for port in ports) for ports in (program.inputs, program.outputs))
    return TestVector(inputs, outputs)


# --- nodes -------------------------------------------------------------------------------------------------


def add_conv(
    bench,
    x: tuple[int, int, int, int],
    channels: int,
    kernel: tuple[int, int],
    *,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
    group: int = 1,
    x_dtype: str = "int8",
    w_zero: int = 0,
    variant: RequantizeVariant = "tosa",
    gain: float = 1.0,
) -> None:
    """`gain` times a factor that brings sums near the 8-bit range."""
    rng, depth = bench.rng, x[3] // group
    padded = (x[1] + pads[0] + pads[2], x[2] + pads[1] + pads[3])
    out = [(size - (k - 1) * d - 1) // s + 1 for size, k, s, d in zip(padded, kernel, strides, dilations, strict=True)]
    real = gain * rng.uniform(0.2, 2, channels) / (np.sqrt(depth * kernel[0] * kernel[1]) * 70)
    multiplier, shift = arithmetic.multipliers(real, variant)
    x_zero, y_zero = int(rng.integers(-128, 128)), int(rng.integers(-128, 128))
    if x_dtype == "uint8":
        x_zero += 128
    op = ops.QConv(
        kernel, strides, pads, dilations, group, x_zero, w_zero, y_zero, -128, int(rng.integers(60, 128)), variant
    )
    inputs = [
        bench.random(x, x_dtype),
        bench.constant(rng.integers(-128, 128, (channels, *kernel, depth)).astype(np.int8)),
        bench.constant(rng.integers(-30000, 30000, channels).astype(np.int32)),
        bench.constant(multiplier),
        bench.constant(shift),
    ]
    bench.integer(op, inputs, (x[0], *out, channels), "int8")


def add_transposed_conv(
    bench,
    x: tuple[int, int, int, int],
    channels: int,
    kernel: tuple[int, int],
    *,
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    group: int = 1,
) -> None:
    rng, depth = bench.rng, x[3] // group
    sizes = zip(x[1:3], kernel, strides, pads[:2], pads[2:], strict=True)
    out = [(size - 1) * s + k - before - after for size, k, s, before, after in sizes]
    reals = rng.uniform(0.2, 2, channels) / (np.sqrt(depth * kernel[0] * kernel[1]) * 70)
    multiplier, shift = arithmetic.multipliers(reals, "tosa")
    inputs = [
        bench.random(x, "int8"),
        bench.constant(rng.integers(-128, 128, (channels, *kernel, depth)).astype(np.int8)),
        bench.constant(rng.integers(-3000, 3000, channels).astype(np.int32)),
        bench.constant(multiplier),
        bench.constant(shift),
    ]
    op = ops.QConvTranspose(kernel, strides, pads, (1, 1), group, -9, 0, 5, -128, 127, "tosa")
    bench.integer(op, inputs, (x[0], *out, channels), "int8")


def add_gemm(bench, rows: int, depth: int, channels: int) -> None:
    rng = bench.rng
    multiplier, shift = arithmetic.multipliers(rng.uniform(0.2, 2, channels) / (np.sqrt(depth) * 70), "tosa")
    inputs = [
        bench.random((rows, depth), "int8"),
        bench.constant(rng.integers(-128, 128, (channels, depth)).astype(np.int8)),
        bench.constant(rng.integers(-3000, 3000, channels).astype(np.int32)),
        bench.constant(multiplier),
        bench.constant(shift),
    ]
    bench.integer(ops.QGemm(3, 0, -7, -128, 127, "tosa"), inputs, (rows, channels), "int8")


def add_others(bench) -> None:
    """Operators whose code is the CPU backend's."""
    rng = bench.rng
    multiplier, shift = arithmetic.multipliers(np.array([0.013]), "tosa")
    factors = [bench.constant(multiplier), bench.constant(shift)]
    x = bench.random((1, 7, 9, 20), "int8")
    bench.integer(ops.QMaxPool((3, 2), (2, 2), (1, 0, 1, 1), (1, 1), -128, 127), [x], (1, 4, 5, 20), "int8")
    bench.integer(ops.QReduceMean((1, 2), 5, -3, -128, 127, "tosa"), [x, *factors], (1, 20), "int8")
    bench.integer(ops.QMul(3, -4, 5, -128, 127, "tosa"), [x, x, *factors], (1, 7, 9, 20), "int8")
    table = bench.constant(rng.integers(-128, 128, 256).astype(np.int8))
    bench.integer(ops.QLookup("Tanh"), [x, table], (1, 7, 9, 20), "int8")


def add_convolutions(bench) -> None:
    """Every template, and borders of each: odd sizes, strides, paddings on one side, copies and none."""
    add_conv(bench, (1, 6, 5, 16), 12, (1, 1))
    add_conv(bench, (1, 5, 7, 8), 6, (1, 1), strides=(2, 2))
    add_conv(bench, (1, 9, 8, 3), 16, (3, 3), pads=(1, 1, 1, 1), strides=(2, 1))
    add_conv(bench, (2, 6, 9, 16), 10, (3, 2), pads=(0, 1, 2, 0))
    add_conv(bench, (1, 11, 5, 1), 16, (10, 4), pads=(4, 1, 5, 1), strides=(2, 2))
    add_conv(bench, (1, 7, 6, 5), 7, (2, 3), dilations=(2, 1), x_dtype="uint8")
    add_conv(bench, (1, 7, 8, 4), 8, (1, 2), dilations=(1, 3))
    add_conv(bench, (1, 6, 6, 6), 8, (2, 2), group=2)
    add_conv(bench, (1, 5, 5, 4), 4, (2, 2), w_zero=9)
    add_conv(bench, (1, 7, 9, 16), 16, (3, 3), group=16, pads=(1, 1, 1, 1))
    add_conv(bench, (1, 8, 7, 5), 5, (5, 3), group=5, strides=(2, 2), pads=(2, 0, 1, 1), dilations=(1, 2))
    # Factors too large for the high half of the product alone, and other roundings.
    add_conv(bench, (1, 4, 4, 16), 8, (1, 1), gain=60)
    add_conv(bench, (1, 4, 4, 16), 8, (1, 1), variant="tflite")
    add_conv(bench, (1, 5, 4, 24), 9, (3, 2), strides=(1, 2), variant="float32")
    add_conv(bench, (1, 5, 7, 8), 16, (1, 1), x_dtype="uint8", variant="float32")
    add_gemm(bench, 1, 37, 10)
    add_gemm(bench, 3, 64, 1)


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_in_the_emulator(workbench, tmp_path: Path, name: str) -> None:
    target = load_target(name)
    need_tools(target)
    bench = workbench(seed=TARGETS.index(name))
    add_convolutions(bench)
    add_others(bench)
    program = emit_bench(bench, target, tmp_path / "out")
    facts = run_example(tmp_path / "out")
    assert facts["samples"] == facts["equal"] == 1
    assert facts["arena_bytes"] == program.arena.peak
    # In vectors, as spills are.
    assert 0 < facts["stack_bytes"] < 512 * program.alignment


def test_other_formats_in_the_emulator(workbench, tmp_path: Path) -> None:
    """Of models that arrive with 16-bit activations or 4-bit weights."""
    target = load_target("cortex-m4")
    need_tools(target)
    bench = workbench(seed=77)
    for index, (x_dtype, group) in enumerate((("int16", 1), ("int16", 6), ("int8", 1), ("int8", 2), ("int8", 6))):
        dtype = ml_dtypes.int4 if index else np.dtype(np.int8)
        factors = arithmetic.multipliers(bench.rng.uniform(0.01, 0.05, 6), "tosa")
        y_dtype = np.iinfo(x_dtype)
        op = ops.QConv((3, 2), (1, 2), (1, 0, 1, 1), (1, 1), group, 0, 0, 0, y_dtype.min, y_dtype.max, "tosa")
        inputs = [
            bench.random((1, 6, 7, 6), x_dtype),
            bench.constant(bench.rng.integers(-8, 8, (6, 3, 2, 6 // group)).astype(dtype)),
            bench.constant(bench.rng.integers(-300, 300, 6).astype(np.int32)),
            *map(bench.constant, factors),
        ]
        bench.integer(op, inputs, (1, 6, 4, 6), x_dtype)
    emit_bench(bench, target, tmp_path / "out")
    facts = run_example(tmp_path / "out")
    assert facts["samples"] == facts["equal"] == 1


def test_the_example_notices_a_wrong_output(workbench, tmp_path: Path) -> None:
    target = load_target("portable-c")
    need_tools(target)
    bench = workbench(seed=7)
    add_gemm(bench, 2, 9, 5)
    model = bench.model()
    program = mcu.lower(model, target)
    good = vector(program, model, bench.feeds)
    good.outputs[0].flat[3] ^= 1
    write_c(tmp_path, program, target.host, [good])
    status, output = make(tmp_path, "run")
    assert status != 0 and "equal 0" in output and "FAIL" in output


def test_a_missing_tool_is_named_in_one_line(workbench, tmp_path: Path) -> None:
    target = load_target("portable-c")
    need_tools(target)
    bench = workbench(seed=8)
    add_gemm(bench, 1, 8, 4)
    program = emit_bench(bench, target, tmp_path)
    status, output = make(tmp_path, "CC=no-such-gcc")
    assert status != 0 and "no-such-gcc is missing; install gcc (apt-get install gcc)" in output
    status, output = make(tmp_path, "run", "EMULATOR=no-such-qemu")
    assert status != 0 and "no-such-qemu is missing; install coreutils" in output
    assert target.host.bare_metal is not None
    chip = target.host.bare_metal.model_copy(update={"tools": {"no-such-linker": "lld"}})
    write_c(tmp_path, program, target.host.model_copy(update={"bare_metal": chip}), [])
    status, output = make(tmp_path)
    assert status != 0 and "no-such-linker is missing; install lld (apt-get install lld)" in output


# --- code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("cortex-m55", "vmlava.s8"),
        ("cortex-m4", "smlad"),
        ("riscv-rvv", "vwmul"),
        ("arm-cpu-neon", "sadalp"),
        ("arm-cpu", "sdot"),
        ("arm-cpu-i8mm", "\tsmmla"),
    ],
)
def test_inner_loops_use_the_chips_dot_product(workbench, name: str, instruction: str) -> None:
    target = load_target(name)
    bench = workbench(seed=9)
    add_conv(bench, (1, 8, 8, 16), 16, (3, 3), pads=(1, 1, 1, 1))
    program = mcu.lower(bench.model(), target)
    assembly = generate(program.module.module, host_code(target.host).target).inspect_source("asm")
    assert assembly.count(instruction) >= 4


def test_every_temporary_lies_in_the_arena_or_on_the_stack(workbench, tmp_path: Path) -> None:
    target = load_target("cortex-m55")
    bench = workbench(seed=10)
    add_convolutions(bench)
    add_others(bench)
    emit_bench(bench, target, tmp_path)
    nm = shutil.which("arm-none-eabi-nm")
    if nm is None:
        pytest.skip("arm-none-eabi-nm is missing; apt-get install gcc-arm-none-eabi")
    listed = subprocess.run(
        [nm, "--undefined-only", tmp_path / "model_kernels.o"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # __aeabi_…: the compiler's own arithmetic.
    undefined = {line.split()[-1] for line in listed}
    assert {symbol for symbol in undefined if not symbol.startswith("__aeabi_")} <= LIBRARY_FUNCTIONS
    need_tools(target)
    assert make(tmp_path)[0] == 0
    symbols = subprocess.run([nm, tmp_path / "model.elf"], capture_output=True, text=True, check=True).stdout
    assert " model_run" in symbols and "malloc" not in symbols and "sbrk" not in symbols


def test_copies_take_a_windows_rows(workbench) -> None:
    bench = workbench(seed=11)
    add_conv(bench, (1, 32, 32, 16), 16, (3, 3), pads=(1, 1, 1, 1))
    program = mcu.lower(bench.model(), load_target("cortex-m55"))
    (function,) = program.module.functions
    assert 3 * 34 * 16 <= function.workspace <= 3 * 34 * 16 + 4 * 16 * 4 + 64
    assert program.arena.peak == program.arena.lower_bound == function.workspace


# --- Hexagon -----------------------------------------------------------------------------------------------


def test_hexagon_convolutions_of_any_shape(workbench, tmp_path: Path) -> None:
    """Vectors cut into parts or not, words or unaligned bytes, rows that end within a vector, scalar rounding."""
    target = load_target("hexagon-dsp")
    need_tools(target)
    bench = workbench(seed=20)
    for channels in (1, 9, 16, 24, 40, 64, 65, 160):
        depth, width = (int(number) for number in bench.rng.integers(1, 40, 2))
        add_conv(bench, (1, 4, width + 2, depth), channels, (2, 3), pads=(1, 0, 0, 1), strides=(1, 1 + channels % 2))
    add_conv(bench, (1, 7, 7, 12), 24, (3, 3), dilations=(2, 2), x_dtype="uint8")
    add_conv(bench, (2, 5, 5, 8), 8, (1, 1), gain=60)
    add_conv(bench, (1, 3, 8, 20), 33, (3, 3), variant="tflite")
    for channels, stride in ((8, 1), (24, 2), (64, 2), (130, 1), (131, 2)):
        padding = (1, 2, 0, 1)
        add_conv(bench, (1, 6, 7, channels), channels, (3, 3), group=channels, strides=(stride, stride), pads=padding)
    add_conv(bench, (1, 9, 9, 16), 16, (3, 3), group=16, dilations=(1, 2), strides=(1, 3), x_dtype="uint8")
    add_conv(bench, (1, 9, 9, 32), 32, (8, 8), group=32)
    add_transposed_conv(bench, (1, 5, 6, 12), 20, (3, 4), strides=(2, 2), pads=(1, 0, 0, 1))
    add_transposed_conv(bench, (1, 5, 6, 24), 24, (3, 3), strides=(1, 1), pads=(2, 1, 0, 1), group=24)
    add_transposed_conv(bench, (1, 4, 4, 16), 16, (2, 2), strides=(2, 2), pads=(0, 0, 0, 0), group=16)
    for rows, depth, channels in ((1, 300, 10), (5, 64, 64), (32, 16, 48)):
        add_gemm(bench, rows, depth, channels)
    emit_bench(bench, target, tmp_path)
    assert run_example(tmp_path)["equal"] == 1


def add_element_wise(bench) -> None:
    """Whole vectors and ends, broadcasts, every element type; factors that need a shift to the left, and none."""
    rng = bench.rng

    def factors(real: float) -> list[ir.Value]:
        return [bench.constant(array) for array in arithmetic.multipliers(np.array([real]), "tosa")]

    ma, sa, mb, sb, my, sy = (int(factor) for factor in arithmetic.add_factors(0.11, 0.07, 0.13, "tosa"))
    for shape, other in (
        ((1, 8, 16, 16), (1, 8, 16, 16)),
        ((1, 5, 7, 33), (1, 5, 7, 33)),
        ((1, 3, 2, 130), (1, 1, 1, 130)),
    ):
        a, b = bench.random(shape, "int8"), bench.random(other, "int8")
        bench.integer(ops.QAdd(1, 3, -5, 7, ma, sa, mb, sb, my, sy, -100, 127, "tosa"), [a, b], shape, "int8")
        bench.integer(ops.QMul(3, -4, 5, -128, 127, "tosa"), [a, b, *factors(0.013)], shape, "int8")
    for shape, dtype, real in (((4, 65), "uint8", 0.9), ((2, 128), "int8", 1.7), ((3, 129), "int8", 0.02)):
        inputs = [bench.random(shape, dtype), *factors(real)]
        bench.integer(ops.QRequantize(9, -4, -128, 120, "tosa"), inputs, shape, "int8")
    for elements, dtype, out in (
        (384, "int8", "int8"),
        (391, "int8", "uint8"),
        (130, "uint8", "int8"),
        (7, "uint8", "uint8"),
    ):
        limits = np.iinfo(out)
        table = bench.constant(rng.integers(limits.min, limits.max + 1, 256).astype(out))
        bench.integer(ops.QLookup("Tanh"), [bench.random((elements,), dtype), table], (elements,), out)


def add_pools(bench) -> None:
    """Rows as they lie, padded, dilated, strided; sums of whole windows, of parts, of a whole map."""
    for shape, kernel, strides, pads, dilations in (
        ((1, 8, 6, 8), (2, 2), (2, 2), (0, 0, 0, 0), (1, 1)),
        ((2, 5, 7, 20), (3, 2), (1, 1), (1, 0, 1, 1), (1, 1)),
        ((1, 7, 9, 130), (3, 3), (1, 3), (1, 1, 1, 1), (2, 2)),
    ):
        out = [
            (size + before + after - (k - 1) * d - 1) // s + 1
            for size, before, after, k, d, s in zip(
                shape[1:3], pads[:2], pads[2:], kernel, dilations, strides, strict=True
            )
        ]
        y = (shape[0], *out, shape[3])
        pool = ops.QMaxPool(kernel, strides, pads, dilations, -90, 127)
        bench.integer(pool, [bench.random(shape, "int8")], y, "int8")
        if dilations == (1, 1):
            reals = 1.1 / np.arange(1, kernel[0] * kernel[1] + 1)
            averages = [bench.constant(array) for array in arithmetic.multipliers(reals, "tosa")]
            for counted in (0, 1):
                average = ops.QAveragePool(kernel, strides, pads, counted, 3, -4, -128, 127, "tosa")
                bench.integer(average, [bench.random(shape, "int8"), *averages], y, "int8")
    averages = [bench.constant(array) for array in arithmetic.multipliers(1.0 / np.arange(1, 46), "tosa")]
    average = ops.QAveragePool((5, 9), (1, 1), (0, 0, 0, 0), 0, 3, -4, -128, 127, "tosa")
    bench.integer(average, [bench.random((1, 5, 9, 24), "int8"), *averages], (1, 1, 1, 24), "int8")


def test_hexagon_pools_and_element_wise_operators(workbench, tmp_path: Path) -> None:
    target = load_target("hexagon-dsp")
    need_tools(target)
    bench = workbench(seed=25)
    add_element_wise(bench)
    add_pools(bench)
    program = emit_bench(bench, target, tmp_path)
    assert run_example(tmp_path)["equal"] == 1
    assembly = generate(program.module.module, host_code(target.host).target).inspect_source("asm")
    # Eight to a vector, for each of the three tables of more than one.
    assert assembly.count("vlut32") >= 24


def instructions_of(bench, target: Target, folder: Path) -> int:
    emit_bench(bench, target, folder)
    facts = run_example(folder)
    assert facts["equal"] == 1
    return facts["instructions"]


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_vectors_take_a_tenth_of_the_scalar_instructions(workbench, tmp_path: Path, kernel: tuple[int, int]) -> None:
    """64 channels to 64, counted by the emulator's own register in both builds."""
    targets = [load_target(name) for name in ("hexagon-dsp", "hexagon-scalar")]
    need_tools(targets[0])
    counts: list[int] = []
    for target in targets:
        bench = workbench(seed=21)
        pad = kernel[0] // 2
        add_conv(bench, (1, 8, 8, 64), 64, kernel, pads=(pad, pad, pad, pad))
        counts.append(instructions_of(bench, target, tmp_path / target.name))
    assert 10 * counts[0] <= counts[1]
    assert counts[0] / (64 * 64 * 64 * kernel[0] * kernel[1]) < 0.03


def test_vrmpy_does_the_inner_loops(workbench, tmp_path: Path) -> None:
    """In the disassembly: so many vrmpy, and scalar multiplications nowhere."""
    target = load_target("hexagon-dsp")
    objdump = shutil.which("llvm-objdump")
    if objdump is None:
        pytest.skip("llvm-objdump is missing; apt-get install llvm")
    bench = workbench(seed=22)
    add_conv(bench, (1, 8, 8, 64), 64, (3, 3), pads=(1, 1, 1, 1))
    add_conv(bench, (1, 8, 8, 16), 16, (3, 3), pads=(1, 1, 1, 1))
    add_gemm(bench, 16, 64, 128)
    program = emit_bench(bench, target, tmp_path)
    command = [objdump, "--mattr=+hvxv66,+hvx-length128b", "-d", str(tmp_path / "model_kernels.o")]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for function in program.module.functions:
        code = listing.split(f"<{function.name}>:")[1].split("Disassembly")[0].split(">:")[0]
        assert code.count("vrmpy") >= 8, function.name
        assert " = mpy" not in code and "+= mpy" not in code, function.name


def test_hexagon_v68_builds(workbench, tmp_path: Path) -> None:
    """Debian's emulator does not run it."""
    target = load_target("hexagon-v68")
    bench = workbench(seed=23)
    add_conv(bench, (1, 8, 8, 16), 32, (3, 3), pads=(1, 1, 1, 1))
    add_conv(bench, (1, 7, 9, 16), 16, (3, 3), group=16, pads=(1, 1, 1, 1))
    program = emit_bench(bench, target, tmp_path)
    assembly = generate(program.module.module, host_code(target.host).target).inspect_source("asm")
    assert assembly.count("vrmpy") >= 8
    need_tools(target)
    status, output = make(tmp_path)
    assert status == 0 and "-W" not in output, output


def test_hexagon_runtime_divides_and_rounds(tmp_path: Path) -> None:
    """The board's own arithmetic, compiled for this machine, against numpy's."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is missing; apt-get install gcc")
    source = Path(str(files("qcompiler.runtime_stubs") / "baremetal/hexagon-linux-user/hexagon_runtime.c"))
    flags = ["-shared", "-fPIC", "-O1", "-ffp-contract=off", "-fno-builtin"]
    flags += [f"-D{name}=board_{name}" for name in ("expf", "memcpy", "memmove", "memset", "nearbyintf")]
    subprocess.run(["gcc", *flags, str(source), "-o", str(tmp_path / "runtime.so")], check=True)
    library = ctypes.CDLL(str(tmp_path / "runtime.so"))
    rng = np.random.default_rng(24)

    def call(name: str, kind: type, *columns: np.ndarray) -> list[float]:
        function = getattr(library, name)
        function.restype, function.argtypes = kind, [kind] * len(columns)
        return [function(*(column[i].item() for column in columns)) for i in range(len(columns[0]))]

    bits = rng.integers(0, 1 << 32, (3000, 2), dtype=np.uint32).view(np.float32)
    tiny = rng.standard_normal((2000, 2)).astype(np.float32) * np.array([[1e-38, 1]], np.float32)
    a, b = np.concatenate([bits, rng.standard_normal((2000, 2)).astype(np.float32), tiny]).T
    with np.errstate(all="ignore"):
        wanted = a / b
    got = np.array(call("__hexagon_divsf3", ctypes.c_float, a, b), np.float32)
    assert np.array_equal(got, wanted, equal_nan=True)
    x = np.concatenate([rng.uniform(-300, 300, 2000), np.arange(-9, 9) / 2, rng.uniform(-1e9, 1e9, 99)])
    x = x.astype(np.float32)
    assert np.array_equal(np.array(call("board_nearbyintf", ctypes.c_float, x), np.float32), np.rint(x))
    x = rng.uniform(-87, 88, 3000).astype(np.float32)
    wanted = np.exp(x.astype(np.float64))
    assert np.abs(np.array(call("board_expf", ctypes.c_float, x)) / wanted - 1).max() < 3e-7
    n = rng.integers(-(1 << 62), 1 << 62, 2000) >> rng.integers(0, 62, 2000)
    d = (rng.integers(1, 1 << 62, 2000) >> rng.integers(0, 61, 2000)) * rng.choice([-1, 1], 2000)
    d[d == 0] = 1
    quotients = call("__hexagon_divdi3", ctypes.c_int64, n, d)
    rests = call("__hexagon_moddi3", ctypes.c_int64, n, d)
    for dividend, divisor, quotient, rest in zip(n.tolist(), d.tolist(), quotients, rests, strict=True):
        assert quotient * divisor + rest == dividend and abs(rest) < abs(divisor) and rest * dividend >= 0


# --- the interface -----------------------------------------------------------------------------------------


def quantized_ports(workbench) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """float → int8 → 3-output graph: a float output, an integer one that is also read, and a copy of an input."""
    bench = workbench(seed=12)
    x = bench.input((bench.rng.standard_normal((1, 4, 4, 8)) * 3).astype(np.float32))
    scale, zero = bench.constant(np.float32(0.05)), bench.constant(np.int8(4))
    bench.standard("QuantizeLinear", [x, scale, zero], [((1, 4, 4, 8), np.dtype(np.int8))])
    quantized = bench.outputs.pop()
    quantized.name = "quantized"
    bench.integer(ops.QMaxPool((2, 2), (2, 2), (0, 0, 0, 0), (1, 1), -128, 127), [quantized], (1, 2, 2, 8), "int8")
    pooled = bench.outputs[-1]
    flat = bench.constant(np.array([1, 32]))
    bench.standard("Reshape", [pooled, flat], [((1, 32), np.dtype(np.int8))])
    reshaped = bench.outputs.pop()
    reshaped.name = "reshaped"
    bench.standard("DequantizeLinear", [reshaped, scale, zero], [((1, 32), np.dtype(np.float32))])
    other = bench.random((5,), "int8")
    bench.outputs.append(other)
    return bench.model(), bench.feeds


def test_ports_and_borders(workbench, tmp_path: Path) -> None:
    target = load_target("portable-c")
    need_tools(target)
    model, feeds = quantized_ports(workbench)
    program = mcu.lower(model, target)
    source, plain = program.inputs
    assert (source.dtype, source.quantization) == ("int8", mcu.Quantization(np.float32(0.05).item(), 4))
    assert plain.border is None and plain.quantization is None
    assert [port.dtype for port in program.outputs] == ["int8", "int8", "int8"]
    write_c(tmp_path, program, target.host, [])
    sources = [str(tmp_path / name) for name in ("model.c", "model_weights.c", "model_kernels.c")]
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-fwrapv", "-Werror", *sources, "-lm", "-o", str(tmp_path / "model.so")],
        check=True,
    )
    library = ctypes.CDLL(str(tmp_path / "model.so"))

    def call(function: str, *arrays: np.ndarray) -> None:
        getattr(library, function)(*(array.ctypes.data_as(ctypes.c_void_p) for array in arrays))

    wanted = execute(model, feeds, [source.value, *(value_name(value) for value in model.graph.outputs)])
    names = list(feeds)
    quantized = np.zeros(source.shape, np.int8)
    call("model_quantize_input0", feeds[names[0]], quantized)
    assert np.array_equal(quantized, wanted[source.value])
    outputs = [np.zeros(port.shape, port.dtype) for port in program.outputs]
    call("model_run", quantized, feeds[names[1]], *outputs)
    pooled, dequantized, copied = (wanted[value_name(value)] for value in model.graph.outputs)
    assert np.array_equal(outputs[0], pooled)
    assert np.array_equal(outputs[1].reshape(-1), pooled.reshape(-1))
    assert np.array_equal(outputs[2], copied)
    real = np.zeros(program.outputs[1].shape, np.float32)
    call("model_dequantize_output1", outputs[1], real)
    assert np.array_equal(real, dequantized)


def test_equal_models_give_equal_files(workbench, tmp_path: Path) -> None:
    for name in ("a", "b"):
        bench = workbench(seed=13)
        add_conv(bench, (1, 5, 5, 16), 8, (3, 3), pads=(1, 1, 1, 1))
        emit_bench(bench, load_target("cortex-m55"), tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert "model_kernels.o" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_names_cannot_leave_their_comment(workbench, tmp_path: Path) -> None:
    bench = workbench(seed=14)
    add_gemm(bench, 1, 8, 4)
    program = emit_bench(bench, load_target("portable-c"), tmp_path)
    hostile = replace(program.inputs[0], name="x */ int y; /*\n#error")
    write_c(tmp_path, replace(program, inputs=(hostile,)), load_target("portable-c").host, [])
    header = (tmp_path / "model.h").read_text()
    assert "*/ int y" not in header and "\n#error" not in header


def test_an_unknown_board_is_refused(workbench, tmp_path: Path) -> None:
    target = load_target("portable-c")
    assert target.host.bare_metal is not None
    chip = target.host.bare_metal.model_copy(update={"board": "mps3-an574"})
    host = target.host.model_copy(update={"bare_metal": chip})
    bench = workbench(seed=15)
    add_gemm(bench, 1, 8, 4)
    with pytest.raises(QCompilerError, match="no such board, did you mean 'mps3-an547'"):
        write_c(tmp_path, mcu.lower(bench.model(), target), host, [])


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_writes_a_folder(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output = str(zoo / "models" / "mnist_cnn.onnx"), tmp_path / "firmware"
    with pytest.raises(SystemExit) as exit_code:
        cli.main([model, "--target", "portable-c", "--emit", "c", "-o", str(output), "--json"])
    assert exit_code.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"] == str(output) and facts["arena_bytes"] >= facts["arena_lower_bound"] > 0
    need_tools(load_target("portable-c"))
    assert run_example(output)["equal"] == 2


def test_refusals(zoo: Path, tmp_path: Path) -> None:
    model = zoo / "models" / "mnist_cnn.onnx"
    with pytest.raises(QCompilerError, match=r"arm-npu has an accelerator; choose a target such as cortex-m55"):
        emit_c(model, "arm-npu", tmp_path / "npu")
    with pytest.raises(QCompilerError, match=r"x86-cpu says nothing of bare metal"):
        emit_c(model, "x86-cpu", tmp_path / "x86")
    assert not (tmp_path / "npu").exists() and not (tmp_path / "x86").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "main.c").write_text("int main(void) { return 0; }")
    with pytest.raises(QCompilerError, match="left alone"):
        emit_c(model, "cortex-m55", tmp_path / "mine")


# --- networks ----------------------------------------------------------------------------------------------


def real_inputs(zoo: Path, name: str, count: int) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """The model and the first inputs that the zoo's evaluation feeds it."""
    script = importlib.util.spec_from_file_location("eval_ref", zoo / "eval_ref.py")
    assert script is not None and script.loader is not None
    evaluation = importlib.util.module_from_spec(script)
    script.loader.exec_module(evaluation)
    entry = next(e for e in json.loads((zoo / "manifest.json").read_text())["models"] if e["name"] == name)
    run, fed = evaluation.ort_run(str(zoo / entry["model"]), 1), []

    def record(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        fed.append(dict(inputs))
        return run(inputs)

    evaluation.evaluate(entry, record, count)
    return zoo / entry["model"], fed


def network(zoo: Path, name: str, target: str, samples: int) -> tuple[Placed, Sequence[dict[str, np.ndarray]]]:
    """A placed model whose integers before the last float operators are outputs too."""
    path, fed = real_inputs(zoo, name, CALIBRATION_SAMPLES + samples)
    calibration = {key: np.concatenate([inputs[key] for inputs in fed[:CALIBRATION_SAMPLES]]) for key in fed[0]}
    done = place(path, target, Options(calibration=calibration))
    graph = done.integer.graph
    graph.outputs.extend(data_input(node) for node in nodes_of(graph, "DequantizeLinear"))
    assert any(is_op(node, "DequantizeLinear") for node in graph)
    return done, fed[CALIBRATION_SAMPLES:]


def check_network(zoo: Path, folder: Path, name: str, target: str, samples: int) -> None:
    need_tools(load_target(target))
    done, fed = network(zoo, name, target, samples)
    program = write_placed(folder, done, fed)
    assert any(not port.dtype.startswith("float") for port in program.outputs)
    assert program.arena.peak <= 1.1 * program.arena.lower_bound
    facts = run_example(folder)
    assert facts["equal"] == facts["samples"] == samples


@pytest.mark.parametrize("target", ["cortex-m55", "cortex-m4", "riscv-rvv", "hexagon-dsp", *ARM_CPUS])
def test_keyword_spotting(zoo: Path, tmp_path: Path, target: str) -> None:
    check_network(zoo, tmp_path, "kws_dscnn", target, samples=2)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "kws_dscnn"])
@pytest.mark.parametrize("target", ["arm-cpu", "arm-cpu-i8mm"])
def test_networks_on_arm_cpus(zoo: Path, tmp_path: Path, name: str, target: str) -> None:
    check_network(zoo, tmp_path, name, target, samples=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["cortex-m55", "cortex-m4", "riscv-rvv", "hexagon-dsp", *ARM_CPUS])
def test_networks(zoo: Path, tmp_path: Path, name: str, target: str) -> None:
    check_network(zoo, tmp_path, name, target, samples=20)
