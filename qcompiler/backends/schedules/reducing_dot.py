"""Instructions of microcontrollers that add products of 8-bit numbers into one 32-bit register.

Arm, "Armv8.1-M Architecture Reference Manual": VMLADAVA.S8 adds sixteen products of two vector registers to a core
register. "Armv7-M Architecture Reference Manual", DSP extension: SXTB16 widens bytes 0 and 2 of a word (1 and 3 after a
rotation), SMLAD adds two 16-bit products.
"""

# pyright: reportInvalidTypeForm=false
# TVMScript annotates buffers with calls.

from dataclasses import dataclass

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T  # noqa: N812 (TVMScript is read as text, by these names)

from qcompiler.backends.base import HostCode


@dataclass(frozen=True)
class ReducingDot:
    """``c += Σ_{i<length} a[i] * b[i]``, all int8, c int32."""

    name: str | None
    """Its TensorIntrin; None for a plain multiplication and addition."""
    length: int
    tiles: tuple[tuple[int, int], ...]
    """Pixels and channels whose accumulators and operands the registers hold, best first."""


def reducing_dot(host: HostCode) -> ReducingDot:
    """The longest such instruction of the CPU."""
    if "mve" in host.features:
        # VMLADAVA accumulates in even core registers only. Measured: four pixels to a vector of weights do best.
        tiles = ((4, 1), (3, 2), (2, 2), (1, 4), (1, 3), (1, 2), (2, 1), (1, 1))
        return _registered("qcompiler_vmladava_s8", 16, tiles)
    tiles = ((2, 2), (1, 4), (1, 3), (1, 2), (2, 1), (1, 1))
    if "dsp" in host.features:
        return _registered("qcompiler_smlad_s8", 4, tiles)
    return ReducingDot(None, 1, tiles)


def _registered(name: str, length: int, tiles: tuple[tuple[int, int], ...]) -> ReducingDot:
    # TVM keeps intrinsics in a table of its own; entering one twice is an error.
    if TensorIntrin.get(name, allow_missing=True) is None:
        TensorIntrin.register(name, _description(length), _vmladava() if length == 16 else _smlad())
    return ReducingDot(name, length, tiles)


def _description(length: int):
    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((length,), "int8", offset_factor=1),  # noqa: N803
        B: T.Buffer((length,), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((1,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:1], A[0:length], B[0:length])
            T.writes(C[0:1])
            for k in T.serial(0, length):
                with T.sblock("update"):
                    vk = T.axis.remap("R", [k])
                    C[0] = C[0] + T.cast(A[vk], "int32") * T.cast(B[vk], "int32")

    return description


def _vmladava():
    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((16,), "int8", offset_factor=1),  # noqa: N803
        B: T.Buffer((16,), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((1,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:1], A[0:16], B[0:16])
            T.writes(C[0:1])
            # Operands: unsigned, subtract, exchange, the accumulator, the vectors.
            C[0] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.arm.mve.vmldava.v16i8"),
                T.int32(0),
                T.int32(0),
                T.int32(0),
                C[0],
                A.vload([0], dtype="int8x16"),
                B.vload([0], dtype="int8x16"),
                dtype="int32",
            )

    return implementation


def _smlad():
    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((4,), "int8", offset_factor=1),  # noqa: N803
        B: T.Buffer((4,), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((1,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:1], A[0:4], B[0:4])
            T.writes(C[0:1])
            C[0] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.arm.smlad"),
                T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id("llvm.arm.sxtb16"),
                    T.reinterpret(A.vload([0], "int8x4"), dtype="int32"),
                    dtype="int32",
                ),
                T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id("llvm.arm.sxtb16"),
                    T.reinterpret(B.vload([0], "int8x4"), dtype="int32"),
                    dtype="int32",
                ),
                T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id("llvm.arm.smlad"),
                    T.call_llvm_pure_intrin(
                        T.llvm_lookup_intrinsic_id("llvm.arm.sxtb16"),
                        T.call_llvm_pure_intrin(
                            T.llvm_lookup_intrinsic_id("llvm.fshr.i32"),
                            T.reinterpret(A.vload([0], "int8x4"), dtype="int32"),
                            T.reinterpret(A.vload([0], "int8x4"), dtype="int32"),
                            T.int32(8),
                            dtype="int32",
                        ),
                        dtype="int32",
                    ),
                    T.call_llvm_pure_intrin(
                        T.llvm_lookup_intrinsic_id("llvm.arm.sxtb16"),
                        T.call_llvm_pure_intrin(
                            T.llvm_lookup_intrinsic_id("llvm.fshr.i32"),
                            T.reinterpret(B.vload([0], "int8x4"), dtype="int32"),
                            T.reinterpret(B.vload([0], "int8x4"), dtype="int32"),
                            T.int32(8),
                            dtype="int32",
                        ),
                        dtype="int32",
                    ),
                    C[0],
                    dtype="int32",
                ),
                dtype="int32",
            )

    return implementation
