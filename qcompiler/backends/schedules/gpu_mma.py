"""Products on CUDA's tensor cores: fragments of 16x16 through `nvcuda::wmma`, a few of them to a warp.

TVM sees ordinary loops over words and int32 sums; `PRELUDE` holds what replaces them. A warp's sums are declared as a
local array of the whole tile, of which every thread uses eight numbers for each fragment.
"""

# pyright: reportInvalidTypeForm=false
# TVMScript annotates buffers with calls.

from dataclasses import dataclass

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T  # noqa: N812 (TVMScript is read as text, by these names)

from qcompiler.backends.schedules.gpu import Filled
from qcompiler.backends.schedules.loops import open_schedule

WARP = 32
FRAGMENT = 16
"""Rows, columns and bytes of the reduction that one instruction multiplies."""
STEP_WORDS = FRAGMENT // 4

PRELUDE = """
#include <mma.h>

// Sums of ROWS x COLUMNS fragments, `pitch` apart in an array of the tile; each thread has its first eight numbers.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void qmma_fill(int *sums, int pitch) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j)
#pragma unroll
            for (int e = 0; e < 8; ++e) sums[i * 16 * pitch + j * 16 + e] = 0;
}

// sums += left [16 ROWS, 16 bytes] * right [16 COLUMNS, 16 bytes], transposed.
template <int ROWS, int COLUMNS>
__device__ __forceinline__ void qmma(int *sums, int pitch, const int *left, const int *right) {
    using namespace nvcuda;
    wmma::fragment<wmma::matrix_a, 16, 16, 16, signed char, wmma::row_major> a[ROWS];
    wmma::fragment<wmma::matrix_b, 16, 16, 16, signed char, wmma::col_major> b[COLUMNS];
#pragma unroll
    for (int i = 0; i < ROWS; ++i) wmma::load_matrix_sync(a[i], (const signed char *)(left + i * 64), 16);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) wmma::load_matrix_sync(b[j], (const signed char *)(right + j * 64), 16);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            wmma::fragment<wmma::accumulator, 16, 16, 16, int> c;
            int *own = sums + i * 16 * pitch + j * 16;
#pragma unroll
            for (int e = 0; e < 8; ++e) c.x[e] = own[e];
            wmma::mma_sync(c, a[i], b[j], c);
#pragma unroll
            for (int e = 0; e < 8; ++e) own[e] = c.x[e];
        }
}

template <int ROWS, int COLUMNS>
__device__ __forceinline__ void qmma_store(int *shared, int shared_pitch, const int *sums, int pitch) {
    using namespace nvcuda;
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            wmma::fragment<wmma::accumulator, 16, 16, 16, int> c;
#pragma unroll
            for (int e = 0; e < 8; ++e) c.x[e] = sums[i * 16 * pitch + j * 16 + e];
            wmma::store_matrix_sync(shared + i * 16 * shared_pitch + j * 16, c, shared_pitch, wmma::mem_row_major);
        }
}
"""


