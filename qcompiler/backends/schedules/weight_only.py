"""Matrix products of float activations by integer weights with a scale per group, written out in TVMScript.

A vector lane is an output. Weights lie in 32-bit words, [blocks, depth / codes per word, lanes]: a word holds the codes
of one output for successive inputs, its lowest byte first and of 4-bit codes those of the low nibbles before those of
the high ones. The same words feed a dot-product instruction, which wants four bytes of one output side by side, and the
float kernel, which shifts one code after the other down.

Codes are unsigned (`Form.zero_point` or one per group and output says which of them is zero), except for 8-bit ones
under a dot product of signed bytes, which are signed.
"""

# pyright: reportInvalidTypeForm=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# TVMScript annotates buffers with calls and gives operators meanings of its own.

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T  # noqa: N812 (TVMScript is read as text, by these names)

UNROLLED = 64
"""Longest run of inputs that is unrolled within a group."""


@dataclass(frozen=True)
class Form:
    """Sizes a kernel is made for."""

    rows: int
    depth: int
    """Inputs, as the activations have them."""
    outputs: int
    group: int
    """Inputs that share a scale; a multiple of the codes in a word."""
    bits: int
    lanes: int
    zero_point: int | None
    """The one code that is zero, or None if groups differ."""
    tile: int
    """Rows whose sums registers hold."""
    threads: int

    @property
    def groups(self) -> int:
        return -(-self.depth // self.group)

    @property
    def blocks(self) -> int:
        return -(-self.outputs // self.lanes)

    @property
    def per_word(self) -> int:
        return 32 // self.bits

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // self.tile) * self.tile

    @property
    def padded_depth(self) -> int:
        return self.groups * self.group

    @property
    def word_shape(self) -> tuple[int, int, int]:
        return self.blocks, self.padded_depth // self.per_word, self.lanes

    @property
    def scale_shape(self) -> tuple[int, int, int]:
        return self.blocks, self.groups, self.lanes


Dot = Callable[[Any, Any, Any], Any]
"""(sums int32 [lanes], weights as words [lanes], four activations as one word) → sums int32 [lanes]."""


def row_tile(rows: int, registers: int) -> int:
    """Rows per tile: two accumulators and as few filled-up rows as possible, then as many rows as possible."""
    most = 12 if registers >= 32 else 4
    return min(range(1, most + 1), key=lambda tile: (-(-rows // tile) * max(tile, min(rows, 4)), -tile))


def integer_kernel(form: Form, dot: Dot) -> tirx.PrimFunc:
    """`arithmetic.weight_only_matmul` with activations rounded to 8 bits per row and group.

    Function (X [rows, depth], W words, S scales, Z zero points, B bias [blocks, lanes], Y [rows, outputs]).
    """
    rows, depth, outputs, group, lanes = form.rows, form.depth, form.outputs, form.group, form.lanes
    groups, blocks, tile, padded_rows = form.groups, form.blocks, form.tile, form.padded_rows
    padded_depth, bits, words = form.padded_depth, form.bits, form.padded_depth // form.per_word
    vector = math.gcd(group, lanes)
    chunk = math.gcd(group, UNROLLED)
    chunks, quads, group_words = group // chunk, chunk // form.per_word, group // form.per_word
    per_word, tiles = form.per_word, padded_rows // tile
    uniform, zero = form.zero_point is not None, form.zero_point or 0
    zeros_shape = (1, 1, 1) if uniform else form.scale_shape
    outer = T.parallel if form.threads > 1 else T.serial
    row_loop = T.parallel if form.threads > 1 and rows >= 4 * form.threads else T.serial
    whole_rows, whole_depth, whole_outputs = rows == padded_rows, depth == padded_depth, outputs == blocks * lanes

    @T.prim_func(s_tir=True)
    def main(
        X: T.Buffer((rows, depth), "float32"),  # noqa: N803
        W: T.Buffer((blocks, words, lanes), "int32"),  # noqa: N803
        S: T.Buffer(form.scale_shape, "float32"),  # noqa: N803
        Z: T.Buffer(zeros_shape, "int32"),  # noqa: N803
        B: T.Buffer((blocks, lanes), "float32"),  # noqa: N803
        Y: T.Buffer((rows, outputs), "float32"),  # noqa: N803
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        XQ = T.sblock_alloc_buffer((padded_rows * padded_depth,), "int8")  # noqa: N806
        XS = T.sblock_alloc_buffer((padded_rows, groups), "float32")  # noqa: N806
        XC = T.sblock_alloc_buffer((padded_rows, groups), "int32")  # noqa: N806
        for m in row_loop(padded_rows):
            values = T.sblock_alloc_buffer((group,), "float32", scope="local")
            largest = T.sblock_alloc_buffer((vector,), "float32", scope="local")
            total = T.sblock_alloc_buffer((1,), "int32", scope="local")
            for g in T.serial(groups):
                for v in T.serial(group // vector):
                    if whole_rows and whole_depth:
                        values[T.ramp(v * vector, 1, vector)] = X[m, T.ramp(g * group + v * vector, 1, vector)]
                    else:
                        for i in T.serial(vector):
                            values[v * vector + i] = T.if_then_else(
                                T.And(m < rows, g * group + v * vector + i < depth),
                                X[m, g * group + v * vector + i],
                                T.float32(0),
                            )
                largest[T.ramp(0, 1, vector)] = T.broadcast(T.float32(0), vector)
                for v in T.serial(group // vector):
                    largest[T.ramp(0, 1, vector)] = T.max(
                        largest[T.ramp(0, 1, vector)], T.fabs(values[T.ramp(v * vector, 1, vector)])
                    )
                for i in T.unroll(vector - 1):
                    largest[0] = T.max(largest[0], largest[i + 1])
                XS[m, g] = largest[0] / T.float32(127)
                largest[0] = T.if_then_else(XS[m, g] > T.float32(0), T.float32(1) / XS[m, g], T.float32(0))
                total[0] = 0
                for v in T.serial(group // vector):
                    XQ[T.ramp(m * padded_depth + g * group + v * vector, 1, vector)] = T.cast(
                        T.nearbyint(values[T.ramp(v * vector, 1, vector)] * T.broadcast(largest[0], vector)),
                        f"int8x{vector}",
                    )
                for i in T.serial(group):
                    total[0] = total[0] + T.cast(XQ[m * padded_depth + g * group + i], "int32")
                XC[m, g] = total[0]
        for n in outer(blocks):
            sums = T.sblock_alloc_buffer((tile * lanes,), "float32", scope="local")
            dots = T.sblock_alloc_buffer((tile * lanes,), "int32", scope="local")
            for t in T.serial(tiles):
                for r in T.unroll(tile):
                    sums[T.ramp(r * lanes, 1, lanes)] = B[n, T.ramp(0, 1, lanes)]
                for g in T.serial(groups):
                    for r in T.unroll(tile):
                        if uniform:
                            dots[T.ramp(r * lanes, 1, lanes)] = T.broadcast(XC[t * tile + r, g] * (-zero), lanes)
                        else:
                            dots[T.ramp(r * lanes, 1, lanes)] = Z[n, g, T.ramp(0, 1, lanes)] * T.broadcast(
                                T.int32(0) - XC[t * tile + r, g], lanes
                            )
                    for c in T.serial(chunks):
                        for q in T.unroll(quads):
                            for half in T.unroll(8 // bits):
                                for r in T.unroll(tile):
                                    dots[T.ramp(r * lanes, 1, lanes)] = dot(
                                        dots[T.ramp(r * lanes, 1, lanes)],
                                        _bytes(
                                            W[n, g * group_words + c * quads + q, T.ramp(0, 1, lanes)],
                                            half,
                                            bits,
                                            lanes,
                                        ),
                                        T.reinterpret(
                                            XQ[
                                                T.ramp(
                                                    (t * tile + r) * padded_depth
                                                    + g * group
                                                    + c * chunk
                                                    + q * per_word
                                                    + half * 4,
                                                    1,
                                                    4,
                                                )
                                            ],
                                            dtype="int32",
                                        ),
                                    )
                    for r in T.unroll(tile):
                        sums[T.ramp(r * lanes, 1, lanes)] = sums[T.ramp(r * lanes, 1, lanes)] + T.cast(
                            dots[T.ramp(r * lanes, 1, lanes)], f"float32x{lanes}"
                        ) * (S[n, g, T.ramp(0, 1, lanes)] * T.broadcast(XS[t * tile + r, g], lanes))
                for r in T.unroll(tile):
                    if whole_rows and whole_outputs:
                        Y[t * tile + r, T.ramp(n * lanes, 1, lanes)] = sums[T.ramp(r * lanes, 1, lanes)]
                    else:
                        for i in T.serial(lanes):
                            if T.And(t * tile + r < rows, n * lanes + i < outputs):
                                Y[t * tile + r, n * lanes + i] = sums[r * lanes + i]

    return main


def _bytes(words: Any, half: Any, bits: int, lanes: int) -> Any:
    """The low or high nibbles of every byte, or the bytes themselves."""
    if bits == 8:
        return words
    mask = T.broadcast(T.int32(0x0F0F0F0F), lanes)
    return T.bitwise_and(T.shift_right(words, T.broadcast(T.int32(4) * half, lanes)), mask)


def float_kernel(form: Form) -> tirx.PrimFunc:
    """`arithmetic.weight_only_matmul` in float32; arguments as of `integer_kernel`."""
    rows, depth, outputs, group, lanes = form.rows, form.depth, form.outputs, form.group, form.lanes
    groups, blocks, tile, padded_rows = form.groups, form.blocks, form.tile, form.padded_rows
    padded_depth, bits, words = form.padded_depth, form.bits, form.padded_depth // form.per_word
    per_word, group_words, tiles = form.per_word, group // form.per_word, padded_rows // tile
    uniform, zero = form.zero_point is not None, form.zero_point or 0
    zeros_shape = (1, 1, 1) if uniform else form.scale_shape
    outer = T.parallel if form.threads > 1 else T.serial
    as_is = rows == padded_rows and depth == padded_depth
    whole_outputs = outputs == blocks * lanes
    staged_shape = (1, 1) if as_is else (padded_rows, padded_depth)

    @T.prim_func(s_tir=True)
    def main(
        X: T.Buffer((rows, depth), "float32"),  # noqa: N803
        W: T.Buffer((blocks, words, lanes), "int32"),  # noqa: N803
        S: T.Buffer(form.scale_shape, "float32"),  # noqa: N803
        Z: T.Buffer(zeros_shape, "int32"),  # noqa: N803
        B: T.Buffer((blocks, lanes), "float32"),  # noqa: N803
        Y: T.Buffer((rows, outputs), "float32"),  # noqa: N803
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        P = T.sblock_alloc_buffer(staged_shape, "float32")  # noqa: N806
        if not as_is:
            for m, k in T.grid(padded_rows, padded_depth):
                P[m, k] = T.if_then_else(T.And(m < rows, k < depth), X[m, k], T.float32(0))
        for n in outer(blocks):
            sums = T.sblock_alloc_buffer((tile * lanes,), "float32", scope="local")
            part = T.sblock_alloc_buffer((tile * lanes,), "float32", scope="local")
            weight = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
            for t in T.serial(tiles):
                for r in T.unroll(tile):
                    sums[T.ramp(r * lanes, 1, lanes)] = B[n, T.ramp(0, 1, lanes)]
                for g in T.serial(groups):
                    for r in T.unroll(tile):
                        part[T.ramp(r * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
                    for q in T.serial(group_words):
                        for code in T.unroll(per_word):
                            weight[T.ramp(0, 1, lanes)] = T.cast(
                                _code(W[n, g * group_words + q, T.ramp(0, 1, lanes)], code, bits, lanes)
                                - (T.broadcast(T.int32(zero), lanes) if uniform else Z[n, g, T.ramp(0, 1, lanes)]),
                                f"float32x{lanes}",
                            )
                            for r in T.unroll(tile):
                                if as_is:
                                    part[T.ramp(r * lanes, 1, lanes)] = part[T.ramp(r * lanes, 1, lanes)] + weight[
                                        T.ramp(0, 1, lanes)
                                    ] * T.broadcast(X[t * tile + r, g * group + q * per_word + code], lanes)
                                else:
                                    part[T.ramp(r * lanes, 1, lanes)] = part[T.ramp(r * lanes, 1, lanes)] + weight[
                                        T.ramp(0, 1, lanes)
                                    ] * T.broadcast(P[t * tile + r, g * group + q * per_word + code], lanes)
                    for r in T.unroll(tile):
                        sums[T.ramp(r * lanes, 1, lanes)] = (
                            sums[T.ramp(r * lanes, 1, lanes)]
                            + part[T.ramp(r * lanes, 1, lanes)] * S[n, g, T.ramp(0, 1, lanes)]
                        )
                for r in T.unroll(tile):
                    if as_is and whole_outputs:
                        Y[t * tile + r, T.ramp(n * lanes, 1, lanes)] = sums[T.ramp(r * lanes, 1, lanes)]
                    else:
                        for i in T.serial(lanes):
                            if T.And(t * tile + r < rows, n * lanes + i < outputs):
                                Y[t * tile + r, n * lanes + i] = sums[r * lanes + i]

    return main


def _code(words: Any, position: Any, bits: int, lanes: int) -> Any:
    """Code number `position` of each word, which is that of the input at this place."""
    shift = position * 8 if bits == 8 else position % 4 * 8 + position // 4 * 4
    mask = T.broadcast(T.int32((1 << bits) - 1), lanes)
    return T.bitwise_and(T.shift_right(words, T.broadcast(shift, lanes)), mask)
