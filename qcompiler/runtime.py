"""Run a compiled library: numpy in, numpy out, with nothing of TVM but its runtime.

`import tvm` maps the compiler (200 MB), or forbids it to the process for good if told not to. So this module speaks to
TVM's small runtime library through `tvm_ffi` alone, and the compiler may be imported before, after, or never.
"""

import ctypes
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import tvm_ffi
from tvm_ffi.libinfo import load_lib_ctypes

from qcompiler.errors import QCompilerError
from qcompiler.simulator.machine import Log

_CPU, _DEVICE, _POOLED_ALLOCATOR = 1, 0, 2
"""DLPack's kDLCPU, its first device, and the VM's AllocatorType::kPooled."""


_BIG_CORES = 1
"""The runtime's AffinityMode kBig: fast cores first."""

_ALIGNMENT = 64
"""What compiled code assumes of its arguments, in bytes."""


@cache
def _load_runtime() -> ctypes.CDLL:
    """Load libtvm_runtime of the installed TVM, without the Python package around it."""
    package = importlib.util.find_spec("tvm")
    if package is None or not package.submodule_search_locations:
        raise QCompilerError(
            "running a compiled model needs the package apache-tvm; install qcompiler with its dependencies"
        )
    folder = Path(package.submodule_search_locations[0]) / "lib"
    # Left to itself the thread pool takes every second CPU for a hyper-thread and never uses it.
    os.environ.setdefault("TVM_NUM_THREADS", str(os.cpu_count() or 1))
    # Compiled libraries find the runtime's functions among the global symbols.
    return load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=[folder])


@contextmanager
def _fresh_name(library: Path) -> Iterator[Path]:
    """A name for a library that was never loaded before.

    The dynamic linker takes a name it knows for the library it knows by it, even if the file has been replaced since;
    under a new name it compares the files, and still loads one file only once.
    """
    with TemporaryDirectory(prefix="qcompiler-") as folder:
        alias = Path(folder) / "model.so"
        alias.symlink_to(library.resolve())
        yield alias


def start_threads(threads: int) -> None:
    """Have so many threads share parallel loops from now on, in all of the process; one needs no pool."""
    _load_runtime()
    if threads > 1:
        tvm_ffi.get_global_func("runtime.config_threadpool")(_BIG_CORES, threads)


class Executable:
    """A compiled model in memory, its parameters uploaded once."""

    def __init__(self, library: Path, parameters: Sequence[np.ndarray], threads: int = 1) -> None:
        """Load `library` (made by `backends.relax.build`).

        Args:
            library: the shared library.
            parameters: `Lowered.parameters`, in order.
            threads: that share the work of large layers, if the library was built for more than one.

        Raises:
            QCompilerError: the library cannot be loaded, for example because it is for another CPU, or it needs a GPU
                that is not here.
        """
        _load_runtime()
        try:
            with _fresh_name(library) as path:
                module = tvm_ffi.load_module(path)
        except (RuntimeError, OSError) as error:
            raise QCompilerError(
                f"{library} cannot be loaded here ({str(error).splitlines()[-1].strip()}); "
                "was it compiled for another machine? Compile the model again on this one."
            ) from error
        self._gpu = _gpu_of(library)
        if self._gpu is not None and (problem := self._gpu.problem()) is not None:
            raise QCompilerError(f"{library} needs a GPU: {problem}.")
        self._machine = machine = module["vm_load_executable"]()
        start_threads(threads)
        # Once for the host and once for the device that computes, which here is the host too.
        machine["vm_initialization"](*(_CPU, _DEVICE, _POOLED_ALLOCATOR) * 2)
        # The code wants pointers to tensors themselves, no offsets into a block: numpy's exports have none.
        intermediates = [tvm_ffi.from_dlpack(np.from_dlpack(tensor)) for tensor in machine["workspace"]()]
        self._constants = [*(_tensor(array) for array in parameters), *intermediates]
        self._inputs: list[np.ndarray] = []

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run once.

        Args:
            inputs: arrays in the order, shapes and dtypes of `Lowered.inputs`.

        Returns:
            The outputs, in the order of `Lowered.outputs`.
        """
        self.set_inputs(inputs)
        # Copies: an output may be a view of an input or a parameter.
        return [np.from_dlpack(output).copy() for output in self.invoke()]

    def set_inputs(self, inputs: Sequence[np.ndarray]) -> None:
        """Copy the inputs, as `run` takes them, to where `invoke` reads them."""
        if [(a.shape, a.dtype) for a in inputs] != [(a.shape, a.dtype) for a in self._inputs]:
            self._inputs = [_aligned(array) for array in inputs]
            # The machine keeps the arguments: hundreds of parameters passed by each call would take as long as a
            # small model.
            tensors = [tvm_ffi.from_dlpack(array) for array in self._inputs]
            self._machine["save_function"]("main", "bound", True, *tensors, *self._constants)
            self._bound = self._machine["bound"]
        for own, array in zip(self._inputs, inputs, strict=True):
            own[...] = array

    def invoke(self) -> Sequence[tvm_ffi.Tensor]:
        """Run with the inputs that were set; the outputs are the machine's own.

        Raises:
            QCompilerError: a GPU failed.
        """
        try:
            return self._bound()
        except RuntimeError as error:
            if self._gpu is not None and (reason := self._gpu.error()):
                raise QCompilerError(f"the GPU failed: {reason}.") from error
            raise

    def profile(self, runs: int) -> list[tuple[str, float]]:
        """Name and seconds of every kernel, in the order they run; the fastest of so many runs of each."""
        calls: list[list[tuple[str, float]]] = []
        started = 0.0

        def clock(_function: object, name: str, before: bool, *_arguments: object) -> int:
            nonlocal started
            if before:
                started = perf_counter()
            elif not name.startswith("vm."):
                calls[-1].append((name, perf_counter() - started))
            return 0

        self._machine["set_instrument"](tvm_ffi.convert(clock))
        for _ in range(runs):
            calls.append([])
            self.invoke()
        self._machine["set_instrument"](None)
        return [(same[0][0], min(seconds for _, seconds in same)) for same in zip(*calls, strict=True)]


def _tensor(array: np.ndarray) -> tvm_ffi.Tensor:
    return tvm_ffi.from_dlpack(_aligned(array))


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy of an array where compiled code can use it."""
    memory = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    aligned = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    aligned[...] = array
    return aligned


