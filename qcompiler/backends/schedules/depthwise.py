"""Depthwise convolutions: channels in lanes, the rows of a window in the bytes or halves of each lane's word.

Sources as in `dot`. There an instruction multiplies one word, in all lanes, by weights; here every lane has its own.
"""

# pyright: reportInvalidTypeForm=false
# TVMScript annotates buffers with calls.

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T  # noqa: N812 (TVMScript is read as text, by these names)

from qcompiler.backends import te
from qcompiler.backends.base import HostCode
from qcompiler.backends.schedules.loops import open_schedule


@dataclass(frozen=True)
class LaneDot:
    """``c[lane] += Σ_{i<length} a[lane][i] * b[lane][i]``, the operands packed in words of 32 bits."""

    name: str
    """Its TensorIntrin."""
    lanes: int
    length: int
    a_dtype: str
    """Type of a's elements; b's are signed and as wide."""

    @property
    def bits(self) -> int:
        return 32 // self.length


_BYTES, _ANY = ("int8", "uint8"), ("int8", "uint8", "int16")
_INSTRUCTIONS: tuple[tuple[str, int, tuple[str, ...], str, tuple[tuple[int, str], ...]], ...] = (
    (
        "avx512vnni",
        4,
        _BYTES,
        "uint8",
        (
            (16, "llvm.x86.avx512.vpdpbusd.512"),
            (8, "llvm.x86.avx512.vpdpbusd.256"),
            (4, "llvm.x86.avx512.vpdpbusd.128"),
        ),
    ),
    ("avxvnni", 4, _BYTES, "uint8", ((8, "llvm.x86.avx512.vpdpbusd.256"), (4, "llvm.x86.avx512.vpdpbusd.128"))),
    ("i8mm", 4, ("uint8",), "uint8", ((4, "llvm.aarch64.neon.usdot.v4i32.v16i8"),)),
    ("dotprod", 4, _BYTES, "int8", ((4, "llvm.aarch64.neon.sdot.v4i32.v16i8"),)),
    (
        "avx512bw",
        2,
        _ANY,
        "int16",
        ((16, "llvm.x86.avx512.pmaddw.d.512"), (8, "llvm.x86.avx2.pmadd.wd"), (4, "llvm.x86.sse2.pmadd.wd")),
    ),
    ("avx2", 2, _ANY, "int16", ((8, "llvm.x86.avx2.pmadd.wd"), (4, "llvm.x86.sse2.pmadd.wd"))),
    ("sse2", 2, _ANY, "int16", ((4, "llvm.x86.sse2.pmadd.wd"),)),
)
"""LLVM's name of what the CPU must have, length, activations it suits, type of a, and LLVM's name by lanes; best
first."""


def lane_dot(host: HostCode, x_dtype: str, channels: int) -> LaneDot | None:
    """The best instruction for so many channels; None if there is none, or channels would be left over."""
    for feature, length, takes, a_dtype, widths in _INSTRUCTIONS:
        if feature not in host.features or x_dtype not in takes:
            continue
        for lanes, instruction in widths:
            if channels % lanes == 0:
                return _registered(lanes, length, a_dtype, instruction)
    return None


def _registered(lanes: int, length: int, a_dtype: str, instruction: str) -> LaneDot:
    name = f"qcompiler.lanes.{instruction}"
    # TVM keeps intrinsics in a table of its own; entering one twice is an error.
    if TensorIntrin.get(name, allow_missing=True) is None:
        TensorIntrin.register(name, _description(lanes, length, a_dtype), _implementation(lanes, length, instruction))
    return LaneDot(name, lanes, length, a_dtype)


def _description(lanes: int, length: int, a_dtype: str) -> Any:
    function = te.word_dot_name(length, a_dtype)

    @T.prim_func(s_tir=True)
    def description(
        A: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:lanes], B[0:lanes])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                with T.sblock("update"):
                    vi = T.axis.remap("S", [i])
                    C[vi] = C[vi] + T.call_pure_extern(function, A[vi], B[vi], dtype="int32")

    return description


def _implementation(lanes: int, length: int, instruction: str) -> Any:
    words = f"int32x{lanes}"
    if length == 2:
        halves = f"int16x{2 * lanes}"

        @T.prim_func(s_tir=True)
        def pairs(
            A: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
            B: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
            C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
        ) -> None:
            with T.sblock("root"):
                T.reads(C[0:lanes], A[0:lanes], B[0:lanes])
                T.writes(C[0:lanes])
                C[T.ramp(T.int32(0), 1, lanes)] = C.vload([0], dtype=words) + T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id(instruction),
                    T.reinterpret(A.vload([0], dtype=words), dtype=halves),
                    T.reinterpret(B.vload([0], dtype=words), dtype=halves),
                    dtype=words,
                )

        return pairs
    quarters = f"int8x{4 * lanes}"

    @T.prim_func(s_tir=True)
    def quads(
        A: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
        B: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
        C: T.Buffer((lanes,), "int32", offset_factor=1),  # noqa: N803
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:lanes], B[0:lanes])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(instruction),
                C.vload([0], dtype=words),
                T.reinterpret(A.vload([0], dtype=words), dtype=quarters),
                T.reinterpret(B.vload([0], dtype=words), dtype=quarters),
                dtype=words,
            )

    return quads


CHUNK_BYTES = 24 * 1024
"""Of a row's words at once: they stay in the first cache beside the rows they are made of."""


def chunk_vectors(channels: int, columns: int, lanes: int) -> int:
    """How many vectors of channels are interleaved at once: as many as fit, at most a cache line of the input."""
    vectors = channels // lanes
    fitting = max(1, min(CHUNK_BYTES // (columns * lanes * 4), 64 // lanes))
    return next(count for count in range(min(fitting, vectors), 0, -1) if vectors % count == 0)


def schedule_words(function: tirx.PrimFunc, dot: LaneDot, chunk: int, pixels: int, *, threads: int) -> tirx.PrimFunc:
    """Blocks "words" [n, rows, columns, parts, channels], "accumulator" and "output" [n, rows, row, pixel, channel].

    A row's words are made for `chunk` vectors of channels; then one vector of channels at a time goes along the row,
    its weights in registers.
    """
    s = open_schedule(function)
    words, accumulator, output = (s.get_sblock(name) for name in ("words", "accumulator", "output"))
    n, y, row, x, c = s.get_loops(output)
    rows = s.fuse(n, y)
    chunks, block, v = s.split(c, [None, chunk, dot.lanes])
    strip, pixel = s.split(x, [None, pixels])
    s.reorder(rows, chunks, block, strip, row, pixel, v)
    s.compute_at(accumulator, strip, preserve_unit_loops=True)
    at_row, at_pixel, at_lane, kx, part = s.get_loops(accumulator)[-5:]
    s.reorder(kx, part, at_row, at_pixel, at_lane)
    s.compute_at(words, chunks, preserve_unit_loops=True)
    if threads > 1:
        s.parallel(rows)
    init = s.decompose_reduction(accumulator, kx)
    s.tensorize(at_lane, dot.name)
    for loop in (kx, part, at_row, at_pixel, *s.get_loops(init)[-3:-1], row, pixel):
        s.unroll(loop)
    s.vectorize(s.get_loops(init)[-1])
    s.vectorize(v)
    word_channels = s.get_loops(words)[-1]
    _, word_lanes = s.split(word_channels, [None, dot.lanes])
    s.vectorize(word_lanes)
    return s.mod["main"]
