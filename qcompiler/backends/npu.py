"""The NPU backend: a region of integer nodes becomes one driver.

`compile_region` decides everything: which values stay in the scratchpad and where, how each operator is tiled,
what lies in the constants. `words` and `driver` then only emit, the same loops through two emitters, so that the
commands the cost model prices are the commands the driver issues.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm.script.ir_builder import IRBuilder
from tvm.tirx import PrimFunc

from qcompiler.backends.base import AcceleratorFunction
from qcompiler.backends.npu_cascade_loops import Cascade
from qcompiler.backends.npu_emit import TirEmitter, WordEmitter, builder, tirx
from qcompiler.backends.npu_layers import recipe_of
from qcompiler.backends.npu_layout import plan_layout
from qcompiler.backends.npu_memory import MemoryPlan
from qcompiler.backends.npu_program import Step, emit_program
from qcompiler.backends.npu_schedule import Bases, bases_of, schedule
from qcompiler.backends.npu_tiling import Work, smallest_need
from qcompiler.backends.npu_units import Unit
from qcompiler.graph import Shape, dtype_of, element_count, shape_of, value_name
from qcompiler.partition import Region
from qcompiler.simulator.machine import SIMULATOR
from qcompiler.simulator.weight_code import EncodedSpan
from qcompiler.target import Target


@dataclass(frozen=True)
class Tensor:
    """An input or output of a region."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class NpuProgram:
    """A compiled region: everything but the text of the driver."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    steps: tuple[Step, ...]
    """One per node of the region, in order; `step.work.tiling` is the tiling."""
    cascades: tuple[Cascade, ...]
    """Runs of steps that are computed in stripes, depth first."""
    scratchpad_bytes: int
    scratchpad: MemoryPlan
    """Addresses in the scratchpad, its peak and the lower bound of any plan, in bytes."""
    evicted: tuple[str, ...]
    """Intermediate values that stream through external memory."""
    blob: np.ndarray
    """uint8 [n]: OHWI weights, scale records, tables; each at a multiple of 16 bytes."""
    workspace_bytes: int
    """External memory for evicted values."""
    encoded: tuple[EncodedSpan, ...]
    """Where in the constants weights lie that the target keeps encoded."""
    bases: Bases
    """Base numbers of inputs, blob, outputs and workspace; base 0 is the scratchpad."""


def can_run(node: ir.Node, target: Target) -> str | None:
    """Why the NPU's driver cannot run a node of the integer graph, or None if it can.

    Asks nothing of the target's rules, only whether the operator is known and its smallest tile fits the scratchpad.
    """
    assert target.npu is not None, f"{target.name} has no accelerator"
    recipe = recipe_of(node, target)
    if isinstance(recipe, str):
        return recipe
    if not isinstance(recipe, Work):
        return None
    scratchpad = target.npu.scratchpad
    need = smallest_need(recipe, max(scratchpad.alignment, 1))
    if need > scratchpad.size:
        return f"its smallest tile needs {need} bytes and the scratchpad has {scratchpad.size}"
    return None


def compile_region(region: Region, target: Target, units: Sequence[Unit] | None = None) -> NpuProgram:
    """Plan a region whose every node `can_run`. `units`, if given, are the steps and cascades to cut it into."""
    assert target.npu is not None, f"{target.name} has no accelerator"
    recipes = []
    for node in region.nodes:
        recipe = recipe_of(node, target)
        assert not isinstance(recipe, str), f"{node.op_type} {node.name} is in an NPU region, but {recipe}"
        recipes.append(recipe)
    layout = plan_layout(region, recipes)
    planned = schedule(region, recipes, layout, target, units)
    return NpuProgram(
        region.name,
        tuple(_tensor(value) for value in region.inputs),
        tuple(_tensor(value) for value in region.outputs),
        planned.steps,
        planned.cascades,
        target.npu.scratchpad.size,
        planned.scratchpad,
        planned.evicted,
        planned.blob,
        planned.workspace.peak,
        planned.encoded,
        bases_of(region),
    )


def _tensor(value: ir.Value) -> Tensor:
    return Tensor(value_name(value), shape_of(value), str(dtype_of(value)))


def words(program: NpuProgram) -> np.ndarray:
    """int32 [n]: the command words the simulator logs when the driver runs."""
    emit = WordEmitter()
    emit_program(emit, program.steps, program.cascades)
    return np.array(emit.words, np.int32)


def driver(program: NpuProgram, name: str, region: int = 0) -> PrimFunc:
    """The region's S-TIR function, for `relax.call_tir`.

    Arguments: the region's inputs, the constants uint8 [len(blob)], the region's outputs, the workspace
    uint8 [max(1, workspace_bytes)]; all dense. `name` becomes the global symbol; `region` numbers the
    region in the simulator's log.
    """
    bases = program.bases
    with IRBuilder() as ir_builder:
        with builder.prim_func(s_tir=True):
            builder.func_name(name)
            builder.func_attr({"global_symbol": name, "tirx.noalias": True})
            bound: list[tuple[int, Any, str, int]] = []

            def argument(base: int, label: str, shape: Shape, dtype: str, access: str) -> None:
                buffer = builder.arg(label, builder.Buffer(shape, dtype))
                bound.append((base, buffer, access, element_count(shape) * np.dtype(dtype).itemsize))

            for index, (base, tensor) in enumerate(zip(bases.inputs, program.inputs, strict=True)):
                argument(base, f"input_{index}", tensor.shape, tensor.dtype, "r")
            argument(bases.blob, "constants", (len(program.blob),), "uint8", "r")
            for index, (base, tensor) in enumerate(zip(bases.outputs, program.outputs, strict=True)):
                argument(base, f"output_{index}", tensor.shape, tensor.dtype, "rw")
            argument(bases.workspace, "workspace", (max(1, program.workspace_bytes),), "uint8", "rw")

            _host("qrt_open", region, program.scratchpad_bytes)
            for base, buffer, access, size in bound:
                _host("qrt_bind", base, buffer.access_ptr(access), tirx.const(size, "int64"))
            emit_program(TirEmitter(), program.steps, program.cascades)
            _host("qrt_close")
        function = ir_builder.get()
    assert isinstance(function, PrimFunc)
    return function


def region_function(program: NpuProgram, number: int) -> AcceleratorFunction:
    """The driver of a compiled region, and the simulator it calls; `number` is the region's in the simulator's log."""
    return AcceleratorFunction(
        driver(program, program.name, number), program.blob, max(1, program.workspace_bytes), (SIMULATOR,)
    )


def _host(function: str, *arguments: Any) -> None:
    builder.evaluate(tirx.call_extern("int32", function, *arguments))
