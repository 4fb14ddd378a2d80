"""Matrix multiply instructions: int32 tiles of 2x2 that each add eight products of 8-bit numbers.

Source: Arm, "Arm Architecture Reference Manual for A-profile", FEAT_I8MM (SMMLA, USMMLA): with 16-byte registers read
as 2x8 matrices A and B, C += A Bᵀ.
"""

# pyright: reportInvalidTypeForm=false
# TVMScript annotates buffers with calls, and makes a buffer, in a workspace asked of the runtime, of every assignment.

from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T  # noqa: N812 (TVMScript is read as text, by these names)

from qcompiler.backends.base import HostCode
from qcompiler.backends.schedules.loops import open_schedule
from qcompiler.backends.tiles import ConvTile

LANES = 4
"""Output channels to a block: two tiles."""
DEPTH = 8
"""Products an instruction adds to each sum."""

_INSTRUCTIONS = {"int8": "llvm.aarch64.neon.smmla.v4i32.v16i8", "uint8": "llvm.aarch64.neon.usmmla.v4i32.v16i8"}
"""By the activations' type; weights are int8."""


def matrix_multiply(host: HostCode, x_dtype: str) -> str | None:
    """The TensorIntrin of the CPU's instruction for activations of a type, or None if it has none."""
    if "i8mm" not in host.features or x_dtype not in _INSTRUCTIONS:
        return None
    instruction = _INSTRUCTIONS[x_dtype]
    name = f"qcompiler.{instruction}"
    # TVM keeps intrinsics in a table of its own; entering one twice is an error.
    if TensorIntrin.get(name, allow_missing=True) is None:
        TensorIntrin.register(name, _description(x_dtype), _implementation(x_dtype, instruction))
    return name


def _description(x_dtype: str) -> Any:
    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (2, 8), x_dtype, offset_factor=1)  # noqa: N806
        B = T.match_buffer(b, (2, 8), "int8", offset_factor=1)  # noqa: N806
        C = T.match_buffer(c, (2, 2), "int32", offset_factor=1)  # noqa: N806
        with T.sblock("root"):
            T.reads(C[0:2, 0:2], A[0:2, 0:8], B[0:2, 0:8])
            T.writes(C[0:2, 0:2])
            for i, j, k in T.grid(2, 2, 8):
                with T.sblock("update"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    C[vi, vj] = C[vi, vj] + T.cast(A[vi, vk], "int32") * T.cast(B[vj, vk], "int32")

    return description


def _implementation(x_dtype: str, instruction: str) -> Any:
    """The rows of A, two pixels, lie apart."""

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (2, 8), x_dtype, offset_factor=1, strides=[T.int32(), 1])  # noqa: N806
        B = T.match_buffer(b, (2, 8), "int8", offset_factor=1)  # noqa: N806
        C = T.match_buffer(c, (2, 2), "int32", offset_factor=1)  # noqa: N806
        with T.sblock("root"):
            T.reads(C[0:2, 0:2], A[0:2, 0:8], B[0:2, 0:8])
            T.writes(C[0:2, 0:2])
            C[0, T.ramp(T.int32(0), 1, 4)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(instruction),
                C.vload([0, 0], dtype="int32x4"),
                T.Shuffle([A.vload([0, 0], x_dtype + "x8"), A.vload([1, 0], x_dtype + "x8")], list(range(16))),
                B.vload([0, 0], dtype="int8x16"),
                dtype="int32x4",
            )

    return implementation


def matrix_tiles(width: int, blocks: int, *, registers: int) -> tuple[ConvTile, ...]:
    """Every tile of pairs of pixels whose accumulators the registers hold beside eight operands.

    First come those that load least per multiply, pixels past the end of a row of `width` counted.
    """

    def cost(tile: ConvTile) -> float:
        covered = -(-width // tile.pixels) * tile.pixels
        # A pair of pixels takes two loads, a block of weights two. What was computed past the end is cut off by a copy.
        return covered * (1 + 2 / tile.pixels + 1 / tile.blocks) * (1.05 if covered > width else 1)

    fitting = (
        ConvTile(pixels, count)
        for count in (1, 2, 3, 4)
        if blocks % count == 0
        for pixels in range(2, 17, 2)
        if pixels * count <= registers - 8
    )
    return tuple(sorted(fitting, key=cost))


def schedule_matrix_convolution(function: tirx.PrimFunc, name: str, tile: ConvTile, *, threads: int) -> tirx.PrimFunc:
    """Rows outermost, then strips of pixels and channel blocks; accumulators stay in registers over the reduction."""
    s = open_schedule(function)
    accumulator, output = s.get_sblock("accumulator"), s.get_sblock("output")
    n, y, x, o, v = s.get_loops(output)
    rows = s.fuse(n, y)
    strip, pixel = s.split(x, [None, tile.pixels])
    outer, inner = s.split(o, [None, tile.blocks])
    s.reorder(strip, outer, pixel, inner, v)
    if threads > 1:
        outer = s.fuse(rows, strip, outer)
    s.compute_at(accumulator, outer, preserve_unit_loops=True)
    pair, block, half, row, column, ky, kx, q, r = s.get_loops(accumulator)[-9:]
    s.reorder(ky, kx, q, pair, block, half, row, column, r)
    if threads > 1:
        # Before decompose_reduction, after which the accumulator is no complete block and `parallel` refuses it.
        s.parallel(outer)
    init = s.decompose_reduction(accumulator, ky)
    s.tensorize(row, name)
    # Sums that are elements of registers, not of memory, need constant places: nothing of a tile stays a loop.
    for loop in (pair, block, half, *s.get_loops(init)[-5:-2], pixel, inner):
        s.unroll(loop)
    s.vectorize(s.fuse(*s.get_loops(init)[-2:]))
    s.vectorize(v)
    return s.mod["main"]
