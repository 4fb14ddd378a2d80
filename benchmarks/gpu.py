"""GPUs: what the kernels are made of, and whether they are right. gpu_device.py is for machines with an NVIDIA GPU.

    python benchmarks/gpu.py -o benchmarks/results/gpu.md [--samples 20]

Instructions, registers and shared memory are read off machine code (nvcc, and cuobjdump on PATH). Right means: bit for
bit what the numpy reference gives, run through OpenCL (by PoCL where there is no GPU). Needs the model zoo
(QCOMPILER_ZOO).
"""

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx_ir as ir
import typer
from networks import resnet_50

import qcompiler
from qcompiler.backends.gpu import compile_region
from qcompiler.backends.gpu_binary import cubin, unassembled
from qcompiler.backends.gpu_code import device_of
from qcompiler.backends.gpu_program import GpuProgram
from qcompiler.bundle import Bundle
from qcompiler.compile import place
from qcompiler.errors import QCompilerError
from qcompiler.integer.reference import Executor
from qcompiler.options import Options
from qcompiler.runtime import gpu_device, gpu_problem

ZOO = Path(os.environ.get("QCOMPILER_ZOO", Path(__file__).resolve().parents[2] / "shared" / "zoo"))
COUNTED = ("resnet20_cifar10", "squeezenet11", "resnet_50")
CHECKED = (
    "mnist_cnn", "kws_dscnn", "resnet8_cifar10", "resnet20_cifar10", "mobilenet_v1_025_128", "squeezenet11",
    "ad01_autoencoder", "kws_dscnn_tflite_int8_qdq", "resnet8_tflite_int8_qdq",
    "mobilenet_v1_025_128_tflite_qat_qdq", "fastestdet_352",
)  # fmt: skip
"""All of the zoo but a network that ends in floats on the CPU."""
TARGETS = (("cuda-gpu", "sm_75", 40), ("cuda-sm80", "sm_80", 108), ("cuda-sm90", "sm_90", 132))
"""With an architecture and the multiprocessors of its chip."""
PATTERNS = {
    "IMMA": r"\bIMMA\.", "dp4a": r"\bIDP\.4A\.", "ldmatrix": r"\bLDSM\.", "cp.async": r"\bLDGSTS\.",
    "128-bit loads": r"\bLD[GS]\.(E\.)?(BYPASS\.)?128", "spills": r"\b(STL|LDL)\b",
}  # fmt: skip
FOR_NOTHING = (
    "gpu.launch=0 us", "gpu.crossing.sync=0 us", "gpu.crossing.bandwidth=100000 GB/s",
    "gpu.memory.bandwidth=100000 GB/s",
)  # fmt: skip
"""With its real costs a GPU leaves the smallest networks to the CPU."""


@dataclass(frozen=True)
class Code:
    """What the kernels of a network are in machine code."""

    counts: dict[str, int]
    """Instructions, by the name in `PATTERNS`."""
    registers: int
    """Of the thread that needs most."""
    shared: int
    """Bytes of the block that needs most."""
    size: int
    """Bytes."""


def model_file(name: str, folder: Path) -> Path:
    return resnet_50(folder / "resnet_50.onnx") if name == "resnet_50" else ZOO / "models" / f"{name}.onnx"


def inspect(source: str, architecture: str, folder: Path) -> Code:
    file = folder / "kernels.cubin"
    file.write_bytes(cubin(source, architecture))

    def listed(option: str) -> str:
        return subprocess.run(["cuobjdump", option, str(file)], capture_output=True, text=True, check=True).stdout

    text, usage = listed("-sass"), listed("-res-usage")
    counts = {name: len(re.findall(pattern, text)) for name, pattern in PATTERNS.items()}
    registers, shared = (max(map(int, re.findall(rf"{key}:(\d+)", usage)), default=0) for key in ("REG", "SHARED"))
    return Code(counts, registers, shared, file.stat().st_size)


def programs_of(name: str, target: str, features: str | None, folder: Path) -> list[GpuProgram]:
    overrides = FOR_NOTHING if features is None else (*FOR_NOTHING, f"gpu.features={features}")
    done = place(model_file(name, folder), target, Options(overrides=overrides))
    assert done.target.gpu is not None
    regions = [region for region in done.partition.regions if region.backend == "gpu"]
    return [compile_region(region, device_of(done.target.gpu), unassembled) for region in regions]