# --- GPUs --------------------------------------------------------------------------------------------------


class _Gpu:
    """The GPU runtime (`runtime_stubs/abi/qgpu.h`) inside a loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def problem(self) -> str | None:
        """Why no GPU can be used here, naming what to install, or None if one can."""
        return self._text("qgpu_problem")

    def device(self) -> str:
        return self._text("qgpu_device") or ""

    def error(self) -> str:
        """What the GPU failed with last; empty if it did not."""
        return self._text("qgpu_error") or ""

    def _text(self, function: str) -> str | None:
        pointer = getattr(self._library, function)
        pointer.argtypes = []
        pointer.restype = ctypes.c_char_p
        text: bytes | None = pointer()
        return None if text is None else text.decode(errors="replace").strip()


def _gpu_of(library: Path) -> _Gpu | None:
    """The GPU runtime of a library, or None if nothing in the model runs on a GPU."""
    with _fresh_name(library) as path:
        loaded = ctypes.CDLL(str(path))
    return _Gpu(loaded) if hasattr(loaded, "qgpu_problem") else None


def gpu_problem(library: Path) -> str | None:
    """Why a compiled library cannot use a GPU here; None if it can, or needs none."""
    _load_runtime()
    gpu = _gpu_of(library)
    return None if gpu is None else gpu.problem()


def gpu_device(library: Path) -> str:
    """The GPU that a compiled library runs on, for people to read; empty if it needs none or there is none."""
    _load_runtime()
    gpu = _gpu_of(library)
    return "" if gpu is None else gpu.device()


# --- the simulator's log -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpuLog:
    """What the NPU simulator saw since the log was last reset."""

    words: np.ndarray
    """int32: the commands, as `simulator.isa` spells them."""
    regions: tuple[tuple[int, int], ...]
    """(region number, index of its first word), in the order they ran."""
    scratchpad_peak: int
    """Bytes reserved at once, at most."""


class Simulator:
    """The NPU simulator linked into a compiled library; one log a process, shared by all who load the library."""

    def __init__(self, library: Path) -> None:
        """Raises QCompilerError if `library` holds no simulator: nothing in the model runs on an NPU."""
        try:
            with _fresh_name(library) as path:
                self._log = Log(path)
        except AttributeError as error:
            raise QCompilerError(f"{library} has no NPU simulator: nothing in this model runs on an NPU") from error

    def reset(self) -> None:
        """Forget what was logged so far."""
        self._log.reset()

    def log(self) -> NpuLog:
        """A copy of the log."""
        words, runs = self._log.words(), self._log.regions()
        first = len(words) - sum(len(run) for _, run in runs)
        regions: list[tuple[int, int]] = []
        for number, run in runs:
            regions.append((number, first))
            first += len(run)
        return NpuLog(words, tuple(regions), self._log.scratchpad_peak())
