"""Build the functional simulator and read its log.

The simulator is C (`runtime_stubs/simulator/npu_sim.c`), compiled into an object file that is linked with the drivers
TVM compiles, so a bundle's library holds both. `Log` finds the simulator inside a loaded library.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qcompiler.c_code import CSource, compile_c, stub, user_sources
from qcompiler.errors import QCompilerError
from qcompiler.tools import c_compiler

SIMULATOR = stub("simulator/npu_sim.c", "the NPU simulator")


def with_driver(sources: Sequence[CSource], files: Sequence[str | os.PathLike[str]]) -> tuple[CSource, ...]:
    """The sources of a library with a driver, C files of the user's, in place of the simulator.

    Raises:
        QCompilerError: nothing in the library calls a driver, or a file cannot be used.
    """
    if SIMULATOR not in sources:
        raise QCompilerError(
            "nothing of this model runs on an accelerator that a driver feeds, so --runtime has nothing to replace; "
            "leave it out, or see with `qcompile explain` why all is on the CPU."
        )
    own = user_sources(files)
    others = [source for source in sources if source != SIMULATOR]
    taken = {source.name for source in others}
    for source in own:
        if source.name in taken:
            raise QCompilerError(f"{source.what} has the name of a source of the compiler's own; rename it.")
    return (*others, *own)


def compile_simulator(directory: Path) -> Path:
    """Compile npu_sim.c into `directory`/npu_sim.o for this machine and return that path. Errors as of `compile_c`."""
    return compile_c(SIMULATOR, directory, (c_compiler(),))


class Log:
    """What the simulator inside a library recorded.

    Args:
        library: path of the shared library; where it is loaded already (by TVM), the same instance is meant.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._data = self._function("qrt_log_data", ctypes.POINTER(ctypes.c_int32))
        self._size = self._function("qrt_log_size", ctypes.c_int64)
        self._regions = self._function("qrt_log_regions", ctypes.POINTER(ctypes.c_int64))
        self._region_count = self._function("qrt_log_region_count", ctypes.c_int64)
        self._peak = self._function("qrt_log_scratchpad_peak", ctypes.c_int64)
        self._reset = self._function("qrt_log_reset", None)

    def _function(self, name: str, result: type | None) -> "ctypes._FuncPointer":  # pyright: ignore[reportPrivateUsage]
        function = getattr(self._library, name)
        function.argtypes = []
        function.restype = result
        return function

    def reset(self) -> None:
        """Forget everything recorded so far."""
        self._reset()

    def words(self) -> np.ndarray:
        """int32 [n]: command words of all regions since the last reset."""
        size = self._size()
        return np.ctypeslib.as_array(self._data(), (size,)).copy() if size else np.zeros(0, np.int32)

    def regions(self) -> list[tuple[int, np.ndarray]]:
        """(region number, its words) in the order they ran."""
        words, count = self.words(), self._region_count()
        pairs = np.ctypeslib.as_array(self._regions(), (count, 2)) if count else np.zeros((0, 2), np.int64)
        ends = [*pairs[1:, 1], len(words)][:count]
        return [(int(number), words[start:end]) for (number, start), end in zip(pairs, ends, strict=True)]

    def scratchpad_peak(self) -> int:
        """Highest end of a scratchpad reservation since the last reset, in bytes."""
        return int(self._peak())
