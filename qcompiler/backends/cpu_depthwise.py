"""Depthwise convolutions on the CPU: channels in vector lanes, sums over the window.

`word_convolution` is for integers. The rows of a window lie one in each byte (or half) of a word per channel, so
that one instruction multiplies and adds them all; where a word has room for more rows than the kernel, it serves two
rows of outputs, with the weights shifted. Words are made row by row as they are needed, padding included.
`plain_convolution` is for floats, for channels that fill no vector, weights of few bits and weights with a zero point.
"""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from qcompiler.backends import packed_bits, te
from qcompiler.backends.base import HostCode, Kernel, parameters_of, placeholder
from qcompiler.backends.cpu_packed import Finish, Geometry, Operands, stage, zero_of
from qcompiler.backends.schedules import conv as schedule
from qcompiler.backends.schedules.depthwise import LaneDot, chunk_vectors, lane_dot, schedule_words
from qcompiler.backends.schedules.loops import threads_for
from qcompiler.backends.te import Expr

_PIXELS = 4
"""Neighbours in a row computed together, at most."""


def depthwise_convolution(
    geometry: Geometry,
    operands_in: Callable[[str], Operands],
    x_dtype: str,
    finish: Finish,
    x_value: ir.Value,
    host: HostCode,
) -> Kernel:
    """An integer convolution in which every output channel reads one channel.

    `operands_in` gives the operands in terms of activations of a type, which may be another than `x_dtype`.
    """
    plain = operands_in(x_dtype)
    dot = lane_dot(host, x_dtype, geometry.group) if plain.sums == "int32" else None
    if dot is None or plain.w_zero_point or plain.bits < 8:
        return plain_convolution(geometry, plain, finish, x_value, host)
    return word_convolution(geometry, operands_in(dot.a_dtype), finish, x_value, host, dot)


