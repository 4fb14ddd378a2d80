"""Every template for every set of CPU features against the numpy reference, bit for bit.

One table of CPUs, one of cases and one of formats. x86 code runs on this machine if it has the features; Arm code in
an emulator. Extremes of both operands come up on purpose: a saturating instruction would show.
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tvm

from qcompiler import host_cpu
from qcompiler.backends import mcu
from qcompiler.backends.base import Kernel, host_code
from qcompiler.backends.cpu import lower_node
from qcompiler.backends.mcu_emit import TestVector, write_c
from qcompiler.graph import value_name
from qcompiler.integer import ops
from qcompiler.integer.reference import execute
from qcompiler.integer.weight_groups import Groups, record_groups
from qcompiler.quant import arithmetic
from qcompiler.quant.arithmetic import RequantizeVariant
from qcompiler.target import Target
from qcompiler.target_loader import load_target


@dataclass(frozen=True)
class Cpu:
    """A set of features, and what shows that they are used."""

    name: str
    target: str
    """The spec it is a variant of."""
    mcpu: str
    mattr: tuple[str, ...]
    needs: tuple[str, ...]
    """LLVM features this machine must have to run the code; none where an emulator has them all."""
    instruction: str
    """In the assembly of a convolution with signed activations."""
    register: str

    def spec(self, *, threads: int = 1) -> Target:
        base = load_target(self.target)
        described = {**base.host.tvm_target, "kind": "llvm", "mcpu": self.mcpu, "mattr": self.mattr}
        return base.model_copy(
            update={"host": base.host.model_copy(update={"tvm_target": described, "threads": threads})}
        )


NATIVE = (
    Cpu("avx512vnni", "x86-cpu", "icelake-server", ("-amx-int8",), ("avx512vnni", "avx512vl"), "vpdpbusd", "zmm"),
    Cpu("avx512", "x86-cpu", "skylake-avx512", ("-avx512vnni",), ("avx512bw", "avx512vl"), "vpmaddwd", "zmm"),
    Cpu("avxvnni", "x86-cpu", "x86-64-v3", ("+avxvnni",), ("avxvnni",), "vpdpbusd", "ymm"),
    Cpu("avx2", "x86-cpu", "haswell", ("+avx2",), ("avx2", "fma"), "vpmaddwd", "ymm"),
    Cpu("sse2", "x86-cpu", "x86-64", ("+sse2",), (), "pmaddwd", "xmm"),
)
EMULATED = (
    Cpu("neon", "arm-cpu", "cortex-a72", ("+neon",), (), "sadalp", "v"),
    Cpu("dotprod", "arm-cpu", "cortex-a76", ("+neon", "+dotprod"), (), "sdot", "v"),
    Cpu("i8mm", "arm-cpu", "neoverse-v1", ("+neon", "+dotprod", "+i8mm", "-sve"), (), "smmla", "v"),
)


@dataclass(frozen=True)
class Format:
    x: str
    w: str
    y: str
    variant: RequantizeVariant
    x_zero: int = 0
    w_zero: int = 0
    group: int = 0
    """Weights that share a factor, where there are more input channels."""


FORMATS = (
    Format("int8", "int8", "int8", "float32", x_zero=-7),
    Format("uint8", "int8", "uint8", "tflite", x_zero=131),
    Format("uint8", "uint8", "int8", "tosa", x_zero=3, w_zero=127),
    Format("int16", "int8", "int16", "float32"),
    Format("int8", "int4", "int8", "float32", x_zero=12),
    Format("int8", "int4", "int8", "float32", x_zero=12, group=8),
    Format("uint8", "int2", "uint8", "tosa", x_zero=127, group=8),
)


@dataclass(frozen=True)
class Case:
    """A convolution NHWC; `gemm` for a fully connected layer of as many rows as the width."""

    name: str
    x: tuple[int, int, int, int]
    outs: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilations: tuple[int, int] = (1, 1)
    group: int = 1
    gemm: bool = False
    transposed: bool = False


CASES = (
    Case("pointwise", (1, 5, 7, 16), 24),
    Case("pointwise of odd depth", (1, 3, 5, 13), 9),
    Case("pointwise with strides", (1, 5, 9, 8), 8, strides=(2, 2)),
    Case("first layer", (1, 9, 11, 3), 10, (3, 3), (2, 2), (0, 0, 1, 1)),
    Case("padded", (1, 6, 7, 16), 20, (3, 3), pads=(1, 1, 1, 1)),
    Case("dilated, uneven strides", (2, 7, 10, 8), 5, (2, 3), (1, 3), (2, 1, 0, 1), dilations=(2, 2)),
    Case("grouped", (1, 5, 6, 12), 15, (2, 2), group=3),
    Case("depthwise", (1, 7, 9, 24), 24, (3, 3), pads=(1, 1, 1, 1), group=24),
    Case("depthwise with strides", (1, 9, 8, 7), 7, (3, 3), (2, 2), (0, 1, 1, 0), group=7),
    Case("transposed", (1, 4, 5, 8), 6, (3, 3), (2, 2), (1, 1, 0, 0), transposed=True),
    Case("one row", (1, 1, 1, 67), 33, gemm=True),
)


def output_size(case: Case) -> list[int]:
    sizes = zip(case.x[1:3], case.kernel, case.strides, case.dilations, case.pads[:2], case.pads[2:], strict=True)
    if case.transposed:
        return [(i - 1) * s + (k - 1) * d + 1 - before - after for i, k, s, d, before, after in sizes]
    return [(i + before + after - (k - 1) * d - 1) // s + 1 for i, k, s, d, before, after in sizes]


def extremes(rng: np.random.Generator, shape: Sequence[int], dtype: str) -> np.ndarray:
    """Random numbers; a third are the type's lowest and highest."""
    info = ml_dtypes.iinfo(dtype)
    values = rng.integers(info.min, info.max + 1, shape)
    picked = rng.integers(0, 6, shape)
    return np.where(picked == 0, info.min, np.where(picked == 1, info.max, values)).astype(dtype)


