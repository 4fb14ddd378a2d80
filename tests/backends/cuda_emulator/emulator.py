"""CUDA on a CPU: the driver that is emulated, and kernels for it."""

import subprocess
import tempfile
from pathlib import Path

from qcompiler.backends.gpu_code import Device

HERE = Path(__file__).resolve().parent
# Like a device, which refuses words at odd addresses.
_FLAGS = (
    "-std=c++17", "-w", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-fsanitize=alignment",
    "-fsanitize-undefined-trap-on-error",
)  # fmt: skip


def assemble(source: str, device: Device) -> bytes:
    """Kernels, as `compile_region` wants them: the path of a library, which is what `cuModuleLoadData` here takes."""
    folder = Path(tempfile.mkdtemp(prefix="qcompiler-"))
    # GCC wants the attribute first.
    text = source.replace("__shared__ alignas(64)", "alignas(64) __shared__")
    (folder / "kernels.cpp").write_text(text, "utf-8")
    _compile(folder / "kernels.cpp", folder / "kernels.so")
    return str(folder / "kernels.so").encode()


def build(folder: Path) -> Path:
    """libcuda.so.1 in a folder: who loads it first, or has the folder in LD_LIBRARY_PATH, gets it for the driver."""
    library = folder / "libcuda.so.1"
    _compile(HERE / "libcuda.cpp", library, "-Wl,-soname,libcuda.so.1")
    return library


def _compile(source: Path, library: Path, *options: str) -> None:
    command = ["g++", *_FLAGS, f"-I{HERE}", *options, "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