def word_convolution(
    geometry: Geometry, operands: Operands, finish: Finish, x_value: ir.Value, host: HostCode, dot: LaneDot
) -> Kernel:
    """For weights of 8 bits without a zero point; `dot` takes the operands and divides the channels."""
    n, h, w, c = geometry.x_shape
    oh, ow = geometry.out_size
    _, kh, kw, _ = operands.weights.shape
    (sy, sx), (dy, dx), (top, left) = geometry.strides, geometry.dilations, geometry.pad
    together = _rows_together(kh, sy, dy, oh, dot.length)
    parts, rows = -(-kh // dot.length), kh + (together - 1) * sy
    columns = (ow - 1) * sx + (kw - 1) * dx + 1

    x = placeholder(x_value, (n, h, w, c))
    scalars = [placeholder(value, (1,)) for value in finish.scalars]
    if operands.zero_scalar is None:
        zero = operands.x_zero_point - operands.x_offset
        fill, filled = te.const(zero, x.dtype), te.const(_filled_word(zero, min(rows, dot.length), dot.bits), "int32")
    else:
        fill = scalars[operands.zero_scalar][0]
        filled = _packed([fill] * min(rows, dot.length), dot)

    def word(b: Expr, i: Expr, j: Expr, p: Expr, k: Expr) -> Expr:
        packed = _word(x, geometry, fill, filled, dot, (b, i * (together * sy) - top, j - left, k), p, rows)
        # Adding 128 to a byte modulo 256 flips its highest bit.
        return te.bitwise_xor(packed, te.const(-0x7F7F7F80, "int32")) if operands.x_offset else packed

    words = te.compute((n, oh // together, columns, parts, c), word, "words")
    arrays = [
        _pack_words(operands.weights[..., 0], together, sy, dot),
        operands.bias,
        *finish.channels,
    ]
    weights, bias, *channels = parameters_of(arrays)
    maps = [placeholder(value, (n, oh // together, together, ow, c)) for value in finish.maps]
    kx, part = te.reduce_axis(kw, "kx"), te.reduce_axis(parts, "part")
    shape = (n, oh // together, together, ow, c)
    accumulator = te.compute(
        shape,
        lambda b, i, row, j, k: te.reduce_sum(
            te.word_dot(words[b, i, j * sx + kx * dx, part, k], weights[row, kx, part, k], dot.length, dot.a_dtype),
            axis=[kx, part],
        ),
        "accumulator",
    )

    def finished(*at: Expr) -> Expr:
        total = accumulator[at] + bias[at[-1]]
        elements = [*(tensor[at] for tensor in maps), *(scalar[0] for scalar in scalars)]
        return finish.expression(total, [array[at[-1]] for array in channels], elements)

    output = te.compute(shape, finished, "output")
    function = te.prim_func([x, *maps, *scalars, weights, bias, *channels, output])
    pixels = next(count for count in range(_PIXELS, 0, -1) if ow % count == 0)
    threads = threads_for(host, geometry.macs, dot.length * dot.lanes)
    chunk = chunk_vectors(c, columns, dot.lanes)
    scheduled = schedule_words(function, dot, chunk, pixels, threads=threads)
    return Kernel(scheduled, (x_value, *finish.maps, *finish.scalars), tuple(arrays))


def _rows_together(kernel: int, stride: int, dilation: int, rows: int, length: int) -> int:
    """Rows of outputs that the same words serve."""
    fits = kernel + stride <= length and dilation == 1 and rows % 2 == 0
    return 2 if fits else 1


def _word(
    x: te.Tensor,
    geometry: Geometry,
    fill: Expr,
    filled: Expr,
    dot: LaneDot,
    at: tuple[Expr, Expr, Expr, Expr],
    part: Expr,
    rows: int,
) -> Expr:
    """x of one channel in up to `rows` rows below each other, those of one part, from a position on.

    Outside the input `fill` stands for a number, and `filled` for all of a word.
    """
    _, h, w, _ = geometry.x_shape
    (dy, _), (up_y, up_x) = geometry.dilations, geometry.dilate
    batch, first, column, channel = at
    stacked: list[Expr] = []
    for position in range(min(dot.length, rows)):
        y = first + (part * dot.length + position) * dy
        inside = [y >= 0, y < (h - 1) * up_y + 1, *([(y % up_y).equal(0)] if up_y > 1 else [])]
        stacked.append(te.if_then_else(te.all_of(*inside), x[batch, y // up_y, column // up_x, channel], fill))
    inside = [column >= 0, column < (w - 1) * up_x + 1, *([(column % up_x).equal(0)] if up_x > 1 else [])]
    # Columns are tested once a word; rows, which stay the same along the loop, number by number.
    return te.if_then_else(te.all_of(*inside), _packed(stacked, dot), filled)


def _packed(numbers: Sequence[Expr], dot: LaneDot) -> Expr:
    """A word, the first number lowest."""
    word: Expr | None = None
    for position, number in enumerate(numbers):
        bits = number.astype("uint8" if dot.bits == 8 else "int16").astype(f"uint{dot.bits}").astype("int32")
        shifted = te.shift_left(bits, te.const(position * dot.bits, "int32")) if position else bits
        word = shifted if word is None else te.bitwise_or(word, shifted)
    assert word is not None
    return word


def _filled_word(number: int, count: int, bits: int) -> int:
    """What `_packed` makes of the same number so many times."""
    word = sum((number & ((1 << bits) - 1)) << (position * bits) for position in range(count))
    return word - (1 << 32) if word >= 1 << 31 else word


def _pack_words(weights: np.ndarray, together: int, stride: int, dot: LaneDot) -> np.ndarray:
    """[C, KH, KW] to words [together, KW, parts, C], rows of the kernel below each other and zeros around them."""
    channels, kh, kw = weights.shape
    parts = -(-kh // dot.length)
    packed = np.zeros((together, kw, parts * dot.length, channels), np.int8 if dot.bits == 8 else np.int16)
    for row in range(together):
        packed[row, :, row * stride : row * stride + kh] = weights.transpose(2, 1, 0)
    by_word = packed.reshape(together, kw, parts, dot.length, channels).swapaxes(-1, -2)
    return np.ascontiguousarray(by_word).view("<i4")[..., 0].astype(np.int32)


def plain_convolution(
    geometry: Geometry, operands: Operands, finish: Finish, x_value: ir.Value, host: HostCode
) -> Kernel:
    """Any depthwise convolution."""
    n, h, w, c = geometry.x_shape
    oh, ow = geometry.out_size
    _, kh, kw, _ = operands.weights.shape
    (sy, sx), (dy, dx) = geometry.strides, geometry.dilations
    rows, columns = (oh - 1) * sy + (kh - 1) * dy + 1, (ow - 1) * sx + (kw - 1) * dx + 1

    x = placeholder(x_value, (n, h, w * c))
    as_is = (
        operands.x_offset == 0 and geometry.pad == (0, 0) and geometry.dilate == (1, 1) and rows <= h and columns <= w
    )
    scalars = [placeholder(value, (1,)) for value in finish.scalars]
    zero = zero_of(operands, scalars)
    staged = x if as_is else stage(x, geometry, operands, (rows, columns * c), (c, 1, 1), zero)

    taps = np.ascontiguousarray(operands.weights[..., 0].transpose(1, 2, 0))
    stored = packed_bits.store(taps, operands.bits)
    arrays = [*stored.arrays, operands.bias, *finish.channels]
    parameters = parameters_of(arrays)
    weights, (bias, *channels) = stored.read(parameters)
    maps = [placeholder(value, (n, oh, ow, c)) for value in finish.maps]
    ky, kx = te.reduce_axis(kh, "ky"), te.reduce_axis(kw, "kx")
    sums = operands.sums

    def product(b: Expr, i: Expr, j: Expr, k: Expr) -> Expr:
        pixel = staged[b, i * sy + ky * dy, (j * sx + kx * dx) * c + k].astype(sums)
        weight = weights[ky, kx, k].astype(sums)
        return te.reduce_sum(
            pixel * (weight - operands.w_zero_point if operands.w_zero_point else weight), axis=[ky, kx]
        )

    accumulator = te.compute((n, oh, ow, c), product, "accumulator")

    def finished(b: Expr, i: Expr, j: Expr, k: Expr) -> Expr:
        total = accumulator[b, i, j, k] + bias[k].astype(sums)
        elements = [*(tensor[b, i, j, k] for tensor in maps), *(scalar[0] for scalar in scalars)]
        return finish.expression(total, [array[k] for array in channels], elements)

    output = te.compute((n, oh, ow, c), finished, "output")
    function = te.prim_func([x, *maps, *scalars, *parameters, output])
    lanes = schedule.depthwise_lanes(c, host.vector_bytes // 4)
    threads = threads_for(host, geometry.macs, host.vector_bytes // 4)
    scheduled = schedule.schedule_depthwise(function, lanes, threads=threads)
    scheduled = stored.scheduled(scheduled, threads=threads)
    return Kernel(scheduled, (x_value, *finish.maps, *finish.scalars), tuple(arrays))
