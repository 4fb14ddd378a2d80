"""C that a bundle's library holds beside what TVM compiles: a runtime of the accelerator, or generated kernels."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from qcompiler.errors import QCompilerError

STUBS = "qcompiler.runtime_stubs"
COMPILE_FLAGS: tuple[str, ...] = ("-std=c99", "-O3", "-ffp-contract=off", "-fPIC", "-fno-semantic-interposition")
"""No -march: a bundle runs on every machine of its architecture. No contraction: float32 requantization is exact."""


@dataclass(frozen=True)
class CSource:
    """One C file. It may include the headers of runtime_stubs."""

    name: str
    """File name, ending in .c. Regions may bring the same source; of two with one name the texts must be equal."""
    text: str
    what: str
    """For messages: "the NPU simulator"."""
    libraries: tuple[str, ...] = ()
    """What the linker needs with it, such as -ldl."""


def stub(name: str, what: str, libraries: tuple[str, ...] = ()) -> CSource:
    """A file of runtime_stubs."""
    return CSource(name, (resources.files(STUBS) / name).read_text("utf-8"), what, libraries)


def compile_c(source: CSource, folder: Path, compiler: Sequence[str]) -> Path:
    """Compile into an object file in `folder` and return its path.

    The object does not depend on where it is compiled: equal sources give equal bytes.
    Raises QCompilerError if the compiler fails.
    """
    file, target = folder / source.name, folder / Path(source.name).with_suffix(".o").name
    with resources.as_file(resources.files(STUBS) / "qrt.h") as header:
        command = [
            *compiler, *COMPILE_FLAGS, f"-ffile-prefix-map={folder}=.", f"-ffile-prefix-map={header.parent}=.",
            f"-I{header.parent}", "-c", str(file), "-o", str(target),
        ]  # fmt: skip
        try:
            file.write_text(source.text, "utf-8", newline="\n")
        except OSError as error:
            raise QCompilerError(f"could not build {source.what}: {file}: {error.strerror}.") from None
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise QCompilerError(f"the C compiler could not build {source.what} ({' '.join(command)}): {done.stderr}")
    return target
