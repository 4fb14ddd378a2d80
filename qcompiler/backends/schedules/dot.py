"""Dot-product instructions: int32 lanes that each add a few products of 8- or 16-bit numbers.

Sources: Intel, "Intrinsics Guide" (VPDPBUSD, VPMADDWD); Arm, "Arm Architecture Reference Manual for A-profile" (SDOT,
USDOT, SMULL, SADALP). None saturates: VPMADDUBSW, which does, is not used.
"""

# pyright: reportInvalidTypeForm=false
# TVMScript annotates buffers with calls, and makes a buffer, in a workspace asked of the runtime, of every assignment.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T  # noqa: N812 (TVMScript is read as text, by these names)

from qcompiler.backends.base import HostCode


@dataclass(frozen=True)
class DotProduct:
    """One instruction, or two, for ``c[lane] += Σ_{i<length} a[i] * b[lane, i]``, a broadcast to all lanes."""

    name: str
    """Its TensorIntrin."""
    lanes: int
    length: int
    a_dtype: str
    """What activations are made into first, where they are something else; b is always int8."""


@dataclass(frozen=True)
class _Choice:
    feature: str
    """LLVM's name of what the CPU must have."""
    lanes: int
    length: int
    takes: tuple[str, ...]
    """Activations it suits."""
    a_dtype: str
    instruction: str
    """LLVM's name."""
    implementation: Callable[[int, str, str], Any]


def _choices() -> tuple[_Choice, ...]:
    """Best first. Unsigned activations come to sdot, and signed ones to vpdpbusd, shifted by 128."""
    eight, sixteen = ("int8", "uint8"), ("int8", "uint8", "int16")
    return (
        _Choice("avx512vnni", 16, 4, eight, "uint8", "llvm.x86.avx512.vpdpbusd.512", _quads),
        _Choice("avxvnni", 8, 4, eight, "uint8", "llvm.x86.avx512.vpdpbusd.256", _quads),
        _Choice("i8mm", 4, 4, ("uint8",), "uint8", "llvm.aarch64.neon.usdot.v4i32.v16i8", _quads),
        _Choice("dotprod", 4, 4, eight, "int8", "llvm.aarch64.neon.sdot.v4i32.v16i8", _quads),
        _Choice("neon", 4, 2, eight, "int8", "llvm.aarch64.neon.smull.v8i16", _neon_pairs),
        # Products of 16 bits: the sums of two fit in 32 as one factor has 8.
        _Choice("avx512bw", 16, 2, sixteen, "int16", "llvm.x86.avx512.pmaddw.d.512", _pairs),
        _Choice("avx2", 8, 2, sixteen, "int16", "llvm.x86.avx2.pmadd.wd", _pairs),
        _Choice("sse2", 4, 2, sixteen, "int16", "llvm.x86.sse2.pmadd.wd", _pairs),
    )


def dot_product(host: HostCode, x_dtype: str) -> DotProduct | None:
    """The best instruction the CPU has for activations of a type, or None if it has none."""
    for choice in _choices():
        if choice.feature in host.features and x_dtype in choice.takes:
            return _registered(choice)
    return None


def _registered(choice: _Choice) -> DotProduct:
    name = f"qcompiler.{choice.instruction}"
    # TVM keeps intrinsics in a table of its own; entering one twice is an error.
    if TensorIntrin.get(name, allow_missing=True) is None:
        description = _description(choice.lanes, choice.length, choice.a_dtype)
        TensorIntrin.register(
            name, description, choice.implementation(choice.lanes, choice.a_dtype, choice.instruction)
        )
    return DotProduct(name, choice.lanes, choice.length, choice.a_dtype)


def _description(lanes: int, length: int, a_dtype: str) -> Any:
    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((length,), a_dtype, offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes, length), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:length], B[0:lanes, 0:length])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, length):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    return description


def _quads(lanes: int, a_dtype: str, instruction: str) -> Any:
    """LLVM 22 types vpdpbusd's operands as bytes; TVM's own intrinsic predates that."""
    byte_type, lane_type = f"int8x{lanes * 4}", f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((4,), a_dtype, offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes, 4), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(instruction),
                C.vload([0], dtype=lane_type),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], a_dtype + "x4"), dtype="int32"), lanes), dtype=byte_type
                ),
                B.vload([0, 0], dtype=byte_type),
                dtype=lane_type,
            )

    return implementation


def _pairs(lanes: int, a_dtype: str, instruction: str) -> Any:
    """pmaddwd: 16-bit activations, weights widened as they are loaded."""
    pair_type, lane_type = f"int16x{lanes * 2}", f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((2,), a_dtype, offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes, 2), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = C.vload([0], dtype=lane_type) + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(instruction),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], "int16x2"), dtype="int32"), lanes), dtype=pair_type
                ),
                T.cast(B.vload([0, 0], dtype=f"int8x{lanes * 2}"), pair_type),
                dtype=lane_type,
            )

    return implementation


def _neon_pairs(lanes: int, a_dtype: str, instruction: str) -> Any:
    """smull to 16 bits, which hold any product of two int8, and sadalp, which adds neighbours to 32 bits."""

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((2,), a_dtype, offset_factor=1),  # noqa: N803
        B: T.Buffer((4, 2), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((4,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:4], A[0:2], B[0:4, 0:2])
            T.writes(C[0:4])
            C[T.ramp(T.int32(0), 1, 4)] = C.vload([0], dtype="int32x4") + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.saddlp.v4i32.v8i16"),
                T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id(instruction),
                    T.reinterpret(T.broadcast(T.reinterpret(A.vload([0], "int8x2"), dtype="int16"), 4), dtype="int8x8"),
                    B.vload([0, 0], dtype="int8x8"),
                    dtype="int16x8",
                ),
                dtype="int32x4",
            )

    return implementation
