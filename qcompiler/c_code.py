"""C that a bundle's library holds beside what TVM compiles: a runtime of the accelerator, or generated kernels."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from qcompiler.errors import QCompilerError

STUBS = "qcompiler.runtime_stubs"
HEADERS: tuple[str, ...] = (".", "abi", "simulator", "driver", "gpu")
"""Folders of runtime_stubs that hold headers."""
COMPILE_FLAGS: tuple[str, ...] = ("-std=c99", "-O3", "-ffp-contract=off", "-fPIC", "-fno-semantic-interposition")
"""No -march: a bundle runs on every machine of its architecture. No contraction: float32 requantization is exact."""


@dataclass(frozen=True)
class CSource:
    """One C file. It may include the headers of runtime_stubs, by their names alone."""

    name: str
    """File name, ending in .c. Regions may bring the same source; of two with one name the texts must be equal."""
    text: str
    what: str
    """For messages: "the NPU simulator"."""
    libraries: tuple[str, ...] = ()
    """What the linker needs with it, such as -ldl."""
    folder: Path | None = None
    """Where other headers it includes lie."""


def stub(name: str, what: str, libraries: tuple[str, ...] = ()) -> CSource:
    """A file of runtime_stubs, by its path there."""
    return CSource(Path(name).name, (resources.files(STUBS) / name).read_text("utf-8"), what, libraries)


def user_sources(files: Sequence[str | os.PathLike[str]]) -> tuple[CSource, ...]:
    """C files of the user's. Raises QCompilerError if one cannot be read, is no .c file, or two have one name."""
    found: dict[str, CSource] = {}
    for file in map(Path, files):
        if file.suffix != ".c":
            raise QCompilerError(f"{file} is not a C source: give .c files; headers are found where these lie.")
        if file.name in found:
            raise QCompilerError(f"two sources are called {file.name}; rename one of them.")
        try:
            text = file.read_text("utf-8")
        except OSError as error:
            raise QCompilerError(f"cannot read {file}: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise QCompilerError(f"{file} is not a text file in UTF-8.") from None
        found[file.name] = CSource(file.name, text, str(file), folder=file.resolve().parent)
    return tuple(found.values())


def compile_c(source: CSource, folder: Path, compiler: Sequence[str]) -> Path:
    """Compile into an object file in `folder` and return its path.

    The object does not depend on where it is compiled: equal sources give equal bytes.
    Raises QCompilerError if the compiler fails.
    """
    file, target = folder / source.name, folder / Path(source.name).with_suffix(".o").name
    with resources.as_file(resources.files(STUBS) / "__init__.py") as marker:
        places = [marker.parent / name for name in HEADERS]
        places += [source.folder] if source.folder is not None else []
        unnamed = [f"-ffile-prefix-map={place}=." for place in (folder, *places)]
        includes = [f"-I{place}" for place in places]
        command = [*compiler, *COMPILE_FLAGS, *unnamed, *includes, "-c", str(file), "-o", str(target)]
        try:
            file.write_text(source.text, "utf-8", newline="\n")
        except OSError as error:
            raise QCompilerError(f"could not build {source.what}: {file}: {error.strerror}.") from None
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise QCompilerError(f"the C compiler could not build {source.what} ({' '.join(command)}): {done.stderr}")
    return target
