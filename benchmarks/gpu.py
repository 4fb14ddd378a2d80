"""GPUs: what the kernels are made of, whether they are right, and, where there is an NVIDIA GPU, how fast they are.

    python benchmarks/gpu.py -o benchmarks/results/gpu.md [--samples 20]

Instructions are counted with cuobjdump where it is on PATH, else in the PTX; both need nvcc. Right means: bit for bit
what the numpy reference gives, run through OpenCL (by PoCL where there is no GPU). With an NVIDIA GPU the same networks
run there, beside PyTorch and ONNX Runtime in fp16, each in a process of its own (gpu_engines.py says what they need).
Needs the model zoo (QCOMPILER_ZOO).
"""

import os
import re
import shutil
import subprocess
import sys
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
from qcompiler.backends.gpu_binary import cubin, ptx
from qcompiler.backends.gpu_code import device_of
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
ARCHITECTURES = ("sm_75", "sm_80", "sm_90")
FOR_NOTHING = (
    "gpu.launch=0 us", "gpu.crossing.sync=0 us", "gpu.crossing.bandwidth=100000 GB/s",
    "gpu.memory.bandwidth=100000 GB/s",
)  # fmt: skip
"""With its real costs a GPU leaves the smallest networks to the CPU."""


@dataclass(frozen=True)
class Counts:
    """Instructions in the machine code of one architecture, or in PTX."""

    tensor: int
    dot: int
    wide_loads: int
    size: int
    """Bytes of machine code."""


def model_file(name: str, folder: Path) -> Path:
    return resnet_50(folder / "resnet_50.onnx") if name == "resnet_50" else ZOO / "models" / f"{name}.onnx"


def count(source: str, architecture: str, folder: Path) -> Counts:
    code = cubin(source, architecture)
    if shutil.which("cuobjdump") is None:
        text = ptx(source, architecture)
        patterns = (r"wmma\.mma\.sync", r"\bdp4a\.", r"ld\.global(\.nc)?\.v4")
    else:
        file = folder / "kernels.cubin"
        file.write_bytes(code)
        command = ["cuobjdump", "-sass", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        patterns = (r"\bIMMA\.", r"\bIDP\.4A\.", r"\bLDG\.E\.128")
    tensor, dot, wide = (len(re.findall(pattern, text)) for pattern in patterns)
    return Counts(tensor, dot, wide, len(code))


def instructions(folder: Path) -> list[str]:
    where = "machine code (cuobjdump)" if shutil.which("cuobjdump") else "PTX"
    lines = [
        "## CUDA: what the kernels are made of", "",
        f"`cuda-gpu`, INT8, batch 1. Static counts in {where}; each network's kernels as one cubin.", "",
        "| network | features | architecture | launches | kernels | tensor core | dp4a | 128-bit loads | KiB |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    if shutil.which("nvcc") is None:
        return [*lines[:2], "Not counted: there is no nvcc on this machine."]
    for name in COUNTED:
        for features in ("[dp4a]", "[dp4a, mma]"):
            overrides = (*FOR_NOTHING, f"gpu.features={features}")
            done = place(model_file(name, folder), "cuda-gpu", Options(overrides=overrides))
            assert done.target.gpu is not None
            regions = [region for region in done.partition.regions if region.backend == "gpu"]
            programs = [compile_region(region, device_of(done.target.gpu), lambda _, __: b"") for region in regions]
            kernels = len({step.launch.kernel for program in programs for step in program.steps})
            launches = sum(len(program.steps) for program in programs)
            for architecture in ARCHITECTURES:
                found = [count(program.source, architecture, folder) for program in programs]
                totals = [sum(getattr(item, key) for item in found) for key in ("tensor", "dot", "wide_loads", "size")]
                figures = " | ".join(f"{figure:,}" for figure in (*totals[:3], totals[3] // 1024))
                lines.append(f"| {name} | `{features}` | {architecture} | {launches} | {kernels} | {figures} |")
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


def engine(name: str, path: Path) -> float | str:
    """Seconds, or why there are none."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_engines.py")), name, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return done.stderr.strip().splitlines()[-1]
    return float(done.stdout.split()[-1])


def timings(folder: Path, samples: int) -> list[str]:
    title, rows, device = "## CUDA: on a device", list[str](), ""
    if shutil.which("nvcc") is None:
        return [title, "", "Not run: there is no nvcc on this machine."]
    for name in COUNTED:
        bundle = compiled(name, "cuda-gpu", folder)
        library = bundle.path / "model.so"
        if (problem := gpu_problem(library)) is not None:
            return [title, "", f"**Not run: {problem}.** {NEVER_RUN}"]
        device = gpu_device(library)
        ours = engine("ours", bundle.path)
        others = [_time(engine(other, model_file(name, folder)), ours) for other in ("torch", "onnxruntime")]
        rows.append(f"| {name} | {differing(bundle, samples)} of {samples} | {_time(ours)} | {' | '.join(others)} |")
        print(rows[-1], flush=True)
    about = f"{device}, batch 1, copies of inputs and outputs included. In brackets: times ours."
    head = [
        "| network | wrong | ours, INT8 | PyTorch, fp16 in a graph | ONNX Runtime, fp16 |",
        "|---|---|--:|--:|--:|",
    ]
    return [title, "", about, "", *head, *rows]


NEVER_RUN = """The CUDA code has not run on a device yet. The tests run it on a CPU, in emulation of threads, barriers
and tensor core fragments (`tests/backends/cuda_emulator`), bit for bit."""


def _time(seconds: float | str, ours: float | str | None = None) -> str:
    if isinstance(seconds, str):
        return seconds
    ratio = f" ({seconds / ours:.2f}×)" if isinstance(ours, float) else ""
    return f"{seconds * 1e6:,.0f} µs{ratio}"


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the tables go.")],
    samples: Annotated[int, typer.Option(help="Samples of the comparison with the reference.")] = 20,
) -> None:
    if not (ZOO / "manifest.json").is_file():
        raise QCompilerError(f"no model zoo in {ZOO}; set QCOMPILER_ZOO to its folder.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = [instructions(folder), correctness(folder, samples), timings(folder, samples)]
    title = ["# GPUs", "", "`python benchmarks/gpu.py -o benchmarks/results/gpu.md`", ""]
    text = "\n".join([*title, *("\n".join([*part, ""]) for part in parts)])
    output.write_text(text, "utf-8", newline="\n")


if __name__ == "__main__":
    typer.run(main)
