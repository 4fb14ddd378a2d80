"""Run a compiled library: numpy in, numpy out, with nothing of TVM but its small runtime.

`import tvm` maps the whole compiler unless TVM_USE_RUNTIME_LIB is set, so it is set here, before the first
import. In a process that has already imported the compiler, its runtime half serves.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if "tvm" not in sys.modules:
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")

import tvm

from qcompiler.errors import QCompilerError

_CPU, _DEVICE, _POOLED_ALLOCATOR = 1, 0, 2
"""DLPack's kDLCPU, its first device, and the VM's AllocatorType::kPooled."""


class Executable:
    """A compiled model in memory, its parameters uploaded once."""

    def __init__(self, library: Path, parameters: Sequence[np.ndarray]) -> None:
        """Load `library` (made by `backends.relax.build`).

        Args:
            library: the shared library.
            parameters: `Lowered.parameters`, in order.

        Raises:
            QCompilerError: the library cannot be loaded, for example because it is for another CPU.
        """
        self._library = library.resolve()
        try:
            module = tvm.runtime.load_module(str(self._library))
        except (RuntimeError, OSError) as error:
            raise QCompilerError(
                f"{library} cannot be loaded here ({str(error).splitlines()[-1].strip()}); "
                "was it compiled for another machine? Compile the model again on this one."
            ) from error
        machine = module["vm_load_executable"]()
        # Once for the host and once for the device that computes, which here is the host too.
        machine["vm_initialization"](*(_CPU, _DEVICE, _POOLED_ALLOCATOR) * 2)
        self._module, self._machine = module, machine
        self._main = machine["main"]
        self._parameters = [tvm.runtime.tensor(array) for array in parameters]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run once.

        Args:
            inputs: C-contiguous arrays in the order, shapes and dtypes of `Lowered.inputs`.

        Returns:
            The outputs, in the order of `Lowered.outputs`.
        """
        outputs = self._main(*(tvm.runtime.tensor(array) for array in inputs), *self._parameters)
        return [output.numpy() for output in outputs]


# --- the simulator's log -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpuLog:
    """What the NPU simulator saw since the log was last reset."""

    words: np.ndarray
    """int32: the commands, as `simulator.isa` spells them."""
    regions: tuple[tuple[int, int], ...]
    """(region number, index of its first word), one per region that ran."""
    scratchpad_peak: int
    """Bytes reserved at once, at most."""


class Simulator:
    """The NPU simulator linked into a compiled library; one log a process."""

    def __init__(self, library: Path) -> None:
        """Raises QCompilerError if `library` holds no simulator: nothing in the model runs on an NPU."""
        shared = ctypes.CDLL(str(library.resolve()))
        try:
            self._data, self._size = shared.qrt_log_data, shared.qrt_log_size
        except AttributeError as error:
            raise QCompilerError(f"{library} has no NPU simulator: nothing in this model runs on an NPU") from error
        self._regions, self._region_count = shared.qrt_log_regions, shared.qrt_log_region_count
        self._peak, self._reset = shared.qrt_log_scratchpad_peak, shared.qrt_log_reset
        self._data.restype = ctypes.POINTER(ctypes.c_int32)
        self._regions.restype = ctypes.POINTER(ctypes.c_int64)
        for count in (self._size, self._region_count, self._peak):
            count.restype = ctypes.c_int64
        self._reset.restype = None

    def reset(self) -> None:
        self._reset()

    def log(self) -> NpuLog:
        """A copy of the log."""
        size, regions = self._size(), self._region_count()
        # An empty log has no memory behind its pointer.
        words = np.ctypeslib.as_array(self._data(), (size,)).copy() if size else np.empty(0, np.int32)
        pairs = np.ctypeslib.as_array(self._regions(), (regions, 2)).tolist() if regions else []
        return NpuLog(words, tuple((region, first) for region, first in pairs), self._peak())
