"""From scheduled functions to source in the device's language, with the launch of each kernel.

TVM writes the OpenCL C or CUDA C++; what its language has no word for comes from the preludes here: `qdot4`, which adds
four products of bytes, in the form the device has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx as _tirx
from tvm.target import Target as TvmTarget
from tvm.tirx.build import codegen_build, split_host_device_mods

from qcompiler.backends import te
from qcompiler.c_code import stub
from qcompiler.target import Gpu

# TVM's annotations do not describe its expressions.
tirx: Any = _tirx
Api = Literal["opencl", "cuda"]

ASYNCHRONOUS = 80
"""The first architecture with asynchronous copies to shared memory."""

MAX_THREADS = 256
"""Work items of a group: what every OpenCL device of interest takes."""


@dataclass(frozen=True)
class Device:
    """What kernels may rely on."""

    api: Api
    architectures: tuple[str, ...]
    """CUDA: "sm_80"…, oldest first."""
    features: frozenset[str]
    """With CUDA "dp4a"; "mma" and "mma_s4", tensor cores for numbers of eight and four bits; "cp_async", copies to
    shared memory while threads compute; "dependent_launch", kernels that start before the one before them is done. With
    OpenCL "cl_khr_integer_dot_product"."""
    local_memory: int
    """Bytes shared by the work items of one group."""
    units: int = 32
    """Multiprocessors, which tiles are to fill."""

    @property
    def copies_ahead(self) -> bool:
        """Whether threads compute while copies to shared memory go on, on all architectures."""
        oldest = min((int(name.removeprefix("sm_")) for name in self.architectures), default=0)
        return "cp_async" in self.features and oldest >= ASYNCHRONOUS


def device_of(gpu: Gpu) -> Device:
    return Device(gpu.api, gpu.architectures, frozenset(gpu.features), gpu.local_memory, gpu.compute_units)


@dataclass(frozen=True)
class Launch:
    """How one kernel starts."""

    kernel: str
    grid: tuple[int, int, int]
    """Groups of work items along x, y, z."""
    block: tuple[int, int, int]
    """Work items of a group along x, y, z."""
    arguments: tuple[int, ...]
    """Which parameters of the function the kernel takes, in its order."""


@dataclass(frozen=True)
class Code:
    source: str
    launches: Mapping[str, Launch]
    """By function name."""


PRODUCT = "qgpu_product"
"""The function of products.cuh."""
DOT4 = "qdot4"
"""``qdot4(a, b, c)``: c + Σ_{i<4} a[i] * b[i], a and b words of four int8."""


def dot4(a: te.Expr, b: te.Expr, c: te.Expr) -> te.Expr:
    return te.call(DOT4, "int32", a, b, c)


_OPENCL_PLAIN = """
inline int qdot4(int a, int b, int c) {
    char4 x = as_char4(a), y = as_char4(b);
    return c + x.s0 * y.s0 + x.s1 * y.s1 + x.s2 * y.s2 + x.s3 * y.s3;
}
"""

_OPENCL_DOT = """
#pragma OPENCL EXTENSION cl_khr_integer_dot_product : enable
inline int qdot4(int a, int b, int c) { return c + dot_4x8packed_ss_int(as_uint(a), as_uint(b)); }
"""

# An OpenCL compiler may fuse a float multiply and add unless told not to, and then rounds otherwise.
_OPENCL_HEAD = "#pragma OPENCL FP_CONTRACT OFF\n"

_CUDA_HEAD = "#include <cuda.h>\n"

_CUDA_PLAIN = """
__device__ __forceinline__ int qdot4(int a, int b, int c) {
    for (int shift = 0; shift < 32; shift += 8) c += (signed char)(a >> shift) * (signed char)(b >> shift);
    return c;
}
"""

_CUDA_DP4A = """
__device__ __forceinline__ int qdot4(int a, int b, int c) { return __dp4a(a, b, c); }
"""


def prelude(device: Device) -> str:
    """What stands before TVM's code."""
    if device.api == "opencl":
        return _OPENCL_HEAD + (_OPENCL_DOT if "cl_khr_integer_dot_product" in device.features else _OPENCL_PLAIN)
    flags = {"QGPU_ASYNC": "cp_async", "QGPU_DEPENDENT": "dependent_launch"}
    defines = "".join(f"#define {name} {int(feature in device.features)}\n" for name, feature in flags.items())
    parts = [_CUDA_HEAD, defines, stub("gpu/instructions.cuh", "").text]
    parts.append(_CUDA_DP4A if "dp4a" in device.features else _CUDA_PLAIN)
    if "mma" in device.features:
        parts.append(stub("gpu/products.cuh", "").text)
    return "".join(parts)


