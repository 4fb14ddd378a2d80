"""Tiles that `qcompile tune` measured, in a JSON file: by CPU, by the templates' code, by workload.

What a machine measured holds for its CPU, and for the code that was measured: with a change to a template its entries
stand for nothing and are dropped when the file is next written.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qcompiler.backends.base import HostCode
from qcompiler.backends.tiles import ConvTile, Tiling, best_guess
from qcompiler.errors import QCompilerError

_TEMPLATES = (
    "cpu_conv.py", "cpu_float.py", "cpu_matrix.py", "cpu_packed.py", "te_arithmetic.py",
    "schedules/conv.py", "schedules/dot.py", "schedules/matrix.py",
)  # fmt: skip
"""Files of qcompiler.backends that the speed of a tile depends on."""


@dataclass(frozen=True)
class Measured:
    """The best tile of a workload, and what it takes beside the one a guess would have taken."""

    pixels: int
    blocks: int
    seconds: float
    guessed_seconds: float

    @property
    def tile(self) -> ConvTile:
        return ConvTile(self.pixels, self.blocks)


@dataclass(frozen=True)
class _File:
    code: str
    """The templates' fingerprint."""
    cpus: Mapping[str, Mapping[str, Measured]]
    """By CPU, by workload."""


_FILE: TypeAdapter[_File] = TypeAdapter(_File)


@dataclass(frozen=True)
class TileDatabase:
    """What is known for one CPU."""

    cpu: str
    measured: Mapping[str, Measured] = field(default_factory=dict)

    def choose(self, tiling: Tiling) -> ConvTile:
        """A `TileChoice`: what was measured best, else the guess."""
        known = self.measured.get(tiling.workload)
        return known.tile if known is not None and known.tile in tiling.candidates else best_guess(tiling)

    def knows(self, tiling: Tiling) -> bool:
        return tiling.workload in self.measured

    def with_measured(self, measured: Mapping[str, Measured]) -> "TileDatabase":
        return replace(self, measured={**self.measured, **measured})


def default_path() -> Path:
    """tiles.json in qcompiler's folder of the user's cache: $XDG_CACHE_HOME, or what the system has for it."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        cache = Path(given)
    elif sys.platform == "darwin":
        cache = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        cache = Path.home() / ".cache"
    return cache / "qcompiler" / "tiles.json"


def load(path: Path, host: HostCode) -> TileDatabase:
    """What a file knows for a CPU and for the templates as they are; nothing if there is no such file.

    Raises:
        QCompilerError: the file is none of ours.
    """
    cpu, known = _cpu(host), _read(path)
    return TileDatabase(cpu, known.cpus.get(cpu, {}) if known.code == _code() else {})


def save(path: Path, database: TileDatabase) -> None:
    """Put what is known for one CPU in place of what the file had for it.

    Raises:
        QCompilerError: the file is none of ours, or cannot be written.
    """
    known = _read(path)
    cpus = dict(known.cpus) if known.code == _code() else {}
    cpus[database.cpu] = dict(sorted(database.measured.items()))
    text = json.dumps(_FILE.dump_python(_File(_code(), dict(sorted(cpus.items()))), mode="json"), indent=1)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text + "\n", "utf-8")
        # Whoever reads meanwhile sees the old file or the new one.
        partial.replace(path)
    except OSError as error:
        raise QCompilerError(f"cannot write the tile database {path}: {error.strerror}.") from None


def _read(path: Path) -> _File:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return _File(_code(), {})
    except (OSError, UnicodeDecodeError) as error:
        raise QCompilerError(f"cannot read the tile database {path}: {error}.") from None
    try:
        return _FILE.validate_json(text)
    except ValidationError:
        raise QCompilerError(
            f"{path} is no tile database of qcompile tune; remove it, or name another with --database."
        ) from None


def _cpu(host: HostCode) -> str:
    """The CPU's name and a fingerprint of its features."""
    name = str(host.target.attrs.get("mcpu", "generic"))  # pyright: ignore[reportAttributeAccessIssue] (typed as str)
    return f"{name}-{hashlib.sha256(' '.join(sorted(host.features)).encode()).hexdigest()[:12]}"


def _code() -> str:
    folder = resources.files("qcompiler.backends")
    digest = hashlib.sha256()
    for name in _TEMPLATES:
        digest.update(folder.joinpath(*name.split("/")).read_bytes())
    return digest.hexdigest()[:16]
