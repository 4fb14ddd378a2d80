"""Microcontrollers: every zoo network that fits, checked and counted in an emulator; convolutions beside CMSIS-NN.

    python benchmarks/mcu.py -o benchmarks/results/mcu.md [--samples 20] [--cmsis-nn path/to/CMSIS-NN]

Needs the model zoo (QCOMPILER_ZOO), make, and the cross compilers and emulators the specs name. CMSIS-NN, if its
sources are given, runs the same layers on the same numbers under the same counter, and its outputs must be equal too.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx_ir as ir
import typer

from qcompiler.compile import Placed, place
from qcompiler.emit_c import write_placed
from qcompiler.graph import QCOMPILER_DOMAIN, const_of, data_input, nodes_of, shape_of, value_name
from qcompiler.integer.ops import QConv, QGemm
from qcompiler.integer.reference import Executor
from qcompiler.options import Options
from qcompiler.target import Target

TARGETS = ("cortex-m55", "cortex-m4", "cortex-m7", "riscv-rvv")
MODELS: tuple[tuple[str, str], ...] = (
    ("mnist_cnn", "mnist"),
    ("kws_dscnn", "kws01"),
    ("resnet8_cifar10", "cifar10"),
    ("resnet20_cifar10", "cifar10"),
    ("mobilenet_v1_025_128", "imagenet224"),
)
"""Model and data set of the zoo."""
COMPARED_MODELS = ("kws_dscnn", "resnet8_cifar10")
COMPARED_TARGETS = ("cortex-m55", "cortex-m4")
CALIBRATION_SAMPLES = 32
CMSIS_FLAGS = ("-O3", "-ffast-math", "-ffunction-sections", "-DCMSIS_NN_USE_SINGLE_ROUNDING")
"""As CMSIS-NN's own CMakeLists builds it (-Ofast), with the rounding of `requantize: tosa`."""

Arrays = Mapping[str, np.ndarray]


# --- running -----------------------------------------------------------------------------------------------


def make(folder: Path, *arguments: str) -> list[list[str]]:
    """What make printed, in words by line."""
    done = subprocess.run(
        ["make", "--silent", "-C", str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"make {' '.join(arguments)} failed in {folder}:\n{done.stdout}")
    return [line.split() for line in done.stdout.splitlines()]


def facts(lines: Sequence[Sequence[str]]) -> dict[str, int]:
    return {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()}


def section_bytes(folder: Path) -> int:
    """Code and constants of libmodel.a."""
    (total,) = [words for words in make(folder, "size") if words[-1:] == ["(TOTALS)"]]
    return int(total[0])


def inputs_of(zoo: Path, model: str, count: int) -> list[Arrays]:
    """What the zoo's own evaluation feeds a model first."""
    import importlib.util
    import json

    script = importlib.util.spec_from_file_location("eval_ref", zoo / "eval_ref.py")
    assert script is not None and script.loader is not None
    evaluation = importlib.util.module_from_spec(script)
    script.loader.exec_module(evaluation)
    entry = next(e for e in json.loads((zoo / "manifest.json").read_text())["models"] if e["name"] == model)
    run, fed = evaluation.ort_run(str(zoo / entry["model"]), 1), []

    def record(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        fed.append(dict(inputs))
        return run(inputs)

    evaluation.evaluate(entry, record, count)
    return fed


def placed(zoo: Path, model: str, target: str, samples: Sequence[Arrays]) -> Placed:
    """Compiled up to lowering, the integers before the last float operators being outputs too."""
    calibration = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    done = place(zoo / "models" / f"{model}.onnx", target, Options(calibration=calibration))
    graph = done.integer.graph
    graph.outputs.extend(data_input(node) for node in nodes_of(graph, "DequantizeLinear"))
    return done


def missing(target: Target) -> str | None:
    chip = target.host.bare_metal
    assert chip is not None
    needed = ((chip.compiler, chip.compiler_package), (chip.emulator[0], chip.emulator_package), *chip.tools.items())
    for tool, package in needed:
        if shutil.which(tool) is None:
            return f"{tool} is missing: apt-get install {package}"
    return None


def plugin_instructions(done: Placed, samples: Sequence[Arrays]) -> int | None:
    """Instructions per sample in user-mode emulation: what a run with all samples takes more than one with the first.

    None where QEMU's dynamically linked emulator, which takes plugins, is missing.
    """
    chip = done.target.host.bare_metal
    assert chip is not None
    emulator = chip.emulator[0].removesuffix("-static")
    if len(samples) < 2 or shutil.which(emulator) is None:
        return None
    with tempfile.TemporaryDirectory() as work:
        plugin = Path(work) / "count.so"
        source = Path(__file__).with_name("qemu_count.c")
        subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(plugin)], check=True)
        totals: list[int] = []
        for count in (1, len(samples)):
            folder = Path(work) / str(count)
            folder.mkdir()
            write_placed(folder, done, samples[:count])
            command = " ".join([emulator, "-plugin", str(plugin), *(f"'{word}'" for word in chip.emulator[1:])])
            totals.append(facts(make(folder, "run", f"EMULATOR={command}"))["total"])
        return (totals[1] - totals[0]) // (len(samples) - 1)


