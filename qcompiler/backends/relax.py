"""Assemble one Relax function from the kernels of all nodes and regions, and build it into a shared library."""

import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax as _relax_module
from tvm.relax import transform

from qcompiler import host_cpu, tools
from qcompiler.backends.base import AcceleratorFunction, Document, HostCode, Kernel, View, host_code
from qcompiler.backends.cpu_region import Step
from qcompiler.backends.cpu_region import lower_region as lower_cpu_region
from qcompiler.backends.tiles import TileChoice, Tiling, best_guess
from qcompiler.backends.workspace import Lifetime, plan
from qcompiler.c_code import CSource, compile_c
from qcompiler.errors import QCompilerError
from qcompiler.graph import Shape, const_of, dtype_of, shape_of, value_name
from qcompiler.partition import Partition, Region
from qcompiler.target import Host, Target

# TVM's annotations are too narrow for what its functions take.
relax: Any = _relax_module
RelaxExpr = Any

RegionLowering = Callable[[Region], AcceleratorFunction]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of the compiled function."""

    name: str
    shape: Shape
    dtype: str


@dataclass(frozen=True)
class Lowered:
    """A model as TVM code: ``main(inputs…, parameters…, *workspace()) -> (outputs…)``."""

    module: tvm.IRModule
    parameters: tuple[np.ndarray, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sources: tuple[CSource, ...]
    """C to link in: the NPU simulator where a region runs on it."""
    arena: int = 0
    """Bytes of the block in which everything lies that is computed."""
    tilings: tuple[Tiling, ...] = ()
    """Of the kernels that have tiles to choose from, in execution order."""
    documents: tuple[Document, ...] = ()
    """Texts for the bundle: the kernels of a GPU's regions."""


# --- lowering ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A call of one function."""

    name: str
    kernel: Kernel
    outputs: tuple[ir.Value, ...]
    workspace: int
    """Bytes of an extra last output that nobody reads; 0 for none."""
    sources: tuple[CSource, ...] = ()
    documents: tuple[Document, ...] = ()


@dataclass(frozen=True)
class _Alias:
    source: ir.Value
    output: ir.Value


def lower(
    model: ir.Model,
    partition: Partition,
    target: Target,
    lower_region: RegionLowering | None = None,
    tiles: TileChoice = best_guess,
) -> Lowered:
    """Lower a partitioned integer graph.

    Args:
        model: the integer graph; `float_ops.unsupported` must have found nothing in it.
        partition: covers every node of the graph.
        target: says what CPU the code is for.
        lower_region: makes the code of an accelerator's region; needed if there is one.
        tiles: chooses the tiles of CPU kernels.
    """
    host = replace(host_code(target.host), tiles=tiles)
    steps = [step for region in partition.regions for step in _region_steps(region, host, lower_region)]
    return _Assembler(model, steps).assemble()


def _region_steps(region: Region, host: HostCode, lower_region: RegionLowering | None) -> list[_Call | _Alias]:
    if region.backend == "cpu":
        return [_cpu_step(step) for step in lower_cpu_region(region.nodes, host)]
    assert lower_region is not None, f"nothing lowers the {region.backend} region {region.name}"
    driver = lower_region(region)
    kernel = Kernel(driver.function, region.inputs, (driver.constants,))
    workspace = max(driver.workspace, 1)
    return [_Call(region.name, kernel, region.outputs, workspace, driver.sources, driver.documents)]


def _cpu_step(step: Step) -> _Call | _Alias:
    if isinstance(step.lowering, View):
        return _Alias(step.lowering.input, step.outputs[0])
    return _Call(step.name, step.lowering, step.outputs, 0)


