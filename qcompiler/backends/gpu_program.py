"""A GPU region as data: buffers in one arena with planned lifetimes, constants, and the list of launches.

`encode` writes what `runtime_stubs/gpu/qgpu.c` reads, `describe` the same for people.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from qcompiler.backends.gpu_code import Launch
from qcompiler.graph import Shape

ALIGNMENT = 512
"""Bytes between the starts of buffers: no device wants more of a part of a buffer, most less."""
_MAGIC = 0x55504751


@dataclass(frozen=True)
class Span:
    """A buffer in the arena or among the constants."""

    is_constant: bool
    offset: int
    bytes: int


@dataclass(frozen=True)
class Port:
    """An input or output of the region, in the arena."""

    name: str
    shape: Shape
    dtype: str
    span: Span


@dataclass(frozen=True)
class Step:
    """One launch."""

    operators: str
    """For people: the nodes it computes."""
    launch: Launch
    arguments: tuple[Span, ...]
    """In the kernel's order."""


@dataclass(frozen=True)
class GpuProgram:
    """A compiled region."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    steps: tuple[Step, ...]
    source: str
    """The kernels in the device's language."""
    binary: bytes
    """What the driver loads: the same source for OpenCL, a fat binary for CUDA."""
    constants: np.ndarray
    """uint8 [n]."""
    arena: int
    """Bytes of device memory for everything that is computed."""
    overlaps: bool = False
    """Whether a kernel may start before the one before it is done, for which it waits itself."""


def encode(program: GpuProgram) -> np.ndarray:
    """The program as bytes, uint8 [n]: the layout is described in qgpu.c."""
    names, positions = _names([step.launch.kernel for step in program.steps])
    words = [word for port in (*program.inputs, *program.outputs) for word in (port.span.offset, port.span.bytes)]
    for step in program.steps:
        words += [positions[step.launch.kernel], *step.launch.grid, *step.launch.block, len(step.arguments)]
        words += [word for span in step.arguments for word in (int(span.is_constant), span.offset, span.bytes)]
    header = 12
    parts = [names, program.binary + b"\0", program.constants.tobytes()]
    offsets: list[int] = []
    end = 8 * (header + len(words))
    for part in parts:
        end = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(end)
        end += len(part)
    identity = int.from_bytes(sha256(b"".join((np.array(words, "<i8").tobytes(), *parts))).digest()[:7], "little")
    table = [
        _MAGIC, identity, program.arena, offsets[2], len(parts[2]), offsets[1], len(program.binary), offsets[0],
        len(program.inputs), len(program.outputs), len(program.steps), int(program.overlaps), *words,
    ]  # fmt: skip
    blob = np.zeros(end, np.uint8)
    blob[: 8 * len(table)] = np.array(table, "<i8").view(np.uint8)
    for offset, part in zip(offsets, parts, strict=True):
        blob[offset : offset + len(part)] = np.frombuffer(part, np.uint8)
    return blob


def _names(kernels: Sequence[str]) -> tuple[bytes, dict[str, int]]:
    text, positions = b"", dict[str, int]()
    for name in dict.fromkeys(kernels):
        positions[name] = len(text)
        text += name.encode() + b"\0"
    return text + b"\0", positions


def describe(program: GpuProgram) -> str:
    """The launches as a table, and what they work on."""
    lines = [f"arena {program.arena} bytes, constants {program.constants.nbytes} bytes", ""]
    for label, ports in (("input", program.inputs), ("output", program.outputs)):
        lines += [f"{label} {port.name} {port.dtype} {list(port.shape)} at {_place(port.span)}" for port in ports]
    lines.append("")
    for step in program.steps:
        grid, block = ("x".join(map(str, sizes)) for sizes in (step.launch.grid, step.launch.block))
        arguments = ", ".join(_place(span) for span in step.arguments)
        lines.append(f"{step.launch.kernel} {grid} groups of {block}: {arguments}")
    return "\n".join(lines) + "\n"


def _place(span: Span) -> str:
    return f"{'constants' if span.is_constant else 'arena'}+{span.offset}[{span.bytes}]"