def generate(functions: Mapping[str, _tirx.PrimFunc], device: Device) -> Code:
    """Source for scheduled functions, each of which is one kernel, by name."""
    target = _tvm_target(device)
    # What another kernel is still writing must not be read early: nothing is promised about aliases then.
    alone = "dependent_launch" not in device.features
    named = {
        name: function.with_attr("global_symbol", name).with_attr("tirx.noalias", alone)
        for name, function in functions.items()
    }
    module = tirx.transform.BindTarget(target)(tvm.IRModule(named))
    pipeline, _, finalize = tirx.get_default_tir_pipeline(target)
    with tvm.transform.PassContext(config=_PASS_CONFIG):
        _, by_target = split_host_device_mods(pipeline(module))
        (device_module,) = by_target.values()
        device_module = finalize()(device_module)
    kernels = {str(variable.name_hint): function for variable, function in device_module.functions.items()}
    launches = {name: _launch(kernels[f"{name}_kernel"], function) for name, function in named.items()}
    assert len(kernels) == len(launches), "a function became several kernels"
    exact = {
        variable: _ordered(_bits(_chain_dots(function), device), device)
        for variable, function in device_module.functions.items()
    }
    code = codegen_build(tvm.IRModule(exact, attrs=device_module.attrs), target)
    return Code(prelude(device) + str(code.inspect_source()), launches)


_PASS_CONFIG = {"tirx.UnrollLoop": {"explicit_unroll": False}, "tirx.disable_cse_tir": True}
"""Loops that are to be unrolled stay loops, for the device's compiler to unroll: on a CPU, PoCL would take ten times as
long to compile what is unrolled already. In CUDA they have the pragma. What is common to expressions is left to that
compiler too."""


def _tvm_target(device: Device) -> TvmTarget:
    # A warp of one: sums across threads go through shared memory, with barriers, on every device alike.
    common = {"max_threads_per_block": MAX_THREADS, "thread_warp_size": 1}
    shared = {"max_shared_memory_per_block": device.local_memory}
    if device.api == "opencl":
        return TvmTarget({"kind": "opencl", "max_num_threads": MAX_THREADS, **common, **shared}, host="llvm")
    return TvmTarget({"kind": "cuda", "arch": device.architectures[0], **common, **shared}, host="llvm")


def _launch(kernel: Any, function: Any) -> Launch:
    extents: dict[str, int] = {}

    def note(statement: Any) -> None:
        if statement.attr_key == "thread_extent":
            extents[str(statement.node.thread_tag)] = int(statement.value)

    tvm_ffi.structural_walk(kernel.body, (tirx.AttrStmt, note), order="post")
    names = [f"{buffer.name}_ptr" for buffer in function.params]
    assert len(set(names)) == len(names), f"parameters of one name: {names}"

    def sizes(kind: str) -> tuple[int, int, int]:
        x, y, z = (extents.get(f"{kind}.{axis}", 1) for axis in "xyz")
        return x, y, z

    arguments = tuple(names.index(str(parameter.name)) for parameter in kernel.params)
    return Launch(str(kernel.attrs["global_symbol"]), sizes("blockIdx"), sizes("threadIdx"), arguments)


def _chain_dots(kernel: Any) -> Any:
    """``sum = sum + qdot4(a, b, 0)`` becomes ``sum = qdot4(a, b, sum)``: one instruction."""

    def rewrite(store: Any) -> Any:
        value = store.value
        if isinstance(value, tirx.Add) and _is_dot(value.b):
            before = tirx.BufferLoad(store.buffer, store.indices)
            name, a, b, start = value.b.args
            if tvm_ffi.structural_equal(value.a, before) and isinstance(start, tirx.IntImm) and int(start) == 0:
                chained = tirx.call_pure_extern("int32", name.value, a, b, before)
                return tirx.BufferStore(store.buffer, chained, store.indices)
        return store

    body = tvm_ffi.structural_map(kernel.body, (tirx.BufferStore, rewrite), order="post")
    return kernel.with_body(body)


def _bits(kernel: Any, device: Device) -> Any:
    """Reinterpreted bits through the language's own functions, and floats that seven digits do not print as theirs."""
    to_float, to_int = ("as_float", "as_int") if device.api == "opencl" else ("__int_as_float", "__float_as_int")

    def constant(number: Any) -> Any:
        value = np.float32(number.value)
        if np.float32(f"{value:.6e}") == value:
            return number
        return tirx.call_pure_extern("float32", to_float, tirx.const(int(value.view(np.int32)), "int32"))

    def call(expression: Any) -> Any:
        if str(expression.op.name) != "tirx.reinterpret":
            return expression
        name = to_int if str(expression.ty.dtype) == "int32" else to_float
        return tirx.call_pure_extern(str(expression.ty.dtype), name, *expression.args)

    body = tvm_ffi.structural_map(kernel.body, [(tirx.FloatImm, constant), (tvm.ir.Call, call)], order="post")
    return kernel.with_body(body)


def _ordered(kernel: Any, device: Device) -> Any:
    """Kernels that may start early wait for the one before; products do so by themselves, after loading weights."""
    if "dependent_launch" not in device.features or _calls(kernel, PRODUCT):
        return kernel
    calls = [tirx.Evaluate(tirx.call_extern("int32", name)) for name in ("qgpu_next", "qgpu_wait")]
    return kernel.with_body(tirx.SeqStmt([*calls, kernel.body]))


def _calls(kernel: Any, name: str) -> bool:
    found: list[bool] = []

    def note(expression: Any) -> None:
        called = getattr(expression.args[0], "value", "") if len(expression.args) else ""
        found.append(isinstance(called, str) and called.startswith(name))

    tvm_ffi.structural_walk(kernel.body, (tvm.ir.Call, note), order="post")
    return any(found)


def _is_dot(expression: Any) -> bool:
    return isinstance(expression, tvm.ir.Call) and getattr(expression.args[0], "value", None) == DOT4