@dataclass(frozen=True)
class MmaTile:
    """What one group computes, and each of its warps."""

    m: int
    n: int
    k: int
    """Words of the reduction staged at a time, a multiple of four."""
    warp_m: int
    warp_n: int

    @property
    def warps(self) -> int:
        return (self.m // self.warp_m) * (self.n // self.warp_n)

    @property
    def shared_bytes(self) -> int:
        return 4 * (self.k * (self.m + self.n) + self.m * self.n)

    def filled(self, m: int, n: int, k: int) -> Filled:
        return Filled(*(-(-size // tile) * tile for size, tile in ((m, self.m), (n, self.n), (k, self.k))))


_TILES: tuple[MmaTile, ...] = (
    MmaTile(128, 64, 16, 32, 32),
    MmaTile(64, 128, 16, 32, 32),
    MmaTile(64, 64, 16, 32, 32),
    MmaTile(128, 32, 16, 32, 32),
    MmaTile(64, 32, 16, 32, 16),
    MmaTile(32, 64, 16, 16, 32),
    MmaTile(32, 32, 16, 16, 16),
    MmaTile(64, 16, 16, 16, 16),
    MmaTile(16, 64, 16, 16, 16),
)

_BUSY = 96
"""Groups that keep a large GPU busy."""


def mma_tile(groups: int, m: int, n: int, k: int, local_memory: int) -> MmaTile:
    """The tile with least work and traffic, what it fills up with zeros counted, and too few groups.

    Of those whose operands and sums fit `local_memory`, in bytes; the smallest always does.
    """

    def cost(tile: MmaTile) -> float:
        filled = tile.filled(m, n, k)
        work = filled.m * filled.n * filled.k
        traffic = 32 * (1 / tile.m + 1 / tile.n) + 8 * (1 / tile.warp_m + 1 / tile.warp_n)
        count = groups * (filled.m // tile.m) * (filled.n // tile.n)
        return work * (1 + traffic) * max(1.0, (_BUSY / count) ** 0.5)

    return min((tile for tile in _TILES if tile.shared_bytes <= local_memory), key=cost, default=_TILES[-1])


def schedule_mma(function: tirx.PrimFunc, tile: MmaTile, lanes: int, *, vectors: tuple[bool, bool]) -> tirx.PrimFunc:
    """Schedule the blocks of `gpu_conv`: left and right, accumulator, sums, output [M, groups, N / lanes].

    Left and right are [groups, steps of 16 bytes, rows, 4 words]; `vectors` says of each whether the four words can be
    loaded at once.
    """
    fill, multiply, store = _registered(tile.warp_m, tile.warp_n)
    s = open_schedule(function)
    names = ("left", "right", "accumulator", "sums", "output")
    left, right, accumulator, sums, output = (s.get_sblock(name) for name in names)
    m, g, n = s.get_loops(output)
    block_m, row = s.split(m, [None, tile.m])
    block_n, column = s.split(n, [None, tile.n // lanes])
    s.reorder(g, block_m, block_n, row, column)
    for loop, axis in ((g, "blockIdx.z"), (block_n, "blockIdx.y"), (block_m, "blockIdx.x")):
        s.bind(loop, axis)
    _, y, x = s.split(s.fuse(row, column), [None, tile.warps, WARP])
    s.bind(y, "threadIdx.y")
    s.bind(x, "threadIdx.x")

    s.set_scope(sums, 0, "shared")
    s.compute_at(sums, block_n, preserve_unit_loops=True)
    rows, columns = s.get_loops(sums)[-2:]
    warp_m, rows = s.split(rows, [None, tile.warp_m])
    warp_n, columns = s.split(columns, [None, tile.warp_n])
    s.reorder(warp_m, warp_n, rows, columns)
    warp = s.fuse(warp_m, warp_n)
    s.bind(warp, "threadIdx.y")

    s.set_scope(accumulator, 0, "local")
    s.compute_at(accumulator, warp, preserve_unit_loops=True)
    _, at_row, at_column, k, r = s.get_loops(accumulator)[-5:]
    step, inner = s.split(k, [None, tile.k // STEP_WORDS])
    s.reorder(step, inner, at_row, at_column, r)
    for block, is_vector in ((left, vectors[0]), (right, vectors[1])):
        s.set_scope(block, 0, "shared")
        s.compute_at(block, step, preserve_unit_loops=True)
        *_, at_k, at_item, word = s.get_loops(block)
        if is_vector:
            s.vectorize(word)
            flat = s.fuse(at_k, at_item)
        else:
            flat = s.fuse(at_k, at_item, word)
        _, y, x = s.split(flat, [None, tile.warps, WARP])
        s.bind(y, "threadIdx.y")
        s.bind(x, "threadIdx.x")
    init = s.decompose_reduction(accumulator, step)
    s.tensorize(s.get_loops(init)[-2], fill)
    s.tensorize(at_row, multiply)
    s.tensorize(rows, store)
    return s.mod["main"]


def _registered(rows: int, columns: int) -> tuple[str, str, str]:
    fill, multiply, store = (f"qcompiler.mma_{what}_{rows}x{columns}" for what in ("fill", "multiply", "store"))
    # TVM keeps intrinsics in a table of its own; entering one twice is an error.
    if TensorIntrin.get(fill, allow_missing=True) is None:
        for name, make in ((fill, _fill), (multiply, _multiply), (store, _store)):
            TensorIntrin.register(name, *make(rows, columns))
    return fill, multiply, store


def _fill(rows: int, columns: int):
    call = f"qmma_fill<{rows // FRAGMENT}, {columns // FRAGMENT}>"

    @T.prim_func(s_tir=True)
    def description(
        C: T.Buffer((rows, columns), "int32", offset_factor=1, scope="local"),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:rows, 0:columns])
            for i, j in T.grid(rows, columns):
                with T.sblock("init"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    C[vi, vj] = T.int32(0)

    @T.prim_func(s_tir=True)
    def implementation(c: T.handle) -> None:
        pitch = T.int32()
        C = T.match_buffer(c, (rows, columns), "int32", offset_factor=1, scope="local", strides=[pitch, 1])  # noqa: N806
        with T.sblock("root"):
            T.reads()
            T.writes(C[0:rows, 0:columns])
            T.evaluate(T.call_extern("int32", call, C.access_ptr("w"), pitch))

    return description, implementation


def _multiply(rows: int, columns: int):
    call = f"qmma<{rows // FRAGMENT}, {columns // FRAGMENT}>"

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((rows, 4), "int32", offset_factor=1, scope="shared"),  # noqa: N803
        B: T.Buffer((columns, 4), "int32", offset_factor=1, scope="shared"),  # noqa: N803
        C: T.Buffer((rows, columns), "int32", offset_factor=1, scope="local"),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:rows, 0:columns], A[0:rows, 0:4], B[0:columns, 0:4])
            T.writes(C[0:rows, 0:columns])
            for i, j, k in T.grid(rows, columns, 4):
                with T.sblock("update"):
                    vi, vj, vk = T.axis.remap("SSR", [i, j, k])
                    C[vi, vj] = C[vi, vj] + T.call_pure_extern("int32", "qdot4", A[vi, vk], B[vj, vk], T.int32(0))

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        pitch = T.int32()
        A = T.match_buffer(a, (rows, 4), "int32", offset_factor=1, scope="shared")  # noqa: N806
        B = T.match_buffer(b, (columns, 4), "int32", offset_factor=1, scope="shared")  # noqa: N806
        C = T.match_buffer(c, (rows, columns), "int32", offset_factor=1, scope="local", strides=[pitch, 1])  # noqa: N806
        with T.sblock("root"):
            T.reads(C[0:rows, 0:columns], A[0:rows, 0:4], B[0:columns, 0:4])
            T.writes(C[0:rows, 0:columns])
            T.evaluate(T.call_extern("int32", call, C.access_ptr("rw"), pitch, A.access_ptr("r"), B.access_ptr("r")))

    return description, implementation


def _store(rows: int, columns: int):
    call = f"qmma_store<{rows // FRAGMENT}, {columns // FRAGMENT}>"

    @T.prim_func(s_tir=True)
    def description(
        C: T.Buffer((rows, columns), "int32", offset_factor=1, scope="local"),  # noqa: N803
        S: T.Buffer((rows, columns), "int32", offset_factor=1, scope="shared"),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:rows, 0:columns])
            T.writes(S[0:rows, 0:columns])
            for i, j in T.grid(rows, columns):
                with T.sblock("store"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    S[vi, vj] = C[vi, vj]

    @T.prim_func(s_tir=True)
    def implementation(c: T.handle, s: T.handle) -> None:
        pitch = T.int32()
        shared_pitch = T.int32()
        C = T.match_buffer(c, (rows, columns), "int32", offset_factor=1, scope="local", strides=[pitch, 1])  # noqa: N806
        S = T.match_buffer(  # noqa: N806
            s, (rows, columns), "int32", offset_factor=1, scope="shared", strides=[shared_pitch, 1]
        )
        with T.sblock("root"):
            T.reads(C[0:rows, 0:columns])
            T.writes(S[0:rows, 0:columns])
            T.evaluate(T.call_extern("int32", call, S.access_ptr("w"), shared_pitch, C.access_ptr("r"), pitch))

    return description, implementation