class _Assembler:
    """Declares parameters, equal ones once, and then emits the calls in order."""

    def __init__(self, model: ir.Model, steps: Sequence[_Call | _Alias]) -> None:
        self._model, self._steps = model, steps
        self._arrays: dict[tuple[bytes, Shape, str], int] = {}
        self._parameters: list[np.ndarray] = []

    def assemble(self) -> Lowered:
        graph = self._model.graph
        indices = [self._declare(step) for step in self._steps]
        output_constants = {
            value: self._index(array) for value in graph.outputs if (array := const_of(value)) is not None
        }

        inputs = [relax.Var(f"in{i}", _type(shape_of(v), str(dtype_of(v)))) for i, v in enumerate(graph.inputs)]
        parameters = [
            relax.Var(f"p{i}", _type(array.shape, str(array.dtype))) for i, array in enumerate(self._parameters)
        ]
        memory = _Memory(graph, self._steps)
        # Tensors as their makers left them; whoever needs another shape takes a view.
        values: dict[ir.Value, RelaxExpr] = dict(zip(graph.inputs, inputs, strict=True))
        values |= {value: parameters[index] for value, index in output_constants.items()}

        builder = relax.BlockBuilder()
        with builder.function("main", [*inputs, *parameters, *memory.variables], attrs={"num_input": len(inputs)}):
            for step, (constants, own) in zip(self._steps, indices, strict=True):
                for value, index in constants.items():
                    values[value] = parameters[index]
                if isinstance(step, _Call):
                    _emit_call(builder, step, values, [parameters[index] for index in own], memory)
                elif step.source in values:
                    values[step.output] = values[step.source]
            results = [
                memory.view(value, shape_of(value))
                if value in memory
                else _viewed(builder, values[value], shape_of(value))
                for value in graph.outputs
            ]
            builder.emit_func_output(relax.Tuple(results))
        memory.emit_allocation(builder)
        return Lowered(
            builder.get(),
            tuple(self._parameters),
            tuple(_spec(value) for value in graph.inputs),
            tuple(_spec(value) for value in graph.outputs),
            _sources(self._steps),
            memory.size,
            tuple(tiling for step in self._steps if isinstance(step, _Call) and (tiling := step.kernel.tiling)),
            tuple(document for step in self._steps if isinstance(step, _Call) for document in step.documents),
        )

    def _declare(self, step: _Call | _Alias) -> tuple[dict[ir.Value, int], list[int]]:
        """Parameter indices of the constant inputs and of the kernel's own parameters."""
        reads = (step.source,) if isinstance(step, _Alias) else step.kernel.inputs
        constants = {value: self._index(array) for value in reads if (array := const_of(value)) is not None}
        own = [] if isinstance(step, _Alias) else [self._index(array) for array in step.kernel.parameters]
        return constants, own

    def _index(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray makes scalars vectors
        key = (sha256(array.data).digest(), array.shape, str(array.dtype))
        if key not in self._arrays:
            self._arrays[key] = len(self._parameters)
            self._parameters.append(array)
        return self._arrays[key]


def _sources(steps: Sequence[_Call | _Alias]) -> tuple[CSource, ...]:
    """Each once, by name."""
    found: dict[str, CSource] = {}
    for step in steps:
        for source in step.sources if isinstance(step, _Call) else ():
            assert found.setdefault(source.name, source) == source, f"two different sources are called {source.name}"
    return tuple(found.values())


def _type(shape: Sequence[int], dtype: str) -> Any:
    return relax.TensorType([int(dim) for dim in shape], dtype)


def _spec(value: ir.Value) -> TensorSpec:
    return TensorSpec(value_name(value), shape_of(value), str(dtype_of(value)))


def _viewed(builder: Any, tensor: RelaxExpr, shape: Sequence[int]) -> RelaxExpr:
    """`tensor` under another shape; the VM makes a view of it."""
    wanted = [int(dim) for dim in shape]
    if [int(dim) for dim in tensor.ty.shape] == wanted:
        return tensor
    return builder.emit(relax.op.reshape(tensor, wanted))


def _emit_call(
    builder: Any, step: _Call, values: dict[ir.Value, RelaxExpr], own: Sequence[RelaxExpr], memory: "_Memory"
) -> None:
    arguments = [
        memory.view(value, _dims(buffer)) if value in memory else _viewed(builder, values[value], _dims(buffer))
        for value, buffer in zip(step.kernel.inputs, _buffers(step), strict=False)
    ]
    function = builder.add_func(step.kernel.function, step.name)
    builder.emit(relax.Call(function, [*arguments, *own, *memory.results(step)], None, [relax.TupleType([])]))


def _buffers(step: _Call) -> list[Any]:
    """The buffers of a step's function: inputs, its own parameters, outputs, and the workspace if there is one."""
    signature: Any = step.kernel.function
    buffers = list(signature.params)
    kernel = step.kernel
    expected = len(kernel.inputs) + len(kernel.parameters) + len(step.outputs) + bool(step.workspace)
    assert len(buffers) == expected, step.name
    return buffers


def _result_buffers(step: _Call) -> list[Any]:
    return _buffers(step)[len(step.kernel.inputs) + len(step.kernel.parameters) :]


def _dims(buffer: Any) -> Shape:
    return tuple(int(dim) for dim in buffer.shape)


class _Memory:
    """What the steps compute, in one planned block.

    The tensors in it, one for each shape in which a value is used, are made once by the function `workspace` and
    passed to `main` with every call: to allocate them in each run would take longer than a small layer.
    """

    def __init__(self, graph: ir.Graph, steps: Sequence[_Call | _Alias]) -> None:
        self.variables: list[RelaxExpr] = []
        self._pieces: list[tuple[int, Shape, str]] = []
        """Offset, shape and dtype of each variable."""
        self._views: dict[tuple[int, Shape], RelaxExpr] = {}
        self._storage: dict[ir.Value, int] = {}
        """Which planned tensor a value lies in."""
        self._results: dict[int, list[int]] = {}
        """Planned tensors a step fills, by the step's identity."""
        lifetimes: list[Lifetime] = []
        for position, step in enumerate(steps):
            reads = [step.source] if isinstance(step, _Alias) else step.kernel.inputs
            for storage in {self._storage[value] for value in reads if value in self._storage}:
                lifetimes[storage] = replace(lifetimes[storage], last=position)
            if isinstance(step, _Alias):
                if step.source in self._storage:
                    self._storage[step.output] = self._storage[step.source]
                continue
            self._results[id(step)] = list(range(len(lifetimes), len(lifetimes) + len(_result_buffers(step))))
            self._storage |= dict(zip(step.outputs, self._results[id(step)], strict=False))
            for buffer in _result_buffers(step):
                size = math.prod(_dims(buffer)) * np.dtype(str(buffer.dtype)).itemsize
                lifetimes.append(Lifetime(size, position, position))
        for value in graph.outputs:
            if value in self._storage:
                storage = self._storage[value]
                lifetimes[storage] = replace(lifetimes[storage], last=len(steps))
        self._offsets, self.size = plan(lifetimes)
        for step in steps:
            if isinstance(step, _Call):
                for value, buffer in zip(step.kernel.inputs, _buffers(step), strict=False):
                    self._add(self._storage.get(value), _dims(buffer), str(buffer.dtype))
                for storage, buffer in zip(self._results[id(step)], _result_buffers(step), strict=True):
                    self._add(storage, _dims(buffer), str(buffer.dtype))
        for value in graph.outputs:
            self._add(self._storage.get(value), shape_of(value), str(dtype_of(value)))

    def _add(self, storage: int | None, shape: Shape, dtype: str) -> None:
        if storage is not None and (storage, shape) not in self._views:
            variable = relax.Var(f"w{len(self.variables)}", _type(shape, dtype))
            self._views[storage, shape] = variable
            self.variables.append(variable)
            self._pieces.append((self._offsets[storage], shape, dtype))

    def __contains__(self, value: ir.Value) -> bool:
        """Whether a step computes it; inputs and constants lie elsewhere."""
        return value in self._storage

    def view(self, value: ir.Value, shape: Shape) -> RelaxExpr:
        """A value that a step computes, under a shape."""
        return self._views[self._storage[value], shape]

    def results(self, step: _Call) -> list[RelaxExpr]:
        pairs = zip(self._results[id(step)], _result_buffers(step), strict=True)
        return [self._views[storage, _dims(buffer)] for storage, buffer in pairs]

    def emit_allocation(self, builder: Any) -> None:
        with builder.function("workspace", []):
            block = builder.emit(
                relax.op.memory.alloc_storage(relax.ShapeExpr([max(self.size, 1)]), 0, "global", "uint8")
            )
            tensors = [
                builder.emit(relax.op.memory.alloc_tensor(block, offset, relax.ShapeExpr(shape), dtype))
                for offset, shape, dtype in self._pieces
            ]
            builder.emit_func_output(relax.Tuple(tensors))


# --- building ----------------------------------------------------------------------------------------------

_PIPELINE: tuple[tvm.ir.transform.Pass, ...] = (
    transform.RemovePurityChecking(),
    transform.LowerRuntimeBuiltin(),
    transform.ComputePrimValue(),
    transform.VMShapeLower(),
    transform.AttachGlobalSymbol(),
)
"""TVM's default build pipeline less what an assembled module never needs (legalizing, dispatch, planning memory…)."""

PASS_CONFIG = {"s_tir.LoopPartition": {"partition_const_loop": True}}
"""Loops are cut where `te.inside` conditions change; without it Concat tests every element."""


def build(lowered: Lowered, host: Host, library: Path) -> None:
    """Compile a lowered model to the shared library `library`, with the C its regions bring.

    The bytes depend on nothing but the arguments and the C compiler.

    Raises:
        QCompilerError: no C compiler, or none for the target's CPU.
    """
    code = host_code(host)
    compiler = c_compiler(host)
    with tvm.transform.PassContext(config=PASS_CONFIG):
        executable = relax.build(
            lowered.module, code.target, relax_pipeline=tvm.transform.Sequential(list(_PIPELINE)), exec_mode="bytecode"
        )
    # Relative names in a fresh folder: object files carry their names into the library's symbol table.
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        work = Path(folder)
        addons = [str(compile_c(source, work, compiler)) for source in lowered.sources]
        libraries = [name for source in lowered.sources for name in source.libraries]
        executable.export_library(
            str(work / "model.so"),
            fcompile=lambda output, objects, **_: _link(compiler, work, output, objects, libraries),
            addons=addons,
            workspace_dir=str(work),
        )
        # A new file, never new contents: a process may have the old library mapped.
        library.unlink(missing_ok=True)
        shutil.copyfile(work / "model.so", library)


def c_compiler(host: Host) -> tuple[str, ...]:
    """The command that compiles and links C for a spec's CPU. Errors as of `tools.cross_compiler`."""
    triple = str(host.tvm_target.get("mtriple", ""))
    if not triple or triple.partition("-")[0] == host_cpu.architecture():
        return (tools.c_compiler(),)
    return tools.cross_compiler(triple)


def _link(compiler: Sequence[str], work: Path, output: str, objects: Sequence[str], libraries: Sequence[str]) -> None:
    names = [Path(name).name for name in objects]
    needed = [*libraries, *([] if "-nostdlib" in compiler else ["-lm"])]
    _run([*compiler, "-shared", "-fPIC", "-Wl,--build-id=none", "-o", Path(output).name, *names, *needed], work)


def _run(command: Sequence[str], work: Path) -> None:
    finished = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise QCompilerError(
            f"the C compiler failed: `{' '.join(command)}` exited with {finished.returncode}: {finished.stderr.strip()}"
        )
