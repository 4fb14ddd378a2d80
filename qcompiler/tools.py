"""Programs this package runs but does not bring: find them, or say in one line what to install."""

import os
import shutil

from qcompiler.errors import QCompilerError


def c_compiler() -> str:
    """The C compiler of this machine: $CC, else cc, gcc or clang. Raises QCompilerError if there is none."""
    candidates = (os.environ.get("CC"), "cc", "gcc", "clang")
    for candidate in candidates:
        if candidate and shutil.which(candidate):
            return candidate
    raise QCompilerError(
        f"no C compiler found to build and link the compiled model (looked for {', '.join(filter(None, candidates))}); "
        "install gcc or clang, or set CC to the one to use."
    )
