"""Build the functional simulator and read its log.

The simulator is C (`runtime_stubs/npu_sim.c`); it is compiled into an object file that is linked with the drivers
TVM compiles, so a bundle's library holds both. `Log` finds the simulator inside a loaded library.
"""

import ctypes
import os
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import numpy as np

from qcompiler.errors import QCompilerError

COMPILE_FLAGS: tuple[str, ...] = ("-std=c99", "-O3", "-ffp-contract=off", "-fPIC", "-fno-semantic-interposition")
"""No -march: a bundle runs on every machine of its architecture. No contraction: float32 requantization is exact."""


def c_compiler() -> str:
    """The C compiler: $CC, else cc, gcc or clang. Raises QCompilerError if there is none."""
    candidates = (os.environ.get("CC"), "cc", "gcc", "clang")
    for candidate in candidates:
        if candidate and shutil.which(candidate):
            return candidate
    raise QCompilerError(
        f"no C compiler found to build and link the compiled model (looked for {', '.join(filter(None, candidates))}); "
        "install gcc or clang, or set CC to the one to use."
    )


def compile_simulator(directory: Path) -> Path:
    """Compile npu_sim.c into `directory`/npu_sim.o and return that path.

    The object does not depend on where it is compiled: equal sources give equal bytes.
    Raises QCompilerError without a C compiler, or if it fails.
    """
    source = resources.files("qcompiler.runtime_stubs") / "npu_sim.c"
    target = directory / "npu_sim.o"
    with resources.as_file(source) as path:
        command = [
            c_compiler(),
            *COMPILE_FLAGS,
            f"-ffile-prefix-map={path.parent}=.",
            "-c",
            str(path),
            "-o",
            str(target),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise QCompilerError(f"the C compiler could not build the NPU simulator ({' '.join(command)}): {done.stderr}")
    return target


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
