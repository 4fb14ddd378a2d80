"""TIR functions as plain C functions: pointers in, nothing out, no runtime, no heap.

TVM's own pipeline ends in the packed calling convention, whose functions take tagged arguments, check them and
raise errors through the runtime, and allocate what they need through it. Here the same passes run up to there; then
each buffer argument becomes a bare pointer, and temporaries too large for the stack move into a workspace that
the caller passes as the last argument.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import PointerType, PrimType

from qcompiler.backends.npu_memory import aligned

STACK_LIMIT = 512
"""Bytes of one temporary that may live on the stack; accumulators, which LLVM then keeps in registers, are smaller.
Of storage scope "local" a temporary lives there whatever its size."""

MIN_ALIGNMENT = 16
"""Bytes: of the workspace and of every argument, on any target."""

# TVM's annotations are too narrow for what its functions take.
_tirx: Any = tirx
_STIR: Any = s_tir.transform
_TIRX: Any = tirx.transform
_structural_mutate: Any = tvm_ffi.structural_mutate

_CONFIG = {"s_tir.LoopPartition": {"partition_const_loop": True}}
"""As `relax.build`: loops are cut where `te.inside` conditions change."""


@dataclass(frozen=True)
class Argument:
    """One pointer."""

    name: str
    dtype: str


@dataclass(frozen=True)
class RawFunction:
    """A function with C linkage: ``void name(arguments…[, uint8_t* workspace])``."""

    name: str
    arguments: tuple[Argument, ...]
    workspace: int
    """Bytes of the workspace; 0 if the function takes none. If arguments are aligned to more than `MIN_ALIGNMENT`, as
    much of it lies past the last temporary: whole vectors are read of which only the first bytes are used."""


@dataclass(frozen=True)
class RawModule:
    """Lowered functions, ready for a code generator, and their signatures in the order they were given."""

    module: tvm.IRModule
    functions: tuple[RawFunction, ...]


def _until_calling_convention(*, vectors: bool) -> tuple[Any, ...]:
    """`tvm.s_tir.pipeline.default_s_tir_pipeline` before its calling convention, less what is for GPUs."""
    return (
        _STIR.CanonicalizeLoop(),
        _STIR.LowerInitBlock(),
        _STIR.PlanAndUpdateBufferAllocationLocation(),
        _STIR.ConvertBlocksToOpaque(),
        _STIR.CompactBufferAllocation(),
        _STIR.LowerMatchBuffer(),
        _STIR.StmtSimplify(),
        _STIR.AnnotateIrregularLoop(),
        _STIR.LowerOpaqueBlock(),
        _TIRX.FlattenBuffer(),
        _TIRX.NarrowDataType(32),
        _STIR.LoopPartition(),
        _TIRX.VectorizeLoop(vectors),
        _TIRX.StorageRewrite(),
        _STIR.HoistIfThenElse(),
        _TIRX.UnrollLoop(),
        _STIR.RenormalizeSplitPattern(),
        _TIRX.StmtSimplify(),
        _TIRX.RemoveNoOp(),
        _STIR.RewriteUnsafeSelect(),
        _TIRX.CommonSubexprElim(),
    )


def loops_of(functions: Mapping[str, tirx.PrimFunc], target: tvm.target.Target) -> tvm.IRModule:
    """Scheduled functions as loops over flat memory, what they allocate where they allocate it."""
    module = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    # For a target with vectors of unknown length, VectorizeLoop would make loops of those: show it a plain one.
    plain = tvm.target.Target({"kind": _kind(target)})
    passes = [_TIRX.BindTarget(plain.with_host(plain)), *_until_calling_convention(vectors=is_llvm(target))]
    with tvm.transform.PassContext(config=_CONFIG):
        return tvm.transform.Sequential(passes)(module)


def lower_functions(
    functions: Mapping[str, tirx.PrimFunc], target: tvm.target.Target, alignment: int = MIN_ALIGNMENT
) -> RawModule:
    """Lower scheduled functions for a CPU.

    Args:
        functions: by the names they will have in C.
        target: an "llvm" or "c" target.
        alignment: bytes that the workspace and every argument will be aligned to.
    """
    module = loops_of(functions, target)
    with tvm.transform.PassContext(config=_CONFIG):
        bare = {name: _Bare(name, module[name].with_attr("target", target), alignment) for name in functions}
        module = tvm.IRModule({name: item.function for name, item in bare.items()})
        module = _TIRX.LowerIntrin()(module)
    if not is_llvm(target):
        module = tvm.IRModule({name: _structural_mutate(module[name], _EXACT) for name in functions})
    return RawModule(module, tuple(item.signature for item in bare.values()))


def _exact(number: Any, _: Any) -> Any:
    """A float constant as its bits, where the seven digits that TVM writes into C would round it."""
    dtype = np.dtype(str(number.ty.dtype))
    if dtype.itemsize < 4 or dtype.type(f"{number.value:.6e}") == dtype.type(number.value):
        return number
    bits = f"int{8 * dtype.itemsize}"
    return _tirx.reinterpret(str(dtype), _tirx.const(int(dtype.type(number.value).view(bits)), bits))


_EXACT = [(tirx.FloatImm, _exact)]


def is_llvm(target: tvm.target.Target) -> bool:
    """Whether TVM writes machine code for a target, not C."""
    return _kind(target) == "llvm"


def _kind(target: Any) -> str:
    return str(target.kind.name)


def generate(module: tvm.IRModule, target: tvm.target.Target) -> Any:
    """TVM's code generator on lowered functions: a module to write to a file or to ask for its source."""
    return tvm.get_global_func(f"target.build.{_kind(target)}")(module, target)