def instructions(folder: Path) -> list[str]:
    title = ["## CUDA: what the kernels are made of", ""]
    if shutil.which("nvcc") is None or shutil.which("cuobjdump") is None:
        return [*title, "Not counted: there is no nvcc, or no cuobjdump, on this machine."]
    names = list(PATTERNS)
    columns = ["launches", "kernels", *names, "registers", "shared", "blocks", "KiB"]
    chips = ", ".join(f"{units} ({architecture})" for _, architecture, units in TARGETS)
    lines = [
        *title, "INT8, batch 1, the whole network on the GPU. Static counts in machine code, each network's kernels as",
        "one cubin. Registers and shared memory (bytes): of the kernel that needs most. Blocks: of the products'",
        f"launches, the median; multiprocessors: {chips}.", "",
        f"| network | features | architecture | {' | '.join(columns)} |", f"|---|---|---|{'--:|' * len(columns)}",
    ]  # fmt: skip
    for name in COUNTED:
        for target, architecture, _ in TARGETS:
            for features in ("[dp4a]", None):
                programs = programs_of(name, target, features, folder)
                steps = [step for program in programs for step in program.steps]
                blocks = [
                    int(np.prod(step.launch.grid)) for step in steps if step.operators.startswith(("QConv", "QGemm"))
                ]
                found = [inspect(program.source, architecture, folder) for program in programs]
                cells = [len(steps), len({step.launch.kernel for step in steps})]
                cells += [sum(code.counts[key] for code in found) for key in names]
                cells += [max(code.registers for code in found), max(code.shared for code in found)]
                cells += [int(np.median(blocks)), sum(code.size for code in found) // 1024]
                label = features or "all"
                lines.append(f"| {name} | {label} | {architecture} | {' | '.join(f'{cell:,}' for cell in cells)} |")
                print(lines[-1], flush=True)
    return lines


def compiled(name: str, target: str, folder: Path) -> Bundle:
    return qcompiler.compile(
        model_file(name, folder), target, output=folder / f"{name}.{target}.qc", overrides=FOR_NOTHING
    )


def differing(bundle: Bundle, samples: int) -> int:
    """Samples of which some output differs from the numpy reference's."""
    random = np.random.default_rng(0)
    feeds = {port.name: random.standard_normal((samples, *port.shape[1:])).astype(port.dtype) for port in bundle.inputs}
    outputs = bundle.run(feeds)
    reference = Executor(ir.load(bundle.path / "model.int.onnx"))
    wrong = 0
    for index in range(samples):
        wanted = reference.run({name: array[index : index + 1] for name, array in feeds.items()})
        wrong += any(not np.array_equal(wanted[name], outputs[name][index : index + 1]) for name in wanted)
    return wrong


def correctness(folder: Path, samples: int) -> list[str]:
    title, rows, device = "## OpenCL: bit for bit", list[str](), ""
    for name in CHECKED:
        bundle = compiled(name, "opencl-gpu", folder)
        library = bundle.path / "model.so"
        if (problem := gpu_problem(library)) is not None:
            return [title, "", f"Not run: {problem}."]
        device = gpu_device(library)
        tables = (file.read_text("utf-8") for file in bundle.path.glob("gpu_*.txt"))
        launches = sum(line.count(" groups of ") for table in tables for line in table.splitlines())
        rows.append(f"| {name} | {launches} | {samples} | {differing(bundle, samples)} |")
        print(rows[-1], flush=True)
    head = ["| network | launches | samples | different from the reference |", "|---|--:|--:|--:|"]
    return [title, "", f"`opencl-gpu`, executed on: {device}.", "", *head, *rows]


def on_a_device() -> list[str]:
    return [
        "## CUDA: on a device", "",
        "Not run yet. `gpu_device.py` prepares what is to be run (docs/gpu.md). The tests run the kernels on a CPU, in",
        "emulation of threads, barriers, copies and fragments (`tests/backends/cuda_emulator`), bit for bit.",
    ]  # fmt: skip


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the tables go.")],
    samples: Annotated[int, typer.Option(help="Samples of the comparison with the reference.")] = 20,
) -> None:
    if not (ZOO / "manifest.json").is_file():
        raise QCompilerError(f"no model zoo in {ZOO}; set QCOMPILER_ZOO to its folder.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [instructions(folder), correctness(folder, samples), on_a_device()]
    title = ["# GPUs", "", "`python benchmarks/gpu.py -o benchmarks/results/gpu.md`", ""]
    text = "\n".join([*title, *("\n".join([*part, ""]) for part in parts)])
    output.write_text(text, "utf-8", newline="\n")


if __name__ == "__main__":
    typer.run(main)
