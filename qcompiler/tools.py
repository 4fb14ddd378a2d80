"""Programs and packages this one uses but does not bring: find them, or say in one line what to install."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from qcompiler.errors import QCompilerError


def find(*names: str, beside_python: bool = False) -> str | None:
    """The path of the first program that is on PATH, or None.

    Args:
        names: programs that serve alike, or paths.
        beside_python: look first where this Python's own scripts are, which need not be on PATH.
    """
    folders = os.environ.get("PATH", os.defpath)
    if beside_python:
        folders = os.pathsep.join((str(Path(sys.executable).parent), folders))
    found = (shutil.which(name, path=folders) for name in names)
    return next((path for path in found if path is not None), None)


def require(*names: str, purpose: str, install: str, beside_python: bool = False) -> str:
    """As `find`. Raises QCompilerError if there is none.

    Args:
        names: programs that serve alike.
        purpose: what the program is for: "to link the compiled model".
        install: what to do about it: "apt-get install gcc".
        beside_python: as for `find`.
    """
    path = find(*names, beside_python=beside_python)
    if path is None:
        raise QCompilerError(f"{' or '.join(names)} is not on PATH; it is needed {purpose}. Install it: {install}")
    return path


def require_package(module: str, *, purpose: str, install: str) -> None:
    """Raises QCompilerError unless a Python module can be imported."""
    if find_spec(module) is None:
        raise QCompilerError(f"the Python package {module} is not installed; it is needed {purpose}: {install}")


def c_compiler() -> str:
    """The C compiler of this machine: $CC, else cc, gcc or clang. Raises QCompilerError if there is none."""
    chosen = os.environ.get("CC")
    candidates = (*([chosen] if chosen else []), "cc", "gcc", "clang")
    if find(*candidates) is None:
        raise QCompilerError(
            f"no C compiler found to build and link the compiled model (looked for {', '.join(candidates)}); "
            "install one: apt-get install gcc libc6-dev, or set CC to the one to use"
        )
    return next(name for name in candidates if find(name))


def cross_compiler(triple: str) -> tuple[str, ...]:
    """The command that compiles and links C for another architecture: GNU's compiler of the triple, else clang and lld.

    Clang needs no libraries of the other machine, because a shared library may leave them to be found there.
    Raises QCompilerError if there is neither.
    """
    gnu = f"{triple}-gcc"
    if find(gnu):
        return (gnu,)
    if find("clang") and find("ld.lld"):
        return ("clang", f"--target={triple}", "-fuse-ld=lld", "-nostdlib")
    raise QCompilerError(
        f"no C compiler found to link the compiled model for {triple} (looked for {gnu}, and clang with ld.lld); "
        f"install one: apt-get install gcc-{triple}, or clang lld"
    )
