"""What nvcc makes of CUDA kernels: the instructions that are meant, none that are not. No GPU is needed.

Counted in PTX, which every nvcc writes, and in machine code where there is a cuobjdump.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from qcompiler.backends.gpu import compile_region
from qcompiler.backends.gpu_binary import binary, cubin, ptx, unassembled
from qcompiler.backends.gpu_code import Device
from qcompiler.backends.gpu_program import GpuProgram
from qcompiler.errors import QCompilerError

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc (the package nvidia-cuda-toolkit)")
needs_cuobjdump = pytest.mark.skipif(shutil.which("cuobjdump") is None, reason="needs cuobjdump, of the CUDA toolkit")


def _cuda() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_cases", Path(__file__).with_name("test_cuda.py"))
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


CUDA = _cuda()
ARCHITECTURES: tuple[str, ...] = CUDA.MMA.architectures


def layers_program(workbench, device: Device, layers: Sequence[object]) -> GpuProgram:
    bench = workbench(seed=220)
    for layer in layers:
        CUDA.add_layer(bench, layer, "float32")
    return compile_region(CUDA.whole(bench.model()), device, unassembled)


def disassembled(source: str, architecture: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cubin"
        file.write_bytes(cubin(source, architecture))
        return subprocess.run(["cuobjdump", "-sass", str(file)], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def mixed(workbench) -> list[object]:
    """Layers of eight and four bits, one with words put together from bytes, a depthwise one."""
    return [CUDA.LAYERS[index] for index in (0, 3, 5, -1)]


@needs_nvcc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tensor_cores_and_dp4a_are_used(workbench, mixed, architecture: str) -> None:
    for device, instruction in ((CUDA.DP4A, "dp4a.s32.s32"), (CUDA.HOPPER, "mma.sync")):
        source = layers_program(workbench, device, mixed).source
        text = ptx(source, architecture)
        kernels = text.split(".entry ")[1:]
        assert [instruction in kernel for kernel in kernels] == [True, True, True, False]
        assert "fma.rn" not in text and ".local" not in text  # nothing contracted, nothing spilled into memory
        tensor_cores = instruction == "mma.sync"
        assert ("ldmatrix.sync" in text) == tensor_cores
        assert ("cp.async.cg" in text) == (tensor_cores and architecture != "sm_75")
        assert ("griddepcontrol.wait" in text) == (tensor_cores and architecture == "sm_90")
        assert cubin(source, architecture)[:4] == b"\x7fELF"


@needs_nvcc
@needs_cuobjdump
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(workbench, mixed, architecture: str) -> None:
    listing = disassembled(layers_program(workbench, CUDA.HOPPER, mixed).source, architecture)
    shape = {"sm_75": "IMMA.8816", "sm_80": "IMMA.16832", "sm_90": "IMMA.16832"}[architecture]
    assert listing.count(shape) >= 3 and "LDSM.16.M88.4" in listing
    assert "STL" not in listing and "LDL" not in listing


@needs_nvcc
@pytest.mark.parametrize("architecture", CUDA.INT4.architectures)
def test_tensor_cores_multiply_four_bits(workbench, architecture: str) -> None:
    bench = workbench(seed=260)
    CUDA.four_bit_network(bench, 64, "int8", -8)
    source = compile_region(CUDA.whole(bench.model()), CUDA.INT4, unassembled).source
    shape = {"sm_75": "m8n8k32", "sm_80": "m16n8k64"}[architecture]
    products = [kernel for kernel in ptx(source, architecture).split(".entry ")[1:] if "mma.sync" in kernel]
    assert len(products) == 3
    for kernel in products:
        assert set(re.findall(r"mma\.sync\.aligned\.(\w+)\.row\.col\.s32\.(\w+\.\w+)", kernel)) == {(shape, "s4.s4")}
    if shutil.which("cuobjdump") is not None:
        found = set(re.findall(r"IMMA\.(\d+\.\w+\.\w+)", disassembled(source, architecture)))
        assert found == {{"sm_75": "8832.S4.S4", "sm_80": "16864.S4.S4"}[architecture]}


@needs_nvcc
@needs_cuobjdump
def test_kernels_that_start_early_load_nothing_before_they_wait(workbench) -> None:
    """But for weights, which products stage. The wait is called ACQBULK in machine code."""
    program = layers_program(workbench, CUDA.HOPPER, [CUDA.LAYERS[0], CUDA.LAYERS[-1]])
    assert program.overlaps
    kernels = disassembled(program.source, "sm_90").split("Function : ")[1:]
    assert len(kernels) == 2
    for kernel in kernels:
        before, wait, after = kernel.partition("ACQBULK")
        assert wait and not re.search(r"\b(LDG|STG|ATOMG|RED)\.", before)
        assert ("LDGSTS" in before) == ("LDGSTS" in after) == ("IMMA" in kernel)


@needs_nvcc
def test_fat_binaries_are_reproducible(workbench) -> None:
    source = layers_program(workbench, CUDA.MMA, CUDA.LAYERS[:1]).source
    assert binary(source, CUDA.MMA) == binary(source, CUDA.MMA)


@needs_nvcc
def test_an_architecture_nvcc_does_not_know(workbench) -> None:
    source = layers_program(workbench, CUDA.DP4A, CUDA.LAYERS[:1]).source
    with pytest.raises(QCompilerError, match=r"nvcc could not compile.*sm_30"):
        binary(source, replace(CUDA.DP4A, architectures=("sm_30",)))


def test_without_nvcc(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(QCompilerError, match="nvidia-cuda-toolkit"):
        binary("", CUDA.MMA)