# --- CMSIS-NN ----------------------------------------------------------------------------------------------


def build_cmsis(sources: Path, target: Target, folder: Path) -> Path:
    """The int8 part of CMSIS-NN as a library."""
    chip = target.host.bare_metal
    assert chip is not None
    library = folder / f"cmsis-{target.name}.a"
    files = [
        file
        for file in sorted(sources.glob("Source/*/*.c"))
        if not any(word in file.name for word in ("f16", "f32", "lstm", "svdf"))
    ]
    objects: list[str] = []
    for file in files:
        output = folder / f"{file.stem}.{target.name}.o"
        flags = [*chip.flags, *CMSIS_FLAGS, f"-I{sources / 'Include'}"]
        subprocess.run([chip.compiler, *flags, "-c", str(file), "-o", str(output)], check=True)
        objects.append(str(output))
    subprocess.run([f"{chip.compiler.removesuffix('gcc')}ar", "rcs", str(library), *objects], check=True)
    return library


@dataclass(frozen=True)
class Layer:
    """What layer.h says."""

    numbers: Mapping[str, int]
    arrays: Mapping[str, np.ndarray]

    def header(self) -> str:
        lines = [f"#define {name} {value}" for name, value in self.numbers.items()]
        for name, array in self.arrays.items():
            kind = {"int8": "int8_t", "int32": "int32_t"}[str(array.dtype)]
            numbers = ",".join(map(str, array.reshape(-1).tolist()))
            lines.append(f"static const _Alignas(16) {kind} {name}[] = {{{numbers}}};")
        return "\n".join([*lines, ""])


def layer_of(node: ir.Node, executor: Executor, sample: Arrays) -> Layer | None:
    """A layer as CMSIS-NN takes it, or None if it does not."""
    x, y = data_input(node), node.outputs[0]
    values = executor.run(sample, [value_name(x), value_name(y)])
    weights, bias, multiplier, shift = (const_of(data_input(node, index)) for index in range(1, 5))
    assert weights is not None and bias is not None and multiplier is not None and shift is not None
    if node.op_type == "QGemm":
        op = QGemm.of(node)
        rows, depth = shape_of(x)
        if rows != 1:
            return None
        n, h, w, c, oh, ow, kernel, strides, pads = rows, 1, 1, depth, 1, 1, (1, 1), (1, 1), (0, 0)
        depthwise = False
    else:
        op = QConv.of(node)
        (n, h, w, c), (_, oh, ow, _) = shape_of(x), shape_of(y)
        kernel, strides, pads = op.kernel_shape, op.strides, op.pads[:2]
        depthwise = op.group > 1
        if depthwise:
            weights = weights[..., 0].transpose(1, 2, 0)
    names = ("N", "H", "W", "C", "O", "OH", "OW", "KH", "KW", "SX", "SY", "LEFT", "TOP")
    sizes = (n, h, w, c, len(bias), oh, ow, *kernel, strides[1], strides[0], pads[1], pads[0])
    numbers = {f"LAYER_{name}": size for name, size in zip(names, sizes, strict=True)}
    numbers |= {"LAYER_X_ZERO": op.x_zero_point, "LAYER_Y_ZERO": op.y_zero_point}
    numbers |= {"LAYER_LOW": op.clamp_min, "LAYER_HIGH": op.clamp_max}
    numbers |= {"LAYER_DEPTHWISE": int(depthwise), "LAYER_GEMM": int(node.op_type == "QGemm")}
    numbers |= {"OUTPUT_ELEMENTS": int(np.prod(shape_of(y)))}
    arrays = {
        "layer_x": values[value_name(x)],
        "layer_w": weights,
        "layer_bias": bias,
        "layer_multiplier": multiplier,
        "layer_shift": shift,
        "layer_expected": values[value_name(y)],
    }
    return Layer(numbers, arrays)


