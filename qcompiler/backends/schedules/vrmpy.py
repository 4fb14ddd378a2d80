"""Instructions of Hexagon's vector unit (HVX) as TensorIntrins.

Qualcomm, "Hexagon V66 HVX Programmer's Reference Manual": vrmpy multiplies 128 bytes by 128 bytes and adds four
neighbouring products to each of 32 words; vdelta permutes the bytes of a vector by the rules of a butterfly network;
vshuff exchanges blocks of two vectors.
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


def broadcasting_dot(x_dtype: str, words: bool) -> str:
    """``c[lane] += Σ_{r<4} a[r] * b[lane, r]``, 32 lanes. The intrinsic's name.

    If `words`, a starts at a multiple of four bytes; otherwise anywhere, and 128 bytes from there on are read.
    """
    name = f"qcompiler.hvx.vrmpy.{x_dtype}.{'word' if words else 'quad'}"
    # TVM keeps intrinsics in a table of its own; entering one twice is an error.
    if TensorIntrin.get(name, allow_missing=True) is None:
        implementation = _broadcasting_dot if words else _unaligned_dot
        TensorIntrin.register(name, _dot_description(x_dtype), implementation(x_dtype))
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


def _dot_description(x_dtype: str):
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

    return description


def _broadcasting_dot(x_dtype: str):
    instruction = _VRMPY[x_dtype]

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

    return implementation


def _unaligned_dot(x_dtype: str):
    """vdelta with the lane's number for control repeats a vector's first word: see `_spreading_dot`."""
    instruction = _VRMPY[x_dtype]

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
                T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.vdelta.128B"),
                    T.reinterpret(A.vload([0], dtype=x_dtype + "x128"), dtype="int32x32"),
                    T.ramp(T.int32(0), 1, 32) * T.broadcast(T.int32(0x04040404), 32),
                    dtype="int32x32",
                ),
                T.reinterpret(B.vload([0, 0], dtype="int8x128"), dtype="int32x32"),
                dtype="int32x32",
            )

    return implementation


def _fold_halves():
    """vshuff by 64 bytes exchanges the upper half of one vector with the lower half of the other."""

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((2, 2, 16), "int32", offset_factor=1),  # noqa: N803
        C: T.Buffer((2, 16), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(A[0:2, 0:2, 0:16])
            T.writes(C[0:2, 0:16])
            for p in T.serial(0, 2):
                for o in T.serial(0, 16):
                    with T.sblock("folded"):
                        vp, vo = T.axis.remap("SS", [p, o])
                        C[vp, vo] = A[vp, 0, vo] + A[vp, 1, vo]

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((2, 2, 16), "int32", offset_factor=1),  # noqa: N803
        C: T.Buffer((2, 16), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(A[0:2, 0:2, 0:16])
            T.writes(C[0:2, 0:16])
            shuffled: T.let[T.int32x64] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.vshuffvdd.128B"),
                A.vload([1, 0, 0], dtype="int32x32"),
                A.vload([0, 0, 0], dtype="int32x32"),
                T.int32(64),
                dtype="int32x64",
            )
            C[0, T.ramp(T.int32(0), 1, 32)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.lo.128B"), shuffled, dtype="int32x32"
            ) + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.hi.128B"), shuffled, dtype="int32x32"
            )

    return description, implementation


def _fold_quarters():
    """As `_fold_halves` twice: pixels 0 and 2, 1 and 3 by 64 bytes; then those two sums by 32."""

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((4, 4, 8), "int32", offset_factor=1),  # noqa: N803
        C: T.Buffer((4, 8), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(A[0:4, 0:4, 0:8])
            T.writes(C[0:4, 0:8])
            for p in T.serial(0, 4):
                for o in T.serial(0, 8):
                    with T.sblock("folded"):
                        vp, vo = T.axis.remap("SS", [p, o])
                        C[vp, vo] = A[vp, 0, vo] + A[vp, 1, vo] + A[vp, 2, vo] + A[vp, 3, vo]

    @T.prim_func(s_tir=True)
    def implementation(
        A: T.Buffer((4, 4, 8), "int32", offset_factor=1),  # noqa: N803
        C: T.Buffer((4, 8), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(A[0:4, 0:4, 0:8])
            T.writes(C[0:4, 0:8])
            even: T.let[T.int32x64] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.vshuffvdd.128B"),
                A.vload([2, 0, 0], dtype="int32x32"),
                A.vload([0, 0, 0], dtype="int32x32"),
                T.int32(64),
                dtype="int32x64",
            )
            odd: T.let[T.int32x64] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.vshuffvdd.128B"),
                A.vload([3, 0, 0], dtype="int32x32"),
                A.vload([1, 0, 0], dtype="int32x32"),
                T.int32(64),
                dtype="int32x64",
            )
            quarters: T.let[T.int32x64] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.vshuffvdd.128B"),
                T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.lo.128B"), odd, dtype="int32x32")
                + T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.hi.128B"), odd, dtype="int32x32"),
                T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.lo.128B"), even, dtype="int32x32")
                + T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.hi.128B"), even, dtype="int32x32"
                ),
                T.int32(32),
                dtype="int32x64",
            )
            C[0, T.ramp(T.int32(0), 1, 32)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.lo.128B"), quarters, dtype="int32x32"
            ) + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.hexagon.V6.hi.128B"), quarters, dtype="int32x32"
            )

    return description, implementation


def _spreading_dot(x_dtype: str, groups: int):
    """vdelta spreads the quads: group g of the lanes gets quad g.

    Its stages exchange bytes 64, 32, … 1 apart; at each, byte k becomes byte k xor offset if that bit of control[k] is
    set. The upper stages repeat the first `groups` quads all over the vector. The others exchange bit b of a quad's
    number where that is not bit b of its group's, which is bit 5 - bits + b of the lane.
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
