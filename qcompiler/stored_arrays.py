"""Arrays in files or in memory, read row by row."""

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.lib import format as npy_format

from qcompiler import graph as g
from qcompiler.errors import QCompilerError


class Rows(Protocol):
    def rows(self) -> Iterator[np.ndarray]:
        """Slices along the first axis, one at a time."""
        ...

    def whole(self) -> np.ndarray: ...


@dataclass(frozen=True)
class MemoryRows:
    array: np.ndarray

    def rows(self) -> Iterator[np.ndarray]:
        return iter(self.array)

    def whole(self) -> np.ndarray:
        return self.array


@dataclass(frozen=True)
class NpyRows:
    """An .npy file, mapped into memory anew for each pass over it."""

    path: Path

    def rows(self) -> Iterator[np.ndarray]:
        return iter(self.whole())

    def whole(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r", allow_pickle=False)


@dataclass(frozen=True)
class NpzRows:
    """One array of an .npz, unpacked row by row, so that a compressed file needs no more memory than a sample."""

    path: Path
    member: str

    def rows(self) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
            shape, fortran, dtype = _npy_header(stream)
            if fortran:
                yield from self.whole()
                return
            size = dtype.itemsize * g.element_count(shape[1:])
            for row in range(shape[0]):
                yield np.frombuffer(self._read(stream, size, row), dtype).reshape(shape[1:])

    def _read(self, stream: IO[bytes], size: int, row: int) -> bytes:
        try:
            data = stream.read(size)
        except (zipfile.BadZipFile, zlib.error, EOFError):
            data = b""
        if len(data) < size:
            raise QCompilerError(f"{self.path} is damaged at row {row} of {self.member}; write or fetch it again")
        return data

    def whole(self) -> np.ndarray:
        with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
            return npy_format.read_array(stream, allow_pickle=False)


@dataclass(frozen=True)
class StoredArray:
    """An array not read yet. shape has the samples' axis first, if there is one."""

    shape: tuple[int, ...]
    dtype: np.dtype
    data: Rows


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = npy_format.read_magic(stream)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    return read(stream)


def read_headers(path: Path) -> dict[str, StoredArray]:
    """The arrays of an .npz by name, or the one of an .npy under the name "". Raises QCompilerError."""
    try:
        if path.suffix == ".npy":
            with path.open("rb") as stream:
                shape, _, dtype = _npy_header(stream)
            return {"": StoredArray(shape, dtype, NpyRows(path))}
        stored: dict[str, StoredArray] = {}
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    shape, _, dtype = _npy_header(stream)
                stored[member.removesuffix(".npy")] = StoredArray(shape, dtype, NpzRows(path, member))
    except FileNotFoundError:
        raise QCompilerError(f"{path} does not exist; give an .npz, an .npy or a folder") from None
    except (zipfile.BadZipFile, ValueError, EOFError):
        raise QCompilerError(
            f"{path} is not a readable .npz or .npy file; write one with numpy.savez(path, **{{input name: array}})"
        ) from None
    return stored
