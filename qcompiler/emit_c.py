"""`qcompile MODEL --target cortex-m55 --emit c`: a folder of C for a chip without an operating system."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qcompiler import bundle
from qcompiler.compile import DEFAULTS, SILENT, Placed, Progress, place
from qcompiler.errors import QCompilerError
from qcompiler.options import Options

if TYPE_CHECKING:
    from qcompiler.backends.mcu import McuProgram, Port
    from qcompiler.backends.mcu_emit import TestVector

Arrays = Mapping[str, np.ndarray]

TEST_VECTORS = 2
"""Samples the example program checks itself with, unless told otherwise."""


@dataclass(frozen=True)
class Emitted:
    """What was written."""

    path: Path
    arena_bytes: int
    arena_lower_bound: int
    """Most bytes alive at one step: no plan can need less."""
    constant_bytes: int
    port_bytes: int
    """Buffers of inputs and outputs, which the caller keeps."""

    def summary(self) -> str:
        """One paragraph for people."""
        return (
            f"wrote {self.path}: {self.constant_bytes} bytes of constants, an arena of {self.arena_bytes} bytes "
            f"(no plan needs less than {self.arena_lower_bound}), {self.port_bytes} bytes of inputs and outputs. "
            f"Build with `make -C {self.path}`, try with `make -C {self.path} run`."
        )


def emit_c(
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: Options = DEFAULTS,
    *,
    progress: Progress = SILENT,
    vectors: int = TEST_VECTORS,
) -> Emitted:
    """Compile a model to C sources and objects for a bare-metal chip.

    Args:
        output: the folder; what an earlier call wrote there is replaced.
        vectors: test vectors of the example program, from the first calibration samples.
        Others: as in `compile.compile`.

    Raises:
        QCompilerError: anything wrong with what was given, or a target that says nothing of bare metal.
    """
    with bundle.staging(Path(output)) as stage:
        placed = place(model, target, options, progress)
        program = write_placed(stage, placed, islice(placed.samples, vectors), progress)
    return Emitted(
        path=Path(output),
        arena_bytes=program.arena.peak,
        arena_lower_bound=program.arena.lower_bound,
        constant_bytes=program.constant_bytes,
        port_bytes=sum(port.bytes for port in (*program.inputs, *program.outputs)),
    )


def write_placed(folder: Path, placed: Placed, samples: Iterable[Arrays], progress: Progress = SILENT) -> "McuProgram":
    """Emit a model that has gone through `compile.place` into an existing folder.

    Args:
        folder: empty.
        placed: for a target with `host.bare_metal` and without an accelerator.
        samples: what the example program is tested with: inputs by name, one sample each.
    """
    from qcompiler.backends.mcu import lower
    from qcompiler.backends.mcu_emit import write_c
    from qcompiler.integer.ops import WeightOnlyGemm

    chip = placed.target
    if chip.host.bare_metal is None or chip.accelerators:
        problem = "has an accelerator" if chip.accelerators else "says nothing of bare metal (host.bare_metal)"
        raise QCompilerError(
            f"--emit c writes code for microcontrollers, and the target {chip.name} {problem}; choose a target such as "
            "cortex-m55, or leave --emit out."
        )
    in_groups = [node.name or "" for node in placed.integer.graph if node.op_type == WeightOnlyGemm.op_type]
    if in_groups and chip.host.tvm_target.get("kind") == "c":
        raise QCompilerError(
            f"portable C has no vectors to multiply weights with float activations by ({in_groups[0]} and "
            f"{len(in_groups) - 1} more); quantize activations too, or choose a target that TVM makes machine code for."
        )
    progress.stage("lower")
    program = lower(placed.integer, chip)
    progress.stage("reference")
    vectors = _vectors(placed, program, samples)
    progress.stage("write")
    write_c(folder, program, chip.host, vectors)
    bundle.write_json(folder / bundle.TARGET, chip.model_dump(mode="json"))
    inputs, outputs = ([_tensor(port) for port in ports] for ports in (program.inputs, program.outputs))
    bundle.write_manifest(folder, placed.source, chip.name, bundle.cpu_of(chip.host), tuple(inputs), tuple(outputs))
    return program


def _tensor(port: "Port") -> bundle.Tensor:
    known = port.quantization
    quantization = None if known is None else bundle.Quantization(port.dtype, known.scale, known.zero_point)
    return bundle.Tensor(port.name, port.shape, port.dtype, quantization)


def _vectors(placed: Placed, program: "McuProgram", samples: Iterable[Arrays]) -> "list[TestVector]":
    """The integers that inputs become, and the outputs the numpy reference has for them."""
    from qcompiler.backends.mcu_emit import TestVector
    from qcompiler.integer.reference import Executor

    executor = Executor(placed.integer)
    names = [port.value for port in (*program.inputs, *program.outputs)]
    vectors: list[TestVector] = []
    for sample in samples:
        values = executor.run(sample, names)
        inputs, outputs = (tuple(values[port.value] for port in ports) for ports in (program.inputs, program.outputs))
        vectors.append(TestVector(inputs, outputs))
    return vectors