def c_source(module: Any, functions: Sequence[RawFunction]) -> str:
    """The portable C of a "c" target's module, without TVM's headers."""
    source = str(module.inspect_source())
    kept = [line for line in source.splitlines() if not line.startswith(('#include "tvm/', "void* __tvm_ffi__library"))]
    text = _without_punning("\n".join(["#include <stdint.h>", "#define TVM_DLL", *kept, ""]))
    assert "TVM" not in text.replace("TVM_DLL", "").replace("TVM_EXPORTS", ""), "the runtime is needed after all"
    assert all(f" {function.name}(" in text for function in functions)
    return text


_PUNNED = re.compile(r"\*\((\w+) \*\)\(&\((?:\(\(int64_t\)(-?\d+)\)|(-?\w+))\)\)")
"""TVM's ``*(int32_t *)(&(v))``, which reads a float as an integer against C's aliasing rules, and GCC what it likes."""


def _without_punning(text: str) -> str:
    """The same by unions, which C lets be written as one type and read as another, and by numbers where v is one."""

    def replacement(found: re.Match[str]) -> str:
        wanted, name = found[1], found[2] or found[3]
        if name.lstrip("-").isdigit():
            number = np.int64(name).view(np.float64) if wanted == "double" else np.int32(name).view(np.float32)
            return f"{float(number).hex()}{'' if wanted == 'double' else 'f'}"
        declared = re.findall(rf"\b(\w+) {name} = ", text[: found.start()])
        return f"((union {{ {declared[-1]} a; {wanted} b; }}){{ .a = {name} }}).b"

    return _PUNNED.sub(replacement, text)


class _Bare:
    """One function with pointers for buffers and its large temporaries in the workspace."""

    def __init__(self, name: str, function: Any, alignment: int) -> None:
        self._used, self._alignment = 0, alignment
        # What is read past a temporary's end had better not be past the stack's.
        self._stack_limit = STACK_LIMIT if alignment == MIN_ALIGNMENT else 0
        self._workspace = _tirx.Var("workspace", _pointer("uint8"))
        pointers = [_tirx.Var(buffer.name, _pointer(str(buffer.dtype))) for buffer in function.params]
        views = [
            _tirx.DeclBuffer(buffer, data=pointer) for buffer, pointer in zip(function.params, pointers, strict=True)
        ]
        body = self._moved(function.body)
        if self._used and alignment > MIN_ALIGNMENT:
            self._used += alignment
        parameters = [*pointers, *([self._workspace] if self._used else [])]
        body = _tirx.SeqStmt([*views, body])
        if alignment > MIN_ALIGNMENT:
            # LLVM would load vectors it knows nothing of in two halves.
            for pointer in parameters:
                body = _tirx.AttrStmt(pointer, "storage_alignment", _tirx.IntImm("int32", alignment), body)
        self.function = _tirx.PrimFunc(parameters, body, attrs=function.attrs)
        arguments = tuple(
            Argument(f"{buffer.name}_{index}", str(buffer.dtype)) for index, buffer in enumerate(function.params)
        )
        self.signature = RawFunction(name, arguments, self._used)

    def _moved(self, statement: Any) -> Any:
        """The statement with large allocations replaced by places in the workspace."""
        if isinstance(statement, tirx.AllocBuffer):
            return self._place(statement)
        if isinstance(statement, tirx.SeqStmt):
            return _tirx.SeqStmt([self._moved(part) for part in statement.seq])
        if isinstance(statement, tirx.For):
            loop: Any = statement
            return _tirx.For(
                loop.loop_var,
                loop.min,
                loop.extent,
                loop.kind,
                self._moved(loop.body),
                loop.thread_binding,
                loop.annotations,
            )
        if isinstance(statement, tirx.IfThenElse):
            otherwise = None if statement.else_case is None else self._moved(statement.else_case)
            return _tirx.IfThenElse(statement.condition, self._moved(statement.then_case), otherwise)
        if isinstance(statement, tirx.AttrStmt):
            return _tirx.AttrStmt(statement.node, statement.attr_key, statement.value, self._moved(statement.body))
        return statement

    def _place(self, statement: Any) -> Any:
        buffer = statement.buffer
        size = int(np.prod([int(dim) for dim in buffer.shape])) * element_bytes(str(buffer.dtype))
        if size <= self._stack_limit or buffer.scope() == "local":
            return statement
        offset, self._used = self._used, self._used + aligned(size, self._alignment)
        data = _tirx.call_intrin(
            _pointer(str(buffer.dtype)), "tirx.handle_add_byte_offset", self._workspace, np.int32(offset)
        )
        return _tirx.DeclBuffer(buffer, data=data)


def _pointer(dtype: str) -> Any:
    return PointerType(PrimType(dtype), "global")


def element_bytes(dtype: str) -> int:
    """Of a scalar or of a vector such as int32x4."""
    scalar, _, lanes = dtype.partition("x")
    return np.dtype(scalar).itemsize * int(lanes or 1)
