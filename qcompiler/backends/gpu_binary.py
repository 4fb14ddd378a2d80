"""What the device's driver loads: source as it is for OpenCL, a fat binary made by nvcc for CUDA."""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from qcompiler import tools
from qcompiler.backends.gpu_code import Device
from qcompiler.errors import QCompilerError

# No fused multiply-add: results are the same bits as on every other device.
_FLAGS = ("-O3", "-fmad=false", "-std=c++17")


def binary(source: str, device: Device) -> bytes:
    """The code of a program, from `gpu_code.Code.source`.

    A fat binary has machine code for each of the device's architectures, and PTX of the last for newer ones.

    Raises:
        QCompilerError: no nvcc, or one that does not know an architecture.
    """
    if device.api == "opencl":
        return source.encode()
    numbers = [architecture.removeprefix("sm_") for architecture in device.architectures]
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    targets.append(f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}")
    return nvcc(source, ["-fatbin", *targets], "fatbin")


def unassembled(source: str, device: Device) -> bytes:
    """The source in place of the code, for looking at what is not going to run."""
    return source.encode()


def cubin(source: str, architecture: str) -> bytes:
    """Machine code of one architecture."""
    return nvcc(source, ["-cubin", f"-arch={architecture}"], "cubin")


def ptx(source: str, architecture: str) -> str:
    """The same before registers are allocated, as text."""
    return nvcc(source, ["-ptx", f"-arch={architecture}"], "ptx").decode()


def nvcc(source: str, options: Sequence[str], suffix: str) -> bytes:
    """Compile CUDA C++ with nvcc; errors as of `binary`."""
    compiler = tools.require(
        "nvcc",
        purpose="to compile the CUDA kernels",
        install="apt-get install nvidia-cuda-toolkit, or NVIDIA's own, with its bin folder on PATH",
    )
    # Relative names in a fresh folder: equal sources give equal bytes.
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        (Path(folder) / "kernels.cu").write_text(source, "utf-8", newline="\n")
        output = f"kernels.{suffix}"
        command = [compiler, *_FLAGS, *options, "kernels.cu", "-o", output]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = done.stderr.splitlines()
            reason = next((line for line in lines if "error" in line or "fatal" in line), done.stderr)
            raise QCompilerError(f"nvcc could not compile the CUDA kernels ({' '.join(options)}): {reason.strip()}")
        return (Path(folder) / output).read_bytes()
