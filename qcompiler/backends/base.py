"""What a backend hands to the assembler: one function per node or region, and its parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import tvm
from tvm import tirx

from qcompiler.backends import te
from qcompiler.backends.tiles import TileChoice, Tiling, best_guess
from qcompiler.c_code import CSource
from qcompiler.graph import Shape, dtype_of, shape_of
from qcompiler.host_cpu import HALF_CONVERSIONS
from qcompiler.target import Host


@dataclass(frozen=True)
class Kernel:
    """The code of one node.

    `function` is in destination-passing style: its buffers are `inputs`, then `parameters`, then one per output
    of the node. A buffer may give a value another shape of as many elements, in the same order; the
    assembler passes a view.
    """

    function: tirx.PrimFunc
    inputs: tuple[ir.Value, ...]
    parameters: tuple[np.ndarray, ...] = ()
    tiling: Tiling | None = None
    """What its tile was chosen from, where there was a choice."""


@dataclass(frozen=True)
class GpuKernel(Kernel):
    """The code of a node on a GPU; its last buffer is scratch memory."""

    scratch: int = 0
    """Bytes, zero before and after."""


@dataclass(frozen=True)
class View:
    """The node's output is `input` under another shape: nothing to run."""

    input: ir.Value


Lowering = Kernel | View


@dataclass(frozen=True)
class Document:
    """A text file that goes into the bundle, read by nobody but people."""

    name: str
    text: str


@dataclass(frozen=True)
class AcceleratorFunction:
    """Host code that runs one region: ``function(inputs…, constants uint8[n], outputs…, workspace uint8[m])``."""

    function: tirx.PrimFunc
    constants: np.ndarray
    """uint8 [n]: weights, biases and scales in the accelerator's layout."""
    workspace: int
    """Bytes of external memory the driver needs beside its arguments; at least 1."""
    sources: tuple[CSource, ...]
    """The C it calls, compiled into the library."""
    documents: tuple[Document, ...] = ()
    """What people may want to read about it."""


@dataclass(frozen=True)
class HostCode:
    """The CPU that code is generated for: its TVM target and what schedules ask of it."""

    target: tvm.target.Target
    threads: int
    features: frozenset[str]
    """LLVM's names: "avx2", "avx512vnni", "dotprod"…"""
    tiles: TileChoice = best_guess

    @property
    def converts_halves(self) -> bool:
        """Whether it has instructions that make float32 of float16."""
        return bool(HALF_CONVERSIONS & self.features)

    @property
    def vector_bytes(self) -> int:
        """Width of a vector register."""
        if "hvx-length128b" in self.features:
            return 128
        # llvm_get_vector_width answers 64 for every x86.
        return 64 if "avx512bw" in self.features else 32 if "avx2" in self.features else 16

    @property
    def vector_registers(self) -> int:
        """How many of them there are."""
        attributes: Mapping[str, object] = self.target.attrs  # pyright: ignore[reportAssignmentType] (typed as str)
        return 32 if "avx512vl" in self.features or attributes.get("feature.is_aarch64") else 16


def host_code(host: Host) -> HostCode:
    """The CPU of a spec; where the spec leaves it open, that of this machine."""
    described = {
        key: list(item) if isinstance(item, tuple) else item for key, item in host.resolved_tvm_target().items()
    }
    return HostCode(tvm.target.Target(described), host.threads, host.features())


# --- building functions ------------------------------------------------------------------------------------


def placeholder(value: ir.Value, shape: Shape | None = None, name: str = "x") -> te.Tensor:
    """A value as a TE input, under its own shape or another of as many elements."""
    return te.placeholder(shape_of(value) if shape is None else shape, str(dtype_of(value)), name)


def parameters_of(arrays: Sequence[np.ndarray]) -> tuple[te.Tensor, ...]:
    """Constant arrays as TE inputs."""
    return tuple(te.placeholder(array.shape, str(array.dtype), f"p{index}") for index, array in enumerate(arrays))
