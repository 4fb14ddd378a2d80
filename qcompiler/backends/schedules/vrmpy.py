"""Instructions of Hexagon's vector unit (HVX) as TensorIntrins.

Qualcomm, "Hexagon V66 HVX Programmer's Reference Manual": vrmpy multiplies 128 bytes by 128 bytes and adds four neighbouring
products to each of 32 words; vdelta permutes the bytes of a vector by the rules of a butterfly network; vshuff exchanges
blocks of two vectors.
"""

# pyright: reportInvalidTypeForm=false
# TVMScript annotates buffers with calls.

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T  # noqa: N812 (TVMScript is read as text, by these names)

LANES = 32
"""Words of a vector."""
QUAD = 4
"""Products that vrmpy adds to a word."""
VECTOR_BYTES = LANES * QUAD

_VRMPY = {"int8": "llvm.hexagon.V6.vrmpybv.acc.128B", "uint8": "llvm.hexagon.V6.vrmpybusv.acc.128B"}
"""By the type of the activations; weights are int8."""


def broadcasting_dot(x_dtype: str) -> str:
    """``c[lane] += Σ_{r<4} a[r] * b[lane, r]``, 32 lanes; a starts at a multiple of four bytes. The intrinsic's name."""
    name = f"qcompiler.hvx.vrmpy.{x_dtype}"
    if TensorIntrin.get(name, allow_missing=True) is None:
        TensorIntrin.register(name, *_broadcasting_dot(x_dtype))
    return name


def spreading_dot(x_dtype: str, groups: int) -> str:
    """``c[g, o] += Σ_{r<4} a[4 g + r] * b[g, o, r]``, `groups` times o being 32. The intrinsic's name.

    Reads 128 bytes from a's first, wherever that is.
    """
    name = f"qcompiler.hvx.vrmpy.{x_dtype}.{groups}"
    if TensorIntrin.get(name, allow_missing=True) is None:
        TensorIntrin.register(name, *_spreading_dot(x_dtype, groups))
    return name


def fold(groups: int) -> str:
    """``c[p, o] = Σ_{g<groups} a[p, g, o]`` for `groups` pixels p, `groups` times o being 32. The intrinsic's name."""
    name = f"qcompiler.hvx.fold.{groups}"
    if TensorIntrin.get(name, allow_missing=True) is None:
        TensorIntrin.register(name, *(_fold_halves() if groups == 2 else _fold_quarters()))
    return name


def _broadcasting_dot(x_dtype: str):
    instruction = _VRMPY[x_dtype]

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((4,), x_dtype, offset_factor=1),  # noqa: N803
        B: T.Buffer((32, 4), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((32,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:32], A[0:4], B[0:32, 0:4])
            T.writes(C[0:32])
            for i in T.serial(0, 32):
                for k in T.serial(0, 4):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((4,), x_dtype, offset_factor=1),  # noqa: N803
        B: T.Buffer((32, 4), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((32,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:32], A[0:4], B[0:32, 0:4])
            T.writes(C[0:32])
            C[T.ramp(T.int32(0), 1, 32)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(instruction),
                C.vload([0], dtype="int32x32"),
                T.broadcast(T.reinterpret(A.vload([0], x_dtype + "x4"), dtype="int32"), 32),
                T.reinterpret(B.vload([0, 0], dtype="int8x128"), dtype="int32x32"),
                dtype="int32x32",
            )

    return description, implementation


def _spreading_dot(x_dtype: str, groups: int):
    """vdelta spreads the quads: group g of the lanes gets quad g.

    Its stages exchange bytes 64, 32, … 1 apart; at each, byte k becomes byte k xor offset if that bit of control[k] is set.
    The upper stages repeat the first `groups` quads all over the vector. The others exchange bit b of a quad's number where
    that is not bit b of its group's, which is bit 5 - bits + b of the lane.
    """
    instruction, lanes, wide = _VRMPY[x_dtype], LANES // groups, LANES - groups
    shift = 5 - (groups.bit_length() - 1)

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((groups * 4,), x_dtype, offset_factor=1),  # noqa: N803
        B: T.Buffer((groups, lanes, 4), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((groups, lanes), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:groups, 0:lanes], A[0 : groups * 4], B[0:groups, 0:lanes, 0:4])
            T.writes(C[0:groups, 0:lanes])
            for g in T.serial(0, groups):
                for i in T.serial(0, lanes):
                    for k in T.serial(0, 4):
                        with T.sblock("update"):
                            vg, vi, vk = T.axis.remap("SSR", [g, i, k])
                            C[vg, vi] = C[vg, vi] + T.cast(A[vg * 4 + vk], "int32") * T.cast(B[vg, vi, vk], "int32")

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((groups * 4,), x_dtype, offset_factor=1),  # noqa: N803
        B: T.Buffer((groups, lanes, 4), "int8", offset_factor=1),  # noqa: N803
        C: T.Buffer((groups, lanes), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:groups, 0:lanes], A[0 : groups * 4], B[0:groups, 0:lanes, 0:4])
            T.writes(C[0:groups, 0:lanes])
            C[0, T.ramp(T.int32(0), 1, 32)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(instruction),
                C.vload([0, 0], dtype="int32x32"),
                T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.vdelta.128B"),
                    T.reinterpret(A.vload([0], dtype=x_dtype + "x128"), dtype="int32x32"),
                    T.bitwise_or(
                        T.bitwise_and(T.ramp(T.int32(0), 1, 32), T.broadcast(T.int32(wide), 32)),
                        T.bitwise_and(
                            T.bitwise_xor(
                                T.ramp(T.int32(0), 1, 32),
                                T.shift_right(T.ramp(T.int32(0), 1, 32), T.broadcast(T.int32(shift), 32)),
                            ),
                            T.broadcast(T.int32(groups - 1), 32),
                        ),
                    )
                    * T.broadcast(T.int32(0x04040404), 32),
                    dtype="int32x32",
                ),
                T.reinterpret(B.vload([0, 0, 0], dtype="int8x128"), dtype="int32x32"),
                dtype="int32x32",
            )

    return description, implementation