def add(bench, case: Case, form: Format) -> None:
    rng, depth = bench.rng, case.x[3] // case.group
    terms = depth * case.kernel[0] * case.kernel[1]
    spread = (
        150
        * np.sqrt(terms)
        * {"int16": 130, "int8": 0.6, "uint8": 0.6}[form.y]
        * {"int4": 8, "int2": 20}.get(form.w, 100)
    )
    grouped = 0 < form.group < depth and not case.transposed
    if grouped:
        spread *= {"int4": 8, "int2": 3}[form.w]
    real = rng.uniform(0.3, 2, case.outs) * {"int16": 4000, "int8": 60, "uint8": 60}[form.y] / spread
    limits = np.iinfo(form.y)
    # In the middle half, so that either end of the range is reached.
    y_zero = 0 if form.y == "int16" else int(rng.integers(limits.min + 64, limits.max - 63))
    low, high = int(limits.min), int(rng.integers(limits.max // 2, limits.max + 1))
    weights = extremes(rng, (case.outs, *case.kernel, depth), form.w)
    bits = {"int4": 4, "int2": 2}.get(form.w, 8)
    if grouped:
        shape, most = (*weights.shape[:3], -(-depth // form.group)), arithmetic.GROUP_FACTORS[bits]
        factors = rng.choice([1, most, *rng.integers(1, most + 1, 2)], shape).astype(np.uint8)
        weights = arithmetic.scaled_codes(weights.astype(np.int8), factors, form.group, 3)
    if form.x == "int16":
        # Their products with -128 would ask for 64 bits, which is another test's.
        weights = np.clip(weights, -20, 20)
    constants = [
        bench.constant(weights),
        bench.constant(rng.integers(-9000, 9000, case.outs).astype(np.int32)),
        *map(bench.constant, arithmetic.multipliers(real, form.variant)),
    ]
    if grouped:
        record_groups(constants[0], Groups(form.group, bits))
    if case.gemm:
        op = ops.QGemm(form.x_zero, form.w_zero, y_zero, low, high, form.variant)
        rows = case.x[2]
        flat = bench.constant(weights.reshape(case.outs, depth))
        if grouped:
            record_groups(flat, Groups(form.group, bits))
        x = bench.input(extremes(rng, (rows, depth), form.x))
        bench.integer(op, [x, flat, *constants[1:]], (rows, case.outs), form.y)
        return
    cls = ops.QConvTranspose if case.transposed else ops.QConv
    op = cls(
        case.kernel, case.strides, case.pads, case.dilations, case.group,
        form.x_zero, form.w_zero, y_zero, low, high, form.variant,
    )  # fmt: skip
    x = bench.input(extremes(rng, case.x, form.x))
    bench.integer(op, [x, *constants], (case.x[0], *output_size(case), case.outs), form.y)


def filled(workbench, form: Format):
    bench = workbench(seed=FORMATS.index(form))
    for case in CASES:
        add(bench, case, form)
    return bench


def ids(items: Sequence[Cpu] | Sequence[Format]) -> list[str]:
    return [
        item.name if isinstance(item, Cpu) else f"{item.x}*{item.w}{f'/{item.group}' if item.group else ''}"
        for item in items
    ]


@pytest.mark.parametrize("form", FORMATS, ids=ids(FORMATS))
@pytest.mark.parametrize("cpu", NATIVE, ids=ids(NATIVE))
def test_on_this_machine(workbench, run_on_cpu, tmp_path: Path, cpu: Cpu, form: Format) -> None:
    lacking = set(cpu.needs) - host_cpu.detect().features
    if host_cpu.architecture() != "x86_64" or lacking:
        pytest.skip(f"this machine has no {', '.join(sorted(lacking)) or 'x86 instructions'}")
    bench = filled(workbench, form)
    model = bench.model()
    expected = execute(model, bench.feeds)
    actual = run_on_cpu(model, cpu.spec(), bench.feeds, tmp_path)
    for case, value, array in zip(CASES, model.graph.outputs, actual, strict=True):
        wanted = expected[value_name(value)]
        assert len(np.unique(wanted)) > min(10, wanted.size // 2), f"{case.name}: a constant result proves nothing"
        assert np.array_equal(array, wanted), f"{case.name}: {int((array != wanted).sum())} of {wanted.size} differ"


@pytest.mark.parametrize("form", FORMATS, ids=ids(FORMATS))
@pytest.mark.parametrize("cpu", EMULATED, ids=ids(EMULATED))
def test_in_an_emulator(workbench, tmp_path: Path, cpu: Cpu, form: Format) -> None:
    target = cpu.spec()
    chip = target.host.bare_metal
    assert chip is not None
    for tool, package in (
        ("make", "make"), (chip.compiler, chip.compiler_package), (chip.emulator[0], chip.emulator_package)
    ):  # fmt: skip
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing; apt-get install {package}")
    bench = filled(workbench, form)
    model = bench.model()
    program = mcu.lower(model, target)
    values = execute(model, bench.feeds, [port.value for port in (*program.inputs, *program.outputs)])
    inputs, outputs = (tuple(values[port.value] for port in ports) for ports in (program.inputs, program.outputs))
    write_c(tmp_path, program, target.host, [TestVector(inputs, outputs)])
    done = subprocess.run(
        ["make", "--silent", "-C", str(tmp_path), "run"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0 and "PASS" in done.stdout.split(), done.stdout + done.stderr


@pytest.mark.parametrize("cpu", NATIVE + EMULATED, ids=ids(NATIVE + EMULATED))
def test_the_instruction_is_used(workbench, cpu: Cpu) -> None:
    """And no other one: VPMADDUBSW, above all, which saturates."""
    bench = workbench(seed=1)
    add(bench, Case("", (1, 8, 8, 16), 32, (3, 3), pads=(1, 1, 1, 1)), FORMATS[0])
    host = host_code(cpu.spec().host)
    kernel = lower_node(bench.nodes[0], host)
    assert isinstance(kernel, Kernel)
    assembly = tvm.compile(kernel.function, target=host.target).mod.inspect_source("asm").replace("{vex}", "")
    words = [words for line in assembly.splitlines() if len(words := line.split(None, 1)) == 2]
    products = {"vpdpbusd", "vpmaddwd", "pmaddwd", "vpmaddubsw", "pmaddubsw", "smmla", "sdot", "sadalp"}
    used = {name for name, _ in words if name in products}
    assert {name.removeprefix("v") for name in used} == {cpu.instruction.removeprefix("v")}
    assert any(cpu.register in operands for name, operands in words if name in used)
