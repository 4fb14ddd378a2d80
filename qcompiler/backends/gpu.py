"""The GPU backend: a region of integer nodes becomes kernels, a list of launches, and host code that starts them.

Everything that is decided, is decided here: what is fused, which kernel runs which node, where tensors lie on the
device. The host code only calls `runtime_stubs/abi/qgpu.h` with the encoded program.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm_ffi
from tvm import tirx as _tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as _builder

from qcompiler.backends.base import AcceleratorFunction, Document, GpuKernel, Kernel, View
from qcompiler.backends.gpu_binary import binary
from qcompiler.backends.gpu_code import Device, Launch, device_of, generate
from qcompiler.backends.gpu_kernels import Group, grouped, layout_of, lower, refusal
from qcompiler.backends.gpu_program import ALIGNMENT, GpuProgram, Port, Span, Step, describe, encode
from qcompiler.backends.gpu_tensor_cores import Layout
from qcompiler.backends.workspace import Lifetime, plan
from qcompiler.c_code import CSource, stub
from qcompiler.graph import const_of, dtype_of, element_count, shape_of, value_name
from qcompiler.regions import Region
from qcompiler.target import Target

# TVM's annotations do not describe its expressions.
tirx: Any = _tirx
builder: Any = _builder

RUNTIMES: Mapping[str, tuple[CSource, ...]] = {
    api: (stub("gpu/qgpu.c", "the GPU runtime"), stub(f"gpu/{api}.c", f"the {what} runtime", ("-ldl",)))
    for api, what in (("opencl", "OpenCL"), ("cuda", "CUDA"))
}
"""The C that calls of qgpu.h run, by API."""


def can_run(node: ir.Node, target: Target) -> str | None:
    """Why the GPU has no kernel for a node of the integer graph, or None if it has."""
    assert target.gpu is not None, f"{target.name} has no GPU"
    return refusal(node)


def region_function(
    region: Region, target: Target, number: int, assemble: Callable[[str, Device], bytes] = binary
) -> AcceleratorFunction:
    """The host code of a region whose every node `can_run`; `number` is that of the region in its partition.

    `assemble` as for `compile_region`.
    """
    assert target.gpu is not None, f"{target.name} has no GPU"
    program = compile_region(region, device_of(target.gpu), assemble)
    blob = encode(program)
    suffix = {"opencl": "cl", "cuda": "cu"}[target.gpu.api]
    documents = (
        Document(f"{region.name}.{suffix}", program.source),
        Document(f"{region.name}.txt", describe(program)),
    )
    return AcceleratorFunction(driver(program, blob, number), blob, 1, RUNTIMES[target.gpu.api], documents)


# --- programs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    group: Group
    kernel: Kernel
    function: str
    """Name of the generated function."""


def compile_region(region: Region, device: Device, assemble: Callable[[str, Device], bytes] = binary) -> GpuProgram:
    """Choose kernels, generate them, and plan the device's memory. `assemble` makes of source what the driver loads."""
    functions = _Functions()
    calls: list[_Call] = []
    views: dict[ir.Value, ir.Value] = {}
    groups = grouped(region.nodes)
    layout = layout_of(groups, region.outputs, device)
    wholes = {piece.whole for piece in layout.pieces.values()}
    for group in groups:
        if group.outputs[0] in wholes:
            continue
        lowering = lower(group, device, layout)
        if isinstance(lowering, View):
            views[group.outputs[0]] = lowering.input
        else:
            calls.append(_Call(group, lowering, functions.name_of(lowering.function, group.label)))
    code = generate(functions.by_name, device)
    memory = _Memory(region, calls, views, layout)
    return GpuProgram(
        region.name,
        tuple(memory.port(value) for value in region.inputs),
        tuple(memory.port(value) for value in region.outputs),
        tuple(memory.step(call, code.launches[call.function]) for call in calls),
        code.source,
        assemble(code.source, device),
        memory.constants(),
        memory.size,
        "dependent_launch" in device.features,
    )


class _Functions:
    """Scheduled functions by name, equal ones once."""

    def __init__(self) -> None:
        self.by_name: dict[str, _tirx.PrimFunc] = {}
        self._known: dict[int, list[str]] = {}

    def name_of(self, function: _tirx.PrimFunc, label: str) -> str:
        candidates = self._known.setdefault(tvm_ffi.structural_hash(function), [])
        for name in candidates:
            if tvm_ffi.structural_equal(self.by_name[name], function):
                return name
        name = f"k{len(self.by_name)}_{label}"
        self.by_name[name] = function
        candidates.append(name)
        return name


