"""Dot-product instructions: int32 lanes that each add four products of 8-bit numbers."""

# pyright: reportInvalidTypeForm=false
# TVMScript annotates buffers with calls.

from dataclasses import dataclass

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T  # noqa: N812 (TVMScript is read as text, by these names)

from qcompiler.backends.base import HostCode

QUAD = 4
"""Products one lane adds per instruction."""


@dataclass(frozen=True)
class DotProduct:
    """One instruction ``c[lane] += Σ_{i<4} a[i] * b[lane, i]``, a broadcast to all lanes."""

    name: str
    """Its TensorIntrin."""
    lanes: int
    unsigned: bool
    """a is uint8 (b is always int8): int8 activations must be shifted by 128."""


_INSTRUCTIONS: tuple[tuple[frozenset[str], int, str, str], ...] = (
    (frozenset({"avx512vnni"}), 16, "uint8", "llvm.x86.avx512.vpdpbusd.512"),
    (frozenset({"avxvnni"}), 8, "uint8", "llvm.x86.avx512.vpdpbusd.256"),
    (frozenset({"dotprod"}), 4, "int8", "llvm.aarch64.neon.sdot.v4i32.v16i8"),
)
"""CPU features, lanes, type of a, LLVM's name; the first whose features are there is used."""


def dot_product(host: HostCode) -> DotProduct | None:
    """The widest dot-product instruction of the CPU, or None if it has none."""
    for features, lanes, a_dtype, instruction in _INSTRUCTIONS:
        if features <= host.features:
            return _registered(lanes, a_dtype, instruction)
    return None


def _registered(lanes: int, a_dtype: str, instruction: str) -> DotProduct:
    name = f"qcompiler.{instruction}"
    # TVM keeps intrinsics in a table of its own; entering one twice is an error.
    if TensorIntrin.get(name, allow_missing=True) is None:
        TensorIntrin.register(name, *_intrinsic(lanes, a_dtype, instruction))
    return DotProduct(name, lanes, unsigned=a_dtype == "uint8")


def _intrinsic(lanes: int, a_dtype: str, instruction: str):
    """Description and implementation. LLVM 22 types vpdpbusd's operands as bytes; TVM's own intrinsic predates that."""
    byte_type, lane_type = f"int8x{lanes * QUAD}", f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((4,), a_dtype, offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes, 4), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, 4):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((4,), a_dtype, offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes, 4), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            word = T.reinterpret(A.vload([0], a_dtype + "x4"), dtype="int32")
            C[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(instruction),
                C.vload([0], dtype=lane_type),
                T.reinterpret(T.broadcast(word, lanes), dtype=byte_type),
                B.vload([0, 0], dtype=byte_type),
                dtype=lane_type,
            )

    return description, implementation