def cmsis_instructions(layer: Layer, sources: Path, library: Path, emitted: Path, target: Target) -> int:
    """Run one layer on the board of an emitted folder; its output must be ours."""
    chip = target.host.bare_metal
    assert chip is not None
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        (folder / "layer.h").write_text(layer.header())
        for name in ("board.h", "cortex_m.c", "board.ld"):
            shutil.copy(emitted / name, folder / name)
        shutil.copy(Path(__file__).with_name("cmsis_nn.c"), folder / "main.c")
        makefile = (emitted / "board.mk").read_text().splitlines()
        board = dict(line.split(" := ", 1) for line in makefile if " := " in line)
        flags = [*chip.flags, "-O2", f"-I{sources / 'Include'}", *board["BOARD_CFLAGS"].split()]
        linked = [str(library), *board["BOARD_LDFLAGS"].split(), "-Wl,--gc-sections", "-Wl,--no-warnings", "-lm"]
        subprocess.run(
            [chip.compiler, *flags, "main.c", "cortex_m.c", *linked, "-o", "layer.elf"], cwd=folder, check=True
        )
        done = subprocess.run(
            [*chip.emulator, "layer.elf"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found = facts([line.split() for line in (done.stdout + done.stderr).splitlines()])
        assert found["differing"] == 0, (layer.numbers, found)
        return found["instructions"]


@dataclass(frozen=True)
class Compared:
    """One layer, ours and CMSIS-NN's."""

    kernel: str
    macs: int
    ours: int
    theirs: int


def compare(done: Placed, emitted: Path, sample: Arrays, sources: Path, library: Path) -> list[Compared]:
    counts: dict[str, int] = {}
    for name, value in facts_in_order(make(emitted, "profile")):
        counts.setdefault(name, value)
    executor = Executor(done.integer)
    rows: list[Compared] = []
    for number, node in enumerate(done.integer.graph):
        if node.domain != QCOMPILER_DOMAIN or node.op_type not in ("QConv", "QGemm"):
            continue
        layer = layer_of(node, executor, sample)
        if layer is not None:
            theirs = cmsis_instructions(layer, sources, library, emitted, done.target)
            name = f"model_{number:03}_{node.op_type}"
            weights = const_of(data_input(node, 1))
            assert weights is not None
            macs = layer.numbers["OUTPUT_ELEMENTS"] * weights[0].size
            rows.append(Compared(name, macs, counts[name], theirs))
    return rows


def facts_in_order(lines: Sequence[Sequence[str]]) -> list[tuple[str, int]]:
    return [(words[0], int(words[1])) for words in lines if len(words) == 2 and words[1].isdigit()]


# --- report ------------------------------------------------------------------------------------------------

NETWORK_HEADER = (
    "| model | target | equal | code B | constants B | arena B | lower bound B | stack B | in + out B | instructions |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
LAYER_HEADER = (
    "| model | target | layer | MACs | qcompiler | CMSIS-NN | CMSIS-NN / qcompiler |",
    "|---|---|---|---|---|---|---|",
)


def network_row(folder: Path, model: str, done: Placed, samples: Sequence[Arrays]) -> str:
    program = write_placed(folder, done, samples)
    ran = facts(make(folder, "run"))
    assert ran["equal"] == len(samples), (model, done.target.name, ran)
    instructions = ran.get("instructions") or plugin_instructions(done, samples)
    ports = sum(port.bytes for port in (*program.inputs, *program.outputs))
    cells = (
        model,
        done.target.name,
        f"{ran['equal']} of {len(samples)}",
        f"{section_bytes(folder) - program.constant_bytes:,}",
        f"{program.constant_bytes:,}",
        f"{program.arena.peak:,}",
        f"{program.arena.lower_bound:,}",
        f"{ran['stack_bytes']:,}",
        f"{ports:,}",
        "not counted" if instructions is None else f"{instructions:,}",
    )
    return f"| {' | '.join(cells)} |"


def layer_rows(model: str, target: str, layers: Sequence[Compared]) -> list[str]:
    total = Compared(
        "all of these", *(sum(getattr(row, field) for row in layers) for field in ("macs", "ours", "theirs"))
    )
    return [
        f"| {model} | {target} | {row.kernel} | {row.macs:,} | {row.ours:,} | {row.theirs:,} | "
        f"{row.theirs / row.ours:.2f} |"
        for row in (*layers, total)
    ]


def main(
    output: Annotated[Path, typer.Option("-o", help="The report to write.")],
    samples: int = 20,
    cmsis_nn: Annotated[Path | None, typer.Option(help="A checkout of ARM-software/CMSIS-NN.")] = None,
    targets: Annotated[str, typer.Option(help="Commas between.")] = ",".join(TARGETS),
) -> None:
    zoo = Path(os.environ.get("QCOMPILER_ZOO", "../shared/zoo"))
    networks, layers, notes = [*NETWORK_HEADER], [*LAYER_HEADER], []
    with tempfile.TemporaryDirectory() as work:
        libraries: dict[str, Path] = {}
        for model, _ in MODELS:
            fed = inputs_of(zoo, model, CALIBRATION_SAMPLES + samples)
            for name in targets.split(","):
                done = placed(zoo, model, name, fed[:CALIBRATION_SAMPLES])
                if (problem := missing(done.target)) is not None:
                    notes.append(f"{name}: {problem}")
                    continue
                folder = Path(work) / f"{model}-{name}"
                folder.mkdir()
                networks.append(network_row(folder, model, done, fed[CALIBRATION_SAMPLES:]))
                typer.echo(networks[-1])
                if cmsis_nn is not None and model in COMPARED_MODELS and name in COMPARED_TARGETS:
                    if name not in libraries:
                        libraries[name] = build_cmsis(cmsis_nn, done.target, Path(work))
                    rows = compare(done, folder, fed[CALIBRATION_SAMPLES], cmsis_nn, libraries[name])
                    layers += layer_rows(model, name, rows)
                    typer.echo(layers[-1])
    text = ["# Microcontrollers", "", *report_notes(samples, cmsis_nn), "", *networks, *notes]
    if len(layers) > len(LAYER_HEADER):
        text += ["", "## Convolutions and fully connected layers beside CMSIS-NN: instructions", "", *layers]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join([*text, ""]), "utf-8")


def report_notes(samples: int, cmsis_nn: Path | None) -> list[str]:
    command = f"python benchmarks/mcu.py -o benchmarks/results/mcu.md --samples {samples}"
    if cmsis_nn is not None:
        command += " --cmsis-nn …/CMSIS-NN"
    return [
        f"`{command}`",
        "",
        "Equal: samples whose every integer output is that of the numpy reference, and whose floats are within 1e-5 of "
        "the largest. Code: kernels and calls, without the C library and the example. Arena: all memory between "
        "inputs and outputs, temporaries included; no plan can need less than the lower bound. Instructions per "
        "inference under QEMU's -icount shift=0, read from SysTick (one tick is 31.25 instructions on mps3-an547 and "
        "40 on the mps2 boards); riscv-rvv's by a plugin of qemu-riscv64 (qemu-user), comparing included.",
        "",
        "CMSIS-NN: built with GCC 12 as its CMakeLists does, called through its wrappers, weights summed beforehand "
        "where it allows that; its outputs equal ours, bit for bit, on every layer listed.",
    ]


if __name__ == "__main__":
    typer.run(main)