class _Memory:
    """Where everything lies: computed tensors in the arena, parameters and constant operands among the constants."""

    def __init__(
        self,
        region: Region,
        calls: Sequence[_Call],
        views: Mapping[ir.Value, ir.Value],
        layout: Layout,
    ) -> None:
        self._views, self._layout = views, layout
        self._blob = bytearray()
        self._constant_offsets: dict[bytes, int] = {}
        index: dict[ir.Value, int] = {}
        lifetimes: list[Lifetime] = []

        def declare(value: ir.Value, first: int) -> None:
            index[value] = len(lifetimes)
            lifetimes.append(Lifetime(self._bytes(value), first, first))

        def read(value: ir.Value, position: int) -> None:
            source = self._source(value)
            if source in index:
                known = lifetimes[index[source]]
                lifetimes[index[source]] = Lifetime(known.size, known.first, max(known.last, position))

        for value in region.inputs:
            declare(value, -1)
        for position, call in enumerate(calls):
            for value in call.kernel.inputs:
                read(value, position)
            for value in call.group.outputs:
                source = self._source(value)
                if source in index:
                    read(source, position)
                else:
                    declare(source, position)
        for value in region.outputs:
            read(value, len(calls))
        # All kernels' scratch memory is one: each leaves the zeros it found, which nothing else may overwrite.
        scratch = [call.kernel.scratch for call in calls if isinstance(call.kernel, GpuKernel)]
        lifetimes += [Lifetime(max(scratch), -1, len(calls))] if scratch else []
        offsets, size = plan(lifetimes, ALIGNMENT)
        self._scratch = offsets[-1] if scratch else 0
        self.size = max(size, ALIGNMENT)
        self._offsets = {value: offsets[number] for value, number in index.items()}

    def _source(self, value: ir.Value) -> ir.Value:
        """The tensor that a view is of, or that a piece is part of."""
        while value in self._views or value in self._layout.pieces:
            value = self._views[value] if value in self._views else self._layout.pieces[value].whole
        return value

    def port(self, value: ir.Value) -> Port:
        return Port(value_name(value), shape_of(value), str(dtype_of(value)), self._span(value))

    def step(self, call: _Call, launch: Launch) -> Step:
        spans = [
            *(self._span(value) for value in call.kernel.inputs),
            *(self._constant(array) for array in call.kernel.parameters),
            *(self._span(value) for value in call.group.outputs),
        ]
        if isinstance(call.kernel, GpuKernel):
            spans.append(Span(False, self._scratch, call.kernel.scratch))
        return Step(call.group.label, launch, tuple(spans[index] for index in launch.arguments))

    def constants(self) -> np.ndarray:
        """Everything `step` has needed so far."""
        return np.frombuffer(bytes(self._blob) or b"\0" * ALIGNMENT, np.uint8)

    def _span(self, value: ir.Value) -> Span:
        source = self._source(value)
        array = const_of(source)
        return Span(False, self._offsets[source], self._bytes(source)) if array is None else self._constant(array)

    def _constant(self, array: np.ndarray) -> Span:
        data = array.tobytes()
        digest = sha256(data).digest()
        if digest not in self._constant_offsets:
            self._blob.extend(bytes(-len(self._blob) % ALIGNMENT))
            self._constant_offsets[digest] = len(self._blob)
            self._blob.extend(data)
        return Span(True, self._constant_offsets[digest], len(data))

    def _bytes(self, value: ir.Value) -> int:
        size = element_count(shape_of(value)) * dtype_of(value).itemsize
        return max(1, size // 2 if value in self._layout.packed else size)


# --- host code ---------------------------------------------------------------------------------------------


def driver(program: GpuProgram, blob: np.ndarray, number: int) -> _tirx.PrimFunc:
    """``function(inputs…, program uint8[n], outputs…, workspace uint8[1])``: calls of qgpu.h."""
    with IRBuilder() as ir_builder:
        with builder.prim_func(s_tir=True):
            builder.func_name(program.name)
            builder.func_attr({"global_symbol": program.name, "tirx.noalias": True})

            def argument(label: str, shape: Sequence[int], dtype: str) -> Any:
                return builder.arg(label, builder.Buffer(tuple(shape), dtype))

            inputs = [argument(f"input_{i}", port.shape, port.dtype) for i, port in enumerate(program.inputs)]
            data = argument("program", (len(blob),), "uint8")
            outputs = [argument(f"output_{i}", port.shape, port.dtype) for i, port in enumerate(program.outputs)]
            argument("workspace", (1,), "uint8")

            _host("qgpu_open", number, data.access_ptr("r"))
            for index, buffer in enumerate(inputs):
                _host("qgpu_write", index, buffer.access_ptr("r"))
            _host("qgpu_run")
            for index, buffer in enumerate(outputs):
                _host("qgpu_read", index, buffer.access_ptr("w"))
            closed = tirx.call_extern("int32", "qgpu_close")
            with builder.Assert(tirx.EQ(closed, 0), FAILED):
                builder.evaluate(0)
        function = ir_builder.get()
    assert isinstance(function, _tirx.PrimFunc)
    return function


FAILED = "the GPU failed; qgpu_error says why"
"""The error of a driver whose calls did not all succeed."""


def _host(function: str, *arguments: Any) -> None:
    builder.evaluate(tirx.call_extern("int32", function, *arguments))
